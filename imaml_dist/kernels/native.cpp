// Convolution and batch normalisation of T tasks, each under parameters of its own, differentiable as often as an implicit
// meta-gradient needs, for CPUs.
//
// Tensors are [T, n, h, w, c] in memory ("channels last"), which is what the products of matrices below read and write
// without a copy; outside they look as torch's layers expect them, [T, n, c, h, w].
//
// Every task is computed as if it were alone, and sums over samples are taken in one order: results do not depend on T.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

extern "C" {  // BLAS, from the libraries that torch brings
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace {

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

// [T, n, c, h, w] to look at, channels last in memory.
Tensor empty_images(int64_t t, int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  return at::empty({t, n, h, w, c}, like.options()).permute({0, 1, 4, 2, 3});
}
Tensor channels_last(const Tensor& x) { return x.permute({0, 1, 3, 4, 2}).contiguous(); }

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

// Its transpose: add patches to where they came from.
template <typename T>
void add_patches(const Shape& s, const T* patches, T* image) {
  over_runs(s, [&](int64_t y, int64_t x, int64_t values, int64_t at) {
    if (x < 0) return;
    T* to = image + (y * s.w + x) * s.c;
    for (int64_t k = 0; k < values; ++k) to[k] += patches[at + k];
  });
}

// f(width, first) for the channels in tiles of a width that the compiler knows, so that sums stay in registers.
template <typename F>
void over_tiles(int64_t channels, const F& f) {
  constexpr int64_t wide = 16;
  int64_t j = 0;
  for (; j + wide <= channels; j += wide) f(std::integral_constant<int64_t, wide>(), j);
  for (; j < channels; ++j) f(std::integral_constant<int64_t, 1>(), j);
}

// With patches of a few values, as those of a grey image, BLAS spends its time on packing. out [rows, o] += patches kernel, with
// the kernel [patch, o].
template <typename T>
void multiply_small(const Shape& s, int64_t rows, const T* patches, const T* kernel, T* out) {
  over_tiles(s.o, [&](auto width, int64_t j) {
    constexpr int64_t W = width, R = 4;
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
      T sum[R][W];
      for (int64_t i = 0; i < R; ++i)
        for (int64_t k = 0; k < W; ++k) sum[i][k] = out[(r + i) * s.o + j + k];
      for (int64_t p = 0; p < s.patch(); ++p)
        for (int64_t i = 0; i < R; ++i)
          for (int64_t k = 0; k < W; ++k) sum[i][k] += patches[(r + i) * s.patch() + p] * kernel[p * s.o + j + k];
      for (int64_t i = 0; i < R; ++i)
        for (int64_t k = 0; k < W; ++k) out[(r + i) * s.o + j + k] = sum[i][k];
    }
    for (; r < rows; ++r)
      for (int64_t p = 0; p < s.patch(); ++p)
        for (int64_t k = 0; k < W; ++k) out[r * s.o + j + k] += patches[r * s.patch() + p] * kernel[p * s.o + j + k];
  });
}

// kernel [patch, o] += patches' g, with g [rows, o].
template <typename T>
void accumulate_small(const Shape& s, int64_t rows, const T* patches, const T* g, T* kernel) {
  over_tiles(s.o, [&](auto width, int64_t j) {
    constexpr int64_t W = width, P = 9;
    int64_t p = 0;
    for (; p + P <= s.patch(); p += P) {
      T sum[P][W] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < P; ++i)
          for (int64_t k = 0; k < W; ++k) sum[i][k] += patches[r * s.patch() + p + i] * g[r * s.o + j + k];
      for (int64_t i = 0; i < P; ++i)
        for (int64_t k = 0; k < W; ++k) kernel[(p + i) * s.o + j + k] += sum[i][k];
    }
    for (; p < s.patch(); ++p)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < W; ++k) kernel[p * s.o + j + k] += patches[r * s.patch() + p] * g[r * s.o + j + k];
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

// With many rows in float32 torch's own kernels (oneDNN) for one task are faster than a product of matrices: they are called
// task by task, in the same order of memory.
bool for_torch(const Shape& s, const Tensor& x) { return x.scalar_type() == at::kFloat && s.n * s.positions() >= 1024; }

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
    over_tasks<scalar_t>(s, [&](int64_t t, scalar_t* kernel, scalar_t* turned, scalar_t* patches) {
      reorder(s, k.const_data_ptr<scalar_t>() + t * k.stride(0), kernel, false);
      if (s.small()) transpose(s.o, s.patch(), kernel, turned);
      const scalar_t* image = x.const_data_ptr<scalar_t>() + t * s.n * s.image();
      scalar_t* out = y.data_ptr<scalar_t>() + t * s.n * s.positions() * s.o;
      for (int64_t first = 0; first < s.n; first += s.block()) {
        const int64_t images = std::min(s.block(), s.n - first), rows = images * s.positions();
        for (int64_t m = 0; m < images; ++m)
          patches_of(s, image + (first + m) * s.image(), patches + m * s.positions() * s.patch());
        scalar_t* at = out + first * s.positions() * s.o;
        if (bias.defined())
          for (int64_t r = 0; r < rows; ++r)
            std::copy_n(bias.const_data_ptr<scalar_t>() + t * bias.stride(0), s.o, at + r * s.o);
        else
          std::fill_n(at, rows * s.o, scalar_t(0));
        if (s.small())
          multiply_small(s, rows, patches, turned, at);
        else
          matmul(false, true, rows, s.o, s.patch(), patches, kernel, scalar_t(1), at);
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
    over_tasks<scalar_t>(s, [&](int64_t t, scalar_t* kernel, scalar_t* turned, scalar_t* patches) {
      const scalar_t* image = x.const_data_ptr<scalar_t>() + t * s.n * s.image();
      const scalar_t* in = g.const_data_ptr<scalar_t>() + t * s.n * s.positions() * s.o;
      std::fill_n(s.small() ? turned : kernel, s.kernel(), scalar_t(0));
      for (int64_t first = 0; first < s.n; first += s.block()) {
        const int64_t images = std::min(s.block(), s.n - first), rows = images * s.positions();
        for (int64_t m = 0; m < images; ++m)
          patches_of(s, image + (first + m) * s.image(), patches + m * s.positions() * s.patch());
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

// Batch normalisation with the statistics of the batch, y = gamma z + beta, z = (x - mean(x)) r, r = 1 / sqrt(var(x) + eps), of
// rows x [T, R, C]. m() is the mean over rows.

struct Rows {
  int64_t tasks, rows, channels;
};

// f(width, offset of the tile's first row, offset of its first channel)
template <typename F>
void over_task_tiles(const Rows& s, const F& f) {
  at::parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      over_tiles(s.channels, [&](auto width, int64_t j) { f(width, t * s.rows * s.channels + j, t * s.channels + j); });
  });
}

// mean and r, each [T, C].
std::tuple<Tensor, Tensor> statistics(const Rows& s, const Tensor& x, double eps) {
  Tensor mean = at::empty({s.tasks, s.channels}, x.options()), r = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "statistics", [&] {
    over_task_tiles(s, [&](auto width, int64_t first, int64_t channel) {
      constexpr int64_t W = width;
      const scalar_t* in = x.const_data_ptr<scalar_t>() + first;
      scalar_t sum[W] = {}, square[W] = {}, mu[W];
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < W; ++j) sum[j] += in[i * s.channels + j];
      for (int64_t j = 0; j < W; ++j) mu[j] = sum[j] / s.rows;
      for (int64_t i = 0; i < s.rows; ++i)  // a second pass keeps the digits that a mean of squares would lose
        for (int64_t j = 0; j < W; ++j) {
          const scalar_t d = in[i * s.channels + j] - mu[j];
          square[j] += d * d;
        }
      for (int64_t j = 0; j < W; ++j) {
        mean.data_ptr<scalar_t>()[channel + j] = mu[j];
        r.data_ptr<scalar_t>()[channel + j] = 1 / std::sqrt(square[j] / s.rows + scalar_t(eps));
      }
    });
  });
  return {mean, r};
}

Tensor normalise(const Rows& s, const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& mean,
                 const Tensor& r) {
  Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "normalise", [&] {
    over_task_tiles(s, [&](auto width, int64_t first, int64_t channel) {
      constexpr int64_t W = width;
      const scalar_t* in = x.const_data_ptr<scalar_t>() + first;
      scalar_t* out = y.data_ptr<scalar_t>() + first;
      scalar_t slope[W], start[W];
      for (int64_t j = 0; j < W; ++j) {
        const int64_t c = channel + j;
        slope[j] = gamma.const_data_ptr<scalar_t>()[c] * r.const_data_ptr<scalar_t>()[c];
        start[j] = beta.const_data_ptr<scalar_t>()[c] - mean.const_data_ptr<scalar_t>()[c] * slope[j];
      }
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < W; ++j) out[i * s.channels + j] = in[i * s.channels + j] * slope[j] + start[j];
    });
  });
  return y;
}

// With g the gradient at y: (gamma r (g - m(g) - z m(g z)), sum(g z), sum(g)).
std::tuple<Tensor, Tensor, Tensor> derivative(const Rows& s, const Tensor& g, const Tensor& x, const Tensor& gamma,
                                              const Tensor& mean, const Tensor& r) {
  Tensor dx = at::empty_like(x), dgamma = at::empty_like(mean), dbeta = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "derivative", [&] {
    over_task_tiles(s, [&](auto width, int64_t first, int64_t channel) {
      constexpr int64_t W = width;
      const scalar_t *gr = g.const_data_ptr<scalar_t>() + first, *in = x.const_data_ptr<scalar_t>() + first;
      scalar_t* out = dx.data_ptr<scalar_t>() + first;
      scalar_t mu[W], sum_g[W] = {}, sum_gd[W] = {}, a[W], b[W], d[W];  // dx = a g + b (x - mean) + d
      std::copy_n(mean.const_data_ptr<scalar_t>() + channel, W, mu);
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < W; ++j) {
          const scalar_t gi = gr[i * s.channels + j];
          sum_g[j] += gi;
          sum_gd[j] += gi * (in[i * s.channels + j] - mu[j]);
        }
      for (int64_t j = 0; j < W; ++j) {
        const scalar_t ri = r.const_data_ptr<scalar_t>()[channel + j];
        dgamma.data_ptr<scalar_t>()[channel + j] = sum_gd[j] * ri;
        dbeta.data_ptr<scalar_t>()[channel + j] = sum_g[j];
        a[j] = gamma.const_data_ptr<scalar_t>()[channel + j] * ri;
        b[j] = -a[j] * ri * ri * sum_gd[j] / s.rows;
        d[j] = -a[j] * sum_g[j] / s.rows - b[j] * mu[j];
      }
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < W; ++j)
          out[i * s.channels + j] = a[j] * gr[i * s.channels + j] + b[j] * in[i * s.channels + j] + d[j];
    });
  });
  return {dx, dgamma, dbeta};
}

