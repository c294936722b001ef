// The convolution kernel by warpgroup products (sm_90a), for the forward pass and for the gradient at the input; layout.h
// has the layout and its words.
//
// A block of threads has one sample, one block of output channels and one class of output voxels, and walks over units.
// Warpgroups 0 and 1 multiply, warpgroup 2 brings. They meet at mbarriers only: each room for a plane or for weights has one
// that says it is full, and one that says it is empty.
//
//   brings      for each plane: waits for an empty room; writes the table of its voxels; starts its copies; then, while
//               these run, transforms the plane before it in place (the pending affine, or the gradient of the moments),
//               fences it for the tensor cores and says that it is full. One thread keeps the rooms for weights full by
//               bulk copies of slices.
//   multiplies  for each plane: waits until it and the next slices are full; starts their products; once those of the
//               slices before are done, says that their room is empty. After a unit its epilogue writes the products, which pass
//               through the warp's own staging so that a thread has 8 channels of a voxel.
//
//   brings        copy 0|copy 1 transform 0|copy 2 transform 1|copy 3 transform 2|copy 4 transform 3| ...
//   multiplies 0                           |products of plane 0|    epilogue    |products of plane 2| ...
//   multiplies 1                                               |products of plane 1|    epilogue    | ...
//
// Time runs to the right; in 2D with one block of input channels. Where all weights stay in shared memory nothing else
// ties the two that multiply together: the tensor cores are busy with one while the other writes. Else they take the
// same slices, at most as many rooms apart as there are.
#pragma once

#include "planes.h"

namespace fastfilm::cuda::sm90 {

// Numbers of the products of both halves in a thread.
using Accumulators = float[2][64];

// A thread has two rows of the products, r = 0 and 1: number 4 * line + 2 * r + b of sums[half] is row product_row(r) and voxel
// product_voxel(b) of a line of the half.
// They are computed anew each time, as are the places that follow from the thread's number: kept, they would occupy
// registers beside the products.
FF_DEVICE int product_row(int r) {
  const unsigned thread = thread_anew();
  return thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * r;
}
FF_DEVICE int product_voxel(int b) { return thread_anew() % 4u * 2 + b; }

// Products leave the registers half after half: the second one takes the place of the first one, so that one piece of
// code serves both.
constexpr int kHalves = 2, kGroupLines = 4, kGroups = kLines / kGroupLines;  // lines that are in a staging at a time
FF_DEVICE void next_half(Accumulators& sums) {
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i];
}

// The voxels of a half, in the voxels of the class: those of line `line` of output row `shift` are
// {d, h + line * shifts + shift, w ...}.
struct Half {
  Extent origin;
  const Layout& p;
  const Result& result;

  FF_DEVICE Half(const Layout& p, const Result& result, const Extent& first, int half) : p(p), result(result) {
    origin = {first.d, first.h + half * p.half.h, first.w + half * p.half.w};
  }
  // Whether all of its voxels are in the map.
  FF_DEVICE bool full() const {
    return origin.d < result.size.d && origin.h + kLines * p.shifts <= result.size.h && origin.w + 8 <= result.size.w;
  }
  // Lines of an output row that are in the map.
  FF_DEVICE int lines(int shift) const {
    const int left = result.size.h - origin.h - shift + p.shifts - 1;
    return origin.d < result.size.d && left > 0 ? left >> p.shifts_log2 : 0;
  }
  FF_DEVICE int columns() const { return result.size.w - origin.w; }
};

// A warp's staging: the 16 channels of its rows of the voxels of some lines, 32 bytes each. The two chunks of every other
// four voxels are exchanged, so that eight voxels' chunks lie in different banks.
struct Staging {
  static constexpr int kLine = 8 * 32, kStep = 2 * kLine;  // bytes of a line, and from a lane's voxel to the next one
  int at;
  FF_DEVICE int place(unsigned voxel, unsigned chunk) const { return at + voxel * 32 + (chunk ^ (voxel / 4 & 1)) * 16; }
  // Where this lane's row of the matrices of the first two lines is (load_matrix4_transposed, store_matrix4_transposed).
  FF_DEVICE int row() const {
    const unsigned lane = thread_anew() % 32u;
    return place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
};
// Stores the numbers of two lines, from line `line` of the half on.
template <class T>
FF_DEVICE void stage(const Accumulators& sums, int line, int row) {
  uint32_t r[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) r[m] = pack(sums[0][4 * line + 2 * m], sums[0][4 * line + 2 * m + 1], T{});
  store_matrix4_transposed(row, r);
}

// The 8 channels of a warp's rows that this lane moves between memory and a staging, of a voxel in every other line.
struct Piece {
  const Layout& p;
  unsigned chunk, voxel, channel, shift;  // voxel: the first one in the staging

