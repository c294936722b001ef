// The passes over a map: the pending affine, the moments, and their gradients; driver.h has the interface.
#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "walk.h"

namespace fastfilm {
namespace {

template <class R>
void apply_as(const Map& map, const void* y, void* v, const R* coef) {
  const Plan plan(map);
  const Expanded<R> expanded(plan, kCoefRows, map.n, map.c, coef);
  walk(map, plan, plan.kernels.apply[map.storage][map.act], y, nullptr, v, expanded, 0);
}

template <class R>
void apply_backward_as(const Map& map, const void* dv, const void* y, const R* coef, void* dy, R* dcoef) {
  const Plan plan(map);
  const Expanded<R> expanded(plan, kCoefRows, map.n, map.c, coef);
  const auto partial = walk(map, plan, plan.kernels.apply_backward[map.storage][map.act], y, dv, dy, expanded,
                            kApplySums);
  const int64_t rows = map.n * map.c;
  for (int64_t i = 0; i < map.n; ++i) {
    for (int64_t c = 0; c < map.c; ++c) {
      double sums[kApplySums] = {};
      const double* from = partial.data() + i * plan.chunks * kApplySums * map.c + c;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        for (double& sum : sums) sum += *from, from += map.c;
      }
      const int64_t at = i * map.c + c;
      const double a = coef[kA * rows + at], g = coef[kG * rows + at];
      dcoef[kA * rows + at] = static_cast<R>(sums[kSumDzY]);
      dcoef[kB * rows + at] = static_cast<R>(sums[kSumDz]);
      dcoef[kG * rows + at] = static_cast<R>(sums[kSumDvH]);
      dcoef[kS * rows + at] = static_cast<R>(sums[kSumDv]);
      dcoef[kP * rows + at] = static_cast<R>(-a * sums[kSumDz]);
      dcoef[kQ * rows + at] = static_cast<R>(-g * sums[kSumDv]);
      dcoef[kSlope * rows + at] = static_cast<R>(sums[kSumSlope]);
    }
  }
}

template <class R>
void moments_as(const Map& map, const void* y, const R* pre, R* stats) {
  const Plan plan(map);
  const StripKernel kernel = plan.kernels.moments[map.storage][map.act];
  const int64_t c = map.c, width = plan.padded;
  std::vector<R> rows(kMomentsRows * c);
  if (pre) std::copy(pre, pre + 2 * c, rows.begin());
  const Expanded<R> expanded(plan, kMomentsRows, 1, c, rows.data());
  std::vector<double> sums(kMomentsSums * width * plan.threads);
  std::vector<R> coefs(kMomentsRows * width * plan.threads);
  std::vector<double> partial(map.n * plan.chunks * 2 * c);
  parallel_for(map.n * plan.chunks, plan.threads, [&](int64_t task, int thread) {
    const int64_t chunk = task % plan.chunks, size = plan.chunk_size(chunk);
    const int64_t at = task / plan.chunks * plan.sample + plan.chunk_start(chunk);
    double* acc = sums.data() + thread * kMomentsSums * width;
    R* coef = coefs.data() + thread * kMomentsRows * width;
    std::copy(expanded.sample(0), expanded.sample(0) + kMomentsRows * width, coef);
    const Strip strip{offset(y, at * plan.itemsize), nullptr, nullptr, 0, 0, 0, 0, coef, width, acc, width};
    double* mean = partial.data() + task * 2 * c;
    double* m2 = mean + c;

    // deviations from a pivot near the mean lose no digits where the mean is large beside the spread
    const int64_t ahead = std::min(size, 4 * plan.period);
    std::fill(acc, acc + kMomentsSums * width, 0.0);
    run(plan, kernel, strip, ahead, kMomentsSums);
    fold(plan, c, 1, acc, mean);
    R* pivot = coef + kPivot * width;
    for (int64_t j = 0; j < c; ++j) {
      const R value = static_cast<R>(mean[j] / (ahead / c));
      pivot[j] = std::isfinite(value) ? value : R(0);
    }
    for (int64_t j = c; j < width; ++j) pivot[j] = pivot[j - c];

    std::fill(acc, acc + kMomentsSums * width, 0.0);
    run(plan, kernel, strip, size, kMomentsSums);
    fold(plan, c, kMomentsSums, acc, mean);
    const double inverse = static_cast<double>(c) / size;
    for (int64_t j = 0; j < c; ++j) {
      const double delta = mean[j] * inverse;
      m2[j] -= mean[j] * delta;
      m2[j] = m2[j] < 0 ? 0 : m2[j];
      mean[j] = pivot[j] + delta;
    }
  });

  // Chan's combination of (count, mean, sum of squared deviations), chunk after chunk
  for (int64_t i = 0; i < map.n; ++i) {
    double* mean = partial.data() + i * plan.chunks * 2 * c;
    double* m2 = mean + c;
    double count = plan.chunks ? plan.chunk_size(0) / c : 0;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      const double* other = mean + chunk * 2 * c;
      const double other_count = plan.chunk_size(chunk) / c, total = count + other_count;
      const double weight = other_count / total, both = count * weight;
      for (int64_t j = 0; j < c; ++j) {
        const double delta = other[j] - mean[j];
        mean[j] += delta * weight;
        m2[j] += other[c + j] + delta * delta * both;
      }
      count = total;
    }
    for (int64_t j = 0; j < c; ++j) {
      stats[i * c + j] = static_cast<R>(plan.chunks ? mean[j] : NAN);
      stats[(map.n + i) * c + j] = static_cast<R>(plan.chunks ? m2[j] / count : NAN);
    }
  }
}

