// A library with NIXL's C API, for tests on machines without NIXL: real agents in real processes, which read and write each other's memory with
// process_vm_readv and process_vm_writev and notify each other by datagrams. Declared from NIXL's header as it is published, not from ours, so
// that a wrong signature of ours would not go unnoticed. What was seen of NIXL 1.4 over UCX's TCP is as there: a read waits while the peer is
// stopped, a plug-in for files carries nothing between processes. Stricter than the original: an agent used by two threads, or destroyed with
// transfers or registered memory left, ends the process.
//
// NIXL_STAND_IN_FAULT in the environment, read at every transfer: `flip` changes a byte, `error` ends it with an error, `hang` leaves it under way.
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <poll.h>
#include <string>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <thread>
#include <unistd.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

typedef enum { NIXL_CAPI_SUCCESS = 0, NIXL_CAPI_ERROR_INVALID_PARAM = -1, NIXL_CAPI_ERROR_BACKEND = -2, NIXL_CAPI_ERROR_INVALID_STATE = -3, NIXL_CAPI_IN_PROG = 1, NIXL_CAPI_ERROR_NOT_FOUND = -6 } nixl_capi_status_t;
typedef enum { NIXL_CAPI_MEM_DRAM = 0, NIXL_CAPI_MEM_VRAM = 1, NIXL_CAPI_MEM_BLOCK = 2, NIXL_CAPI_MEM_OBJECT = 3, NIXL_CAPI_MEM_FILE = 4 } nixl_capi_mem_type_t;
typedef enum { NIXL_CAPI_XFER_OP_READ = 0, NIXL_CAPI_XFER_OP_WRITE = 1 } nixl_capi_xfer_op_t;

namespace {

struct Extent {
  uintptr_t address;
  size_t bytes;
  bool holds(const Extent& other) const { return other.address >= address && other.address + other.bytes <= address + bytes; }
};

bool holds(const std::vector<Extent>& extents, const Extent& wanted) {
  for (const Extent& extent : extents) {
    if (extent.holds(wanted)) return true;
  }
  return false;
}

[[noreturn]] void misuse(const char* what) {
  std::fprintf(stderr, "nixl stand-in: %s\n", what);
  std::abort();
}

sockaddr_un address_of(const std::string& agent, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = "nixl-stand-in-" + agent;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

std::string fault() {
  const char* value = std::getenv("NIXL_STAND_IN_FAULT");
  return value == nullptr ? "" : value;
}

constexpr char kMagic[] = "stand-in 1\n";
constexpr size_t kMaxNotification = 128 << 10;

}  // namespace

struct nixl_capi_params_s {};
struct nixl_capi_mem_list_s { std::vector<nixl_capi_mem_type_t> types; };
struct nixl_capi_string_list_s { std::vector<std::string> texts; };
struct nixl_capi_backend_s { std::string name; };
struct nixl_capi_opt_args_s { std::vector<nixl_capi_backend_s*> backends; };
struct nixl_capi_xfer_dlist_s { nixl_capi_mem_type_t type; std::vector<Extent> extents; };
struct nixl_capi_reg_dlist_s { nixl_capi_mem_type_t type; std::vector<Extent> extents; };
struct nixl_capi_notif_map_s { std::map<std::string, std::vector<std::string>> texts; };

namespace {

struct Remote {
  pid_t pid = 0;
  std::vector<Extent> memory;
};

struct Work {
  nixl_capi_xfer_op_t operation;
  pid_t pid;
  std::vector<Extent> local;
  std::vector<Extent> remote;
  bool is_posted = false;
  std::atomic<nixl_capi_status_t> status{NIXL_CAPI_IN_PROG};
};

// Of another process: SIGSTOP has come, and no SIGCONT since.
bool is_stopped(pid_t pid) {
  const std::string file = "/proc/" + std::to_string(pid) + "/stat";
  std::FILE* stat = std::fopen(file.c_str(), "r");
  if (stat == nullptr) return false;
  char state = 0;
  const bool is_read = std::fscanf(stat, "%*d (%*[^)]) %c", &state) == 1;
  std::fclose(stat);
  return is_read && state == 'T';
}

bool move(const Work& work, bool flips) {
  for (size_t i = 0; i < work.local.size(); i++) {
    while (is_stopped(work.pid)) usleep(1000);
    const iovec mine{reinterpret_cast<void*>(work.local[i].address), work.local[i].bytes};
    const iovec theirs{reinterpret_cast<void*>(work.remote[i].address), work.remote[i].bytes};
    const ssize_t moved = work.operation == NIXL_CAPI_XFER_OP_READ ? process_vm_readv(work.pid, &mine, 1, &theirs, 1, 0) : process_vm_writev(work.pid, &mine, 1, &theirs, 1, 0);
    if (moved != static_cast<ssize_t>(mine.iov_len)) return false;
    if (flips) static_cast<char*>(mine.iov_base)[mine.iov_len / 2] ^= 1;
  }
  return true;
}

}  // namespace

struct nixl_capi_xfer_req_s { std::shared_ptr<Work> work; };

struct nixl_capi_agent_s {
  std::string name;
  int socket = -1;
  std::thread::id user = std::this_thread::get_id();
  std::vector<Extent> memory;
  std::map<std::string, Remote> remotes;
  int transfers = 0;
  // Of the thread that moves.
  std::thread mover;
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::shared_ptr<Work>> queue;
  bool is_ending = false;

