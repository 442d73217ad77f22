// What the prefill kernels share with the code that launches them.
#pragma once

#include "attention.h"
#include "device.h"
#include "mla_prefill_schedule.cuh"

namespace tpla::cuda {

// Throws AttentionError for what no prefill kernel takes; `who` begins the message.
void validate_prefill(const MlaPrefill& call, const char* who);
PrefillArgs prefill_args(const MlaPrefill& call);

struct PrefillTensorMaps {
  CUtensorMap q, k, k_rope, v;
};
PrefillTensorMaps sm90_prefill_maps(const MlaPrefill& call, const PrefillArgs& args);

void launch_sm90_prefill(const MlaPrefill& call, PrefillArgs args, Stream stream);
void launch_sm80_prefill(const PrefillArgs& args, Stream stream);

}  // namespace tpla::cuda
