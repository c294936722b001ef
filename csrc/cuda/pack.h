// Weights in the order and arrangement in which the convolution kernel copies them: for each class, block of output
// channels, block of input channels and depth of the taps one slab [taps, bn, bk], swizzled and padded with zeros.
#pragma once

#include "calls.h"

namespace fastfilm::cuda {

// `backward`: rows are the layer's input channels, columns its output channels.
std::string pack_weights(const ConvPlan& plan, int storage, const Weight& weight, bool backward, void* packed,
                         Stream stream);

inline int64_t packed_bytes(const ConvPlan& plan, int storage) {
  return (plan.packed * bytes_of(storage) + 255) / 256 * 256;
}

}  // namespace fastfilm::cuda
