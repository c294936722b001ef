// The arguments of a convolution: one struct for each kind of call, with the function that runs it.
//
// A null pointer stands for an absent argument. `workspace` has as many bytes as the `*_workspace` function returns.
#pragma once

#include <string>

#include "plan.h"

namespace fastfilm::cuda {

// One source: a channels-last map, and the coefficients [7, N, channels] and activation that are pending on it.
struct Input {
  const void* x;
  const float* coef;
  int channels, act;
};

// Elements between neighbours of a weight [co, ci, kd, kh, kw].
struct WeightStrides {
  int64_t co, ci, d, h, w;
};

struct Weight {
  const void* data;
  WeightStrides strides;
};

// The forward pass: v = conv(inputs) + bias, the channels of two inputs joined, then one of
//   moments   y = v, and stats [2, N, co], the moments of act(y + shift; slope), where pre [2, co] holds the shift and
//             the slope, or of y itself without pre
//   finished  y = g * (act(a * (v - p) + b) - q) + s with out_coef [7, N, co], and v in `raw`
struct Forward {
  Input inputs[2];
  Weight weight;
  const float* bias;
  const float *pre, *out_coef;
  int pre_act, out_act;
  void *y, *raw;
  float* stats;
};

int64_t forward_workspace(const ConvPlan& plan, int storage);
std::string forward(const ConvPlan& plan, int storage, const Forward& call, void* workspace, Stream stream);

// The gradient at the raw output y, as one of
//   dy
//   scale * dy   with scale [N, co]
//   dy + the gradient through the moments   with y, stats [2, N, co], their gradients dstats, and pre as in `Forward`
struct Gradient {
  const void *dy, *y;
  const float *stats, *dstats, *pre, *scale;
  int pre_act;
};

// The results for one source: dx, the gradient at its raw map, and dcoef, the gradient at its coefficients.
struct Output {
  const void* x;      // the raw map; read with coef only
  const float* coef;  // null: nothing is pending
  int channels, act;
  void* dx;      // null: not wanted
  float* dcoef;  // with coef
  bool add;      // dx is added to its former values
};

// The backward pass at the input: the gradients at one source, or at two with joined channels, and at their
// coefficients [7, N, channels].
struct Backward {
  Gradient gradient;
  Weight weight;
  Output outputs[2];
};

int64_t backward_workspace(const ConvPlan& plan, int storage);
std::string backward(const ConvPlan& plan, int storage, const Backward& call, void* workspace, Stream stream);

// The backward pass at the weight: dweight, dense [co, kd, kh, kw, ci], in the storage type; dpre [2, co], or null: the
// sums of the gradient at the raw output, and the gradient at the slopes.
struct WeightGradient {
  Gradient gradient;
  Input inputs[2];
  void* dweight;
  float* dpre;
};

int64_t weight_gradient_workspace(const WgradPlan& plan);
std::string weight_gradient(const WgradPlan& plan, int storage, const WeightGradient& call, void* workspace,
                            Stream stream);

}  // namespace fastfilm::cuda