template <class R>
void moments_backward_as(const Map& map, const void* dy, const R* dstats, const void* y, const R* stats, const R* pre,
                         void* e, R* dpre) {
  const Plan plan(map);
  const int64_t c = map.c, rows = map.n * c;
  std::vector<R> coef(kMomentsBackwardRows * rows);
  for (int64_t i = 0; i < rows; ++i) {
    coef[kBackShift * rows + i] = pre ? pre[i % c] : R(0);
    coef[kBackSlope * rows + i] = pre ? pre[c + i % c] : R(0);
    coef[kMean * rows + i] = stats[i];
    coef[kDu0 * rows + i] = dstats[i] / static_cast<R>(map.s);
    coef[kDu1 * rows + i] = R(2) * dstats[rows + i] / static_cast<R>(map.s);
  }
  const Expanded<R> expanded(plan, kMomentsBackwardRows, map.n, c, coef.data());
  const int64_t sum_rows = dpre ? int64_t{kMomentsBackwardSums} : 0;
  const auto partial = walk(map, plan, plan.kernels.moments_backward[map.storage][map.act], y, dy, e, expanded,
                            sum_rows);
  if (!dpre) return;
  std::vector<double> total(sum_rows * c);
  for (size_t at = 0; at < partial.size(); at += total.size()) {
    for (size_t j = 0; j < total.size(); ++j) total[j] += partial[at + j];
  }
  for (size_t j = 0; j < total.size(); ++j) dpre[j] = static_cast<R>(total[j]);
}

std::atomic<const Kernels*> g_kernels{nullptr};

}  // namespace

void apply(const Map& map, const void* y, void* v, const void* coef) {
  if (map.storage == kFloat64) return apply_as(map, y, v, static_cast<const double*>(coef));
  apply_as(map, y, v, static_cast<const float*>(coef));
}

void apply_backward(const Map& map, const void* dv, const void* y, const void* coef, void* dy, void* dcoef) {
  if (map.storage == kFloat64) {
    return apply_backward_as(map, dv, y, static_cast<const double*>(coef), dy, static_cast<double*>(dcoef));
  }
  apply_backward_as(map, dv, y, static_cast<const float*>(coef), dy, static_cast<float*>(dcoef));
}

void moments(const Map& map, const void* y, const void* pre, void* stats) {
  if (map.storage == kFloat64) {
    return moments_as(map, y, static_cast<const double*>(pre), static_cast<double*>(stats));
  }
  moments_as(map, y, static_cast<const float*>(pre), static_cast<float*>(stats));
}

void moments_backward(const Map& map, const void* dy, const void* dstats, const void* y, const void* stats,
                      const void* pre, void* e, void* dpre) {
  if (map.storage == kFloat64) {
    return moments_backward_as(map, dy, static_cast<const double*>(dstats), y, static_cast<const double*>(stats),
                               static_cast<const double*>(pre), e, static_cast<double*>(dpre));
  }
  moments_backward_as(map, dy, static_cast<const float*>(dstats), y, static_cast<const float*>(stats),
                      static_cast<const float*>(pre), e, static_cast<float*>(dpre));
}

int available_kernels(const Kernels* const** list) {
  static const Kernels* found[3];
  static const int count = [] {
    int n = 0;
#ifdef FASTFILM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found[n++] = &kAVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = &kAVX2;
#endif
    found[n++] = &kBaseline;
    return n;
  }();
  *list = found;
  return count;
}

const Kernels& current_kernels() {
  if (const Kernels* chosen = g_kernels.load(std::memory_order_relaxed)) return *chosen;
  const Kernels* const* list;
  available_kernels(&list);
  return *list[0];
}

bool use_kernels(const char* name) {
  const Kernels* const* list;
  const int count = available_kernels(&list);
  for (int i = 0; i < count; ++i) {
    if (!std::strcmp(list[i]->name, name)) {
      g_kernels.store(list[i]);
      return true;
    }
  }
  return false;
}

}  // namespace fastfilm
