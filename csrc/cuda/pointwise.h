// Passes over a channels-last map [N, S, C]: the pending affine, the moments, and their gradients.
//
// Sums are taken within each block first, then over the blocks, in a fixed order. Each function returns an empty
// string, or the reason why the runtime refused the launch, with the kernel's name in front.
#pragma once

#include "types.h"

namespace fastfilm::cuda {

struct Map {
  int storage, act;
  int64_t n, s, c;
  Stream stream;
};

// float32 numbers of the workspace that `apply_backward`, `moments` and `moments_backward` need.
int64_t reduction_workspace(const Map& map);

// v = g * (act(a * (y - p) + b) - q) + s; v may be y.
std::string apply(const Map& map, const void* y, const float* coef, void* v);
// dy (may be dv; null: not wanted) and dcoef [7, N, C].
std::string apply_backward(const Map& map, const void* dv, const void* y, const float* coef, void* dy, float* dcoef,
                           float* workspace);
// stats [2, N, C] of act(y + shift; slope); pre [2, C] holds both, or is null: of y itself.
std::string moments(const Map& map, const void* y, const float* pre, float* stats, float* workspace);
// e = dy + gradient through the moments (dy may be null), and dpre [2, C] (null without pre).
std::string moments_backward(const Map& map, const void* dy, const float* dstats, const void* y, const float* stats,
                             const float* pre, void* e, float* dpre, float* workspace);

}  // namespace fastfilm::cuda
