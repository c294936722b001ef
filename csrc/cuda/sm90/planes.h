// Planes of voxels in shared memory, as the products read them, and how threads fill them: the warpgroup that brings, or
// all of a block.
//
// A plane holds a box of voxels of depth 1 for a block of input channels: [chunk of 8 channels][voxel][16 bytes]. Eight
// voxels in a row are a core matrix wherever they begin, so a tap is a distance of its voxels from the first ones. A
// table has the number of each voxel in the map; three tables take turns.
#pragma once

#include "../operands.h"
#include "layout.h"
#include "primitives.h"

namespace fastfilm::cuda::sm90 {

constexpr int kPieceChannels = 4;  // of a voxel, which a thread transforms at a time

// The number of this thread among the kCrew that fill planes: a warpgroup, or a block, which is short of registers.
template <int kCrew>
FF_DEVICE unsigned crew() {
  return kCrew == kWarpgroup ? static_cast<unsigned>(thread_index()) % kWarpgroup : thread_anew();
}

// One map or two as `Plane::copy` takes them: their places at the sample's first voxel and a channel, the channels that they
// have, those that are left from that one on, and whether all chunks are whole and lie on 16 bytes.
template <class T, int kMaps>
struct Origin {
  const T* map[kMaps];
  int channels, valid;
  bool aligned;
};

// A plane: its voxels, and where its table is; kCrew threads fill it.
template <int kCrew = kWarpgroup>
struct Plane {
  const SlabShape& shape;
  int chunk_bytes, table, bk;

