// The pending affine of a map, v = g * (act(a * (y - p) + b; slope) - q) + s, its gradient, and running moments.
//
// A pending affine is the norm, activation and FiLM of a block, which the readers of its raw map y apply. Most
// functions work on a chunk: 16 bytes of one voxel, kLanes<T> channels.
#pragma once

#include <cmath>

#include "primitives.h"

namespace fastfilm::cuda {

// Rows of a coefficient tensor, float32 [7, N, C].
enum CoefRow { kA, kB, kG, kS, kP, kQ, kSlope, kCoefRows };

// Sums that the backward pass of the affine takes for each sample and channel.
enum CoefSum { kSumDvH, kSumDv, kSumDzY, kSumDz, kSumSlope, kCoefSums };

constexpr float kSqrt2OverPi = 0.79788456080286535588f;
constexpr float kCubic = 0.044715f;

// sigma(x) and rest = 1 - sigma(x), both without cancellation.
FF_DEVICE float sigmoid(float x, float& rest) {
  const float e = expf(-fabsf(x)), big = 1 / (1 + e), small = e * big;
  rest = x < 0 ? big : small;
  return x < 0 ? small : x >= 0 ? big : x;
}

// z becomes act(z); NaN stays NaN. All channels have one activation, so the switch lies outside of the loops.
template <int kV>
FF_DEVICE void activate(float (&z)[kV], const float (&slope)[kV], int act) {
  switch (act) {
    case kReLU:
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = z[i] <= 0 ? 0.0f : z[i];
      break;
    case kLeakyReLU:
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = z[i] > 0 ? z[i] : z[i] * slope[i];
      break;
    case kELU:
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = z[i] > 0 ? z[i] : slope[i] * expm1f(z[i]);
      break;
    case kSiLU:
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = z[i] / (1 + expf(-z[i]));
      break;
    case kGELU:
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = 0.5f * z[i] * erfcf(-0.70710678118654752440f * z[i]);
      break;
    case kGELUTanh:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        // (1 + tanh u) / 2 = sigma(2u)
        const float u = kSqrt2OverPi * (z[i] + kCubic * z[i] * z[i] * z[i]);
        z[i] = z[i] / (1 + expf(-2 * u));
      }
      break;
    default:
      break;
  }
}

// act(z) with its derivatives in z and in its slope.
FF_DEVICE float activate(float z, float slope, int act, float& dz, float& dslope) {
  float h = z;
  dz = 1;
  dslope = 0;
  switch (act) {
    case kReLU:
      dz = z > 0 ? 1.0f : 0.0f;
      h = z <= 0 ? 0.0f : z;
      break;
    case kLeakyReLU:
      dz = z > 0 ? 1.0f : slope;
      dslope = z > 0 ? 0.0f : z;
      h = z > 0 ? z : z * slope;
      break;
    case kELU: {
      const float m = expm1f(z > 0 ? 0.0f : z);
      dz = z > 0 ? 1.0f : slope * (m + 1);
      dslope = z > 0 ? 0.0f : m;
      h = z > 0 ? z : slope * m;
      break;
    }
    case kSiLU: {
      float rest;
      const float sigma = sigmoid(z, rest);
      dz = sigma * (1 + z * rest);
      h = z * sigma;
      break;
    }
    case kGELU: {
      const float cdf = 0.5f * erfcf(-0.70710678118654752440f * z);
      dz = cdf + z * (0.39894228040143267794f * expf(-0.5f * z * z));
      h = z * cdf;
      break;
    }
    case kGELUTanh: {
      float rest;
      const float square = z * z, u = kSqrt2OverPi * (z + kCubic * square * z);
      const float du = kSqrt2OverPi * (1 + 3 * kCubic * square), sigma = sigmoid(2 * u, rest);
      dz = sigma + 2 * z * sigma * rest * du;
      h = z * sigma;
      break;
    }
    default:
      break;
  }
  return h;
}

// Coefficients of kV neighbouring channels of one sample.
template <int kV>
struct Coefficients {
  float row[kCoefRows][kV];

  // From a tensor whose rows are `pitch` apart; channels from `valid` on get zeros, under which v = 0.
  FF_DEVICE void load(const float* coef, int64_t pitch, int valid) {
#pragma unroll
    for (int r = 0; r < kCoefRows; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i) row[r][i] = i < valid ? coef[r * pitch + i] : 0.0f;
  }

  // The coefficients under which v = y: a = g = 1, all others 0.
  FF_DEVICE void identity() {
#pragma unroll
    for (int r = 0; r < kCoefRows; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i) row[r][i] = r == kA || r == kG ? 1.0f : 0.0f;
  }

