// Packed weights: a copy of a weight in the order in which the convolution kernel loads it.
//
// It has one slab [taps, bn, bk] for each class of output voxels, block of output channels, block of input channels and
// depth of the taps, swizzled (slab.h) and padded with zeros.
#pragma once

#include "calls.h"

namespace fastfilm::cuda {

// Packs a weight on the GPU. With `backward` rows are the layer's input channels and columns its output channels. Sets
// the plan's counters to 0 for the convolution that follows.
std::string pack_weights(const ConvPlan& plan, int storage, const Weight& weight, bool backward, void* packed,
                         unsigned* counters, Stream stream);

// A counter of the blocks that are done for each sample and block of channels of the result (`last_block`).
inline int counters_of(const ConvPlan& plan) { return static_cast<int>(plan.n) * plan.blocks_n; }

inline int64_t packed_bytes(const ConvPlan& plan, int storage) {
  return (plan.packed * bytes_of(storage) + 255) / 256 * 256;
}

}  // namespace fastfilm::cuda
