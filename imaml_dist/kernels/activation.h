// What lies behind a batch normalisation: nothing, the rectifier, or a smooth function with its first and second derivative, of a
// register or of a single number alike. A result depends on its argument alone; torch's own loops compute what is left over at the
// end of a row, or of a thread's share, by other means than the rest, and so in other bits.

#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include "registers.h"

namespace imaml {

// One number of V, and V's bits as whole numbers.
template <typename V>
struct Lane {
  using type = V;
  using bit = std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>;
  using bits = bit;
};
template <>
struct Lane<Register<float>> : Lane<float> {
  typedef uint32_t bits __attribute__((vector_size(IMAML_REGISTER)));
};
template <>
struct Lane<Register<double>> : Lane<double> {
  typedef uint64_t bits __attribute__((vector_size(IMAML_REGISTER)));
};

// Coefficients c, of x^0 first, at x.
template <typename V, typename T, size_t n>
V polynomial(const std::array<T, n>& c, V x) {
  V sum = V{} + c[n - 1];
#pragma GCC unroll 32
  for (size_t k = n - 1; k-- > 0;) sum = sum * x + c[k];
  return sum;
}

// exp(x) for x <= 0; nan for nan, and exp(-87) or, in double, exp(-708) for all below. By 2^n times the series of exp at
// x - n log 2, n being the whole number next to x / log 2: within 2 units in the last place.
template <typename V>
V exp_negative(V x) {
  using T = typename Lane<V>::type;
  using Bit = typename Lane<V>::bit;
  constexpr bool single = sizeof(T) == 4;
  constexpr auto series = [] {
    std::array<T, single ? 8 : 14> c{1};
    for (size_t k = 1; k < c.size(); ++k) c[k] = c[k - 1] / T(k);
    return c;
  }();
  constexpr int digits = std::numeric_limits<T>::digits - 1;
  constexpr T least = single ? -87 : -708, whole = T(uint64_t(3) << (digits - 1));  // a sum with it has no digits behind the point
  constexpr T high = T(single ? 0.693359375 : 0x1.62e42feep-1),  // of log 2, so that n * high is exact
      low = T(single ? -2.121944400546905827679e-4 : 1.908214929270587700022e-10);
  x = x < least ? V{} + least : x;
  const V moved = x * T(1.4426950408889634074) + whole, n = moved - whole, r = (x - n * high) - n * low;
  const auto power = (std::bit_cast<typename Lane<V>::bits>(moved) + Bit(std::numeric_limits<T>::max_exponent - 1)) << Bit(digits);
  return polynomial(series, r) * std::bit_cast<V>(power);
}

// log(1 + e) for 0 <= e <= 1: 2 (z + z^3 / 3 + z^5 / 5 + ...) with z = e / (2 + e) <= 1/3.
template <typename V>
V log1p_small(V e) {
  using T = typename Lane<V>::type;
  constexpr auto series = [] {
    std::array<T, sizeof(T) == 4 ? 8 : 17> c{};
    for (size_t k = 0; k < c.size(); ++k) c[k] = T(2) / T(2 * k + 1);
    return c;
  }();
  const V z = e / (e + T(2));
  return z * polynomial(series, V(z * z));
}

template <typename V>
V magnitude(V y) {
  return y < V{} ? -y : y;
}

// 1 / (1 + exp(-y)), and what it lacks to 1.
template <typename V>
struct Logistic {
  V is, lacks;
  explicit Logistic(V y) {
    const V e = exp_negative(V(-magnitude(y))), more = 1 / (1 + e), less = e * more;
    is = y < V{} ? less : more;
    lacks = y < V{} ? more : less;
  }
};

// The normal distribution and its density. With t = |y|, the distribution at -t is the density times (1 / (t + 4)) q(s), s = 1 - 8 /
// (t + 4) in [-1, 1], where q(s) = (t + 4) exp(t^2 / 2) erfc(t / sqrt 2) sqrt(pi / 2) varies between 1 and 5.1; its Chebyshev
// series was summed in 60 digits, and the terms left out are below half a unit in the last place.
template <typename V>
struct Normal {
  V distribution, density;
  explicit Normal(V y) {
    using T = typename Lane<V>::type;
    static constexpr T chebyshev[] = {
        T(2.43256042851504057),      T(-1.88425457457948346),     T(0.556956649096381649),
        T(-0.121615972144204572),    T(0.0173607081437277714),    T(-8.03621200729965605e-4),
        T(-2.52034934805435325e-4),  T(4.73837192705811735e-5),   T(2.53258913659882581e-6),
        T(-1.54040698399129992e-6),  T(-8.47496063006169589e-9),  T(5.18533860109467226e-8),
        T(-2.82812932766024977e-10), T(-1.9486566378891076e-9),   T(-2.49194549682756712e-11),
        T(7.95724871944884639e-11),  T(4.61841417915521927e-12),  T(-3.29085612422438493e-12),
        T(-4.36538404380972995e-13), T(1.23007118392327742e-13),  T(3.24141735820867813e-14),
        T(-3.05323955873256653e-15), T(-2.01837402757073532e-15), T(-7.17019550142258764e-17),
        T(1.01695523980385421e-16)};
    constexpr int terms = sizeof(T) == 4 ? 12 : 25;
    const V t = magnitude(y), part = 1 / (t + T(4)), s = 1 - 8 * part, twice = s + s;
    V sum = V{} + chebyshev[terms - 1], before{};  // Clenshaw's recursion
#pragma GCC unroll 32
    for (int k = terms - 2; k > 0; --k) {
      const V next = (twice * sum - before) + chebyshev[k];
      before = sum;
      sum = next;
    }
    sum = (s * sum - before) + chebyshev[0];
    density = exp_negative(V(t * t * T(-0.5))) * T(0.39894228040143267794);
    const V tail = density * part * sum;
    distribution = y < V{} ? tail : 1 - tail;
  }
};

template <typename V>
struct Slopes {
  V first, second;
};

// Each has the value f(y), and what of a gradient g at f(y) passes back to y. Those that are smooth also have (f'(y), f''(y)).

struct Identity {
  static constexpr bool smooth = false;
  template <typename V>
  V value(V y) const {
    return y;
  }
  template <typename V>
  V back(V g, V) const {
    return g;
  }
};

struct ReLU {  // nan is let through, as torch does
  static constexpr bool smooth = false;
  template <typename V>
  V value(V y) const {
    return where_positive(y, y);
  }
  template <typename V>
  V back(V g, V y) const {
    return where_positive(g, y);
  }
};

template <typename Function>
struct Smooth {
  static constexpr bool smooth = true;
  template <typename V>
  V back(V g, V y) const {
    return g * static_cast<const Function*>(this)->slopes(y).first;
  }
};

struct SiLU : Smooth<SiLU> {
  template <typename V>
  V value(V y) const {
    return y * Logistic<V>(y).is;
  }
  template <typename V>
  Slopes<V> slopes(V y) const {
    const Logistic<V> p(y);
    const V steep = p.is * p.lacks;
    return {p.is + y * steep, steep * (2 + y * (p.lacks - p.is))};
  }
};

struct GELU : Smooth<GELU> {
  template <typename V>
  V value(V y) const {
    return y * Normal<V>(y).distribution;
  }
  template <typename V>
  Slopes<V> slopes(V y) const {
    const Normal<V> p(y);
    return {p.distribution + y * p.density, p.density * (2 - y * y)};
  }
};

struct Softplus : Smooth<Softplus> {
  double beta;
  explicit Softplus(double beta) : beta(beta) {}
  template <typename V>
  V value(V y) const {
    using T = typename Lane<V>::type;
    const V above = y < V{} ? V{} : y;
    return above + log1p_small(exp_negative(V(magnitude(y) * T(-beta)))) * T(1 / beta);
  }
  template <typename V>
  Slopes<V> slopes(V y) const {
    using T = typename Lane<V>::type;
    const Logistic<V> p(V(y * T(beta)));
    return {p.is, p.is * p.lacks * T(beta)};
  }
};

}  // namespace imaml
