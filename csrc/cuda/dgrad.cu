#include "conv.h"
#include "convolution.h"
#include "pack.h"
#include "second_stage.h"

namespace fastfilm::cuda {
namespace {

// The chain rule of the affine that is pending on the input: gradient at the raw input, and the coefficients' sums.
template <class T>
struct BackwardEpilogue {
  struct Params {
    const T* x;
    const float* coef;  // null: nothing is pending
    int act;
    T* dx;
    bool aligned;
    float* partials;  // [N, classes * groups, 5, C]
  };
  using State = Sums<kCoefSums, kQuad>;

  Coefficients<kQuad> coef;

  FF_DEVICE BackwardEpilogue(const Params& p, const ConvPlan& plan, const Chunk& chunk) {
    if (p.coef) coef.load(p.coef + chunk.n * plan.co + chunk.channel, plan.n * plan.co, chunk.valid);
  }

  FF_DEVICE void write(const Params& p, int64_t at, int valid, float (&dv)[kQuad], State& state) const {
    if (p.coef) {
      float x[kQuad];
      load_four(p.x + at, valid, p.aligned, x);
      affine_backward(coef, x, p.act, dv, state);
    }
    store_four(p.dx + at, valid, p.aligned, dv);
  }

  FF_DEVICE static void finish(const Params& p, const ConvPlan& plan, const Chunk& chunk, State& state) {
    if (!p.coef) return;
    const int columns = plan.bn / kQuad;
    merge_rows<kConvThreads>(state, shared_memory(), columns);
    if (thread_index() >= columns || chunk.valid == 0) return;
    const Grid block = block_index();
    const int64_t slot = (chunk.n * plan.classes + block.y / plan.blocks_n) * plan.groups + block.x;
    float* partial = p.partials + slot * kCoefSums * plan.co + chunk.channel;
#pragma unroll
    for (int r = 0; r < kCoefSums; ++r)
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (i < chunk.valid) partial[static_cast<int64_t>(r) * plan.co + i] = state.row[r][i];
  }
};

template <class T>
std::string backward_of(const ConvPlan& plan, const Backward& c, void* workspace, Stream stream, int storage) {
  std::string failure = pack_weights(plan, storage, c.weight, true, workspace, stream);
  if (!failure.empty()) return failure;
  const Input gradient[2] = {{c.e, nullptr, plan.ci, kNone}, {}};
  const Sources in = sources_of<T>(gradient);
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed_bytes(plan, storage));
  const float* coef = c.input.coef;
  const bool aligned = on_chunks<T>(c.dx, plan.co) && (!coef || on_chunks<T>(c.input.x, plan.co));
  const typename BackwardEpilogue<T>::Params epilogue{static_cast<const T*>(c.input.x), coef, coef ? c.input.act : kNone,
                                                      static_cast<T*>(c.dx), aligned, partials};
  failure = launch_conv<T, BackwardEpilogue>("dgrad", plan, in, workspace, epilogue, stream);
  if (!failure.empty() || !coef) return failure;
  return finish_coefficients(partials, coef, plan.n, plan.classes * plan.groups, plan.co, c.dcoef, stream);
}

}  // namespace

int64_t backward_workspace(const ConvPlan& plan, int storage) {
  return packed_bytes(plan, storage) + plan.n * plan.classes * plan.groups * kCoefSums * plan.co * 4;
}

std::string backward(const ConvPlan& plan, int storage, const Backward& call, void* workspace, Stream stream) {
  switch (storage) {
    case kBFloat16:
      return backward_of<BFloat16>(plan, call, workspace, stream, storage);
    case kFloat16:
      return backward_of<Float16>(plan, call, workspace, stream, storage);
    default:
      return backward_of<float>(plan, call, workspace, stream, storage);
  }
}

}  // namespace fastfilm::cuda
