// The gradient at a convolution's weight by warpgroup products (sm_90a), with the sums of the gradient at its raw output.
//
// A tile is a plane of the activated input and one of the gradient at the raw output. Both are read as they lie, voxels as
// the dimension that is summed over. All three warpgroups do the same: each starts the products of its row of the taps, and
// while these run all fill the planes of the tiles behind. A block has one barrier for each tile.
//
//   tensor cores      | products 0  | products 1  | ...
//   threads      ...  | transform 1 | transform 2 | ...
//                     | copy 2      | copy 3      | ...  asynchronous
//                     | find 3      | find 4      | ...  the numbers of a tile's voxels
#include "../calls.h"
#include "../operands.h"
#include "calls.h"
#include "planes.h"

namespace fastfilm::cuda::sm90 {
namespace {

constexpr int kRowTaps = 3;

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
  using Input = ActivatedPlanes<T, 4, kWeightThreads>;
  using Output = GradientPlanes<T, kWeightThreads>;
  using Filled = Plane<kWeightThreads>;

  // What a block computes: its tiles, the first channels of its products' rows and columns, its depth of the taps.
  struct Share {
    int first, last, first_out, first_in, depth;

    FF_DEVICE explicit Share(const WeightLayout& layout) {
      const Grid block = block_anew();
      first = block.x * layout.tiles_a_group;
      last = first + (block.x + 1 < layout.groups ? layout.tiles_a_group : layout.tiles_of_last);
      first_out = block.y % layout.blocks_m * kRows;
      first_in = block.y / layout.blocks_m * kN;
      depth = block.z;
    }
    FF_DEVICE bool has(int tile) const { return tile >= first && tile < last; }
    // each channel of the gradient is summed by the blocks of the first input channels and the first depth only
    FF_DEVICE bool sums(const Params& p) const { return p.sums && first_in == 0 && depth == 0; }
  };

  // Where a tile's planes, tables and constants are. Tiles take turns in them, samples in the constants.
  FF_DEVICE static int slab(const WeightLayout& p, int turn) { return turn * (p.plane_bytes + p.gradient_bytes); }
  FF_DEVICE static int beside(const WeightLayout& p, int tile) { return p.beside_at + (tile & 1) * p.gradient_bytes; }
  FF_DEVICE static int constants(const WeightLayout& p, int64_t n) {
    return p.constants_at + static_cast<int>(n & 1) * p.constant_bytes;
  }
  FF_DEVICE static int of_gradient(int constants) { return constants + 7 * kN * 4; }
  FF_DEVICE static Filled input(const WeightLayout& p, int turn) {
    return {p.voxels, p.chunk_bytes, p.tables_at + (turn * p.table_numbers + kBefore) * 4, kN};
  }
  FF_DEVICE static Filled gradient(const WeightLayout& p, int turn) {
    const int table = p.tables_at + (turn * p.table_numbers + kBefore + p.voxels.numbers) * 4;
    return {p.gradient, p.gradient_chunk_bytes, table, kRows};
  }
  // In front of a tile's tables is its place: along each axis, and its sample.
  FF_DEVICE static int* place(const WeightLayout& p, int turn) {
    return reinterpret_cast<int*>(shared_memory() + p.tables_at) + turn * p.table_numbers;
  }
  FF_DEVICE static int sample(const WeightLayout& p, int turn) { return place(p, turn)[3]; }
  FF_DEVICE static float* held(const WeightLayout& p) { return reinterpret_cast<float*>(shared_memory() + p.sums_at); }

  static FF_DEVICE void run(const Params& p) {
#ifdef FF_SM90A
    const WeightLayout& layout = p.layout;
    const Share share(layout);
    float sums[kRowTaps][kN / 2];
#pragma unroll
    for (int t = 0; t < kRowTaps; ++t)
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) sums[t][i] = 0;
    if (share.sums(p)) {
#pragma unroll
      for (int i = 0; i < 2 * kPieceChannels; ++i) held(layout)[i * kWeightThreads + thread_anew()] = 0;
    }
    const auto after = [](int turn, int tiles) { return turn + tiles < kTurns ? turn + tiles : turn + tiles - kTurns; };
    int turn = 0;
#pragma unroll 1
    for (int tile = share.first - kTurns; tile < share.last; ++tile) {
      if (share.has(tile)) multiply(layout, turn, sums);
      if (share.has(tile + 3)) find(layout, share, tile + 3, turn, after(turn, 2));
      if (share.has(tile + 2)) load(p, share, tile + 2, after(turn, 2), after(turn, 1));
      commit_copies();
      if (share.has(tile + 1)) transform(p, share, tile + 1, after(turn, 1));
      turn = after(turn, 1);
      fence_async();
      products_wait<0>();
      wait_copies<0>();
      barrier();
    }
    write(p, share, sums);
    if (share.sums(p)) write_sums(p, share);
#endif
  }

