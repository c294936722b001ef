// Views of a feature map: each position is a weighted sum, or the maximum, of positions of the map, separably along the
// axes. They cover resizing, pooling, and writing into a part of a wider map.
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

// Writes the view of a map with its pending affine applied. map.s is the product of the axes' `in`. With `coef` null
// the map is read as it is, with `in_stride` elements from position to position; with coefficients these are map.c.
void gather(const Map& map, const View& view, const void* y, int64_t in_stride, const void* coef, void* out,
            int64_t out_stride);

// The gradient of a maximum: adds to dv, which is zero before, the gradient at the map with its pending affine applied.
void maximum_backward(const Map& map, const View& view, const void* y, const void* coef, const void* dout,
                      int64_t dout_stride, void* dv);

}  // namespace fastfilm
