// Slabs: boxes of voxels in shared memory, one block of channels at a time. operands.h has their contents.
//
// Rows (one voxel's channels) lie densely. The 16-byte chunks of each 128 bytes are permuted, so that the eight rows
// that ldmatrix reads at once lie in different banks. A table has the number of each row's voxel in the map; it is written
// once a tile, and serves the copies and the arithmetic of all blocks of channels.
#pragma once

#include "affine.h"
#include "calls.h"

namespace fastfilm::cuda {

FF_DEVICE int swizzle(int byte) { return byte ^ (byte >> 3 & 0x70); }

template <class T, int kBlock>
struct Slab {
  static constexpr int kV = kLanes<T>, kPitch = kBlock * static_cast<int>(sizeof(T)), kChunks = kPitch / 16;
  // a piece: two channels of a voxel, which a thread computes with
  static constexpr int kPiece = 2, kPieces = kBlock / kPiece;
  static constexpr int kCoefBytes = kCoefRows * kBlock * 4;

  const SlabShape& shape;
  Extent map;
  int step, table;

  // Voxels of a map, `step` apart; their numbers are in shared memory at `table`.
  FF_DEVICE Slab(const SlabShape& shape, const Extent& map, int step, int table)
      : shape(shape), map(map), step(step), table(table) {}

  // The first channel of this thread's chunk.
  FF_DEVICE static int channel(int block) { return block * kBlock + thread_anew() % kChunks * kV; }

  // The first channel of this thread's piece.
  FF_DEVICE static int piece_channel(int block) { return block * kBlock + thread_anew() % kPieces * kPiece; }

  // Writes the table: the number in its sample of each of the slab's voxels, or -1 outside of the map. The slab begins at
  // voxel `first` of the map.
  FF_DEVICE void find(const Extent& first) const {
    int* numbers = reinterpret_cast<int*>(shared_memory() + table);
    const Extent& size = shape.size;
    const auto divided = [](int n, uint32_t inverse) {
      return static_cast<int>(static_cast<uint32_t>(n) * inverse >> 22);
    };
#pragma unroll 1
    for (int v = thread_index(); v < shape.numbers; v += kConvThreads) {
      const int z = divided(v, shape.by_plane), in_plane = v - z * size.w * size.h, y = divided(in_plane, shape.by_row);
      const Extent at{first.d + z * step, first.h + y * step, first.w + (in_plane - y * size.w) * step};
      const bool in_map = static_cast<unsigned>(at.d) < static_cast<unsigned>(map.d) &&
                          static_cast<unsigned>(at.h) < static_cast<unsigned>(map.h) &&
                          static_cast<unsigned>(at.w) < static_cast<unsigned>(map.w) && v < shape.voxels;
      numbers[v] = in_map ? (at.d * map.h + at.h) * map.w + at.w : -1;
    }
  }

  // Bytes from a thread's part of a voxel to that of its next one, where the threads share a voxel in `kParts` parts. The
  // swizzle of a part is the same for all voxels of a thread.
  template <int kParts>
  static constexpr int kStride = kConvThreads / kParts * kPitch;

  // Calls f(numbers, offset) for all voxels whose part is this thread's, `kFew` at a time. The part of voxel i is `offset`
  // + i * kStride<kParts> bytes from the slab's beginning.
  template <int kParts, int kFew, class F>
  FF_DEVICE void each(F f) const {
    constexpr int kRows = kConvThreads / kParts;
    static_assert(kStride<kParts> % 1024 == 0, "the swizzle repeats every 1024 bytes");
    const int thread = thread_anew(), row = thread / kParts;
    const int* numbers = reinterpret_cast<const int*>(shared_memory() + table);
    int offset = swizzle(row * kPitch + thread % kParts * (kPitch / kParts));
#pragma unroll 1
    for (int v = row; v < shape.voxels; v += kFew * kRows, offset += kFew * kStride<kParts>) {
      int number[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) number[i] = numbers[v + i * kRows];
      f(number, offset);
    }
  }

