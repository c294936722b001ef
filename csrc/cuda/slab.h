// Boxes of voxels in shared memory: a block of channels of an input map, with its pending affine applied once.
//
// Rows (one voxel's channels) lie densely; the 16-byte chunks of each 128 bytes are permuted, so that eight rows
// that ldmatrix reads at once lie in different banks.
#pragma once

#include "affine.h"
#include "convolution.h"

namespace fastfilm::cuda {

FF_DEVICE int swizzle(int byte) { return byte ^ (byte >> 3 & 0x70); }

// A channels-last map [N, *S, channels] and what is pending on it; coef null: nothing.
struct Source {
  const void* x;
  const float* coef;
  int channels, act;
};

// One map, or two whose channels follow each other; the second's x is null if there is one only.
struct Sources {
  Source part[2];
  bool aligned;  // every chunk of every part is whole and lies on 16 bytes
};

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
  Divider by_row, by_plane;

  // `size` voxels of a map, `step` apart.
  FF_DEVICE Slab(const Extent& size, const Extent& map, int step)
      : size(size), map(map), step(step), voxels(size.volume()), by_row(size.w), by_plane(size.w * size.h) {}

  // The part of the map that the chunk of this thread belongs to, and the chunk's first channel there.
  FF_DEVICE static const Source& source(const Sources& in, int block, int& channel) {
    channel = block * kBlock + thread_index() % kChunks * kV;
    const bool second = in.part[1].x && channel >= in.part[0].channels;
    if (second) channel -= in.part[0].channels;
    return in.part[second];
  }

  // Starts to load the slab whose first voxel is at `first`; bit i: this thread's chunk i lies inside the map.
  FF_DEVICE uint32_t load(const Sources& in, int64_t n, const Extent& first, int block, int at) const {
    int channel;
    const Source& part = source(in, block, channel);
    const int left = part.channels - channel, valid = left < 0 ? 0 : left < kV ? left : kV;
    const T* base = static_cast<const T*>(part.x);
    const int64_t sample = n * map.d;
    uint32_t inside = 0;
    int bit = 0;
#pragma unroll 1
    for (int v = thread_index() / kChunks; v < voxels; v += kRows, ++bit) {
      const int z = by_plane(v), in_plane = v - z * size.w * size.h, y = by_row(in_plane), x = in_plane - y * size.w;
      const int gz = first.d + z * step, gy = first.h + y * step, gx = first.w + x * step;
      const bool in_map = static_cast<unsigned>(gz) < static_cast<unsigned>(map.d) &&
                          static_cast<unsigned>(gy) < static_cast<unsigned>(map.h) &&
                          static_cast<unsigned>(gx) < static_cast<unsigned>(map.w);
      const bool present = in_map && valid > 0;
      const int64_t offset = (((sample + gz) * map.h + gy) * map.w + gx) * part.channels + channel;
      const int to = at + swizzle(v * kPitch + thread_index() % kChunks * 16);
      if (in.aligned) {
        copy_async16(to, present ? base + offset : base, present ? 16 : 0);
      } else {
        store_shared16(to, present ? load_chunk(base + offset, valid, false) : Word16{});
      }
      inside |= static_cast<uint32_t>(in_map) << bit;
    }
    return inside;
  }

  // Copies the coefficients of a block of channels to shared memory; the identity where nothing is pending, and
  // zeros, under which v = 0, for channels that do not exist.
  FF_DEVICE static void load_coefficients(const Sources& in, int64_t n, int64_t batch, int block, int at) {
    float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
    for (int i = thread_index(); i < kCoefRows * kBlock; i += kConvThreads) {
      const int row = i / kBlock;
      int channel = block * kBlock + i % kBlock;
      const bool second = in.part[1].x && channel >= in.part[0].channels;
      if (second) channel -= in.part[0].channels;
      const Source& part = in.part[second];
      float value = row == kA || row == kG ? 1.0f : 0.0f;
      if (part.coef && channel < part.channels) value = part.coef[(row * batch + n) * part.channels + channel];
      out[i] = channel < part.channels ? value : 0.0f;
    }
  }

  // Applies them to the chunks that this thread has loaded. What lies outside the map stays zero: padding comes
  // behind the affine.
  FF_DEVICE void transform(const Sources& in, int block, uint32_t inside, int at, int coefficients) const {
    int channel;
    const Source& part = source(in, block, channel);
    if (!part.coef) return;
    const int group = thread_index() % kChunks;
    Coefficients<kV> coef;
#pragma unroll
    for (int r = 0; r < kCoefRows; ++r) {
#pragma unroll
      for (int i = 0; i < kV; i += 4) {
        float four[4];
        unpack16<float>(load_shared16(coefficients + (r * kBlock + group * kV + i) * 4), four);
#pragma unroll
        for (int j = 0; j < 4; ++j) coef.row[r][i + j] = four[j];
      }
    }
#pragma unroll 1
    for (int v = thread_index() / kChunks; v < voxels; v += kRows, inside >>= 1) {
      if (!(inside & 1)) continue;
      const int to = at + swizzle(v * kPitch + group * 16);
      float values[kV];
      unpack16<T>(load_shared16(to), values);
      coef.apply(values, part.act);
      store_shared16(to, pack16<T>(values));
    }
  }
};

// Row m of a tile as a box coordinate.
FF_DEVICE Extent tile_voxel(const Extent& tile_log2, int m) {
  return {m >> (tile_log2.h + tile_log2.w), m >> tile_log2.w & ((1 << tile_log2.h) - 1), m & ((1 << tile_log2.w) - 1)};
}

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

template <class T>
Sources sources_of(const Input (&inputs)[2]) {
  Sources in{};
  in.aligned = true;
  for (int i = 0; i < 2; ++i) {
    const Input& from = inputs[i];
    in.part[i] = {from.x, from.coef, from.channels, from.coef ? from.act : kNone};
    if (from.x) in.aligned = in.aligned && on_chunks<T>(from.x, from.channels);
  }
  return in;
}

}  // namespace fastfilm::cuda
