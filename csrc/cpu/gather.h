// What a consumer sees of a feature map: each position a weighted sum, or the maximum, of positions of the map,
// separably along the axes. Covers resizing, pooling, and writing into a part of a wider map.
#pragma once

#include "driver.h"

namespace fastfilm {

// Taps of one axis: position x of the result reads index[start[x]] ... index[start[x + 1] - 1] of the map.
struct Axis {
  int64_t in, out;
  const int64_t *start, *index;
  const double* weight;
};

struct View {
  Axis axis[3];  // depth (of one position in 2D), height, width
  bool maximum;
};

// map.s is the product of the axes' `in`. `coef` may be null: the map is read as it is, `in_stride` elements
// from position to position (map.c where there are coefficients).
void gather(const Map& map, const View& view, const void* y, int64_t in_stride, const void* coef, void* out,
            int64_t out_stride);

// dv, which is zero before, receives the gradient at the map behind its coefficients.
void maximum_backward(const Map& map, const View& view, const void* y, const void* coef, const void* dout,
                      int64_t dout_stride, void* dv);

}  // namespace fastfilm
