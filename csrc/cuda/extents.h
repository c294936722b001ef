// Arithmetic on boxes of voxels that the choices of layouts share.
#pragma once

#include <algorithm>

#include "plan.h"

namespace fastfilm::cuda {

inline int up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline int align(int bytes) { return up(bytes, 128) * 128; }
inline int axis(const Extent& e, int i) { return i == 0 ? e.d : i == 1 ? e.h : e.w; }
inline int& axis(Extent& e, int i) { return i == 0 ? e.d : i == 1 ? e.h : e.w; }

inline Extent map(const Extent& a, const Extent& b, int (*f)(int, int)) {
  return {f(a.d, b.d), f(a.h, b.h), f(a.w, b.w)};
}

// The class of output voxels whose coordinates have the remainders r, and its taps; none where one axis has none.
inline Box backward_box(const ConvShape& s, const Extent& r) {
  Box t{{1, 1, 1}, {0, 0, 0}, r, {0, 0, 0}};
  for (int i = 0; i < 3; ++i) {
    const int step = i == 0 && s.dims == 2 ? 1 : s.stride;
    int count = 0, first = 0;
    for (int k = 0; k < axis(s.kernel, i); ++k) {
      if ((axis(r, i) + axis(s.padding, i) - k) % step == 0) {
        ++count;
        first = k;
      }
    }
    axis(t.count, i) = count;
    axis(t.kernel_first, i) = first;
    axis(t.base, i) = (axis(r, i) + axis(s.padding, i) - first) / step;
  }
  if (t.count.volume() == 0) t.count = {0, 0, 0};
  return t;
}

inline int64_t voxels_of(const Extent& e) { return static_cast<int64_t>(e.d) * e.h * e.w; }

}  // namespace fastfilm::cuda
