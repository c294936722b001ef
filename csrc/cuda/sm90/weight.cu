// The gradient at a convolution's weight by warpgroup products (sm_90a), with the sums of the gradient at its raw output.
//
// Warpgroups 0 to 2 multiply, warpgroup 3 brings: for each tile a plane of the activated input and one of the gradient at
// the raw output. Both are read as they lie, voxels as the dimension that is summed over: the gradient through
// registers, which serve all taps of a row, the input by descriptors.
//
//   brings        copy 0|copy 1 transform 0|copy 2 transform 1|copy 3 transform 2| ...
//   multiply 0-2                           |  tile 0, taps of row 0 to 2  |  tile 1  | ...
#include "../calls.h"
#include "../operands.h"
#include "calls.h"
#include "planes.h"

namespace fastfilm::cuda::sm90 {
namespace {

constexpr int kRowTaps = 3, kConsumerWarps = 12;

template <class T, int kN>
struct Wgrad {
  struct Params {
    WeightLayout layout;
    Sources in;
    Gradients e;
    float* partials;  // [slots, co, taps, ci]
    float* sums;  // [groups, 2, co] of the gradient; null: not wanted
  };
  static constexpr int kThreads = kWeightThreads, kMinBlocks = 1;
  // Registers of a thread that brings, and of one that multiplies. A block has 128 for each thread.
  static constexpr int kBringRegisters = kN == 64 ? 104 : 112, kMultiplyRegisters = kN == 64 ? 136 : 128;
  static_assert(kBringRegisters + 3 * kMultiplyRegisters <= 4 * 65536 / kWeightThreads, "beyond a block's registers");
  using Input = ActivatedPlanes<T, 2>;
  using Output = GradientPlanes<T>;

  FF_DEVICE static int full(const WeightLayout& p, int slot) { return p.barriers_at + slot * 8; }
  FF_DEVICE static int empty(const WeightLayout& p, int slot) { return p.barriers_at + (p.slots + slot) * 8; }
  FF_DEVICE static int slab(const WeightLayout& p, int slot) {
    return p.slabs_at + slot * (p.plane_bytes + p.gradient_bytes);
  }

  static FF_DEVICE void run(const Params& p) {
#ifdef FF_SM90A
    const WeightLayout& layout = p.layout;
    if (thread_index() == 0) {
#pragma unroll 1
      for (int i = 0; i < layout.slots; ++i) {
        mbarrier_init(full(layout, i), kWarpgroup);
        mbarrier_init(empty(layout, i), kConsumerWarps);
      }
    }
    barrier();
    const int warpgroup = uniform(thread_index() / kWarpgroup);
    const int all = static_cast<int>(layout.n) * layout.tiles.volume(), first = block_index().x * layout.tiles_a_group;
    const int last = first + layout.tiles_a_group < all ? first + layout.tiles_a_group : all;
    const int block_m = block_index().y % layout.blocks_m, block_n = block_index().y / layout.blocks_m;
    if (warpgroup == 3) {
      give_registers<kBringRegisters>();
      bring(p, first, last, block_m * kRows, block_n * kN);
    } else {
      take_registers<kMultiplyRegisters>();
      multiply(p, first, last, block_m * kRows, block_n * kN, warpgroup);
    }
#endif
  }

