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

// Loads and stores of kW neighbouring channels, 8 or 16 bytes, in shared memory and in a map, of which `valid` exist
// in the map.
template <class T, int kW>
FF_DEVICE void read_shared(int at, float (&v)[kW]) {
  if constexpr (kW * sizeof(T) == 16) {
    unpack16<T>(load_shared16(at), v);
  } else {
    load_four(reinterpret_cast<const T*>(shared_memory() + at), 4, true, v);
  }
}
template <class T, int kW>
FF_DEVICE void write_shared(int at, const float (&v)[kW]) {
  if constexpr (kW * sizeof(T) == 16) {
    store_shared16(at, pack16<T>(v));
  } else {
    store_four(reinterpret_cast<T*>(shared_memory() + at), 4, true, v);
  }
}
template <class T, int kW>
FF_DEVICE void read_map(const T* at, int valid, bool aligned, float (&v)[kW]) {
  if constexpr (kW * sizeof(T) == 16) {
    unpack16<T>(load_chunk(at, valid, aligned), v);
  } else {
    load_four(at, valid, aligned, v);
  }
}

// The activated input: v = view(g * (act(a * (x - p) + b) - q) + s) of each source. `kFrugal` takes four channels at a
// time and reads their constants anew, for kernels whose accumulators leave no registers for more.
template <class T, int kBlock, bool kFrugal>
struct BasicActivated {
  using Params = Sources;
  using Box = Slab<T, kBlock>;
  static constexpr int kV = kLanes<T>, kW = kFrugal ? 4 : kV, kSize = static_cast<int>(sizeof(T));

  FF_DEVICE static bool pending(const Sources& in) {
    return in.part[0].coef || in.part[1].coef || seen(in.part[0]) || seen(in.part[1]);
  }
  FF_DEVICE static bool seen(const Input& part) { return part.view.axis[2].index; }

  // The source that this thread's chunk belongs to; `channel` becomes the chunk's first channel in it.
  FF_DEVICE static const Input& source(const Sources& in, int block, int& channel) {
    channel = Box::channel(block);
    const bool second = in.part[1].x && channel >= in.part[0].channels;
    if (second) channel -= in.part[0].channels;
    return in.part[second];
  }

  FF_DEVICE static void load(const Box& box, const Sources& in, int64_t n, const Extent& first, int block, int at) {
    int channel;
    const Input& part = source(in, block, channel);
    if (!seen(part)) box.copy(static_cast<const T*>(part.x), part.channels, channel, in.aligned, n, first, at);
  }

  // The coefficients of a block of channels: the identity for a source without a pending affine, and zeros, under which
  // v = 0, for channels that do not exist.
  FF_DEVICE static void load_constants(const Sources& in, int64_t n, int64_t batch, int block, int at) {
    float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
    for (int i = thread_index(); i < kCoefRows * kBlock; i += kConvThreads) {
      const int row = i / kBlock;
      int channel = block * kBlock + i % kBlock;
      const bool second = in.part[1].x && channel >= in.part[0].channels;
      if (second) channel -= in.part[0].channels;
      const Input& part = in.part[second];
      float value = row == kA || row == kG ? 1.0f : 0.0f;
      if (part.coef && channel < part.channels) value = part.coef[(row * batch + n) * part.channels + channel];
      out[i] = channel < part.channels ? value : 0.0f;
    }
  }

  // Voxels outside the map stay zero, since the affine and the view come before the padding.
  FF_DEVICE static void transform(const Box& box, const Sources& in, int64_t n, const Extent& first, int block, int at,
                                  int constants) {
    int channel;
    const Input& part = source(in, block, channel);
    const bool view = seen(part);
    if (!part.coef && !view) return;
    Coefficients<kW> coef;
    const auto load_coefficients = [&](int w) {
#pragma unroll
      for (int r = 0; r < kCoefRows; ++r) {
        load_row(constants + (r * kBlock + thread_index() % Box::kChunks * kV + w) * 4, coef.row[r]);
      }
    };
    if (!kFrugal) load_coefficients(0);
    box.each(first, [&](int v, const Extent& voxel, bool in_map) {
      if (!in_map && !view) return;
#pragma unroll 1
      for (int w = 0; w < kV; w += kW) {
        if (kFrugal) load_coefficients(w);
        const int to = Box::place(at, v) + w * kSize;
        float values[kW] = {};
        if (!view) {
          read_shared<T>(to, values);
          coef.apply(values, part.act);
        } else if (in_map) {
          gather(part, coef, n, voxel, channel + w, in.aligned, values);
        }
        write_shared<T>(to, values);
      }
    });
  }

