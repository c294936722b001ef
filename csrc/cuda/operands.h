// The operands of the convolution kernels, which slabs hold: the activated input, or the gradient at the raw output.
//
// Neither is in global memory. A slab receives raw maps, and the pending affine, or the gradient of the moments, is
// computed on it once, in place. An operand starts its copies (`load`), brings its constants into shared memory
// (`load_constants`) and, once both have arrived, computes its values (`transform`).
#pragma once

#include "slab.h"

namespace fastfilm::cuda {

// One source, or two with joined channels; without a second one its x is null.
struct Sources {
  Input part[2];
  bool aligned;  // every chunk of every part is whole and lies on 16 bytes

  FF_DEVICE bool pending() const { return part[0].coef || part[1].coef; }
  // The source that a channel belongs to; `channel` becomes its number in it.
  FF_DEVICE const Input& source(int& channel) const {
    const bool second = part[1].x && channel >= part[0].channels;
    if (second) channel -= part[0].channels;
    return part[second];
  }
};

template <class T>
Sources sources_of(const Input (&inputs)[2]) {
  Sources in{};
  in.aligned = true;
  for (int i = 0; i < 2; ++i) {
    in.part[i] = inputs[i];
    if (!inputs[i].coef) in.part[i].act = kNone;
    if (inputs[i].x) in.aligned = in.aligned && on_chunks<T>(inputs[i].x, inputs[i].channels);
  }
  return in;
}

// The activated input: v = g * (act(a * (x - p) + b) - q) + s of each source.
template <class T, int kBlock>
struct Activated {
  using Params = Sources;
  using Box = Slab<T, kBlock>;
  static constexpr int kW = Box::kPiece, kFew = 4;  // voxels at a time, whose latencies overlap

  FF_DEVICE static void load(const Box& box, const Sources& in, int64_t n, int block, int at, int) {
    int channel = Box::channel(block);
    const Input& part = in.source(channel);
    box.copy(static_cast<const T*>(part.x), part.channels, channel, in.aligned, n, at);
  }

  // The coefficients of a block of channels.
  FF_DEVICE static void load_constants(const Sources& in, int64_t n, int64_t batch, int block, int at) {
    load_rows(batch, n, block * kBlock, kBlock, at, [&](int& channel) {
      const Input& part = in.source(channel);
      return CoefSource{part.coef, part.channels};
    });
  }

  // Voxels outside the map stay zero, since the affine comes before the padding.
  FF_DEVICE static void transform(const Box& box, const Sources& in, int64_t, int block, int at, int, int constants) {
    int channel = Box::piece_channel(block);
    const Input& part = in.source(channel);
    if (!part.coef) return;
    Coefficients<kW> coef;
    load_coefficients(constants + thread_anew() % Box::kPieces * kW * 4, kBlock, coef);
    box.template each<Box::kPieces, kFew>([&](const int (&number)[kFew], int offset) {
      float values[kFew * kW];
      Box::load_pieces(at + offset, number, values);
      coef.apply(values, part.act);
      Box::store_pieces(at + offset, number, values);
    });
  }
};

// The gradient at the raw output y, from dy and the gradients dm, dv of its moments, u = act(y + shift; slope):
//   e = dy + du/dy * (dm + 2 * (u - m) * dv) / |S|
// Without moments, e = scale * dy.
struct Gradients {
  Gradient given;
  int channels;
  float share;   // 1 / |S|
  bool aligned;  // every chunk of both maps is whole and lies on 16 bytes

  FF_DEVICE bool pending() const { return given.y || given.scale; }
};

template <class T>
Gradients gradients_of(const Gradient& given, int channels, const Extent& size) {
  const bool aligned = on_chunks<T>(given.dy, channels) && (!given.y || on_chunks<T>(given.y, channels));
  return {given, channels, 1.0f / (static_cast<float>(size.d) * size.h * size.w), aligned};
}

// Rows of constants of a gradient in shared memory. With y: shift, slope, m, dm / |S| and 2 dv / |S|; without: the scale, in
// place of the shift.
enum GradientRow { kShift, kActSlope, kMean, kDMean, kDVariance, kGradientRows };

// Those of kW channels, rows `count` apart, in registers or, for kernels that have none left, where they are.
template <int kW>
struct GradientRows {
  float row[kGradientRows][kW];

  FF_DEVICE GradientRows(int from, int count) {
#pragma unroll
    for (int r = 0; r < kGradientRows; ++r) load_row(from + r * count * 4, row[r]);
  }
  FF_DEVICE void get(GradientRow r, float (&values)[kW]) const {
#pragma unroll
    for (int i = 0; i < kW; ++i) values[i] = row[r][i];
  }
};
template <int kW>
struct GradientRowsAt {
  int from, count;

