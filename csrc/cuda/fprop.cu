// The forward pass of a convolution: its epilogue, and the function that launches it.
#include "calls.h"
#include "convolve.h"
#include "forward.h"
#include "merge.h"
#include "operands.h"
#include "pack.h"

namespace fastfilm::cuda {
namespace {

// Adds the bias, sums the moments, and writes the raw output or, with `out_coef`, the finished one.
template <class T>
struct ForwardEpilogue {
  static constexpr int kV = kPair;
  using Params = ForwardTargets<T>;
  using State = Moments<kV>;
  struct Running : Deviations<kV> {
    FF_DEVICE void merge_into(State& state) const { state.merge(this->moments()); }
  };
  static constexpr int kFew = 4;
  template <int kN>
  static constexpr int kBeside = 0;

  int constants;  // place of this chunk's constants in shared memory, rows [bn]
  int64_t begin;

  FF_DEVICE static void load_constants(const Params& p, const ConvPlan& plan, int64_t n, int first, int at) {
    load_forward_rows<kConvThreads>(p, plan, n, first, at);
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
    load_row(constants + kBiasRow * plan.bn * 4, bias);
#pragma unroll
    for (int i = 0; i < kFew; ++i) load_row<kV>(row + i * pitch, &v[i * kV]);
#pragma unroll
    for (int i = 0; i < kFew * kV; ++i) v[i] += bias[i % kV];
    if (p.pre) {
      float u[kFew * kV], slopes[kFew * kV], shift[kV], slope[kV];
      load_row(constants + kShiftRow * plan.bn * 4, shift);
      load_row(constants + kActSlopeRow * plan.bn * 4, slope);
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
    conclude_forward(p, plan);
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
    if (chunk.channel % plan.bn == 0) counts_of(p, plan, block_index().y)[slot] = state.count;
  }
};

template <class T>
std::string forward_of(const ConvPlan& plan, const Forward& c, void* workspace, Stream stream, int storage) {
  ForwardTargets<T> targets;
  const std::string failure = begin_forward(plan, c, workspace, stream, storage, targets);
  if (!failure.empty()) return failure;
  const Sources in = sources_of<T>(c.inputs);
  return launch_conv<T, Activated, ForwardEpilogue>("fprop", plan, in, workspace, targets, stream);
}

}  // namespace

int64_t forward_workspace(const ConvPlan& plan, int storage) { return forward_bytes(plan, storage); }

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
