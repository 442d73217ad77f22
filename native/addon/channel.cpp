#include "transfer/channel.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "addon/announcement.h"
#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/start_checksum.h"
#include "addon/transfer_arguments.h"
#include "transfer/push_message.h"
#include "transfer/timeline.h"

namespace tpla::addon {

namespace {

constexpr int kConnectTimeoutMs = 5000;
constexpr napi_type_tag kChannelTag = {0x5f0f3a60d6c24b1eULL, 0x9f2d7a41c8e3b065ULL};
constexpr const char* kChannelKey = "_channel";
using ChannelPointer = std::shared_ptr<Channel>;

struct Event {
  enum class Kind { accepted, message, pushed, closed, listener_closed } kind;
  std::shared_ptr<Channel> channel;
  Message message;
  std::string reason;
  // pushed: what came, and why it is not what it should be.
  PushMessage push{};
  std::unique_ptr<Error> problem{};
};

// Hand-offs whose pushes are awaited, and where they land: the pages that verification reads.
class Expected {
 public:
  struct Pages {
    std::shared_ptr<const KvRegion> region;
    PageTables tables;
  };
  void add(const Channel* channel, const std::string& session, std::shared_ptr<const KvRegion> region, PageTables tables) {
    const std::lock_guard lock(mutex_);
    pages_[{channel, session}] = std::make_shared<const Pages>(Pages{std::move(region), std::move(tables)});
  }
  void remove(const Channel* channel, const std::string& session) {
    const std::lock_guard lock(mutex_);
    pages_.erase({channel, session});
  }
  std::shared_ptr<const Pages> find(const Channel* channel, const std::string& session) const {
    const std::lock_guard lock(mutex_);
    const auto found = pages_.find({channel, session});
    return found == pages_.end() ? nullptr : found->second;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<const Channel*, std::string>, std::shared_ptr<const Pages>> pages_;
};

// What decode's own memory holds against what prefill says it sent; null where they agree.
std::unique_ptr<Error> compare(const PushMessage& push, const std::vector<uint64_t>& found) {
  std::string where;
  if (push.checksums.size() != found.size()) {
    where = std::to_string(push.checksums.size()) + " checksums for " + std::to_string(found.size()) + " pages";
  } else {
    const auto wrong = std::mismatch(found.begin(), found.end(), push.checksums.begin()).first;
    if (wrong == found.end()) return nullptr;
    where = "entry " + std::to_string(wrong - found.begin()) + " of " + std::to_string(found.size());
  }
  const auto text = [](Range range) { return std::string("[").append(std::to_string(range.begin)).append(", ").append(std::to_string(range.end)).append(")"); };
  return std::make_unique<Error>("CHECKSUM_MISMATCH", "KV of layers " + text(push.layers) + ", tokens " + text(push.tokens) + " does not match what prefill sent (" +
                                                          where + "); nothing of it was used");
}

// Carries events of a channel, or of a listener and all its channels, to the JavaScript thread. It keeps the process alive until the
// last of them has ended.
class JsEvents : public ChannelEvents, public ChannelListener::Events, public std::enable_shared_from_this<JsEvents> {
 public:
  static std::shared_ptr<JsEvents> create(Napi::Env env, Napi::Object handlers, Napi::Function on_connection);

  // JavaScript thread: the object that stands for `channel` in every callback.
  Napi::Object adopt(Napi::Env env, const std::shared_ptr<Channel>& channel);
  void adopt_listener() { open_++; }

  void on_message(const std::shared_ptr<Channel>& channel, Message message) override {
    if (takes_pushes_ && message.fds.empty()) {
      if (auto push = decode_push(message.bytes)) return verify(channel, std::move(*push), message.bytes.size());
    }
    mark_step("message received");
    deliver({Event::Kind::message, channel, std::move(message), ""});
  }
  void on_close(const std::shared_ptr<Channel>& channel, const std::string& reason) override { deliver({Event::Kind::closed, channel, {}, reason}); }
  void on_listener_closed() override { deliver({Event::Kind::listener_closed, nullptr, {}, ""}); }
  void on_accept(UniqueFd socket) override {
    const bool is_unix = bound_port(socket.get()) == 0;
    if (!is_unix) tune_tcp(socket.get(), kPeerGoneMs);
    deliver({Event::Kind::accepted, std::make_shared<Channel>(std::move(socket), is_unix, shared_from_this()), {}, ""});
  }

 private:
  static constexpr int kPeerGoneMs = 10000;

  static void call_js(Napi::Env env, Napi::Function, JsEvents* self, Event* event);
  using ThreadSafeFunction = Napi::TypedThreadSafeFunction<JsEvents, Event, call_js>;