  FF_DEVICE void get(GradientRow r, float (&values)[kW]) const { load_row(from + r * count * 4, values); }
};

// The constants of `count` channels from `first` on, rows [count]; kThreads threads do it.
template <int kThreads>
FF_DEVICE void load_gradient_rows(const Gradients& in, int64_t n, int64_t batch, int first, int count, int at) {
  float* out = reinterpret_cast<float*>(shared_memory() + at);
  const Gradient& from = in.given;
#pragma unroll 1
  for (int i = crew_thread<kThreads>(); i < count; i += kThreads) {
    const int channel = first + i;
    const bool present = channel < in.channels, moments = present && from.y;
    const int64_t mean = n * in.channels + channel, variance = mean + batch * in.channels;
    if (from.y) out[kShift * count + i] = present && from.pre ? from.pre[channel] : 0.0f;
    else out[kShift * count + i] = present && from.scale ? from.scale[mean] : 1.0f;
    out[kActSlope * count + i] = present && from.pre ? from.pre[in.channels + channel] : 0.0f;
    out[kMean * count + i] = moments ? from.stats[mean] : 0.0f;
    out[kDMean * count + i] = moments ? from.dstats[mean] * in.share : 0.0f;
    out[kDVariance * count + i] = moments ? 2 * from.dstats[variance] * in.share : 0.0f;
  }
}

// e, from dy in `e` and y, of kCount numbers, voxel after voxel, and the gradients at the slopes of an activation that has
// some.
template <int kW, int kCount, class Rows>
FF_DEVICE void through_moments(const Rows& rows, int act, float (&y)[kCount], float (&e)[kCount],
                               float (&at_slope)[kCount]) {
  float of_channel[kW];
  rows.get(kShift, of_channel);
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] += of_channel[i % kW];
  // y becomes the gradient of the moments at act(y)
  const auto at_moments = [&] {
    float mean[kW], dmean[kW], dvariance[kW];
    rows.get(kMean, mean);
    rows.get(kDMean, dmean);
    rows.get(kDVariance, dvariance);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = dmean[i % kW] + (y[i] - mean[i % kW]) * dvariance[i % kW];
  };
  if (act == kNone) {
    at_moments();
#pragma unroll
    for (int i = 0; i < kCount; ++i) e[i] += y[i];
  } else {
    float slopes[kCount], slope_z[kCount];
    rows.get(kActSlope, of_channel);
#pragma unroll
    for (int i = 0; i < kCount; ++i) slopes[i] = of_channel[i % kW];
    activate(y, slopes, act, slope_z, [&](int i, float derivative) { at_slope[i] = derivative; });
    at_moments();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      e[i] += y[i] * slope_z[i];
      at_slope[i] *= y[i];
    }
  }
}
template <int kW, int kCount, class Rows>
FF_DEVICE void scaled(const Rows& rows, float (&e)[kCount]) {
  float scale[kW];
  rows.get(kShift, scale);
#pragma unroll
  for (int i = 0; i < kCount; ++i) e[i] *= scale[i % kW];
}

template <class T, int kBlock>
struct RawGradient {
  using Params = Gradients;
  using Box = Slab<T, kBlock>;
  static constexpr int kW = Box::kPiece;
  using State = Sums<2, kW>;  // of e, and of the gradient at the slope

  // dy to `at`, and y to `beside`.
  FF_DEVICE static void load(const Box& box, const Gradients& in, int64_t n, int block, int at, int beside) {
    const int channel = Box::channel(block);
    box.copy(static_cast<const T*>(in.given.dy), in.channels, channel, in.aligned, n, at);
    if (in.given.y) box.copy(static_cast<const T*>(in.given.y), in.channels, channel, in.aligned, n, beside);
  }

  FF_DEVICE static void load_constants(const Gradients& in, int64_t n, int64_t batch, int block, int at) {
    load_gradient_rows<kConvThreads>(in, n, batch, block * kBlock, kBlock, at);
  }

  FF_DEVICE static void transform(const Box& box, const Gradients& in, int64_t n, int block, int at, int beside,
                                  int constants) {
    run<2>(box, in, n, block, at, beside, constants,
           [](const int (&)[2], const float (&)[2 * kW], const float (&)[2 * kW]) {});
  }

  // The transform, with a call of add(numbers, e, gradient at the slopes) for the channels of this thread's piece of `kFew`
  // voxels at a time. Voxels outside of the map have negative numbers, and no gradient.
  template <int kFew, class F>
  FF_DEVICE static void run(const Box& box, const Gradients& in, int64_t n, int block, int at, int beside,
                            int constants, F add) {
    const int channel = Box::piece_channel(block);
    if (channel >= in.channels) return;
    const int act = in.given.pre ? in.given.pre_act : kNone;
    const int from = constants + thread_anew() % Box::kPieces * kW * 4;
    const GradientRows<kW> rows(from, kBlock);
    const int64_t begin = n * box.map.volume() * in.channels + channel;
    box.template each<Box::kPieces, kFew>([&](const int (&number)[kFew], int offset) {
      float e[kFew * kW], at_slope[kFew * kW] = {};
      Box::load_pieces(at + offset, number, e);
      if (in.given.y) {
        float y[kFew * kW];
        Box::load_pieces(beside + offset, number, y);
        through_moments<kW>(rows, act, y, e, at_slope);
        add(number, e, at_slope);
#pragma unroll
        for (int i = 0; i < kFew * kW; ++i) {
          e[i] = dithered<T>(e[i], begin + static_cast<int64_t>(number[i / kW]) * in.channels + i % kW);
        }
      } else {
        if (in.given.scale) scaled<kW>(rows, e);
        add(number, e, at_slope);
      }
      if (in.pending()) Box::store_pieces(at + offset, number, e);
    });
  }
};

}  // namespace fastfilm::cuda