  FF_DEVICE Piece(const Layout& p, int block_n) : p(p) {
    const unsigned thread = thread_anew(), row = thread / 32 % 4 * 16 + thread % 2 * 8;
    chunk = thread % 2;
    voxel = thread % 32 / 2;
    channel = block_n * p.bn + (row & (p.bn - 1));
    shift = row >> (6 - p.shifts_log2);
  }
  FF_DEVICE int line() const { return voxel / 8; }
  // Lines from the first voxel's on that are in the map; there may be more than a half has.
  FF_DEVICE int lines(const Half& half) const {
    return (static_cast<int>(voxel % 8) < half.columns() ? half.lines(shift) : 0) - line();
  }
  // The number of the first voxel in the sample, and from it to the next one.
  FF_DEVICE int number(const Half& half) const {
    const Result& result = half.result;
    const Extent& at = half.origin;
    const int h = at.h + shift + line() * p.shifts, w = at.w + voxel % 8;
    return ((result.first.d + at.d * p.out_step.d) * p.out.h + result.first.h + h * p.out_step.h) * p.out.w +
           result.first.w + w * p.out_step.w;
  }
  FF_DEVICE int step() const { return 2 * p.shifts * p.out_step.h * p.out.w; }
  // From a voxel to the one of the next half.
  FF_DEVICE int to_next() const { return p.half.h * p.out_step.h * p.out.w + p.half.w * p.out_step.w; }
};
constexpr int kVoxels = kLines / 2, kGroupVoxels = kGroupLines / 2;  // of a lane in a half and in a group

// A kernel's parts:
//   Planes    the contents of planes; see planes.h
//   Epilogue  `Params`; `load_constants`; a constructor, made once a block; `begin`, in front of a unit's products; `write`,
//             which gets a unit's products; `finish`
template <class T, template <class> class PlanesOf, template <class> class EpilogueOf>
struct Convolve {
  using Planes = PlanesOf<T>;
  using Epilogue = EpilogueOf<T>;
  struct Params {
    Layout layout;
    typename Planes::Params in;
    const T* weights;
    typename Epilogue::Params epilogue;
  };
  static constexpr int kThreads = sm90::kThreads, kMinBlocks = 1;
  // Registers of a thread that brings, and of one that multiplies. A block has 168 for each thread.
  static constexpr int kBlockRegisters = 3 * (65536 / kThreads / 8 * 8), kBringRegisters = Planes::kRegisters,
                       kMultiplyRegisters = (kBlockRegisters - kBringRegisters) / 2 / 8 * 8;

  // The places of the mbarriers.
  FF_DEVICE static int plane_full(const Layout& p, int slot) { return p.barriers_at + slot * 8; }
  FF_DEVICE static int plane_empty(const Layout& p, int slot) { return p.barriers_at + (p.slots + slot) * 8; }
  FF_DEVICE static int stage_full(const Layout& p, int stage) { return p.barriers_at + (2 * p.slots + stage) * 8; }
  FF_DEVICE static int stage_empty(const Layout& p, int stage) {
    return p.barriers_at + (2 * p.slots + p.stages + stage) * 8;
  }

  // A block's share of the work.
  struct Share {
    const Result& result;
    int64_t n;
    int block_n, first, last;  // units
    FF_DEVICE explicit Share(const Layout& p) : Share(p, block_anew()) {}
    FF_DEVICE Share(const Layout& p, const Grid& block)
        : result(p.result[block.y / p.blocks_n]), n(block.z), block_n(block.y % p.blocks_n) {
      const int units = result.units.volume();
      first = block.x * p.units_a_group < units ? block.x * p.units_a_group : units;
      last = first + p.units_a_group < units ? first + p.units_a_group : units;
    }
    // The first voxel of a unit, in the voxels of the class. Neighbouring units lie behind each other.
    FF_DEVICE Extent origin(const Layout& p, int unit) const {
      const int d = unit % result.units.d, rest = unit / result.units.d;
      const int h = rest / result.units.w, w = rest % result.units.w;
      return {d * (1 + p.pair.d), h * (kLines * p.shifts + p.half.h + p.pair.h), w * (8 + p.half.w + p.pair.w)};
    }
  };

