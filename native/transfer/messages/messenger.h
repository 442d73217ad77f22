#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "transfer/socket.h"

namespace tpla {

// Head of every message; what a kind does not use is zero. Both ends are little-endian.
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

// A message that has come: its data, or with `is_remote` what the messenger needs to fetch data that are still with their sender.
struct Incoming {
  MessageHead head;
  void* data;
  size_t bytes;
  bool is_remote;
};

// What messages are for. Called on the messenger's thread.
class MessageLink {
 public:
  virtual ~MessageLink() = default;
  virtual void on_message(const Incoming& message) = 0;
};

// Messages to other processes through a communication library (UCX, NIXL), whose data the receiver fetches itself where it wants them, and
// the thread that drives it. Everything of the library happens on that thread, which sleeps while there is nothing to do.
class Messenger {
 public:
  // How a send or receive ended: empty, or why it failed. On the messenger's thread.
  using Finished = std::function<void(const std::string& failure)>;

  // A way to one peer.
  class Endpoint {
   public:
    virtual ~Endpoint() = default;
  };
  // Memory that the library knows.
  class Registration {
   public:
    virtual ~Registration() = default;
  };

  virtual ~Messenger() = default;
  Messenger(const Messenger&) = delete;
  Messenger& operator=(const Messenger&) = delete;

  // Of the library, as messages to people have it.
  const char* name() const { return name_; }
  // What a peer needs to connect.
  const std::string& address() const { return address_; }

  // Runs a task on the messenger's thread; those of one thread in order. Nothing is run once it has stopped.
  void post(std::function<void()> task);
  // The same, and waits for it; not to be called on that thread. What it throws comes back.
  void run(std::function<void()> task);
  // Ends the thread, with endpoints that are open and memory that is registered. Not on that thread.
  void stop();

  // The rest is for the messenger's thread.

  // Number of a link, to which messages that name it go while it lives.
  uint64_t add_link(std::weak_ptr<MessageLink> link);
  void remove_link(uint64_t number) { links_.erase(number); }
  void listen(std::weak_ptr<MessageLink> link) { links_[0] = std::move(link); }

  // Throws IO_FAILED. `on_failure`, with the reason, may come until the endpoint has been closed.
  virtual Endpoint* connect(const std::string& address, std::function<void(const std::string& reason)> on_failure) = 0;
  // Gives up what is under way on it: every send and receive ends, with an error, before `closed` is called.
  virtual void disconnect(Endpoint* endpoint, std::function<void()> closed) = 0;
  // Data in registered memory may wait there until they are fetched, and stay until the send is finished; others go along with the message.
  virtual void send(Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Registration* memory, Finished finished) = 0;
  // Fetches the data of a message that is_remote, during on_message.
  virtual void receive(const Incoming& message, void* to, Registration* memory, Finished finished) = 0;
  // What carries data to this endpoint, as the library tells of it by now, such as `tcp/eth0` or `cuda_ipc/cuda`; empty where it does not tell.
  virtual std::vector<std::string> transports(Endpoint* endpoint) = 0;
  // Whether rows of GPUs had better be left to it on the way to this endpoint, since a network device reads and writes their memory. What
  // stages them inside the library is slower than we are: UCX 1.18 moves 0.43 GB/s over TCP where rows that we stage move 1.1.
  virtual bool carries_gpu(Endpoint* endpoint) = 0;
  // Whether it may, to some endpoint.
  virtual bool may_carry_gpu() const = 0;
  // `device`: the GPU whose memory it is, -1 for host memory. Throws IO_FAILED.
  virtual Registration* register_memory(void* address, size_t bytes, int device) = 0;
  virtual void unregister_memory(Registration* memory) = 0;

 protected:
  explicit Messenger(const char* name);

  // Owned so that its last owner may be a task of its own thread, which cannot wait for itself. Runs create() on that thread and throws what it throws.
  template <class Kind>
  static std::shared_ptr<Kind> started(Kind* made) {
    const std::shared_ptr<Kind> messenger(made, [](Kind* last) { destroy_elsewhere(last, [last] { delete last; }); });
    messenger->launch();
    return messenger;
  }

  // Sets address_; what it throws ends the thread.
  virtual void create() = 0;
  // Moves the library on; the number of events.
  virtual unsigned progress() = 0;
  // Waits for the library's next event, or for wake_fd(), or for some time; false where that passed and nothing is known to have come.
  virtual bool sleep() = 0;
  // Closes what is open.
  virtual void destroy() = 0;

  void dispatch(const Incoming& message);
  int wake_fd() const { return wake_.get(); }
  // Empties it.
  void woken();

  std::string address_;

 private:
  static void destroy_elsewhere(Messenger* last, std::function<void()> destroy);
  void launch();
  void wake();
  void drive();
  bool run_tasks();

  const char* const name_;
  const UniqueFd wake_;
  std::thread thread_;
  std::mutex mutex_;
  std::vector<std::function<void()>> tasks_;
  bool is_stopping_ = false;
  std::unordered_map<uint64_t, std::weak_ptr<MessageLink>> links_;
};

}  // namespace tpla