  // Starts to copy this thread's chunks of a map [N, *map, channels] to `at`; voxels outside of the map become zeros.
  FF_DEVICE void copy(const T* base, int channels, int channel, bool aligned, int64_t n, int at) const {
    const int left = channels - channel, valid = left < 0 ? 0 : left < kV ? left : kV;
    const T* sample = base + n * map.volume() * channels + channel;
    each<kChunks, 1>([&](const int (&number)[1], int offset) {
      const bool present = number[0] >= 0 && valid > 0;
      const T* from = present ? sample + static_cast<int64_t>(number[0]) * channels : base;
      if (aligned) {
        copy_async16(at + offset, from, present ? 16 : 0);
      } else {
        store_shared16(at + offset, present ? load_chunk(from, valid, false) : Word16{});
      }
    });
  }

  // Loads this thread's pieces of `kFew` voxels, as `each` gives them, from a slab at `at`; zeros outside of the map.
  template <int kFew>
  FF_DEVICE static void load_pieces(int at, const int (&number)[kFew], float (&v)[kFew * kPiece]) {
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      Few<T, kPiece> few{};
      const auto* from = reinterpret_cast<const T*>(shared_memory() + at + i * kStride<kPieces>);
      if (number[i] >= 0) few = load_few<T, kPiece>(from, kPiece, true);
      unpack_few<T>(few, &v[i * kPiece]);
    }
  }
  template <int kFew>
  FF_DEVICE static void store_pieces(int at, const int (&number)[kFew], const float (&v)[kFew * kPiece]) {
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      auto* to = reinterpret_cast<T*>(shared_memory() + at + i * kStride<kPieces>);
      if (number[i] >= 0) store_few<T, kPiece>(to, kPiece, true, &v[i * kPiece]);
    }
  }
};

// Loads one number for each of kV channels from shared memory.
template <int kV>
FF_DEVICE void load_row(int at, float* row) {
  if constexpr (kV == 1) {
    row[0] = *reinterpret_cast<const float*>(shared_memory() + at);
  } else if constexpr (kV == 2) {
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
template <int kV>
FF_DEVICE void load_row(int at, float (&row)[kV]) {
  load_row<kV>(at, &row[0]);
}

// The coefficients [kCoefRows, N, channels] of a source of channels; null: nothing is pending on it.
struct CoefSource {
  const float* coef;
  int channels;
};

// The number of this thread among kThreads threads that work together: all of a block of kConvThreads, or some whose
// first one has a number divisible by kThreads.
template <int kThreads>
FF_DEVICE int crew_thread() {
  return kThreads == kConvThreads ? thread_index() : thread_anew() % kThreads;
}

// Brings the coefficients of sample n and `count` channels from `first` on into shared memory, rows [count].
// `source(channel)` returns the source of a channel, whose number in it `channel` becomes. Where nothing is pending they
// are the identity, and for channels that do not exist zeros, under which v = 0. kThreads threads do it, all of a block or
// some that lie together.
template <int kThreads = kConvThreads, class F>
FF_DEVICE void load_rows(int64_t batch, int64_t n, int first, int count, int at, F source) {
  float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
  for (int i = crew_thread<kThreads>(); i < kCoefRows * count; i += kThreads) {
    const int row = i / count;
    int channel = first + i % count;
    const CoefSource from = source(channel);
    float value = row == kA || row == kG ? 1.0f : 0.0f;
    if (from.coef && channel < from.channels) value = from.coef[(row * batch + n) * from.channels + channel];
    out[i] = channel < from.channels ? value : 0.0f;
  }
}
template <int kV>
FF_DEVICE void load_coefficients(int at, int count, Coefficients<kV>& coef) {
#pragma unroll
  for (int r = 0; r < kCoefRows; ++r) load_row(at + r * count * 4, coef.row[r]);
}

// Coefficients in shared memory, rows of kCount channels, which are loaded each time anew: kept, they would occupy
// registers.
struct SharedRows {
  int at, count;
  FF_DEVICE void get(CoefRow r, float (&values)[2]) const { load_anew(at + r * count * 4, values); }
};

// The coordinates of voxel m of a tile.
FF_DEVICE Extent tile_voxel(const Extent& tile_log2, int m) {
  return {m >> (tile_log2.h + tile_log2.w), m >> tile_log2.w & ((1 << tile_log2.h) - 1), m & ((1 << tile_log2.w) - 1)};
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
