#include "reparam/compute.h"

namespace tpla::reparam {

Tensor Compute::upload(const HostMatrix& from) {
  Tensor to = allocate(from.rows, from.cols);
  upload(from.values.data(), from.cols, to);
  return to;
}

HostMatrix Compute::download(const View& from) {
  HostMatrix to(from.rows, from.cols);
  download(from, to.values.data(), to.cols);
  return to;
}

}  // namespace tpla::reparam
