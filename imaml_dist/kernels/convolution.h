// Convolutions of T tasks, each with a kernel of its own: three contractions of one trilinear form, whose derivatives are each
// other.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "registers.h"
#include "tensors.h"

extern "C" {  // BLAS, from the libraries that torch brings
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace imaml {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

// c [m, n] = beta c + a b, all in rows; a is [m, k] ([k, m] if ta), b is [k, n] ([n, k] if tb).
inline void matmul(bool ta, bool tb, int m, int n, int k, const float* a, const float* b, float beta, float* c) {
  const float one = 1;
  const int lda = ta ? m : k, ldb = tb ? k : n;
  sgemm_(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &n);
}
inline void matmul(bool ta, bool tb, int m, int n, int k, const double* a, const double* b, double beta, double* c) {
  const double one = 1;
  const int lda = ta ? m : k, ldb = tb ? k : n;
  dgemm_(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &n);
}

// A convolution with a square stride and padding: sizes of its input [n, h, w, c], kernel [o, c, kh, kw], output [n, oh, ow, o].
struct Shape {
  int64_t tasks, n, h, w, c, o, kh, kw, oh, ow, stride, padding;
  int64_t patch() const { return kh * kw * c; }
  int64_t positions() const { return oh * ow; }
  int64_t image() const { return h * w * c; }
  int64_t kernel() const { return o * patch(); }
  bool small() const { return patch() <= 32; }
  // Images whose patches are held at once: few enough for a cache, and a function of the shape alone.
  int64_t block() const { return std::max<int64_t>(1, std::min(n, (196608 / patch()) / positions())); }
};

Shape shape_of(const Tensor& x, at::IntArrayRef kernel, int64_t stride, int64_t padding) {
  Shape s{x.size(0), x.size(1), x.size(3), x.size(4), x.size(2), kernel[1], kernel[3], kernel[4], 0, 0, stride, padding};
  s.oh = (s.h + 2 * padding - s.kh) / stride + 1;
  s.ow = (s.w + 2 * padding - s.kw) / stride + 1;
  return s;
}

// Tensors whose tasks are contiguous each, but may lie apart, as the parts of a vector of parameters do.
Tensor rows_apart(const Tensor& x) { return x[0].is_contiguous() ? x : x.contiguous(); }

// f(y, x, values, offset) for the runs of consecutive values that the patches [oh ow, kh kw c] of one image consist of: `values`
// of them from place (y, x) of the image are those from `offset` of the patches on; x = -1 where the kernel hangs over the edge.
template <typename F>
void over_runs(const Shape& s, const F& f) {
  int64_t at = 0;
  for (int64_t i = 0; i < s.oh; ++i)
    for (int64_t j = 0; j < s.ow; ++j)
      for (int64_t a = 0; a < s.kh; ++a, at += s.kw * s.c) {
        const int64_t y = i * s.stride + a - s.padding, x = j * s.stride - s.padding;
        const int64_t left = std::clamp<int64_t>(-x, 0, s.kw), right = std::clamp<int64_t>(s.w - x, left, s.kw);
        if (y < 0 || y >= s.h || left == right) {
          f(y, -1, s.kw * s.c, at);
          continue;
        }
        if (left > 0) f(y, -1, left * s.c, at);
        f(y, x + left, (right - left) * s.c, at + left * s.c);
        if (right < s.kw) f(y, -1, (s.kw - right) * s.c, at + right * s.c);
      }
}

// The patches of one image, zero where the kernel hangs over the edge.
template <typename T>
void patches_of(const Shape& s, const T* image, T* out) {
  over_runs(s, [&](int64_t y, int64_t x, int64_t values, int64_t at) {
    if (x < 0)
      std::fill_n(out + at, values, T(0));
    else
      std::copy_n(image + (y * s.w + x) * s.c, values, out + at);
  });
}

// The same for patches of a few values, where runs are too short to be worth a copy each: where in the image each value comes
// from, the place behind the image for a zero.
inline std::vector<int32_t> sources_of(const Shape& s) {
  std::vector<int32_t> from(s.small() ? s.positions() * s.patch() : 0);
  if (s.small())
    over_runs(s, [&](int64_t y, int64_t x, int64_t values, int64_t at) {
      for (int64_t k = 0; k < values; ++k) from[at + k] = x < 0 ? s.image() : (y * s.w + x) * s.c + k;
    });
  return from;
}
template <typename T>
void gather(const Shape& s, const std::vector<int32_t>& from, const T* image, T* padded, T* out) {
  std::copy_n(image, s.image(), padded);
  padded[s.image()] = 0;
  for (size_t k = 0; k < from.size(); ++k) out[k] = padded[from[k]];
}

// The patches of some images of a task, one image after the other.
template <typename T>
struct Patches {
  const Shape& s;
  const std::vector<int32_t> from = sources_of(s);

  void of(const T* images, int64_t count, T* out) const {
    std::vector<T> padded(s.small() ? s.image() + 1 : 0);
    for (int64_t m = 0; m < count; ++m, images += s.image(), out += s.positions() * s.patch())
      if (s.small())
        gather(s, from, images, padded.data(), out);
      else
        patches_of(s, images, out);
  }
};

// Its transpose: add patches to where they came from.
template <typename T>
void add_patches(const Shape& s, const T* patches, T* image) {
  over_runs(s, [&](int64_t y, int64_t x, int64_t values, int64_t at) {
    if (x < 0) return;
    T* to = image + (y * s.w + x) * s.c;
    for (int64_t k = 0; k < values; ++k) to[k] += patches[at + k];
  });
}

// With patches of a few values, as those of a grey image, BLAS spends its time on packing. out [rows, o] = bias + patches kernel,
// with the kernel [patch, o]; bias may be null.
template <typename T>
void multiply_small(const Shape& s, int64_t rows, const T* patches, const T* kernel, const T* bias, T* out) {
  over_blocks<T>(rows, s.o, [&](auto zero, int64_t begin, int64_t end, int64_t j) {
    using V = decltype(zero);
    constexpr int64_t R = 8;
    const V start = bias ? load<V>(bias + j) : zero;
    int64_t r = begin;
    for (; r + R <= end; r += R) {
      V sum[R];
      for (int64_t i = 0; i < R; ++i) sum[i] = start;
      for (int64_t p = 0; p < s.patch(); ++p) {
        const V k = load<V>(kernel + p * s.o + j);
        for (int64_t i = 0; i < R; ++i) sum[i] += patches[(r + i) * s.patch() + p] * k;
      }
      for (int64_t i = 0; i < R; ++i) store(out + (r + i) * s.o + j, sum[i]);
    }
    for (; r < end; ++r) {
      V sum = start;
      for (int64_t p = 0; p < s.patch(); ++p) sum += patches[r * s.patch() + p] * load<V>(kernel + p * s.o + j);
      store(out + r * s.o + j, sum);
    }
  });
}

// kernel [patch, o] += patches' g, with g [rows, o].
template <typename T>
void accumulate_small(const Shape& s, int64_t rows, const T* patches, const T* g, T* kernel) {
  over_blocks<T>(rows, s.o, [&](auto zero, int64_t begin, int64_t end, int64_t j) {
    using V = decltype(zero);
    constexpr int64_t P = 9;
    const auto add = [&](int64_t p, auto count) {
      V sum[count];
      for (int64_t i = 0; i < count; ++i) sum[i] = load<V>(kernel + (p + i) * s.o + j);
      for (int64_t r = begin; r < end; ++r) {
        const V gr = load<V>(g + r * s.o + j);
        for (int64_t i = 0; i < count; ++i) sum[i] += patches[r * s.patch() + p + i] * gr;
      }
      for (int64_t i = 0; i < count; ++i) store(kernel + (p + i) * s.o + j, sum[i]);
    };
    int64_t p = 0;
    for (; p + P <= s.patch(); p += P) add(p, std::integral_constant<int64_t, P>());
    for (; p < s.patch(); ++p) add(p, std::integral_constant<int64_t, 1>());
  });
}

// [o, patch] to [patch, o], or back.
template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

// [o, c, kh kw] to [o, kh kw, c], the order of patches, or back.
template <typename T>
void reorder(const Shape& s, const T* from, T* to, bool back) {
  const int64_t taps = s.kh * s.kw;
  for (int64_t o = 0; o < s.o; ++o, from += s.patch(), to += s.patch())
    for (int64_t k = 0; k < s.c; ++k)
      for (int64_t t = 0; t < taps; ++t) {
        if (back)
          to[k * taps + t] = from[t * s.c + k];
        else
          to[t * s.c + k] = from[k * taps + t];
      }
}

template <typename T, typename F>
void over_tasks(const Shape& s, const F& f) {
  at::parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> kernel(s.kernel()), turned(s.small() ? s.kernel() : 0), patches(s.block() * s.positions() * s.patch());
    for (int64_t t = begin; t < end; ++t) f(t, kernel.data(), turned.data(), patches.data());
  });
}

