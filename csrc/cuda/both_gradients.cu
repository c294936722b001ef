// The gradients at a convolution's input and at its weight by one kernel, which reads each map once.
//
// The slab holds the gradient at the raw output, with its halo. Its products with the weights are the gradient at the
// input; its products with a tile of the activated input, which lies beside it in shared memory, are the gradient at
// the weight.
#include "backward_epilogue.h"
#include "pack.h"

namespace fastfilm::cuda {
namespace {

constexpr int kMaxTaps = 9;

// The gradient at the weight, computed from the slabs of `Convolve`.
template <class T, int kN, int kK>
struct WeightCompanion {
  using Input = BasicActivated<T, kN, true>;
  using Output = BasicRawGradient<T, kK, true>;
  using State = typename Output::State;
  // a warp computes 16 output by 16 input channels; where fewer warps suffice, the others take a share of the voxels
  static constexpr int kWarpsM = kK / 16, kWarpsN = kN / 16, kShares = kConvThreads / 32 / (kWarpsM * kWarpsN);
  static constexpr int kPitchE = kK * 2, kPitchX = kN * 2, kTileBytes = kTileVoxels * kPitchX;

  struct Params {
    Sources in;
    float* partials;  // [slots, co, taps, ci]
    float* sums;      // [N * groups, 2, co] of the gradient; null: not wanted
  };

  const Params& p;
  const ConvPlan& plan;
  const int block_n;
  const Slab<T, kN> tile;
  const bool pending;
  State* held;  // sums of the gradient, one state a thread; null: not wanted, or another block has them
  float sum[kMaxTaps][2][4];

  static FF_DEVICE Extent tile_size(const ConvPlan& plan) {
    return {1 << plan.tile_log2.d, 1 << plan.tile_log2.h, 1 << plan.tile_log2.w};
  }

  FF_DEVICE WeightCompanion(const Params& p, const ConvPlan& plan, int block_n)
      : p(p), plan(plan), block_n(block_n), tile(tile_size(plan), plan.out, 1), pending(Input::pending(p.in)) {
    held = p.sums && block_n == 0 ? reinterpret_cast<State*>(shared_memory() + sums_at()) : nullptr;
    if (held) held[thread_index()].clear();
#pragma unroll
    for (int t = 0; t < kMaxTaps; ++t)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[t][i / 4][i % 4] = 0;
  }

  FF_DEVICE int at(int buffer) const { return plan.extra_at + buffer * kTileBytes; }
  FF_DEVICE int constants(int buffer) const {
    return plan.extra_at + plan.buffers * kTileBytes + buffer * tile.kCoefBytes;
  }
  FF_DEVICE int sums_at() const { return constants(plan.buffers); }

  FF_DEVICE void load(int64_t n, const Extent& first, int buffer) {
    Input::load(tile, p.in, n, first, block_n, at(buffer));
    if (pending) Input::load_constants(p.in, n, plan.n, block_n, constants(buffer));
  }

  // Transforms the tile that begins at voxel `first`, and the slab of the gradient that begins at `slab_first`.
  FF_DEVICE void transform(int64_t n, const Extent& first, int buffer, const Slab<T, kK>& slab,
                           const Gradients& gradient, const Extent& slab_first, int slab_at, int slab_constants) {
    if (pending) {
      Input::transform(tile, p.in, n, first, block_n, at(buffer), constants(buffer));
    }
    if (!Output::pending(gradient) && !held) return;
    const Extent size = tile.size;
    State* state = held ? held + thread_index() : nullptr;
    Output::run(slab, gradient, n, slab_first, 0, slab_at, slab_constants,
                [&](const Extent& v, int w, const float(&e)[Output::kW], const float(&slope)[Output::kW]) {
                  // voxels of the halo are summed by the tiles that they belong to
                  const bool own = static_cast<unsigned>(v.d - first.d) < static_cast<unsigned>(size.d) &&
                                   static_cast<unsigned>(v.h - first.h) < static_cast<unsigned>(size.h) &&
                                   static_cast<unsigned>(v.w - first.w) < static_cast<unsigned>(size.w);
                  if (state && own) Output::add_to(*state, w, e, slope);
                });
  }

  FF_DEVICE static int share() { return thread_index() / 32 / (kWarpsM * kWarpsN); }
  FF_DEVICE static int first_row() { return thread_index() / 32 % kWarpsM * 16; }
  FF_DEVICE static int first_column() { return thread_index() / 32 / kWarpsM % kWarpsN * 16; }

