// Images of T tasks as the kernels see them: [T, n, h, w, c] in memory ("channels last"), which is what products of matrices read
// and write without a copy; outside they look as torch's layers expect them, [T, n, c, h, w].

#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

namespace imaml {

using at::Tensor;

// [T, n, c, h, w] to look at, channels last in memory. No view of something else, which a layer in place could not change.
Tensor empty_images(int64_t t, int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  return at::empty_strided({t, n, c, h, w}, {n * h * w * c, h * w * c, 1, w * c, c}, like.options());
}
Tensor channels_last(const Tensor& x) { return x.permute({0, 1, 3, 4, 2}).contiguous(); }
// Tensors whose tasks are contiguous each, but may lie apart, as the parts of a vector of parameters do.
Tensor rows_apart(const Tensor& x) { return x.size(0) == 0 || x[0].is_contiguous() ? x : x.contiguous(); }

// f(first task, last) by as many threads as there are; where tasks are too few for all of them they are taken one after the other,
// and the loops inside of each, which are serial otherwise, share it out.
template <typename F>
void over_tasks(int64_t tasks, const F& f) {
  if (tasks < at::get_num_threads())
    f(0, tasks);
  else
    at::parallel_for(0, tasks, 1, f);
}

// Zeros at first, if it is asked for; begins where a register's worth of memory begins, so that no load of one touches two lines of
// the cache.
template <typename T>
struct Buffer {
  int64_t size;
  Tensor memory;
  T* values;
  explicit Buffer(int64_t size, bool zeros = true) : size(size) {
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    memory = zeros ? at::zeros({size}, type) : at::empty({size}, type);
    values = memory.data_ptr<T>();
  }
  T* data() { return values; }
};

}  // namespace imaml