  // Writes the table: the number in its sample of each voxel, or -1 outside of the map. The plane begins at voxel `first` of
  // the map; its voxels are `step` apart there. A plane of depth 4 has the four classes of voxels that a stride of 2 has.
  FF_DEVICE void find(const Extent& first, const Extent& step, const Extent& map) const {
    int* numbers = reinterpret_cast<int*>(shared_memory() + table);
    const bool deep = static_cast<unsigned>(first.d) < static_cast<unsigned>(map.d);
#pragma unroll 1
    for (int v = crew<kCrew>(); v < shape.numbers; v += kCrew) {
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

  // Starts to copy the channels from `first` on of a map to `at`, or of two alike maps; `of(channel)` is where they have a
  // thread's channels (Origin). Voxels outside of the map become zeros. The threads of a voxel have neighbouring chunks.
  template <class T, int kMaps, class Of>
  FF_DEVICE void copy(const int (&at)[kMaps], int first, Of of) const {
    constexpr int kFew = 4;
    const unsigned chunks = bk / 8;
    const int chunk = crew<kCrew>() % chunks, rows = kCrew / chunks;
    const int* numbers = reinterpret_cast<const int*>(shared_memory() + table);
    const Origin<T, kMaps> from = of(first + chunk * 8);
    int to = chunk * chunk_bytes + crew<kCrew>() / chunks * 16;
    if (from.aligned) {
      const bool exists = from.valid > 0;
#pragma unroll 1
      for (int v = crew<kCrew>() / chunks; v < shape.voxels; v += kFew * rows, to += kFew * rows * 16) {
        int number[kFew];
#pragma unroll
        for (int i = 0; i < kFew; ++i) number[i] = numbers[v + i * rows];
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          // nothing is read of a voxel that is not present
          const int bytes = number[i] >= 0 && exists ? 16 : 0;
          const int64_t distance = static_cast<int64_t>(number[i]) * from.channels;
          if (v + i * rows < shape.voxels) {
#pragma unroll
            for (int m = 0; m < kMaps; ++m) copy_async16(at[m] + to + i * rows * 16, from.map[m] + distance, bytes);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int v = crew<kCrew>() / chunks; v < shape.voxels; v += rows, to += rows * 16) {
        const int number = numbers[v];
        const bool present = number >= 0 && from.valid > 0;
        const int64_t distance = static_cast<int64_t>(number) * from.channels;
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          store_shared16(at[m] + to, present
                                         ? load_chunk(from.map[m] + distance, from.valid < 8 ? from.valid : 8, false)
                                         : Word16{});
        }
      }
    }
  }

  // The first channel of this thread's piece.
  FF_DEVICE int channel() const {
    return crew<kCrew>() % static_cast<unsigned>(bk / kPieceChannels) * kPieceChannels;
  }

  // Calls f(numbers, places), and meanwhile(), for all voxels, kFew at a time, whose latencies overlap, with this
  // thread's piece of each: `places` are distances from the plane's beginning, negative behind its end.
  template <int kFew, class F, class G>
  FF_DEVICE void each(F f, G meanwhile) const {
    const unsigned pieces = bk / kPieceChannels;
    const int piece = crew<kCrew>() % pieces, rows = kCrew / pieces;
    const int* numbers = reinterpret_cast<const int*>(shared_memory() + table);
    int place = piece / 2 * chunk_bytes + piece % 2 * 8 + crew<kCrew>() / pieces * 16;
#pragma unroll 1
    for (int v = crew<kCrew>() / pieces; v < shape.voxels; v += kFew * rows, place += kFew * rows * 16) {
      int number[kFew], places[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        number[i] = numbers[v + i * rows];
        // behind the plane's end lies what others work on
        places[i] = v + i * rows < shape.voxels ? place + i * rows * 16 : -1;
      }
      f(number, places);
      meanwhile();
    }
  }
};

// Loads pieces, of voxels that are not in the map too: these may be anything. Waiting for their numbers would take longer.
template <class T, int kFew>
FF_DEVICE void load_pieces(int at, const int (&place)[kFew], float (&v)[kFew * kPieceChannels]) {
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    Word8 word{};
    if (place[i] >= 0) word = load_shared8(at + place[i]);
    unpack_few<T>(Few<T, kPieceChannels>{{word.w[0], word.w[1]}}, &v[i * kPieceChannels]);
  }
}
// Stores those of voxels that exist, two numbers in each word.
template <int kFew>
FF_DEVICE void store_pieces(int at, const int (&number)[kFew], const int (&place)[kFew],
                            const uint32_t (&words)[kFew * kPieceChannels / 2]) {
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    if (number[i] >= 0) store_shared8(at + place[i], {{words[2 * i], words[2 * i + 1]}});
  }
}

// The contents of planes, of the channels from `first` on: `load` starts the copies, `load_constants` brings the constants of
// `count` channels, rows [count], and `transform` computes the values in place with them, as those of operands.h do.
// `voxel` is the number of the sample's first voxel in the batch; `meanwhile` is called on the way.
//   kRegisters   of a thread that brings them to a convolution
template <class T, int kFew = 4, int kCrew = kWarpgroup>
struct ActivatedPlanes {
  using Params = Sources;
  static constexpr int kRegisters = 128;

  FF_DEVICE static void load_constants(const Sources& in, int64_t n, int64_t batch, int first, int count, int at) {
    load_rows<kCrew>(batch, n, first, count, at, [&](int& channel) {
      const Input& part = in.source(channel);
      return CoefSource{part.coef, part.channels};
    });
  }

  FF_DEVICE static void load(const Plane<kCrew>& plane, const Sources& in, int64_t voxel, int first, int at, int) {
    plane.template copy<T, 1>({at}, first, [&](int channel) -> Origin<T, 1> {
      const Input& part = in.source(channel);
      const T* map = static_cast<const T*>(part.x) + voxel * part.channels + channel;
      return {{map}, part.channels, part.channels - channel, in.aligned};
    });
  }

