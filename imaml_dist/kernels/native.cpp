// Convolution and batch normalisation of T tasks, each under parameters of its own, differentiable as often as an implicit
// meta-gradient needs, for CPUs: what Python sees of them.
//
// Every task is computed as if it were alone, and sums over samples are taken in one order: results do not depend on T.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include "batch_norm.h"
#include "convolution.h"

namespace imaml {

// Under vmap the axis that is mapped over is the axis of tasks.

struct Mapped {
  int64_t level = -1, tasks = 0;
  c10::impl::ExcludeDispatchKeyGuard below{c10::DispatchKey::FuncTorchBatched};

  explicit Mapped(std::initializer_list<Tensor> given) {
    for (const Tensor& x : given)
      if (const auto* mapped = at::functorch::maybeGetBatchedImpl(x); mapped && mapped->level() > level) {
        level = mapped->level();
        tasks = mapped->value().size(mapped->bdim());
      }
  }
  Tensor in_front(const Tensor& x) const {
    const auto* mapped = at::functorch::maybeGetBatchedImpl(x);
    if (mapped && mapped->level() == level)
      return mapped->bdim() == 0 ? mapped->value() : mapped->value().movedim(mapped->bdim(), 0);
    std::vector<int64_t> sizes{tasks};
    sizes.insert(sizes.end(), x.sizes().begin(), x.sizes().end());
    return x.expand(sizes);
  }
  Tensor back(const Tensor& x) const { return at::functorch::makeBatched(x, 0, level); }
};

Tensor conv2d_mapped(const Tensor& x, const Tensor& k, const std::optional<Tensor>& bias, int64_t stride,
                     int64_t padding) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("imaml::conv2d", "").typed<decltype(conv2d)>();
  const Mapped map({x, k, bias.value_or(x)});
  const auto b = bias ? std::optional<Tensor>(map.in_front(*bias)) : std::nullopt;
  return map.back(op.call(map.in_front(x), map.in_front(k), b, stride, padding));
}

Tensor batch_norm_mapped(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                         std::string_view activation, double sharpness) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("imaml::batch_norm", "").typed<decltype(batch_norm)>();
  const Mapped map({x, gamma, beta});
  return map.back(op.call(map.in_front(x), map.in_front(gamma), map.in_front(beta), eps, activation, sharpness));
}

}  // namespace imaml

TORCH_LIBRARY(imaml, m) {
  m.def("conv2d(Tensor x, Tensor kernel, Tensor? bias, int stride, int padding) -> Tensor", &imaml::conv2d);
  m.def("batch_norm(Tensor x, Tensor gamma, Tensor beta, float eps, str activation, float sharpness) -> Tensor",
        &imaml::batch_norm);
  m.def("flops() -> int", []() -> int64_t { return imaml::flops; });
}

TORCH_LIBRARY_IMPL(imaml, FuncTorchBatched, m) {
  m.impl("conv2d", &imaml::conv2d_mapped);
  m.impl("batch_norm", &imaml::batch_norm_mapped);
}
