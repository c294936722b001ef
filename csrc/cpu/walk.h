// The walk of a pass over a channels-last map: its chunks, its threads, and rows of elements that share their
// coefficients.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "driver.h"
#include "pages.h"
#include "threads.h"

namespace fastfilm {

// A map is cut into chunks whose size depends on its shape only, so the order of every sum, and every bit of the
// result, is the same for any number of threads.
constexpr int64_t kChunk = 16384;
constexpr int64_t kChunksPerSample = 256;
constexpr int64_t kParallelFrom = 65536;
constexpr int64_t kMinPeriod = 32;
// Elements of a block, within which coefficients stay in registers. With fewer elements a pass reads memory more nearly
// in order; passes with sums take more.
constexpr int64_t kPlainBlock = 256;
constexpr int64_t kSumBlock = 2048;
constexpr int64_t kMaxBlockRows = 32;
constexpr int64_t kMaxPeriod = 4096;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The walk over a sample of S * C elements: rows of `period` elements (whole positions, and whole vectors where that is
// possible) that share one expanded row of coefficients, `chunk_rows` rows to a chunk.
struct Plan {
  const Kernels& kernels;
  int64_t itemsize, real_size, lanes;
  int64_t sample, period, padded, sum_block, plain_block, chunk_rows, chunks;
  int threads;

  explicit Plan(const Map& map) : kernels(current_kernels()) {
    const bool wide = map.storage == kFloat64;
    itemsize = wide ? 8 : map.storage == kFloat32 ? 4 : 2;
    real_size = wide ? 8 : 4;
    lanes = kernels.vector_bytes / real_size;
    sample = map.s * map.c;
    int64_t repeat = lanes / std::gcd(map.c, lanes);
    if (repeat * map.c > kMaxPeriod) repeat = 1;
    repeat *= std::max<int64_t>(1, kMinPeriod / (repeat * map.c));
    repeat = std::max<int64_t>(1, std::min(repeat, map.s));
    period = repeat * map.c;
    padded = ceil_div(period, lanes) * lanes;
    sum_block = std::clamp<int64_t>(kSumBlock / period, 8, kMaxBlockRows);
    plain_block = std::clamp<int64_t>(kPlainBlock / period, 2, 4);
    const int64_t chunk = std::max({grain(kChunk), grain(64) * map.c, ceil_div(sample, kChunksPerSample)});
    chunk_rows = ceil_div(ceil_div(chunk, period), kMaxBlockRows) * kMaxBlockRows;
    chunks = ceil_div(sample, chunk_rows * period);
    threads = map.n * sample > grain(kParallelFrom) ? map.threads : 1;
    threads = static_cast<int>(std::min<int64_t>(threads, map.n * chunks));
  }

  int64_t chunk_start(int64_t i) const { return i * chunk_rows * period; }
  int64_t chunk_size(int64_t i) const { return std::min(chunk_rows * period, sample - chunk_start(i)); }
};

// Rows of coefficients [rows][N][C] repeated over the period: [N][rows][padded].
template <class R>
class Expanded {
 public:
  Expanded(const Plan& plan, int64_t rows, int64_t n, int64_t c, const R* source)
      : stride_(plan.padded), per_sample_(rows * plan.padded), storage_(new R[n * per_sample_]) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < rows; ++k) {
        R* to = storage_.get() + i * per_sample_ + k * stride_;
        const R* from = source + (k * n + i) * c;
        for (int64_t j = 0; j < stride_; j += c) {
          std::memcpy(to + j, from, std::min(c, stride_ - j) * sizeof(R));
        }
      }
    }
  }
  const R* sample(int64_t i) const { return storage_.get() + i * per_sample_; }

 private:
  int64_t stride_, per_sample_;
  std::unique_ptr<R[]> storage_;
};

// A pointer `at` bytes behind p; null stays null.
inline const void* offset(const void* p, int64_t at) { return p ? static_cast<const char*>(p) + at : nullptr; }
inline void* offset(void* p, int64_t at) { return p ? static_cast<char*>(p) + at : nullptr; }

