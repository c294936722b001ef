// Convolutions by Winograd's minimal filtering, F(2x2, 3x3) (Lavin and Gray 2016): 16 products where the direct sum
// has 36.
#pragma once

#include "convolution.h"

namespace fastfilm {

// Floats of a weight that is transformed: [blocks][16][KD * Ci][channels of a block].
int64_t winograd_weights(const Convolution& conv);
void transform_winograd(const Convolution& conv, const float* weight, float* transformed, int threads);

// As `convolve`, for float32, kernels of 3 x 3 positions along the last two axes and a transformed weight. The sums of a
// tile of 2 x 2 positions are taken over channels (and planes) in the transformed domain, whatever the number of threads.
void convolve_winograd(const Convolution& conv, const float* x, const float* transformed, const float* bias,
                       const float* coef, Activation act, float* y, int threads);

}  // namespace fastfilm
