// The kernels that merge partial results; merge_partials.h has their order.
#include "merge_partials.h"

#include "affine.h"
#include "pointwise.h"

namespace fastfilm::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kThreads = 256;
constexpr int kRowThreads = kThreads / kColumns;

// The sum of f(slot) over all slots. The threads of a column share the slots out, and each returns the whole sum.
template <class F>
FF_DEVICE double column_sum(int64_t slots, double* scratch, F f) {
  const int t = thread_index();
  double sum = 0;
  for (int64_t slot = t / kColumns; slot < slots; slot += kRowThreads) sum += f(slot);
  scratch[t] = sum;
  barrier();
  sum = 0;
  for (int r = 0; r < kRowThreads; ++r) sum += scratch[r * kColumns + t % kColumns];
  barrier();
  return sum;
}

constexpr int kScratch = kThreads * static_cast<int>(sizeof(double));

struct FinishMoments {
  struct Params {
    const float *partials, *counts;
    int64_t n, slots, c;
    float* stats;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const int64_t n = block_index().y, c = static_cast<int64_t>(block_index().x) * kColumns + thread_index() % kColumns;
    const bool valid = c < p.c;
    const float* counts = p.counts + n * p.slots;
    const float* at = p.partials + n * p.slots * 2 * p.c + (valid ? c : 0);
    const double total = column_sum(p.slots, scratch, [&](int64_t slot) -> double { return counts[slot]; });
    const double mean = column_sum(p.slots, scratch, [&](int64_t slot) {
                          return static_cast<double>(counts[slot]) * at[slot * 2 * p.c];
                        }) / total;
    const double m2 = column_sum(p.slots, scratch, [&](int64_t slot) {
      const double delta = at[slot * 2 * p.c] - mean;
      return at[(slot * 2 + 1) * p.c] + counts[slot] * delta * delta;
    });
    if (valid && thread_index() < kColumns) {
      p.stats[n * p.c + c] = static_cast<float>(mean);
      p.stats[(p.n + n) * p.c + c] = static_cast<float>(m2 / total);
    }
  }
};

struct FinishCoefficients {
  struct Params {
    const float *partials, *coef;
    int64_t n, slots, c, pitch;
    float* dcoef;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const int64_t n = block_index().y, c = static_cast<int64_t>(block_index().x) * kColumns + thread_index() % kColumns;
    const bool valid = c < p.c;
    const float* at = p.partials + n * p.slots * kCoefSums * p.pitch + (valid ? c : 0);
    double sums[kCoefSums];
#pragma unroll
    for (int r = 0; r < kCoefSums; ++r) {
      sums[r] = column_sum(p.slots, scratch,
                           [&](int64_t slot) -> double { return at[(slot * kCoefSums + r) * p.pitch]; });
    }
    if (valid && thread_index() < kColumns) {
      const int64_t row = p.n * p.c, here = n * p.c + c;
      p.dcoef[kA * row + here] = static_cast<float>(sums[kSumDzY]);
      p.dcoef[kB * row + here] = static_cast<float>(sums[kSumDz]);
      p.dcoef[kG * row + here] = static_cast<float>(sums[kSumDvH]);
      p.dcoef[kS * row + here] = static_cast<float>(sums[kSumDv]);
      p.dcoef[kP * row + here] = static_cast<float>(-p.coef[kA * row + here] * sums[kSumDz]);
      p.dcoef[kQ * row + here] = static_cast<float>(-p.coef[kG * row + here] * sums[kSumDv]);
      p.dcoef[kSlope * row + here] = static_cast<float>(sums[kSumSlope]);
    }
  }
};

template <class T>
struct SumRows {
  struct Params {
    const float* partials;
    int64_t rows, width;
    T* out;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 1;

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
  return launched("sum_rows", launch<SumRows<T>>(grid, kScratch, stream, {partials, rows, width, static_cast<T*>(out)}));
}

Grid columns_grid(int64_t n, int64_t c) {
  return {static_cast<int>((c + kColumns - 1) / kColumns), static_cast<int>(n), 1};
}

}  // namespace

std::string finish_moments(const float* partials, const float* counts, int64_t n, int slots, int64_t c, float* stats,
                           Stream stream) {
  return launched("finish_moments", launch<FinishMoments>(columns_grid(n, c), kScratch, stream,
                                                          {partials, counts, n, slots, c, stats}));
}

std::string finish_coefficients(const float* partials, int64_t pitch, const float* coef, int64_t n, int slots,
                                int64_t c, float* dcoef, Stream stream) {
  return launched("finish_coefficients", launch<FinishCoefficients>(columns_grid(n, c), kScratch, stream,
                                                                    {partials, coef, n, slots, c, pitch, dcoef}));
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
