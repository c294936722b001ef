// Kernels of products, which sm90_emulation.cpp runs on the emulation: convolutions, gradients, operands with a swizzle,
// all numbers of a type.
#pragma once

#include <string>
#include <vector>

#include "cuda/sm90/primitives.h"

using namespace fastfilm::cuda;

constexpr int kUnit = 16;  // bytes of eight channels of a voxel

template <class T>
T number(float f) {
  T v;
  from_float(f, v);
  return v;
}

// Small integers, of which every sum is exact, and quarters.
float value(int seed, int i) {
  uint32_t h = static_cast<uint32_t>(i * 2 + 1) * 0x9e3779b1u + static_cast<uint32_t>(seed) * 0x85ebca6bu;
  h = (h ^ h >> 15) * 0x2c1b3c6du;
  return static_cast<float>(static_cast<int>((h >> 16) % 15) - 7) / 4;
}

// A slab [chunk of eight channels][voxel][16 bytes] of lines of `kPitch` voxels.
constexpr int kPitch = 18, kLines = 18, kChannels = 32, kChunk = (kPitch * kLines | 1) * kUnit;
constexpr int kSlab = kChannels / 8 * kChunk;

// Shared memory that threads fill from global memory, sixteen bytes at a time.
FF_DEVICE void fill(int to, const void* from, int bytes, int thread, int threads) {
  for (int at = thread * 16; at < bytes; at += threads * 16) {
    copy_async16(to + at, static_cast<const char*>(from) + at, 16);
  }
}

// Three taps of a convolution as a chain of products: weights [tap][chunk][64][8] times 8 x 16 voxels of a slab.
template <class T>
struct Convolution {
  static constexpr int kThreads = 256, kMinBlocks = 1, kTaps = 3, kWeights = kTaps * kChannels / 8 * 64 * kUnit;
  static constexpr int kShift[kTaps] = {0, 1, 2 * kPitch + 10};
  struct Params {
    const T *weights, *slab;
    float* out;  // [warpgroup][64][128]
  };
  static void run(const Params& p) {
    const int t = thread_index(), group = t / 128;
    fill(0, p.weights, kWeights, t, kThreads);
    fill(kWeights, p.slab, kSlab, t, kThreads);
    commit_copies();
    wait_copies<0>();
    fence_async();
    barrier();
    float d[2][64] = {};
    // two groups on registers of their own, then one more on the first ones
    for (int part = 0; part < 3; ++part) {
      products_begin();
      for (int tap = 0; tap < kTaps; ++tap) {
        for (int c = 0; c < kChannels / 8; c += 2) {
          const Descriptor a = descriptor((tap * kChannels / 8 + c) * 64 * kUnit, 64 * kUnit, 8 * kUnit);
          const Descriptor b = descriptor(kWeights + c * kChunk, kChunk, kPitch * kUnit) + (kShift[tap] + group);
          multiply_async(d[part % 2], a, b, T{});
        }
      }
      products_commit();
      if (part) products_wait<1>();
    }
    products_wait<0>();
    for (int i = 0; i < 64; ++i) {
      const int row = t % 128 / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
      p.out[(group * 64 + row) * 128 + column] = d[0][i] == 2 * d[1][i] ? d[1][i] : bits_to_float(0xffffffffu);
    }
  }
  static std::string check() {
    std::vector<T> weights(kWeights / 2), slab(kSlab / 2);
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = number<T>(value(1, i));
    for (size_t i = 0; i < slab.size(); ++i) slab[i] = number<T>(value(2, i));
    std::vector<float> out(2 * 64 * 128);
    if (const char* reason = launch<Convolution>({1, 1, 1}, kWeights + kSlab, nullptr,
                                                 {weights.data(), slab.data(), out.data()})) {
      return reason;
    }
    for (int group = 0; group < 2; ++group) {
      for (int row = 0; row < 64; ++row) {
        for (int n = 0; n < 128; ++n) {
          float sum = 0;
          for (int tap = 0; tap < kTaps; ++tap) {
            for (int c = 0; c < kChannels; ++c) {
              const int voxel = n / 8 * kPitch + n % 8 + kShift[tap] + group;
              sum += value(1, ((tap * kChannels / 8 + c / 8) * 64 + row) * 8 + c % 8) *
                     value(2, c / 8 * (kChunk / 2) + voxel * 8 + c % 8);
            }
          }
          if (out[(group * 64 + row) * 128 + n] != sum) return "wrong numbers";
        }
      }
    }
    return "right";
  }
};

