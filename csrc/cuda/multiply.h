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
  // Where this lane reads the slab for the first tap, for both halves of the voxels, 16 bits each, in units of 16 bytes and
  // before the swizzle; and the weights. `add` derives all from these and the tap, so that nothing else stays in registers.
  uint32_t rows;
  int weight;

  FF_DEVICE Multiplier(const Extent& tile_log2, const Extent& slab, int step) : rows(0) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const Extent v = tile_voxel(tile_log2, warp * 32 + m * 16 + lane % 16);
      const int row = (v.d * step * slab.h + v.h * step) * slab.w + v.w * step;
      rows |= static_cast<uint32_t>(row * kPitch / 16 + lane / 16) << 16 * m;
    }
    weight = swizzle((lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16);
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
    const uint32_t at = rows + static_cast<uint32_t>(shift * kPitch / 16) * 0x10001u;
    const int from[2] = {slab + swizzle(static_cast<int>(at & 0xffff) * 16),
                         slab + swizzle(static_cast<int>(at >> 16) * 16)};
    const int here = weights + weight;
    // 32 bytes of channels on are an XOR, since rows of up to 128 bytes are swizzled within 128 bytes
#pragma unroll kN == 64 ? 2 : 4
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
        constexpr int kBlock = 16 * kPitch;  // 16 output channels on, the swizzle may differ
        load_matrix4(b, (here ^ k * 32 ^ (i * kBlock >> 3 & 0x70)) + i * kBlock);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(sum[m][2 * i], a[m], b[0], b[1], T{});
          multiply_add(sum[m][2 * i + 1], a[m], b[2], b[3], T{});
        }
      }
    }
  }
  // Writes the first half of this warp's voxels as float32 [16, kN], rows `pitch` floats apart.
  FF_DEVICE void stage(int at, int pitch) const {
    const int lane = thread_anew() % 32;
    float* staging = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll
    for (int i = 0; i < kN / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        staging[(lane / 4 + e / 2 * 8) * pitch + i * 8 + lane % 4 * 2 + e % 2] = sum[0][i][e];
      }
  }
  // Puts the second half in the place of the first one.
  FF_DEVICE void next_half() {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[0][i][e] = sum[1][i][e];
  }
  // The voxel of the tile that a row of a warp is; the first 16 rows are the first staged half.
  FF_DEVICE static int voxel(int warp, int row) { return warp * 32 + row; }
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
    const int thread = thread_index();
#pragma unroll 1
    for (int k = 0; k < kK; k += 4) {
      float b[kN / 8][4];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        unpack16<float>(load_shared16(weights + swizzle((thread % 8 + 8 * j) * kPitch + k * 4)), b[j]);
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
  FF_DEVICE void stage(int at, int pitch) const {
    float* staging = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        staging[(thread_index() / 8 % 4 + 4 * i) * pitch + thread_index() % 8 + 8 * j] = sum[i][j];
      }
  }
  FF_DEVICE void next_half() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) sum[i][j] = sum[i + 4][j];
  }
  FF_DEVICE static int voxel(int warp, int row) { return warp * 4 + row % 4 + row / 4 * 32; }
};

}  // namespace fastfilm::cuda