  void deliver(Event event);
  void handle(Napi::Env env, Event& event);
  void handle_message(Napi::Env env, Event& event);
  void handle_push(Napi::Env env, Event& event);
  void verify(const std::shared_ptr<Channel>& channel, PushMessage push, size_t bytes);
  void ended();
  static void on_environment_exit(void* events);

  // Handlers with onPushed: pushes are verified before they are told of.
  bool takes_pushes_ = false;
  Expected expected_;

  // Taken around every call, and by the environment's exit, after which the function is gone.
  std::mutex mutex_;
  bool released_ = false;
  ThreadSafeFunction function_;

  // JavaScript thread only.
  napi_env env_ = nullptr;
  Napi::ObjectReference handlers_;
  Napi::FunctionReference on_connection_;
  std::map<Channel*, Napi::ObjectReference> channels_;
  int open_ = 0;
};

std::shared_ptr<JsEvents> JsEvents::create(Napi::Env env, Napi::Object handlers, Napi::Function on_connection) {
  auto events = std::make_shared<JsEvents>();
  events->env_ = env;
  events->handlers_ = Napi::Persistent(handlers);
  events->takes_pushes_ = handlers.Get("onPushed").IsFunction();
  if (!on_connection.IsEmpty()) events->on_connection_ = Napi::Persistent(on_connection);
  events->function_ = ThreadSafeFunction::New(
      env, "tpla channel", 0, 1, events.get(), [](Napi::Env, std::shared_ptr<JsEvents>* owner, JsEvents*) { delete owner; },
      new std::shared_ptr<JsEvents>(events));
  // After the function's own hook, so that it runs before it.
  napi_add_env_cleanup_hook(env, on_environment_exit, events.get());
  return events;
}

void JsEvents::on_environment_exit(void* events) {
  auto* self = static_cast<JsEvents*>(events);
  {
    const std::lock_guard lock(self->mutex_);
    self->released_ = true;
  }
  self->handlers_.Reset();
  self->on_connection_.Reset();
  self->channels_.clear();
}

void JsEvents::deliver(Event event) {
  auto* held = new Event(std::move(event));
  const std::lock_guard lock(mutex_);
  if (released_ || function_.NonBlockingCall(held) != napi_ok) delete held;
}

void JsEvents::call_js(Napi::Env env, Napi::Function, JsEvents* self, Event* event) {
  const std::unique_ptr<Event> owned(event);
  if (static_cast<napi_env>(env) == nullptr) return;
  const std::shared_ptr<JsEvents> alive = self->shared_from_this();
  self->handle(env, *owned);
}

void JsEvents::handle(Napi::Env env, Event& event) {
  const Napi::HandleScope scope(env);
  switch (event.kind) {
    case Event::Kind::accepted: {
      const Napi::Object channel = adopt(env, event.channel);
      on_connection_.Call({channel});
      event.channel->start();
      break;
    }
    case Event::Kind::message:
      handle_message(env, event);
      break;
    case Event::Kind::pushed:
      handle_push(env, event);
      break;
    case Event::Kind::closed: {
      const Napi::Object channel = channels_[event.channel.get()].Value();
      channels_.erase(event.channel.get());
      const Napi::Object handlers = handlers_.Value();
      ended();
      handlers.Get("onClose").As<Napi::Function>().Call(handlers, {channel, Napi::String::New(env, event.reason)});
      break;
    }
    case Event::Kind::listener_closed:
      ended();
      break;
  }
}

// Descriptors belong to the handler from here on.
void JsEvents::handle_message(Napi::Env env, Event& event) {
  mark_step("message told of");
  const Napi::Object channel = channels_[event.channel.get()].Value();
  const Napi::Object handlers = handlers_.Value();
  const size_t bytes = event.message.bytes.size();
  Napi::Uint8Array message = Napi::Uint8Array::New(env, bytes);
  if (bytes > 0) std::memcpy(message.Data(), event.message.bytes.data(), bytes);
  Napi::Array fds = Napi::Array::New(env, event.message.fds.size());
  for (size_t i = 0; i < event.message.fds.size(); i++) fds.Set(static_cast<uint32_t>(i), event.message.fds[i].release());
  event.channel->consumed(bytes);
  handlers.Get("onMessage").As<Napi::Function>().Call(handlers, {channel, message, fds});
}

// Loop's thread.
void JsEvents::verify(const std::shared_ptr<Channel>& channel, PushMessage push, size_t bytes) {
  mark_step("pushed received");
  const std::shared_ptr<const Expected::Pages> pages = expected_.find(channel.get(), push.session);
  if (!pages) {
    // Of a hand-off that is over, most likely: it crossed its end on the way.
    channel->consumed(bytes);
    push.checksums.clear();
    return deliver({Event::Kind::pushed, channel, {}, "", std::move(push), std::make_unique<Error>("PROTOCOL", "a push came for pages that were not granted")});
  }
  const Range layers = push.layers;
  const Range tokens = push.tokens;
  auto held = std::make_shared<PushMessage>(std::move(push));
  static auto* checks = new TaskQueue("tpla-checks");
  start_checksum(*checks, pages->region, pages->tables, layers, tokens,
                 [self = shared_from_this(), channel, held, bytes](std::vector<uint64_t> found, std::unique_ptr<Error> error) {
                   mark_step("verified");
                   std::unique_ptr<Error> problem = error ? std::move(error) : compare(*held, found);
                   held->checksums.clear();
                   channel->consumed(bytes);
                   self->deliver({Event::Kind::pushed, channel, {}, "", std::move(*held), std::move(problem)});
                 });
}

void JsEvents::handle_push(Napi::Env env, Event& event) {
  mark_step("push told of");
  const auto found = channels_.find(event.channel.get());
  if (found == channels_.end()) return;  // closed while it was verified
  const auto range = [env](Range from) {
    Napi::Array array = Napi::Array::New(env, 2);
    array.Set(0u, from.begin);
    array.Set(1u, from.end);
    return array;
  };
  const Napi::Object handlers = handlers_.Value();
  const Napi::Value problem = event.problem ? to_js_error(env, *event.problem).Value() : env.Null();
  handlers.Get("onPushed").As<Napi::Function>().Call(
      handlers, {found->second.Value(), Napi::String::New(env, event.push.session), range(event.push.layers), range(event.push.tokens), problem});
}

// One channel or the listener is gone; with the last of them goes the hold on the process.
void JsEvents::ended() {
  if (--open_ > 0) return;
  napi_remove_env_cleanup_hook(env_, on_environment_exit, this);
  const std::lock_guard lock(mutex_);
  released_ = true;
  function_.Release();
}

std::vector<int> parse_fds(const Napi::Value& value) {
  std::vector<int> fds;
  if (!value.IsArray()) return fds;
  const Napi::Array array = value.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++) {
    const Napi::Value fd = array.Get(i);
    if (!fd.IsNumber()) throw Error("REQUEST_INVALID", "channel: a descriptor is not a number");
    fds.push_back(fd.As<Napi::Number>().Int32Value());
  }
  return fds;
}

void send_message(const Napi::CallbackInfo& info, Channel& channel) {
  try {
    if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
      throw Error("REQUEST_INVALID", "channel: a message is a Uint8Array");
    }
    const Napi::Uint8Array message = info[0].As<Napi::Uint8Array>();
    mark_step("message sent");
    channel.send(reinterpret_cast<const std::byte*>(message.Data()), message.ByteLength(), parse_fds(info[1]));
  } catch (const Error& error) {
    throw to_js_error(info.Env(), error);
  }
}

Napi::Object JsEvents::adopt(Napi::Env env, const std::shared_ptr<Channel>& channel) {
  Napi::Object peer = Napi::Object::New(env);
  peer.Set("pid", channel->peer().pid);
  peer.Set("uid", channel->peer().uid);
  Napi::Object object = Napi::Object::New(env);
  object.Set("peer", peer);
  object.Set("send", Napi::Function::New(env, [channel](const Napi::CallbackInfo& info) { send_message(info, *channel); }, "send"));
  object.Set("close", Napi::Function::New(env, [channel](const Napi::CallbackInfo&) { channel->close(); }, "close"));
  object.Set("expect", Napi::Function::New(env, [self = weak_from_this(), at = channel.get()](const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      if (const auto events = self.lock()) events->expected_.add(at, to_text(info[0], "session"), kv_region_of(info[1]), parse_tables(info[2], info[3], "pages"));
    });
  }, "expect"));
  object.Set("forget", Napi::Function::New(env, [self = weak_from_this(), at = channel.get()](const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      if (const auto events = self.lock()) events->expected_.remove(at, to_text(info[0], "session"));
    });
  }, "forget"));
  auto external = Napi::External<ChannelPointer>::New(env, new ChannelPointer(channel), [](Napi::Env, ChannelPointer* held) { delete held; });
  external.TypeTag(&kChannelTag);
  object.DefineProperty(Napi::PropertyDescriptor::Value(kChannelKey, external, napi_default));
  channels_[channel.get()] = Napi::Persistent(object);
  open_++;
  return object;
}

