// The [N, C]-sized algebra of a block in one call each way: moments, norm weights, running statistics, gamma,
// beta and dropout mask to the rows a, b, g, s, p, q, slope, and the gradients back.
#pragma once

#include <cstdint>

#include "kernels.h"

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

// Numbers of any storage type; null where absent.
struct Numbers {
  void* data = nullptr;
  Storage type = kFloat32;

  explicit operator bool() const { return data != nullptr; }
};

// Vectors [C], or [rows][C] with rows 1 or N; the moments are [2][N][C]. As `in`: null where absent; as
// gradients: null where not wanted.
struct BlockTensors {
  Numbers running_mean, running_var, stats, norm_weight, norm_bias, conv_bias, gamma, beta, mask, slope;
  int64_t gamma_rows = 1, beta_rows = 1, mask_rows = 1, slope_count = 1;
};

// coef and dcoef: [7][N][C], of one type; pivots are rounded to it.
void block_coefficients(const BlockShape& shape, const BlockTensors& in, const Numbers& coef);
void block_coefficients_backward(const BlockShape& shape, const BlockTensors& in, const Numbers& dcoef,
                                 const BlockTensors& out);

}  // namespace fastfilm
