// Second stages: partial results, one slot a block, added in a fixed order and in double.
#pragma once

#include "types.h"

namespace fastfilm::cuda {

// means and m2 [N, slots, 2, C] with counts [N, slots] -> mean and biased variance [2, N, C].
std::string finish_moments(const float* partials, const float* counts, int64_t n, int slots, int64_t c, float* stats,
                           Stream stream);
// sums [N, slots, 5, C] of CoefSum, the channels among `pitch` ones -> gradients [7, N, C] at the coefficients.
std::string finish_coefficients(const float* partials, int64_t pitch, const float* coef, int64_t n, int slots,
                                int64_t c, float* dcoef, Stream stream);
// [rows, width] -> [width] in a storage type.
std::string sum_rows(const float* partials, int64_t rows, int64_t width, int storage, void* out, Stream stream);

}  // namespace fastfilm::cuda
