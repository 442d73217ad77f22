#include "transfer/nixl/agent.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <poll.h>
#include <random>
#include <set>
#include <utility>

#include "core/error.h"

namespace tpla::nixl {

namespace {

using Clock = std::chrono::steady_clock;

// A notification leaves at the end of a round, or when so much is in it: enough to be worth a transfer, and the next is made meanwhile.
constexpr uint32_t kMaxItems = 64;
constexpr size_t kMaxRemoteBytes = size_t(1) << 20;
constexpr size_t kMaxInlineBytes = size_t(32) << 10;
// Pauses between questions, a share of how long nothing has come; none is longer than the last.
constexpr int kPauseShare = 8;
constexpr std::chrono::microseconds kMinPause{50};
constexpr std::chrono::microseconds kBusyPause{100};
constexpr std::chrono::microseconds kMaxPause{2000};
// How long the end of an agent waits for its transfers.
constexpr std::chrono::milliseconds kCloseTimeout{500};

// For backends that do not tell what they found.
bool has_rdma_device() {
  std::error_code failure;
  const std::filesystem::directory_iterator devices("/sys/class/infiniband", failure);
  return !failure && devices != std::filesystem::directory_iterator();
}

// The same for all processes of a host until it starts again.
std::string host_identity() {
  std::string identity;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> identity;
  return identity;
}

std::optional<Capabilities::Under> ask_ucx(const std::string& file) {
  if (file.empty()) return std::nullopt;
  try {
    const auto library = ucx::Library::attach(file);
    return Capabilities::Under{file, library->version(), ucx::ContextHandle(*library).capabilities()};
  } catch (const Error&) {
    // NIXL works without our knowing.
    return std::nullopt;
  }
}

std::string random_name() {
  std::random_device device;
  char name[40];
  std::snprintf(name, sizeof(name), "tpla-%08x%08x%08x%08x", device(), device(), device(), device());
  return name;
}

}  // namespace

// Memory that the library knows.
struct Agent::Known : Registration {
  MemoryType type = kDram;
  uint64_t device = 0;
  RegistrationList* list = nullptr;
  // Made when the first peer is to read it.
  std::string metadata;
};

// What one connect() gave.
struct Agent::Link : Messenger::Endpoint {
  Remote* remote = nullptr;
  std::function<void(const std::string&)> on_failure;
  std::function<void()> closed;
  bool is_closing = false;
};

// Another agent.
struct Agent::Remote {
  bool is_same_host = false;
  struct Sent {
    Messenger::Endpoint* by;
    Finished finished;
  };
  std::string name;
  int uses = 0;
  int fetches = 0;
  std::string failure;
  std::set<Registration*> told;

  NotificationWriter outgoing;
  size_t outgoing_remote_bytes = 0;
  // Sends in `outgoing`: of inline data, and of data that wait to be fetched.
  std::vector<Sent> leaving;
  std::vector<Sent> offered;
  uint64_t next_batch = 1;
  std::map<uint64_t, std::vector<Sent>> waiting;
};

// Remote data of one notification. Its sender is told when the last owner goes: nothing of it is read any more.
struct Agent::Batch {
  Batch(Agent* by, std::string sender, uint64_t batch) : agent(by), from(std::move(sender)), number(batch) {}
  Batch(const Batch&) = delete;
  ~Batch() {
    const auto found = agent->remotes_.find(from);
    if (found == agent->remotes_.end()) return;
    ItemHead item{};
    item.kind = ItemKind::kFetched;
    item.batch = number;
    found->second->outgoing.add(item);
  }

