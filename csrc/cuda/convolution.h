// The convolutions as calls. What is null is absent; `workspace` has the bytes that the function beside says.
#pragma once

#include <string>

#include "plan.h"

namespace fastfilm::cuda {

// A channels-last map, and the coefficients [7, N, channels] and activation that are pending on it.
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

// v = conv(inputs, whose channels follow each other) + bias, then one of
//   moments: y = v, and stats [2, N, co] of act(y + shift; slope), pre [2, co] holding both (or of y itself)
//   finished: y = g * (act(a * (v - p) + b) - q) + s, out_coef [7, N, co]
struct Forward {
  Input inputs[2];
  Weight weight;
  const float* bias;
  const float *pre, *out_coef;
  int pre_act, out_act;
  void* y;
  float* stats;
};

int64_t forward_workspace(const ConvPlan& plan, int storage);
std::string forward(const ConvPlan& plan, int storage, const Forward& call, void* workspace, Stream stream);

// dx and dcoef [7, N, ci] from the gradient e at the raw output; x and coef as in the forward pass. Without coef, dx
// is the gradient at the input itself.
struct Backward {
  const void* e;
  Weight weight;
  Input input;
  void* dx;
  float* dcoef;
};

int64_t backward_workspace(const ConvPlan& plan, int storage);
std::string backward(const ConvPlan& plan, int storage, const Backward& call, void* workspace, Stream stream);

// dW, dense [co, kd, kh, kw, ci], in the storage type.
struct WeightGradient {
  const void* e;
  Input inputs[2];
  void* dweight;
};

int64_t weight_gradient_workspace(const WgradPlan& plan);
std::string weight_gradient(const WgradPlan& plan, int storage, const WeightGradient& call, void* workspace,
                            Stream stream);

}  // namespace fastfilm::cuda
