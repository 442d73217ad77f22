#pragma once
#include <memory>

#include "reparam/compute.h"

namespace tpla::cuda {

// Layer fits on one GPU: products by cuBLASLt where it is installed and by a kernel of our own where it is not, fp32 arithmetic either way;
// linear systems in fp64. For one fit at a time. Throws GPU_UNAVAILABLE where the device cannot be used.
// One per device and process, made on first use. `with_library` false leaves cuBLASLt out, for tests.
std::shared_ptr<reparam::Compute> make_reparam_compute(int device, bool with_library = true);

}  // namespace tpla::cuda
