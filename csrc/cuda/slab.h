// Slabs: boxes of voxels in shared memory, one block of channels at a time. operands.h has their contents.
//
// Rows (one voxel's channels) lie densely. The 16-byte chunks of each 128 bytes are permuted, so that the eight rows
// that ldmatrix reads at once lie in different banks.
#pragma once

#include "affine.h"
#include "calls.h"

namespace fastfilm::cuda {

FF_DEVICE int swizzle(int byte) { return byte ^ (byte >> 3 & 0x70); }

// n / d for n < 2^20 and d >= 1.
struct Divider {
  float inverse;
  FF_DEVICE explicit Divider(int d) : inverse(1.0f / static_cast<float>(d)) {}
  FF_DEVICE int operator()(int n) const { return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse); }
};

template <class T, int kBlock>
struct Slab {
  static constexpr int kV = kLanes<T>, kPitch = kBlock * static_cast<int>(sizeof(T)), kChunks = kPitch / 16;
  static constexpr int kRows = kConvThreads / kChunks;
  static constexpr int kCoefBytes = kCoefRows * kBlock * 4;

  Extent size, map;
  int step, voxels;

  // `size` voxels of a map, `step` apart.
  FF_DEVICE Slab(const Extent& size, const Extent& map, int step)
      : size(size), map(map), step(step), voxels(size.volume()) {}

  // The first channel of this thread's chunk.
  FF_DEVICE static int channel(int block) { return block * kBlock + thread_index() % kChunks * kV; }

  // The address of this thread's chunk of voxel v in a slab at `at`.
  FF_DEVICE static int place(int at, int v) { return at + swizzle(v * kPitch + thread_index() % kChunks * 16); }

  // Calls f(v, voxel of the map, whether the map has it) for this thread's voxels v of the slab that begins at voxel
  // `first` of the map.
  template <class F>
  FF_DEVICE void each(const Extent& first, F f) const {
    const Divider by_row(size.w), by_plane(size.w * size.h);
#pragma unroll 1
    for (int v = thread_index() / kChunks; v < voxels; v += kRows) {
      const int z = by_plane(v), in_plane = v - z * size.w * size.h, y = by_row(in_plane), x = in_plane - y * size.w;
      const Extent at{first.d + z * step, first.h + y * step, first.w + x * step};
      const bool in_map = static_cast<unsigned>(at.d) < static_cast<unsigned>(map.d) &&
                          static_cast<unsigned>(at.h) < static_cast<unsigned>(map.h) &&
                          static_cast<unsigned>(at.w) < static_cast<unsigned>(map.w);
      f(v, at, in_map);
    }
  }

  // Starts to copy this thread's chunks of a map [N, *map, channels] to `at`; voxels outside of the map become zeros.
  FF_DEVICE void copy(const T* base, int channels, int channel, bool aligned, int64_t n, const Extent& first,
                      int at) const {
    const int left = channels - channel, valid = left < 0 ? 0 : left < kV ? left : kV;
    each(first, [&](int v, const Extent& voxel, bool in_map) {
      const bool present = in_map && valid > 0;
      const int64_t offset = voxel_of(n, voxel) * channels + channel;
      const int to = place(at, v);
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
#pragma unroll
  for (int i = 0; i < kV; i += 4) {
    float four[4];
    unpack16<float>(load_shared16(at + i * 4), four);
#pragma unroll
    for (int j = 0; j < 4; ++j) row[i + j] = four[j];
  }
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
