#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "core/error.h"
#include "transfer/kv_put.h"
#include "transfer/task_queue.h"

namespace tpla::addon {

// kv_checksum in turn with what else `queue` has, or on the GPU that holds the region. `done` is called once, on another thread, or before this returns where it fails.
using ChecksumDone = std::function<void(std::vector<uint64_t> checksums, std::unique_ptr<Error> error)>;
void start_checksum(TaskQueue& queue, std::shared_ptr<const KvRegion> region, PageTables pages, Range layers, Range tokens, ChecksumDone done);

}  // namespace tpla::addon
