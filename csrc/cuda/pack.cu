// The kernel that packs the weights of a convolution; pack.h has the order.
#include "pack.h"

#include <algorithm>

#include "slab.h"

namespace fastfilm::cuda {
namespace {

template <class T>
struct Pack {
  struct Params {
    ConvPlan plan;
    const T* weight;
    int64_t row_stride, column_stride;
    WeightStrides strides;
    T* out;
    unsigned* counters;
    int count;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1;

  static FF_DEVICE void run(const Params& p) {
    const ConvPlan& plan = p.plan;
    const int64_t i = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
    if (i < p.count) p.counters[i] = 0;
    if (i >= plan.packed) return;
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
    const int channel_in = static_cast<int>(rest % plan.blocks_k) * plan.bk + column;
    const int channel_out = static_cast<int>(rest / plan.blocks_k) * plan.bn + row;
    T value{};
    if (channel_in < plan.ci && channel_out < plan.co) {
      const int64_t d = taps.kernel_first.d + depth * plan.kernel_step;
      const int64_t h = taps.kernel_first.h + tap / taps.count.w * plan.kernel_step;
      const int64_t w = taps.kernel_first.w + tap % taps.count.w * plan.kernel_step;
      value = p.weight[channel_out * p.row_stride + channel_in * p.column_stride + d * p.strides.d + h * p.strides.h +
                       w * p.strides.w];
    }
    if constexpr (std::is_same_v<T, TensorFloat>) value.value = bits_to_float(round_to_tf32(float_to_bits(value.value)));
    // each tap begins a multiple of 1024 bytes behind the slab's beginning, so its rows are swizzled by themselves
    const int inside = (row * plan.bk + column) * static_cast<int>(sizeof(T));
    const int64_t tile = i - (row * plan.bk + column);
    p.out[tile + swizzle(inside) / static_cast<int>(sizeof(T))] = value;
  }
};

template <class T>
std::string pack(const ConvPlan& plan, const Weight& weight, bool backward, void* packed, unsigned* counters,
                 Stream stream) {
  const int count = counters_of(plan);
  const Grid grid{static_cast<int>((std::max<int64_t>(plan.packed, count) + 255) / 256), 1, 1};
  const WeightStrides& s = weight.strides;
  return launched("pack_weights", launch<Pack<T>>(grid, 0, stream,
                                                  {plan, static_cast<const T*>(weight.data), backward ? s.ci : s.co,
                                                   backward ? s.co : s.ci, s, static_cast<T*>(packed), counters,
                                                   count}));
}

}  // namespace

std::string pack_weights(const ConvPlan& plan, int storage, const Weight& weight, bool backward, void* packed,
                         unsigned* counters, Stream stream) {
  // bits are moved and not converted, so BFloat16 serves float16 too
  if (storage == kTensorFloat) return pack<TensorFloat>(plan, weight, backward, packed, counters, stream);
  return storage == kFloat32 ? pack<float>(plan, weight, backward, packed, counters, stream)
                             : pack<BFloat16>(plan, weight, backward, packed, counters, stream);
}

}  // namespace fastfilm::cuda
