#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>

// What we use of UCP's C API, written down by hand so that the addon builds and loads without UCX. The structures are those of UCX 1.13;
// later versions only append members, and read none whose bit is not set in `field_mask`. Names are UCP's, less its prefixes.
namespace tpla::ucx {

using Status = int8_t;  // ucs_status_t, a packed enum
inline constexpr Status kOk = 0;

// The API level that we ask ucp_init_version for.
inline constexpr unsigned kApiMajor = 1;
inline constexpr unsigned kApiMinor = 13;

struct Context;
struct Config;
struct WorkerObject;
struct Endpoint;
struct Address;
struct Memory;

// A request, an immediate result, or an error, in one word (ucs_status_ptr_t).
using StatusPointer = void*;
inline bool is_error(StatusPointer pointer) { return reinterpret_cast<uintptr_t>(pointer) >= static_cast<uintptr_t>(intptr_t(-100)); }
inline Status status_of(StatusPointer pointer) { return static_cast<Status>(reinterpret_cast<intptr_t>(pointer)); }

inline constexpr uint64_t kFeatureWakeup = 1 << 4;
inline constexpr uint64_t kFeatureAm = 1 << 6;

struct Params {
  static constexpr uint64_t kFeatures = 1 << 0;
  static constexpr uint64_t kName = 1 << 8;
  uint64_t field_mask;
  uint64_t features;
  size_t request_size;
  void (*request_init)(void* request);
  void (*request_cleanup)(void* request);
  uint64_t tag_sender_mask;
  int mt_workers_shared;
  size_t estimated_num_eps;
  size_t estimated_num_ppn;
  const char* name;
};

struct ContextAttributes {
  static constexpr uint64_t kMemoryTypes = 1 << 2;
  uint64_t field_mask;
  size_t request_size;
  int thread_mode;
  uint64_t memory_types;
  char name[32];
};
// ucs_memory_type_t; also the bits of memory_types.
inline constexpr int kMemoryTypeHost = 0;
inline constexpr int kMemoryTypeCuda = 1;

struct WorkerParams {
  static constexpr uint64_t kThreadMode = 1 << 0;
  uint64_t field_mask;
  int thread_mode;  // 0: one thread, the worker's own
  unsigned long cpu_mask[1024 / (8 * sizeof(unsigned long))];
  unsigned events;
  void* user_data;
  int event_fd;
  uint64_t flags;
  const char* name;
  size_t am_alignment;
  uint64_t client_id;
};

struct SocketAddressRange {  // ucs_sock_addr_t
  const void* address;
  unsigned length;
};

struct EndpointParams {
  static constexpr uint64_t kRemoteAddress = 1 << 0;
  static constexpr uint64_t kErrorHandlingMode = 1 << 1;
  static constexpr uint64_t kErrorHandler = 1 << 2;
  uint64_t field_mask;
  const Address* address;
  int err_mode;  // 1: report the peer's failure
  struct {
    void (*callback)(void* argument, Endpoint* endpoint, Status status);
    void* argument;
  } err_handler;
  void* user_data;
  unsigned flags;
  SocketAddressRange sockaddr;
  void* conn_request;
  const char* name;
  SocketAddressRange local_sockaddr;
};
inline constexpr int kErrorHandlingPeer = 1;

struct MemoryMapParams {
  static constexpr uint64_t kAddress = 1 << 0;
  static constexpr uint64_t kLength = 1 << 1;
  static constexpr uint64_t kMemoryType = 1 << 4;
  uint64_t field_mask;
  void* address;
  size_t length;
  unsigned flags;
  unsigned prot;
  int memory_type;
  const void* exported_memh_buffer;  // since 1.15, never set
};

struct RequestParams {
  static constexpr uint32_t kCallback = 1 << 1;
  static constexpr uint32_t kUserData = 1 << 2;
  static constexpr uint32_t kFlags = 1 << 4;
  static constexpr uint32_t kMemoryType = 1 << 6;
  static constexpr uint32_t kMemory = 1 << 8;
  uint32_t op_attr_mask;
  uint32_t flags;
  void* request;
  union {
    void (*send)(void* request, Status status, void* user_data);
    void (*receive_am)(void* request, Status status, size_t length, void* user_data);
  } callback;
  uint64_t datatype;
  void* user_data;
  void* reply_buffer;
  int memory_type;
  void* recv_info;
  Memory* memory;
};
inline constexpr uint32_t kCloseForce = 1 << 0;
inline constexpr uint32_t kAmSendEager = 1 << 1;

struct AmReceiveParams {
  static constexpr uint64_t kIsRendezvous = 1 << 17;
  uint64_t recv_attr;
  Endpoint* reply_ep;
};

using AmCallback = Status (*)(void* argument, const void* header, size_t header_bytes, void* data, size_t bytes, const AmReceiveParams* params);

struct AmHandlerParams {
  static constexpr uint64_t kId = 1 << 0;
  static constexpr uint64_t kFlags = 1 << 1;
  static constexpr uint64_t kCallback = 1 << 2;
  static constexpr uint64_t kArgument = 1 << 3;
  uint64_t field_mask;
  unsigned id;
  uint32_t flags;
  AmCallback callback;
  void* argument;
};
inline constexpr uint32_t kAmWholeMessage = 1 << 0;

// The functions, each as `ucp_` and its name.
struct Api {
  void (*get_version)(unsigned* major, unsigned* minor, unsigned* release);
  const char* (*get_version_string)();
  Status (*config_read)(const char* prefix, const char* file, Config** config);
  void (*config_release)(Config* config);
  Status (*init_version)(unsigned major, unsigned minor, const Params* params, const Config* config, Context** context);
  void (*cleanup)(Context* context);
  Status (*context_query)(Context* context, ContextAttributes* attributes);
  void (*context_print_info)(const Context* context, FILE* to);
  Status (*mem_map)(Context* context, const MemoryMapParams* params, Memory** memory);
  Status (*mem_unmap)(Context* context, Memory* memory);
  Status (*worker_create)(Context* context, const WorkerParams* params, WorkerObject** worker);
  void (*worker_destroy)(WorkerObject* worker);
  Status (*worker_get_address)(WorkerObject* worker, Address** address, size_t* bytes);
  void (*worker_release_address)(WorkerObject* worker, Address* address);
  unsigned (*worker_progress)(WorkerObject* worker);
  Status (*worker_get_efd)(WorkerObject* worker, int* fd);
  Status (*worker_arm)(WorkerObject* worker);
  Status (*worker_set_am_recv_handler)(WorkerObject* worker, const AmHandlerParams* params);
  Status (*ep_create)(WorkerObject* worker, const EndpointParams* params, Endpoint** endpoint);
  void (*ep_print_info)(Endpoint* endpoint, FILE* to);
  StatusPointer (*ep_close_nbx)(Endpoint* endpoint, const RequestParams* params);
  StatusPointer (*am_send_nbx)(Endpoint* endpoint, unsigned id, const void* header, size_t header_bytes, const void* data, size_t bytes, const RequestParams* params);
  StatusPointer (*am_recv_data_nbx)(WorkerObject* worker, void* descriptor, void* to, size_t bytes, const RequestParams* params);
  void (*request_free)(void* request);
};

}  // namespace tpla::ucx
