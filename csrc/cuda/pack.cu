// The kernel that prepares a convolution: it packs the weights and clears the counters. It also takes the sums that the
// gradient at a weight has left, and computes coefficients that depend on no map: with no launch of their own. A block
// of threads has one of these works.
#include "pack.h"

#include <algorithm>

#include "coefficients.h"
#include "merge.h"
#include "slab.h"
#include "sm90/layout.h"

namespace fastfilm::cuda {
namespace {

// An element of a weight.
struct Factor {
  int in, out;
  Extent tap;
};

// The one that element i of the packed weights is; i becomes the place that it goes to.
template <class T>
FF_DEVICE Factor factor_of(const ConvPlan& plan, int64_t& i) {
  int c = 0;
  while (c + 1 < plan.classes && i >= plan.taps[c + 1].weights) ++c;
  const Taps& taps = plan.taps[c];
  int64_t rest = i - taps.weights;
  const int column = static_cast<int>(rest % plan.bk), row = static_cast<int>(rest / plan.bk % plan.bn);
  rest /= plan.bk * plan.bn;
  const int tap_count = taps.count.h * taps.count.w, tap = static_cast<int>(rest % tap_count);
  rest /= tap_count;
  const int depth = static_cast<int>(rest % taps.count.d);
  rest /= taps.count.d;
  // a tap begins a multiple of 512 bytes behind its part's beginning; its rows are swizzled by themselves
  const int inside = row * plan.bk + column, size = static_cast<int>(sizeof(T));
  i += swizzle(inside * size) / size - inside;
  return {static_cast<int>(rest % plan.blocks_k) * plan.bk + column,
          static_cast<int>(rest / plan.blocks_k) * plan.bn + row,
          {taps.kernel_first.d + depth * plan.kernel_step, taps.kernel_first.h + tap / taps.count.w * plan.kernel_step,
           taps.kernel_first.w + tap % taps.count.w * plan.kernel_step}};
}

// Likewise, in slices of 64 rows by 16 input channels: [2 chunks of 8 channels][64 rows][8]. A row whose tap belongs to
// another row of the output has a zero.
template <class T>
FF_DEVICE Factor factor_of(const sm90::Layout& plan, int64_t& i) {
  constexpr int kSlice = sm90::kSliceBytes / 2;
  const int inside = static_cast<int>(i % kSlice), row = inside / 8 % sm90::kRows;
  int c = 0;
  while (c + 1 < plan.classes && i / kSlice >= plan.result[c + 1].weights) ++c;
  const sm90::Result& result = plan.result[c];
  const int full = plan.bk / 16 * result.taps, of_block_n = (plan.blocks_k - 1) * full + plan.last_slices * result.taps;
  int64_t rest = i / kSlice - result.weights;
  const int block_n = static_cast<int>(rest / of_block_n);
  int slice = static_cast<int>(rest % of_block_n);
  const int block_k = slice / full < plan.blocks_k ? slice / full : plan.blocks_k - 1, here = plan.slices_of(block_k);
  slice -= block_k * full;
  int tap = slice / here, r = result.begin;
  while (r + 1 < result.end && tap >= plan.reads[r + 1].first_tap) ++r;
  const sm90::Reads& reads = plan.reads[r];
  tap -= reads.first_tap;
  const int plane = plan.plane_taps(reads), line = tap % plane / reads.count.w - row / plan.bn;
  const bool present = line >= 0 && line < reads.count.h;
  return {block_k * plan.bk + slice % here * 16 + inside / 512 * 8 + inside % 8,
          present ? block_n * plan.bn + row % plan.bn : plan.co,
          {reads.kernel_first.d + tap / plane * plan.kernel_step, reads.kernel_first.h + line * plan.kernel_step,
           reads.kernel_first.w + tap % reads.count.w * plan.kernel_step}};
}

template <class T, class Plan>
struct Prepare {
  struct Params {
    Plan plan;
    const T* weight;
    int64_t row_stride, column_stride;
    WeightStrides strides;
    T* out;
    unsigned* counters;
    int count;
    Beside beside;
    int packing, summing,
        pre;  // blocks that pack, that sum the gradient at the weight and dpre; the others: coefficients
  };
  static constexpr int kThreads = kMergeThreads, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    const int block = block_index().x, summing = block - p.packing;
    if (summing < 0) {
      pack(p, block);
    } else if (summing < p.summing) {
      sum_weight(p.beside.left, summing);
    } else if (summing < p.summing + p.pre) {
      sum_pre(p.beside.left, summing - p.summing);
    } else {
      const int64_t first = static_cast<int64_t>(summing - p.summing - p.pre) * kMergeColumns;
      write_coefficients(p.beside.block, p.beside.n, p.beside.c, first);
    }
  }