Napi::Object check_handlers(const Napi::Value& value) {
  if (value.IsObject()) {
    const Napi::Object handlers = value.As<Napi::Object>();
    if (handlers.Get("onMessage").IsFunction() && handlers.Get("onClose").IsFunction()) return handlers;
  }
  throw Error("REQUEST_INVALID", "channel: handlers need onMessage and onClose");
}

SocketAddress parse_address(const Napi::Value& value) {
  SocketAddress address;
  if (value.IsString()) {
    address.path = value.As<Napi::String>().Utf8Value();
  } else if (value.IsObject()) {
    const Napi::Object object = value.As<Napi::Object>();
    if (object.Get("host").IsString()) address.host = object.Get("host").As<Napi::String>().Utf8Value();
    if (object.Get("port").IsNumber()) address.port = static_cast<uint16_t>(object.Get("port").As<Napi::Number>().Uint32Value());
  }
  if (address.path.empty() && address.host.empty()) throw Error("REQUEST_INVALID", "channel: expected a socket path or {host, port}");
  return address;
}

Napi::Value listen_channel(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  try {
    const SocketAddress address = parse_address(info[0]);
    if (!info[1].IsFunction()) throw Error("REQUEST_INVALID", "channel: onConnection is not a function");
    const Napi::Object handlers = check_handlers(info[2]);
    // Bound before anything that would keep the process alive exists.
    struct Holder : ChannelListener::Events {
      std::shared_ptr<JsEvents> target;
      void on_accept(UniqueFd socket) override { target->on_accept(std::move(socket)); }
      void on_listener_closed() override { target->on_listener_closed(); }
    };
    auto holder = std::make_shared<Holder>();
    auto listener = std::make_shared<ChannelListener>(address, holder);
    holder->target = JsEvents::create(env, handlers, info[1].As<Napi::Function>());
    holder->target->adopt_listener();
    listener->start();
    Napi::Object server = Napi::Object::New(env);
    server.Set("port", listener->port());
    server.Set("close", Napi::Function::New(env, [listener](const Napi::CallbackInfo&) { listener->close(); }, "close"));
    return server;
  } catch (const Error& error) {
    throw to_js_error(env, error);
  }
}

