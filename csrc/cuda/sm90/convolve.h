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

// Registers of a thread that brings, and of one that multiplies. A block has 168 for each thread.
constexpr int kBringRegisters = 88, kMultiplyRegisters = 208;
static_assert(kBringRegisters + 2 * kMultiplyRegisters <= 3 * (65536 / kThreads / 8 * 8), "beyond the registers of a block");

// Numbers of the products of both halves in a thread.
using Accumulators = float[2][64];

// A thread has two rows of the products, r = 0 and 1: number 4 * line + 2 * r + b of sums[half] is row product_row(r) and voxel
// product_voxel(b) of a line of the half.
FF_DEVICE int product_row(int r) { return thread_index() / 32 % 4 * 16 + thread_index() % 32 / 4 + 8 * r; }
FF_DEVICE int product_voxel(int b) { return thread_index() % 4 * 2 + b; }

// Products leave the registers a group after another: 4 lines, 32 voxels. The numbers of the first group are
// sums[0][0..15]; `next_group` puts those of the next one in their place, so that one piece of code serves all.
constexpr int kGroups = 8, kGroupLines = 4;
FF_DEVICE void next_group(Accumulators& sums) {
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[0][i] = i < 48 ? sums[0][i + 16] : sums[1][i - 48];
#pragma unroll
  for (int i = 0; i < 48; ++i) sums[1][i] = sums[1][i + 16];
}

// The voxels of a group, in the voxels of the class: those of line `line` of output row `shift` are
// {d, h + line * shifts + shift, w ...}.
struct Group {
  Extent origin;
  const Layout& p;
  const Result& result;

  FF_DEVICE Group(const Layout& p, const Result& result, const Extent& first, int group) : p(p), result(result) {
    const int half = group / (kGroups / 2), line = group % (kGroups / 2) * kGroupLines;
    origin = {first.d, first.h + half * p.half.h + line * p.shifts, first.w + half * p.half.w};
  }
  // Lines of an output row that are in the map.
  FF_DEVICE int lines(int shift) const {
    const int left = result.size.h - origin.h - shift;
    return origin.d < result.size.d && left > 0 ? (left + p.shifts - 1) / p.shifts : 0;
  }
  // The number in its sample of a voxel of a line; -1 outside of the map.
  FF_DEVICE int number(int shift, int line, int v) const {
    const int h = origin.h + line * p.shifts + shift, w = origin.w + v;
    if (origin.d >= result.size.d || h >= result.size.h || w >= result.size.w) return -1;
    return ((result.first.d + origin.d * p.out_step.d) * p.out.h + result.first.h + h * p.out_step.h) * p.out.w +
           result.first.w + w * p.out_step.w;
  }
};

// A warp's staging: the 16 channels of its rows of a group's voxels, 32 bytes each. The two chunks of every other four
// voxels are exchanged, so that eight voxels' chunks lie in different banks.
struct Staging {
  int at;
  FF_DEVICE int place(int voxel, int chunk) const { return at + voxel * 32 + (chunk ^ (voxel / 4 & 1)) * 16; }
  // Where this lane's row of the matrices of two lines is (load_matrix4_transposed, store_matrix4_transposed).
  FF_DEVICE int row(int line) const {
    const int lane = thread_index() % 32;
    return place((line + lane / 16) * 8 + lane % 8, lane / 8 % 2);
  }
  // Stores the group's numbers.
  template <class T>
  FF_DEVICE void store(const Accumulators& sums) const {
#pragma unroll
    for (int line = 0; line < kGroupLines; line += 2) {
      uint32_t r[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) r[m] = pack(sums[0][4 * line + 2 * m], sums[0][4 * line + 2 * m + 1], T{});
      store_matrix4_transposed(row(line), r);
    }
  }
};