// With cotangents (u, a, b) of the three results above: the derivatives of sum(u dx) + a dgamma + b dbeta with respect to
// (g, x, gamma),
//   g:      gamma r (u - m(u) - z q) + a z + b,                         k = m(g z), q = m(u z)
//   x:      r (w - m(w) - z m(w z)) - gamma r^2 e z,                    w = a g - gamma r (q g + k u)
//   gamma:  r R e,                                                      e = m(u g) - m(u) m(g) - q k
std::tuple<Tensor, Tensor, Tensor> second_derivative(const Rows& s, const Tensor& u, const Tensor& a, const Tensor& b,
                                                     const Tensor& g, const Tensor& x, const Tensor& gamma,
                                                     const Tensor& mean, const Tensor& r) {
  Tensor dg = at::empty_like(x), dx = at::empty_like(x), dgamma = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "second_derivative", [&] {
    over_task_tiles(s, [&](auto width, int64_t first, int64_t channel) {
      constexpr int64_t W = width;
      const int64_t c = s.channels;
      const scalar_t *ur = u.const_data_ptr<scalar_t>() + first, *gr = g.const_data_ptr<scalar_t>() + first,
                     *in = x.const_data_ptr<scalar_t>() + first;
      scalar_t *out_g = dg.data_ptr<scalar_t>() + first, *out_x = dx.data_ptr<scalar_t>() + first;
      scalar_t mu[W], sum_g[W] = {}, sum_u[W] = {}, sum_gu[W] = {}, sum_gd[W] = {}, sum_ud[W] = {};
      std::copy_n(mean.const_data_ptr<scalar_t>() + channel, W, mu);
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < W; ++j) {
          const scalar_t gi = gr[i * c + j], ui = ur[i * c + j], d = in[i * c + j] - mu[j];
          sum_g[j] += gi;
          sum_u[j] += ui;
          sum_gu[j] += gi * ui;
          sum_gd[j] += gi * d;
          sum_ud[j] += ui * d;
        }
      // dg = gu u + gx (x - mean) + g1 and dx = xg g + xu u + xx (x - mean) + x1
      scalar_t gu[W], gx[W], g1[W], xg[W], xu[W], xx[W], x1[W];
      for (int64_t j = 0; j < W; ++j) {
        const scalar_t ri = r.const_data_ptr<scalar_t>()[channel + j], count = s.rows;
        const scalar_t scale = gamma.const_data_ptr<scalar_t>()[channel + j] * ri;
        const scalar_t aj = a.const_data_ptr<scalar_t>()[channel + j], bj = b.const_data_ptr<scalar_t>()[channel + j];
        const scalar_t mg = sum_g[j] / count, mu_u = sum_u[j] / count, k = sum_gd[j] * ri / count,
                       q = sum_ud[j] * ri / count, e = sum_gu[j] / count - mg * mu_u - q * k;
        const scalar_t wg = aj - scale * q, wu = -scale * k;  // w = wg g + wu u
        dgamma.data_ptr<scalar_t>()[channel + j] = ri * count * e;
        gu[j] = scale;
        gx[j] = wg * ri;
        g1[j] = bj - scale * mu_u;
        xg[j] = ri * wg;
        xu[j] = ri * wu;
        xx[j] = -ri * ri * (wg * k + wu * q + scale * e);
        x1[j] = -ri * (wg * mg + wu * mu_u);
      }
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < W; ++j) {
          const scalar_t gi = gr[i * c + j], ui = ur[i * c + j], d = in[i * c + j] - mu[j];
          out_g[i * c + j] = gu[j] * ui + gx[j] * d + g1[j];
          out_x[i * c + j] = xg[j] * gi + xu[j] * ui + xx[j] * d + x1[j];
        }
    });
  });
  return {dg, dx, dgamma};
}

