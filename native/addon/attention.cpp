// Attention problems for tests and benchmarks: drawn, checked against float64 and timed where the kernels run.
#include <optional>
#include <variant>

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "bench/attention_shape.h"
#include "bench/cpu_attention.h"
#ifdef TPLA_WITH_CUDA
#include "cuda/bench/gpu_attention.h"
#endif

namespace tpla::addon {

namespace {

using bench::ChunkShape;
using bench::DecodeShape;
using bench::GqaShape;
using bench::Outcome;
using bench::PodShape;
using bench::PrefillShape;
using bench::RunOptions;

using Shape = std::variant<DecodeShape, GqaShape, PrefillShape, ChunkShape, PodShape>;

constexpr int kMostTokens = 1 << 24;  // of one sequence

// `gpu` empty: the CPU.
struct Target {
  std::optional<int> gpu;
  int threads = 0;
};

int parse_gpu_index(const Napi::Value& value) {
  const int index = int(to_integer(value, "index", 0, 1024));
#ifndef TPLA_WITH_CUDA
  throw Error("GPU_UNAVAILABLE", "this addon was built without CUDA: build it where nvcc is, with `TPLA_CUDA=on npm run build:native`");
#endif
  return index;
}

Target parse_target(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "target");
  const std::string kind = to_text(object.Get("kind"), "target.kind");
  Target target;
  if (kind == "gpu") {
    target.gpu = parse_gpu_index(object.Get("index"));
  } else if (kind == "cpu") {
    target.threads = int(to_integer(object.Get("threads"), "target.threads", 0, 4096));
  } else {
    refuse("target.kind", "gpu or cpu, got \"" + kind + "\"");
  }
  return target;
}

template <typename Value>
Value one_of(const Napi::Value& value, const char* field, std::initializer_list<std::pair<const char*, Value>> choices) {
  const std::string text = to_text(value, field);
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (text == name) return choice;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  refuse(field, "one of " + names + ", got \"" + text + "\"");
}

std::vector<int32_t> parse_lengths(const Napi::Value& value, const char* field) {
  std::vector<int32_t> lengths = to_int32s(value, field);
  if (lengths.empty()) refuse(field, "one length per sequence, got none");
  for (const int32_t length : lengths) {
    if (length < 0 || length > kMostTokens) refuse(field, "lengths from 0 to " + std::to_string(kMostTokens) + ", got " + std::to_string(length));
  }
  return lengths;
}

// Fields both kinds of problem have.
template <typename Problem>
void parse_common(const Napi::Object& object, Problem& shape) {
  using bench::KernelPath;
  shape.q_lens = parse_lengths(object.Get("qLens"), "qLens");
  shape.kv_lens = parse_lengths(object.Get("kvLens"), "kvLens");
  if (shape.q_lens.size() != shape.kv_lens.size()) refuse("qLens", "as many lengths as kvLens has");
  shape.heads = int(to_integer(object.Get("heads"), "heads", 1, 4096));
  shape.causal = to_bool(object.Get("causal"), "causal");
  shape.query_scale = float(to_number(object.Get("queryScale"), "queryScale"));
  shape.path = one_of<KernelPath>(object.Get("path"), "path", {{"auto", KernelPath::automatic}, {"sm90", KernelPath::sm90}, {"sm80", KernelPath::sm80}});
}

// Lists of visible blocks lie one after another, as many as maskCounts says for each sequence.
void parse_block_mask(const Napi::Object& object, size_t sequences, bench::LogitVariantShape& variants) {
  const std::vector<int32_t> counts = to_int32s(object.Get("maskCounts"), "variants.maskCounts");
  const std::vector<int32_t> blocks = to_int32s(object.Get("maskBlocks"), "variants.maskBlocks");
  if (counts.size() != sequences) refuse("variants.maskCounts", "as many counts as kvLens has lengths");
  auto next = blocks.begin();
  for (const int32_t count : counts) {
    if (count < 0 || count > blocks.end() - next) refuse("variants.maskBlocks", "as many blocks as maskCounts says");
    variants.blocks.emplace_back(next, next + count);
    const std::vector<int32_t>& list = variants.blocks.back();
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i] < 0 || (i > 0 && list[i] <= list[i - 1])) refuse("variants.maskBlocks", "block numbers from 0 in ascending order");
    }
    next += count;
  }
}

