// What the gradient at a convolution's input makes of its products, in whichever way they were computed: its targets,
// constants and workspace.
#pragma once

#include "calls.h"
#include "merge.h"
#include "pack.h"
#include "slab.h"

namespace fastfilm::cuda {

// The gradient at the raw map of each source is written, and the gradients at its coefficients are summed.
template <class T>
struct BackwardTargets {
  Output part[2];  // without a second source its channels are 0
  bool aligned[2], plain[2];  // plain: aligned, and the gradient is written alone, not added
  float* partials;  // [N, slots, 5, C]
  unsigned* counters;

  // The number of the source that `channel` belongs to, whose number in it `channel` becomes.
  FF_DEVICE int source_of(int& channel) const {
    const int second = channel >= part[0].channels;
    channel -= second ? part[0].channels : 0;
    return second;
  }
};

// Brings the coefficients of a block's channels from `first` on into shared memory, rows [bn]; kThreads threads do it.
template <int kThreads, class T, class Plan>
FF_DEVICE void load_backward_rows(const BackwardTargets<T>& p, const Plan& plan, int64_t n, int first, int at) {
  load_rows<kThreads>(plan.n, n, first, plan.bn, at, [&](int& channel) {
    const Output& part = p.part[p.source_of(channel)];
    return CoefSource{part.coef, part.channels};
  });
}

// Merges the gradients at the coefficients of a sample in the last block that has a part in them.
template <class T, class Plan>
FF_APART void conclude_backward(const BackwardTargets<T>& p, const Plan& plan) {
  const Grid block = block_index();
  const int block_n = block.y % plan.blocks_n;
  if (!last_block(p.counters + block.z * plan.blocks_n + block_n, plan.classes * plan.groups)) return;
  const CoefficientsMerge sums{p.partials, plan.n, plan.partial_slots(), plan.co};
  for (int i = 0; i < plan.bn; i += kMergeColumns) {
    const int from = static_cast<int>(merge_channel(block_n * plan.bn + i));
    const bool second = from >= p.part[0].channels;
    const Output& part = p.part[second];
    const int channel = from - (second ? p.part[0].channels : 0);
    sums.run(block.z, from, {part.coef, part.dcoef, part.channels}, channel, from < plan.co && part.coef);
  }
}

// Partial sums that the blocks of threads write.
template <class Plan>
int64_t sums_of(const Plan& plan) {
  return plan.n * plan.partial_slots() * kCoefSums * plan.co;
}

// The workspace: the packed weights, the partial sums, and the counters.
template <class Plan>
int64_t backward_bytes(const Plan& plan, int storage) {
  return packed_bytes(plan, storage) + (sums_of(plan) + counters_of(plan)) * 4;
}

// Packs the weights, and takes the sums that are left; fills in the targets. A source whose gradient is not wanted needs
// no coefficients.
template <class T, class Plan>
std::string begin_backward(const Plan& plan, const Backward& c, const WeightSums& left, void* workspace, Stream stream,
                           int storage, BackwardTargets<T>& targets) {
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed_bytes(plan, storage));
  unsigned* counters = reinterpret_cast<unsigned*>(partials + sums_of(plan));
  targets = {{c.outputs[0], c.outputs[1]}, {}, {}, partials, counters};
  for (int i = 0; i < 2; ++i) {
    Output& part = targets.part[i];
    if (!part.dx) part.coef = nullptr;
    if (!part.coef) part.act = kNone;
    if (!part.dx) part.add = false;
    targets.aligned[i] = on_chunks<T>(part.dx, part.channels) && (!part.coef || on_chunks<T>(part.x, part.channels));
    targets.plain[i] = targets.aligned[i] && part.dx && !part.add;
  }
  return prepare(Packing<Plan>{&plan, c.weight, true, workspace, counters}, {left}, storage, stream);
}

}  // namespace fastfilm::cuda
