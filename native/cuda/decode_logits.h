// Logit variants on the host: validation, and what the kernels are launched with.
#pragma once

#include "attention.h"
#include "mla_decode_args.h"

namespace tpla::cuda {

// Throws AttentionError; `kernel` begins the message.
void validate_variants(const LogitVariants& variants, const char* kernel);

LogitArgs logit_args(const LogitVariants& variants, float softmax_scale);

// Tokens that lie together whatever the page size and the mask: the unit of loading.
int box_tokens(const LogitVariants& variants, int page_size);

}  // namespace tpla::cuda