bench::LogitVariantShape parse_variants(const Napi::Value& value, size_t sequences) {
  bench::LogitVariantShape variants;
  if (value.IsUndefined()) return variants;
  const Napi::Object object = to_object(value, "variants");
  variants.softcap = float(to_number(object.Get("softcap"), "variants.softcap"));
  variants.window = int(to_integer(object.Get("window"), "variants.window", 0, kMostTokens));
  variants.alibi = to_bool(object.Get("alibi"), "variants.alibi");
  variants.mask_block = int(to_integer(object.Get("maskBlock"), "variants.maskBlock", 0, kMostTokens));
  if (variants.mask_block > 0) parse_block_mask(object, sequences, variants);
  return variants;
}

int parse_page_tokens(const Napi::Object& object) { return int(to_integer(object.Get("pageTokens"), "pageTokens", 1, 65536)); }

bench::KvType parse_kv_type(const Napi::Object& object) {
  using bench::KvType;
  return one_of<KvType>(object.Get("kvDType"), "kvDType", {{"bf16", KvType::bf16}, {"fp8", KvType::fp8}, {"f32", KvType::f32}});
}

template <typename Problem>
void parse_pages(const Napi::Object& object, Problem& shape) {
  shape.page_tokens = parse_page_tokens(object);
  shape.page_gap_bytes = int(to_integer(object.Get("pageGapBytes"), "pageGapBytes", 0, 1 << 24));
  if (shape.page_gap_bytes % 16 != 0) refuse("pageGapBytes", "a multiple of 16");
  shape.variants = parse_variants(object.Get("variants"), shape.kv_lens.size());
}

GqaShape parse_gqa(const Napi::Object& object) {
  GqaShape shape;
  parse_common(object, shape);
  parse_pages(object, shape);
  shape.kv_heads = int(to_integer(object.Get("kvHeads"), "kvHeads", 1, 4096));
  if (shape.heads % shape.kv_heads != 0) refuse("heads", "a multiple of kvHeads, got " + std::to_string(shape.heads) + " and " + std::to_string(shape.kv_heads));
  shape.head_dim = int(to_integer(object.Get("headDim"), "headDim", 1, 4096));
  shape.layout = one_of<bench::KvOrder>(object.Get("layout"), "layout", {{"nhd", bench::KvOrder::nhd}, {"hnd", bench::KvOrder::hnd}});
  return shape;
}

PrefillShape parse_prefill(const Napi::Object& object) {
  PrefillShape shape;
  parse_common(object, shape);
  shape.key_dim = int(to_integer(object.Get("keyDim"), "keyDim", 1, 4096));
  shape.value_dim = int(to_integer(object.Get("valueDim"), "valueDim", 1, 4096));
  return shape;
}

DecodeShape parse_decode(const Napi::Object& object) {
  DecodeShape shape;
  parse_common(object, shape);
  shape.latent = int(to_integer(object.Get("latent"), "latent", 1, 8192));
  shape.rope = int(to_integer(object.Get("rope"), "rope", 0, 1024));
  parse_pages(object, shape);
  shape.kv = parse_kv_type(object);
  shape.latent_scale = to_bool(object.Get("latentScale"), "latentScale");
  return shape;
}

ChunkShape parse_chunk(const Napi::Object& object) {
  using bench::ChunkFormChoice;
  ChunkShape shape;
  parse_common(object, shape);
  shape.page_tokens = parse_page_tokens(object);
  shape.kv = parse_kv_type(object);
  shape.form = one_of<ChunkFormChoice>(object.Get("form"), "form",
                                       {{"auto", ChunkFormChoice::automatic}, {"absorbed", ChunkFormChoice::absorbed}, {"unabsorbed", ChunkFormChoice::unabsorbed}});
  return shape;
}

