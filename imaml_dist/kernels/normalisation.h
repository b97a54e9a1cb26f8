// Batch normalisation with the statistics of the batch, y = gamma z + beta, z = (x - mean(x)) r, r = 1 / sqrt(var(x) + eps), of
// rows x [T, R, C], and an activation f(y) of it; m() below is the mean over rows. Memory is what it costs: every derivative reads
// its rows twice, and the activation rides along.

#pragma once

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <vector>

#include "activation.h"
#include "registers.h"
#include "tensors.h"

namespace imaml {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

struct Rows {
  int64_t tasks, rows, channels;
};

// f(piece, first row, last) for pieces of the rows, which threads that have nothing else to do share.
constexpr int64_t PIECE = 1024;
inline int64_t pieces(const Rows& s) { return (s.rows + PIECE - 1) / PIECE; }
template <typename F>
void over_pieces(const Rows& s, const F& f) {
  at::parallel_for(0, pieces(s), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, p * PIECE, std::min((p + 1) * PIECE, s.rows));
  });
}

// K sums over rows for every channel, of a block in the precision of the data, of the blocks of a piece in double, and then of the
// pieces: in one order, whoever does it. `begin(zero, channel)` gives what adds a row to the K parts.
template <int64_t K, typename T, int many, typename F>
std::array<std::vector<double>, K> sums(const Rows& s, const F& begin) {
  std::vector<std::array<std::vector<double>, K>> sum(std::max<int64_t>(1, pieces(s)));
  for (auto& piece : sum)
    for (auto& one : piece) one.resize(s.channels);
  over_pieces(s, [&](int64_t p, int64_t first, int64_t last) {
    over_blocks<T, many>(first, last, s.channels, [&](auto zero, int64_t first, int64_t last, int64_t channel) {
      using V = decltype(zero);
      constexpr int64_t W = sizeof(V) / sizeof(T);
      const auto add = begin(zero, channel);
      V part[K] = {};
      for (int64_t i = first; i < last; ++i) add(i * s.channels + channel, part);
      T values[K][W];
      std::memcpy(values, part, sizeof(part));
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < W; ++j) sum[p][k][channel + j] += values[k][j];
    });
  });
  for (int64_t p = 1; p < pieces(s); ++p)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < s.channels; ++j) sum[0][k][j] += sum[p][k][j];
  return sum[0];
}

// `begin(zero, channel)` gives what is done to every row.
template <typename T, int many, typename F>
void over_rows(const Rows& s, const F& begin) {
  over_pieces(s, [&](int64_t, int64_t first, int64_t last) {
    over_blocks<T, many>(first, last, s.channels, [&](auto zero, int64_t first, int64_t last, int64_t channel) {
      const auto work = begin(zero, channel);
      for (int64_t i = first; i < last; ++i) work(i * s.channels + channel);
    });
  });
}

template <typename F>
void over_tasks(const Rows& s, const F& f) {
  over_tasks(s.tasks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// Task t of [T, ...].
template <typename T>
const T* of_task(const Tensor& x, int64_t t) {
  return x.const_data_ptr<T>() + t * (x.numel() / x.size(0));
}
template <typename T>
T* of_task(Tensor& x, int64_t t) {
  return x.data_ptr<T>() + t * (x.numel() / x.size(0));
}

// mean and r, each [T, C].
inline std::tuple<Tensor, Tensor> statistics(const Rows& s, const Tensor& x, double eps) {
  Tensor mean = at::empty({s.tasks, s.channels}, x.options()), r = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "statistics", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t* in = of_task<scalar_t>(x, t);
      scalar_t *means = of_task<scalar_t>(mean, t), *rs = of_task<scalar_t>(r, t);
      // Distances from a value near the mean keep the digits that a mean of squares would lose.
      std::vector<scalar_t> near(s.channels);
      const int64_t some = std::min<int64_t>(s.rows, 32);
      for (int64_t i = 0; i < some; ++i)
        for (int64_t j = 0; j < s.channels; ++j) near[j] += in[i * s.channels + j] / some;
      const auto sum = sums<2, scalar_t, 4>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [in, from = load<V>(&near[channel])](int64_t i, V* part) {
          const V d = load<V>(in + i) - from;
          part[0] += d;
          part[1] += d * d;
        };
      });
      for (int64_t j = 0; j < s.channels; ++j) {
        const double away = sum[0][j] / s.rows, variance = sum[1][j] / s.rows - away * away;
        means[j] = near[j] + away;
        rs[j] = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
      }
    });
  });
  return {mean, r};
}

// gamma, beta, mean and r, [T, C] each.
struct Affine {
  Tensor gamma, beta, mean, r;
};