  static FF_DEVICE void sum_weight(const WeightSums& left, int block) {
    const int64_t taps = left.kernel.volume(), width = left.co * taps * left.ci;
    const int64_t column = merge_channel(static_cast<int64_t>(block) * kMergeColumns);
    const float sum = row_sum(left.partials, left.slots, width, column);
    if (column >= width || !writes_merged()) return;
    const int ci = static_cast<int>(column % left.ci), co = static_cast<int>(column / left.ci / taps);
    const int tap = static_cast<int>(column / left.ci % taps), plane = left.kernel.h * left.kernel.w;
    const WeightStrides& s = left.strides;
    from_float(sum, static_cast<T*>(left.dweight)[co * s.co + ci * s.ci + tap / plane * s.d +
                                                  tap % plane / left.kernel.w * s.h + tap % left.kernel.w * s.w]);
  }

  static FF_DEVICE void sum_pre(const WeightSums& left, int block) {
    const int64_t width = 2 * left.co, column = merge_channel(static_cast<int64_t>(block) * kMergeColumns);
    const float sum = row_sum(left.sums, left.groups, width, column);
    if (column < width && writes_merged()) left.dpre[column] = sum;
  }

  static FF_DEVICE void pack(const Params& p, int block) {
    const int64_t i = static_cast<int64_t>(block) * kThreads + thread_index();
    if (i < p.count) p.counters[i] = 0;
    if (i >= p.plan.packed) return;
    int64_t to = i;
    const Factor factor = factor_of<T>(p.plan, to);
    T value{};
    if (factor.in < p.plan.ci && factor.out < p.plan.co) {
      value = p.weight[factor.out * p.row_stride + factor.in * p.column_stride + factor.tap.d * p.strides.d +
                       factor.tap.h * p.strides.h + factor.tap.w * p.strides.w];
    }
    if constexpr (std::is_same_v<T, TensorFloat>)
      value.value = bits_to_float(round_to_tf32(float_to_bits(value.value)));
    p.out[to] = value;
  }
};

int blocks_of(int64_t elements, int each) { return static_cast<int>((elements + each - 1) / each); }

template <class T, class Plan>
std::string prepare_of(const Packing<Plan>& packing, const Beside& beside, Stream stream) {
  using Kernel = Prepare<T, Plan>;
  typename Kernel::Params p{};
  if (packing.plan) {
    const WeightStrides& s = packing.weight.strides;
    p.plan = *packing.plan;
    p.weight = static_cast<const T*>(packing.weight.data);
    p.row_stride = packing.backward ? s.ci : s.co;
    p.column_stride = packing.backward ? s.co : s.ci;
    p.strides = s;
    p.out = static_cast<T*>(packing.packed);
    p.counters = packing.counters;
    p.count = counters_of(p.plan);
    p.packing = blocks_of(std::max<int64_t>(p.plan.packed, p.count), Kernel::kThreads);
  }
  const WeightSums& left = beside.left;
  p.beside = beside;
  if (left.dweight) {
    p.summing = blocks_of(static_cast<int64_t>(left.co) * left.kernel.volume() * left.ci, kMergeColumns);
    p.pre = left.dpre ? blocks_of(2 * static_cast<int64_t>(left.co), kMergeColumns) : 0;
  }
  const int coefs = beside.block.coef ? blocks_of(beside.c, kMergeColumns) : 0;
  const char* name = !packing.plan ? "sum_weights" : left.dweight ? "pack_and_sum_weights" : "pack_weights";
  const Grid grid{p.packing + p.summing + p.pre + coefs, 1, 1};
  return launched(name, launch<Kernel>(grid, kMergeScratch, stream, p));
}

}  // namespace

template <>
std::string prepare(const Packing<ConvPlan>& packing, const Beside& beside, int storage, Stream stream) {
  switch (storage) {
    case kBFloat16:
      return prepare_of<BFloat16>(packing, beside, stream);
    case kFloat16:
      return prepare_of<Float16>(packing, beside, stream);
    case kTensorFloat:
      return prepare_of<TensorFloat>(packing, beside, stream);
    default:
      return prepare_of<float>(packing, beside, stream);
  }
}

template <>
std::string prepare(const Packing<sm90::Layout>& packing, const Beside& beside, int storage, Stream stream) {
  return storage == kBFloat16 ? prepare_of<BFloat16>(packing, beside, stream)
                              : prepare_of<Float16>(packing, beside, stream);
}

}  // namespace fastfilm::cuda
