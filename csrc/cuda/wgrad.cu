// The gradient at a convolution's weight, with the sums of the gradient at its raw output.
#include "calls.h"
#include "operands.h"

namespace fastfilm::cuda {
namespace {

constexpr int kDepthTaps = 9;  // taps of one depth

// The products of all taps of one depth on tensor cores. A warp computes 32 output by 8 input channels. Where fewer
// warps suffice for the block's channels, the others take a share of the voxels and write their own partial results.
template <class T, int kM, int kN>
struct Products {
  static constexpr int kWarpsM = kM / 32, kWarpsN = kN / 8, kShares = kConvThreads / 32 / (kWarpsM * kWarpsN);
  static constexpr int kSize = static_cast<int>(sizeof(T)), kPitchE = kM * kSize, kPitchX = kN * kSize;
  static constexpr int kStep = 64 / kSize, kK = kStep / 2;  // voxels of an iteration, and of one product

  float sum[kDepthTaps][2][4];

  FF_DEVICE void clear() {
#pragma unroll
    for (int t = 0; t < kDepthTaps; ++t)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[t][i / 4][i % 4] = 0;
  }
  FF_DEVICE static int share() { return kShares == 1 ? 0 : thread_index() / 32 / (kWarpsM * kWarpsN); }

  FF_DEVICE void add(const WgradPlan& plan, const Extent& slab, int e, int x) {
    const int lane = thread_anew() % 32, warp = thread_anew() / 32;
    const int m0 = warp % kWarpsM * 32 * kSize, n0 = warp / kWarpsM % kWarpsN * 8 * kSize;  // bytes
#pragma unroll 1
    for (int first = share() * kStep; first < kTileVoxels; first += kShares * kStep) {
      uint32_t a[2][2][4];  // of both products of an iteration
      const auto row_of = [&](int voxel) {
        const Extent v = tile_voxel(plan.tile_log2, voxel);
        return (v.d * plan.slab_step * slab.h + v.h * plan.slab_step) * slab.w + v.w * plan.slab_step;
      };
      int rows[4];
      if constexpr (kSize == 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int voxel = first + k * kK + lane / 16 * 8 + lane % 8;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            load_matrix4_transposed(a[k][m], e + swizzle(voxel * kPitchE + m0 + m * 32 + lane / 8 % 2 * 16));
          }
        }
        rows[0] = row_of(first + lane);
      } else {
        // ldmatrix transposes 16-bit numbers only
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int voxel = first + k * kK + lane % 4 + i / 2 * 4, channel = m * 16 + lane / 4 + i % 2 * 8;
              a[k][m][i] = load_word(e + swizzle(voxel * kPitchE + m0 + channel * kSize));
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = row_of(first + lane % 4 + i * 4);
      }
#pragma unroll
      for (int t = 0; t < kDepthTaps; ++t) {
        if (t >= plan.kernel.h * plan.kernel.w) break;
        const int shift = plan.kernel.w == 1 ? 0 : t / 3 * slab.w + t % 3;
        uint32_t b[4];
        if constexpr (kSize == 2) {
          load_matrix4_transposed(b, x + swizzle((rows[0] + shift) * kPitchX + n0));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            b[i] = load_word(x + swizzle((rows[i] + shift) * kPitchX + n0 + lane / 4 * kSize));
        }
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int m = 0; m < 2; ++m) multiply_add(sum[t][m], a[k][m], b[2 * k], b[2 * k + 1], T{});
      }
    }
  }
  FF_DEVICE static uint32_t load_word(int at) {
    return operand_word<T>(*reinterpret_cast<const uint32_t*>(shared_memory() + at));
  }

  // Calls f(tap, row, column, value) for every product of this thread.
  template <class F>
  FF_DEVICE void each(F f) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int m0 = warp % kWarpsM * 32, n0 = warp / kWarpsM % kWarpsN * 8;
#pragma unroll
    for (int t = 0; t < kDepthTaps; ++t)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = i / 4, e = i % 4;
        f(t, m0 + m * 16 + lane / 4 + e / 2 * 8, n0 + lane % 4 * 2 + e % 2, sum[t][m][e]);
      }
  }
};

// The products of float32 on CUDA cores. A thread computes 2 output channels by 1 input channel.
template <int kM, int kN>
struct Products<float, kM, kN> {
  static_assert(kM == 32 && kN == 16, "one thread for 2 x 1 channels");
  static constexpr int kShares = 1;

  float sum[kDepthTaps][2];

  FF_DEVICE void clear() {
#pragma unroll
    for (int t = 0; t < kDepthTaps; ++t) sum[t][0] = sum[t][1] = 0;
  }
  FF_DEVICE static int share() { return 0; }

