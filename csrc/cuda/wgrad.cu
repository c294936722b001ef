#include "convolution.h"
#include "second_stage.h"
#include "slab.h"

namespace fastfilm::cuda {
namespace {

constexpr int kMaxTaps = 9;  // of one depth

// Products of all taps of one depth, on tensor cores: a warp computes 32 output by 16 input channels. Where fewer
// warps suffice for the block's channels, the others take a share of the voxels and a slot of their own.
template <class T, int kM, int kN>
struct Products {
  static constexpr int kWarpsM = kM / 32, kWarpsN = kN / 16, kShares = kConvThreads / 32 / (kWarpsM * kWarpsN);
  static constexpr int kPitchE = kM * 2, kPitchX = kN * 2;

  float sum[kMaxTaps][2][2][4];

  FF_DEVICE void clear() {
#pragma unroll
    for (int t = 0; t < kMaxTaps; ++t)
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[t][i / 8][i / 4 % 2][i % 4] = 0;
  }
  FF_DEVICE static int share() { return thread_index() / 32 / (kWarpsM * kWarpsN); }

  FF_DEVICE void add(const WgradPlan& plan, const Extent& slab, int e, int x) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int m0 = warp % kWarpsM * 64, n0 = warp / kWarpsM % kWarpsN * 32;  // bytes
#pragma unroll 1
    for (int first = share() * 16; first < kTileVoxels; first += kShares * 16) {
      uint32_t a[2][4];
      const int voxel = first + lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrix4_transposed(a[m], e + swizzle(voxel * kPitchE + m0 + m * 32 + lane / 8 % 2 * 16));
      }
      const Extent v = tile_voxel(plan.tile_log2, first + lane % 16);
      const int row = (v.d * plan.slab_step * slab.h + v.h * plan.slab_step) * slab.w + v.w * plan.slab_step;
#pragma unroll
      for (int t = 0; t < kMaxTaps; ++t) {
        if (t >= plan.kernel.h * plan.kernel.w) break;
        const int shift = plan.kernel.w == 1 ? 0 : t / 3 * slab.w + t % 3;
        uint32_t b[4];
        load_matrix4_transposed(b, x + swizzle((row + shift) * kPitchX + n0 + lane / 16 * 16));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(sum[t][m][0], a[m], b[0], b[1], T{});
          multiply_add(sum[t][m][1], a[m], b[2], b[3], T{});
        }
      }
    }
  }

  // f(tap, row, column, value) for every product of this thread.
  template <class F>
  FF_DEVICE void each(F f) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int m0 = warp % kWarpsM * 32, n0 = warp / kWarpsM % kWarpsN * 16;
#pragma unroll
    for (int t = 0; t < kMaxTaps; ++t)
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int m = i / 8, n = i / 4 % 2, e = i % 4;
        f(t, m0 + m * 16 + lane / 4 + e / 2 * 8, n0 + n * 8 + lane % 4 * 2 + e % 2, sum[t][m][n][e]);
      }
  }
};

// float32 on CUDA cores: a thread computes 2 output channels by 1 input channel.
template <int kM, int kN>
struct Products<float, kM, kN> {
  static_assert(kM == 32 && kN == 16, "one thread for 2 x 1 channels");
  static constexpr int kShares = 1;

  float sum[kMaxTaps][2];

