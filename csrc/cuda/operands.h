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

// A piece of a voxel in shared memory.
template <class T, int kW>
FF_DEVICE void read_piece(int at, float (&v)[kW]) {
  unpack_few<T>(load_few<T, kW>(reinterpret_cast<const T*>(shared_memory() + at), kW, true), v);
}
template <class T, int kW>
FF_DEVICE void write_piece(int at, const float (&v)[kW]) {
  store_few(reinterpret_cast<T*>(shared_memory() + at), kW, true, v);
}

// The activated input: v = g * (act(a * (x - p) + b) - q) + s of each source.
template <class T, int kBlock>
struct Activated {
  using Params = Sources;
  using Box = Slab<T, kBlock>;
  static constexpr int kW = Box::kPiece, kFew = 4;  // voxels at a time, whose latencies overlap

  FF_DEVICE static bool pending(const Sources& in) { return in.part[0].coef || in.part[1].coef; }

  // The source that a channel belongs to; `channel` becomes its number in it.
  FF_DEVICE static const Input& source(const Sources& in, int& channel) {
    const bool second = in.part[1].x && channel >= in.part[0].channels;
    if (second) channel -= in.part[0].channels;
    return in.part[second];
  }

  FF_DEVICE static void load(const Box& box, const Sources& in, int64_t n, const Extent& first, int block, int at,
                             int) {
    int channel = Box::channel(block);
    const Input& part = source(in, channel);
    box.copy(static_cast<const T*>(part.x), part.channels, channel, in.aligned, n, first, at);
  }

  // The coefficients of a block of channels: the identity for a source without a pending affine, and zeros, under which
  // v = 0, for channels that do not exist.
  FF_DEVICE static void load_constants(const Sources& in, int64_t n, int64_t batch, int block, int at) {
    float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
    for (int i = thread_index(); i < kCoefRows * kBlock; i += kConvThreads) {
      const int row = i / kBlock;
      int channel = block * kBlock + i % kBlock;
      const Input& part = source(in, channel);
      float value = row == kA || row == kG ? 1.0f : 0.0f;
      if (part.coef && channel < part.channels) value = part.coef[(row * batch + n) * part.channels + channel];
      out[i] = channel < part.channels ? value : 0.0f;
    }
  }