  FF_DEVICE void add(const Extent& slab, int e, int buffer) {
    const int lane = thread_index() % 32, x = at(buffer), taps = plan.taps[0].count.h * plan.taps[0].count.w;
#pragma unroll 1
    for (int voxels = share() * 16; voxels < kTileVoxels; voxels += kShares * 16) {
      uint32_t b[4];
      load_matrix4_transposed(
          b, x + swizzle((voxels + lane % 16) * kPitchX + first_column() * 2 + lane / 16 * 16));
      const Extent v = tile_voxel(plan.tile_log2, voxels + lane / 16 * 8 + lane % 8);
      const int row = (v.d * slab.h + v.h) * slab.w + v.w;
#pragma unroll
      for (int t = 0; t < kMaxTaps; ++t) {
        if (t >= taps) break;
        const int shift = taps == 1 ? 0 : t / 3 * slab.w + t % 3;
        uint32_t a[4];
        load_matrix4_transposed(a, e + swizzle((row + shift) * kPitchE + first_row() * 2 + lane / 8 % 2 * 16));
        multiply_add(sum[t][0], a, b[0], b[1], T{});
        multiply_add(sum[t][1], a, b[2], b[3], T{});
      }
    }
  }

  FF_DEVICE void finish(int64_t n) {
    const int64_t group = n * plan.groups + block_index().x;
    if (held) Output::write_sums(held, p.sums + group * 2 * plan.ci, 0, plan.ci);
    const int lane = thread_index() % 32, taps = plan.taps[0].count.h * plan.taps[0].count.w;
    float* out = p.partials + (group * kShares + share()) * plan.ci * taps * plan.co;
#pragma unroll
    for (int t = 0; t < kMaxTaps; ++t)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = first_row() + lane / 4 + i % 4 / 2 * 8;
        const int column = block_n * kN + first_column() + i / 4 * 8 + lane % 4 * 2 + i % 2;
        // tap t of the slab is tap taps - 1 - t of the weight
        if (t < taps && row < plan.ci && column < plan.co) {
          out[(static_cast<int64_t>(row) * taps + (taps - 1 - t)) * plan.co + column] = sum[t][i / 4][i % 4];
        }
      }
  }
};

template <class T>
std::string joint_of(const ConvPlan& plan, const Joint& c, void* workspace, Stream stream, int storage) {
  std::string failure = pack_weights(plan, storage, c.input.weight, true, workspace, stream);
  if (!failure.empty()) return failure;
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed_bytes(plan, storage));
  const auto epilogue = backward_epilogue<T>(c.input.outputs, partials);
  const Gradients gradient = gradients_of<T>(c.input.gradient, plan.ci, plan.in);
  partials += plan.n * plan.groups * kCoefSums * plan.co;
  const int64_t rows = plan.n * plan.groups, width = static_cast<int64_t>(plan.ci) * plan.taps[0].count.volume() * plan.co;
  float* sums = c.dpre ? partials + rows * joint_shares(plan) * width : nullptr;
  const Sources in = sources_of<T>(c.inputs);
  const Grid grid{plan.groups, plan.blocks_n, static_cast<int>(plan.n)};
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    return launched("joint gradient", launch<Kernel>(grid, plan.shared_bytes, stream,
                                                     {plan, gradient, static_cast<const T*>(workspace), epilogue,
                                                      {in, partials, sums}}));
  };
  switch (plan.bk) {
    case 64:
      failure = start(Convolve<T, 32, 64, RawGradient, BackwardEpilogue, WeightCompanion>{});
      break;
    case 32:
      failure = start(Convolve<T, 32, 32, RawGradient, BackwardEpilogue, WeightCompanion>{});
      break;
    default:
      failure = start(Convolve<T, 32, 16, RawGradient, BackwardEpilogue, WeightCompanion>{});
  }
  if (failure.empty()) failure = finish_outputs<T>(plan, epilogue, stream);
  if (failure.empty()) failure = sum_rows(partials, rows * joint_shares(plan), width, storage, c.dweight, stream);
  if (failure.empty() && sums) failure = sum_rows(sums, rows, 2 * plan.ci, kFloat32, c.dpre, stream);
  return failure;
}

}  // namespace

int joint_shares(const ConvPlan& plan) { return kConvThreads / 32 / (plan.bk / 16 * (plan.bn / 16)); }

int64_t joint_workspace(const ConvPlan& plan, int storage) {
  const int64_t width = static_cast<int64_t>(plan.ci) * plan.taps[0].count.volume() * plan.co;
  const int64_t row = kCoefSums * plan.co + joint_shares(plan) * width + 2 * plan.ci;
  return packed_bytes(plan, storage) + plan.n * plan.groups * row * 4;
}

std::string joint(const ConvPlan& plan, int storage, const Joint& call, void* workspace, Stream stream) {
  return storage == kBFloat16 ? joint_of<BFloat16>(plan, call, workspace, stream, storage)
                              : joint_of<Float16>(plan, call, workspace, stream, storage);
}

}  // namespace fastfilm::cuda
