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

// The same with the usual activations in front of the switch, a jump by a table whose clocks count beside few values.
template <int kV>
FF_DEVICE void activate_few(float (&z)[kV], const float (&slope)[kV], int act) {
  if (act == kNone) return;
  if (act == kLeakyReLU) {
#pragma unroll
    for (int i = 0; i < kV; ++i) z[i] = z[i] > 0 ? z[i] : z[i] * slope[i];
  } else if (act == kReLU) {
#pragma unroll
    for (int i = 0; i < kV; ++i) z[i] = z[i] <= 0 ? 0.0f : z[i];
  } else {
    activate(z, slope, act);
  }
}

// The same with the derivatives of act(z) in z. Calls at_slope(i, derivative of act(z[i]) in the slope) where act has one.
template <int kV, class F>
FF_DEVICE void activate(float (&z)[kV], const float (&slope)[kV], int act, float (&dz)[kV], F at_slope) {
#pragma unroll
  for (int i = 0; i < kV; ++i) dz[i] = 1;
  switch (act) {
    case kReLU:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        dz[i] = z[i] > 0 ? 1.0f : 0.0f;
        z[i] = z[i] <= 0 ? 0.0f : z[i];
      }
      break;
    case kLeakyReLU:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        dz[i] = z[i] > 0 ? 1.0f : slope[i];
        at_slope(i, z[i] > 0 ? 0.0f : z[i]);
        z[i] = z[i] > 0 ? z[i] : z[i] * slope[i];
      }
      break;
    case kELU:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        const float m = expm1f(z[i] > 0 ? 0.0f : z[i]);
        dz[i] = z[i] > 0 ? 1.0f : slope[i] * (m + 1);
        at_slope(i, z[i] > 0 ? 0.0f : m);
        z[i] = z[i] > 0 ? z[i] : slope[i] * m;
      }
      break;
    case kSiLU:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        float rest;
        const float sigma = sigmoid(z[i], rest);
        dz[i] = sigma * (1 + z[i] * rest);
        z[i] *= sigma;
      }
      break;
    case kGELU:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        const float cdf = 0.5f * erfcf(-0.70710678118654752440f * z[i]);
        dz[i] = cdf + z[i] * (0.39894228040143267794f * expf(-0.5f * z[i] * z[i]));
        z[i] *= cdf;
      }
      break;
    case kGELUTanh:
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        float rest;
        const float square = z[i] * z[i], u = kSqrt2OverPi * (z[i] + kCubic * square * z[i]);
        const float du = kSqrt2OverPi * (1 + 3 * kCubic * square), sigma = sigmoid(2 * u, rest);
        dz[i] = sigma + 2 * z[i] * sigma * rest * du;
        z[i] *= sigma;
      }
      break;
    default:
      break;
  }
}

FF_DEVICE float activate(float z, float slope, int act, float& dz, float& dslope) {
  float h[1] = {z}, slopes[1] = {slope}, by_z[1];
  dslope = 0;
  activate(h, slopes, act, by_z, [&](int, float derivative) { dslope = derivative; });
  dz = by_z[0];
  return h[0];
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

  FF_DEVICE void get(CoefRow r, float (&values)[kV]) const {
#pragma unroll
    for (int i = 0; i < kV; ++i) values[i] = row[r][i];
  }

  // v becomes the value of the affine: kCount numbers, voxel after voxel. Several voxels at a time hide each other's
  // latencies, and branch on the activation once. kFew: so few that they do so as activate_few does.
  template <bool kFew = false, int kCount>
  FF_DEVICE void apply(float (&v)[kCount], int act) const {
    float slope[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = row[kA][i % kV] * (v[i] - row[kP][i % kV]) + row[kB][i % kV];
      slope[i] = row[kSlope][i % kV];
    }
    if constexpr (kFew) activate_few(v, slope, act);
    else activate(v, slope, act);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = row[kG][i % kV] * (v[i] - row[kQ][i % kV]) + row[kS][i % kV];
  }
};

// kRows sums for each of kV channels. Each thread has its own; `merge_rows` adds those of a block in a fixed order.
template <int kRows, int kV>
struct Sums {
  static constexpr int kFloats = kRows * kV;
  float row[kRows][kV];

  // Calls f(i, number i) for each number of the state.
  template <class F>
  FF_DEVICE void each(F f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i) f(r * kV + i, row[r][i]);
  }

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