// With many rows in float32 and AVX-512 torch's own kernels (oneDNN) for one task are faster than a product of matrices: they are
// called task by task, in the same order of memory.
bool for_torch(const Shape& s, const Tensor& x) {
#ifdef __AVX512F__
  return x.scalar_type() == at::kFloat && s.n * s.positions() >= 1024;
#else
  return false;
#endif
}

template <typename F>
Tensor by_torch(const Shape& s, const F& f) {
  if (s.tasks == 1) return f(0).unsqueeze(0);
  std::vector<Tensor> results;
  for (int64_t t = 0; t < s.tasks; ++t) results.push_back(f(t));
  return at::stack(results);
}

// [n, c, h, w] of task t, channels last in memory.
Tensor task_of(const Tensor& x, int64_t t) { return x[t].contiguous(at::MemoryFormat::ChannelsLast); }

std::tuple<Tensor, Tensor, Tensor> torch_backward(const Shape& s, const Tensor& g, const Tensor& x, const Tensor& k,
                                                  std::array<bool, 3> wanted) {
  return at::convolution_backward(g, x, k, std::nullopt, {s.stride, s.stride}, {s.padding, s.padding}, {1, 1}, false, {0, 0},
                                  1, wanted);
}

// The three contractions of the trilinear form <g, conv(x, k)>: with (x, k), with (g, k) and with (x, g).

