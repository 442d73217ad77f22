#include "transfer/ucx/worker.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <poll.h>
#include <sstream>
#include <utility>
#include <vector>

#include "core/error.h"

namespace tpla::ucx {

namespace {

constexpr unsigned kMessageId = 7;
// How long the end of a worker waits for its endpoints to close.
constexpr std::chrono::milliseconds kCloseTimeout{500};

// A send or receive under way, with what has to outlive it.
struct Operation {
  MessageHead head;
  Messenger::Finished finished;
  const Api* ucp;
};

void finish(Operation* operation, Status status) {
  const std::unique_ptr<Operation> owned(operation);
  if (owned->finished) owned->finished(status == kOk ? std::string() : status_text(status));
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

void on_received(void* request, Status status, size_t, void* operation) { on_sent(request, status, operation); }

}  // namespace

struct Worker::Peer : Messenger::Endpoint {
  ucx::Endpoint* endpoint = nullptr;
  std::function<void(const std::string&)> on_failure;
  bool is_closing = false;
};

struct Worker::Mapped : Messenger::Registration {
  Memory* memory = nullptr;
  int type = kMemoryTypeHost;
};

std::shared_ptr<Worker> Worker::start(const Library& library) { return started(new Worker(library)); }

Worker::Worker(const Library& library) : Messenger("UCX"), context_(library) {}

Worker::~Worker() = default;

// Else UCX would register it for each operation: its cache of registrations needs hooks in the process's memory calls, which we leave out.
// Nor would it know without them what kind of memory it is.
void Worker::use_memory(RequestParams& params, const Mapped& memory) {
  params.op_attr_mask |= RequestParams::kMemory | RequestParams::kMemoryType;
  params.memory = memory.memory;
  params.memory_type = memory.type;
}

void Worker::create() {
  const Api& ucp = context_.api();
  const Capabilities found = capabilities();
  may_carry_gpu_ = found.cuda && found.rdma;
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

unsigned Worker::progress() { return context_.api().worker_progress(worker_); }

bool Worker::sleep() {
  if (context_.api().worker_arm(worker_) != kOk) return true;
  pollfd sources[] = {{events_, POLLIN, 0}, {wake_fd(), POLLIN, 0}};
  poll(sources, 2, -1);
  woken();
  return true;
}

// UCX insists that nothing of its context is in use when that goes.
void Worker::destroy() {
  const Api& ucp = context_.api();
  std::vector<Messenger::Endpoint*> open;
  for (const auto& [endpoint, peer] : peers_) open.push_back(endpoint);
  for (Messenger::Endpoint* endpoint : open) disconnect(endpoint, [] {});
  const auto limit = std::chrono::steady_clock::now() + kCloseTimeout;
  while (!peers_.empty() && std::chrono::steady_clock::now() < limit) ucp.worker_progress(worker_);
  ucp.worker_destroy(worker_);
  for (const auto& [registration, mapped] : memories_) ucp.mem_unmap(context_.get(), mapped->memory);
}

Status Worker::on_message(void* worker, const void* header, size_t header_bytes, void* data, size_t bytes, const AmReceiveParams* params) {
  Incoming message{{}, data, bytes, (params->recv_attr & AmReceiveParams::kIsRendezvous) != 0};
  if (header_bytes != sizeof(MessageHead)) return kOk;
  std::memcpy(&message.head, header, sizeof(MessageHead));
  static_cast<Worker*>(worker)->dispatch(message);
  return kOk;
}

Messenger::Endpoint* Worker::connect(const std::string& address, std::function<void(const std::string& reason)> on_failure) {
  auto peer = std::make_unique<Peer>();
  peer->on_failure = std::move(on_failure);
  EndpointParams params{};
  params.field_mask = EndpointParams::kRemoteAddress | EndpointParams::kErrorHandlingMode | EndpointParams::kErrorHandler;
  params.address = reinterpret_cast<const Address*>(address.data());
  params.err_mode = kErrorHandlingPeer;
  params.err_handler.callback = [](void* at, ucx::Endpoint*, Status status) { static_cast<Peer*>(at)->on_failure(status_text(status)); };
  params.err_handler.argument = peer.get();
  if (const Status status = context_.api().ep_create(worker_, &params, &peer->endpoint); status != kOk) {
    throw Error("IO_FAILED", "UCX cannot reach the peer: " + status_text(status) + "; do both hosts share a transport of UCX_TLS?");
  }
  Messenger::Endpoint* endpoint = peer.get();
  peers_[endpoint] = std::move(peer);
  return endpoint;
}

// `#                 lane[0]:  2:tcp/eth0.0 md[1]          -> …`: transport, device and number of its path.
std::vector<std::string> Worker::transports(Messenger::Endpoint* endpoint) {
  std::istringstream lines(printed([&](FILE* out) { context_.api().ep_print_info(static_cast<Peer*>(endpoint)->endpoint, out); }));
  std::vector<std::string> found;
  for (std::string line; std::getline(lines, line);) {
    const size_t lane = line.find("lane[");
    const size_t name = lane == std::string::npos ? lane : line.find(':', line.find("]:", lane) + 2);
    if (name == std::string::npos) continue;
    std::string transport = line.substr(name + 1, line.find(' ', name) - name - 1);
    transport.resize(std::min(transport.rfind('.'), transport.size()));
    if (std::find(found.begin(), found.end(), transport) == found.end()) found.push_back(transport);
  }
  return found;
}

// Between GPUs of one host UCX 1.22 has the sender write into our pages, in which it could go on after it was cut off: a mapping of another
// process does not end with the endpoint as a queue pair does.
bool Worker::carries_gpu(Messenger::Endpoint* endpoint) {
  if (!may_carry_gpu_) return false;
  const std::vector<std::string> found = transports(endpoint);
  return std::any_of(found.begin(), found.end(), is_rdma) && std::none_of(found.begin(), found.end(), is_gpu_to_gpu);
}

void Worker::disconnect(Messenger::Endpoint* endpoint, std::function<void()> closed) {
  const auto found = peers_.find(endpoint);
  if (found == peers_.end() || std::exchange(found->second->is_closing, true)) return;
  auto* operation = new Operation{{}, [this, endpoint, closed = std::move(closed)](const std::string&) {
    peers_.erase(endpoint);
    closed();
  }, &context_.api()};
  RequestParams params{};
  params.op_attr_mask = RequestParams::kFlags | RequestParams::kCallback | RequestParams::kUserData;
  params.flags = kCloseForce;
  params.callback.send = on_sent;
  params.user_data = operation;
  settle(operation, context_.api().ep_close_nbx(found->second->endpoint, &params));
}

void Worker::send(Messenger::Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Registration* memory, Finished finished) {
  auto* operation = new Operation{head, std::move(finished), &context_.api()};
  RequestParams params{};
  params.op_attr_mask = RequestParams::kFlags | RequestParams::kCallback | RequestParams::kUserData;
  params.callback.send = on_sent;
  params.user_data = operation;
  if (memory != nullptr) {
    use_memory(params, *static_cast<Mapped*>(memory));
  } else {
    params.flags = kAmSendEager;
  }
  settle(operation, context_.api().am_send_nbx(static_cast<Peer*>(endpoint)->endpoint, kMessageId, &operation->head, sizeof(MessageHead), data, bytes, &params));
}

void Worker::receive(const Incoming& message, void* to, Registration* memory, Finished finished) {
  auto* operation = new Operation{message.head, std::move(finished), &context_.api()};
  RequestParams params{};
  params.op_attr_mask = RequestParams::kCallback | RequestParams::kUserData;
  params.callback.receive_am = on_received;
  params.user_data = operation;
  use_memory(params, *static_cast<Mapped*>(memory));
  settle(operation, context_.api().am_recv_data_nbx(worker_, message.data, to, message.bytes, &params));
}

Messenger::Registration* Worker::register_memory(void* address, size_t bytes, int device) {
  MemoryMapParams params{};
  auto mapped = std::make_unique<Mapped>();
  mapped->type = device < 0 ? kMemoryTypeHost : kMemoryTypeCuda;
  params.field_mask = MemoryMapParams::kAddress | MemoryMapParams::kLength | MemoryMapParams::kMemoryType;
  params.address = address;
  params.length = bytes;
  params.memory_type = mapped->type;
  if (const Status status = context_.api().mem_map(context_.get(), &params, &mapped->memory); status != kOk) {
    throw Error("IO_FAILED", "UCX cannot register " + std::to_string(bytes) + " bytes: " + status_text(status) + "; is `ulimit -l` large enough?");
  }
  Registration* registration = mapped.get();
  memories_[registration] = std::move(mapped);
  return registration;
}

void Worker::unregister_memory(Registration* memory) {
  const auto found = memories_.find(memory);
  if (found == memories_.end()) return;
  context_.api().mem_unmap(context_.get(), found->second->memory);
  memories_.erase(found);
}

}  // namespace tpla::ucx