// The gradient at y, `dy`, from that at the value of the affine, `dv`; the terms of the coefficients' gradients are added to
// the sums. All have kCount numbers, voxel after voxel. `coef.get(row, values)` gives the coefficients of the kV channels.
// y and dv are functions that give their numbers when these are needed: a kernel with few registers loads them then.
template <int kV, int kCount, class Rows, class Y, class Dv>
FF_DEVICE void affine_backward(const Rows& coef, Y y, int act, Dv dv, float (&dy)[kCount], Sums<kCoefSums, kV>& sums) {
  float h[kCount], slope_z[kCount], slope_s[kCount] = {};
  {
    float a[kV], p[kV], b[kV], of_channel[kV], slope[kCount];
    y(h);
    coef.get(kA, a);
    coef.get(kP, p);
    coef.get(kB, b);
    coef.get(kSlope, of_channel);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      h[i] = a[i % kV] * (h[i] - p[i % kV]) + b[i % kV];
      slope[i] = of_channel[i % kV];
    }
    activate(h, slope, act, slope_z, [&](int i, float derivative) { slope_s[i] = derivative; });
  }
  float a[kV], p[kV], g[kV], q[kV], of_y[kCount], of_v[kCount];
  y(of_y);
  dv(of_v);
  coef.get(kA, a);
  coef.get(kP, p);
  coef.get(kG, g);
  coef.get(kQ, q);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int c = i % kV;
    const float dh = of_v[i] * g[c], dz = dh * slope_z[i];
    sums.row[kSumDvH][c] += of_v[i] * (h[i] - q[c]);
    sums.row[kSumDv][c] += of_v[i];
    sums.row[kSumDzY][c] += dz * (of_y[i] - p[c]);
    sums.row[kSumDz][c] += dz;
    sums.row[kSumSlope][c] += dh * slope_s[i];
    dy[i] = dz * a[c];
  }
}

// The same for one channel of a sample and an activation that is a line on each side of 0: z above it, slope * z below. A
// number adds to the two sums of its side alone; the sums of `affine_backward` are linear in these four, and are taken
// from them at the end.
struct PiecewiseLinear {
  enum Side { kDvAbove, kDvYAbove, kDvBelow, kDvYBelow };  // rows of the sums: of dv and of dv * (y - pivot)

  float pivot, a, offset;  // z = a * (y - pivot) + offset
  float above, below;      // dy / dv

  FF_DEVICE static bool is(int act) { return act == kNone || act == kReLU || act == kLeakyReLU; }
  FF_DEVICE static float slope_of(int act, float slope) {
    return act == kLeakyReLU ? slope : act == kReLU ? 0.0f : 1.0f;
  }

  // `row` has the channel's coefficients. Where q is not 0, a norm follows the activation and the sum of dv * (h - q) must
  // not lose what is small beside q: y - pivot is h - q there, for the a = 1 of such blocks.
  FF_DEVICE void load(const float (&row)[kCoefRows], int act) {
    a = row[kA];
    pivot = row[kQ] == 0 ? row[kP] : row[kP] + row[kQ] - row[kB];
    offset = a * (pivot - row[kP]) + row[kB];
    above = row[kG] * a;
    below = above * slope_of(act, row[kSlope]);
  }

  // Adds number `dv` of channel c to the sums; returns the gradient at y.
  template <int kV>
  FF_DEVICE float add(float y, float dv, int c, Sums<kCoefSums, kV>& sums) const {
    const float t = y - pivot, z = a * t + offset, dy = dv * (z > 0 ? above : below);
    if (z > 0) {
      sums.row[kDvAbove][c] += dv;
      sums.row[kDvYAbove][c] += dv * t;
    } else {
      sums.row[kDvBelow][c] += dv;
      sums.row[kDvYBelow][c] += dv * t;
    }
    return dy;
  }

  // Makes the sums of `affine_backward` of those of channel c.
  template <int kV>
  FF_DEVICE void conclude(const float (&row)[kCoefRows], int act, int c, Sums<kCoefSums, kV>& sums) const {
    const float slope = slope_of(act, row[kSlope]), q = row[kQ], g = row[kG];
    const float dv_above = sums.row[kDvAbove][c], y_above = sums.row[kDvYAbove][c];
    const float dv_below = sums.row[kDvBelow][c], y_below = sums.row[kDvYBelow][c];
    const float z_below = a * y_below + offset * dv_below, dz = dv_above + slope * dv_below;
    sums.row[kSumDvH][c] = a * y_above + (offset - q) * dv_above + (slope * z_below - q * dv_below);
    sums.row[kSumDv][c] = dv_above + dv_below;
    sums.row[kSumDzY][c] = g * (y_above + slope * y_below + (pivot - row[kP]) * dz);
    sums.row[kSumDz][c] = g * dz;
    sums.row[kSumSlope][c] = act == kLeakyReLU ? g * z_below : 0.0f;
  }
};

