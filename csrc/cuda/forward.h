// What a forward pass makes of its products, in whichever way they were computed: its targets, constants and workspace.
#pragma once

#include "calls.h"
#include "coefficients.h"
#include "merge.h"
#include "pack.h"
#include "slab.h"

namespace fastfilm::cuda {

// The bias is added, moments are summed, and the raw output is written or, with `out_coef`, the finished one.
template <class T>
struct ForwardTargets {
  const float *bias, *pre, *out_coef;
  int pre_act, out_act;
  T *y, *raw;
  bool aligned;
  float *partials, *counts;  // [N, slots, 2, co] and [blocks_n, N, slots]; partials null: no moments
  float* stats;
  unsigned* counters;
  Block block;  // its coefficients follow the moments, if it has `coef`
};

// Rows of constants of the output's channels, behind the coefficients of the finished output.
enum ForwardRow { kBiasRow = kCoefRows, kShiftRow, kActSlopeRow };

// Brings those of a block's channels from `first` on into shared memory, rows [bn]; kThreads threads do it.
template <int kThreads, class T, class Plan>
FF_DEVICE void load_forward_rows(const ForwardTargets<T>& p, const Plan& plan, int64_t n, int first, int at) {
  if (p.out_coef) {
    load_rows<kThreads>(plan.n, n, first, plan.bn, at, [&](int&) { return CoefSource{p.out_coef, plan.co}; });
  }
  float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
  for (int i = crew_thread<kThreads>(); i < plan.bn; i += kThreads) {
    const int channel = first + i;
    const bool present = channel < plan.co;
    out[kBiasRow * plan.bn + i] = p.bias && present ? p.bias[channel] : 0.0f;
    out[kShiftRow * plan.bn + i] = p.pre && present ? p.pre[channel] : 0.0f;
    out[kActSlopeRow * plan.bn + i] = p.pre && present ? p.pre[plan.co + channel] : 0.0f;
  }
}

// The counts of a block of channels: those of the others may not be there yet.
template <class T, class Plan>
FF_DEVICE float* counts_of(const ForwardTargets<T>& p, const Plan& plan, int block_n) {
  return p.counts + block_n * plan.n * plan.partial_slots();
}

// Merges the moments of a sample, and writes the coefficients, in the last block that has a part in them.
template <class T, class Plan>
FF_APART void conclude_forward(const ForwardTargets<T>& p, const Plan& plan) {
  const Grid block = block_index();
  if (!last_block(p.counters + block.z * plan.blocks_n + block.y, plan.groups)) return;
  const MomentsMerge moments{p.partials, counts_of(p, plan, block.y), plan.n, plan.partial_slots(), plan.co, p.stats};
  for (int i = 0; i < plan.bn; i += kMergeColumns) moments.run(block.z, block.y * plan.bn + i);
  if (!p.block.coef || !last_block(p.counters + plan.n * plan.blocks_n + block.y, plan.n)) return;
  for (int i = 0; i < plan.bn; i += kMergeColumns) {
    write_coefficients(p.block, plan.n, plan.co, block.y * plan.bn + i);
  }
}

// The workspace: the packed weights, the partial moments, their counts, and the counters.
template <class Plan>
int64_t forward_bytes(const Plan& plan, int storage) {
  return packed_bytes(plan, storage) + plan.n * plan.partial_slots() * (2 * plan.co + plan.blocks_n) * 4 +
         counters_of(plan) * 4;
}

// Packs the weights, and computes what depends on no map; fills in the targets.
template <class T, class Plan>
std::string begin_forward(const Plan& plan, const Forward& c, void* workspace, Stream stream, int storage,
                          ForwardTargets<T>& targets) {
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed_bytes(plan, storage));
  float* counts = partials + plan.n * plan.partial_slots() * 2 * plan.co;
  unsigned* counters = reinterpret_cast<unsigned*>(counts + plan.blocks_n * plan.n * plan.partial_slots());
  Block block = c.block;
  if (block.uses_input) block.stats = c.stats;
  Beside beside{{}, block, plan.n, plan.co};
  if (block.uses_input) beside.block.coef = nullptr;
  else block.coef = nullptr;
  targets = {c.bias,
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
  return prepare(Packing<Plan>{&plan, c.weight, false, workspace, counters}, beside, storage, stream);
}

}  // namespace fastfilm::cuda
