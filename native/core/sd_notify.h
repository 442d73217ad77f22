#pragma once
#include <string>

namespace tpla {

// Sends `state` ("READY=1\nSTATUS=...") to the service manager's datagram socket, as sd_notify(3) does: `socket` is the value of
// NOTIFY_SOCKET, a path or an abstract name beginning with '@'. Throws IO_FAILED.
void sd_notify(const std::string& socket, const std::string& state);

}  // namespace tpla
