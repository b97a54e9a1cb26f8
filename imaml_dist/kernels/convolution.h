// Convolutions of T tasks, each with a kernel of its own: three contractions of one trilinear form, whose derivatives are each
// other.

#pragma once

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "gathered.h"
#include "tensors.h"

namespace imaml {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

// A convolution with a square stride and padding: sizes of its input [n, h, w, c], kernel [o, c, kh, kw], output [n, oh, ow, o].
struct Shape {
  int64_t tasks, n, h, w, c, o, kh, kw, oh, ow, stride, padding;
  int64_t taps() const { return kh * kw; }
  int64_t patch() const { return taps() * c; }
  int64_t positions() const { return oh * ow; }
  int64_t image() const { return h * w * c; }
  int64_t outputs() const { return positions() * o; }
  int64_t kernel() const { return o * patch(); }
  bool small() const { return patch() <= 32; }
  // Images whose patches are held at once: few enough for a cache, and a function of the shape alone.
  int64_t block() const { return std::max<int64_t>(1, std::min(n, (16384 / patch()) / positions())); }
};

Shape shape_of(const Tensor& x, at::IntArrayRef kernel, int64_t stride, int64_t padding) {
  Shape s{x.size(0), x.size(1), x.size(3), x.size(4), x.size(2), kernel[1], kernel[3], kernel[4], 0, 0, stride, padding};
  s.oh = (s.h + 2 * padding - s.kh) / stride + 1;
  s.ow = (s.w + 2 * padding - s.kw) / stride + 1;
  return s;
}

// For every place of the output the places that the kernel lies on: what the value and the kernel's derivative gather.
inline Gather places_under_kernel(const Shape& s) {
  Gather g;
  for (int64_t tap = 0; tap < s.taps(); ++tap) g.taps.push_back(tap);
  for (int64_t i = 0; i < s.oh; ++i)
    for (int64_t j = 0; j < s.ow; ++j) {
      g.to.push_back((i * s.ow + j) * s.o);
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t y = i * s.stride + tap / s.kw - s.padding, x = j * s.stride + tap % s.kw - s.padding;
        g.from.push_back(y < 0 || y >= s.h || x < 0 || x >= s.w ? -1 : (y * s.w + x) * s.c);
      }
    }
  return g;
}

// For every place of the input the places of the output that it has a part in: what the input's derivative gathers. Places with
// the same remainder by the stride meet the same taps, and are computed together.
inline std::vector<Gather> places_over_input(const Shape& s) {
  std::vector<Gather> all;
  for (int64_t a = 0; a < std::min(s.stride, s.h); ++a)
    for (int64_t b = 0; b < std::min(s.stride, s.w); ++b) {
      Gather g;
      for (int64_t tap = 0; tap < s.taps(); ++tap)
        if ((a + s.padding - tap / s.kw) % s.stride == 0 && (b + s.padding - tap % s.kw) % s.stride == 0) g.taps.push_back(tap);
      for (int64_t y = a; y < s.h; y += s.stride)
        for (int64_t x = b; x < s.w; x += s.stride) {
          g.to.push_back((y * s.w + x) * s.c);
          for (const int64_t tap : g.taps) {
            const int64_t i = y + s.padding - tap / s.kw, j = x + s.padding - tap % s.kw;
            const bool there = i >= 0 && i < s.oh * s.stride && j >= 0 && j < s.ow * s.stride;
            g.from.push_back(there ? (i / s.stride * s.ow + j / s.stride) * s.o : -1);
          }
        }
      all.push_back(std::move(g));
    }
  return all;
}

// Where a place has a few channels only, as in a grey image, its values are too few to be fetched one place at a time: all that a
// row gathers is copied together, and gathered in one piece.
template <typename T>
struct Patches {
  const Shape& s;
  Gather rows;  // of patches
  std::vector<int32_t> from;
  std::vector<T> padded, patches;