Tensor rows_of(const Tensor& x) { return channels_last(x).flatten(1, 3); }

// Rows [T, R, C] as images like `like`.
Tensor images_of(const Tensor& rows, const Tensor& like) {
  return rows.reshape({like.size(0), like.size(1), like.size(3), like.size(4), like.size(2)}).permute({0, 1, 4, 2, 3});
}

struct NormBackward : Function<NormBackward> {
  static tensor_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Tensor& gamma,
                             const Tensor& mean, const Tensor& r) {
    const Tensor rows = rows_of(x);
    const Rows s{rows.size(0), rows.size(1), rows.size(2)};
    ctx->save_for_backward({g, x, gamma, mean, r});
    auto [dx, dgamma, dbeta] = derivative(s, rows_of(g), rows, gamma.contiguous(), mean, r);
    return {images_of(dx, x), dgamma, dbeta};
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], &gamma = saved[2], &mean = saved[3], &r = saved[4];
    TORCH_CHECK(!at::GradMode::is_enabled(),  // create_graph=True: the result would be taken for a constant
                "this batch normalisation has no third derivative; use execution vmap or loop");
    const Tensor rows = rows_of(x);
    const Rows s{rows.size(0), rows.size(1), rows.size(2)};
    auto [dg, dx, dgamma] = second_derivative(s, rows_of(grads[0]), grads[1].contiguous(), grads[2].contiguous(),
                                              rows_of(g), rows, gamma.contiguous(), mean, r);
    return {images_of(dg, x), images_of(dx, x), dgamma, Tensor(), Tensor()};
  }
};