// The 8 channels of a warp's rows that this lane writes, of voxels lane / 2 + 16 i of a group.
struct Piece {
  int chunk, voxel, channel, shift;
  FF_DEVICE Piece(const Layout& p, int block_n) {
    const int lane = thread_index() % 32, row = thread_index() / 32 % 4 * 16 + lane % 2 * 8;
    chunk = lane % 2;
    voxel = lane / 2;
    channel = block_n * p.bn + row % p.bn;
    shift = row / p.bn;
  }
};

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
    FF_DEVICE explicit Share(const Layout& p)
        : result(p.result[block_index().y / p.blocks_n]), n(block_index().z), block_n(block_index().y % p.blocks_n) {
      const int units = result.units.volume();
      first = block_index().x * p.units_a_group < units ? block_index().x * p.units_a_group : units;
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

  // The slices of a block's weights, in the order in which they are used. One thread starts their copies.
  struct Weights {
    const Layout& p;
    const Share& share;
    const unsigned char* from;  // of the unit's first slice
    int64_t slice = 0;          // of the unit
    int unit, k = 0, read, plane_slice = 0, depth = 0;
    Room room;
    int started = 0;

    FF_DEVICE Weights(const Layout& p, const Share& share, const T* weights)
        : p(p), share(share), unit(share.first), read(share.result.begin) {
      const Result& result = share.result;
      const int64_t block = static_cast<int64_t>(result.taps) * ((p.blocks_k - 1) * (p.bk / 16) + p.last_slices);
      from = reinterpret_cast<const unsigned char*>(weights) + (result.weights + share.block_n * block) * kSliceBytes;
      if (result.taps == 0) unit = share.last;
    }
    FF_DEVICE bool more() const { return unit < share.last; }

    // Starts the copies for which there is room.
    FF_DEVICE void pump() {
#pragma unroll 1
      while (more()) {
        if (started >= p.stages && !mbarrier_test(stage_empty(p, room.index), room.parity ^ 1)) return;
        const Reads& reads = p.reads[read];
        const int all = p.plane_taps(reads) * p.slices_of(k), left = all - plane_slice;
        const int count = left < p.stage_slices ? left : p.stage_slices, full = stage_full(p, room.index);
        mbarrier_expect(full, count * kSliceBytes);
        copy_bulk(room.index * p.stage_slices * kSliceBytes, from + slice * kSliceBytes, count * kSliceBytes, full);
        if (started < p.stages) ++started;
        room.next(p.stages);
        slice += count;
        plane_slice += count;
        if (plane_slice < all) continue;
        plane_slice = 0;
        if (++depth < reads.count.d) continue;
        depth = 0;
        if (++read < share.result.end) continue;
        read = share.result.begin;
        if (++k < p.blocks_k) continue;
        k = 0;
        slice = 0;
        unit = p.resident ? share.last : unit + 1;
      }
    }
  };

  static FF_DEVICE void bring(const Params& p) {
    const Layout& layout = p.layout;
    const Share share(layout);
    const bool leads = crew() == 0, pending = Planes::pending(p.in);
    const int64_t voxel = share.n * layout.in.volume();
    const int count = layout.blocks_k * layout.bk;
    Weights weights(layout, share, p.weights);
    if (leads) weights.pump();
    if (pending) Planes::load_constants(p.in, share.n, layout.n, 0, count, layout.inputs_at);

    // a plane on its way, and the one before it
    struct Way {
      Plane plane;
      int k, slot, beside;
    };
    const auto place = [&](int slot) { return layout.slabs_at + slot * layout.slab_bytes; };
    const auto deliver = [&](const Way& w) {
      if (pending) {
        Planes::transform(w.plane, p.in, voxel, w.k * layout.bk, place(w.slot), w.beside,
                          layout.inputs_at + w.k * layout.bk * 4, count);
      }
      fence_async();
      mbarrier_arrive(plane_full(layout, w.slot));
    };
    Way before{};
    Room room;
    int planes = 0, table = 0;
#pragma unroll 1
    for (int unit = share.first; unit < share.last; ++unit) {
      const Extent origin = share.origin(layout, unit);
#pragma unroll 1
      for (int k = 0; k < layout.blocks_k; ++k) {
#pragma unroll 1
        for (int r = share.result.begin; r < share.result.end; ++r) {
          const Reads& reads = layout.reads[r];
#pragma unroll 1
          for (int j = 0; j <= reads.count.d; ++j) {
            Way now{{reads.slab, layout.chunk_bytes, layout.tables_at + table * layout.numbers * 4, layout.bk},
                    k,
                    room.index,
                    layout.beside_at + (planes & 1) * layout.slab_bytes};
            if (planes >= layout.slots) {
              if (crew() < 32) {
                while (!mbarrier_test(plane_empty(layout, room.index), room.parity ^ 1)) {
                  if (leads) weights.pump();
                }
              } else {
                mbarrier_wait(plane_empty(layout, room.index), room.parity ^ 1);
              }
            }
            const Extent& step = layout.load_step;
            now.plane.find({(origin.d + layout.pair.d * j) * step.d + reads.base.d,
                            (origin.h + layout.pair.h * j) * step.h + reads.base.h,
                            (origin.w + layout.pair.w * j) * step.w + reads.base.w},
                           step, layout.in);
            // the copies of the plane before it have arrived, in all threads behind the barrier
            wait_copies<0>();
            barrier_of<1, kWarpgroup>();
            Planes::load(now.plane, p.in, voxel, k * layout.bk, place(now.slot), now.beside);
            commit_copies();
            if (leads) weights.pump();
            if (planes > 0) deliver(before);
            before = now;
            room.next(layout.slots);
            table = table == 2 ? 0 : table + 1;
            ++planes;
          }
        }
      }
    }
    if (planes > 0) {
      wait_copies<0>();
      barrier_of<1, kWarpgroup>();
      deliver(before);
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
      if (layout.resident) stage = {};
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
              if (layout.resident) stage.parity = 0;
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
std::string launch_conv(const char* name, const Layout& layout, const typename Planes<T>::Params& in, const void* weights,
                        const typename Epilogue<T>::Params& epilogue, Stream stream) {
  using Kernel = Convolve<T, Planes, Epilogue>;
  const Grid grid{layout.groups, layout.blocks_n * layout.classes, static_cast<int>(layout.n)};
  return launched(name, launch<Kernel>(grid, layout.shared_bytes, stream,
                                       {layout, in, static_cast<const T*>(weights), epilogue}));
}

}  // namespace fastfilm::cuda::sm90
