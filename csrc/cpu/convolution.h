// Convolutions of channels-last maps.
#pragma once

#include "driver.h"

namespace fastfilm {

// The form of a convolution of a dense map [N, D, H, W, Ci] with a kernel [Co, Ci, KD, KH, KW] of any strides, both of
// `storage` (not float64), and dilation 1. Each axis has `before` positions of zeros in front of it and `out` positions
// in the result. With the kernel mirrored (negative strides, from its last element on) it computes the gradient at the
// map.
struct Convolution {
  Storage storage;
  int64_t n, ci, co;
  int64_t size[3], kernel[3], before[3], out[3], stride[3];
  int64_t strides[5];  // of the kernel, in elements
};

// The convolution y [N, *out, Co], dense. Each sum is taken in float, over a row of the kernel first, then over the
// rows, in an order that does not depend on the number of threads. `bias` [Co] may be null. With `coef` [7, N, Co] the
// function `apply` is applied to each row while it is in the cache.
void convolve(const Convolution& conv, const void* x, const void* weight, const void* bias, const float* coef,
              Activation act, void* y, int threads);

// The gradient at the kernel, with the kernel's strides, from the map and the gradient e [N, *out, Co] at the result;
// float32 only. Sums of a row are float, sums over rows are double.
void convolve_kernel_gradient(const Convolution& conv, const float* x, const float* e, float* dkernel, int threads);

}  // namespace fastfilm
