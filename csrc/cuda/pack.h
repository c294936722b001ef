// Packed weights: a copy of a weight in the order in which the convolution kernel loads it.
//
// It has one slab [taps, bn, bk] for each class of output voxels, block of output channels, block of input channels and
// depth of the taps, swizzled (slab.h) and padded with zeros.
#pragma once

#include "calls.h"

namespace fastfilm::cuda {

// A weight to pack for the convolution of a layout. With `backward` rows are the layer's input channels and columns its output
// channels.
template <class Plan>
struct Packing {
  const Plan* plan;  // null: there is nothing to pack
  Weight weight;
  bool backward;
  void* packed;
  unsigned* counters;  // are set to 0 for the convolution
};

// Further work of a launch that packs.
struct Beside {
  WeightSums left;  // takes the sums that are left of a gradient at a weight
  Block block;  // computes coefficients, of a map with n samples and c channels
  int64_t n, c;
};

// Packs a weight and does the further work, in one launch.
template <class Plan>
std::string prepare(const Packing<Plan>& packing, const Beside& beside, int storage, Stream stream);

// A counter of the blocks of threads that are done for each sample and block of channels of the result (`last_block`),
// and one of the samples that are done for each block of channels.
template <class Plan>
int counters_of(const Plan& plan) {
  return static_cast<int>(plan.n + 1) * plan.blocks_n;
}

template <class Plan>
int64_t packed_bytes(const Plan& plan, int storage) {
  return (plan.packed * bytes_of(storage) + 255) / 256 * 256;
}

}  // namespace fastfilm::cuda