Tensor contract_output(const Tensor& x_, const Tensor& k_, const std::optional<Tensor>& bias_, int64_t stride,
                       int64_t padding) {
  const Shape s = shape_of(x_, k_.sizes(), stride, padding);
  if (for_torch(s, x_) && !s.small())  // of a single channel torch does not know that it is the last axis
    return by_torch(s, [&](int64_t t) {
      const auto b = bias_ ? std::optional<Tensor>((*bias_)[t]) : std::nullopt;
      return at::conv2d(task_of(x_, t), task_of(k_, t), b, {stride, stride}, {padding, padding});
    });
  const Tensor x = channels_last(x_), k = rows_apart(k_), bias = bias_ ? rows_apart(*bias_) : Tensor();
  Tensor y = empty_images(s.tasks, s.n, s.o, s.oh, s.ow, x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "contract_output", [&] {
    const Patches<scalar_t> all{s};
    over_tasks<scalar_t>(s, [&](int64_t t, scalar_t* kernel, scalar_t* turned, scalar_t* patches) {
      reorder(s, k.const_data_ptr<scalar_t>() + t * k.stride(0), kernel, false);
      if (s.small()) transpose(s.o, s.patch(), kernel, turned);
      const scalar_t* image = x.const_data_ptr<scalar_t>() + t * s.n * s.image();
      scalar_t* out = y.data_ptr<scalar_t>() + t * s.n * s.positions() * s.o;
      for (int64_t first = 0; first < s.n; first += s.block()) {
        const int64_t images = std::min(s.block(), s.n - first), rows = images * s.positions();
        all.of(image + first * s.image(), images, patches);
        const scalar_t* start = bias.defined() ? bias.const_data_ptr<scalar_t>() + t * bias.stride(0) : nullptr;
        scalar_t* at = out + first * s.positions() * s.o;
        if (s.small()) {
          multiply_small(s, rows, patches, turned, start, at);
          continue;
        }
        if (start)
          for (int64_t r = 0; r < rows; ++r) std::copy_n(start, s.o, at + r * s.o);
        matmul(false, true, rows, s.o, s.patch(), patches, kernel, scalar_t(start ? 1 : 0), at);
      }
    });
  });
  return y;
}

