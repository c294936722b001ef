// The sum of two feature maps with their pending affines and an activation, in one pass each way.
#pragma once

#include "driver.h"

namespace fastfilm {

// The two summands, M(y; coef) with activation map.act and M(y2; coef2) with none, where M(y) = g * (act(a * (y - p) +
// b) - q) + s; a null `coef` means M(y) = y. With `inside` the sum has the activation map.act, with the parameters
// `slope` [C] (null: 0), and the first summand has none.
struct Summands {
  const void *y, *coef, *y2, *coef2, *slope;
  bool inside;
};

// The gradients at the members of `Summands`; those at coef, y2, coef2 and slope may be null. dslope is [N, C].
struct SummandGradients {
  void *dy, *dcoef, *dy2, *dcoef2, *dslope;
};

void residual(const Map& map, const Summands& in, void* v);
void residual_backward(const Map& map, const void* dv, const Summands& in, const SummandGradients& out);

}  // namespace fastfilm
