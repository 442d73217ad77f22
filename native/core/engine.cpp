#include "core/engine.h"

#include <pthread.h>

#include <algorithm>

#include "core/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/cpu_features.h"

namespace tpla {

namespace {

[[noreturn]] void refuse(const std::string& message) { throw Error("REQUEST_INVALID", message); }

std::string count_of(int64_t count, const char* what) { return std::to_string(count) + " " + what + (count == 1 ? "" : "s"); }

void check_match(const char* field, int found, int expected) {
  if (found != expected) refuse(std::string("the KV arena has ") + field + " " + std::to_string(found) + ", the model needs " + std::to_string(expected));
}

// What a layout and a model must agree on for the forward passes to be defined.
void check_compatible(const ModelSpec& spec, const KvLayout& layout, bool exact_softmax) {
  check_match("layers", layout.layers, spec.layers);
  check_match("latent", layout.latent, spec.kv_lora_rank);
  check_match("rope", layout.rope, spec.qk_rope_head_dim);
  const bool sliced = layout.form == KvForm::tpla && layout.ranks > 1;
  if (exact_softmax && layout.form != KvForm::tpla) refuse("exactSoftmax is for an arena of form tpla");
  if (!sliced || !spec.tpla) return;
  const TplaSpec& tpla = *spec.tpla;
  if (tpla.rank_weights) {
    check_match("ranks", layout.ranks, tpla.groups);
    for (int layer = 0; layer < spec.layers; ++layer) check_match(("a shared width in layer " + std::to_string(layer) + " of").c_str(), layout.shared[layer], tpla.shared[layer]);
    if (exact_softmax) refuse("exactSoftmax needs a checkpoint without matrices per rank");
  }
  if (tpla.sliced_norm) {
    if (tpla.transform) refuse("a sliced norm cannot be combined with a transform after the norm");
    const bool complete = int(tpla.norm_scale.size()) == spec.layers && std::all_of(tpla.norm_scale.begin(), tpla.norm_scale.end(), [&](const auto& scales) {
      return int(scales.size()) == layout.ranks && std::all_of(scales.begin(), scales.end(), [](float scale) { return scale > 0; });
    });
    if (!complete) refuse("tpla.normScale needs a positive number for each of " + count_of(spec.layers, "layer") + " and " + count_of(layout.ranks, "rank"));
  }
}

}  // namespace

// The ranks' backends, programs and threads. Rank 0 runs on the caller's thread.
class Engine::Ranks {
 public:
  Ranks(const Model& model, const KvRegion& kv, const EngineOptions& options) : group_(kv.layout.ranks) {
    const int count = kv.layout.ranks;
    const int threads = options.threads > 0 ? options.threads : cpu::usable_cores();
    const cpu::InstructionSet& isa = cpu::select_instruction_set(options.isa.c_str());
    for (int rank = 0; rank < count; ++rank) {
      backends_.push_back(std::make_unique<cpu::CpuBackend>(isa, std::max(1, share_of(threads, rank, count).size()), options.activation_parts));
      decode_.push_back(std::make_unique<DecodeRank>(model, kv, *backends_.back(), group_.communicator(rank), options.exact_softmax));
    }
    if (kv.layout.form == KvForm::mla && count == 1) prefill_ = std::make_unique<Prefill>(model, kv, *backends_[0]);
    for (int rank = 1; rank < count; ++rank) {
      threads_.emplace_back([this, rank] {
        pthread_setname_np(pthread_self(), "tpla-rank");
        serve(rank);
      });
    }
  }

  ~Ranks() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Prefill* prefill() { return prefill_.get(); }

  // Runs one step on all ranks and rethrows the first error of any.
  void decode(const std::vector<DecodeItem>& items, float* logits) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      items_ = &items;
      logits_ = logits;
      error_ = nullptr;
      running_ = int(threads_.size());
      ++step_;
    }
    wake_.notify_all();
    run(0);
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return running_ == 0; });
    if (!error_) return;
    group_.reset();
    std::rethrow_exception(error_);
  }

 private:
  void run(int rank) {
    try {
      decode_[size_t(rank)]->run(*items_, logits_);
    } catch (const ThreadGroup::Aborted&) {
      // Another rank failed and has said why.
    } catch (...) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      group_.abort();
    }
  }

  void serve(int rank) {
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || step_ != seen; });
        if (stop_) return;
        seen = step_;
      }
      run(rank);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) idle_.notify_one();
    }
  }

  ThreadGroup group_;
  std::vector<std::unique_ptr<Backend>> backends_;
  std::vector<std::unique_ptr<DecodeRank>> decode_;
  std::unique_ptr<Prefill> prefill_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  const std::vector<DecodeItem>* items_ = nullptr;
  float* logits_ = nullptr;
  uint64_t step_ = 0;
  int running_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

