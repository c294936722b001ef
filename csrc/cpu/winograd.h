// Convolutions by Winograd's minimal filtering, F(2x2, 3x3) (Lavin and Gray 2016): 16 products where the direct sum
// has 36.
#pragma once

#include "convolution.h"

namespace fastfilm {

// As `convolve`, for float32 and kernels of 3 x 3 positions along the last two axes. The sums of a tile of 2 x 2
// positions are taken over channels (and planes) in the transformed domain, whatever the number of threads.
void convolve_winograd(const Convolution& conv, const float* x, const float* weight, const float* bias,
                       const float* coef, Activation act, float* y, int threads);

}  // namespace fastfilm
