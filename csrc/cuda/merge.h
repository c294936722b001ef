// Merging of partial results inside a kernel, in a fixed order and in double: by a kernel of its own, or by the last
// block of threads that wrote some.
#pragma once

#include "affine.h"

namespace fastfilm::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeColumns = 32;  // channels at a time
constexpr int kMergeScratch = kMergeThreads * static_cast<int>(sizeof(double));

// True in all threads of the last of `blocks` blocks that call it with this counter, which is 0 before the first: results
// that the others wrote before may be read after it. In each run another block may be the last; its result must be
// the same. It uses the first bytes of shared memory.
FF_DEVICE bool last_block(unsigned* counter, int blocks) {
  fence();
  barrier();
  int* last = reinterpret_cast<int*>(shared_memory());
  if (thread_index() == 0) *last = arrive(counter) == static_cast<unsigned>(blocks) - 1;
  barrier();
  const bool found = *last;
  fence();
  barrier();
  return found;
}

// The sum of f(slot) over all slots. The threads of a column share the slots out, and each returns the whole sum.
template <class F>
FF_DEVICE double column_sum(int64_t slots, double* scratch, F f) {
  constexpr int kRows = kMergeThreads / kMergeColumns;
  const int t = thread_index();
  double sum = 0;
  for (int64_t slot = t / kMergeColumns; slot < slots; slot += kRows) sum += f(slot);
  scratch[t] = sum;
  barrier();
  sum = 0;
  for (int r = 0; r < kRows; ++r) sum += scratch[r * kMergeColumns + t % kMergeColumns];
  barrier();
  return sum;
}

// The sum of column `column` of [rows, width], in all threads of the column.
FF_DEVICE float row_sum(const float* partials, int64_t rows, int64_t width, int64_t column) {
  const float* at = partials + (column < width ? column : 0);
  const auto term = [&](int64_t row) -> double { return at[row * width]; };
  return static_cast<float>(column_sum(rows, reinterpret_cast<double*>(shared_memory()), term));
}

// The channel of this thread of the kMergeColumns from `first` on, and whether it writes that channel's result.
FF_DEVICE int64_t merge_channel(int64_t first) { return first + thread_index() % kMergeColumns; }
FF_DEVICE bool writes_merged() { return thread_index() < kMergeColumns; }

// Means and sums of squared deviations [N, slots, 2, C] with counts [N, slots] -> mean and biased variance [2, N, C].
struct MomentsMerge {
  const float *partials, *counts;
  int64_t n, slots, c;
  float* stats;

  // Those of sample `sample` and of the channels from `first` on.
  FF_DEVICE void run(int64_t sample, int64_t first) const {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const int64_t channel = merge_channel(first);
    const bool valid = channel < c;
    const float* weights = counts + sample * slots;
    const float* at = partials + sample * slots * 2 * c + (valid ? channel : 0);
    const double total = column_sum(slots, scratch, [&](int64_t slot) -> double { return weights[slot]; });
    const double mean = column_sum(slots, scratch, [&](int64_t slot) {
      return static_cast<double>(weights[slot]) * at[slot * 2 * c];
    }) / total;
    const double m2 = column_sum(slots, scratch, [&](int64_t slot) {
      const double delta = at[slot * 2 * c] - mean;
      return at[(slot * 2 + 1) * c] + weights[slot] * delta * delta;
    });
    if (valid && writes_merged()) {
      stats[sample * c + channel] = static_cast<float>(mean);
      stats[(n + sample) * c + channel] = static_cast<float>(m2 / total);
    }
  }
};

// Coefficients [7, N, channels] and where the gradients at them go.
struct CoefficientsGradient {
  const float* coef;
  float* dcoef;
  int64_t channels;
};

// The sums CoefSum [N, slots, 5, pitch] -> gradients at the coefficients.
struct CoefficientsMerge {
  const float* partials;
  int64_t n, slots, pitch;

  // Those of sample `sample`. A thread has the sums of channel `from`, which is channel `channel` of `to` if `valid`.
  FF_DEVICE void run(int64_t sample, int64_t from, const CoefficientsGradient& to, int64_t channel, bool valid) const {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const float* at = partials + sample * slots * kCoefSums * pitch + (valid ? from : 0);
    const int64_t row = n * to.channels, here = sample * to.channels + channel;
    // one sum after another: the kernels that merge have few registers left
#pragma unroll 1
    for (int r = 0; r < kCoefSums; ++r) {
      const double sum = column_sum(slots, scratch,
                                    [&](int64_t slot) -> double { return at[(slot * kCoefSums + r) * pitch]; });
      if (!valid || !writes_merged()) continue;
      const int to_row = r == kSumDvH ? kG : r == kSumDv ? kS : r == kSumDzY ? kA : r == kSumDz ? kB : kSlope;
      to.dcoef[to_row * row + here] = static_cast<float>(sum);
      // the pivots' gradients
      if (r == kSumDz) to.dcoef[kP * row + here] = static_cast<float>(-to.coef[kA * row + here] * sum);
      if (r == kSumDv) to.dcoef[kQ * row + here] = static_cast<float>(-to.coef[kG * row + here] * sum);
    }
  }
};

}  // namespace fastfilm::cuda