  Agent* const agent;
  const std::string from;
  const uint64_t number;
};

// A read of several pieces.
struct Agent::Fetch {
  std::shared_ptr<Batch> batch;
  Remote* remote;
  MemoryType local_type;
  MemoryType remote_type;
  TransferList* local = nullptr;
  TransferList* source = nullptr;
  Transfer* transfer = nullptr;
  std::vector<Finished> finished;
};

struct Agent::Arrival {
  Remote* remote;
  std::shared_ptr<Batch> batch;
  // Where the data of the message are that is being dispatched.
  const ItemHead* item = nullptr;
  std::vector<Fetch> fetches;
};

std::shared_ptr<Agent> Agent::start(const Library& library, const std::vector<std::string>& backends) { return started(new Agent(library, backends)); }

Agent::Agent(const Library& library, std::vector<std::string> backends)
    : Messenger("NIXL"), library_(library), nixl_(library.api()), wanted_(std::move(backends)), last_event_(Clock::now()) {}

Agent::~Agent() = default;

void Agent::create() {
  // Our thread moves transfers on. Where NIXL's does, up to NIXL 1.4.0 it frees the connection to a peer that died while we send to it.
  const AgentConfig config{};
  if (const Status status = nixl_.create_configured_agent(random_name().c_str(), &config, &agent_); status != kSuccess) {
    throw Error("CONFIG_INVALID", "NIXL cannot be started: " + status_text(status));
  }
  try {
    create_backends();
    if (nixl_.create_notif_map(&notifications_) != kSuccess) throw Error("IO_FAILED", "NIXL cannot take notifications");
    RegistrationList* none = nullptr;
    if (nixl_.create_reg_dlist(kDram, &none) != kSuccess) throw Error("IO_FAILED", "NIXL cannot describe memory");
    const std::unique_ptr<RegistrationList, Status (*)(RegistrationList*)> held(none, nixl_.destroy_reg_dlist);
    check_notifications();
    address_ = host_identity() + '\n' + metadata_of(none);
  } catch (...) {
    free_handles();
    nixl_.destroy_agent(agent_);
    throw;
  }
}

void Agent::create_backends() {
  StringList* plugins = nullptr;
  if (const Status status = nixl_.get_available_plugins(agent_, &plugins); status != kSuccess) {
    throw Error("CONFIG_INVALID", "NIXL finds no plug-ins: " + status_text(status) + "; is NIXL_PLUGIN_DIR right?");
  }
  size_t count = 0;
  nixl_.string_list_size(plugins, &count);
  for (size_t i = 0; i < count; i++) {
    const char* name = nullptr;
    if (nixl_.string_list_get(plugins, i, &name) == kSuccess) capabilities_.plugins.push_back(name);
  }
  nixl_.destroy_string_list(plugins);
  std::sort(capabilities_.plugins.begin(), capabilities_.plugins.end());
  if (nixl_.create_opt_args(&options_) != kSuccess) throw Error("IO_FAILED", "NIXL cannot take options");
  for (const std::string& name : wanted_) create_backend(name);
}

void Agent::create_backend(const std::string& name) {
  if (std::find(capabilities_.plugins.begin(), capabilities_.plugins.end(), name) == capabilities_.plugins.end()) {
    std::string all;
    for (const std::string& plugin : capabilities_.plugins) all += (all.empty() ? "" : ", ") + plugin;
    throw Error("CONFIG_INVALID", "NIXL has no plug-in " + name + " here, but " + (all.empty() ? "none" : all) + "; see transfer.nixl.backends, and NIXL_PLUGIN_DIR in transfer.nixl.options; NIXL_LOG_LEVEL=debug makes NIXL say why one is missing");
  }
  MemoryList* memories = nullptr;
  Parameters* parameters = nullptr;
  if (const Status status = nixl_.get_plugin_params(agent_, name.c_str(), &memories, &parameters); status != kSuccess) {
    throw Error("CONFIG_INVALID", "NIXL cannot load its plug-in " + name + ": " + status_text(status) + "; NIXL_LOG_LEVEL=info makes NIXL say why");
  }
  Capabilities::InUse backend{name, {}};
  size_t types = 0;
  nixl_.mem_list_size(memories, &types);
  for (size_t i = 0; i < types; i++) {
    MemoryType type;
    if (nixl_.mem_list_get(memories, i, &type) == kSuccess) backend.memories.push_back(type);
  }
  Backend* handle = nullptr;
  const Status status = nixl_.create_backend(agent_, name.c_str(), parameters, &handle);
  nixl_.destroy_mem_list(memories);
  nixl_.destroy_params(parameters);
  if (status != kSuccess) throw Error("CONFIG_INVALID", "NIXL cannot start its backend " + name + ": " + status_text(status) + "; NIXL_LOG_LEVEL=info makes NIXL say why");
  backends_.push_back(handle);
  if (std::find(backend.memories.begin(), backend.memories.end(), kDram) == backend.memories.end()) {
    throw Error("CONFIG_INVALID", "NIXL's backend " + name + " does not carry host memory; see transfer.nixl.backends");
  }
  nixl_.opt_args_add_backend(options_, handle);
  capabilities_.backends.push_back(std::move(backend));
  if (name == "UCX") capabilities_.ucx = ask_ucx(library_.ucx_file());
}

// Backends for files alone carry host memory, too, but nothing to another process.
void Agent::check_notifications() {
  if (backends_.empty() || nixl_.get_notifs(agent_, notifications_, options_) == kSuccess) return;
  std::string names;
  for (const auto& backend : capabilities_.backends) names += (names.empty() ? "" : ", ") + backend.name;
  throw Error("CONFIG_INVALID", "NIXL's backend " + names + " carries nothing between processes; name one that does, such as UCX, in transfer.nixl.backends");
}

void Agent::free_handles() {
  if (notifications_ != nullptr) nixl_.destroy_notif_map(notifications_);
  if (options_ != nullptr) nixl_.destroy_opt_args(options_);
  for (Backend* backend : backends_) nixl_.destroy_backend(backend);
}

std::string Agent::metadata_of(RegistrationList* list) {
  void* data = nullptr;
  size_t bytes = 0;
  if (const Status status = nixl_.get_local_partial_md(agent_, list, &data, &bytes, options_); status != kSuccess) {
    throw Error("IO_FAILED", "NIXL cannot give its metadata: " + status_text(status));
  }
  std::string metadata(static_cast<const char*>(data), bytes);
  std::free(data);
  return metadata;
}

// ---------------------------------------------------------------- peers

Messenger::Endpoint* Agent::connect(const std::string& address, std::function<void(const std::string& reason)> on_failure) {
  const size_t line = address.find('\n');
  if (line == std::string::npos) throw Error("IO_FAILED", "NIXL cannot use the peer's address: it does not begin with a host's identity; do both sides run one release of tpla?");
  const std::string_view metadata = std::string_view(address).substr(line + 1);
  char* text = nullptr;
  if (const Status status = nixl_.load_remote_md(agent_, metadata.data(), metadata.size(), &text); status != kSuccess) {
    throw Error("IO_FAILED", "NIXL cannot use the peer's address: " + status_text(status) + "; do both sides run one release of NIXL, with a backend in common?");
  }
  const std::string name(text);
  std::free(text);
  auto& remote = remotes_[name];
  if (!remote) {
    remote = std::make_unique<Remote>();
    remote->name = name;
    remote->is_same_host = address.substr(0, line) == host_identity();
  }
  remote->uses++;
  remote->failure.clear();
  auto link = std::make_unique<Link>();
  link->remote = remote.get();
  link->on_failure = std::move(on_failure);
  Messenger::Endpoint* endpoint = link.get();
  links_[endpoint] = std::move(link);
  return endpoint;
}

void Agent::disconnect(Messenger::Endpoint* endpoint, std::function<void()> closed) {
  const auto found = links_.find(endpoint);
  if (found == links_.end() || std::exchange(found->second->is_closing, true)) return;
  found->second->closed = std::move(closed);
  Remote& remote = *found->second->remote;
  // What it said last still goes out.
  flush(remote);
  std::vector<Finished> ended;
  for (auto& [batch, sends] : remote.waiting) {
    for (Remote::Sent& sent : sends) {
      if (sent.by == endpoint && sent.finished) ended.push_back(std::exchange(sent.finished, nullptr));
    }
  }
  for (const Finished& finished : ended) finished("the link was closed");
}

// Links whose reads have ended.
void Agent::close_idle() {
  std::vector<std::function<void()>> closed;
  for (auto at = links_.begin(); at != links_.end();) {
    Link& link = *at->second;
    if (!link.is_closing || link.remote->fetches > 0) {
      ++at;
      continue;
    }
    closed.push_back(std::move(link.closed));
    Remote& remote = *link.remote;
    at = links_.erase(at);
    if (--remote.uses > 0) continue;
    nixl_.invalidate_remote_md(agent_, remote.name.c_str());
    remotes_.erase(remote.name);
  }
  for (const auto& call : closed) call();
}

void Agent::fail(Remote& remote, const std::string& reason) {
  if (!remote.failure.empty()) return;
  remote.failure = reason;
  std::vector<Finished> ended;
  for (auto* sends : {&remote.leaving, &remote.offered}) {
    for (Remote::Sent& sent : std::exchange(*sends, {})) ended.push_back(std::move(sent.finished));
  }
  for (auto& [batch, sends] : std::exchange(remote.waiting, {})) {
    for (Remote::Sent& sent : sends) ended.push_back(std::move(sent.finished));
  }
  std::vector<std::function<void(const std::string&)>> told;
  for (const auto& [endpoint, link] : links_) {
    if (link->remote == &remote && !link->is_closing) told.push_back(link->on_failure);
  }
  for (const Finished& finished : ended) {
    if (finished) finished(reason);
  }
  for (const auto& on_failure : told) on_failure(reason);
}

// ---------------------------------------------------------------- sending

void Agent::send(Messenger::Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Registration* memory, Finished finished) {
  Remote& remote = *static_cast<Link*>(endpoint)->remote;
  if (!remote.failure.empty()) {
    if (finished) finished(remote.failure);
    return;
  }
  ItemHead item{};
  item.message = head;
  item.bytes = bytes;
  if (memory == nullptr) {
    item.kind = ItemKind::kMessage;
    remote.outgoing.add(item, {static_cast<const char*>(data), bytes});
    remote.leaving.push_back({endpoint, std::move(finished)});
  } else {
    auto* known = static_cast<Known*>(memory);
    if (!remote.told.contains(memory) && !tell(remote, *known)) {
      if (finished) finished(remote.failure);
      return;
    }
    item.kind = ItemKind::kRemote;
    item.memory = known->type;
    item.device = known->device;
    item.address = reinterpret_cast<uintptr_t>(data);
    remote.outgoing.add(item);
    remote.offered.push_back({endpoint, std::move(finished)});
    remote.outgoing_remote_bytes += bytes;
  }
  if (remote.outgoing.items() >= kMaxItems || remote.outgoing_remote_bytes >= kMaxRemoteBytes || remote.outgoing.bytes() >= kMaxInlineBytes) flush(remote);
}

// False where the library does not give the memory's keys, which ends the links.
bool Agent::tell(Remote& remote, Known& memory) {
  try {
    if (memory.metadata.empty()) memory.metadata = metadata_of(memory.list);
  } catch (const Error& error) {
    fail(remote, error.what());
    return false;
  }
  ItemHead keys{};
  keys.kind = ItemKind::kMemory;
  keys.bytes = memory.metadata.size();
  remote.outgoing.add(keys, memory.metadata);
  remote.told.insert(&memory);
  return true;
}

void Agent::flush(Remote& remote) {
  if (remote.outgoing.empty()) return;
  const uint64_t batch = remote.next_batch++;
  const std::string text = remote.outgoing.take(batch);
  remote.outgoing_remote_bytes = 0;
  std::vector<Remote::Sent> leaving = std::exchange(remote.leaving, {});
  if (!remote.offered.empty()) remote.waiting[batch] = std::exchange(remote.offered, {});
  const Status status = remote.failure.empty() ? nixl_.gen_notif(agent_, remote.name.c_str(), text.data(), text.size(), options_) : kSuccess;
  if (status != kSuccess) {
    remote.leaving = std::move(leaving);
    return fail(remote, status_text(status));
  }
  for (const Remote::Sent& sent : leaving) {
    if (sent.finished) sent.finished("");
  }
}

void Agent::on_fetched(Remote& remote, uint64_t batch) {
  const auto found = remote.waiting.find(batch);
  if (found == remote.waiting.end()) return;
  const std::vector<Remote::Sent> sends = std::move(found->second);
  remote.waiting.erase(found);
  for (const Remote::Sent& sent : sends) {
    if (sent.finished) sent.finished("");
  }
}

// ---------------------------------------------------------------- receiving

unsigned Agent::take_notifications() {
  if (backends_.empty()) return 0;
  nixl_.notif_map_clear(notifications_);
  if (const Status status = nixl_.get_notifs(agent_, notifications_, options_); status != kSuccess) {
    for (const auto& [name, remote] : remotes_) fail(*remote, "NIXL gives no notifications: " + status_text(status));
    return 0;
  }
  size_t agents = 0;
  nixl_.notif_map_size(notifications_, &agents);
  unsigned taken = 0;
  for (size_t i = 0; i < agents; i++) {
    const char* name = nullptr;
    size_t count = 0;
    if (nixl_.notif_map_get_agent_at(notifications_, i, &name) != kSuccess || nixl_.notif_map_get_notifs_size(notifications_, name, &count) != kSuccess) continue;
    for (size_t n = 0; n < count; n++, taken++) {
      const void* data = nullptr;
      size_t bytes = 0;
      if (nixl_.notif_map_get_notif(notifications_, name, n, &data, &bytes) == kSuccess) take(name, {static_cast<const char*>(data), bytes});
    }
  }
  return taken;
}

// Of an agent that was not connected to only messages with their data are taken: who it is, is in them.
void Agent::take(const std::string& from, std::string_view text) {
  NotificationReader reader(text);
  const auto found = remotes_.find(from);
  Arrival arrival{found == remotes_.end() ? nullptr : found->second.get(), nullptr, nullptr, {}};
  arrival_ = &arrival;
  ItemHead item;
  std::string_view data;
  while (reader.next(item, data)) {
    if (item.kind == ItemKind::kMessage) {
      dispatch({item.message, const_cast<char*>(data.data()), data.size(), false});
      continue;
    }
    if (arrival.remote == nullptr) break;
    if (item.kind == ItemKind::kFetched) {
      on_fetched(*arrival.remote, item.batch);
    } else if (item.kind == ItemKind::kMemory) {
      char* name = nullptr;
      if (nixl_.load_remote_md(agent_, data.data(), data.size(), &name) == kSuccess) std::free(name);
    } else if (item.kind == ItemKind::kRemote) {
      if (!arrival.batch) arrival.batch = std::make_shared<Batch>(this, from, reader.batch());
      arrival.item = &item;
      dispatch({item.message, nullptr, item.bytes, true});
    }
  }
  arrival_ = nullptr;
  for (Fetch& fetch : arrival.fetches) post(std::move(fetch));
}

void Agent::receive(const Incoming& message, void* to, Registration* memory, Finished finished) {
  const ItemHead& item = *arrival_->item;
  const auto* known = static_cast<Known*>(memory);
  std::vector<Fetch>& fetches = arrival_->fetches;
  if (fetches.empty() || fetches.back().local_type != known->type || fetches.back().remote_type != item.memory) {
    Fetch fetch{arrival_->batch, arrival_->remote, known->type, item.memory, nullptr, nullptr, nullptr, {}};
    if (nixl_.create_xfer_dlist(known->type, &fetch.local) != kSuccess || nixl_.create_xfer_dlist(item.memory, &fetch.source) != kSuccess) {
      if (fetch.local != nullptr) nixl_.destroy_xfer_dlist(fetch.local);
      return finished("NIXL cannot describe a transfer");
    }
    fetches.push_back(std::move(fetch));
  }
  Fetch& fetch = fetches.back();
  nixl_.xfer_dlist_add_desc(fetch.local, reinterpret_cast<uintptr_t>(to), message.bytes, known->device);
  nixl_.xfer_dlist_add_desc(fetch.source, item.address, message.bytes, item.device);
  fetch.finished.push_back(std::move(finished));
}

void Agent::post(Fetch fetch) {
  Status status = nixl_.create_xfer_req(agent_, kRead, fetch.local, fetch.source, fetch.remote->name.c_str(), &fetch.transfer, options_);
  nixl_.destroy_xfer_dlist(fetch.local);
  nixl_.destroy_xfer_dlist(fetch.source);
  if (status != kSuccess) fetch.transfer = nullptr;
  else status = nixl_.post_xfer_req(agent_, fetch.transfer, options_);
  fetch.remote->fetches++;
  if (status != kInProgress) return finish(fetch, status);
  fetches_.push_back(std::move(fetch));
}

void Agent::finish(Fetch& fetch, Status status) {
  if (fetch.transfer != nullptr && nixl_.release_xfer_req(agent_, fetch.transfer) == kSuccess) nixl_.destroy_xfer_req(fetch.transfer);
  fetch.remote->fetches--;
  const std::string failure = status == kSuccess ? "" : status_text(status);
  for (const Finished& finished : fetch.finished) finished(failure);
}

unsigned Agent::poll_fetches() {
  unsigned ended = 0;
  for (auto at = fetches_.begin(); at != fetches_.end();) {
    const Status status = nixl_.get_xfer_status(agent_, at->transfer);
    if (status == kInProgress) {
      ++at;
      continue;
    }
    Fetch fetch = std::move(*at);
    at = fetches_.erase(at);
    finish(fetch, status);
    ended++;
  }
  return ended;
}

// ---------------------------------------------------------------- the thread

unsigned Agent::progress() {
  // What this round's events give rise to leaves with the next one, in one notification.
  for (const auto& [name, remote] : remotes_) flush(*remote);
  const unsigned events = poll_fetches() + take_notifications();
  close_idle();
  if (events > 0) last_event_ = Clock::now();
  return events;
}

bool Agent::sleep() {
  const auto idle = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - last_event_);
  bool is_busy = !fetches_.empty();
  for (const auto& [name, remote] : remotes_) is_busy = is_busy || !remote->waiting.empty();
  const auto pause = std::clamp(idle / kPauseShare, kMinPause, is_busy ? kBusyPause : kMaxPause);
  const timespec limit{0, std::chrono::duration_cast<std::chrono::nanoseconds>(pause).count()};
  pollfd source{wake_fd(), POLLIN, 0};
  if (ppoll(&source, 1, &limit, nullptr) <= 0) return false;
  woken();
  last_event_ = Clock::now();
  return true;
}