// Count, mean and sum of squared deviations of kV channels (Chan, Golub and LeVeque 1979).
template <int kV>
struct Moments {
  static constexpr int kFloats = 1 + 2 * kV;
  float count, mean[kV], m2[kV];

  template <class F>
  FF_DEVICE void each(F f) {
    f(0, count);
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      f(1 + i, mean[i]);
      f(1 + kV + i, m2[i]);
    }
  }

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

// Moments of a few voxels of a map, from sums of their deviations from the mean of the first ones. That mean is about as
// far from the others as these are from each other, so that little is lost when one sum is taken from the other.
template <int kV>
struct Deviations {
  int count;
  float near[kV], total[kV], squares[kV];

  FF_DEVICE void clear() {
    count = 0;
#pragma unroll
    for (int i = 0; i < kV; ++i) near[i] = total[i] = squares[i] = 0;
  }
  // Adds kFew voxels, kV channels of each; those whose number is negative do not exist.
  template <int kFew>
  FF_DEVICE void add(const float (&v)[kFew * kV], const int (&number)[kFew]) {
    int present = 0;
#pragma unroll
    for (int i = 0; i < kFew; ++i) present += number[i] >= 0;
    if (count == 0 && present > 0) {
      const float share = 1 / static_cast<float>(present);
#pragma unroll
      for (int i = 0; i < kFew * kV; ++i) near[i % kV] += number[i / kV] >= 0 ? v[i] * share : 0.0f;
    }
    count += present;
#pragma unroll
    for (int i = 0; i < kFew * kV; ++i) {
      const float d = number[i / kV] >= 0 ? v[i] - near[i % kV] : 0.0f;
      total[i % kV] += d;
      squares[i % kV] += d * d;
    }
  }
  FF_DEVICE Moments<kV> moments() const {
    Moments<kV> found;
    found.count = static_cast<float>(count);
    const float share = 1 / (count > 0 ? found.count : 1.0f);
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      const float rest = total[i] * share, m2 = squares[i] - total[i] * rest;
      found.mean[i] = near[i] + rest;
      found.m2[i] = m2 < 0 ? 0.0f : m2;  // NaN stays
    }
    return found;
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

// kV channels of a voxel, 4, 8 or 16 bytes, as they are in memory.
template <class T, int kV>
struct Few {
  static constexpr int kWords = kV * static_cast<int>(sizeof(T)) / 4;
  uint32_t w[kWords];
};

template <class T, int kV>
FF_DEVICE void pack_few(const float* v, Few<T, kV>& few) {
#pragma unroll
  for (int i = 0; i < few.kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      few.w[i] = float_to_bits(v[i]);
    } else {
      few.w[i] = pack(v[2 * i], v[2 * i + 1], T{});
    }
  }
}
template <class T, int kV>
FF_DEVICE void unpack_few(const Few<T, kV>& few, float* v) {
#pragma unroll
  for (int i = 0; i < kV; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = bits_to_float(few.w[i]);
    } else {
      v[i] = to_float(T{static_cast<uint16_t>(few.w[i / 2] >> i % 2 * 16)});
    }
  }
}

// Loads kV channels; the arguments are those of `load_chunk`.
template <class T, int kV>
FF_DEVICE Few<T, kV> load_few(const T* at, int valid, bool aligned) {
  Few<T, kV> few;
  if (!aligned) {
    float v[kV];
#pragma unroll
    for (int i = 0; i < kV; ++i) v[i] = i < valid ? to_float(at[i]) : 0.0f;
    pack_few<T, kV>(v, few);
  } else if constexpr (few.kWords == 4) {
    const Word16 word = load16(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) few.w[i] = word.w[i];
  } else if constexpr (few.kWords == 2) {
    const Word8 word = load8(at);
    few.w[0] = word.w[0];
    few.w[1] = word.w[1];
  } else {
    few.w[0] = *reinterpret_cast<const uint32_t*>(at);
  }
  return few;
}
template <class T, int kV>
FF_DEVICE void store_few(T* at, int valid, bool aligned, const float* v) {
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kV; ++i)
      if (i < valid) from_float(v[i], at[i]);
    return;
  }
  Few<T, kV> few;
  pack_few<T, kV>(v, few);
  if constexpr (few.kWords == 4) {
    store16(at, {{few.w[0], few.w[1], few.w[2], few.w[3]}});
  } else if constexpr (few.kWords == 2) {
    store8(at, {{few.w[0], few.w[1]}});
  } else {
    *reinterpret_cast<uint32_t*>(at) = few.w[0];
  }
}
}  // namespace fastfilm::cuda