  FF_DEVICE void clear() {
#pragma unroll
    for (int t = 0; t < kMaxTaps; ++t) sum[t][0] = sum[t][1] = 0;
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
      for (int t = 0; t < kMaxTaps; ++t) {
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
    for (int t = 0; t < kMaxTaps; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(t, thread_index() / 16 * 2 + i, thread_index() % 16, sum[t][i]);
  }
};

// A block belongs to a block of output channels, a block of input channels and one depth of the taps, and walks
// over tiles of all samples.
template <class T, int kM, int kN>
struct Wgrad {
  struct Params {
    WgradPlan plan;
    Sources in, e;
    float* partials;  // [slots, co, taps, ci]
  };
  static constexpr int kThreads = kConvThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    const WgradPlan& plan = p.plan;
    const Grid block = block_index();
    const int block_m = block.y % plan.blocks_m, block_n = block.y / plan.blocks_m, depth = block.z;
    const int tiles = plan.tiles.volume(), all = static_cast<int>(plan.n) * tiles;
    const int first = block.x * plan.tiles_a_group;
    const int last = first + plan.tiles_a_group < all ? first + plan.tiles_a_group : all;

    const Extent tile_size{1 << plan.tile_log2.d, 1 << plan.tile_log2.h, 1 << plan.tile_log2.w};
    const Extent size = slab_size(plan.tile_log2, {1, plan.kernel.h, plan.kernel.w}, plan.slab_step);
    const Slab<T, kN> slab(size, plan.in, plan.load_step);
    const Slab<T, kM> gradient(tile_size, plan.out, 1);
    const int slabs = plan.buffers * kTileVoxels * gradient.kPitch, coefs = slabs + plan.buffers * plan.slab_bytes;
    const bool pending = p.in.part[0].coef || p.in.part[1].coef;
    const int in_step = plan.slab_step * plan.load_step;

    const auto load = [&](int tile, int buffer) {
      const int64_t n = tile / tiles;
      const Extent at = tile_origin(plan.tiles, plan.tile_log2, tile % tiles);
      const Extent from{at.d * in_step + plan.base.d + depth, at.h * in_step + plan.base.h,
                        at.w * in_step + plan.base.w};
      gradient.load(p.e, n, at, block_m, buffer * kTileVoxels * gradient.kPitch);
      if (pending) slab.load_coefficients(p.in, n, plan.n, block_n, coefs + buffer * slab.kCoefBytes);
      return slab.load(p.in, n, from, block_n, slabs + buffer * plan.slab_bytes);
    };

    const bool ahead = plan.buffers == 2;
    Products<T, kM, kN> products;
    products.clear();
    int buffer = 0;
    uint32_t inside = 0, next_inside = 0;
    if (ahead) next_inside = load(first, 0);
    commit_copies();
    barrier();
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      if (ahead) {
        inside = next_inside;
        if (tile + 1 < last) next_inside = load(tile + 1, buffer ^ 1);
        commit_copies();
        wait_copies<1>();
      } else {
        inside = load(tile, 0);
        commit_copies();
        wait_copies<0>();
        barrier();
      }
      const int at = slabs + buffer * plan.slab_bytes;
      if (pending) slab.transform(p.in, block_n, inside, at, coefs + buffer * slab.kCoefBytes);
      barrier();
      products.add(plan, size, buffer * kTileVoxels * gradient.kPitch, at);
      barrier();
      if (ahead) buffer ^= 1;
    }
    wait_copies<0>();

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
};

template <class T>
std::string weight_gradient_of(const WgradPlan& plan, int storage, const WeightGradient& c, void* workspace,
                               Stream stream) {
  float* partials = static_cast<float*>(workspace);
  const Sources in = sources_of<T>(c.inputs);
  const Input gradient[2] = {{c.e, nullptr, plan.co, kNone}, {}};
  const Sources e = sources_of<T>(gradient);
  const Grid grid{plan.groups, plan.blocks_m * plan.blocks_n, plan.kernel.d};
  const auto start = [&](auto kernel) {
    return launched("wgrad", launch<decltype(kernel)>(grid, plan.shared_bytes, stream, {plan, in, e, partials}));
  };
  std::string failure;
  if constexpr (sizeof(T) == 4) {
    failure = start(Wgrad<T, 32, 16>{});
  } else {
    failure = plan.bm == 32   ? start(Wgrad<T, 32, 32>{})
              : plan.bn == 64 ? start(Wgrad<T, 64, 64>{})
                              : start(Wgrad<T, 64, 16>{});
  }
  if (!failure.empty()) return failure;
  const int64_t width = static_cast<int64_t>(plan.co) * plan.kernel.volume() * plan.ci;
  return sum_rows(partials, plan.slots, width, storage, c.dweight, stream);
}

}  // namespace

int64_t weight_gradient_workspace(const WgradPlan& plan) {
  return static_cast<int64_t>(plan.slots) * plan.co * plan.kernel.volume() * plan.ci * 4;
}

std::string weight_gradient(const WgradPlan& plan, int storage, const WeightGradient& call, void* workspace,
                            Stream stream) {
  switch (storage) {
    case kBFloat16:
      return weight_gradient_of<BFloat16>(plan, storage, call, workspace, stream);
    case kFloat16:
      return weight_gradient_of<Float16>(plan, storage, call, workspace, stream);
    default:
      return weight_gradient_of<float>(plan, storage, call, workspace, stream);
  }
}

}  // namespace fastfilm::cuda
