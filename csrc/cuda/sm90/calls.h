// The calls of calls.h by warpgroup products, on the layouts of layout.h.
#pragma once

#include "../calls.h"
#include "layout.h"

namespace fastfilm::cuda::sm90 {

int64_t forward_workspace(const Layout& layout, int storage);
std::string forward(const Layout& layout, int storage, const Forward& call, void* workspace, Stream stream);

int64_t backward_workspace(const Layout& layout, int storage);
std::string backward(const Layout& layout, int storage, const Backward& call, const WeightSums& left, void* workspace,
                     Stream stream);

int64_t weight_gradient_workspace(const WeightLayout& layout);
std::string weight_gradient(const WeightLayout& layout, int storage, const WeightGradient& call, void* workspace,
                            WeightSums& left, Stream stream);

}  // namespace fastfilm::cuda::sm90
