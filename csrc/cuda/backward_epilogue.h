// The epilogue of the gradient at a convolution's input: the chain rule through the pending affine of each source and
// through the maximum of a pooled one.
#pragma once

#include "calls.h"
#include "convolve.h"
#include "merge_partials.h"
#include "operands.h"

namespace fastfilm::cuda {

// Writes the gradient at the raw map of each source, and sums the gradients at its coefficients.
template <class T>
struct BackwardEpilogue {
  struct Params {
    Output part[2];  // without a second source its channels are 0
    bool aligned[2];
    float* partials;  // [N, classes * groups, 5, C]
  };
  using State = Sums<kCoefSums, kQuad>;

  Coefficients<kQuad> coef;

  // The number of the source that a chunk belongs to; `channel` and `valid` become the chunk's first channel in it and
  // the number of its channels.
  FF_DEVICE static int part_of(const Params& p, const Chunk& chunk, int& channel, int& valid) {
    const int second = chunk.channel >= p.part[0].channels;
    channel = chunk.channel - (second ? p.part[0].channels : 0);
    const int left = p.part[second].channels - channel;
    valid = left < chunk.valid ? left : chunk.valid;
    return second;
  }

  FF_DEVICE BackwardEpilogue(const Params& p, const ConvPlan& plan, const Chunk& chunk) {
    int channel, valid;
    const Output& part = p.part[part_of(p, chunk, channel, valid)];
    if (part.coef) {
      coef.load(part.coef + chunk.n * part.channels + channel, plan.n * part.channels, valid);
    } else {
      coef.identity();
    }
  }

  FF_DEVICE void write(const Params& p, const ConvPlan&, const Voxel& voxel, const Chunk& chunk, float (&dv)[kQuad],
                       State& state) const {
    int channel, valid;
    const int second = part_of(p, chunk, channel, valid);
    const Output& part = p.part[second];
    if (!part.dx || valid <= 0) return;
    if (part.window.w) {
      spread(part, p.aligned[second], voxel.at, chunk.n, channel, valid, dv, state);
    } else {
      const int64_t at = voxel.number * part.channels + channel;
      if (part.coef) {
        float x[kQuad];
        load_four(static_cast<const T*>(part.x) + at, valid, p.aligned[second], x);
        affine_backward(coef, x, part.act, dv, state);
      }
      put(part, p.aligned[second], at, valid, dv);
    }
  }

  FF_DEVICE static void put(const Output& part, bool aligned, int64_t at, int valid, float (&dx)[kQuad]) {
    T* to = static_cast<T*>(part.dx) + at;
    if (part.add) {
      float before[kQuad];
      load_four(to, valid, aligned, before);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) dx[i] += before[i];
    }
    store_four(to, valid, aligned, dx);
  }

  // The gradient of a maximum, which goes to the first of the largest voxels of the window. Voxels behind the last
  // window of an axis are written with that window.
  FF_DEVICE void spread(const Output& part, bool aligned, const Extent& at, int64_t n, int channel, int valid,
                        const float (&dv)[kQuad], State& state) const {
    const T* x = static_cast<const T*>(part.x);
    const auto end = [](int j, int step, int window, int size) {
      const int next = (j + 1) * step;
      return next + window > size ? size : next;
    };
    const Extent first{at.d * part.step.d, at.h * part.step.h, at.w * part.step.w};
    const Extent last{end(at.d, part.step.d, part.window.d, part.size.d), end(at.h, part.step.h, part.window.h, part.size.h),
                      end(at.w, part.step.w, part.window.w, part.size.w)};
    const auto place = [&](int d, int h, int w) {
      return (((n * part.size.d + d) * part.size.h + h) * part.size.w + w) * part.channels + channel;
    };
    float largest[kQuad];
    int owner[kQuad];
    int number = 0;
    for (int d = first.d; d < first.d + part.window.d; ++d)
      for (int h = first.h; h < first.h + part.window.h; ++h)
        for (int w = first.w; w < first.w + part.window.w; ++w, ++number) {
          float v[kQuad];
          load_four(x + place(d, h, w), valid, aligned, v);
          coef.apply(v, part.act);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            if (number == 0 || v[i] > largest[i] || v[i] != v[i]) {
              largest[i] = v[i];
              owner[i] = number;
            }
          }
        }
    for (int d = first.d; d < last.d; ++d)
      for (int h = first.h; h < last.h; ++h)
        for (int w = first.w; w < last.w; ++w) {
          const Extent in{d - first.d, h - first.h, w - first.w};
          const bool seen = in.d < part.window.d && in.h < part.window.h && in.w < part.window.w;
          const int here = seen ? (in.d * part.window.h + in.h) * part.window.w + in.w : -1;
          const int64_t to = place(d, h, w);
          float v[kQuad], dx[kQuad];
          load_four(x + to, valid, aligned, v);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) dx[i] = owner[i] == here ? dv[i] : 0.0f;
          if (part.coef) affine_backward(coef, v, part.act, dx, state);
          put(part, aligned, to, valid, dx);
        }
  }

  FF_DEVICE static void finish(const Params& p, const ConvPlan& plan, const Chunk& chunk, State& state) {
    if (!p.part[0].coef && !p.part[1].coef) return;
    const int columns = plan.bn / kQuad;
    merge_rows<kConvThreads>(state, shared_memory(), columns);
    if (thread_index() >= columns || chunk.valid == 0) return;
    const Grid block = block_index();
    const int64_t slot = (chunk.n * plan.classes + block.y / plan.blocks_n) * plan.groups + block.x;
    float* partial = p.partials + slot * kCoefSums * plan.co + chunk.channel;
#pragma unroll
    for (int r = 0; r < kCoefSums; ++r)
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (i < chunk.valid) partial[static_cast<int64_t>(r) * plan.co + i] = state.row[r][i];
  }
};

// The epilogue's parameters; a source whose gradient is not wanted needs no coefficients.
template <class T>
typename BackwardEpilogue<T>::Params backward_epilogue(const Output (&outputs)[2], float* partials) {
  typename BackwardEpilogue<T>::Params epilogue{{outputs[0], outputs[1]}, {}, partials};
  for (int i = 0; i < 2; ++i) {
    Output& part = epilogue.part[i];
    if (!part.dx) part.coef = nullptr;
    if (!part.coef) part.act = kNone;
    const bool reads = part.coef || part.window.w;
    epilogue.aligned[i] = on_chunks<T>(part.dx, part.channels) && (!reads || on_chunks<T>(part.x, part.channels));
  }
  return epilogue;
}

// Writes the gradients at the coefficients, from the sums of all blocks.
template <class T>
std::string finish_outputs(const ConvPlan& plan, const typename BackwardEpilogue<T>::Params& epilogue, Stream stream) {
  std::string failure;
  for (int i = 0, channel = 0; i < 2 && failure.empty(); channel += epilogue.part[i++].channels) {
    const Output& part = epilogue.part[i];
    if (!part.coef) continue;
    failure = finish_coefficients(epilogue.partials + channel, plan.co, part.coef, plan.n, plan.classes * plan.groups,
                                  part.channels, part.dcoef, stream);
  }
  return failure;
}

}  // namespace fastfilm::cuda