  FF_DEVICE void add(const WgradPlan& plan, const Extent& slab, int e, int x) {
    const int m = thread_index() / 16 * 8, n = thread_index() % 16 * 4;  // bytes
#pragma unroll 1
    for (int voxel = 0; voxel < kTileVoxels; ++voxel) {
      const Word8 pair = load8(shared_memory() + e + swizzle(voxel * kM * 4 + m));
      const Extent v = tile_voxel(plan.tile_log2, voxel);
      const int row = (v.d * plan.slab_step * slab.h + v.h * plan.slab_step) * slab.w + v.w * plan.slab_step;
#pragma unroll
      for (int t = 0; t < kDepthTaps; ++t) {
        if (t >= plan.kernel.h * plan.kernel.w) break;
        const int shift = plan.kernel.w == 1 ? 0 : t / 3 * slab.w + t % 3;
        const float b = *reinterpret_cast<const float*>(shared_memory() + x + swizzle((row + shift) * kN * 4 + n));
        sum[t][0] += bits_to_float(pair.w[0]) * b;
        sum[t][1] += bits_to_float(pair.w[1]) * b;
      }
    }
  }
  template <class F>
  FF_DEVICE void each(F f) const {
#pragma unroll
    for (int t = 0; t < kDepthTaps; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(t, thread_index() / 16 * 2 + i, thread_index() % 16, sum[t][i]);
  }
};

// The kernel. A block of threads has a block of output channels, a block of input channels and one depth of the taps,
// and walks over tiles of all samples. Its steps follow each other; the second block of a multiprocessor fills the gaps.
template <class T, int kM, int kN>
struct Wgrad {
  struct Params {
    WgradPlan plan;
    Sources in;
    Gradients e;
    float* partials;  // [slots, co, taps, ci]
    float* sums;      // [groups, 2, co] of the gradient; null: not wanted
  };
  static constexpr int kThreads = kConvThreads, kMinBlocks = 2;
  using Input = Activated<T, kN>;
  using Output = RawGradient<T, kM>;
  using State = typename Output::State;

  static FF_DEVICE void run(const Params& p) {
    const WgradPlan& plan = p.plan;
    const Grid block = block_index();
    const int block_m = block.y % plan.blocks_m, block_n = block.y / plan.blocks_m, depth = block.z;
    const int tiles = plan.tiles.volume(), all = static_cast<int>(plan.n) * tiles;
    const int first = block.x * plan.tiles_a_group;
    const int last = first + plan.tiles_a_group < all ? first + plan.tiles_a_group : all;

    const Slab<T, kN> slab(plan.slab, plan.in, plan.load_step, plan.table_at + kTileVoxels * 4);
    const Slab<T, kM> gradient(plan.tile, plan.out, 1, plan.table_at);
    const int at = plan.slab_bytes, beside = at + kTileVoxels * gradient.kPitch;
    const int constants = beside + kTileVoxels * gradient.kPitch, coefs = constants + gradient.kCoefBytes;
    const bool pending = p.in.pending(), raw = p.e.pending();
    // each channel of the gradient is summed by the blocks of the first input channels and the first depth only
    const bool summing = p.sums && block_n == 0 && depth == 0;
    if (summing) keep(plan.sums_at, State{}, true);
    const int in_step = plan.slab_step * plan.load_step;
    constexpr int kFew = 2, kW = Output::kW;  // voxels of the gradient at a time
    // writes the tables of a tile
    const auto find = [&](int tile) {
      const Extent here = tile_origin(plan.tiles, plan.tile_log2, tile % tiles);
      gradient.find(here);
      slab.find(
          {here.d * in_step + plan.base.d + depth, here.h * in_step + plan.base.h, here.w * in_step + plan.base.w});
    };

    Products<T, kM, kN> products;
    products.clear();
    find(first);
    barrier();
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      const int n = tile / tiles;
      Output::load(gradient, p.e, n, block_m, at, beside);
      Input::load(slab, p.in, n, block_n, 0, 0);
      if (tile == first || tile % tiles == 0) {
        if (raw) Output::load_constants(p.e, n, plan.n, block_m, constants);
        if (pending) Input::load_constants(p.in, n, plan.n, block_n, coefs);
      }
      commit_copies();
      wait_copies<0>();
      barrier();
      if (pending) Input::transform(slab, p.in, n, block_n, 0, 0, coefs);
      if (summing) {
        State state{};
        Output::template run<kFew>(gradient, p.e, n, block_m, at, beside, constants,
                                   [&](const int (&number)[kFew], const float (&e)[kFew* kW],
                                       const float (&slope)[kFew* kW]) {
#pragma unroll
          for (int i = 0; i < kFew * kW; ++i) {
            state.row[0][i % kW] += number[i / kW] >= 0 ? e[i] : 0.0f;
            state.row[1][i % kW] += number[i / kW] >= 0 ? slope[i] : 0.0f;
          }
        });
        keep(plan.sums_at, state);
      } else if (raw) {
        Output::template run<kFew>(gradient, p.e, n, block_m, at, beside, constants,
                                   [](const int (&)[kFew], const float (&)[kFew* kW], const float (&)[kFew* kW]) {});
      }
      if (pending || raw) barrier();
      if (tile + 1 < last) find(tile + 1);
      products.add(plan, plan.slab.size, at, 0);
      barrier();
    }
    if (summing) write_sums(plan.sums_at, p.sums + block.x * 2 * plan.co, block_m, plan.co);
    const int taps = plan.kernel.h * plan.kernel.w;
    const int64_t slot = static_cast<int64_t>(block.x) * products.kShares + products.share();
    float* out = p.partials + slot * plan.co * plan.kernel.volume() * plan.ci;
    products.each([&](int tap, int row, int column, float value) {
      const int co = block_m * kM + row, ci = block_n * kN + column;
      if (tap < taps && co < plan.co && ci < plan.ci) {
        out[(static_cast<int64_t>(co) * plan.kernel.volume() + depth * taps + tap) * plan.ci + ci] = value;
      }
    });
  }

