#pragma once
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "transfer/socket.h"
#include "transfer/ucx/library.h"

namespace tpla::ucx {

// Head of every active message; what a kind does not use is zero. Both ends are little-endian.
struct MessageHead {
  // Link at the receiver of the message; 0 for who listens.
  uint64_t link;
  uint64_t put;
  uint32_t kind;
  uint32_t slot;
  uint32_t epoch;
  uint32_t layer;
  uint32_t copy;
  uint32_t begin;
  uint32_t end;
  uint32_t pieces;
};
static_assert(sizeof(MessageHead) == 48);

// A message that has come: its data, or with `rendezvous` a descriptor of data that is still with its sender.
struct Incoming {
  MessageHead head;
  void* data;
  size_t bytes;
  bool rendezvous;
};

// What messages are for. Called on the worker's thread.
class Link {
 public:
  virtual ~Link() = default;
  virtual void on_message(const Incoming& message) = 0;
};

// A UCP worker and the thread that drives it. Everything of UCP happens on that thread, which sleeps while there is nothing to do.
class Worker {
 public:
  // Status of a send or receive when it is over; on the worker's thread.
  using Finished = std::function<void(Status status)>;

  // Throws what ContextHandle throws, or IO_FAILED.
  static std::shared_ptr<Worker> start(const Library& library);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  const Library& library() const { return context_.library(); }
  Capabilities capabilities() const { return context_.capabilities(); }
  // What a peer needs to make an endpoint to this worker.
  const std::string& address() const { return address_; }

  // Runs a task on the worker's thread; those of one thread in order. Nothing is run once the worker has stopped.
  void post(std::function<void()> task);
  // The same, and waits for it; not to be called on that thread. What it throws comes back.
  void run(std::function<void()> task);
  // Ends the thread, with endpoints that are open and memory that is registered. Not on that thread.
  void stop();

  // The rest is for the worker's thread.

  // Number of a link, to which messages that name it go while it lives.
  uint64_t add_link(std::weak_ptr<Link> link);
  void remove_link(uint64_t number) { links_.erase(number); }
  void listen(std::weak_ptr<Link> link) { links_[0] = std::move(link); }

  // Throws IO_FAILED. `on_failure` may come until the endpoint has been closed.
  Endpoint* connect(const std::string& address, std::function<void(Status status)> on_failure);
  // Gives up what is under way on it: every send and receive ends, with an error, before `closed` is called.
  void disconnect(Endpoint* endpoint, std::function<void()> closed);
  // `data` must stay until it is finished; `memory` is what it was registered as, if it was.
  void send(Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Memory* memory, uint32_t flags, Finished finished);
  // Fetches the data of a message that came as a rendezvous, during on_message.
  void receive(const Incoming& message, void* to, Memory* memory, Finished finished);

  // Registers memory so that transports find it pinned. Throws IO_FAILED.
  Memory* register_memory(void* address, size_t bytes);
  void unregister_memory(Memory* memory);

 private:
  struct EndpointState {
    std::function<void(Status)> on_failure;
    bool is_closing = false;
  };
  explicit Worker(const Library& library);
  void create();
  void drive();
  void destroy();
  bool run_tasks();
  void sleep();
  static Status on_message(void* self, const void* header, size_t header_bytes, void* data, size_t bytes, const AmReceiveParams* params);

  const ContextHandle context_;
  WorkerObject* worker_ = nullptr;
  std::string address_;
  int events_ = -1;  // the worker's own
  UniqueFd wake_;
  std::thread thread_;
  std::mutex mutex_;
  std::vector<std::function<void()>> tasks_;
  bool is_stopping_ = false;

  std::unordered_map<uint64_t, std::weak_ptr<Link>> links_;
  std::unordered_map<Endpoint*, std::unique_ptr<EndpointState>> endpoints_;
  std::unordered_set<Memory*> memories_;
};

}  // namespace tpla::ucx
