// The forward pass of a convolution: its epilogue, and the function that launches it.
#include "calls.h"
#include "coefficients.h"
#include "convolve.h"
#include "merge.h"
#include "operands.h"
#include "pack.h"

namespace fastfilm::cuda {
namespace {

// Adds the bias, sums the moments, and writes the raw output or, with `out_coef`, the finished one.
template <class T>
struct ForwardEpilogue {
  static constexpr int kV = kPair;
  struct Params {
    const float *bias, *pre, *out_coef;
    int pre_act, out_act;
    T *y, *raw;
    bool aligned;
    float *partials, *counts;  // [N, groups, 2, co] and [blocks_n, N, groups]; partials null: no moments
    float* stats;
    unsigned* counters;
    Block block;  // its coefficients follow the moments, if it has `coef`
  };
  using State = Moments<kV>;
  struct Running : Deviations<kV> {
    FF_DEVICE void merge_into(State& state) const { state.merge(this->moments()); }
  };
  static constexpr int kFew = 4;
  template <int kN>
  static constexpr int kBeside = 0;

  // Rows of constants behind the coefficients of the finished output.
  enum Constant { kBias = kCoefRows, kShift, kActSlope };

  int constants;  // place of this chunk's constants in shared memory, rows [bn]
  int64_t begin;

  FF_DEVICE static void load_constants(const Params& p, const ConvPlan& plan, int64_t n, int first, int at) {
    if (p.out_coef) load_rows(plan.n, n, first, plan.bn, at, [&](int&) { return CoefSource{p.out_coef, plan.co}; });
    float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
    for (int i = thread_index(); i < plan.bn; i += kConvThreads) {
      const int channel = first + i;
      const bool present = channel < plan.co;
      out[kBias * plan.bn + i] = p.bias && present ? p.bias[channel] : 0.0f;
      out[kShift * plan.bn + i] = p.pre && present ? p.pre[channel] : 0.0f;
      out[kActSlope * plan.bn + i] = p.pre && present ? p.pre[plan.co + channel] : 0.0f;
    }
  }

  // The products are all that this epilogue needs.
  template <int kN, int kPitch>
  FF_DEVICE static void load(const Params&, const ConvPlan&, int64_t, int, int, const int*) {}
  FF_DEVICE static void wait() {}

  FF_DEVICE ForwardEpilogue(const Params&, const ConvPlan& plan, const Chunk& chunk, int at)
      : constants(at), begin(chunk.n * plan.out.volume() * plan.co + chunk.channel) {}

  template <int kN>
  FF_DEVICE void write(const Params& p, const ConvPlan& plan, const int (&number)[kFew], const Chunk& chunk, int row,
                       int, int pitch, Running& running) const {
    float bias[kV], v[kFew * kV];
    load_row(constants + kBias * plan.bn * 4, bias);
#pragma unroll
    for (int i = 0; i < kFew; ++i) load_row<kV>(row + i * pitch, &v[i * kV]);
#pragma unroll
    for (int i = 0; i < kFew * kV; ++i) v[i] += bias[i % kV];
    if (p.pre) {
      float u[kFew * kV], slopes[kFew * kV], shift[kV], slope[kV];
      load_row(constants + kShift * plan.bn * 4, shift);
      load_row(constants + kActSlope * plan.bn * 4, slope);
#pragma unroll
      for (int i = 0; i < kFew * kV; ++i) {
        u[i] = v[i] + shift[i % kV];
        slopes[i] = slope[i % kV];
      }
      activate(u, slopes, p.pre_act);
      running.add(u, number);
    } else if (p.partials) {
      running.add(v, number);
    }
    if (p.raw) put_voxels<T, kV>(p.raw + begin, plan.co, chunk.valid, p.aligned, number, v);
    if (p.out_coef) {
      Coefficients<kV> out;
      load_coefficients(constants, plan.bn, out);
      out.apply(v, p.out_act);
    }
    put_voxels<T, kV>(p.y + begin, plan.co, chunk.valid, p.aligned, number, v);
  }