  Patches(const Shape& s, const Gather& g) : s(s) {
    if (!s.small()) return;
    padded.resize(s.image() + 1), patches.resize(s.block() * s.positions() * s.patch());
    rows = {g.to, {0}, {}};
    for (int64_t r = 0; r < g.rows(); ++r) rows.from.push_back(r * s.patch());
    TORCH_CHECK(s.image() <= INT32_MAX, "conv2d got images of ", s.image(), " values and a kernel of ", s.patch(),
                "; those for kernels of up to 32 values may have ", INT32_MAX, ", so use smaller images or execution vmap");
    for (const int64_t place : g.from)
      for (int64_t k = 0; k < s.c; ++k) from.push_back(place < 0 ? s.image() : place + k);
  }
  int64_t size() const { return s.positions() * s.patch(); }
  const T* of(const T* image, int64_t images) {
    T* out = patches.data();
    for (int64_t m = 0; m < images; ++m, image += s.image(), out += size()) {
      std::copy_n(image, s.image(), padded.data());  // and a zero behind it
      at::parallel_for(0, from.size(), WORTH_A_THREAD / 16,
                       [out, from = from.data(), padded = padded.data()](int64_t begin, int64_t end) {
                         for (int64_t k = begin; k < end; ++k) out[k] = padded[from[k]];
                       });
    }
    return patches.data();
  }
};

// Where the values [c, taps] of a kernel lie among [taps, c].
inline std::vector<int64_t> taps_first(const Shape& s) {
  std::vector<int64_t> rows;
  for (int64_t c = 0; c < s.c; ++c)
    for (int64_t tap = 0; tap < s.taps(); ++tap) rows.push_back(tap * s.c + c);
  return rows;
}

// A kernel [o, c, taps] with its outputs last, [taps c, padded o], at rows as above.
template <typename T>
void outputs_last(const Shape& s, const std::vector<int64_t>& rows, const T* k, Panels<T>& out) {
  for (int64_t first = 0; first < s.o; first += PANEL<T>)
    transpose<T>(
        std::min(PANEL<T>, s.o - first), s.patch(), [k = k + first * s.patch(), n = s.patch()](int64_t o) { return k + o * n; },
        [at = rows.data(), to = out.at(0, first), n = out.columns(first)](int64_t q) { return to + at[q] * n; });
}
template <typename T>
void outputs_first(const Shape& s, const std::vector<int64_t>& rows, Panels<T>& from, T* k) {
  for (int64_t first = 0; first < s.o; first += PANEL<T>)
    transpose<T>(
        s.patch(), std::min(PANEL<T>, s.o - first),
        [at = rows.data(), of = from.at(0, first), n = from.columns(first)](int64_t q) { return of + at[q] * n; },
        [k = k + first * s.patch(), n = s.patch()](int64_t o) { return k + o * n; });
}
// With its inputs last, [taps o, padded c].
template <typename T>
void inputs_last(const Shape& s, const T* k, Panels<T>& out) {
  for (int64_t o = 0; o < s.o; ++o, k += s.patch())
    for (int64_t first = 0; first < s.c; first += PANEL<T>)
      transpose<T>(
          std::min(PANEL<T>, s.c - first), s.taps(), [k = k + first * s.taps(), n = s.taps()](int64_t c) { return k + c * n; },
          [to = out.at(o, first), n = s.o * out.columns(first)](int64_t tap) { return to + tap * n; });
}

// Floating point operations of all contractions so far, an addition and a multiplication as two.
inline std::atomic<int64_t> flops{0};
inline void count(const Shape& s) { flops += 2 * s.tasks * s.n * s.positions() * s.kernel(); }

// The three contractions of the trilinear form <g, conv(x, k)>: with (x, k), with (g, k) and with (x, g).

