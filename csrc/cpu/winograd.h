// Convolutions by Winograd's minimal filtering, F(2 x 2, 3 x 3) (Lavin and Gray 2016), with 16 products for the 36 of
// the direct sum.
#pragma once

#include "convolution.h"

namespace fastfilm {

// Floats of a transformed weight: [blocks][16][KD * Ci][channels of a block].
int64_t winograd_weights(const Convolution& conv);
void transform_winograd(const Convolution& conv, const float* weight, float* transformed, int threads);

// `convolve` for float32, kernels of 3 x 3 positions along the last two axes and a transformed weight. The sums of a
// tile of 2 x 2 positions are taken over channels and planes in the transformed domain, in an order that does not
// depend on the number of threads.
void convolve_winograd(const Convolution& conv, const float* x, const float* transformed, const float* bias,
                       const float* coef, Activation act, float* y, int threads);

}  // namespace fastfilm