  // A room of a ring, and the parity of the phase in which it is used.
  struct Room {
    int index = 0, parity = 0;
    FF_DEVICE void next(int rooms) {
      if (++index == rooms) {
        index = 0;
        parity ^= 1;
      }
    }
  };

  static FF_DEVICE void run(const Params& p) {
#ifdef FF_SM90A
    const Layout& layout = p.layout;
    if (thread_index() == 0) {
#pragma unroll 1
      for (int i = 0; i < layout.slots; ++i) {
        mbarrier_init(plane_full(layout, i), kWarpgroup);
        mbarrier_init(plane_empty(layout, i), kConsumers / 32);
      }
#pragma unroll 1
      for (int i = 0; i < layout.stages; ++i) {
        mbarrier_init(stage_full(layout, i), 1);
        mbarrier_init(stage_empty(layout, i), kConsumers / 32);
      }
      fence_async();
    }
    barrier();
    const int warpgroup = uniform(thread_index() / kWarpgroup);
    if (warpgroup == kConsumers / kWarpgroup) {
      give_registers<kBringRegisters>();
      bring(p);
    } else {
      take_registers<kMultiplyRegisters>();
      multiply(p, warpgroup);
    }
#endif
  }

  // The slices of a block's weights, in the order in which they are used. One thread starts their copies; what it knows of
  // them lies in shared memory, since in registers it would cost all threads some.
  struct Weights {
    // `slice` counts those of the unit, `plane_slice` those of a plane, `started` the first copies to each room.
    struct State {
      int unit, k, read, depth, plane_slice, slice, stage, parity, started;
    };
    const Layout& p;
    const T* weights;

    FF_DEVICE State& state() const { return *reinterpret_cast<State*>(shared_memory() + p.pump_at); }
    FF_DEVICE void begin() const {
      const Share share(p);
      state() = {share.result.taps ? share.first : share.last, 0, share.result.begin, 0, 0, 0, 0, 0, 0};
    }
    FF_DEVICE bool more() const { return state().unit < Share(p).last; }

    // Starts the copies for which there is room.
    FF_DEVICE void pump() const {
      const Share share(p);
      const Result& result = share.result;
      const int64_t of_block = static_cast<int64_t>(result.taps) * ((p.blocks_k - 1) * (p.bk / 16) + p.last_slices);
      const auto* from = reinterpret_cast<const unsigned char*>(weights) +
                         (result.weights + share.block_n * of_block) * kSliceBytes;
      State s = state();
#pragma unroll 1
      while (s.unit < share.last) {
        if (s.started == p.stages && !mbarrier_test(stage_empty(p, s.stage), s.parity ^ 1)) break;
        const Reads& reads = p.reads[s.read];
        const int all = p.plane_taps(reads) * p.slices_of(s.k), left = all - s.plane_slice;
        const int count = left < p.stage_slices ? left : p.stage_slices, full = stage_full(p, s.stage);
        mbarrier_expect(full, count * kSliceBytes);
        copy_bulk(s.stage * p.stage_slices * kSliceBytes, from + static_cast<int64_t>(s.slice) * kSliceBytes,
                  count * kSliceBytes, full);
        if (s.started < p.stages) ++s.started;
        if (++s.stage == p.stages) {
          s.stage = 0;
          s.parity ^= 1;
        }
        s.slice += count;
        s.plane_slice += count;
        if (s.plane_slice < all) continue;
        s.plane_slice = 0;
        if (++s.depth < reads.count.d) continue;
        s.depth = 0;
        if (++s.read < result.end) continue;
        s.read = result.begin;
        if (++s.k < p.blocks_k) continue;
        s.k = 0;
        s.slice = 0;
        s.unit = p.resident ? share.last : s.unit + 1;
      }
      state() = s;
    }
  };

