// Loaded before libc (LD_PRELOAD), for tests: zero-copy completions reach the process out of order, as the kernel may report them and loopback
// never does. They are kept until the sender has asked in vain for a while, that is, waits for them with all its buffers. Then they are told,
// latest first, but for the first one, which is told last of all: alone the next time, where the sender still waits, else after later ones.
// Says at the end how often an earlier one came after a later one.
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <dlfcn.h>
#include <linux/errqueue.h>
#include <map>
#include <mutex>
#include <netinet/in.h>
#include <sys/socket.h>
#include <utility>

namespace {

struct Report {
  uint32_t low;
  uint32_t high;
  uint8_t code;
};

struct Queue {
  // As the kernel told them.
  std::deque<Report> kept;
  // Told from the front.
  std::deque<Report> ready;
  bool has_first = false;
  Report first;
  int questions = 0;
};

// Never destroyed: threads may still ask while the process ends.
std::mutex& mutex = *new std::mutex;
std::map<int, Queue>& queues = *new std::map<int, Queue>;
int reordered = 0;

constexpr int kPatience = 8;

struct AtEnd {
  ~AtEnd() { std::fprintf(stderr, "completions out of order: %d\n", reordered); }
} at_end;

using Receive = ssize_t (*)(int, msghdr*, int);

ssize_t receive(int socket, msghdr* message, int flags) {
  static const auto real = reinterpret_cast<Receive>(dlsym(RTLD_NEXT, "recvmsg"));
  return real(socket, message, flags);
}

bool read_report(int socket, Report& report) {
  alignas(cmsghdr) char control[128];
  msghdr message{};
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (receive(socket, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) return false;
  sock_extended_err error{};
  std::memcpy(&error, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(error));
  report = {error.ee_info, error.ee_data, error.ee_code};
  return true;
}

void release(Queue& queue) {
  queue.questions = 0;
  const bool had_first = std::exchange(queue.has_first, false);
  if (!had_first && !queue.kept.empty()) {
    Report& oldest = queue.kept.front();
    queue.has_first = true;
    queue.first = {oldest.low, oldest.low, oldest.code};
    if (oldest.low == oldest.high) queue.kept.pop_front();
    else oldest.low++;
  }
  queue.ready.assign(queue.kept.rbegin(), queue.kept.rend());
  queue.kept.clear();
  if (!had_first) return;
  queue.ready.push_back(queue.first);
  reordered++;
}

void tell(const Report& report, msghdr* message) {
  auto* part = static_cast<cmsghdr*>(message->msg_control);
  part->cmsg_level = SOL_IP;
  part->cmsg_type = IP_RECVERR;
  part->cmsg_len = CMSG_LEN(sizeof(sock_extended_err));
  sock_extended_err error{};
  error.ee_origin = SO_EE_ORIGIN_ZEROCOPY;
  error.ee_info = report.low;
  error.ee_data = report.high;
  error.ee_code = report.code;
  std::memcpy(CMSG_DATA(part), &error, sizeof(error));
  message->msg_controllen = CMSG_SPACE(sizeof(error));
}

}  // namespace

extern "C" ssize_t recvmsg(int socket, msghdr* message, int flags) {
  if ((flags & MSG_ERRQUEUE) == 0) return receive(socket, message, flags);
  const std::lock_guard lock(mutex);
  Queue& queue = queues[socket];
  for (Report report; read_report(socket, report);) queue.kept.push_back(report);
  if (queue.ready.empty() && ++queue.questions > kPatience) release(queue);
  if (queue.ready.empty()) {
    errno = EAGAIN;
    return -1;
  }
  tell(queue.ready.front(), message);
  queue.ready.pop_front();
  return 0;
}
