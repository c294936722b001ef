// The gradient at a convolution's input.
#include "backward_epilogue.h"
#include "pack.h"

namespace fastfilm::cuda {
namespace {

// Partial sums that the blocks of threads write.
int64_t sums_of(const ConvPlan& plan) { return plan.n * plan.classes * plan.groups * kCoefSums * plan.co; }

template <class T>
std::string backward_of(const ConvPlan& plan, const Backward& c, const WeightSums& left, void* workspace, Stream stream,
                        int storage) {
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed_bytes(plan, storage));
  unsigned* counters = reinterpret_cast<unsigned*>(partials + sums_of(plan));
  const std::string failure = prepare({&plan, c.weight, true, workspace, counters}, {left}, storage, stream);
  if (!failure.empty()) return failure;
  const auto epilogue = backward_epilogue<T>(c.outputs, partials, counters);
  const Gradients gradient = gradients_of<T>(c.gradient, plan.ci, plan.in);
  return launch_conv<T, RawGradient, BackwardEpilogue>("dgrad", plan, gradient, workspace, epilogue, stream);
}

}  // namespace

int64_t backward_workspace(const ConvPlan& plan, int storage) {
  return packed_bytes(plan, storage) + (sums_of(plan) + counters_of(plan)) * 4;
}

std::string backward(const ConvPlan& plan, int storage, const Backward& call, const WeightSums& left, void* workspace,
                     Stream stream) {
  switch (storage) {
    case kBFloat16:
      return backward_of<BFloat16>(plan, call, left, workspace, stream, storage);
    case kFloat16:
      return backward_of<Float16>(plan, call, left, workspace, stream, storage);
    case kTensorFloat:
      return backward_of<TensorFloat>(plan, call, left, workspace, stream, storage);
    default:
      return backward_of<float>(plan, call, left, workspace, stream, storage);
  }
}

}  // namespace fastfilm::cuda
