// Checks the KV append and gather kernels on this machine's GPU against float64 on the CPU.
#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "attention.h"
#include "support.cuh"

using namespace tpla::cuda;

static float from_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

static double from_e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude = exponent ? std::ldexp(1.0 + mantissa / 8.0, exponent - 7) : std::ldexp(mantissa / 8.0, -6);
  return byte & 0x80 ? -magnitude : magnitude;
}

static bool check_append(std::mt19937& random, KvFormat format, int shared, int slice_begin, int slice_width, int page_size, bool interleaved) {
  const int tokens = 1 + random() % 300, positions = 500, pages = tokens / page_size + 3;
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> latent(tokens * 512), rope(tokens * 64);
  for (auto& x : latent) x = __float2bfloat16(normal(random) * 3);
  for (auto& x : rope) x = __float2bfloat16(normal(random));
  std::vector<float> weight(512), cos_sin(positions * 64);
  for (int c = 0; c < 512; ++c) weight[c] = std::ldexp(0.5f + 0.1f * normal(random), c / 64 * 3);  // far apart, for scales that differ
  for (int p = 0; p < positions; ++p) {
    for (int i = 0; i < 32; ++i) {
      const double angle = p * std::pow(10000.0, -i / 32.0);
      cos_sin[p * 64 + i] = std::cos(angle);
      cos_sin[p * 64 + 32 + i] = std::sin(angle);
    }
  }
  std::vector<int> position(tokens);
  std::vector<int64_t> order(pages * page_size), slots(tokens);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (int t = 0; t < tokens; ++t) {
    position[t] = random() % positions;
    slots[t] = t % 17 == 16 ? -1 : order[t];
  }
  const int width = shared + slice_width, token_bytes = kv_token_bytes(format, width);
  Buffer<__nv_bfloat16> d_latent(latent), d_rope(rope);
  Buffer<float> d_weight(weight), d_cos_sin(cos_sin);
  Buffer<int> d_position(position);
  Buffer<int64_t> d_slots(slots);
  Buffer<uint8_t> kv(static_cast<size_t>(pages) * page_size * token_bytes);
  kv.poison();
  KvAppend call;
  call.latent = d_latent.data;
  call.rope = d_rope.data;
  call.norm_weight = d_weight.data;
  call.cos_sin = d_cos_sin.data;
  call.positions = d_position.data;
  call.slots = d_slots.data;
  call.kv = kv.data;
  call.tokens = tokens;
  call.shared_width = shared;
  call.slice_begin = slice_begin;
  call.slice_width = slice_width;
  call.page_size = page_size;
  call.format = format;
  call.interleaved = interleaved;
  kv_append(call, nullptr);
  finish("kv_append");
  const auto bytes = kv.read();

  double worst = 0, worst_rope = 0;
  size_t written = 0;
  for (int t = 0; t < tokens; ++t) {
    if (slots[t] < 0) continue;
    ++written;
    const uint8_t* row = bytes.data() + slots[t] * token_bytes;
    double squares = 0;
    for (int c = 0; c < 512; ++c) squares += std::pow(__bfloat162float(latent[t * 512 + c]), 2);
    const double inverse = 1.0 / std::sqrt(squares / 512 + 1e-6);
    double error = 0, norm = 0;
    for (int c = 0; c < width; ++c) {
      const int column = c < shared ? c : slice_begin + c - shared;
      const double want = __bfloat162float(latent[t * 512 + column]) * inverse * weight[column];
      double got;
      if (format == KvFormat::bf16) {
        uint16_t bits;
        std::memcpy(&bits, row + c * 2, 2);
        got = from_bf16(bits);
      } else {
        float scale;
        std::memcpy(&scale, row + width + c / 128 * 4, 4);
        int exponent;
        if (std::frexp(scale, &exponent) != 0.5) worst = NAN;  // not a power of two
        got = from_e4m3(row[c]) * scale;
      }
      error += (got - want) * (got - want);
      norm += want * want;
      if (c % 128 < 127 && c < width - 1) continue;
      const double relative = std::sqrt(error / norm);  // of the columns of a scale
      if (!(relative <= worst)) worst = relative;
      error = norm = 0;
    }
    for (int i = 0; i < 32; ++i) {
      const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + 32;
      const double a = __bfloat162float(rope[t * 64 + first]), b = __bfloat162float(rope[t * 64 + second]);
      const double c = cos_sin[position[t] * 64 + i], s = cos_sin[position[t] * 64 + 32 + i];
      uint16_t bits[2];
      std::memcpy(&bits[0], row + token_bytes - 128 + first * 2, 2);
      std::memcpy(&bits[1], row + token_bytes - 128 + second * 2, 2);
      const double difference = std::max(std::abs(from_bf16(bits[0]) - (a * c - b * s)), std::abs(from_bf16(bits[1]) - (b * c + a * s)));
      if (!(difference <= worst_rope)) worst_rope = difference;
    }
  }
  size_t untouched = 0;
  for (uint8_t byte : bytes) untouched += byte == 0xFF;
  const bool only_slots = untouched >= bytes.size() - written * token_bytes;

  // Gather every written row into a second pool in reverse order.
  std::vector<int64_t> from, to;
  for (int t = 0; t < tokens; ++t) {
    if (slots[t] >= 0) from.push_back(slots[t]);
  }
  for (size_t i = 0; i < from.size(); ++i) to.push_back(from.size() - 1 - i);
  Buffer<int64_t> d_from(from), d_to(to);
  Buffer<uint8_t> second(bytes.size());
  second.poison();
  KvGather gather;
  gather.from = kv.data;
  gather.to = second.data;
  gather.from_slots = d_from.data;
  gather.to_slots = d_to.data;
  gather.tokens = static_cast<int>(from.size());
  gather.token_bytes = token_bytes;
  gather.page_size = page_size;
  kv_gather(gather, nullptr);
  finish("kv_gather");
  const auto copied = second.read();
  bool gathered = true;
  for (size_t i = 0; i < from.size(); ++i) gathered = gathered && std::memcmp(copied.data() + to[i] * token_bytes, bytes.data() + from[i] * token_bytes, token_bytes) == 0;

  // Half a step of a mantissa of 8 bits, and of 4.
  const bool ok = worst < (format == KvFormat::bf16 ? 0x1p-8 : 0x1p-4) && worst_rope < 4e-2 && only_slots && gathered;
  std::printf("%s append %s columns %d and %d+%d page %d tokens %d: rel %.2e rope %.1e%s%s\n", ok ? "ok  " : "FAIL", format == KvFormat::bf16 ? "bf16" : "fp8", shared, slice_begin, slice_width,
              page_size, tokens, worst, worst_rope, only_slots ? "" : " WROTE ELSEWHERE", gathered ? "" : " GATHER DIFFERS");
  return ok;
}

// Shared columns, the rank's own: whole, halves, quarters, and behind shared columns halves and a quarter of the rest.
constexpr int kRows[][3] = {{0, 0, 512}, {0, 256, 256}, {0, 128, 128}, {128, 128, 192}, {128, 320, 192}, {64, 64, 224}, {64, 288, 224}, {128, 416, 96}, {0, 64, 320}};

int main() {
  std::mt19937 random(5);
  int failures = 0;
  for (const int page_size : {16, 64, 48}) {
    for (const bool interleaved : {true, false}) {
      for (const KvFormat format : {KvFormat::bf16, KvFormat::fp8}) {
        for (const auto& [shared, slice_begin, slice_width] : kRows) failures += !check_append(random, format, shared, slice_begin, slice_width, page_size, interleaved);
      }
    }
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}