  // A voxel of a view: the weighted sum, or the maximum, over its taps along each axis.
  FF_DEVICE static void gather(const Input& part, const Coefficients<kW>& coef, int64_t n, const Extent& voxel,
                               int channel, bool aligned, float (&out)[kW]) {
    const View& view = part.view;
    const int left = part.channels - channel, valid = left < 0 ? 0 : left < kW ? left : kW;
    if (valid == 0) return;
    bool any = false;
#pragma unroll 1
    for (int z = 0; z < view.axis[0].taps; ++z) {
      const int iz = voxel.d * view.axis[0].taps + z;
#pragma unroll 1
      for (int y = 0; y < view.axis[1].taps; ++y) {
        const int iy = voxel.h * view.axis[1].taps + y;
        const float outer = view.axis[0].weight[iz] * view.axis[1].weight[iy];
        const int64_t row = ((n * view.size.d + view.axis[0].index[iz]) * view.size.h + view.axis[1].index[iy]) *
                            static_cast<int64_t>(view.size.w);
#pragma unroll 1
        for (int x = 0; x < view.axis[2].taps; ++x) {
          const int ix = voxel.w * view.axis[2].taps + x;
          const float weight = outer * view.axis[2].weight[ix];
          if (weight == 0) continue;  // the tap does not exist
          float values[kW];
          const int64_t offset = (row + view.axis[2].index[ix]) * part.channels + channel;
          read_map(static_cast<const T*>(part.x) + offset, valid, aligned, values);
          coef.apply(values, part.act);
#pragma unroll
          for (int i = 0; i < kW; ++i) {
            const bool larger = !any || values[i] > out[i] || values[i] != values[i];
            out[i] = view.maximum ? (larger ? values[i] : out[i]) : out[i] + weight * values[i];
          }
          any = true;
        }
      }
    }
  }
};

template <class T, int kBlock>
using Activated = BasicActivated<T, kBlock, false>;

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

template <class T, int kBlock, bool kFrugal>
struct BasicRawGradient {
  using Params = Gradients;
  using Box = Slab<T, kBlock>;
  static constexpr int kV = kLanes<T>, kW = kFrugal ? 4 : kV, kSize = static_cast<int>(sizeof(T));
  using State = Sums<2, kV>;  // of e, and of the gradient at the slope

  enum Constant { kShift, kActSlope, kMean, kDMean, kDVariance, kScale };

  FF_DEVICE static bool pending(const Gradients& in) { return in.given.y || in.given.scale; }

  FF_DEVICE static void load(const Box& box, const Gradients& in, int64_t n, const Extent& first, int block, int at) {
    box.copy(static_cast<const T*>(in.given.dy), in.channels, Box::channel(block), in.aligned, n, first, at);
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
                                  int at, int constants) {
    run(box, in, n, first, block, at, constants, [](const Extent&, int, const float (&)[kW], const float (&)[kW]) {});
  }

  // The transform, with a call of add(voxel, w, e, gradient at the slopes) for each voxel inside the map and the kW
  // channels from channel w of the chunk on.
  template <class F>
  FF_DEVICE static void run(const Box& box, const Gradients& in, int64_t n, const Extent& first, int block, int at,
                            int constants, F add) {
    const int channel = Box::channel(block), left = in.channels - channel;
    const int valid = left < 0 ? 0 : left < kV ? left : kV;
    if (valid == 0) return;
    const int act = in.given.pre ? in.given.pre_act : kNone;
    float shift[kW], slope[kW], mean[kW], dmean[kW], dvariance[kW];
    const auto load_rows = [&](int w) {
      const int from = constants + (thread_index() % Box::kChunks * kV + w) * 4;
      load_row(from + kShift * kBlock * 4, shift);
      load_row(from + kActSlope * kBlock * 4, slope);
      load_row(from + kMean * kBlock * 4, mean);
      load_row(from + kDMean * kBlock * 4, dmean);
      load_row(from + kDVariance * kBlock * 4, dvariance);
    };
    if (!kFrugal && in.given.y) load_rows(0);
    box.each(first, [&](int v, const Extent& voxel, bool in_map) {
      if (!in_map) return;
      const int64_t offset = box.voxel_of(n, voxel) * in.channels + channel;
#pragma unroll 1
      for (int w = 0; w < kV; w += kW) {
        const int to = Box::place(at, v) + w * kSize;
        float e[kW], at_slope[kW] = {};
        read_shared<T>(to, e);
        if (in.given.y) {
          if (kFrugal) load_rows(w);
          float y[kW];
          read_map(static_cast<const T*>(in.given.y) + offset + w, valid - w, in.aligned, y);
#pragma unroll
          for (int i = 0; i < kW; ++i) {
            float slope_z, slope_s;
            const float u = activate(y[i] + shift[i], slope[i], act, slope_z, slope_s);
            const float du = dmean[i] + (u - mean[i]) * dvariance[i];
            e[i] += du * slope_z;
            at_slope[i] = du * slope_s;
            y[i] = dithered<T>(e[i], offset + w + i);
          }
          write_shared<T>(to, y);
        } else if (in.given.scale) {
          load_row(constants + (kScale * kBlock + thread_index() % Box::kChunks * kV + w) * 4, shift);
#pragma unroll
          for (int i = 0; i < kW; ++i) e[i] *= shift[i];
          write_shared<T>(to, e);
        }
        add(voxel, w, e, at_slope);
      }
    });
  }

  // Adds e and the gradient at the slopes to the sums of this thread's chunk.
  FF_DEVICE static void add_to(State& state, int w, const float (&e)[kW], const float (&slope)[kW]) {
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      state.row[0][w + i] += e[i];
      state.row[1][w + i] += slope[i];
    }
  }

  // Merges the states of all threads, which are in shared memory, and writes the sums to out [2, channels].
  FF_DEVICE static void write_sums(State* states, float* out, int block, int channels) {
    const int channel = Box::channel(block);
    barrier();
    State state = states[thread_index()];
    merge_rows<kConvThreads>(state, states, Box::kChunks);
    if (thread_index() >= Box::kChunks) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i)
        if (channel + i < channels) out[r * channels + channel + i] = state.row[r][i];
  }
};

template <class T, int kBlock>
using RawGradient = BasicRawGradient<T, kBlock, false>;

}  // namespace fastfilm::cuda