Tensor contract_output(const Tensor& x_, const Tensor& k_, const std::optional<Tensor>& bias_, int64_t stride,
                       int64_t padding) {
  const Shape s = shape_of(x_, k_.sizes(), stride, padding);
  count(s);
  const Tensor x = channels_last(x_), k = rows_apart(k_), bias = bias_ ? rows_apart(*bias_) : Tensor();
  Tensor y = empty_images(s.tasks, s.n, s.o, s.oh, s.ow, x);
  const Gather places = places_under_kernel(s);
  const std::vector<int64_t> rows = taps_first(s);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "contract_output", [&] {
    over_tasks(s.tasks, [&](int64_t begin, int64_t end) {
      Panels<scalar_t> matrix(s.patch(), s.o);
      Buffer<scalar_t> start(padded<scalar_t>(s.o));
      Patches<scalar_t> small(s, places);
      for (int64_t t = begin; t < end; ++t) {
        outputs_last(s, rows, k.const_data_ptr<scalar_t>() + t * k.stride(0), matrix);
        if (bias.defined()) std::copy_n(bias.const_data_ptr<scalar_t>() + t * bias.stride(0), s.o, start.data());
        const scalar_t *image = x.const_data_ptr<scalar_t>() + t * s.n * s.image(), *from = bias.defined() ? start.data() : nullptr;
        scalar_t* out = y.data_ptr<scalar_t>() + t * s.n * s.outputs();
        if (!s.small()) {
          gathered_product(places, s.n, image, s.image(), s.c, matrix, from, out, s.outputs(), s.o);
          continue;
        }
        for (int64_t m = 0; m < s.n; m += s.block()) {
          const int64_t images = std::min(s.block(), s.n - m);
          gathered_product(small.rows, images, small.of(image + m * s.image(), images), small.size(), s.patch(), matrix,
                           from, out + m * s.outputs(), s.outputs(), s.o);
        }
      }
    });
  });
  return y;
}

Tensor contract_input(const Tensor& g_, const Tensor& k_, int64_t h, int64_t w, int64_t stride, int64_t padding) {
  Tensor x = empty_images(g_.size(0), g_.size(1), k_.size(2), h, w, g_);
  const Shape s = shape_of(x, k_.sizes(), stride, padding);
  count(s);
  const Tensor g = channels_last(g_), k = rows_apart(k_);
  const std::vector<Gather> all = places_over_input(s);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "contract_input", [&] {
    over_tasks(s.tasks, [&](int64_t begin, int64_t end) {
      Panels<scalar_t> matrix(s.taps() * s.o, s.c);
      for (int64_t t = begin; t < end; ++t) {
        inputs_last(s, k.const_data_ptr<scalar_t>() + t * k.stride(0), matrix);
        for (const Gather& places : all)
          gathered_product<scalar_t>(places, s.n, g.const_data_ptr<scalar_t>() + t * s.n * s.outputs(), s.outputs(), s.o,
                                     matrix, nullptr, x.data_ptr<scalar_t>() + t * s.n * s.image(), s.image(), s.c);
      }
    });
  });
  return x;
}

Tensor contract_kernel(const Tensor& x_, const Tensor& g_, int64_t kh, int64_t kw, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x_, {x_.size(0), g_.size(2), x_.size(2), kh, kw}, stride, padding);
  count(s);
  const Tensor x = channels_last(x_);
  Tensor k = at::empty({s.tasks, s.o, s.c, kh, kw}, x.options());
  const Gather places = places_under_kernel(s);
  const std::vector<int64_t> rows = taps_first(s);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "contract_kernel", [&] {
    const int64_t width = padded<scalar_t>(s.o);
    const Tensor images = channels_last(g_), g = width == s.o ? images : at::constant_pad_nd(images, {0, width - s.o});
    over_tasks(s.tasks, [&](int64_t begin, int64_t end) {
      Panels<scalar_t> matrix(s.patch(), s.o);
      Patches<scalar_t> small(s, places);
      for (int64_t t = begin; t < end; ++t) {
        std::fill_n(matrix.memory.data(), matrix.memory.size, scalar_t(0));
        const scalar_t *image = x.const_data_ptr<scalar_t>() + t * s.n * s.image(),
                       *in = g.const_data_ptr<scalar_t>() + t * s.n * s.positions() * width;
        if (!s.small()) gathered_outer(places, s.n, image, s.image(), s.c, in, matrix, s.o);
        for (int64_t m = 0; s.small() && m < s.n; m += s.block()) {
          const int64_t images = std::min(s.block(), s.n - m);
          gathered_outer(small.rows, images, small.of(image + m * s.image(), images), small.size(), s.patch(),
                         in + m * s.positions() * width, matrix, s.o);
        }
        outputs_first(s, rows, matrix, k.data_ptr<scalar_t>() + t * s.kernel());
      }
    });
  });
  return k;
}

// Their derivatives are each other, so that they can be differentiated without end.

Tensor input(const Tensor& g, const Tensor& k, int64_t h, int64_t w, int64_t stride, int64_t padding);
Tensor kernel(const Tensor& x, const Tensor& g, int64_t kh, int64_t kw, int64_t stride, int64_t padding);