Shape parse_problem(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "problem");
  const std::string kind = to_text(object.Get("kind"), "kind");
  if (kind == "decode") return parse_decode(object);
  if (kind == "prefill") return parse_prefill(object);
  if (kind == "gqa") return parse_gqa(object);
  if (kind == "chunk") return parse_chunk(object);
  if (kind != "pod") refuse("kind", "decode, gqa, prefill, chunk or pod, got \"" + kind + "\"");
  PodShape shape{parse_prefill(to_object(object.Get("prefill"), "prefill")), parse_decode(to_object(object.Get("decode"), "decode"))};
  shape.decode_multiprocessors = int(to_integer(object.Get("decodeMultiprocessors"), "decodeMultiprocessors", 0, 1024));
  return shape;
}

RunOptions parse_options(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "options");
  RunOptions options;
  options.seed = uint64_t(to_integer(object.Get("seed"), "options.seed", 0));
  options.repeats = int(to_integer(object.Get("repeats"), "options.repeats", 0, 10000));
  options.runs = int(to_integer(object.Get("runs"), "options.runs", 0, 100000));
  options.host_reference = one_of<bool>(object.Get("reference"), "options.reference", {{"auto", false}, {"cpu", true}});
  return options;
}

// ---------------------------------------------------------------- where it runs

// The CPU path is the engine's: absorbed decode, and chunks of prefill over cached latents.
[[noreturn]] void refuse_on_cpu(const std::string& why) { throw Error("REQUEST_INVALID", why); }

template <typename OnCpu>
auto with_cpu_shape(const Shape& shape, OnCpu&& on_cpu) {
  const auto expect_no_path = [](bench::KernelPath path) {
    if (path != bench::KernelPath::automatic) refuse_on_cpu("sm90 and sm80 name kernels of GPUs; on the CPU the path is auto");
  };
  if (const auto* chunk = std::get_if<ChunkShape>(&shape)) {
    expect_no_path(chunk->path);
    if (chunk->form == bench::ChunkFormChoice::absorbed) refuse_on_cpu("the CPU computes chunks un-absorbed only; the form is auto or unabsorbed there");
    if (!chunk->causal) refuse_on_cpu("the CPU computes causal chunks only");
    return on_cpu(*chunk);
  }
  if (const auto* decode = std::get_if<DecodeShape>(&shape)) {
    expect_no_path(decode->path);
    if (decode->page_gap_bytes != 0) refuse_on_cpu("pages of the CPU's KV lie without gaps");
    return on_cpu(*decode);
  }
  if (std::holds_alternative<GqaShape>(shape)) refuse_on_cpu("decode with ordinary keys and values runs on GPUs only; the CPU runs absorbed decode, --kind decode");
  refuse_on_cpu("prefill of keys and values that are not cached is timed on GPUs only; the CPU runs --kind decode, and --kind chunk, prefill behind cached latents");
}

std::string plan(const Target& target, const Shape& shape) {
#ifdef TPLA_WITH_CUDA
  if (target.gpu) return std::visit([&](const auto& gpu_shape) { return bench::plan_on_gpu(*target.gpu, gpu_shape); }, shape);
#endif
  (void)target;
  return with_cpu_shape(shape, [](const auto& cpu_shape) { return bench::cpu_kernel_for(cpu_shape); });
}

Outcome run(const Target& target, const Shape& shape, const RunOptions& options) {
#ifdef TPLA_WITH_CUDA
  if (target.gpu) return std::visit([&](const auto& gpu_shape) { return bench::run_on_gpu(*target.gpu, gpu_shape, options); }, shape);
#endif
  return with_cpu_shape(shape, [&](const auto& cpu_shape) { return bench::run_on_cpu(target.threads, cpu_shape, options); });
}

bench::Rates measure(const Target& target) {
#ifdef TPLA_WITH_CUDA
  if (target.gpu) return bench::measure_gpu(*target.gpu);
#endif
  return bench::cpu_rates(target.threads);
}

// ---------------------------------------------------------------- to JavaScript

