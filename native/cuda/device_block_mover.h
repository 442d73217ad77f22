// Blocks of KV between GPU memory and files. Plain C++: no CUDA header.
#pragma once

#include <memory>

#include "storage/block_mover.h"
#include "storage/cufile.h"

namespace tpla::cuda {

// Pages of GPU `device` through two pinned host buffers: one is copied while the other is on its way to or from the disk.
std::unique_ptr<BlockMover> make_staged_mover(int device, std::unique_ptr<FileIo> io);

// The same through two buffers in the GPU's memory that cuFile moves. Pages are gathered there since an arena of VMM memory cannot be registered as
// a whole (BAR space is scarce) and its pages need not begin where a disk's blocks do; the copy within the GPU takes a hundredth of a disk's time.
std::unique_ptr<BlockMover> make_cufile_mover(int device, std::shared_ptr<const CuFileHandle> handle);

}  // namespace tpla::cuda