  // Adds a thread's sums to those in shared memory, [2 * kW][threads]; the first call, of zeros, starts them.
  static FF_DEVICE void keep(int at, const State& state, bool start = false) {
    float* held = reinterpret_cast<float*>(shared_memory() + at) + thread_index();
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < Output::kW; ++i) {
        float& sum = held[(r * Output::kW + i) * kThreads];
        sum = start ? 0.0f : sum + state.row[r][i];
      }
  }

  // Adds the sums of the threads that have the same channels, in a fixed order, and writes them to out [2, channels].
  static FF_DEVICE void write_sums(int at, float* out, int block, int channels) {
    constexpr int kPieces = Slab<T, kM>::kPieces;
    const float* held = reinterpret_cast<const float*>(shared_memory() + at);
    const int row = thread_index() / kM, channel = thread_index() % kM;
    if (row >= 2 || block * kM + channel >= channels) return;
    const float* from = held + (row * Output::kW + channel % Output::kW) * kThreads + channel / Output::kW;
    float sum = 0;
    for (int t = 0; t < kThreads; t += kPieces) sum += from[t];
    out[row * channels + block * kM + channel] = sum;
  }
};

template <class T>
std::string weight_gradient_of(const WgradPlan& plan, const WeightGradient& c, void* workspace, WeightSums& left,
                               Stream stream) {
  float* partials = static_cast<float*>(workspace);
  const int64_t width = static_cast<int64_t>(plan.co) * plan.kernel.volume() * plan.ci;
  float* sums = c.dpre ? partials + plan.slots * width : nullptr;
  const Sources in = sources_of<T>(c.inputs);
  const Gradients e = gradients_of<T>(c.gradient, plan.co, plan.out);
  const Grid grid{plan.groups, plan.blocks_m * plan.blocks_n, plan.kernel.d};
  const auto start = [&](auto kernel) {
    return launched("wgrad", launch<decltype(kernel)>(grid, plan.shared_bytes, stream, {plan, in, e, partials, sums}));
  };
  left = {partials, plan.slots, plan.co, plan.ci, plan.kernel, c.dweight, c.strides, sums, plan.groups, c.dpre};
  if constexpr (sizeof(T) == 4) {
    return start(Wgrad<T, 32, 16>{});
  } else {
    return plan.bn == 64   ? start(Wgrad<T, 32, 64>{})
           : plan.bn == 32 ? start(Wgrad<T, 32, 32>{})
                           : start(Wgrad<T, 32, 16>{});
  }
}

}  // namespace

int64_t weight_gradient_workspace(const WgradPlan& plan) {
  return static_cast<int64_t>(plan.slots) * plan.co * plan.kernel.volume() * plan.ci * 4 +
         static_cast<int64_t>(plan.groups) * 2 * plan.co * 4;
}

std::string weight_gradient(const WgradPlan& plan, int storage, const WeightGradient& call, void* workspace,
                            WeightSums& left, Stream stream) {
  switch (storage) {
    case kBFloat16:
      return weight_gradient_of<BFloat16>(plan, call, workspace, left, stream);
    case kFloat16:
      return weight_gradient_of<Float16>(plan, call, workspace, left, stream);
    case kTensorFloat:
      return weight_gradient_of<TensorFloat>(plan, call, workspace, left, stream);
    default:
      return weight_gradient_of<float>(plan, call, workspace, left, stream);
  }
}

}  // namespace fastfilm::cuda
