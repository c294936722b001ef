// Planes of input voxels in shared memory, as the products read them, and the warpgroup that brings them.
//
// A plane holds a box of voxels of depth 1 for a block of input channels: [chunk of 8 channels][voxel][16 bytes]. Eight
// voxels in a row are a core matrix wherever they begin, so a tap is a distance of its voxels from the first ones. A
// table has the number of each voxel in the map; three tables take turns.
#pragma once

#include "../operands.h"
#include "layout.h"
#include "primitives.h"

namespace fastfilm::cuda::sm90 {

// The number of this thread in its warpgroup, and of its warp.
FF_DEVICE int crew() { return thread_index() % kWarpgroup; }

// A plane: its voxels, and where its table is.
struct Plane {
  const SlabShape& shape;
  int chunk_bytes, table, bk;

  // Writes the table: the number in its sample of each voxel, or -1 outside of the map. The plane begins at voxel `first` of
  // the map; its voxels are `step` apart there. A plane of depth 4 has the four classes of voxels that a stride of 2 has.
  FF_DEVICE void find(const Extent& first, const Extent& step, const Extent& map) const {
    int* numbers = reinterpret_cast<int*>(shared_memory() + table);
    const bool deep = static_cast<unsigned>(first.d) < static_cast<unsigned>(map.d);
#pragma unroll 1
    for (int v = crew(); v < shape.numbers; v += kWarpgroup) {
      int row = static_cast<int>(static_cast<uint32_t>(v) * shape.by_row >> 22);
      int h = first.h, w = first.w + (v - row * shape.size.w) * step.w;
      if (shape.size.d > 1) {
        const int of_class = static_cast<int>(static_cast<uint32_t>(v) * shape.by_plane >> 22);
        row -= of_class * shape.size.h;
        h += of_class / 2;
        w += of_class % 2;
      }
      h += row * step.h;
      const bool present = deep && v < shape.voxels && static_cast<unsigned>(h) < static_cast<unsigned>(map.h) &&
                           static_cast<unsigned>(w) < static_cast<unsigned>(map.w);
      numbers[v] = present ? (first.d * map.h + h) * map.w + w : -1;
    }
  }

  // Starts to copy the channels from `first` on of a map [N, *map, channels] to `at`; `end` of them exist in the map. Voxels
  // outside of the map become zeros. The threads of a voxel have neighbouring chunks.
  template <class T, class Of>
  FF_DEVICE void copy(int at, int first, Of of) const {
    const int chunks = bk / 8, chunk = crew() % chunks, rows = kWarpgroup / chunks;
    const int* numbers = reinterpret_cast<const int*>(shared_memory() + table);
    const auto from = of(first +
                         chunk * 8);  // {sample's first voxel at the channel, channels of the map, valid, aligned}
    int to = at + chunk * chunk_bytes + crew() / chunks * 16;
#pragma unroll 4
    for (int v = crew() / chunks; v < shape.voxels; v += rows, to += rows * 16) {
      const int number = numbers[v];
      const bool present = number >= 0 && from.valid > 0;
      const T* source = from.sample + (present ? static_cast<int64_t>(number) * from.channels : 0);
      if (from.aligned) {
        copy_async16(to, present ? source : from.base, present ? 16 : 0);
      } else {
        store_shared16(to, present ? load_chunk(source, from.valid < 8 ? from.valid : 8, false) : Word16{});
      }
    }
  }

  // Calls f(numbers, places) for all voxels, kFew at a time, whose latencies overlap, with this thread's piece of four
  // channels of each: `places` are distances from the plane's beginning.
  template <int kFew, class F>
  FF_DEVICE void each(F f) const {
    const int pieces = bk / 4, piece = crew() % pieces, rows = kWarpgroup / pieces;
    const int* numbers = reinterpret_cast<const int*>(shared_memory() + table);
    int place = piece / 2 * chunk_bytes + piece % 2 * 8 + crew() / pieces * 16;
#pragma unroll 1
    for (int v = crew() / pieces; v < shape.voxels; v += kFew * rows, place += kFew * rows * 16) {
      int number[kFew], places[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        number[i] = numbers[v + i * rows];
        places[i] = place + i * rows * 16;
      }
      f(number, places);
    }
  }
};

constexpr int kPieceChannels = 4;

template <class T, int kFew>
FF_DEVICE void load_pieces(int at, const int (&number)[kFew], const int (&place)[kFew],
                           float (&v)[kFew * kPieceChannels]) {
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    Few<T, kPieceChannels> few{};
    if (number[i] >= 0) {
      const Word8 word = load_shared8(at + place[i]);
      few.w[0] = word.w[0];
      few.w[1] = word.w[1];
    }
    unpack_few<T>(few, &v[i * kPieceChannels]);
  }
}
template <class T, int kFew>
FF_DEVICE void store_pieces(int at, const int (&number)[kFew], const int (&place)[kFew],
                            const float (&v)[kFew * kPieceChannels]) {
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    if (number[i] < 0) continue;
    Few<T, kPieceChannels> few;
    pack_few<T, kPieceChannels>(&v[i * kPieceChannels], few);
    store_shared8(at + place[i], {{few.w[0], few.w[1]}});
  }
}