  void check() const {
    if (std::this_thread::get_id() != user) misuse("an agent was used by two threads");
  }
  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      wake.wait(lock, [this] { return is_ending || !queue.empty(); });
      if (is_ending) return;
      const std::shared_ptr<Work> work = queue.front();
      queue.pop_front();
      lock.unlock();
      while (fault() == "hang") usleep(1000);
      const std::string how = fault();
      work->status = how != "error" && move(*work, how == "flip") ? NIXL_CAPI_SUCCESS : NIXL_CAPI_ERROR_BACKEND;
      lock.lock();
    }
  }
};

#ifndef NIXL_STAND_IN_IS_STUB
#define NIXL_STAND_IN_IS_STUB false
#endif
API bool nixl_capi_is_stub() { return NIXL_STAND_IN_IS_STUB; }

typedef struct {
  bool enable_prog_thread;
  bool enable_listen_thread;
  int listen_port;
  int thread_sync;
  unsigned int num_workers;
  uint64_t pthr_delay_us;
  uint64_t lthr_delay_us;
  bool capture_telemetry;
} nixl_capi_agent_config_t;

API nixl_capi_status_t nixl_capi_create_configured_agent(const char* name, const nixl_capi_agent_config_t* config, nixl_capi_agent_s** agent) {
  if (config->enable_listen_thread || config->listen_port != 0 || config->thread_sync != 0) return NIXL_CAPI_ERROR_INVALID_PARAM;
  auto made = std::make_unique<nixl_capi_agent_s>();
  made->name = name;
  made->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  socklen_t length;
  const sockaddr_un address = address_of(name, length);
  if (made->socket < 0 || bind(made->socket, reinterpret_cast<const sockaddr*>(&address), length) != 0) return NIXL_CAPI_ERROR_BACKEND;
  const int room = 4 << 20;
  setsockopt(made->socket, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
  // So that a peer may read us where Yama asks for it.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  made->mover = std::thread([self = made.get()] { self->run(); });
  *agent = made.release();
  return NIXL_CAPI_SUCCESS;
}

API nixl_capi_status_t nixl_capi_destroy_agent(nixl_capi_agent_s* agent) {
  agent->check();
  if (agent->transfers != 0) misuse("an agent was destroyed with transfers left");
  if (!agent->memory.empty()) misuse("an agent was destroyed with memory registered");
  {
    const std::lock_guard lock(agent->mutex);
    agent->is_ending = true;
  }
  agent->wake.notify_all();
  agent->mover.join();
  close(agent->socket);
  delete agent;
  return NIXL_CAPI_SUCCESS;
}

API nixl_capi_status_t nixl_capi_get_local_partial_md(nixl_capi_agent_s* agent, nixl_capi_reg_dlist_s* list, void** data, size_t* bytes, nixl_capi_opt_args_s*) {
  agent->check();
  std::string text = kMagic + agent->name + "\n" + (list->extents.empty() ? std::to_string(getpid()) : "-") + "\n";
  for (const Extent& extent : list->extents) {
    if (!holds(agent->memory, extent)) return NIXL_CAPI_ERROR_NOT_FOUND;
    text += std::to_string(extent.address) + " " + std::to_string(extent.bytes) + "\n";
  }
  *data = std::malloc(text.size());
  std::memcpy(*data, text.data(), text.size());
  *bytes = text.size();
  return NIXL_CAPI_SUCCESS;
}

API nixl_capi_status_t nixl_capi_load_remote_md(nixl_capi_agent_s* agent, const void* data, size_t bytes, char** name) {
  agent->check();
  std::string text(static_cast<const char*>(data), bytes);
  if (text.rfind(kMagic, 0) != 0) return NIXL_CAPI_ERROR_BACKEND;
  std::vector<std::string> lines;
  for (size_t at = sizeof(kMagic) - 1; at < text.size();) {
    const size_t end = text.find('\n', at);
    if (end == std::string::npos) return NIXL_CAPI_ERROR_BACKEND;
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  if (lines.size() < 2 || lines[0] == agent->name) return NIXL_CAPI_ERROR_INVALID_PARAM;
  // Memory of an agent that one is not connected to cannot be used.
  if (lines[1] == "-" && agent->remotes.count(lines[0]) == 0) return NIXL_CAPI_ERROR_NOT_FOUND;
  Remote& remote = agent->remotes[lines[0]];
  if (lines[1] != "-") remote.pid = static_cast<pid_t>(std::stol(lines[1]));
  for (size_t i = 2; i < lines.size(); i++) {
    Extent extent{};
    if (std::sscanf(lines[i].c_str(), "%zu %zu", &extent.address, &extent.bytes) != 2) return NIXL_CAPI_ERROR_BACKEND;
    remote.memory.push_back(extent);
  }
  *name = strdup(lines[0].c_str());
  return NIXL_CAPI_SUCCESS;
}

API nixl_capi_status_t nixl_capi_invalidate_remote_md(nixl_capi_agent_s* agent, const char* name) {
  agent->check();
  return agent->remotes.erase(name) > 0 ? NIXL_CAPI_SUCCESS : NIXL_CAPI_ERROR_NOT_FOUND;
}

// ---------------------------------------------------------------- plug-ins

API nixl_capi_status_t nixl_capi_get_available_plugins(nixl_capi_agent_s* agent, nixl_capi_string_list_s** plugins) {
  agent->check();
  *plugins = new nixl_capi_string_list_s{{"GDS", "POSIX", "UCX"}};
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_string_list(nixl_capi_string_list_s* list) {
  delete list;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_string_list_size(nixl_capi_string_list_s* list, size_t* size) {
  *size = list->texts.size();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_string_list_get(nixl_capi_string_list_s* list, size_t index, const char** text) {
  *text = list->texts.at(index).c_str();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_get_plugin_params(nixl_capi_agent_s* agent, const char* name, nixl_capi_mem_list_s** memories, nixl_capi_params_s** params) {
  agent->check();
  *memories = new nixl_capi_mem_list_s;
  if (std::string(name) == "GDS") (*memories)->types = {NIXL_CAPI_MEM_VRAM, NIXL_CAPI_MEM_FILE};
  else if (std::string(name) == "POSIX") (*memories)->types = {NIXL_CAPI_MEM_DRAM, NIXL_CAPI_MEM_FILE};
  else (*memories)->types = {NIXL_CAPI_MEM_DRAM};
  *params = new nixl_capi_params_s;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_mem_list(nixl_capi_mem_list_s* list) {
  delete list;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_params(nixl_capi_params_s* params) {
  delete params;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_mem_list_size(nixl_capi_mem_list_s* list, size_t* size) {
  *size = list->types.size();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_mem_list_get(nixl_capi_mem_list_s* list, size_t index, nixl_capi_mem_type_t* type) {
  *type = list->types.at(index);
  return NIXL_CAPI_SUCCESS;
}
#ifndef NIXL_STAND_IN_VRAM
#define NIXL_STAND_IN_VRAM "VRAM"
#endif
API nixl_capi_status_t nixl_capi_mem_type_to_string(nixl_capi_mem_type_t type, const char** name) {
  static const char* const names[] = {"DRAM", NIXL_STAND_IN_VRAM, "BLOCK", "OBJECT", "FILE"};
  if (type < 0 || static_cast<size_t>(type) >= std::size(names)) return NIXL_CAPI_ERROR_INVALID_PARAM;
  *name = names[type];
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_create_backend(nixl_capi_agent_s* agent, const char* name, nixl_capi_params_s* params, nixl_capi_backend_s** backend) {
  agent->check();
  if (params == nullptr) return NIXL_CAPI_ERROR_INVALID_PARAM;
  *backend = new nixl_capi_backend_s{name};
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_backend(nixl_capi_backend_s* backend) {
  delete backend;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_create_opt_args(nixl_capi_opt_args_s** args) {
  *args = new nixl_capi_opt_args_s;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_opt_args(nixl_capi_opt_args_s* args) {
  delete args;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_opt_args_add_backend(nixl_capi_opt_args_s* args, nixl_capi_backend_s* backend) {
  args->backends.push_back(backend);
  return NIXL_CAPI_SUCCESS;
}

// ---------------------------------------------------------------- memory

API nixl_capi_status_t nixl_capi_create_reg_dlist(nixl_capi_mem_type_t type, nixl_capi_reg_dlist_s** list) {
  *list = new nixl_capi_reg_dlist_s{type, {}};
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_reg_dlist(nixl_capi_reg_dlist_s* list) {
  delete list;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_reg_dlist_add_desc(nixl_capi_reg_dlist_s* list, uintptr_t address, size_t bytes, uint64_t, const void*, size_t) {
  list->extents.push_back({address, bytes});
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_register_mem(nixl_capi_agent_s* agent, nixl_capi_reg_dlist_s* list, nixl_capi_opt_args_s*) {
  agent->check();
  if (list->type != NIXL_CAPI_MEM_DRAM) return NIXL_CAPI_ERROR_NOT_FOUND;
  agent->memory.insert(agent->memory.end(), list->extents.begin(), list->extents.end());
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_deregister_mem(nixl_capi_agent_s* agent, nixl_capi_reg_dlist_s* list, nixl_capi_opt_args_s*) {
  agent->check();
  for (const Extent& extent : list->extents) {
    for (auto at = agent->memory.begin(); at != agent->memory.end(); ++at) {
      if (at->address == extent.address && at->bytes == extent.bytes) {
        agent->memory.erase(at);
        break;
      }
    }
  }
  return NIXL_CAPI_SUCCESS;
}

// ---------------------------------------------------------------- transfers

API nixl_capi_status_t nixl_capi_create_xfer_dlist(nixl_capi_mem_type_t type, nixl_capi_xfer_dlist_s** list) {
  *list = new nixl_capi_xfer_dlist_s{type, {}};
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_xfer_dlist(nixl_capi_xfer_dlist_s* list) {
  delete list;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_xfer_dlist_add_desc(nixl_capi_xfer_dlist_s* list, uintptr_t address, size_t bytes, uint64_t) {
  list->extents.push_back({address, bytes});
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_create_xfer_req(nixl_capi_agent_s* agent, nixl_capi_xfer_op_t operation, nixl_capi_xfer_dlist_s* local, nixl_capi_xfer_dlist_s* remote,
                                                 const char* name, nixl_capi_xfer_req_s** req, nixl_capi_opt_args_s*) {
  agent->check();
  const auto found = agent->remotes.find(name);
  if (found == agent->remotes.end() || local->extents.size() != remote->extents.size()) return NIXL_CAPI_ERROR_BACKEND;
  for (size_t i = 0; i < local->extents.size(); i++) {
    const bool fits = local->extents[i].bytes == remote->extents[i].bytes && holds(agent->memory, local->extents[i]) && holds(found->second.memory, remote->extents[i]);
    if (!fits) return NIXL_CAPI_ERROR_BACKEND;
  }
  auto work = std::make_shared<Work>();
  work->operation = operation;
  work->pid = found->second.pid;
  work->local = local->extents;
  work->remote = remote->extents;
  *req = new nixl_capi_xfer_req_s{std::move(work)};
  agent->transfers++;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_post_xfer_req(nixl_capi_agent_s* agent, nixl_capi_xfer_req_s* req, nixl_capi_opt_args_s*) {
  agent->check();
  const std::lock_guard lock(agent->mutex);
  req->work->is_posted = true;
  agent->queue.push_back(req->work);
  agent->wake.notify_one();
  return NIXL_CAPI_IN_PROG;
}
API nixl_capi_status_t nixl_capi_get_xfer_status(nixl_capi_agent_s* agent, nixl_capi_xfer_req_s* req) {
  agent->check();
  return req->work->status;
}
API nixl_capi_status_t nixl_capi_release_xfer_req(nixl_capi_agent_s* agent, nixl_capi_xfer_req_s* req) {
  agent->check();
  if (!req->work) return NIXL_CAPI_ERROR_INVALID_PARAM;
  if (req->work->is_posted && req->work->status == NIXL_CAPI_IN_PROG) misuse("a transfer that may still write was released");
  req->work.reset();
  agent->transfers--;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_xfer_req(nixl_capi_xfer_req_s* req) {
  if (req->work) return NIXL_CAPI_ERROR_INVALID_STATE;
  delete req;
  return NIXL_CAPI_SUCCESS;
}

// ---------------------------------------------------------------- notifications: a datagram is the sender's name, a line feed, the text

API nixl_capi_status_t nixl_capi_create_notif_map(nixl_capi_notif_map_s** map) {
  *map = new nixl_capi_notif_map_s;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_destroy_notif_map(nixl_capi_notif_map_s* map) {
  delete map;
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_notif_map_clear(nixl_capi_notif_map_s* map) {
  map->texts.clear();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_get_notifs(nixl_capi_agent_s* agent, nixl_capi_notif_map_s* map, nixl_capi_opt_args_s* args) {
  agent->check();
  bool notifies = args->backends.empty();
  for (const nixl_capi_backend_s* backend : args->backends) notifies = notifies || backend->name == "UCX";
  if (!notifies) return NIXL_CAPI_ERROR_BACKEND;
  static thread_local std::vector<char> text(kMaxNotification);
  for (ssize_t bytes; (bytes = recv(agent->socket, text.data(), text.size(), MSG_DONTWAIT)) > 0;) {
    char* end = static_cast<char*>(std::memchr(text.data(), '\n', bytes));
    if (end != nullptr) map->texts[std::string(text.data(), end)].emplace_back(end + 1, text.data() + bytes);
  }
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_notif_map_size(nixl_capi_notif_map_s* map, size_t* agents) {
  *agents = map->texts.size();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_notif_map_get_agent_at(nixl_capi_notif_map_s* map, size_t index, const char** name) {
  if (index >= map->texts.size()) return NIXL_CAPI_ERROR_INVALID_PARAM;
  *name = std::next(map->texts.begin(), index)->first.c_str();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_notif_map_get_notifs_size(nixl_capi_notif_map_s* map, const char* name, size_t* size) {
  *size = map->texts.at(name).size();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_notif_map_get_notif(nixl_capi_notif_map_s* map, const char* name, size_t index, const void** data, size_t* bytes) {
  const std::string& text = map->texts.at(name).at(index);
  *data = text.data();
  *bytes = text.size();
  return NIXL_CAPI_SUCCESS;
}
API nixl_capi_status_t nixl_capi_gen_notif(nixl_capi_agent_s* agent, const char* name, const void* data, size_t bytes, nixl_capi_opt_args_s*) {
  agent->check();
  if (agent->remotes.count(name) == 0) return NIXL_CAPI_ERROR_NOT_FOUND;
  const std::string text = agent->name + "\n" + std::string(static_cast<const char*>(data), bytes);
  if (text.size() > kMaxNotification) misuse("a notification is larger than this library takes");
  socklen_t length;
  const sockaddr_un address = address_of(name, length);
  // NIXL queues what the peer does not take yet; here two agents that both wait would never meet, so a full queue is waited for a while only.
  for (int tries = 0; tries < 5000; tries++) {
    if (sendto(agent->socket, text.data(), text.size(), MSG_DONTWAIT | MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&address), length) >= 0) return NIXL_CAPI_SUCCESS;
    if (errno != EAGAIN && errno != ENOBUFS) return NIXL_CAPI_ERROR_BACKEND;
    usleep(1000);
  }
  return NIXL_CAPI_ERROR_BACKEND;
}