// Voxels as k: the channels of one slab times those of another.
template <class T, int kColumns>
struct Gradient {
  static constexpr int kThreads = 128, kMinBlocks = 1, kSteps = 4, kShift = 1;
  struct Params {
    const T *a, *slab;
    float* out;  // [64][kColumns]
  };
  static constexpr int kA = 64 / 8 * kChunk, kB = kColumns / 8 * kChunk;
  static void run(const Params& p) {
    const int t = thread_index();
    fill(0, p.a, kA, t, kThreads);
    fill(kA, p.slab, kB, t, kThreads);
    commit_copies();
    wait_copies<0>();
    fence_async();
    barrier();
    float d[kColumns / 2] = {};
    products_begin();
    for (int step = 0; step < kSteps; ++step) {
      const int at = 2 * step * kPitch * kUnit;
      multiply_async_transposed(d, descriptor(at, kPitch * kUnit, kChunk),
                                descriptor(kA + at, kPitch * kUnit, kChunk) + kShift, T{});
    }
    products_commit();
    products_wait<0>();
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
      p.out[row * kColumns + column] = d[i];
    }
  }
  static std::string check() {
    std::vector<T> a(kA / 2), slab(kB / 2);
    for (size_t i = 0; i < a.size(); ++i) a[i] = number<T>(value(3, i));
    for (size_t i = 0; i < slab.size(); ++i) slab[i] = number<T>(value(4, i));
    std::vector<float> out(64 * kColumns);
    if (const char* reason = launch<Gradient>({1, 1, 1}, kA + kB, nullptr, {a.data(), slab.data(), out.data()})) {
      return reason;
    }
    // of a slab: channel n of voxel k
    const auto of = [](int which, int n, int k, int shift) {
      return value(which, n / 8 * (kChunk / 2) + (k / 8 * kPitch + k % 8 + shift) * 8 + n % 8);
    };
    for (int row = 0; row < 64; ++row) {
      for (int n = 0; n < kColumns; ++n) {
        float sum = 0;
        for (int k = 0; k < 16 * kSteps; ++k) sum += of(3, row, k, 0) * of(4, n, k, kShift);
        if (out[row * kColumns + n] != sum) return "wrong numbers";
      }
    }
    return "right";
  }
};

// Rows of 64 numbers in the 128-byte swizzle, and the result stored transposed and in 16 bits: [column][row].
struct Swizzle {
  using T = Float16;
  static constexpr int kThreads = 128, kMinBlocks = 1, kRows = 64 + 128, kPitch = 144;
  struct Params {
    const T* rows;  // of a, then of b
    T* out;  // [128][64]
  };
  static void run(const Params& p) {
    const int t = thread_index();
    for (int i = t; i < kRows * 8; i += kThreads) {
      store_shared16(i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, load16(p.rows + i * 8));
    }
    fence_async();
    barrier();
    float d[64] = {};
    products_begin();
    for (int k = 0; k < 64; k += 16) {
      Descriptor a = descriptor(k * 2, 16, 1024), b = descriptor(64 * 128 + k * 2, 16, 1024);
      a.bits |= uint64_t{1} << 62;
      b.bits |= uint64_t{1} << 62;
      multiply_async(d, a, b, T{});
    }
    products_commit();
    products_wait<0>();
    barrier();
    for (int j = 0; j < 8; ++j) {
      uint32_t r[4];
      for (int q = 0; q < 4; ++q) r[q] = pack(d[8 * j + 2 * q], d[8 * j + 2 * q + 1], T{});
      const int lane = t % 32;
      store_matrix4_transposed((16 * j + lane / 16 * 8 + lane % 8) * kPitch + (t / 32 * 16 + lane / 8 % 2 * 8) * 2, r);
    }
    barrier();
    for (int i = t; i < 128 * 8; i += kThreads) {
      const int at = i / 8 * kPitch + i % 8 * 16;
      const Word8 low = load_shared8(at), high = load_shared8(at + 8);
      store16(p.out + i * 8, {{low.w[0], low.w[1], high.w[0], high.w[1]}});
    }
  }
  static std::string check() {
    std::vector<T> rows(kRows * 64), out(128 * 64);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = number<T>(value(5, i));
    if (const char* reason = launch<Swizzle>({1, 1, 1}, kRows * 128, nullptr, {rows.data(), out.data()})) return reason;
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < 128; ++n) {
        float sum = 0;
        for (int k = 0; k < 64; ++k) sum += value(5, m * 64 + k) * value(5, (64 + n) * 64 + k);
        if (to_float(out[n * 64 + m]) != to_float(number<T>(sum))) return "wrong numbers";
      }
    }
    return "right";
  }
};

// All numbers of a type, those that are not finite too, times one.
template <class T>
struct Numbers {
  static constexpr int kThreads = 128, kMinBlocks = 1;
  struct Params {};
  static constexpr int kA = 64 * 16 * 2, kB = 32 * 16 * 2;
  static void run(const Params&) {
    const int t = thread_index(), row = t / 32 * 16 + t % 32 / 4;
    const uint32_t one = number<T>(1).bits;
    // 32 columns of 16 k, of which the first one has a one
    if (t < kB / 16) store_shared16(kA + t * 16, {{t ? 0 : one, 0, 0, 0}});
    for (int first = 0; first < 1 << 16; first += 64) {
      // 64 rows, which have numbers at the first k
      const auto two = [&](int i) {
        const uint32_t number = first + t / 16 * 8 + i;
        return t % 16 ? 0 : number | (number + 1) << 16;
      };
      store_shared16(t * 16, {{two(0), two(2), two(4), two(6)}});
      fence_async();
      barrier();
      float d[16] = {};
      products_begin();
      multiply_async_transposed(d, descriptor(0, 128, 256), descriptor(kA, 128, 256), T{});
      products_commit();
      products_wait<0>();
      barrier();
      const T low{static_cast<uint16_t>(first + row)}, high{static_cast<uint16_t>(first + row + 8)};
      const bool holds = t % 4 == 0;
      const auto differ = [](float x, float y) { return x == x ? x != y : y == y; };
      if (holds && (differ(d[0], to_float(low)) || differ(d[2], to_float(high)))) emulated::fail("wrong numbers");
    }
  }
  static std::string check() {
    const char* reason = launch<Numbers>({1, 1, 1}, kA + kB, nullptr, {});
    return reason ? reason : "right";
  }
};