// The same of one task and some channels, by which rows are normalised: y = x slope + start.
template <typename V, typename T>
struct Line {
  V mean, slope, start;
  Line(const Affine& affine, int64_t t, int64_t channel) {
    mean = load<V>(of_task<T>(affine.mean, t) + channel);
    slope = load<V>(of_task<T>(affine.gamma, t) + channel) * load<V>(of_task<T>(affine.r, t) + channel);
    start = load<V>(of_task<T>(affine.beta, t) + channel) - mean * slope;
  }
  V at(V x) const { return x * slope + start; }
};

// Registers worked on at once: a smooth activation fills them by itself.
template <typename A>
constexpr int at_once = A::smooth ? 1 : 4;

template <typename A>
Tensor normalised(const Rows& s, const A& act, const Tensor& x, const Affine& affine, Tensor y) {
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "normalised", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t* in = of_task<scalar_t>(x, t);
      scalar_t* out = of_task<scalar_t>(y, t);
      over_rows<scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, in, out, line = Line<V, scalar_t>(affine, t, channel)](int64_t i) {
          store(out + i, V(act.value(line.at(load<V>(in + i)))));
        };
      });
    });
  });
  return y;
}

// With g the gradient at y, f' times that at f(y): (gamma r (g - m(g) - z m(g z)), sum(g z), sum(g)).
template <typename A>
std::tuple<Tensor, Tensor, Tensor> derivative(const Rows& s, const A& act, const Tensor& g, const Tensor& x, const Affine& affine) {
  Tensor dx = at::empty_like(x), dgamma = at::empty_like(affine.mean), dbeta = at::empty_like(affine.mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "derivative", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t *gs = of_task<scalar_t>(g, t), *in = of_task<scalar_t>(x, t);
      const auto sum = sums<2, scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, gs, in, line = Line<V, scalar_t>(affine, t, channel)](int64_t i, V* part) {
          const V xi = load<V>(in + i), gi = V(act.back(load<V>(gs + i), line.at(xi)));
          part[0] += gi;
          part[1] += gi * (xi - line.mean);
        };
      });
      std::vector<scalar_t> of_d(s.channels), of_1(s.channels);  // dx = slope g + of_d (x - mean) + of_1
      for (int64_t j = 0; j < s.channels; ++j) {
        const double r = of_task<scalar_t>(affine.r, t)[j], slope = of_task<scalar_t>(affine.gamma, t)[j] * r;
        of_task<scalar_t>(dgamma, t)[j] = sum[1][j] * r;
        of_task<scalar_t>(dbeta, t)[j] = sum[0][j];
        of_d[j] = -slope * r * r * sum[1][j] / s.rows;
        of_1[j] = -slope * sum[0][j] / s.rows;
      }
      scalar_t* out = of_task<scalar_t>(dx, t);
      over_rows<scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, gs, in, out, line = Line<V, scalar_t>(affine, t, channel), b = load<V>(&of_d[channel]),
                c = load<V>(&of_1[channel])](int64_t i) {
          const V xi = load<V>(in + i), gi = V(act.back(load<V>(gs + i), line.at(xi)));
          store(out + i, V(line.slope * gi + b * (xi - line.mean) + c));
        };
      });
    });
  });
  return {dx, dgamma, dbeta};
}

