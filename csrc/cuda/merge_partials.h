// Merging of partial results by kernels of their own. Each block of a kernel writes its results to a slot of its own;
// these functions add the slots in a fixed order, in double. Where a convolution's last block does so, merge.h has it.
#pragma once

#include "types.h"

namespace fastfilm::cuda {

// Means and sums of squared deviations [N, slots, 2, C] with counts [N, slots] -> mean and biased variance [2, N, C].
std::string finish_moments(const float* partials, const float* counts, int64_t n, int slots, int64_t c, float* stats,
                           Stream stream);
// The sums CoefSum [N, slots, 5, C] -> gradients [7, N, C] at the coefficients.
std::string finish_coefficients(const float* partials, const float* coef, int64_t n, int slots, int64_t c, float* dcoef,
                                Stream stream);
// Sums over the rows: [rows, width] -> [width].
std::string sum_rows(const float* partials, int64_t rows, int64_t width, float* out, Stream stream);

}  // namespace fastfilm::cuda
