// The algebra of a block's coefficients, all of size [N, C], in one call each way: from moments, norm weights, running
// statistics, gamma, beta and dropout mask to the rows a, b, g, s, p, q, slope, and from their gradients back.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fastfilm {

enum Norm { kNormNone, kNormBatch, kNormInstance, kNormGroup, kNorms };
enum Order { kNormFilmAct, kNormActFilm, kActNormFilm, kOrders };
enum DropoutPosition { kDropoutEnd, kDropoutFilm, kDropoutNorm, kDropoutPositions };

// The form of a block. `groups`: groups of a sample (1: layer norm). `use_input`: the norm takes the statistics of the
// map, else the running ones. `update`: the running statistics are moved.
struct BlockShape {
  Norm norm;
  Order order;
  DropoutPosition position;
  bool use_input, update;
  int64_t n, c, groups;
  double count;  // values of one channel in a sample
  double eps, momentum, slope;
};

// An array of numbers of any storage type; null: absent.
struct Numbers {
  void* data = nullptr;
  Storage type = kFloat32;

  explicit operator bool() const { return data != nullptr; }
};

// The inputs of the algebra, or the gradients at them: vectors [C], or [rows][C] with rows 1 or N; the moments `stats`
// are [2][N][C]. A null input is absent, a null gradient not wanted.
struct BlockTensors {
  Numbers running_mean, running_var, stats, norm_weight, norm_bias, conv_bias, gamma, beta, mask, slope;
  int64_t gamma_rows = 1, beta_rows = 1, mask_rows = 1, slope_count = 1;
};

// coef and dcoef: [7][N][C], of one type; pivots are rounded to it.
void block_coefficients(const BlockShape& shape, const BlockTensors& in, const Numbers& coef);
void block_coefficients_backward(const BlockShape& shape, const BlockTensors& in, const Numbers& dcoef,
                                 const BlockTensors& out);

}  // namespace fastfilm