struct Norm : Function<Norm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps) {
    const Tensor rows = rows_of(x);
    const Rows s{rows.size(0), rows.size(1), rows.size(2)};
    auto [mean, r] = statistics(s, rows, eps);
    ctx->save_for_backward({x, gamma, mean, r});
    return images_of(normalise(s, rows, gamma.contiguous(), beta.contiguous(), mean, r), x);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto found = NormBackward::apply(grads[0], saved[0], saved[1], saved[2], saved[3]);
    return {found[0], found[1], found[2], Tensor()};
  }
};

Tensor batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps) {
  if (x.dim() == 4) return batch_norm(x.unsqueeze(0), gamma.unsqueeze(0), beta.unsqueeze(0), eps).squeeze(0);
  const std::vector<int64_t> channels{x.size(0), x.size(2)};
  TORCH_CHECK(x.dim() == 5 && gamma.sizes().vec() == channels && beta.sizes().vec() == channels,
              "batch_norm takes [T, n, c, h, w] and [T, c], got ", x.sizes(), ", ", gamma.sizes(), ", ", beta.sizes());
  return Norm::apply(x, gamma, beta, eps);
}

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

Tensor batch_norm_mapped(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("imaml::batch_norm", "").typed<decltype(batch_norm)>();
  const Mapped map({x, gamma, beta});
  return map.back(op.call(map.in_front(x), map.in_front(gamma), map.in_front(beta), eps));
}

}  // namespace

TORCH_LIBRARY(imaml, m) {
  m.def("conv2d(Tensor x, Tensor kernel, Tensor? bias, int stride, int padding) -> Tensor", &conv2d);
  m.def("batch_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> Tensor", &batch_norm);
}

TORCH_LIBRARY_IMPL(imaml, FuncTorchBatched, m) {
  m.impl("conv2d", &conv2d_mapped);
  m.impl("batch_norm", &batch_norm_mapped);
}
