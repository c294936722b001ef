// Products of a tile's voxels with the weights of one tap after another; the accumulators stay in registers.
#pragma once

#include "slab.h"

namespace fastfilm::cuda {

// Voxels of a warp's half, which leave the accumulators at a time.
constexpr int kHalf = kTileVoxels / (kConvThreads / 32) / 2;

// Floats of a row of the area in shared memory through which the accumulators leave, padded against bank conflicts.
template <int kN>
constexpr int kStagingPitch = kN + 8;

// The products on tensor cores. A warp computes 32 voxels by kN channels, from 32 bytes of input channels at a time. A
// tf32 number takes the place of a pair of 16-bit numbers; the packed weights are rounded to tf32 already.
template <class T, int kN, int kK>
struct Multiplier {
  static constexpr int kPitch = kK * static_cast<int>(sizeof(T));

  float sum[2][kN / 8][4];
  int row[2];  // rows of the slab that this lane reads for the first tap

  FF_DEVICE Multiplier(const Extent& tile_log2, const Extent& slab, int step) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const Extent v = tile_voxel(tile_log2, warp * 32 + m * 16 + lane % 16);
      row[m] = (v.d * step * slab.h + v.h * step) * slab.w + v.w * step;
    }
  }
  FF_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < kN / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][i][e] = 0;
  }
  // One tap: the slab's rows shifted by `shift`, the tap's weights [kN, kK].
  FF_DEVICE void add(int slab, int shift, int weights) {
    const int lane = thread_index() % 32;
    // 32 bytes of channels on are an XOR, since rows of up to 128 bytes are swizzled within 128 bytes
    int from[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) from[m] = slab + swizzle((row[m] + shift) * kPitch + lane / 16 * 16);
    const int column = lane % 8 + lane / 16 * 8, half = lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kPitch / 32; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrix4(a[m], from[m] ^ k * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = operand_word<T>(a[m][i]);
      }
#pragma unroll
      for (int i = 0; i < kN / 16; ++i) {
        uint32_t b[4];
        load_matrix4(b, weights + weight_at(i, column, half, k));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(sum[m][2 * i], a[m], b[0], b[1], T{});
          multiply_add(sum[m][2 * i + 1], a[m], b[2], b[3], T{});
        }
      }
    }
  }
  // Where output channel 16 i + column has its input channels from byte 32 k + half on.
  FF_DEVICE static int weight_at(int i, int column, int half, int k) {
    if constexpr (16 * kPitch % 1024 == 0) {
      return (swizzle(column * kPitch + half) ^ k * 32) + i * 16 * kPitch;
    } else {
      return swizzle((i * 16 + column) * kPitch + k * 32 + half);
    }
  }
  // Writes the first half of this warp's voxels as float32 [16, kStagingPitch<kN>].
  FF_DEVICE void stage(int at) const {
    const int lane = thread_index() % 32;
    float* staging = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll
    for (int i = 0; i < kN / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        staging[(lane / 4 + e / 2 * 8) * kStagingPitch<kN> + i * 8 + lane % 4 * 2 + e % 2] = sum[0][i][e];
      }
  }
  // Puts the second half in the place of the first one.
  FF_DEVICE void next_half() {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[0][i][e] = sum[1][i][e];
  }
  // The voxel of the tile that row r of a staged half is.
  FF_DEVICE static int voxel(int half, int r) { return thread_index() / 32 * 32 + half * 16 + r; }
};

// The products of float32 on CUDA cores. A thread computes 8 voxels by kN / 8 channels, 32 and 8 apart.
template <int kN, int kK>
struct Multiplier<float, kN, kK> {
  static constexpr int kPitch = kK * 4;

  float sum[8][kN / 8];
  int row[8];

  FF_DEVICE Multiplier(const Extent& tile_log2, const Extent& slab, int step) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Extent v = tile_voxel(tile_log2, thread_index() / 8 + 32 * i);
      row[i] = (v.d * step * slab.h + v.h * step) * slab.w + v.w * step;
    }
  }
  FF_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) sum[i][j] = 0;
  }
  FF_DEVICE void add(int slab, int shift, int weights) {
#pragma unroll 1
    for (int k = 0; k < kK; k += 4) {
      float b[kN / 8][4];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        unpack16<float>(load_shared16(weights + swizzle((thread_index() % 8 + 8 * j) * kPitch + k * 4)), b[j]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float a[4];
        unpack16<float>(load_shared16(slab + swizzle((row[i] + shift) * kPitch + k * 4)), a);
#pragma unroll
        for (int j = 0; j < kN / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j] += a[e] * b[j][e];
      }
    }
  }
  FF_DEVICE void stage(int at) const {
    float* staging = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        staging[(thread_index() / 8 % 4 + 4 * i) * kStagingPitch<kN> + thread_index() % 8 + 8 * j] =
            sum[i][j];
      }
  }
  FF_DEVICE void next_half() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) sum[i][j] = sum[i + 4][j];
  }
  FF_DEVICE static int voxel(int half, int r) {
    return thread_index() / 32 * 4 + r % 4 + 32 * (half * 4 + r / 4);
  }
};

}  // namespace fastfilm::cuda
