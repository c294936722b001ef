// Index maths of wgmma operands, accumulators and the pipeline's tiles; the same on host and device.
#pragma once

#include <cstdint>

#define PROBES_BOTH __host__ __device__ constexpr

namespace probes {

constexpr int kRows = 64;      // M of every wgmma
constexpr int kStep = 16;      // K of a 16-bit wgmma
constexpr int kUnit = 16;      // bytes of eight 16-bit channels of a voxel
constexpr int kChannels = 64;  // channels of a slab
constexpr int kTaps = 9;

// Byte offsets of a matrix descriptor. Without swizzle, a core matrix is eight rows of 16 bytes, 128 in
// all. K-major: `leading` leads to the next eight k, `stride` to the next eight rows or columns.
// MN-major: `leading` leads to the next eight k too, `stride` to the next eight rows or columns.
struct Strides {
    uint32_t leading, stride;
    int swizzle;  // 0 none, 1 128 bytes
};

// PTX ISA, "matrix descriptor": start in bits 0-13, leading in 16-29, stride in 32-45, all without their
// four lowest bits; base offset 0 in bits 49-51; swizzle mode in bits 62-63.
PROBES_BOTH uint64_t descriptor(uint32_t start, Strides s) {
    return uint64_t(start >> 4 & 0x3fff) | uint64_t(s.leading >> 4 & 0x3fff) << 16 |
           uint64_t(s.stride >> 4 & 0x3fff) << 32 | uint64_t(s.swizzle) << 62;
}

// Accumulator i of thread t in a warpgroup: row and column of D.
PROBES_BOTH int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i & 2) * 4; }
PROBES_BOTH int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + (i & 1); }

// Register r of a thread's A fragment holds columns k and k + 1 of this row.
PROBES_BOTH int fragment_row(int t, int r) { return t / 32 * 16 + t % 32 / 4 + (r & 1) * 8; }
PROBES_BOTH int fragment_column(int t, int r) { return t % 4 * 2 + (r & 2) * 4; }

// stmatrix.x4.trans of accumulators 8 j to 8 j + 7 (16 columns), packed in pairs: matrix q of the four
// holds rows 8 (q % 2) and columns 8 (q / 2) of the warp's 16 × 16 block. Lane l gives the address of row
// l % 8 of matrix l / 8, which is a column of D. The result is [column][row], `pitch` bytes a column.
PROBES_BOTH int stored_byte(int warp, int lane, int j, int pitch) {
    return (16 * j + lane / 16 * 8 + lane % 8) * pitch + (warp * 16 + lane / 8 % 2 * 8) * 2;
}

// The pipeline's tiles: 8 columns × 16 rows of an image of 16 channels, with a halo of one voxel.
namespace tile {
constexpr int kColumns = 8, kLines = 16, kDepth = 16, kVoxels = kColumns * kLines;
constexpr int kPitch = kColumns + 2, kSlab = kPitch * (kLines + 2);
constexpr int kChunk = (kSlab | 1) * kUnit;       // bytes between chunks of eight channels
constexpr int kSlabBytes = 2 * kChunk;            // a multiple of 16
constexpr int kWeightBytes = kTaps * kRows * kDepth * 2;
constexpr int kImage = 128, kImages = 64;
constexpr int kAcross = kImage / kColumns, kDown = kImage / kLines;
constexpr int kTiles = kImages * kAcross * kDown;  // of a batch

// A voxel of a tile's slab: its index in the batch [image][line][column], or -1 outside the image.
PROBES_BOTH int source(int t, int voxel) {
    const int x = t % kAcross * kColumns + voxel % kPitch - 1;
    const int y = t / kAcross % kDown * kLines + voxel / kPitch - 1;
    if (x < 0 || y < 0 || x >= kImage || y >= kImage) return -1;
    return (t / (kAcross * kDown) * kImage + y) * kImage + x;
}

PROBES_BOTH int slab_byte(int chunk, int voxel) { return chunk * kChunk + voxel * kUnit; }
PROBES_BOTH int weight_byte(int tap, int co, int c) {
    return ((tap * 2 + c / 8) * kRows + co) * kUnit + c % 8 * 2;
}
PROBES_BOTH Strides slab_strides() { return {kChunk, kPitch * kUnit, 0}; }
PROBES_BOTH Strides weight_strides() { return {kRows * kUnit, 8 * kUnit, 0}; }
PROBES_BOTH uint32_t slab_start(int tap) { return (tap / 3 * kPitch + tap % 3) * kUnit; }

// Small integers, so that every sum is exact in float32 and every value in bfloat16.
PROBES_BOTH uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}
PROBES_BOTH int input(uint32_t index, uint32_t seed) {
    return int(hash(index ^ hash(seed)) % 7) - 3;
}
PROBES_BOTH int weight(int tap, int co, int c) {
    return int(hash((tap * kRows + co) * kDepth + c + 77) % 5) - 2;
}
PROBES_BOTH float scale(int c) { return float(1 + c % 2); }
PROBES_BOTH float shift(int c) { return float(c % 5 - 2); }

// A tile's checksum is the sum of its values, as integers, times these odd weights, modulo 2^32.
PROBES_BOTH uint32_t mark(int co, int voxel) { return (co * kVoxels + voxel) * 2654435761u | 1u; }
}  // namespace tile

}  // namespace probes
