// The gradient at a convolution's input.
#include "backward_epilogue.h"

namespace fastfilm::cuda {
namespace {

template <class T>
std::string backward_of(const ConvPlan& plan, const Backward& c, const WeightSums& left, void* workspace, Stream stream,
                        int storage) {
  BackwardTargets<T> targets;
  const std::string failure = begin_backward(plan, c, left, workspace, stream, storage, targets);
  if (!failure.empty()) return failure;
  const Gradients gradient = gradients_of<T>(c.gradient, plan.ci, plan.in);
  return launch_conv<T, RawGradient, BackwardEpilogue>("dgrad", plan, gradient, workspace, targets, stream);
}

}  // namespace

int64_t backward_workspace(const ConvPlan& plan, int storage) { return backward_bytes(plan, storage); }

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
