#include "transfer/ucx/worker.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <poll.h>
#include <pthread.h>
#include <random>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla::ucx {

namespace {

constexpr unsigned kMessageId = 7;
// Rounds without an event before the thread sleeps: the next message of a busy link comes sooner than a wake-up.
constexpr int kIdleRounds = 200;
// How long the end of a worker waits for its endpoints to close.
constexpr std::chrono::milliseconds kCloseTimeout{500};

uint64_t random_number() {
  static thread_local std::random_device device;
  uint64_t number;
  do {
    number = uint64_t(device()) << 32 | device();
  } while (number == 0);
  return number;
}

// A send or receive under way, with what has to outlive it.
struct Operation {
  MessageHead head;
  Worker::Finished finished;
  const Api* ucp;
};

void finish(Operation* operation, Status status) {
  const std::unique_ptr<Operation> owned(operation);
  if (owned->finished) owned->finished(status);
}

// A result that came at once; a request calls back later.
void settle(Operation* operation, StatusPointer result) {
  if (result == nullptr) finish(operation, kOk);
  else if (is_error(result)) finish(operation, status_of(result));
}

void on_sent(void* request, Status status, void* operation) {
  const Api* ucp = static_cast<Operation*>(operation)->ucp;
  finish(static_cast<Operation*>(operation), status);
  ucp->request_free(request);
}

// Else UCX would register it for each operation: its cache of registrations needs hooks in the process's memory calls, which we leave out.
void use_registration(RequestParams& params, Memory* memory) {
  if (memory == nullptr) return;
  params.op_attr_mask |= RequestParams::kMemory;
  params.memory = memory;
}

void on_received(void* request, Status status, size_t, void* operation) { on_sent(request, status, operation); }

}  // namespace

std::shared_ptr<Worker> Worker::start(const Library& library) {
  // The last owner may be a task of its own thread, which cannot wait for itself.
  const std::shared_ptr<Worker> worker(new Worker(library), [](Worker* last) {
    if (last->thread_.get_id() == std::this_thread::get_id()) std::thread([last] { delete last; }).detach();
    else delete last;
  });
  std::promise<void> ready;
  worker->thread_ = std::thread([self = worker.get(), &ready] {
    pthread_setname_np(pthread_self(), "tpla-ucx");
    try {
      self->create();
    } catch (...) {
      ready.set_exception(std::current_exception());
      return;
    }
    ready.set_value();
    self->drive();
  });
  try {
    ready.get_future().get();
  } catch (...) {
    worker->thread_.join();
    throw;
  }
  return worker;
}

Worker::Worker(const Library& library) : context_(library), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!wake_) throw Error("IO_FAILED", std::string("cannot make an event descriptor: ") + std::strerror(errno));
}

Worker::~Worker() { stop(); }

void Worker::create() {
  const Api& ucp = context_.api();
  const auto check = [](Status status, const char* what) {
    if (status != kOk) throw Error("IO_FAILED", std::string("UCX cannot ") + what + ": " + status_text(status));
  };
  WorkerParams params{};
  params.field_mask = WorkerParams::kThreadMode;
  check(ucp.worker_create(context_.get(), &params, &worker_), "make a worker");
  try {
    check(ucp.worker_get_efd(worker_, &events_), "wake a sleeping worker");
    AmHandlerParams handler{};
    handler.field_mask = AmHandlerParams::kId | AmHandlerParams::kFlags | AmHandlerParams::kCallback | AmHandlerParams::kArgument;
    handler.id = kMessageId;
    handler.flags = kAmWholeMessage;
    handler.callback = on_message;
    handler.argument = this;
    check(ucp.worker_set_am_recv_handler(worker_, &handler), "take messages");
    Address* address = nullptr;
    size_t bytes = 0;
    check(ucp.worker_get_address(worker_, &address, &bytes), "give its address");
    address_.assign(reinterpret_cast<const char*>(address), bytes);
    ucp.worker_release_address(worker_, address);
  } catch (...) {
    ucp.worker_destroy(worker_);
    throw;
  }
}

void Worker::post(std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  if (is_stopping_) return;
  tasks_.push_back(std::move(task));
  const uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
}

void Worker::run(std::function<void()> task) {
  auto done = std::make_shared<std::packaged_task<void()>>(std::move(task));
  std::future<void> result = done->get_future();
  post([done = std::move(done)] { (*done)(); });
  try {
    result.get();
  } catch (const std::future_error&) {
    throw Error("IO_FAILED", "UCX was stopped");
  }
}

void Worker::stop() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  const uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
  thread_.join();
}

void Worker::drive() {
  const Api& ucp = context_.api();
  for (int idle = 0;;) {
    if (!run_tasks()) break;
    idle = ucp.worker_progress(worker_) != 0 ? 0 : idle + 1;
    if (idle < kIdleRounds) continue;
    if (ucp.worker_arm(worker_) == kOk) sleep();
    idle = 0;
  }
  destroy();
}

// UCX insists that nothing of its context is in use when that goes.
void Worker::destroy() {
  const Api& ucp = context_.api();
  std::vector<Endpoint*> open;
  for (const auto& [endpoint, state] : endpoints_) open.push_back(endpoint);
  for (Endpoint* endpoint : open) disconnect(endpoint, [] {});
  const auto limit = std::chrono::steady_clock::now() + kCloseTimeout;
  while (!endpoints_.empty() && std::chrono::steady_clock::now() < limit) ucp.worker_progress(worker_);
  ucp.worker_destroy(worker_);
  for (Memory* memory : memories_) ucp.mem_unmap(context_.get(), memory);
}

