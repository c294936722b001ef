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

// Numbers of a storage type for each channel: `step` apart, 0 or 1, and `pitch` from sample to sample, 0 where all samples
// share them. Null data: they are absent.
struct Numbers {
  void* data;
  int storage, step, pitch;
};

enum Norm { kNoNorm, kBatchNorm, kInstanceNorm, kNorms };
enum Order { kNormFilmAct, kNormActFilm, kActNormFilm, kOrders };
enum Position { kEnd, kBeforeFilm, kBeforeNorm, kPositions };  // of dropout

// A block behind its convolution (spec.Kind), its tensors (spec.TailTensors), and where its coefficients go.
struct Block {
  int norm, order, position;
  bool uses_input, update;
  float eps, momentum, unbiased, slope_value;
  Numbers running_mean, running_var, norm_weight, norm_bias, bias, gamma, beta, mask, slope;
  const float* stats;  // [2, N, C]; with uses_input only
  float* coef;         // [7, N, C]; null: none are wanted
};

// The forward pass: v = conv(inputs) + bias, the channels of two inputs joined, then one of
//   moments   y = v, and stats [2, N, co], the moments of act(y + shift; slope), where pre [2, co] holds the shift and
//             the slope, or of y itself without pre
//   finished  y = g * (act(a * (v - p) + b) - q) + s with out_coef [7, N, co], and v in `raw`
// With `block` also its coefficients: behind the moments where it uses them, else in front of the convolution, which may
// take them as `out_coef`.
struct Forward {
  Input inputs[2];
  Weight weight;
  const float* bias;
  const float *pre, *out_coef;
  int pre_act, out_act;
  void *y, *raw;
  float* stats;
  Block block;
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

// The backward pass at the weight: dweight [co, ci, kd, kh, kw] in the storage type; dpre [2, co], or null: the sums of
// the gradient at the raw output, and the gradient at the slopes.
struct WeightGradient {
  Gradient gradient;
  Input inputs[2];
  void* dweight;
  WeightStrides strides;
  float* dpre;
};

int64_t weight_gradient_workspace(const WgradPlan& plan);

// The sums that are left to be taken of a gradient at the weight: over the slots [slots, co, taps, ci], and over the
// groups [groups, 2, co].
struct WeightSums {
  const float* partials;
  int64_t slots;
  int co, ci;
  Extent kernel;
  void* dweight;  // null: none are left
  WeightStrides strides;
  const float* sums;
  int groups;
  float* dpre;  // null: not wanted
};

// Leaves sums, which `backward` or `prepare` takes; the workspace must not change until then.
std::string weight_gradient(const WgradPlan& plan, int storage, const WeightGradient& call, void* workspace,
                            WeightSums& left, Stream stream);

// Takes the sums that are left, too.
std::string backward(const ConvPlan& plan, int storage, const Backward& call, const WeightSums& left, void* workspace,
                     Stream stream);

}  // namespace fastfilm::cuda
