// Logit variants of a decode problem on the device: what the kernels are given, and the rule the reference follows.
#pragma once

#include "bench/logit_rule.h"
#include "bench/page_tables.h"
#include "cuda/attention.h"
#include "cuda/bench/gpu.h"

namespace tpla::bench {

class GpuVariants {
 public:
  GpuVariants(const LogitVariantShape& shape, const std::vector<int32_t>& q_lens, const std::vector<int32_t>& kv_lens, int heads)
      : shape_(shape),
        q_lens_(q_lens),
        kv_lens_(kv_lens),
        visible_stride_(visible_stride(shape, kv_lens)),
        host_visible_(visible_blocks(shape, visible_stride_)),
        host_slopes_(shape.alibi ? alibi_slopes(heads) : std::vector<float>{}),
        slopes_(host_slopes_),
        visible_(host_visible_) {
    if (shape.mask_block == 0) return;
    for (const auto& list : shape.blocks) list_stride_ = std::max(list_stride_, list.size());
    std::vector<int32_t> lists(list_stride_ * shape.blocks.size(), -1), counts;
    for (size_t s = 0; s < shape.blocks.size(); ++s) {
      std::copy(shape.blocks[s].begin(), shape.blocks[s].end(), lists.begin() + static_cast<std::ptrdiff_t>(s * list_stride_));
      counts.push_back(static_cast<int32_t>(shape.blocks[s].size()));
    }
    lists_ = DeviceBuffer<int32_t>(lists);
    counts_ = DeviceBuffer<int32_t>(counts);
  }

  cuda::LogitVariants call() const {
    cuda::LogitVariants call = describe(shape_);
    if (shape_.alibi) call.alibi_slopes = slopes_.data();
    if (shape_.mask_block > 0) {
      call.block_list = lists_.data();
      call.block_counts = counts_.data();
      call.block_list_stride = static_cast<int>(list_stride_);
    }
    return call;
  }

  // Enough for the kernels to say whether they take the shape; the pointers are not to be followed.
  static cuda::LogitVariants describe(const LogitVariantShape& shape) {
    static const float kSlope = 0;
    static const int32_t kBlock = 0;
    cuda::LogitVariants call;
    call.softcap = shape.softcap;
    call.window = shape.window;
    if (shape.alibi) call.alibi_slopes = &kSlope;
    if (shape.mask_block > 0) call.block_list = call.block_counts = &kBlock;
    call.mask_block = shape.mask_block;
    return call;
  }

  LogitRule device_rule() const { return rule(slopes_.data(), visible_.data()); }
  LogitRule host_rule() const { return rule(host_slopes_.data(), host_visible_.data()); }

  // Whether any query of the sequence may see the token.
  bool present(int sequence, int t) const {
    const size_t s = static_cast<size_t>(sequence);
    return host_rule().present(sequence, kv_lens_[s] - q_lens_[s], t);
  }

  // Pages that no query sees point nowhere.
  PageTables draw_tables(int page_tokens, int sets, uint64_t seed) const {
    PageTables tables = draw_page_tables(kv_lens_, page_tokens, sets, seed);
    tables.drop_pages(kv_lens_, page_tokens, [&](int sequence, int t) { return present(sequence, t); });
    return tables;
  }

 private:
  LogitRule rule(const float* slopes, const uint8_t* visible) const {
    return {shape_.softcap, shape_.window, shape_.alibi ? slopes : nullptr, shape_.mask_block, visible, visible_stride_};
  }

  const LogitVariantShape shape_;
  const std::vector<int32_t> q_lens_, kv_lens_;
  const int64_t visible_stride_;
  const std::vector<uint8_t> host_visible_;
  const std::vector<float> host_slopes_;
  DeviceBuffer<float> slopes_;
  DeviceBuffer<uint8_t> visible_;
  size_t list_stride_ = 0;
  DeviceBuffer<int32_t> lists_, counts_;
};

}  // namespace tpla::bench