  FF_DEVICE void apply(float (&v)[kV], int act) const {
#pragma unroll
    for (int i = 0; i < kV; ++i) v[i] = row[kA][i] * (v[i] - row[kP][i]) + row[kB][i];
    activate(v, row[kSlope], act);
#pragma unroll
    for (int i = 0; i < kV; ++i) v[i] = row[kG][i] * (v[i] - row[kQ][i]) + row[kS][i];
  }
};

// kRows sums for each of kV channels. Each thread has its own; `merge_rows` adds those of a block in a fixed order.
template <int kRows, int kV>
struct Sums {
  float row[kRows][kV];

  FF_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i) row[r][i] = 0;
  }
  FF_DEVICE void merge(const Sums& other) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i) row[r][i] += other.row[r][i];
  }
};

// dv becomes the gradient at y; the terms of the coefficients' gradients are added to the sums.
template <int kV>
FF_DEVICE void affine_backward(const Coefficients<kV>& coef, const float (&y)[kV], int act, float (&dv)[kV],
                               Sums<kCoefSums, kV>& sums) {
#pragma unroll
  for (int i = 0; i < kV; ++i) {
    const float centred = y[i] - coef.row[kP][i];
    float slope_z, slope_s;
    const float h = activate(coef.row[kA][i] * centred + coef.row[kB][i], coef.row[kSlope][i], act, slope_z, slope_s);
    const float dh = dv[i] * coef.row[kG][i], dz = dh * slope_z;
    sums.row[kSumDvH][i] += dv[i] * (h - coef.row[kQ][i]);
    sums.row[kSumDv][i] += dv[i];
    sums.row[kSumDzY][i] += dz * centred;
    sums.row[kSumDz][i] += dz;
    sums.row[kSumSlope][i] += dh * slope_s;
    dv[i] = dz * coef.row[kA][i];
  }
}

// Count, mean and sum of squared deviations of kV channels (Chan, Golub and LeVeque 1979).
template <int kV>
struct Moments {
  float count, mean[kV], m2[kV];

  FF_DEVICE void clear() {
    count = 0;
#pragma unroll
    for (int i = 0; i < kV; ++i) mean[i] = m2[i] = 0;
  }
  FF_DEVICE void add(const float (&v)[kV]) {
    count += 1;
    const float share = 1 / count;
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      const float delta = v[i] - mean[i];
      mean[i] += delta * share;
      m2[i] += delta * (v[i] - mean[i]);
    }
  }
  FF_DEVICE void merge(const Moments& other) {
    const float total = count + other.count, share = other.count / (total > 0 ? total : 1.0f);
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      const float delta = other.mean[i] - mean[i];
      mean[i] += delta * share;
      m2[i] += other.m2[i] + delta * delta * (count * share);
    }
    count = total;
  }
};

// Merges the states of the threads t, t + columns, t + 2 columns, … into that of thread t < columns, as a tree.
// `columns` and the number of threads are powers of two; `scratch` has a state for each thread.
template <int kThreads, class State>
FF_DEVICE void merge_rows(State& state, void* scratch, int columns) {
  State* all = static_cast<State*>(scratch);
  const int t = thread_index();
  all[t] = state;
  for (int half = kThreads / 2; half >= columns; half /= 2) {
    barrier();
    if (t < half) {
      state.merge(all[t + half]);
      all[t] = state;
    }
  }
  barrier();
}

// Loads 16 bytes of a voxel's channels, of which `valid` exist. `aligned`: all chunks are whole and lie on 16 bytes.
template <class T>
FF_DEVICE Word16 load_chunk(const T* at, int valid, bool aligned) {
  if (aligned) return load16(at);
  float v[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i < valid ? to_float(at[i]) : 0.0f;
  return pack16<T>(v);
}

template <class T>
FF_DEVICE void store_chunk(T* at, int valid, bool aligned, const float (&v)[kLanes<T>]) {
  if (aligned) {
    store16(at, pack16<T>(v));
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i)
      if (i < valid) from_float(v[i], at[i]);
  }
}

// Loads four channels of a voxel; the arguments are those of `load_chunk`.
template <class T>
FF_DEVICE void load_four(const T* at, int valid, bool aligned, float (&v)[4]) {
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < valid ? to_float(at[i]) : 0.0f;
  } else if constexpr (sizeof(T) == 4) {
    unpack16<T>(load16(at), v);
  } else {
    const Word8 word = load8(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(T{static_cast<uint16_t>(word.w[i / 2] >> i % 2 * 16)});
  }
}

template <class T>
FF_DEVICE void store_four(T* at, int valid, bool aligned, const float (&v)[4]) {
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < valid) from_float(v[i], at[i]);
  } else if constexpr (sizeof(T) == 4) {
    store16(at, pack16<T>(v));
  } else {
    store8(at, {{pack(v[0], v[1], T{}), pack(v[2], v[3], T{})}});
  }
}

}  // namespace fastfilm::cuda