Tensor contract_input(const Tensor& g_, const Tensor& k_, int64_t h, int64_t w, int64_t stride, int64_t padding) {
  Tensor x = empty_images(g_.size(0), g_.size(1), k_.size(2), h, w, g_);
  const Shape s = shape_of(x, k_.sizes(), stride, padding);
  if (for_torch(s, x))
    return by_torch(s, [&](int64_t t) {
      return std::get<0>(torch_backward(s, task_of(g_, t), task_of(x, t), task_of(k_, t), {true, false, false}));
    });
  const Tensor g = channels_last(g_), k = rows_apart(k_);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "contract_input", [&] {
    over_tasks<scalar_t>(s, [&](int64_t t, scalar_t* kernel, scalar_t* turned, scalar_t* patches) {
      reorder(s, k.const_data_ptr<scalar_t>() + t * k.stride(0), kernel, false);
      const scalar_t* in = g.const_data_ptr<scalar_t>() + t * s.n * s.positions() * s.o;
      scalar_t* image = x.data_ptr<scalar_t>() + t * s.n * s.image();
      std::fill_n(image, s.n * s.image(), scalar_t(0));
      for (int64_t first = 0; first < s.n; first += s.block()) {
        const int64_t images = std::min(s.block(), s.n - first), rows = images * s.positions();
        matmul(false, false, rows, s.patch(), s.o, in + first * s.positions() * s.o, kernel, scalar_t(0), patches);
        for (int64_t m = 0; m < images; ++m)
          add_patches(s, patches + m * s.positions() * s.patch(), image + (first + m) * s.image());
      }
    });
  });
  return x;
}

Tensor contract_kernel(const Tensor& x_, const Tensor& g_, int64_t kh, int64_t kw, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x_, {x_.size(0), g_.size(2), x_.size(2), kh, kw}, stride, padding);
  if (for_torch(s, x_) && !s.small()) {
    const Tensor like = at::empty({s.o, s.c, kh, kw}, x_.options()).contiguous(at::MemoryFormat::ChannelsLast);
    return by_torch(s, [&](int64_t t) {
      return std::get<1>(torch_backward(s, task_of(g_, t), task_of(x_, t), like, {false, true, false})).contiguous();
    });
  }
  const Tensor x = channels_last(x_), g = channels_last(g_);
  Tensor k = at::empty({s.tasks, s.o, s.c, kh, kw}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "contract_kernel", [&] {
    const Patches<scalar_t> all{s};
    over_tasks<scalar_t>(s, [&](int64_t t, scalar_t* kernel, scalar_t* turned, scalar_t* patches) {
      const scalar_t* image = x.const_data_ptr<scalar_t>() + t * s.n * s.image();
      const scalar_t* in = g.const_data_ptr<scalar_t>() + t * s.n * s.positions() * s.o;
      std::fill_n(s.small() ? turned : kernel, s.kernel(), scalar_t(0));
      for (int64_t first = 0; first < s.n; first += s.block()) {
        const int64_t images = std::min(s.block(), s.n - first), rows = images * s.positions();
        all.of(image + first * s.image(), images, patches);
        const scalar_t* at = in + first * s.positions() * s.o;
        if (s.small())
          accumulate_small(s, rows, patches, at, turned);
        else
          matmul(true, false, s.o, s.patch(), rows, at, patches, scalar_t(1), kernel);
      }
      if (s.small()) transpose(s.patch(), s.o, turned, kernel);
      reorder(s, kernel, k.data_ptr<scalar_t>() + t * s.kernel(), true);
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
  TORCH_CHECK(!bias || bias->sizes() == at::IntArrayRef({k.size(0), k.size(1)}), "conv2d takes a bias [T, o]");
  TORCH_CHECK(stride > 0 && padding >= 0 && x.size(3) + 2 * padding >= k.size(3) && x.size(4) + 2 * padding >= k.size(4),
              "conv2d got images smaller than its kernel: ", x.sizes(), " and ", k.sizes());
  return Output::apply(x, k, bias, stride, padding);
}

}  // namespace imaml
