// Batch normalisation and the activation behind it as a function that torch differentiates twice: what its graph keeps, and which
// pass of `normalisation.h` answers for which derivative.

#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string_view>
#include <vector>

#include "normalisation.h"

namespace imaml {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

inline Tensor rows_of(const Tensor& x) { return channels_last(x).flatten(1, 3); }
inline Rows shape_of_rows(const Tensor& rows) { return {rows.size(0), rows.size(1), rows.size(2)}; }

// Rows [T, R, C] as images like `like`.
inline Tensor images_of(const Tensor& rows, const Tensor& like) {
  return rows.reshape({like.size(0), like.size(1), like.size(3), like.size(4), like.size(2)}).permute({0, 1, 4, 2, 3});
}

// The activation, made again from what a graph can keep of it.
template <typename A>
A activation(double beta) {
  if constexpr (std::is_constructible_v<A, double>)
    return A(beta);
  else
    return A();
}

template <typename A>
struct NormBackward : Function<NormBackward<A>> {
  static tensor_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Tensor& gamma,
                             const Tensor& beta, const Tensor& mean, const Tensor& r, double sharpness) {
    ctx->save_for_backward({g, x, gamma, beta, mean, r});
    ctx->saved_data["sharpness"] = sharpness;
    const Tensor rows = rows_of(x);
    const Affine affine{rows_apart(gamma), rows_apart(beta), mean, r};
    auto [dx, dgamma, dbeta] = derivative(shape_of_rows(rows), activation<A>(sharpness), rows_of(g), rows, affine);
    return {images_of(dx, x), dgamma, dbeta};
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),  // create_graph=True: the result would be taken for a constant
                "this batch normalisation has no third derivative; use execution vmap or loop");
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], rows = rows_of(x);
    const Affine affine{rows_apart(saved[2]), rows_apart(saved[3]), saved[4], saved[5]};
    auto [dg, dx, dgamma, dbeta] = second_derivative(
        shape_of_rows(rows), activation<A>(ctx->saved_data["sharpness"].toDouble()), rows_of(grads[0]),
        rows_apart(grads[1]), rows_apart(grads[2]), rows_of(g), rows, affine);
    return {images_of(dg, x), images_of(dx, x), dgamma, dbeta, Tensor(), Tensor(), Tensor()};
  }
};

template <typename A>
struct Norm : Function<Norm<A>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                        double sharpness) {
    const Tensor rows = rows_of(x);
    const Rows s = shape_of_rows(rows);
    const auto [mean, r] = statistics(s, rows, eps);
    ctx->save_for_backward({x, gamma, beta, mean, r});
    ctx->saved_data["sharpness"] = sharpness;
    const Tensor y = empty_images(x.size(0), x.size(1), x.size(2), x.size(3), x.size(4), x);
    return normalised(s, activation<A>(sharpness), rows, {rows_apart(gamma), rows_apart(beta), mean, r}, y);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto found = NormBackward<A>::apply(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                        ctx->saved_data["sharpness"].toDouble());
    return {found[0], found[1], found[2], Tensor(), Tensor()};
  }
};

// `activation` is one of those below; `sharpness` is softplus's beta.
inline Tensor batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, std::string_view activation,
                         double sharpness) {
  if (x.dim() == 4)
    return batch_norm(x.unsqueeze(0), gamma.unsqueeze(0), beta.unsqueeze(0), eps, activation, sharpness).squeeze(0);
  const std::vector<int64_t> channels{x.size(0), x.size(2)};
  TORCH_CHECK(x.dim() == 5 && gamma.sizes().vec() == channels && beta.sizes().vec() == channels,
              "batch_norm takes [T, n, c, h, w] and [T, c], got ", x.sizes(), ", ", gamma.sizes(), ", ", beta.sizes());
  if (activation == "identity") return Norm<Identity>::apply(x, gamma, beta, eps, sharpness);
  if (activation == "relu") return Norm<ReLU>::apply(x, gamma, beta, eps, sharpness);
  if (activation == "silu") return Norm<SiLU>::apply(x, gamma, beta, eps, sharpness);
  if (activation == "gelu") return Norm<GELU>::apply(x, gamma, beta, eps, sharpness);
  if (activation == "softplus") return Norm<Softplus>::apply(x, gamma, beta, eps, sharpness);
  TORCH_CHECK(false, "batch_norm has no activation ", activation);
}

}  // namespace imaml
