#pragma once
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>

#include "transfer/messages/messenger.h"
#include "transfer/ucx/library.h"

namespace tpla::ucx {

// A UCP worker: messages are active messages; UCX picks the transport, and for what is larger than UCX_RNDV_THRESH a rendezvous, in which the
// receiver fetches the bytes (an RDMA read where there is RDMA). No peer gets the address or key of memory: RMA is not enabled.
class Worker : public Messenger {
 public:
  // Throws what ContextHandle throws, or IO_FAILED.
  static std::shared_ptr<Worker> start(const Library& library);
  ~Worker() override;

  const Library& library() const { return context_.library(); }
  Capabilities capabilities() const { return context_.capabilities(); }

  Messenger::Endpoint* connect(const std::string& address, std::function<void(const std::string& reason)> on_failure) override;
  void disconnect(Messenger::Endpoint* endpoint, std::function<void()> closed) override;
  void send(Messenger::Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Registration* memory, Finished finished) override;
  void receive(const Incoming& message, void* to, Registration* memory, Finished finished) override;
  std::vector<std::string> transports(Messenger::Endpoint* endpoint) override;
  bool carries_gpu(Messenger::Endpoint* endpoint) override;
  bool may_carry_gpu() const override { return may_carry_gpu_; }
  Registration* register_memory(void* address, size_t bytes, int device) override;
  void unregister_memory(Registration* memory) override;

 protected:
  void create() override;
  unsigned progress() override;
  bool sleep() override;
  void destroy() override;

 private:
  struct Peer;
  struct Mapped;
  explicit Worker(const Library& library);
  static void use_memory(RequestParams& params, const Mapped& memory);
  static Status on_message(void* self, const void* header, size_t header_bytes, void* data, size_t bytes, const AmReceiveParams* params);

  const ContextHandle context_;
  WorkerObject* worker_ = nullptr;
  bool may_carry_gpu_ = false;
  int events_ = -1;  // the worker's own
  std::unordered_map<Messenger::Endpoint*, std::unique_ptr<Peer>> peers_;
  std::unordered_map<Registration*, std::unique_ptr<Mapped>> memories_;
};

}  // namespace tpla::ucx
