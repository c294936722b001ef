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

template <class T>
struct SumRows {
  struct Params {
    const float* partials;
    int64_t rows, width;
    T* out;
  };
  static constexpr int kThreads = kMergeThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const int64_t column = static_cast<int64_t>(block_index().x) * kColumns + thread_index() % kColumns;
    const bool valid = column < p.width;
    const float* at = p.partials + (valid ? column : 0);
    const double sum = column_sum(p.rows, scratch, [&](int64_t row) -> double { return at[row * p.width]; });
    if (valid && thread_index() < kColumns) from_float(static_cast<float>(sum), p.out[column]);
  }
};

template <class T>
std::string sum_rows_of(const float* partials, int64_t rows, int64_t width, void* out, Stream stream) {
  const Grid grid{static_cast<int>((width + kColumns - 1) / kColumns), 1, 1};
  return launched("sum_rows", launch<SumRows<T>>(grid, kMergeScratch, stream, {partials, rows, width, static_cast<T*>(out)}));
}

Grid columns_grid(int64_t n, int64_t c) {
  return {static_cast<int>((c + kColumns - 1) / kColumns), static_cast<int>(n), 1};
}

}  // namespace

std::string finish_moments(const float* partials, const float* counts, int64_t n, int slots, int64_t c, float* stats,
                           Stream stream) {
  return launched("finish_moments", launch<FinishMoments>(columns_grid(n, c), kMergeScratch, stream,
                                                          {partials, counts, n, slots, c, stats}));
}

std::string finish_coefficients(const float* partials, const float* coef, int64_t n, int slots, int64_t c,
                                float* dcoef, Stream stream) {
  return launched("finish_coefficients", launch<FinishCoefficients>(columns_grid(n, c), kMergeScratch, stream,
                                                                    {{partials, n, slots, c}, {coef, dcoef, c}}));
}

std::string sum_rows(const float* partials, int64_t rows, int64_t width, int storage, void* out, Stream stream) {
  switch (storage) {
    case kBFloat16:
      return sum_rows_of<BFloat16>(partials, rows, width, out, stream);
    case kFloat16:
      return sum_rows_of<Float16>(partials, rows, width, out, stream);
    default:
      return sum_rows_of<float>(partials, rows, width, out, stream);
  }
}

}  // namespace fastfilm::cuda