Engine::Engine(EngineOptions options)
    : options_(std::move(options)), kv_(options_.arena->region()), model_(options_.spec, options_.weights) {
  check_compatible(model_.spec(), kv_.layout, options_.exact_softmax);
  ranks_ = std::make_unique<Ranks>(model_, kv_, options_);
  worker_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "tpla-engine");
    work();
  });
}

Engine::~Engine() {
  close();
  worker_.join();
}

void Engine::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_.store(true);
  }
  wake_.notify_all();
}

void Engine::enqueue(Job job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_.load()) refuse("this Engine is closed");
    queue_.push_back(std::move(job));
  }
  wake_.notify_one();
}

void Engine::work() {
  for (;;) {
    Job job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return closed_.load() || !queue_.empty(); });
      if (queue_.empty()) return;
      job = std::move(queue_.front());
      queue_.pop_front();
    }
    try {
      if (closed_.load()) throw Error("CANCELLED", "the engine was closed");
      job.run();
    } catch (const std::bad_alloc&) {
      job.fail(std::make_exception_ptr(Error("OUT_OF_MEMORY", "the system refused memory for this batch; use smaller batches or prefill chunks")));
    } catch (...) {
      job.fail(std::current_exception());
    }
  }
}

void Engine::prefill(std::vector<PrefillItem> items, PrefillHooks hooks, PrefillDone done) {
  if (!ranks_->prefill()) refuse("prefill needs an arena of form mla with one rank");
  if (items.empty()) refuse("prefill needs at least one item");
  for (const PrefillItem& item : items) check(item);
  hooks.cancelled = [this, inner = std::move(hooks.cancelled)] { return closed_.load() || (inner && inner()); };
  auto run = [this, items = std::move(items), hooks = std::move(hooks), done] { done(nullptr, ranks_->prefill()->run(items, hooks)); };
  enqueue({std::move(run), [done](std::exception_ptr error) { done(error, {}); }});
}

void Engine::decode(std::vector<DecodeItem> items, DecodeDone done) {
  if (items.empty()) refuse("decode needs at least one item");
  for (const DecodeItem& item : items) check(item);
  auto run = [this, items = std::move(items), done] {
    std::vector<float> logits(items.size() * size_t(model_.spec().vocab_size));
    ranks_->decode(items, logits.data());
    done(nullptr, std::move(logits));
  };
  enqueue({std::move(run), [done](std::exception_ptr error) { done(error, {}); }});
}

// ---------------------------------------------------------------- what comes from outside

void Engine::check(const PrefillItem& item) const {
  if (item.tokens.empty()) refuse("a prefill item has no tokens");
  for (const int32_t token : item.tokens) check_token(token);
  check_positions(item.position, int64_t(item.tokens.size()));
  check_pages(item.pages, (int64_t(item.position) + int64_t(item.tokens.size()) + kv_.layout.page_tokens - 1) / kv_.layout.page_tokens);
}

void Engine::check(const DecodeItem& item) const {
  check_token(item.token);
  check_positions(item.position, 1);
  const KvLayout& layout = kv_.layout;
  const int64_t used = int64_t(item.position) / layout.page_tokens + 1;
  const size_t tables = layout.form == KvForm::dcp ? size_t(layout.ranks) : 1;
  if (item.pages.size() != tables) refuse("a decode item has " + count_of(int64_t(item.pages.size()), "page table") + ", this arena's form takes " + std::to_string(tables));
  for (size_t rank = 0; rank < tables; ++rank) {
    const int64_t own = layout.form == KvForm::dcp ? (used - int64_t(rank) + layout.ranks - 1) / layout.ranks : used;
    check_pages(item.pages[rank], std::max<int64_t>(0, own));
  }
  if (layout.form == KvForm::dp && (item.rank < 0 || item.rank >= layout.ranks)) {
    refuse("rank is " + std::to_string(item.rank) + "; expected 0 to " + std::to_string(layout.ranks - 1));
  }
}

void Engine::check_pages(const std::vector<int32_t>& pages, int64_t used) const {
  if (int64_t(pages.size()) < used) refuse("the page table has " + count_of(int64_t(pages.size()), "page") + ", the tokens need " + std::to_string(used));
  for (int64_t i = 0; i < used; ++i) {
    const int32_t page = pages[size_t(i)];
    if (page < 0 || page >= kv_.pages) refuse("page " + std::to_string(page) + " is outside the arena of " + count_of(kv_.pages, "page"));
  }
}

void Engine::check_token(int32_t token) const {
  if (token < 0 || token >= model_.spec().vocab_size) {
    refuse("token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(model_.spec().vocab_size));
  }
}

void Engine::check_positions(int64_t first, int64_t count) const {
  if (first < 0) refuse("position is " + std::to_string(first) + "; expected at least 0");
  if (first + count > model_.spec().context_length) {
    throw Error("CONTEXT_LENGTH_EXCEEDED", "tokens up to position " + std::to_string(first + count - 1) + " exceed the context of " +
                                               std::to_string(model_.spec().context_length) + " tokens");
  }
}

}  // namespace tpla