Napi::Value to_js(Napi::Env env, const std::optional<bench::Timing>& timing) {
  if (!timing) return env.Null();
  Napi::Object object = Napi::Object::New(env);
  object.Set("medianMs", timing->median_ms);
  object.Set("minMs", timing->min_ms);
  object.Set("maxMs", timing->max_ms);
  object.Set("runs", timing->runs);
  object.Set("callsPerRun", timing->calls_per_run);
  object.Set("buffers", timing->buffers);
  return object;
}

Napi::Value to_js(Napi::Env env, const Outcome& outcome) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("kernel", outcome.kernel);
  object.Set("check", env.Null());
  if (outcome.check) {
    Napi::Object check = Napi::Object::New(env);
    check.Set("worstRow", outcome.check->worst_row);
    check.Set("overall", outcome.check->overall);
    check.Set("worstLse", outcome.check->worst_lse);
    check.Set("sameBits", outcome.check->same_bits);
    check.Set("repeats", outcome.check->repeats);
    check.Set("reference", outcome.check->reference);
    object.Set("check", check);
  }
  object.Set("timing", to_js(env, outcome.timing));
  object.Set("serial", to_js(env, outcome.serial));
  object.Set("absorbed", to_js(env, outcome.absorbed));
  object.Set("unabsorbed", to_js(env, outcome.unabsorbed));
  return object;
}

Napi::Value to_js(Napi::Env env, const bench::Rates& rates) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("copyBytesPerSecond", rates.copy_bytes_per_s);
  object.Set("matrixFlopsPerSecond", rates.matrix_flops_per_s);
  object.Set("matrixSource", rates.matrix_source);
  return object;
}

#ifdef TPLA_WITH_CUDA
Napi::Value to_js(Napi::Env env, const bench::GpuDescription& gpu) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("name", gpu.name);
  object.Set("capability", gpu.capability);
  object.Set("multiprocessors", gpu.multiprocessors);
  object.Set("l2Bytes", double(gpu.l2_bytes));
  object.Set("memoryBytes", double(gpu.memory_bytes));
  object.Set("smClockHz", gpu.sm_clock_hz);
  object.Set("memoryClockHz", gpu.memory_clock_hz);
  return object;
}
#endif

constexpr const char* kName = "tpla attention";

Napi::Value describe_gpu(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    [[maybe_unused]] const int index = parse_gpu_index(info[0]);
#ifdef TPLA_WITH_CUDA
    return AsyncWork<bench::GpuDescription>::start(
        info.Env(), kName, [index] { return bench::describe_gpu(index); }, [](Napi::Env env, const bench::GpuDescription& gpu) { return to_js(env, gpu); });
#else
    return info.Env().Undefined();
#endif
  });
}

Napi::Value rates(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return AsyncWork<bench::Rates>::start(
        info.Env(), kName, [target = parse_target(info[0])] { return measure(target); }, [](Napi::Env env, const bench::Rates& found) { return to_js(env, found); });
  });
}

Napi::Value plan_problem(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return AsyncWork<std::string>::start(
        info.Env(), kName, [target = parse_target(info[0]), shape = parse_problem(info[1])] { return plan(target, shape); },
        [](Napi::Env env, const std::string& kernel) -> Napi::Value { return Napi::String::New(env, kernel); });
  });
}

Napi::Value run_problem(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return AsyncWork<Outcome>::start(
        info.Env(), kName, [target = parse_target(info[0]), shape = parse_problem(info[1]), options = parse_options(info[2])] { return run(target, shape, options); },
        [](Napi::Env env, const Outcome& outcome) { return to_js(env, outcome); });
  });
}

}  // namespace

void export_attention(Napi::Env env, Napi::Object exports) {
  Napi::Object attention = Napi::Object::New(env);
  attention.Set("describeGpu", Napi::Function::New(env, describe_gpu, "describeGpu"));
  attention.Set("rates", Napi::Function::New(env, rates, "rates"));
  attention.Set("plan", Napi::Function::New(env, plan_problem, "plan"));
  attention.Set("run", Napi::Function::New(env, run_problem, "run"));
  exports.Set("attention", attention);
}

}  // namespace tpla::addon
