#pragma once
#include <chrono>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transfer/messages/messenger.h"
#include "transfer/nixl/library.h"
#include "transfer/nixl/notification.h"
#include "transfer/ucx/library.h"

namespace tpla::nixl {

// What an agent found, asked of the library.
struct Capabilities {
  struct InUse {
    std::string name;
    std::vector<MemoryType> memories;
  };
  // Plug-ins that the library can load here.
  std::vector<std::string> plugins;
  // Of them, those that were asked for.
  std::vector<InUse> backends;
  // The UCX under a backend of that name, which says itself what it has here. Unset where it cannot be asked.
  struct Under {
    std::string file;
    std::string version;
    ucx::Capabilities found;
  };
  std::optional<Under> ucx;
};

// A NIXL agent. Messages are notifications, many in one; data that wait at their sender are read by the receiver, all of one notification in
// one transfer. A peer is told the keys of memory that is sent from, never those of memory that is received into, so that nobody can write there.
//
// NIXL has nothing to sleep on: it is asked, less often the longer nothing has happened.
class Agent : public Messenger {
 public:
  // Throws CONFIG_INVALID for backends that cannot be had, or do not carry host memory.
  static std::shared_ptr<Agent> start(const Library& library, const std::vector<std::string>& backends);
  ~Agent() override;

  const Library& library() const { return library_; }
  const Capabilities& capabilities() const { return capabilities_; }

  Messenger::Endpoint* connect(const std::string& address, std::function<void(const std::string& reason)> on_failure) override;
  // Reads that are under way are waited for, however long they take: NIXL can forget a transfer, but not say that it will write no more.
  void disconnect(Messenger::Endpoint* endpoint, std::function<void()> closed) override;
  void send(Messenger::Endpoint* endpoint, const MessageHead& head, const void* data, size_t bytes, Registration* memory, Finished finished) override;
  void receive(const Incoming& message, void* to, Registration* memory, Finished finished) override;
  // NIXL does not tell.
  std::vector<std::string> transports(Messenger::Endpoint*) override { return {}; }
  bool carries_gpu(Messenger::Endpoint* endpoint) override;
  bool may_carry_gpu() const override;
  Registration* register_memory(void* address, size_t bytes, int device) override;
  void unregister_memory(Registration* memory) override;

 protected:
  void create() override;
  unsigned progress() override;
  bool sleep() override;
  void destroy() override;

 private:
  struct Link;
  struct Remote;
  struct Known;
  struct Batch;
  struct Fetch;
  struct Arrival;

  Agent(const Library& library, std::vector<std::string> backends);
  void create_backends();
  void create_backend(const std::string& name);
  void check_notifications();
  bool takes_gpu() const;
  // Of a host whose GPUs its UCX lets read each other.
  bool reads_gpus() const;
  bool has_rdma() const;
  void free_handles();
  std::string metadata_of(RegistrationList* list);

  bool tell(Remote& remote, Known& memory);
  void flush(Remote& remote);
  void fail(Remote& remote, const std::string& reason);
  unsigned take_notifications();
  void take(const std::string& from, std::string_view text);
  void on_fetched(Remote& remote, uint64_t batch);
  void post(Fetch fetch);
  void finish(Fetch& fetch, Status status);
  unsigned poll_fetches();
  void close_idle();

  const Library& library_;
  const Api& nixl_;
  const std::vector<std::string> wanted_;
  Capabilities capabilities_;
  AgentObject* agent_ = nullptr;
  Options* options_ = nullptr;
  Notifications* notifications_ = nullptr;
  std::vector<Backend*> backends_;

  // By the agent's name.
  std::map<std::string, std::unique_ptr<Remote>> remotes_;
  std::map<Messenger::Endpoint*, std::unique_ptr<Link>> links_;
  std::map<Registration*, std::unique_ptr<Known>> memories_;
  std::list<Fetch> fetches_;
  // The notification that is being taken.
  Arrival* arrival_ = nullptr;
  std::chrono::steady_clock::time_point last_event_;
};

}  // namespace tpla::nixl