struct Output : Function<Output> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& k, const std::optional<Tensor>& bias,
                        int64_t stride, int64_t padding) {
    ctx->save_for_backward({x, k});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["s"] = stride;
    ctx->saved_data["p"] = padding;
    return contract_output(x, k, bias, stride, padding);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &k = saved[1], &g = grads[0];
    const int64_t s = ctx->saved_data["s"].toInt(), p = ctx->saved_data["p"].toInt();
    return {ctx->needs_input_grad(0) ? input(g, k, x.size(3), x.size(4), s, p) : Tensor(),
            ctx->needs_input_grad(1) ? kernel(x, g, k.size(3), k.size(4), s, p) : Tensor(),
            ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2) ? g.sum({1, 3, 4}) : Tensor(), Tensor(), Tensor()};
  }
};

struct Input : Function<Input> {
  static Tensor forward(AutogradContext* ctx, const Tensor& g, const Tensor& k, int64_t h, int64_t w, int64_t stride,
                        int64_t padding) {
    ctx->save_for_backward({g, k});
    ctx->saved_data["s"] = stride;
    ctx->saved_data["p"] = padding;
    return contract_input(g, k, h, w, stride, padding);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &k = saved[1], &x = grads[0];
    const int64_t s = ctx->saved_data["s"].toInt(), p = ctx->saved_data["p"].toInt();
    return {ctx->needs_input_grad(0) ? Output::apply(x, k, std::nullopt, s, p) : Tensor(),
            ctx->needs_input_grad(1) ? kernel(x, g, k.size(3), k.size(4), s, p) : Tensor(), Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
};

struct Kernel : Function<Kernel> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& g, int64_t kh, int64_t kw, int64_t stride,
                        int64_t padding) {
    ctx->save_for_backward({x, g});
    ctx->saved_data["s"] = stride;
    ctx->saved_data["p"] = padding;
    return contract_kernel(x, g, kh, kw, stride, padding);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &g = saved[1], &k = grads[0];
    const int64_t s = ctx->saved_data["s"].toInt(), p = ctx->saved_data["p"].toInt();
    return {ctx->needs_input_grad(0) ? input(g, k, x.size(3), x.size(4), s, p) : Tensor(),
            ctx->needs_input_grad(1) ? Output::apply(x, k, std::nullopt, s, p) : Tensor(), Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
};

Tensor input(const Tensor& g, const Tensor& k, int64_t h, int64_t w, int64_t stride, int64_t padding) {
  return Input::apply(g, k, h, w, stride, padding);
}
Tensor kernel(const Tensor& x, const Tensor& g, int64_t kh, int64_t kw, int64_t stride, int64_t padding) {
  return Kernel::apply(x, g, kh, kw, stride, padding);
}

// What Python calls: with an axis of tasks, or for one task without it.

Tensor conv2d(const Tensor& x, const Tensor& k, const std::optional<Tensor>& bias, int64_t stride, int64_t padding) {
  if (x.dim() == 4) {
    const auto one = bias ? std::optional<Tensor>(bias->unsqueeze(0)) : std::nullopt;
    return conv2d(x.unsqueeze(0), k.unsqueeze(0), one, stride, padding).squeeze(0);
  }
  TORCH_CHECK(x.dim() == 5 && k.dim() == 5 && x.size(0) == k.size(0) && x.size(2) == k.size(2),
              "conv2d takes [T, n, c, h, w] and kernels [T, o, c, kh, kw], got ", x.sizes(), " and ", k.sizes());
  TORCH_CHECK(x.size(2) > 0 && k.size(3) > 0 && k.size(4) > 0, "conv2d got no channels or an empty kernel: ", k.sizes());
  TORCH_CHECK(!bias || bias->sizes() == at::IntArrayRef({k.size(0), k.size(1)}), "conv2d takes a bias [T, o]");
  TORCH_CHECK(stride > 0 && padding >= 0 && x.size(3) + 2 * padding >= k.size(3) && x.size(4) + 2 * padding >= k.size(4),
              "conv2d got images smaller than its kernel: ", x.sizes(), " and ", k.sizes());
  return Output::apply(x, k, bias, stride, padding);
}

}  // namespace imaml