class ConnectWorker : public Napi::AsyncWorker {
 public:
  ConnectWorker(Napi::Env env, SocketAddress address, Napi::Object handlers)
      : Napi::AsyncWorker(env, "tpla connect"), deferred_(env), address_(std::move(address)), handlers_(Napi::Persistent(handlers)) {}
  Napi::Promise promise() const { return deferred_.Promise(); }

  void Execute() override {
    try {
      socket_ = connect_socket(address_, kConnectTimeoutMs);
    } catch (const Error& error) {
      code_ = error.code();
      SetError(error.what());
    }
  }

  void OnOK() override {
    const auto events = JsEvents::create(Env(), handlers_.Value(), Napi::Function());
    const auto channel = std::make_shared<Channel>(std::move(socket_), address_.is_unix(), events);
    const Napi::Object object = events->adopt(Env(), channel);
    channel->start();
    deferred_.Resolve(object);
  }

  void OnError(const Napi::Error& error) override { deferred_.Reject(to_js_error(Env(), Error(code_, error.Message())).Value()); }

 private:
  Napi::Promise::Deferred deferred_;
  const SocketAddress address_;
  Napi::ObjectReference handlers_;
  UniqueFd socket_;
  std::string code_ = "IO_FAILED";
};

Napi::Value connect_channel(const Napi::CallbackInfo& info) {
  try {
    auto* worker = new ConnectWorker(info.Env(), parse_address(info[0]), check_handlers(info[1]));
    worker->Queue();
    return worker->promise();
  } catch (const Error& error) {
    throw to_js_error(info.Env(), error);
  }
}

}  // namespace

std::shared_ptr<Channel> channel_of(const Napi::Value& value) {
  if (value.IsObject()) {
    const Napi::Value held = value.As<Napi::Object>().Get(kChannelKey);
    if (held.IsExternal() && held.As<Napi::External<ChannelPointer>>().CheckTypeTag(&kChannelTag)) return *held.As<Napi::External<ChannelPointer>>().Data();
  }
  refuse("channel", "a Channel");
}

void export_channel(Napi::Env env, Napi::Object exports) {
  exports.Set("listenChannel", Napi::Function::New(env, listen_channel, "listenChannel"));
  exports.Set("connectChannel", Napi::Function::New(env, connect_channel, "connectChannel"));
}

}  // namespace tpla::addon