  static FF_DEVICE void bring(const Params& p, int first, int last, int first_out, int first_in) {
    const WeightLayout& layout = p.layout;
    const int depth = block_index().z, tiles = layout.tiles.volume();
    const bool pending = p.in.pending(), raw = p.e.pending();
    // each channel of the gradient is summed by the blocks of the first input channels and the first depth only
    const bool summing = p.sums && first_in == 0 && depth == 0;
    float* held = reinterpret_cast<float*>(shared_memory() + layout.sums_at) + crew();
    if (summing) {
#pragma unroll
      for (int i = 0; i < 2 * kPieceChannels; ++i) held[i * kWarpgroup] = 0;
    }
    // a tile on its way, and the one before it
    struct Way {
      int64_t n;
      int slot, table, beside, constants;
    };
    const auto input = [&](const Way& w) { return Plane{layout.voxels, layout.chunk_bytes, w.table, kN}; };
    const auto gradient = [&](const Way& w) {
      return Plane{layout.gradient, layout.gradient_chunk_bytes, w.table + layout.voxels.numbers * 4, kRows};
    };
    const int64_t in_volume = layout.in.volume(), out_volume = layout.out.volume();
    const auto deliver = [&](const Way& w) {
      const int at = slab(layout, w.slot), e = at + layout.plane_bytes, of_gradient = w.constants + 7 * kN * 4;
      if (pending) Input::transform(input(w), p.in, w.n * in_volume, first_in, at, 0, w.constants, kN, [] {});
      if (summing) {
        float sums[2 * kPieceChannels] = {};
        Output::run(gradient(w), p.e, w.n * out_volume, first_out, e, w.beside, of_gradient, kRows,
                    [&](const float (&v)[Output::kValues], const float (&slope)[Output::kValues]) {
#pragma unroll
          for (int i = 0; i < Output::kValues; ++i) {
            sums[i % kPieceChannels] += v[i];
            sums[kPieceChannels + i % kPieceChannels] += slope[i];
          }
        }, [] {});
#pragma unroll
        for (int i = 0; i < 2 * kPieceChannels; ++i) held[i * kWarpgroup] += sums[i];
      } else if (raw) {
        Output::transform(gradient(w), p.e, w.n * out_volume, first_out, e, w.beside, of_gradient, kRows, [] {});
      }
      fence_async();
      mbarrier_arrive(full(layout, w.slot));
    };
    Way before{};
    int slot = 0, parity = 0, table = 0, constants = 2;
    int64_t sample = -1;
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      const int n = tile / tiles, rest = tile % tiles, in_plane = layout.tiles.h * layout.tiles.w;
      const Extent at{rest / in_plane, rest % in_plane / layout.tiles.w * layout.tile.h,
                      rest % layout.tiles.w * layout.tile.w};
      if (tile - first >= layout.slots) mbarrier_wait(empty(layout, slot), parity ^ 1);
      if (n != sample) constants = constants == 2 ? 0 : constants + 1;
      const Way now{n, slot, layout.tables_at + table * layout.table_numbers * 4,
                    layout.beside_at + (tile - first) % 2 * layout.gradient_bytes,
                    layout.constants_at + constants * layout.constant_bytes};
      if (n != sample) {
        if (pending) Input::load_constants(p.in, n, layout.n, first_in, kN, now.constants);
        if (raw || summing) Output::load_constants(p.e, n, layout.n, first_out, kRows, now.constants + 7 * kN * 4);
        sample = n;
      }
      const Extent& step = layout.step;
      input(now).find(
          {at.d * step.d + layout.base.d + depth, at.h * step.h + layout.base.h, at.w * step.w + layout.base.w}, step,
          layout.in);
      gradient(now).find(at, {1, 1, 1}, layout.out);
      // the copies of the tile before it have arrived, in all threads behind the barrier
      wait_copies<0>();
      barrier_of<1, kWarpgroup>();
      Input::load(input(now), p.in, n * in_volume, first_in, slab(layout, slot), 0);
      Output::load(gradient(now), p.e, n * out_volume, first_out, slab(layout, slot) + layout.plane_bytes, now.beside);
      commit_copies();
      if (tile > first) deliver(before);
      before = now;
      table = table == 2 ? 0 : table + 1;
      if (++slot == layout.slots) {
        slot = 0;
        parity ^= 1;
      }
    }
    wait_copies<0>();
    barrier_of<1, kWarpgroup>();
    deliver(before);
    if (!summing) return;
    barrier_of<1, kWarpgroup>();
    // adds the sums of the threads that have the same channels, in a fixed order: a thread has a channel and a sum
    const int channel = crew() % kRows, row = crew() / kRows;
    if (first_out + channel >= layout.co) return;
    const float* from = reinterpret_cast<const float*>(shared_memory() + layout.sums_at) +
                        (row * kPieceChannels + channel % kPieceChannels) * kWarpgroup + channel / kPieceChannels;
    float sum = 0;
    for (int t = 0; t < kWarpgroup; t += kRows / kPieceChannels) sum += from[t];
    p.sums[(static_cast<int64_t>(block_index().x) * 2 + row) * layout.co + first_out + channel] = sum;
  }

