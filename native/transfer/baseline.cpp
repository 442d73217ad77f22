#include "transfer/baseline.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <sys/socket.h>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/kv_row.h"
#include "core/numeric.h"
#include "transfer/kv_checksum.h"
#include "transfer/parallel.h"

namespace tpla {

namespace {

constexpr size_t kBlockBytes = 1 << 20;
constexpr int kConnectTimeoutMs = 5000;

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void set_blocking(int socket) { fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) & ~O_NONBLOCK); }

// bf16 bits of the values of one row: random signs and mantissas, exponents 126 and 127.
void row_bits(uint64_t seed, int layer, int token, uint16_t* bits, int count) {
  const uint64_t row = mix64(seed * 0x9e3779b97f4a7c15ULL + (uint64_t(layer) << 32 | uint32_t(token)));
  for (int column = 0; column < count; column += 4) {
    uint64_t random = mix64(row + uint64_t(column));
    for (int i = column; i < std::min(column + 4, count); i++, random >>= 16) bits[i] = uint16_t((random & 0x80ff) | 0x3f00);
  }
}

}  // namespace

void fill_pattern(const KvRegion& region, const PageTables& pages, Range tokens, int first_layer, uint64_t seed) {
  const KvLayout& layout = region.layout;
  if (layout.form != KvForm::mla || region.device >= 0) throw Error("REQUEST_INVALID", "patterns are made in canonical host memory (mla)");
  check_pages("pattern", region, pages, {0, layout.layers}, tokens);
  const int columns = layout.latent + layout.rope;
  parallel_for(size_t(layout.layers) * pages_of(layout, tokens).size(), transfer_threads(), [&](size_t unit) {
    std::vector<uint16_t> bits(columns);
    std::vector<float> values(columns);
    const int count = pages_of(layout, tokens).size();
    const int layer = static_cast<int>(unit / count);
    const int page = pages_of(layout, tokens).begin + static_cast<int>(unit % count);
    const int begin = std::max(tokens.begin, page * layout.page_tokens);
    const int end = std::min(tokens.end, (page + 1) * layout.page_tokens);
    for (int token = begin; token < end; token++) {
      row_bits(seed, first_layer + layer, token, bits.data(), columns);
      std::byte* row = region.row(0, layer, place_of(layout, pages, page).page, token % layout.page_tokens);
      if (layout.dtype == KvDType::bf16) {
        std::memcpy(row, bits.data(), bits.size() * 2);
        continue;
      }
      for (int i = 0; i < columns; i++) values[i] = bf16_to_float(bits[i]);
      encode_row(layout.row(layer), values.data(), values.data() + layout.latent, row);
    }
  });
}

double plain_copy(const KvRegion& src, const KvRegion& dst, size_t bytes, int threads) {
  const size_t most = std::min(src.layout.rank_bytes(src.pages), dst.layout.rank_bytes(dst.pages));
  if (bytes > most) throw Error("REQUEST_INVALID", "plain copy of " + std::to_string(bytes) + " bytes, the smaller side has " + std::to_string(most));
  const auto start = Clock::now();
  // As many pieces as threads: each is one long memcpy.
  const size_t pieces = static_cast<size_t>(std::max(threads, 1));
  parallel_for(pieces, threads, [&](size_t i) {
    const size_t begin = bytes * i / pieces;
    std::memcpy(dst.base[0] + begin, src.base[0] + begin, bytes * (i + 1) / pieces - begin);
  });
  return seconds_since(start);
}

std::shared_ptr<SocketSink> SocketSink::listen(const std::string& host) {
  auto sink = std::make_shared<SocketSink>();
  SocketAddress address;
  address.host = host;
  sink->listener_ = std::make_shared<ChannelListener>(address, sink);
  sink->port_ = sink->listener_->port();
  sink->listener_->start();
  return sink;
}

void SocketSink::close() {
  if (listener_) listener_->close();
  listener_.reset();
}

void SocketSink::on_accept(UniqueFd socket) {
  std::thread([held = std::make_shared<UniqueFd>(std::move(socket))] {
    set_blocking(held->get());
    std::vector<char> scrap(kBlockBytes);
    ssize_t got;
    while ((got = recv(held->get(), scrap.data(), scrap.size(), 0)) > 0 || (got < 0 && errno == EINTR)) {
    }
    send(held->get(), "", 1, MSG_NOSIGNAL);
  }).detach();
}

double plain_send(const SocketAddress& sink, int connections, size_t bytes) {
  std::vector<UniqueFd> sockets;
  for (int i = 0; i < connections; i++) {
    sockets.push_back(connect_socket(sink, kConnectTimeoutMs));
    set_blocking(sockets.back().get());
  }
  std::atomic<bool> failed{false};
  std::vector<std::thread> threads;
  const auto start = Clock::now();
  for (int i = 0; i < connections; i++) {
    threads.emplace_back([&, i] {
      const int socket = sockets[i].get();
      const std::vector<char> block(256 * 1024, 'x');
      size_t left = bytes * (i + 1) / connections - bytes * i / connections;
      while (left > 0) {
        const ssize_t sent = send(socket, block.data(), std::min(left, block.size()), MSG_NOSIGNAL);
        if (sent <= 0) {
          failed = true;
          return;
        }
        left -= static_cast<size_t>(sent);
      }
      shutdown(socket, SHUT_WR);
      char answer;
      if (recv(socket, &answer, 1, 0) != 1) failed = true;
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (failed) throw Error("IO_FAILED", "the sink at " + sink.text() + " closed its connections");
  return seconds_since(start);
}

}  // namespace tpla
