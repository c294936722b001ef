// Passes over channels-last feature maps [N, S, C] on the CPU, and the choice of the instruction set.
//
// The functions cut a map into chunks, share these out to threads, and add the chunks' sums in a fixed order.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fastfilm {

// A dense map [N, S, C], its storage type, and the activation of the pass.
struct Map {
  Storage storage;
  Activation act;
  int64_t n, s, c;
  int threads;
};

// Coefficients, moments and their gradients are float, or double for float64 storage.
void apply(const Map& map, const void* y, void* v, const void* coef);
void apply_backward(const Map& map, const void* dv, const void* y, const void* coef, void* dy, void* dcoef);
void moments(const Map& map, const void* y, const void* pre, void* stats);
void moments_backward(const Map& map, const void* dy, const void* dstats, const void* y, const void* stats,
                      const void* pre, void* e, void* dpre);

// The kernels of the instruction sets that this machine has, best first. The first is used until `use_kernels` names
// another.
int available_kernels(const Kernels* const** list);
const Kernels& current_kernels();
bool use_kernels(const char* name);

}  // namespace fastfilm