  // Voxels outside the map stay zero, since the affine comes before the padding.
  FF_DEVICE static void transform(const Box& box, const Sources& in, int64_t, const Extent& first, int block, int at,
                                  int, int constants) {
    int channel = Box::piece_channel(block);
    const Input& part = source(in, channel);
    if (!part.coef) return;
    Coefficients<kW> coef;
#pragma unroll
    for (int r = 0; r < kCoefRows; ++r) {
      load_row(constants + (r * kBlock + thread_index() % Box::kPieces * kW) * 4, coef.row[r]);
    }
    box.template each<Box::kPieces, kFew>(
        first, [&](const int (&v)[kFew], const Extent (&)[kFew], const bool (&in_map)[kFew]) {
          float values[kFew * kW];
#pragma unroll
          for (int i = 0; i < kFew; ++i) {
            float piece[kW] = {};
            if (in_map[i]) read_piece<T>(Box::piece(at, v[i]), piece);
#pragma unroll
            for (int j = 0; j < kW; ++j) values[i * kW + j] = piece[j];
          }
          coef.apply(values, part.act);
#pragma unroll
          for (int i = 0; i < kFew; ++i) {
            const float piece[kW] = {values[i * kW], values[i * kW + 1]};
            if (in_map[i]) write_piece<T>(Box::piece(at, v[i]), piece);
          }
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
};

template <class T>
Gradients gradients_of(const Gradient& given, int channels, const Extent& size) {
  const bool aligned = on_chunks<T>(given.dy, channels) && (!given.y || on_chunks<T>(given.y, channels));
  return {given, channels, 1.0f / (static_cast<float>(size.d) * size.h * size.w), aligned};
}

template <class T, int kBlock>
struct RawGradient {
  using Params = Gradients;
  using Box = Slab<T, kBlock>;
  static constexpr int kW = Box::kPiece;
  using State = Sums<2, kW>;  // of e, and of the gradient at the slope

  enum Constant { kShift, kActSlope, kMean, kDMean, kDVariance, kScale };

  FF_DEVICE static bool pending(const Gradients& in) { return in.given.y || in.given.scale; }

  // dy to `at`, and y to `beside`.
  FF_DEVICE static void load(const Box& box, const Gradients& in, int64_t n, const Extent& first, int block, int at,
                             int beside) {
    const int channel = Box::channel(block);
    box.copy(static_cast<const T*>(in.given.dy), in.channels, channel, in.aligned, n, first, at);
    if (in.given.y) {
      box.copy(static_cast<const T*>(in.given.y), in.channels, channel, in.aligned, n, first, beside);
    }
  }

  FF_DEVICE static void load_constants(const Gradients& in, int64_t n, int64_t batch, int block, int at) {
    float* out = reinterpret_cast<float*>(shared_memory() + at);
    const Gradient& from = in.given;
#pragma unroll 1
    for (int i = thread_index(); i < kBlock; i += kConvThreads) {
      const int channel = block * kBlock + i;
      const bool present = channel < in.channels, moments = present && from.y;
      const int64_t mean = n * in.channels + channel, variance = mean + batch * in.channels;
      out[kShift * kBlock + i] = present && from.pre ? from.pre[channel] : 0.0f;
      out[kActSlope * kBlock + i] = present && from.pre ? from.pre[in.channels + channel] : 0.0f;
      out[kMean * kBlock + i] = moments ? from.stats[mean] : 0.0f;
      out[kDMean * kBlock + i] = moments ? from.dstats[mean] * in.share : 0.0f;
      out[kDVariance * kBlock + i] = moments ? from.dstats[variance] * (2 * in.share) : 0.0f;
      out[kScale * kBlock + i] = present && from.scale ? from.scale[mean] : 1.0f;
    }
  }

  FF_DEVICE static void transform(const Box& box, const Gradients& in, int64_t n, const Extent& first, int block,
                                  int at, int beside, int constants) {
    run<1>(box, in, n, first, block, at, beside, constants, [](const float (&)[kW], const float (&)[kW]) {});
  }

  // The transform, with a call of add(e, gradient at the slopes) for each voxel inside the map and the channels of this
  // thread's piece; `kFew` voxels at a time.
  template <int kFew, class F>
  FF_DEVICE static void run(const Box& box, const Gradients& in, int64_t n, const Extent& first, int block, int at,
                            int beside, int constants, F add) {
    const int channel = Box::piece_channel(block);
    if (channel >= in.channels) return;
    const int act = in.given.pre ? in.given.pre_act : kNone;
    const int from = constants + thread_index() % Box::kPieces * kW * 4;
    // with y: shift, slope, m, dm / |S| and 2 dv / |S|; without: the scale, in place of the shift
    float shift[kW], slope[kW], mean[kW], dmean[kW], dvariance[kW];
    load_row(from + (in.given.y ? kShift : kScale) * kBlock * 4, shift);
    load_row(from + kActSlope * kBlock * 4, slope);
    load_row(from + kMean * kBlock * 4, mean);
    load_row(from + kDMean * kBlock * 4, dmean);
    load_row(from + kDVariance * kBlock * 4, dvariance);
    box.template each<Box::kPieces, kFew>(first, [&](const int (&v)[kFew], const Extent (&voxel)[kFew],
                                                     const bool (&in_map)[kFew]) {
      float e[kFew * kW], at_slope[kFew * kW] = {}, y[kFew * kW] = {};
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        float of_e[kW] = {}, of_y[kW] = {};
        if (in_map[i]) {
          read_piece<T>(Box::piece(at, v[i]), of_e);
          if (in.given.y) read_piece<T>(Box::piece(beside, v[i]), of_y);
        }
#pragma unroll
        for (int j = 0; j < kW; ++j) {
          e[i * kW + j] = of_e[j];
          y[i * kW + j] = of_y[j];
        }
      }
      if (in.given.y) {
        float slopes[kFew * kW], slope_z[kFew * kW];
#pragma unroll
        for (int i = 0; i < kFew * kW; ++i) {
          y[i] += shift[i % kW];
          slopes[i] = slope[i % kW];
        }
        activate(y, slopes, act, slope_z, at_slope);
#pragma unroll
        for (int i = 0; i < kFew * kW; ++i) {
          const float du = dmean[i % kW] + (y[i] - mean[i % kW]) * dvariance[i % kW];
          e[i] += du * slope_z[i];
          at_slope[i] *= du;
        }
      } else if (in.given.scale) {
#pragma unroll
        for (int i = 0; i < kFew * kW; ++i) e[i] *= shift[i % kW];
      }
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        if (!in_map[i]) continue;
        float of_e[kW], of_slope[kW];
#pragma unroll
        for (int j = 0; j < kW; ++j) {
          of_e[j] = e[i * kW + j];
          of_slope[j] = at_slope[i * kW + j];
        }
        add(of_e, of_slope);
        if (!pending(in)) continue;
        const int64_t number = box.voxel_of(n, voxel[i]) * in.channels + channel;
#pragma unroll
        for (int j = 0; j < kW && in.given.y; ++j) of_e[j] = dithered<T>(of_e[j], number + j);
        write_piece<T>(Box::piece(at, v[i]), of_e);
      }
    });
  }
};

}  // namespace fastfilm::cuda
