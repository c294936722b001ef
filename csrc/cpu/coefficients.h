// The [N, C]-sized algebra of a block in one call each way: moments, norm weights, running statistics, gamma,
// beta and dropout mask to the rows a, b, g, s, p, q, slope, and the gradients back.
#pragma once

#include <cstdint>

namespace fastfilm {

enum Norm { kNormNone, kNormBatch, kNormInstance, kNormGroup, kNorms };
enum Order { kNormFilmAct, kNormActFilm, kActNormFilm, kOrders };
enum DropoutPosition { kDropoutEnd, kDropoutFilm, kDropoutNorm, kDropoutPositions };

// What a block consists of. `groups` counts those of a sample (1: layer norm); `use_input`: the statistics are
// those of the map, else the running ones; `update`: move the running statistics.
struct BlockShape {
  Norm norm;
  Order order;
  DropoutPosition position;
  bool use_input, update;
  int64_t n, c, groups;
  double count;  // values of a sample and channel
  double eps, momentum, slope;
};

// Vectors [C], or [rows][C] with rows 1 or N; null where absent. R is float or double.
template <class R>
struct BlockTensors {
  const R *stats, *norm_weight, *norm_bias, *conv_bias, *gamma, *beta, *mask, *slope;
  R *running_mean, *running_var;
  int64_t gamma_rows, beta_rows, mask_rows, slope_count;
};

// Gradients at the tensors of the same name and shape; null where not wanted.
template <class R>
struct BlockGradients {
  R *stats, *norm_weight, *norm_bias, *conv_bias, *gamma, *beta, *slope;
};

// coef: [7][N][C].
template <class R>
void block_coefficients(const BlockShape& shape, const BlockTensors<R>& in, R* coef);

template <class R>
void block_coefficients_backward(const BlockShape& shape, const BlockTensors<R>& in, const R* dcoef,
                                 const BlockGradients<R>& out);

}  // namespace fastfilm
