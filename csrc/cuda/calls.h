// The convolutions as calls. What is null is absent; `workspace` has the bytes that the function beside says.
#pragma once

#include <string>

#include "plan.h"

namespace fastfilm::cuda {

// A pooled or resized view of a map, separable: position j of an axis reads the `taps` voxels index[j * taps + t] with
// weight[j * taps + t], 0 for those that are not there. index null: the map itself.
struct View {
  struct Axis {
    const int* index;
    const float* weight;
    int taps;
  };
  Axis axis[3];
  Extent size;   // of the map
  bool maximum;  // over the taps, instead of their sum
};

// A channels-last map, the coefficients [7, N, channels] and activation that are pending on it, and how it is seen.
struct Input {
  const void* x;
  const float* coef;
  int channels, act;
  View view;
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
//   finished: y = g * (act(a * (v - p) + b) - q) + s, out_coef [7, N, co], and v in `raw`
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

// The gradient at the raw output y: dy, or scale * dy with scale [N, co], or with y that of its moments too, from
// stats [2, N, co] of act(y + shift; slope), their gradients and pre [2, co] as in the forward pass.
struct Gradient {
  const void *dy, *y;
  const float *stats, *dstats, *pre, *scale;
  int pre_act;
};

// What becomes of the gradient at the channels of one source. With `window`, the source was seen through a maximum over
// windows of that size, `step` apart and not overlapping, and dx is the gradient at the map of `size` behind it.
struct Output {
  const void* x;      // the raw map; read with coef or window only
  const float* coef;  // null: nothing is pending
  int channels, act;
  void* dx;      // null: not wanted
  float* dcoef;  // with coef
  bool add;      // to what dx holds
  Extent window, step, size;
};

// The gradient at each source (one, or two whose channels follow each other) and its coefficients [7, N, channels].
struct Backward {
  Gradient gradient;
  Weight weight;
  Output outputs[2];
};

int64_t backward_workspace(const ConvPlan& plan, int storage);
std::string backward(const ConvPlan& plan, int storage, const Backward& call, void* workspace, Stream stream);

// dW, dense [co, kd, kh, kw, ci], in the storage type. dpre [2, co], or null: the sums of the gradient at the raw
// output, and the gradient at the slopes.
struct WeightGradient {
  Gradient gradient;
  Input inputs[2];
  void* dweight;
  float* dpre;
};

int64_t weight_gradient_workspace(const WgradPlan& plan);
std::string weight_gradient(const WgradPlan& plan, int storage, const WeightGradient& call, void* workspace,
                            Stream stream);

// Both, by one kernel, with a plan of Direction::kJoint.
struct Joint {
  Backward input;
  Input inputs[2];
  void* dweight;
  float* dpre;
};

int joint_shares(const ConvPlan& plan);
int64_t joint_workspace(const ConvPlan& plan, int storage);
std::string joint(const ConvPlan& plan, int storage, const Joint& call, void* workspace, Stream stream);

}  // namespace fastfilm::cuda