  // Writes the numbers of a tile's voxels, and its place, one behind that of the tile before.
  static FF_DEVICE void find(const WeightLayout& layout, const Share& share, int tile, int turn, int before) {
    const Extent& tiles = layout.tiles;
    int at[4];
    if (tile == share.first) {
      int rest = tile;
      at[2] = rest % tiles.w;
      at[1] = (rest /= tiles.w) % tiles.h;
      at[0] = (rest /= tiles.h) % tiles.d;
      at[3] = rest / tiles.d;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[i] = place(layout, before)[i];
      const bool line = ++at[2] == tiles.w, plane = line && at[1] + 1 == tiles.h, map = plane && at[0] + 1 == tiles.d;
      at[2] = line ? 0 : at[2];
      at[1] = plane ? 0 : at[1] + line;
      at[0] = map ? 0 : at[0] + plane;
      at[3] += map;
    }
    if (thread_anew() == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) place(layout, turn)[i] = at[i];
    }
    const int h = at[1] * layout.tile.h, w = at[2] * layout.tile.w;
    const Extent &step = layout.step, &base = layout.base;
    input(layout, turn).find({at[0] * step.d + base.d + share.depth, h * step.h + base.h, w * step.w + base.w}, step,
                             layout.in);
    gradient(layout, turn).find({at[0], h, w}, {1, 1, 1}, layout.out);
  }

  // Starts the copies of a tile; with its first one, brings a sample's constants.
  static FF_DEVICE void load(const Params& p, const Share& share, int tile, int turn, int before) {
    const WeightLayout& layout = p.layout;
    const int64_t n = sample(layout, turn);
    if (tile == share.first || n != sample(layout, before)) {
      const int at = constants(layout, n);
      if (p.in.pending()) Input::load_constants(p.in, n, layout.n, share.first_in, kN, at);
      if (p.e.pending() || p.sums) Output::load_constants(p.e, n, layout.n, share.first_out, kRows, of_gradient(at));
    }
    const int at = slab(layout, turn);
    Input::load(input(layout, turn), p.in, n * layout.in.volume(), share.first_in, at, 0);
    Output::load(gradient(layout, turn), p.e, n * layout.out.volume(), share.first_out, at + layout.plane_bytes,
                 beside(layout, tile));
  }

  static FF_DEVICE void transform(const Params& p, const Share& share, int tile, int turn) {
    const WeightLayout& layout = p.layout;
    const int64_t n = sample(layout, turn);
    const int at = slab(layout, turn), e = at + layout.plane_bytes, from = constants(layout, n);
    if (p.in.pending()) {
      Input::transform(input(layout, turn), p.in, n * layout.in.volume(), share.first_in, at, 0, from, kN, [] {});
    }
    const int64_t voxel = n * layout.out.volume();
    if (share.sums(p)) {
      // those at the slopes, which are rarely wanted, are not held in registers
      float sums[kPieceChannels] = {};
      float* of_thread = held(layout) + thread_anew();
      const bool slopes = p.e.given.pre && p.e.given.pre_act != kNone;
      Output::run(gradient(layout, turn), p.e, voxel, share.first_out, e, beside(layout, tile), of_gradient(from), kRows,
                  [&](const int (&number)[Output::kFew], const float (&v)[Output::kValues],
                      const float (&slope)[Output::kValues]) {
        const auto present = [&](int i) { return number[i / kPieceChannels] >= 0; };
#pragma unroll
        for (int i = 0; i < Output::kValues; ++i) sums[i % kPieceChannels] += present(i) ? v[i] : 0.0f;
        if (!slopes) return;
#pragma unroll
        for (int i = 0; i < Output::kValues; ++i) {
          of_thread[(kPieceChannels + i % kPieceChannels) * kWeightThreads] += present(i) ? slope[i] : 0.0f;
        }
      }, [] {});
#pragma unroll
      for (int i = 0; i < kPieceChannels; ++i) of_thread[i * kWeightThreads] += sums[i];
    } else if (p.e.pending()) {
      Output::transform(gradient(layout, turn), p.e, voxel, share.first_out, e, beside(layout, tile), of_gradient(from),
                        kRows, [] {});
    }
  }

  // Starts the products of a tile: of a kernel of 3, those of a row of the taps; of a kernel of 1, a third of the voxels.
  static FF_DEVICE void multiply(const WeightLayout& layout, int turn, float (&sums)[kRowTaps][kN / 2]) {
    const int row = uniform(thread_anew() / kWarpgroup);
    const int pitch = layout.voxels.size.w, at = slab(layout, turn);
    // the voxel of the plane that a tap has for the tile's first voxel
    const auto shift = [&](int tap) {
      if (layout.voxels.size.d == 1) return row * pitch + tap;
      return (row % 2 * 2 + tap % 2) * layout.voxels.size.h * pitch + row / 2 * pitch + tap / 2;
    };
    // a step has eight voxels of each of two lines; two steps are beside each other in a tile 16 wide
    const int wide = layout.tile.w / 16, steps = layout.tile.volume() / 16;
    const auto distance = [&](int step, int of_line) { return (step >> wide << 1) * of_line + (step & wide) * 8; };
    const Descriptor voxels = descriptor(at, pitch * 16, layout.chunk_bytes);
    const Descriptor e = descriptor(at + layout.plane_bytes, layout.tile.w * 16, layout.gradient_chunk_bytes);
    if (layout.kernel.w == 1) {
#pragma unroll 1
      for (int s = row; s < steps; s += 3) {
        products_begin();
        multiply_async_transposed(sums[0], e + distance(s, layout.tile.w), voxels + distance(s, pitch), T{});
        products_commit();
      }
      return;
    }
    const int shifts[kRowTaps] = {shift(0), shift(1), shift(2)};
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const Descriptor of_gradient = e + distance(s, layout.tile.w), here = voxels + distance(s, pitch);
      products_begin();
#pragma unroll
      for (int t = 0; t < kRowTaps; ++t) multiply_async_transposed(sums[t], of_gradient, here + shifts[t], T{});
      products_commit();
    }
  }

  static FF_DEVICE void write(const Params& p, const Share& share, const float (&sums)[kRowTaps][kN / 2]) {
    const int row = thread_anew() / kWarpgroup;
    const WeightLayout& layout = p.layout;
    const int lane = thread_anew() % 32, warp = thread_anew() / 32 % 4;
    const bool one = layout.kernel.w == 1;
    const int taps = layout.kernel.volume(), plane = layout.kernel.h * layout.kernel.w;
    const int64_t out = static_cast<int64_t>(block_index().x) * layout.slots_a_group + (one ? row : 0);
    float* partials = p.partials + out * layout.co * taps * layout.ci;
#pragma unroll
    for (int t = 0; t < kRowTaps; ++t) {
      if (one && t > 0) break;
      const int tap = share.depth * plane + (one ? 0 : row * kRowTaps + t);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        const int co = share.first_out + warp * 16 + lane / 4 + i / 2 % 2 * 8,
                  ci = share.first_in + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (co < layout.co && ci < layout.ci) {
          partials[(static_cast<int64_t>(co) * taps + tap) * layout.ci + ci] = sums[t][i];
        }
      }
    }
  }

  // Adds the sums of the threads that have the same channels, in a fixed order: a thread has a channel and a sum.
  static FF_DEVICE void write_sums(const Params& p, const Share& share) {
    const WeightLayout& layout = p.layout;
    const int channel = thread_anew() % kRows, row = thread_anew() / kRows;
    if (row > 1 || share.first_out + channel >= layout.co) return;
    const float* from = held(layout) + (row * kPieceChannels + channel % kPieceChannels) * kWeightThreads +
                        channel / kPieceChannels;
    float sum = 0;
    for (int t = 0; t < kWeightThreads; t += kRows / kPieceChannels) sum += from[t];
    p.sums[(static_cast<int64_t>(block_index().x) * 2 + row) * layout.co + share.first_out + channel] = sum;
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