  static FF_DEVICE void bring(const Params& p) {
    const Layout& layout = p.layout;
    const Share share(layout);
    const bool leads = crew<kWarpgroup>() == 0, pending = p.in.pending();
    const int count = layout.blocks_k * layout.bk;
    const Weights weights{layout, p.weights};
    const auto voxel = [&]() { return static_cast<int64_t>(block_anew().z) * layout.in.volume(); };
    if (leads) {
      weights.begin();
      weights.pump();
    }
    if (pending) Planes::load_constants(p.in, share.n, layout.n, 0, count, layout.inputs_at);

    const auto plane = [&](int r, int table) {
      return Plane<>{layout.reads[r].slab, layout.chunk_bytes, layout.tables_at + table * layout.numbers * 4, layout.bk};
    };
    const auto place = [&](int slot) { return layout.slabs_at + slot * layout.slab_bytes; };
    const auto beside = [&](int number) { return layout.beside_at + (number & 1) * layout.slab_bytes; };
    // the plane before the one whose copies start now: its block of channels, box and room in one register
    int before = 0, table = 0, number = 0;
    const auto deliver = [&]() {
      const int slot = before & 0xff;
      if (pending) {
        const int k = before >> 12, r = before >> 8 & 0xf;
        // the rooms for weights are filled in the meantime, too
        int turn = 0;
        Planes::transform(plane(r, table == 0 ? 2 : table - 1), p.in, voxel(), k * layout.bk, place(slot),
                          beside(number - 1), layout.inputs_at + k * layout.bk * 4, count, [&] {
          if (leads && ++turn % 2 == 0) weights.pump();
        });
      }
      fence_async();
      mbarrier_arrive(plane_full(layout, slot));
    };
    Room room;
#pragma unroll 1
    for (int unit = share.first; unit < share.last; ++unit) {
      const Extent origin = share.origin(layout, unit);
#pragma unroll 1
      for (int k = 0; k < layout.blocks_k; ++k) {
#pragma unroll 1
        for (int r = share.result.begin; r < share.result.end; ++r) {
#pragma unroll 1
          for (int j = 0; j <= layout.reads[r].count.d; ++j) {
            if (number >= layout.slots) {
              if (crew<kWarpgroup>() < 32) {
                while (!mbarrier_test(plane_empty(layout, room.index), room.parity ^ 1)) {
                  if (leads) weights.pump();
                }
              } else {
                mbarrier_wait(plane_empty(layout, room.index), room.parity ^ 1);
              }
            }
            const Plane<> now = plane(r, table);
            const Extent &step = layout.load_step, &base = layout.reads[r].base;
            now.find(
                {(origin.d + layout.pair.d * j) * step.d + base.d, (origin.h + layout.pair.h * j) * step.h + base.h,
                 (origin.w + layout.pair.w * j) * step.w + base.w},
                step, layout.in);
            // the copies of the plane before it have arrived, in all threads behind the barrier
            wait_copies<0>();
            barrier_of<1, kWarpgroup>();
            Planes::load(now, p.in, voxel(), k * layout.bk, place(room.index), beside(number));
            commit_copies();
            if (leads) weights.pump();
            if (number > 0) deliver();
            before = k << 12 | r << 8 | room.index;
            room.next(layout.slots);
            table = table == 2 ? 0 : table + 1;
            ++number;
          }
        }
      }
    }
    if (number > 0) {
      wait_copies<0>();
      barrier_of<1, kWarpgroup>();
      deliver();
    }
    if (leads) {
      while (weights.more()) weights.pump();
    }
  }