// False once the worker is to stop and nothing is left to do.
bool Worker::run_tasks() {
  std::vector<std::function<void()>> tasks;
  {
    const std::lock_guard lock(mutex_);
    if (tasks_.empty()) return !is_stopping_;
    tasks.swap(tasks_);
  }
  for (const auto& task : tasks) task();
  return true;
}

void Worker::sleep() {
  pollfd sources[] = {{events_, POLLIN, 0}, {wake_.get(), POLLIN, 0}};
  poll(sources, 2, -1);
  uint64_t count;
  static_cast<void>(!read(wake_.get(), &count, sizeof(count)));
}

uint64_t Worker::add_link(std::weak_ptr<Link> link) {
  uint64_t number;
  do {
    number = random_number();
  } while (links_.contains(number));
  links_[number] = std::move(link);
  return number;
}

Status Worker::on_message(void* worker, const void* header, size_t header_bytes, void* data, size_t bytes, const AmReceiveParams* params) {
  auto* self = static_cast<Worker*>(worker);
  Incoming message{{}, data, bytes, (params->recv_attr & AmReceiveParams::kIsRendezvous) != 0};
  if (header_bytes != sizeof(MessageHead)) return kOk;
  std::memcpy(&message.head, header, sizeof(MessageHead));
  const auto found = self->links_.find(message.head.link);
  const auto link = found == self->links_.end() ? nullptr : found->second.lock();
  if (link) link->on_message(message);
  return kOk;
}

Endpoint* Worker::connect(const std::string& address, std::function<void(Status)> on_failure) {
  auto state = std::make_unique<EndpointState>(EndpointState{std::move(on_failure)});
  EndpointParams params{};
  params.field_mask = EndpointParams::kRemoteAddress | EndpointParams::kErrorHandlingMode | EndpointParams::kErrorHandler;
  params.address = reinterpret_cast<const Address*>(address.data());
  params.err_mode = kErrorHandlingPeer;
  params.err_handler.callback = [](void* at, Endpoint*, Status status) { static_cast<EndpointState*>(at)->on_failure(status); };
  params.err_handler.argument = state.get();
  Endpoint* endpoint = nullptr;
  if (const Status status = context_.api().ep_create(worker_, &params, &endpoint); status != kOk) {
    throw Error("IO_FAILED", "UCX cannot reach the peer: " + status_text(status) + "; do both hosts share a transport of UCX_TLS?");
  }
  endpoints_[endpoint] = std::move(state);
  return endpoint;
}

void Worker::disconnect(Endpoint* endpoint, std::function<void()> closed) {
  if (const auto found = endpoints_.find(endpoint); found == endpoints_.end() || std::exchange(found->second->is_closing, true)) return;
  auto* operation = new Operation{{}, [this, endpoint, closed = std::move(closed)](Status) {
    endpoints_.erase(endpoint);
    closed();
  }, &context_.api()};
  RequestParams params{};
  params.op_attr_mask = RequestParams::kFlags | RequestParams::kCallback | RequestParams::kUserData;
  params.flags = kCloseForce;
  params.callback.send = on_sent;
  params.user_data = operation;
  settle(operation, context_.api().ep_close_nbx(endpoint, &params));
}

void Worker::send(Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Memory* memory, uint32_t flags, Finished finished) {
  auto* operation = new Operation{head, std::move(finished), &context_.api()};
  RequestParams params{};
  params.op_attr_mask = RequestParams::kFlags | RequestParams::kCallback | RequestParams::kUserData;
  params.flags = flags;
  params.callback.send = on_sent;
  params.user_data = operation;
  use_registration(params, memory);
  settle(operation, context_.api().am_send_nbx(endpoint, kMessageId, &operation->head, sizeof(MessageHead), data, bytes, &params));
}

void Worker::receive(const Incoming& message, void* to, Memory* memory, Finished finished) {
  auto* operation = new Operation{message.head, std::move(finished), &context_.api()};
  RequestParams params{};
  params.op_attr_mask = RequestParams::kCallback | RequestParams::kUserData;
  params.callback.receive_am = on_received;
  params.user_data = operation;
  use_registration(params, memory);
  settle(operation, context_.api().am_recv_data_nbx(worker_, message.data, to, message.bytes, &params));
}

Memory* Worker::register_memory(void* address, size_t bytes) {
  MemoryMapParams params{};
  params.field_mask = MemoryMapParams::kAddress | MemoryMapParams::kLength;
  params.address = address;
  params.length = bytes;
  Memory* memory = nullptr;
  if (const Status status = context_.api().mem_map(context_.get(), &params, &memory); status != kOk) {
    throw Error("IO_FAILED", "UCX cannot register " + std::to_string(bytes) + " bytes: " + status_text(status) + "; is `ulimit -l` large enough?");
  }
  memories_.insert(memory);
  return memory;
}

void Worker::unregister_memory(Memory* memory) {
  if (memories_.erase(memory) > 0) context_.api().mem_unmap(context_.get(), memory);
}

}  // namespace tpla::ucx
