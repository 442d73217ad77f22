#pragma once
#include <memory>

#include "transfer/messages/device_port.h"

namespace tpla::cuda {

// Of this process.
std::shared_ptr<DevicePort> device_port();

}  // namespace tpla::cuda