// Runs the kernel on the last vector of each row, where a row is not a whole number of vectors, by way of padded
// copies.
inline void run_partial(const Plan& plan, StripKernel kernel, const Strip& strip, int64_t count, int64_t sum_rows) {
  constexpr int kVector = 64;
  alignas(64) char y[kMaxBlockRows * kVector] = {}, dv[kMaxBlockRows * kVector] = {};
  alignas(64) char out[kMaxBlockRows * kVector];
  alignas(64) char y2[kMaxBlockRows * kVector] = {}, out2[kMaxBlockRows * kVector];
  const int64_t bytes = count * plan.itemsize, step = plan.lanes * plan.itemsize;
  const int64_t pitch = strip.stride * plan.itemsize;
  for (int64_t row = 0; row < strip.rows; row += strip.block) {
    double sums[kResidualSums * kVector / 4] = {};
    Strip padded = strip;
    padded.rows = std::min(strip.block, strip.rows - row);
    padded.width = padded.stride = padded.sum_stride = plan.lanes;
    padded.y = y;
    padded.dv = strip.dv ? dv : nullptr;
    padded.out = out;
    padded.y2 = strip.y2 ? y2 : nullptr;
    padded.out2 = strip.out2 ? out2 : nullptr;
    padded.sums = strip.sums ? sums : nullptr;
    for (int64_t r = 0; r < padded.rows; ++r) {
      std::memcpy(y + r * step, offset(strip.y, (row + r) * pitch), bytes);
      if (strip.dv) std::memcpy(dv + r * step, offset(strip.dv, (row + r) * pitch), bytes);
      if (strip.y2) std::memcpy(y2 + r * step, offset(strip.y2, (row + r) * pitch), bytes);
    }
    kernel(padded);
    for (int64_t r = 0; strip.out && r < padded.rows; ++r) {
      std::memcpy(offset(strip.out, (row + r) * pitch), out + r * step, bytes);
    }
    for (int64_t r = 0; strip.out2 && r < padded.rows; ++r) {
      std::memcpy(offset(strip.out2, (row + r) * pitch), out2 + r * step, bytes);
    }
    for (int64_t k = 0; strip.sums && k < sum_rows; ++k) {
      for (int64_t j = 0; j < count; ++j) {
        strip.sums[k * strip.sum_stride + j] += sums[k * plan.lanes + j];
      }
    }
  }
}

// Runs the kernel on `rows` rows of `width` elements, each of which begins at channel 0.
inline void run_rows(const Plan& plan, StripKernel kernel, Strip strip, int64_t rows, int64_t width, int64_t sum_rows) {
  if (rows == 0 || width == 0) return;
  strip.rows = rows;
  strip.stride = plan.period;
  strip.block = strip.sums ? plan.sum_block : plan.plain_block;
  strip.width = width / plan.lanes * plan.lanes;
  if (strip.width) kernel(strip);
  const int64_t j = strip.width;
  if (j == width) return;
  strip.y = offset(strip.y, j * plan.itemsize);
  strip.dv = offset(strip.dv, j * plan.itemsize);
  strip.out = offset(strip.out, j * plan.itemsize);
  strip.y2 = offset(strip.y2, j * plan.itemsize);
  strip.out2 = offset(strip.out2, j * plan.itemsize);
  strip.coef = offset(strip.coef, j * plan.real_size);
  if (strip.sums) strip.sums += j;
  run_partial(plan, kernel, strip, width - j, sum_rows);
}

// Runs the kernel on `elements` consecutive elements: whole periods, then the rest.
inline void run(const Plan& plan, StripKernel kernel, Strip strip, int64_t elements, int64_t sum_rows) {
  const int64_t rows = elements / plan.period, done = rows * plan.period;
  run_rows(plan, kernel, strip, rows, plan.period, sum_rows);
  strip.y = offset(strip.y, done * plan.itemsize);
  strip.dv = offset(strip.dv, done * plan.itemsize);
  strip.out = offset(strip.out, done * plan.itemsize);
  strip.y2 = offset(strip.y2, done * plan.itemsize);
  strip.out2 = offset(strip.out2, done * plan.itemsize);
  run_rows(plan, kernel, strip, 1, elements - done, sum_rows);
}

// Adds the sums of a chunk over the positions of the period: [rows][padded] -> [rows][C].
inline void fold(const Plan& plan, int64_t c, int64_t rows, const double* sums, double* to) {
  for (int64_t k = 0; k < rows; ++k, sums += plan.padded, to += c) {
    std::copy(sums, sums + c, to);
    for (int64_t j = c; j < plan.period; j += c) {
      for (int64_t i = 0; i < c; ++i) to[i] += sums[j + i];
    }
  }
}

// Walks the whole map; returns the sums of each chunk, [N][chunks][sum_rows][C].
template <class R>
std::vector<double> walk(const Map& map, const Plan& plan, StripKernel kernel, const void* y, const void* dv, void* out,
                         const Expanded<R>& coef, int64_t sum_rows, const void* y2 = nullptr, void* out2 = nullptr) {
  const size_t bytes = map.n * plan.sample * plan.itemsize;
  if (out && out != y && out != dv) expect_large_pages(out, bytes);
  if (out2) expect_large_pages(out2, bytes);
  const int64_t scratch = sum_rows * plan.padded;
  std::vector<double> sums(scratch * plan.threads);
  std::vector<double> partial(map.n * plan.chunks * sum_rows * map.c);
  parallel_for(map.n * plan.chunks, plan.threads, [&](int64_t task, int thread) {
    const int64_t i = task / plan.chunks, chunk = task % plan.chunks;
    const int64_t at = (i * plan.sample + plan.chunk_start(chunk)) * plan.itemsize;
    double* acc = sum_rows ? sums.data() + thread * scratch : nullptr;
    std::fill(acc, acc + scratch, 0.0);
    run(plan, kernel,
        {offset(y, at), offset(dv, at), offset(out, at), 0, 0, 0, 0, coef.sample(i), plan.padded, acc, plan.padded,
         offset(y2, at), offset(out2, at)},
        plan.chunk_size(chunk), sum_rows);
    fold(plan, map.c, sum_rows, acc, partial.data() + task * sum_rows * map.c);
  });
  return partial;
}

}  // namespace fastfilm
