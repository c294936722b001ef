// The epilogue of the gradient at a convolution's input: the chain rule through the pending affine of each source.
#pragma once

#include "calls.h"
#include "convolve.h"
#include "merge.h"
#include "operands.h"

namespace fastfilm::cuda {

// Writes the gradient at the raw map of each source, and sums the gradients at its coefficients.
template <class T>
struct BackwardEpilogue {
  struct Params {
    Output part[2];  // without a second source its channels are 0
    bool aligned[2];
    float* partials;  // [N, classes * groups, 5, C]
    unsigned* counters;
  };
  using State = Sums<kCoefSums, kPair>;
  static constexpr int kAhead = 2;

  int coefs;  // place of this chunk's coefficients in shared memory, rows [bn]

  // The number of the source that a chunk belongs to; `channel` and `valid` become the chunk's first channel in it and
  // the number of its channels.
  FF_DEVICE static int part_of(const Params& p, const Chunk& chunk, int& channel, int& valid) {
    const int second = chunk.channel >= p.part[0].channels;
    channel = chunk.channel - (second ? p.part[0].channels : 0);
    const int left = p.part[second].channels - channel;
    valid = left < chunk.valid ? left : chunk.valid;
    return second;
  }

  // The coefficients of a block's channels from `first` on; where nothing is pending they are not used.
  FF_DEVICE static void load_constants(const Params& p, const ConvPlan& plan, int64_t n, int first, int at) {
    float* out = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll 1
    for (int i = thread_index(); i < kCoefRows * plan.bn; i += kConvThreads) {
      int channel = first + i % plan.bn;
      const bool second = channel >= p.part[0].channels;
      channel -= second ? p.part[0].channels : 0;
      const Output& part = p.part[second];
      const int64_t from = (i / plan.bn * plan.n + n) * part.channels + channel;
      out[i] = part.coef && channel < part.channels ? part.coef[from] : 0.0f;
    }
  }

  FF_DEVICE BackwardEpilogue(const Params&, const ConvPlan&, const Chunk&, int at) : coefs(at) {}

  // What a voxel needs beside its gradient: x where an affine is pending, and the former dx where dx is added to it.
  struct Fetched {
    Few<T, kPair> x, before;
  };

  // Voxels that do not exist get the values of the batch's first one: a load without a condition waits for no other.
  FF_DEVICE void fetch(const Params& p, const ConvPlan& plan, const int (&voxel)[kAhead], const Chunk& chunk,
                       Fetched (&fetched)[kAhead]) const {
    int channel, valid;
    const int second = part_of(p, chunk, channel, valid);
    const Output& part = p.part[second];
    const auto at = [&](int i) -> int64_t {
      return voxel[i] < 0 ? 0 : number_of(plan, chunk.n, voxel[i]) * part.channels + channel;
    };
    const auto load = [&](const void* from, Few<T, kPair> Fetched::*to) {
      if (p.aligned[second]) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetched[i].*to = load_few<T, kPair>(static_cast<const T*>(from) + at(i), valid, true);
      } else {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetched[i].*to = load_few<T, kPair>(static_cast<const T*>(from) + at(i), valid, false);
      }
    };
    if (part.coef) load(part.x, &Fetched::x);
    if (part.add) load(part.dx, &Fetched::before);
  }

  FF_DEVICE void write(const Params& p, const ConvPlan& plan, const int (&voxel)[kAhead], const Chunk& chunk,
                       const Fetched (&fetched)[kAhead], float (&dv)[kAhead * kPair], State& state) const {
    int channel, valid;
    const int second = part_of(p, chunk, channel, valid);
    const Output& part = p.part[second];
    if (!part.dx) return;
    if (part.coef) {
      float x[kAhead * kPair];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float few[kPair];
        unpack_few<T>(fetched[i].x, few);
#pragma unroll
        for (int j = 0; j < kPair; ++j) x[i * kPair + j] = voxel[i] < 0 ? 0.0f : few[j];
      }
      Coefficients<kPair> coef;
      load_coefficients(coefs, plan.bn, coef);
      affine_backward(coef, x, part.act, dv, state);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (voxel[i] < 0) continue;
      float few[kPair] = {};
      if (part.add) unpack_few<T>(fetched[i].before, few);
#pragma unroll
      for (int j = 0; j < kPair; ++j) few[j] += dv[i * kPair + j];
      const int64_t at = number_of(plan, chunk.n, voxel[i]) * part.channels + channel;
      store_few(static_cast<T*>(part.dx) + at, valid, p.aligned[second], few);
    }
  }

  FF_DEVICE static void finish(const Params& p, const ConvPlan& plan, const Chunk& chunk, State& state) {
    if (!p.part[0].coef && !p.part[1].coef) return;
    const int columns = plan.bn / kPair;
    merge_rows<kConvThreads>(state, shared_memory(), columns);
    if (thread_index() < columns && chunk.valid > 0) write_partials(p, plan, chunk, state);
    state.clear();  // frees its registers
    conclude(p, plan);
  }

  // Merges the gradients at the coefficients of a sample in the last block that has a part in them.
  FF_APART static void conclude(const Params& p, const ConvPlan& plan) {
    const Grid block = block_index();
    const int block_n = block.y % plan.blocks_n, slots = plan.classes * plan.groups;
    if (!last_block(p.counters + block.z * plan.blocks_n + block_n, slots)) return;
    const CoefficientsMerge sums{p.partials, plan.n, slots, plan.co};
    for (int i = 0; i < plan.bn; i += kMergeColumns) {
      const int from = static_cast<int>(merge_channel(block_n * plan.bn + i));
      const bool second = from >= p.part[0].channels;
      const Output& part = p.part[second];
      const int channel = from - (second ? p.part[0].channels : 0);
      sums.run(block.z, from, {part.coef, part.dcoef, part.channels}, channel, from < plan.co && part.coef);
    }
  }

  FF_DEVICE static void write_partials(const Params& p, const ConvPlan& plan, const Chunk& chunk, const State& state) {
    const Grid block = block_index();
    const int64_t slot = (chunk.n * plan.classes + block.y / plan.blocks_n) * plan.groups + block.x;
    float* partial = p.partials + slot * kCoefSums * plan.co + chunk.channel;
#pragma unroll
    for (int r = 0; r < kCoefSums; ++r)
#pragma unroll
      for (int i = 0; i < kPair; ++i)
        if (i < chunk.valid) partial[static_cast<int64_t>(r) * plan.co + i] = state.row[r][i];
  }
};

// The epilogue's parameters; a source whose gradient is not wanted needs no coefficients.
template <class T>
typename BackwardEpilogue<T>::Params backward_epilogue(const Output (&outputs)[2], float* partials,
                                                       unsigned* counters) {
  typename BackwardEpilogue<T>::Params epilogue{{outputs[0], outputs[1]}, {}, partials, counters};
  for (int i = 0; i < 2; ++i) {
    Output& part = epilogue.part[i];
    if (!part.dx) part.coef = nullptr;
    if (!part.coef) part.act = kNone;
    if (!part.dx) part.add = false;
    epilogue.aligned[i] = on_chunks<T>(part.dx, part.channels) && (!part.coef || on_chunks<T>(part.x, part.channels));
  }
  return epilogue;
}

}  // namespace fastfilm::cuda