  static FF_DEVICE void multiply(const Params& p, int consumer) {
    const Layout& layout = p.layout;
    const Share share(layout);
    Epilogue::load_constants(p.epilogue, layout, share.n, share.block_n * layout.bn, layout.outputs_at);
    barrier_of<2, kConsumers>();
    Epilogue epilogue(p.epilogue, layout, share.n, share.block_n);
    Room plane, stage;
    Accumulators sums;
    // rooms that are empty once the products before the last ones are done
    int plane_done = -1, stage_done = -1;
    const auto release = [&](int mbarrier) {
      if (thread_index() % 32 == 0) mbarrier_arrive(mbarrier);
    };
    const auto release_done = [&]() {
      if (stage_done >= 0 && !layout.resident) release(stage_empty(layout, stage_done));
      if (plane_done >= 0) release(plane_empty(layout, plane_done));
      stage_done = plane_done = -1;
    };
#pragma unroll 1
    for (int unit = share.first; unit < share.last; ++unit) {
      const Extent origin = share.origin(layout, unit);
      const Extent first{origin.d + layout.pair.d * consumer, origin.h + layout.pair.h * consumer,
                         origin.w + layout.pair.w * consumer};
      epilogue.begin(p.epilogue, layout, share.result, first);
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = 0;
      if (layout.resident) stage = {};  // all are full from the first unit on
#pragma unroll 1
      for (int k = 0; k < layout.blocks_k; ++k) {
        const int slices = layout.slices_of(k);
#pragma unroll 1
        for (int r = share.result.begin; r < share.result.end; ++r) {
          const Reads& reads = layout.reads[r];
          const int pitch = reads.slab.size.w, half = layout.half.h * pitch + layout.half.w;
#pragma unroll 1
          for (int j = 0; j <= reads.count.d; ++j, plane.next(layout.slots)) {
            mbarrier_wait(plane_full(layout, plane.index), plane.parity);
            warp_barrier();
            // in 3D the depth tap; in 2D the one that there is
            if (const int tap = j - consumer; tap < 0 || tap >= reads.count.d) {
              release(plane_empty(layout, plane.index));
              continue;
            }
            const Descriptor voxels = descriptor(layout.slabs_at + plane.index * layout.slab_bytes, layout.chunk_bytes,
                                                 pitch * layout.shifts * 16);
            int left = layout.plane_taps(reads) * slices, slice = 0, column = 0, row = 0, at = 0;
            const auto advance = [&]() {
              at += layout.chunk_bytes / 8;
              if (++slice < slices) return;
              slice = 0;
              if (++column == reads.count.w) {
                column = 0;
                row += pitch;
              }
              at = row + column;
            };
#pragma unroll 1
            while (left > 0) {
              int some = left < layout.stage_slices ? left : layout.stage_slices;
              left -= some;
              mbarrier_wait(stage_full(layout, stage.index), stage.parity);
              warp_barrier();
              Descriptor weights = descriptor(stage.index * layout.stage_slices * kSliceBytes, kRows * 16, 128);
              // two slices are a group; the next one starts while it runs
#pragma unroll 1
              for (; some > 0; some -= 2) {
                const Descriptor one = voxels + at;
                advance();
                if (some > 1) {
                  const Descriptor two = voxels + at;
                  advance();
                  products_begin();
                  multiply_async(sums[0], weights, one, T{});
                  multiply_async(sums[1], weights, one + half, T{});
                  multiply_async(sums[0], weights + kSliceBytes / 16, two, T{});
                  multiply_async(sums[1], weights + kSliceBytes / 16, two + half, T{});
                  products_commit();
                } else {
                  products_begin();
                  multiply_async(sums[0], weights, one, T{});
                  multiply_async(sums[1], weights, one + half, T{});
                  products_commit();
                }
                weights = weights + kSliceBytes / 8;
                products_wait<1>();
                release_done();
              }
              stage_done = stage.index;
              if (left == 0) plane_done = plane.index;
              stage.next(layout.stages);
            }
          }
        }
      }
      products_wait<0>();
      release_done();
      epilogue.write(p.epilogue, layout, share.result, first, sums);
    }
    epilogue.finish(p.epilogue, layout, share.result, consumer);
  }
};

// Launches the kernel of a layout.
template <class T, template <class> class Planes, template <class> class Epilogue>
std::string launch_conv(const char* name, const Layout& layout, const typename Planes<T>::Params& in,
                        const void* weights, const typename Epilogue<T>::Params& epilogue, Stream stream) {
  using Kernel = Convolve<T, Planes, Epilogue>;
  const Grid grid{layout.groups, layout.blocks_n * layout.classes, static_cast<int>(layout.n)};
  return launched(
      name, launch<Kernel>(grid, layout.shared_bytes, stream, {layout, in, static_cast<const T*>(weights), epilogue}));
}

}  // namespace fastfilm::cuda::sm90