void Agent::destroy() {
  std::vector<Messenger::Endpoint*> open;
  for (const auto& [endpoint, link] : links_) open.push_back(endpoint);
  for (Messenger::Endpoint* endpoint : open) disconnect(endpoint, [] {});
  for (const auto limit = Clock::now() + kCloseTimeout; !fetches_.empty() && Clock::now() < limit;) poll_fetches();
  close_idle();
  // An agent that still reads into our memory is left alone with it; the process is about to end, or the peer is.
  if (!fetches_.empty()) return;
  while (!memories_.empty()) unregister_memory(memories_.begin()->first);
  free_handles();
  nixl_.destroy_agent(agent_);
}

bool Agent::takes_gpu() const {
  return std::any_of(capabilities_.backends.begin(), capabilities_.backends.end(), [](const Capabilities::InUse& backend) {
    return std::find(backend.memories.begin(), backend.memories.end(), kVram) != backend.memories.end();
  }) && (!capabilities_.ucx || capabilities_.ucx->found.cuda);
}

bool Agent::reads_gpus() const {
  const auto& ucx = capabilities_.ucx;
  return ucx && std::any_of(ucx->found.resources.begin(), ucx->found.resources.end(), ucx::is_gpu_to_gpu);
}

bool Agent::has_rdma() const { return capabilities_.ucx ? capabilities_.ucx->found.rdma : has_rdma_device(); }