  static FF_DEVICE void multiply(const Params& p, int first, int last, int first_out, int first_in, int consumer) {
    const WeightLayout& layout = p.layout;
    const int lane = thread_index() % 32, warp = thread_index() / 32 % 4, pitch = layout.voxels.size.w;
    const bool one = layout.kernel.w == 1;
    const bool strided = layout.voxels.size.d > 1;
    // the voxel of the plane that a tap of this warpgroup's row has for the tile's first voxel
    const auto shift = [&](int tap) {
      if (one) return 0;
      if (!strided) return consumer * pitch + tap;
      return (consumer % 2 * 2 + tap % 2) * layout.voxels.size.h * pitch + consumer / 2 * pitch + tap / 2;
    };
    const int shifts[kRowTaps] = {shift(0), shift(1), shift(2)};
    // where this lane reads the gradient: matrices of 8 channels by 8 voxels of a line, of two lines
    const int mine = (warp * 2 + lane / 8 % 2) * layout.gradient_chunk_bytes +
                     (lane / 16 * layout.tile.w + lane % 8) * 16;
    float sums[kRowTaps][kN / 2];
#pragma unroll
    for (int t = 0; t < kRowTaps; ++t)
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) sums[t][i] = 0;
    // two steps are beside each other in a tile 16 wide
    const int beside = layout.tile.w / 16, steps = layout.tile.volume() / 16;
    int slot = 0, parity = 0;
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      mbarrier_wait(full(layout, slot), parity);
      warp_barrier();
      const int at = slab(layout, slot), e = at + layout.plane_bytes + mine;
      const Descriptor voxels = descriptor(at, pitch * 16, layout.chunk_bytes);
      // step s has eight voxels of each of two lines
      const auto line = [&](int s) { return s >> beside << 1; };
      const auto load = [&](int s, uint32_t (&a)[4]) {
        load_matrix4_transposed(a, e + (line(s) * layout.tile.w + (s & beside) * 8) * 16);
      };
      const auto multiply_step = [&](int s, const uint32_t (&a)[4]) {
        const Descriptor here = voxels + (line(s) * pitch + (s & beside) * 8);
        if (one) {
          products_begin();
          multiply_async(sums[0], a, here, T{});
          products_commit();
        } else {
          products_begin();
          multiply_async(sums[0], a, here + shifts[0], T{});
          multiply_async(sums[1], a, here + shifts[1], T{});
          multiply_async(sums[2], a, here + shifts[2], T{});
          products_commit();
        }
      };
      // two steps at a time, so that the registers of one are loaded while the other's products run
      uint32_t a[2][4];
#pragma unroll 1
      for (int s = one ? 2 * consumer : 0; s < steps; s += one ? 6 : 2) {
        load(s, a[0]);
        multiply_step(s, a[0]);
        products_wait<1>();
        load(s + 1, a[1]);
        multiply_step(s + 1, a[1]);
        products_wait<1>();
      }
      products_wait<0>();
      if (lane == 0) mbarrier_arrive(empty(layout, slot));
      if (++slot == layout.slots) {
        slot = 0;
        parity ^= 1;
      }
    }
    const int taps = layout.kernel.volume(), plane = layout.kernel.h * layout.kernel.w, depth = block_index().z;
    const int64_t out = static_cast<int64_t>(block_index().x) * layout.slots_a_group + (one ? consumer : 0);
    float* partials = p.partials + out * layout.co * taps * layout.ci;
#pragma unroll
    for (int t = 0; t < kRowTaps; ++t) {
      if (one && t > 0) break;
      const int tap = depth * plane + (one ? 0 : consumer * kRowTaps + t);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        const int co = first_out + warp * 16 + lane / 4 + i / 2 % 2 * 8,
                  ci = first_in + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (co < layout.co && ci < layout.ci) {
          partials[(static_cast<int64_t>(co) * taps + tap) * layout.ci + ci] = sums[t][i];
        }
      }
    }
  }
};

template <class T>
std::string weight_gradient_of(const WeightLayout& layout, const WeightGradient& c, void* workspace, WeightSums& left,
                               Stream stream) {
  float* partials = static_cast<float*>(workspace);
  const int64_t width = static_cast<int64_t>(layout.co) * layout.kernel.volume() * layout.ci;
  float* sums = c.dpre ? partials + layout.partial_slots() * width : nullptr;
  const Sources in = sources_of<T>(c.inputs);
  const Gradients e = gradients_of<T>(c.gradient, layout.co, layout.out);
  const Grid grid{layout.groups, layout.blocks_m * layout.blocks_n, layout.kernel.d};
  const auto start = [&](auto kernel) {
    return launched("sm90_wgrad",
                    launch<decltype(kernel)>(grid, layout.shared_bytes, stream, {layout, in, e, partials, sums}));
  };
  left = {partials, layout.partial_slots(), layout.co, layout.ci, layout.kernel, c.dweight, c.strides,
          sums,     layout.groups,          c.dpre};
  return layout.bn == 64 ? start(Wgrad<T, 64>{}) : start(Wgrad<T, 32>{});
}

}  // namespace

int64_t weight_gradient_workspace(const WeightLayout& layout) {
  return static_cast<int64_t>(layout.partial_slots()) * layout.co * layout.kernel.volume() * layout.ci * 4 +
         static_cast<int64_t>(layout.groups) * 2 * layout.co * 4;
}

std::string weight_gradient(const WeightLayout& layout, int storage, const WeightGradient& call, void* workspace,
                            WeightSums& left, Stream stream) {
  return storage == kBFloat16 ? weight_gradient_of<BFloat16>(layout, call, workspace, left, stream)
                              : weight_gradient_of<Float16>(layout, call, workspace, left, stream);
}

}  // namespace fastfilm::cuda::sm90