  FF_DEVICE static void finish(const Params& p, const ConvPlan& plan, const Chunk& chunk, State& state) {
    if (!p.partials) return;
    const int columns = plan.bn / kV;
    merge_rows<kConvThreads>(state, shared_memory(), columns);
    if (thread_index() < columns && chunk.valid > 0) write_partials(p, plan, chunk, state);
    state.clear();  // frees its registers
    conclude(p, plan);
  }

  // Merges the moments of a sample, and writes the coefficients, in the last block that has a part in them.
  FF_APART static void conclude(const Params& p, const ConvPlan& plan) {
    const Grid block = block_index();
    if (!last_block(p.counters + block.z * plan.blocks_n + block.y, plan.groups)) return;
    const MomentsMerge moments{p.partials, counts_of(p, plan), plan.n, plan.groups, plan.co, p.stats};
    for (int i = 0; i < plan.bn; i += kMergeColumns) moments.run(block.z, block.y * plan.bn + i);
    if (!p.block.coef || !last_block(p.counters + plan.n * plan.blocks_n + block.y, plan.n)) return;
    for (int i = 0; i < plan.bn; i += kMergeColumns) {
      write_coefficients(p.block, plan.n, plan.co, block.y * plan.bn + i);
    }
  }

  // A block of channels has counts of its own: those of the others may not be there yet.
  FF_DEVICE static float* counts_of(const Params& p, const ConvPlan& plan) {
    return p.counts + block_index().y * plan.n * plan.groups;
  }

  FF_DEVICE static void write_partials(const Params& p, const ConvPlan& plan, const Chunk& chunk, const State& state) {
    const int slot = static_cast<int>(chunk.n) * plan.groups + block_index().x;
    float* partial = p.partials + static_cast<int64_t>(slot) * 2 * plan.co + chunk.channel;
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      if (i < chunk.valid) {
        partial[i] = state.mean[i];
        partial[plan.co + i] = state.m2[i];
      }
    }
    if (chunk.channel % plan.bn == 0) counts_of(p, plan)[slot] = state.count;
  }
};

template <class T>
std::string forward_of(const ConvPlan& plan, const Forward& c, void* workspace, Stream stream, int storage) {
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed_bytes(plan, storage));
  float* counts = partials + plan.n * plan.groups * 2 * plan.co;
  unsigned* counters = reinterpret_cast<unsigned*>(counts + plan.blocks_n * plan.n * plan.groups);
  Block block = c.block;
  if (block.uses_input) block.stats = c.stats;
  Beside beside{{}, block, plan.n, plan.co};
  if (block.uses_input) beside.block.coef = nullptr;
  else block.coef = nullptr;
  const std::string failure = prepare({&plan, c.weight, false, workspace, counters}, beside, storage, stream);
  if (!failure.empty()) return failure;
  const Sources in = sources_of<T>(c.inputs);
  const typename ForwardEpilogue<T>::Params epilogue{c.bias,
                                                     c.pre,
                                                     c.out_coef,
                                                     c.pre ? c.pre_act : kNone,
                                                     c.out_act,
                                                     static_cast<T*>(c.y),
                                                     static_cast<T*>(c.raw),
                                                     on_chunks<T>(c.y, plan.co) && on_chunks<T>(c.raw, plan.co),
                                                     c.stats ? partials : nullptr,
                                                     counts,
                                                     c.stats,
                                                     counters,
                                                     block};
  return launch_conv<T, Activated, ForwardEpilogue>("fprop", plan, in, workspace, epilogue, stream);
}

}  // namespace

int64_t forward_workspace(const ConvPlan& plan, int storage) {
  return packed_bytes(plan, storage) + plan.n * plan.groups * (2 * plan.co + plan.blocks_n) * 4 + counters_of(plan) * 4;
}

std::string forward(const ConvPlan& plan, int storage, const Forward& call, void* workspace, Stream stream) {
  switch (storage) {
    case kBFloat16:
      return forward_of<BFloat16>(plan, call, workspace, stream, storage);
    case kFloat16:
      return forward_of<Float16>(plan, call, workspace, stream, storage);
    case kTensorFloat:
      return forward_of<TensorFloat>(plan, call, workspace, stream, storage);
    default:
      return forward_of<float>(plan, call, workspace, stream, storage);
  }
}

}  // namespace fastfilm::cuda