  template <class G>
  FF_DEVICE static void transform(const Plane<kCrew>& plane, const Sources& in, int64_t, int first, int at, int,
                                  int constants, int count, G meanwhile) {
    const int mine = plane.channel();
    int channel = first + mine;
    const Input& part = in.source(channel);
    if (!part.coef) return;
    Coefficients<kPieceChannels> coef;
    load_coefficients(constants + mine * 4, count, coef);
    plane.template each<kFew>([&](const int (&number)[kFew], const int (&place)[kFew]) {
      float v[kFew * kPieceChannels];
      load_pieces<T>(at, place, v);
      coef.template apply<true>(v, part.act);
      uint32_t words[kFew * kPieceChannels / 2];
#pragma unroll
      for (int i = 0; i < kFew * kPieceChannels; i += 2) words[i / 2] = pack(v[i], v[i + 1], T{});
      store_pieces(at, number, place, words);
    }, meanwhile);
  }
};

template <class T, int kCrew = kWarpgroup>
struct GradientPlanes {
  using Params = Gradients;
  using Rows = GradientRowsAt<kPieceChannels>;
  static constexpr int kRegisters = 120, kFew = kCrew == kWarpgroup ? 3 : 2, kValues = kFew * kPieceChannels;

  FF_DEVICE static void load_constants(const Gradients& in, int64_t n, int64_t batch, int first, int count, int at) {
    load_gradient_rows<kCrew>(in, n, batch, first, count, at);
  }

  FF_DEVICE static void load(const Plane<kCrew>& plane, const Gradients& in, int64_t voxel, int first, int at,
                             int beside) {
    const auto map = [&](const void* data, int channel) {
      return static_cast<const T*>(data) + voxel * in.channels + channel;
    };
    if (in.given.y) {
      plane.template copy<T, 2>({at, beside}, first, [&](int channel) -> Origin<T, 2> {
        return {{map(in.given.dy, channel), map(in.given.y, channel)}, in.channels, in.channels - channel, in.aligned};
      });
    } else {
      plane.template copy<T, 1>({at}, first, [&](int channel) -> Origin<T, 1> {
        return {{map(in.given.dy, channel)}, in.channels, in.channels - channel, in.aligned};
      });
    }
  }

  template <class G>
  FF_DEVICE static void transform(const Plane<kCrew>& plane, const Gradients& in, int64_t voxel, int first, int at,
                                  int beside, int constants, int count, G meanwhile) {
    run(plane, in, voxel, first, at, beside, constants, count,
        [](const int (&)[kFew], const float (&)[kValues], const float (&)[kValues]) {}, meanwhile);
  }

  // The transform, with a call of add(numbers, e, gradient at the slopes) for a few voxels at a time.
  template <class F, class G>
  FF_DEVICE static void run(const Plane<kCrew>& plane, const Gradients& in, int64_t voxel, int first, int at,
                            int beside, int constants, int count, F add, G meanwhile) {
    const int mine = plane.channel(), channel = first + mine;
    if (channel >= in.channels) return;
    const int act = in.given.pre ? in.given.pre_act : kNone;
    const Rows rows{constants + mine * 4, count};
    const uint32_t begin = static_cast<uint32_t>(voxel * in.channels + channel);
    plane.template each<kFew>([&](const int (&number)[kFew], const int (&place)[kFew]) {
      float e[kValues], at_slope[kValues] = {};
      load_pieces<T>(at, place, e);
      uint32_t words[kValues / 2];
      if (in.given.y) {
        float y[kValues];
        load_pieces<T>(beside, place, y);
        through_moments<kPieceChannels>(rows, act, y, e, at_slope);
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          const uint32_t voxel_at = begin + static_cast<uint32_t>(number[i]) * static_cast<uint32_t>(in.channels);
          dither_four<T>(&e[i * kPieceChannels], voxel_at, &words[2 * i]);
        }
      } else {
        // without a scale its row has ones
        scaled<kPieceChannels>(rows, e);
#pragma unroll
        for (int i = 0; i < kValues; i += 2) words[i / 2] = pack(e[i], e[i + 1], T{});
      }
      add(number, e, at_slope);
      if (in.pending()) store_pieces(at, number, place, words);
    }, meanwhile);
  }
};

}  // namespace fastfilm::cuda::sm90