bool Agent::may_carry_gpu() const { return takes_gpu() && has_rdma(); }

// Within a host its UCX would have the GPUs read each other: right between two of them, but two processes on one GPU waited for ever.
bool Agent::carries_gpu(Messenger::Endpoint* endpoint) {
  return may_carry_gpu() && !(reads_gpus() && static_cast<Link*>(endpoint)->remote->is_same_host);
}

Messenger::Registration* Agent::register_memory(void* address, size_t bytes, int device) {
  auto known = std::make_unique<Known>();
  known->type = device < 0 ? kDram : kVram;
  known->device = device < 0 ? 0 : uint64_t(device);
  Status status = nixl_.create_reg_dlist(known->type, &known->list);
  if (status == kSuccess) status = nixl_.reg_dlist_add_desc(known->list, reinterpret_cast<uintptr_t>(address), bytes, known->device, nullptr, 0);
  if (status == kSuccess) status = nixl_.register_mem(agent_, known->list, options_);
  if (status != kSuccess) {
    if (known->list != nullptr) nixl_.destroy_reg_dlist(known->list);
    throw Error("IO_FAILED", "NIXL cannot register " + std::to_string(bytes) + " bytes: " + status_text(status) + "; is `ulimit -l` large enough?");
  }
  Registration* registration = known.get();
  memories_[registration] = std::move(known);
  return registration;
}

void Agent::unregister_memory(Registration* memory) {
  const auto found = memories_.find(memory);
  if (found == memories_.end()) return;
  nixl_.deregister_mem(agent_, found->second->list, options_);
  nixl_.destroy_reg_dlist(found->second->list);
  memories_.erase(found);
  for (const auto& [name, remote] : remotes_) remote->told.erase(memory);
}

}  // namespace tpla::nixl
