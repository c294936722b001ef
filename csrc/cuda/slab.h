// Slabs: boxes of voxels in shared memory, one block of channels at a time. operands.h has their contents.
//
// Rows (one voxel's channels) lie densely. The 16-byte chunks of each 128 bytes are permuted, so that the eight rows
// that ldmatrix reads at once lie in different banks.
#pragma once

#include "affine.h"
#include "calls.h"

namespace fastfilm::cuda {

FF_DEVICE int swizzle(int byte) { return byte ^ (byte >> 3 & 0x70); }

// n / d, exact for n * d < 2^22 and n < 1024 d; plan.cpp sees to that (`divides`).
struct Divider {
  uint32_t inverse;
  FF_DEVICE explicit Divider(int d) : inverse(((1u << 22) + d - 1) / d) {}
  FF_DEVICE int operator()(int n) const { return static_cast<int>(static_cast<uint32_t>(n) * inverse >> 22); }
};

template <class T, int kBlock>
struct Slab {
  static constexpr int kV = kLanes<T>, kPitch = kBlock * static_cast<int>(sizeof(T)), kChunks = kPitch / 16;
  // a piece: two channels of a voxel, which a thread computes with
  static constexpr int kPiece = 2, kPieces = kBlock / kPiece;
  static constexpr int kCoefBytes = kCoefRows * kBlock * 4;

  Extent size, map;
  int step, voxels;

  // `size` voxels of a map, `step` apart.
  FF_DEVICE Slab(const Extent& size, const Extent& map, int step)
      : size(size), map(map), step(step), voxels(size.volume()) {}

  // The first channel of this thread's chunk.
  FF_DEVICE static int channel(int block) { return block * kBlock + thread_index() % kChunks * kV; }

  // The first channel of this thread's piece.
  FF_DEVICE static int piece_channel(int block) { return block * kBlock + thread_index() % kPieces * kPiece; }

  // The address of this thread's piece of voxel v in a slab at `at`.
  FF_DEVICE static int piece(int at, int v) {
    return at + swizzle(v * kPitch + thread_index() % kPieces * kPiece * static_cast<int>(sizeof(T)));
  }

  // Calls f(v, voxel of the map, whether the map has it) for every voxel v of the slab that is this thread's where
  // `kParts` threads share a voxel; each argument has `kFew` voxels, of which those behind the slab's end are not in the
  // map. The slab begins at voxel `first` of the map.
  template <int kParts, int kFew, class F>
  FF_DEVICE void each(const Extent& first, F f) const {
    constexpr int kRows = kConvThreads / kParts;
    const Divider by_row(size.w), by_plane(size.w * size.h);
#pragma unroll 1
    for (int begin = thread_index() / kParts; begin < voxels; begin += kFew * kRows) {
      int v[kFew];
      Extent at[kFew];
      bool in_map[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        v[i] = begin + i * kRows;
        const int z = by_plane(v[i]), in_plane = v[i] - z * size.w * size.h, y = by_row(in_plane);
        at[i] = {first.d + z * step, first.h + y * step, first.w + (in_plane - y * size.w) * step};
        in_map[i] = static_cast<unsigned>(at[i].d) < static_cast<unsigned>(map.d) &&
                    static_cast<unsigned>(at[i].h) < static_cast<unsigned>(map.h) &&
                    static_cast<unsigned>(at[i].w) < static_cast<unsigned>(map.w) && v[i] < voxels;
      }
      f(v, at, in_map);
    }
  }

  // Starts to copy this thread's chunks of a map [N, *map, channels] to `at`; voxels outside of the map become zeros.
  FF_DEVICE void copy(const T* base, int channels, int channel, bool aligned, int64_t n, const Extent& first,
                      int at) const {
    const int left = channels - channel, valid = left < 0 ? 0 : left < kV ? left : kV;
    each<kChunks, 1>(first, [&](const int (&v)[1], const Extent (&voxel)[1], const bool (&in_map)[1]) {
      const bool present = in_map[0] && valid > 0;
      const int64_t offset = voxel_of(n, voxel[0]) * channels + channel;
      const int to = at + swizzle(v[0] * kPitch + thread_index() % kChunks * 16);
      if (aligned) {
        copy_async16(to, present ? base + offset : base, present ? 16 : 0);
      } else {
        store_shared16(to, present ? load_chunk(base + offset, valid, false) : Word16{});
      }
    });
  }

  FF_DEVICE int64_t voxel_of(int64_t n, const Extent& at) const {
    return ((n * map.d + at.d) * map.h + at.h) * map.w + at.w;
  }
};

// Loads one number for each of kV channels from shared memory.
template <int kV>
FF_DEVICE void load_row(int at, float (&row)[kV]) {
  if constexpr (kV == 2) {
    const Word8 word = load8(shared_memory() + at);
    row[0] = bits_to_float(word.w[0]);
    row[1] = bits_to_float(word.w[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kV; i += 4) {
      float four[4];
      unpack16<float>(load_shared16(at + i * 4), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) row[i + j] = four[j];
    }
  }
}

// Copies the rows of coefficients [kCoefRows, batch, channels] of sample n, `count` channels from `first` on, to shared
// memory; those of channels that do not exist are 0.
FF_DEVICE void load_rows(const float* coef, int64_t batch, int64_t n, int channels, int first, int count, int at) {
  float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
  for (int i = thread_index(); i < kCoefRows * count; i += kConvThreads) {
    const int channel = first + i % count;
    out[i] = channel < channels ? coef[(i / count * batch + n) * channels + channel] : 0.0f;
  }
}
template <int kV>
FF_DEVICE void load_coefficients(int at, int count, Coefficients<kV>& coef) {
#pragma unroll
  for (int r = 0; r < kCoefRows; ++r) load_row(at + r * count * 4, coef.row[r]);
}

// The coordinates of voxel m of a tile.
FF_DEVICE Extent tile_voxel(const Extent& tile_log2, int m) {
  return {m >> (tile_log2.h + tile_log2.w), m >> tile_log2.w & ((1 << tile_log2.h) - 1), m & ((1 << tile_log2.w) - 1)};
}

// The slab of a tile for `count` taps, with `step` voxels of the slab from one voxel of the tile to the next.
FF_DEVICE Extent slab_size(const Extent& tile_log2, const Extent& count, int step) {
  return {((1 << tile_log2.d) - 1) * step + (count.d > 1 ? count.d : 1),
          ((1 << tile_log2.h) - 1) * step + (count.h > 1 ? count.h : 1),
          ((1 << tile_log2.w) - 1) * step + (count.w > 1 ? count.w : 1)};
}

// The first voxel of tile t.
FF_DEVICE Extent tile_origin(const Extent& tiles, const Extent& tile_log2, int t) {
  return {t / (tiles.h * tiles.w) << tile_log2.d, t / tiles.w % tiles.h << tile_log2.h, t % tiles.w << tile_log2.w};
}

// Whether all chunks of a map are whole and lie on 16 bytes.
template <class T>
bool on_chunks(const void* map, int channels) {
  return channels % kLanes<T> == 0 && reinterpret_cast<uintptr_t>(map) % 16 == 0;
}

}  // namespace fastfilm::cuda