// With cotangents (u, a, b) of the three results above: the derivatives of sum(u dx) + a dgamma + b dbeta with respect to
// (g, x, gamma, beta), g being the gradient at f(y) now and h = f'(y) g that at y. With respect to h they are those of a batch
// normalisation without activation,
//   h:      v = gamma r (u - m(u) - z q) + a z + b,                     k = m(h z), q = m(u z)
//   x:      r (w - m(w) - z m(w z)) - gamma r^2 e z,                    w = a h - gamma r (q h + k u)
//   gamma:  r R e,                                                      e = m(u h) - m(u) m(h) - q k
// Of g there remains f'(y) v, and where f is curved p = f''(y) g v reaches y as a gradient does: it adds
//   x:      gamma r (p - m(p) - z m(p z)),         gamma:  sum(p z),         beta:  sum(p)
// for which the first pass sums what v is made of, weighted by f''(y) g.
template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> second_derivative(const Rows& s, const A& act, const Tensor& u, const Tensor& a,
                                                             const Tensor& b, const Tensor& g, const Tensor& x,
                                                             const Affine& affine) {
  Tensor dg = at::empty_like(x), dx = at::empty_like(x), dgamma = at::empty_like(affine.mean), dbeta;
  if constexpr (A::smooth) dbeta = at::empty_like(affine.mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "second_derivative", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t *us = of_task<scalar_t>(u, t), *gs = of_task<scalar_t>(g, t), *in = of_task<scalar_t>(x, t);
      const auto sum = sums<A::smooth ? 10 : 5, scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, us, gs, in, line = Line<V, scalar_t>(affine, t, channel)](int64_t i, V* part) {
          const V xi = load<V>(in + i), ui = load<V>(us + i), d = xi - line.mean;
          V hi = load<V>(gs + i);
          if constexpr (A::smooth) {
            const auto slopes = act.slopes(line.at(xi));
            const V ci = hi * slopes.second;
            part[5] += ci;
            part[6] += ci * ui;
            part[7] += ci * d;
            part[8] += ci * ui * d;
            part[9] += ci * d * d;
            hi = hi * slopes.first;
          } else {
            hi = act.back(hi, line.at(xi));
          }
          part[0] += hi;
          part[1] += ui;
          part[2] += hi * ui;
          part[3] += hi * d;
          part[4] += ui * d;
        };
      });
      // v = slope u + vd (x - mean) + v1, dx = xh h + xu u + xd (x - mean) + x1 + slope p
      std::vector<scalar_t> vd(s.channels), v1(s.channels), xh(s.channels), xu(s.channels), xd(s.channels), x1(s.channels);
      for (int64_t j = 0; j < s.channels; ++j) {
        const double r = of_task<scalar_t>(affine.r, t)[j], slope = of_task<scalar_t>(affine.gamma, t)[j] * r,
                     n = s.rows, mh = sum[0][j] / n, mu = sum[1][j] / n, k = sum[3][j] * r / n, q = sum[4][j] * r / n,
                     e = sum[2][j] / n - mh * mu - q * k;
        const double wh = of_task<scalar_t>(a, t)[j] - slope * q, wu = -slope * k;  // w = wh h + wu u
        of_task<scalar_t>(dgamma, t)[j] = r * n * e;
        vd[j] = wh * r;
        v1[j] = of_task<scalar_t>(b, t)[j] - slope * mu;
        xh[j] = r * wh;
        xu[j] = r * wu;
        xd[j] = -r * r * (wh * k + wu * q + slope * e);
        x1[j] = -r * (wh * mh + wu * mu);
        if constexpr (A::smooth) {
          const double p = slope * sum[6][j] + vd[j] * sum[7][j] + v1[j] * sum[5][j],  // sums over rows, of p and of p (x - mean)
              pd = slope * sum[8][j] + vd[j] * sum[9][j] + v1[j] * sum[7][j];
          of_task<scalar_t>(dgamma, t)[j] += r * pd;
          of_task<scalar_t>(dbeta, t)[j] = p;
          xd[j] -= slope * r * r * pd / n;
          x1[j] -= slope * p / n;
        }
      }
      scalar_t *out_g = of_task<scalar_t>(dg, t), *out_x = of_task<scalar_t>(dx, t);
      over_rows<scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, us, gs, in, out_g, out_x, line = Line<V, scalar_t>(affine, t, channel), vvd = load<V>(&vd[channel]),
                vv1 = load<V>(&v1[channel]), vxh = load<V>(&xh[channel]), vxu = load<V>(&xu[channel]),
                vxd = load<V>(&xd[channel]), vx1 = load<V>(&x1[channel])](int64_t i) {
          const V xi = load<V>(in + i), y = line.at(xi), gi = load<V>(gs + i), ui = load<V>(us + i), d = xi - line.mean;
          const V v = line.slope * ui + vvd * d + vv1;
          if constexpr (A::smooth) {
            const auto slopes = act.slopes(y);
            store(out_g + i, V(slopes.first * v));
            store(out_x + i, V(vxh * (slopes.first * gi) + vxu * ui + vxd * d + vx1 + line.slope * (slopes.second * gi * v)));
          } else {
            store(out_g + i, V(act.back(v, y)));
            store(out_x + i, V(vxh * act.back(gi, y) + vxu * ui + vxd * d + vx1));
          }
        };
      });
    });
  });
  return {dg, dx, dgamma, dbeta};
}

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
    const Affine affine{gamma.contiguous(), beta.contiguous(), mean, r};
    auto [dx, dgamma, dbeta] = derivative(shape_of_rows(rows), activation<A>(sharpness), rows_of(g), rows, affine);
    return {images_of(dx, x), dgamma, dbeta};
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),  // create_graph=True: the result would be taken for a constant
                "this batch normalisation has no third derivative; use execution vmap or loop");
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], rows = rows_of(x);
    const Affine affine{saved[2].contiguous(), saved[3].contiguous(), saved[4], saved[5]};
    auto [dg, dx, dgamma, dbeta] = second_derivative(
        shape_of_rows(rows), activation<A>(ctx->saved_data["sharpness"].toDouble()), rows_of(grads[0]),
        grads[1].contiguous(), grads[2].contiguous(), rows_of(g), rows, affine);
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
    return normalised(s, activation<A>(sharpness), rows, {gamma.contiguous(), beta.contiguous(), mean, r}, y);
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
