#pragma once
#include <cstddef>
#include <cstdint>

// What we use of NIXL's C API (libnixl_capi.so, since NIXL 0.10.1), written down by hand so that the addon builds and loads without NIXL. Every
// object is behind a pointer; the one structure that is ours to fill in is AgentConfig.
namespace tpla::nixl {

using Status = int;  // nixl_capi_status_t
inline constexpr Status kSuccess = 0;
inline constexpr Status kInProgress = 1;

enum MemoryType : int { kDram = 0, kVram = 1 };  // nixl_capi_mem_type_t
enum Operation : int { kRead = 0, kWrite = 1 };  // nixl_capi_xfer_op_t

struct AgentObject;
struct Parameters;
struct MemoryList;
struct StringList;
struct Backend;
struct Options;
struct TransferList;
struct RegistrationList;
struct Transfer;
struct Notifications;

struct AgentConfig {  // nixl_capi_agent_config_t
  // A thread of NIXL's own that moves transfers on.
  bool has_progress_thread;
  bool has_listen_thread;
  int listen_port;
  int thread_sync;  // 0: one thread, the agent's own
  unsigned workers;
  uint64_t progress_delay_us;
  uint64_t listen_delay_us;
  bool captures_telemetry;
};

// The functions, each as `nixl_capi_` and its name.
struct Api {
  // Optional: whether the library is but a stand-in for one that was not there when it was built.
  bool (*is_stub)();
  Status (*create_configured_agent)(const char* name, const AgentConfig* config, AgentObject** agent);
  Status (*destroy_agent)(AgentObject* agent);
  // `data` is from malloc and the caller's. An empty list gives what a peer needs to connect, and no memory; another only its memory.
  Status (*get_local_partial_md)(AgentObject* agent, RegistrationList* list, void** data, size_t* bytes, Options* options);
  // `name` is from malloc and the caller's.
  Status (*load_remote_md)(AgentObject* agent, const void* data, size_t bytes, char** name);
  Status (*invalidate_remote_md)(AgentObject* agent, const char* name);

  Status (*get_available_plugins)(AgentObject* agent, StringList** plugins);
  Status (*destroy_string_list)(StringList* list);
  Status (*string_list_size)(StringList* list, size_t* size);
  Status (*string_list_get)(StringList* list, size_t index, const char** text);
  Status (*get_plugin_params)(AgentObject* agent, const char* plugin, MemoryList** memories, Parameters** parameters);
  Status (*destroy_mem_list)(MemoryList* list);
  Status (*destroy_params)(Parameters* parameters);
  Status (*mem_list_size)(MemoryList* list, size_t* size);
  Status (*mem_list_get)(MemoryList* list, size_t index, MemoryType* type);
  Status (*mem_type_to_string)(MemoryType type, const char** name);
  Status (*create_backend)(AgentObject* agent, const char* plugin, Parameters* parameters, Backend** backend);
  Status (*destroy_backend)(Backend* backend);  // the handle alone
  Status (*create_opt_args)(Options** options);
  Status (*destroy_opt_args)(Options* options);
  Status (*opt_args_add_backend)(Options* options, Backend* backend);

  Status (*create_reg_dlist)(MemoryType type, RegistrationList** list);
  Status (*destroy_reg_dlist)(RegistrationList* list);
  Status (*reg_dlist_add_desc)(RegistrationList* list, uintptr_t address, size_t bytes, uint64_t device, const void* metadata, size_t metadata_bytes);
  Status (*register_mem)(AgentObject* agent, RegistrationList* list, Options* options);
  Status (*deregister_mem)(AgentObject* agent, RegistrationList* list, Options* options);

  Status (*create_xfer_dlist)(MemoryType type, TransferList** list);
  Status (*destroy_xfer_dlist)(TransferList* list);
  Status (*xfer_dlist_add_desc)(TransferList* list, uintptr_t address, size_t bytes, uint64_t device);
  Status (*create_xfer_req)(AgentObject* agent, Operation operation, TransferList* local, TransferList* remote, const char* name, Transfer** transfer, Options* options);
  Status (*post_xfer_req)(AgentObject* agent, Transfer* transfer, Options* options);
  Status (*get_xfer_status)(AgentObject* agent, Transfer* transfer);
  Status (*release_xfer_req)(AgentObject* agent, Transfer* transfer);
  Status (*destroy_xfer_req)(Transfer* transfer);  // the handle, once released

  Status (*create_notif_map)(Notifications** notifications);
  Status (*destroy_notif_map)(Notifications* notifications);
  Status (*notif_map_clear)(Notifications* notifications);
  Status (*get_notifs)(AgentObject* agent, Notifications* notifications, Options* options);
  Status (*notif_map_size)(Notifications* notifications, size_t* agents);
  Status (*notif_map_get_agent_at)(Notifications* notifications, size_t index, const char** name);
  Status (*notif_map_get_notifs_size)(Notifications* notifications, const char* name, size_t* size);
  Status (*notif_map_get_notif)(Notifications* notifications, const char* name, size_t index, const void** data, size_t* bytes);
  Status (*gen_notif)(AgentObject* agent, const char* name, const void* data, size_t bytes, Options* options);
};

}  // namespace tpla::nixl
