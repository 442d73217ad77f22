#pragma once

#include "bench/attention_shape.h"

namespace tpla::bench {

// Of the current device: a large device-to-device copy, and the dense bf16 matrix rate: a product of 8192 × 8192 × 8192 random numbers by
// cuBLASLt where that library is found, otherwise matrix instructions over operands that stay on chip.
Rates gpu_rates();

}  // namespace tpla::bench
