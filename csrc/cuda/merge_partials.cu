// The kernels that merge partial results; merge_partials.h has their order.
#include "merge_partials.h"

#include "merge.h"

namespace fastfilm::cuda {
namespace {

constexpr int kColumns = kMergeColumns;

struct FinishMoments {
  using Params = MomentsMerge;
  static constexpr int kThreads = kMergeThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    p.run(block_index().y, static_cast<int64_t>(block_index().x) * kColumns);
  }
};

struct FinishCoefficients {
  struct Params {
    CoefficientsMerge sums;
    CoefficientsGradient to;
  };
  static constexpr int kThreads = kMergeThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    const int64_t channel = merge_channel(static_cast<int64_t>(block_index().x) * kColumns);
    p.sums.run(block_index().y, channel, p.to, channel, channel < p.to.channels);
  }
};

struct SumRows {
  struct Params {
    const float* partials;
    int64_t rows, width;
    float* out;
  };
  static constexpr int kThreads = kMergeThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    const int64_t column = merge_channel(static_cast<int64_t>(block_index().x) * kColumns);
    const float sum = row_sum(p.partials, p.rows, p.width, column);
    if (column < p.width && writes_merged()) p.out[column] = sum;
  }
};

Grid columns_grid(int64_t n, int64_t c) {
  return {static_cast<int>((c + kColumns - 1) / kColumns), static_cast<int>(n), 1};
}

}  // namespace

std::string finish_moments(const float* partials, const float* counts, int64_t n, int slots, int64_t c, float* stats,
                           Stream stream) {
  return launched("finish_moments", launch<FinishMoments>(columns_grid(n, c), kMergeScratch, stream,
                                                          {partials, counts, n, slots, c, stats}));
}

std::string finish_coefficients(const float* partials, const float* coef, int64_t n, int slots, int64_t c, float* dcoef,
                                Stream stream) {
  return launched("finish_coefficients", launch<FinishCoefficients>(columns_grid(n, c), kMergeScratch, stream,
                                                                    {{partials, n, slots, c}, {coef, dcoef, c}}));
}

std::string sum_rows(const float* partials, int64_t rows, int64_t width, float* out, Stream stream) {
  return launched("sum_rows",
                  launch<SumRows>(columns_grid(1, width), kMergeScratch, stream, {partials, rows, width, out}));
}

}  // namespace fastfilm::cuda