// A map as `Plane::copy` takes it.
template <class T>
struct Origin {
  const T *base, *sample;
  int channels, valid;
  bool aligned;
};
template <class T>
FF_DEVICE Origin<T> origin_of(const void* map, int channels, int channel, bool aligned, int64_t first_voxel) {
  const T* base = static_cast<const T*>(map);
  return {base, base + first_voxel * channels + channel, channels, channels - channel, aligned};
}

// The contents of planes, of the channels from `first` on: `load` starts the copies, `load_constants` brings the constants of
// `count` channels, rows [count], and `transform` computes the values in place with them, as those of operands.h do.
// `voxel` is the number of the sample's first voxel in the batch.
//   kRegisters   of a thread that brings them to a convolution
template <class T, int kFew = 4>
struct ActivatedPlanes {
  using Params = Sources;
  static constexpr int kRegisters = 128;

  FF_DEVICE static bool pending(const Sources& in) { return in.part[0].coef || in.part[1].coef; }

  FF_DEVICE static const Input& source(const Sources& in, int& channel) {
    const bool second = in.part[1].x && channel >= in.part[0].channels;
    if (second) channel -= in.part[0].channels;
    return in.part[second];
  }

  FF_DEVICE static void load_constants(const Sources& in, int64_t n, int64_t batch, int first, int count, int at) {
    load_rows<kWarpgroup>(batch, n, first, count, at, [&](int& channel) {
      const Input& part = source(in, channel);
      return CoefSource{part.coef, part.channels};
    });
  }

  FF_DEVICE static void load(const Plane& plane, const Sources& in, int64_t voxel, int first, int at, int) {
    plane.template copy<T>(at, first, [&](int channel) {
      const Input& part = source(in, channel);
      return origin_of<T>(part.x, part.channels, channel, in.aligned, voxel);
    });
  }

  FF_DEVICE static void transform(const Plane& plane, const Sources& in, int64_t, int first, int at, int, int constants,
                                  int count) {
    const int mine = crew() % (plane.bk / kPieceChannels) * kPieceChannels;
    int channel = first + mine;
    const Input& part = source(in, channel);
    if (!part.coef) return;
    Coefficients<kPieceChannels> coef;
    load_coefficients(constants + mine * 4, count, coef);
    plane.template each<kFew>([&](const int (&number)[kFew], const int (&place)[kFew]) {
      float v[kFew * kPieceChannels];
      load_pieces<T>(at, number, place, v);
      coef.apply(v, part.act);
      store_pieces<T>(at, number, place, v);
    });
  }
};

template <class T>
struct GradientPlanes {
  using Params = Gradients;
  static constexpr int kRegisters = 120, kFew = 2, kValues = kFew * kPieceChannels;

  FF_DEVICE static bool pending(const Gradients& in) { return in.given.y || in.given.scale; }

  FF_DEVICE static void load_constants(const Gradients& in, int64_t n, int64_t batch, int first, int count, int at) {
    load_gradient_rows<kWarpgroup>(in, n, batch, first, count, at);
  }

  FF_DEVICE static void load(const Plane& plane, const Gradients& in, int64_t voxel, int first, int at, int beside) {
    const auto of = [&](const void* map) {
      return [&, map](int channel) { return origin_of<T>(map, in.channels, channel, in.aligned, voxel); };
    };
    plane.template copy<T>(at, first, of(in.given.dy));
    if (in.given.y) plane.template copy<T>(beside, first, of(in.given.y));
  }

  FF_DEVICE static void transform(const Plane& plane, const Gradients& in, int64_t voxel, int first, int at, int beside,
                                  int constants, int count) {
    run(plane, in, voxel, first, at, beside, constants, count,
        [](const float (&)[kValues], const float (&)[kValues]) {});
  }

  // The transform, with a call of add(e, gradient at the slopes) for a few voxels at a time.
  template <class F>
  FF_DEVICE static void run(const Plane& plane, const Gradients& in, int64_t voxel, int first, int at, int beside,
                            int constants, int count, F add) {
    const int mine = crew() % (plane.bk / kPieceChannels) * kPieceChannels, channel = first + mine;
    if (channel >= in.channels) return;
    const int act = in.given.pre ? in.given.pre_act : kNone;
    GradientRows<kPieceChannels> rows;
    rows.load(constants + mine * 4, count, in.given.y);
    const int64_t begin = voxel * in.channels + channel;
    plane.template each<kFew>([&](const int (&number)[kFew], const int (&place)[kFew]) {
      float e[kValues], at_slope[kValues] = {};
      load_pieces<T>(at, number, place, e);
      if (in.given.y) {
        float y[kValues];
        load_pieces<T>(beside, number, place, y);
        through_moments(rows, act, number, y, e, at_slope);
      } else if (in.given.scale) {
        scaled(rows, number, e);
      }
      add(e, at_slope);
      if (!pending(in)) return;
      if (in.given.y) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          e[i] = dithered<T>(
              e[i], begin + static_cast<int64_t>(number[i / kPieceChannels]) * in.channels + i % kPieceChannels);
        }
      }
      store_pieces<T>(at, number, place, e);
    });
  }
};

}  // namespace fastfilm::cuda::sm90
