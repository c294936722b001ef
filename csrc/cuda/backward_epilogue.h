// The epilogue of the gradient at a convolution's input: the chain rule through the pending affine of each source.
#pragma once

#include "backward.h"
#include "convolve.h"
#include "operands.h"

namespace fastfilm::cuda {

// Writes the gradient at the raw map of each source, and sums the gradients at its coefficients.
template <class T>
struct BackwardEpilogue {
  using Params = BackwardTargets<T>;
  using State = Sums<kCoefSums, kPair>;
  struct Running : State {
    FF_DEVICE void merge_into(State& state) const { state.merge(*this); }
  };
  static constexpr int kFew = 2;
  // x of a voxel, where an affine is pending
  template <int kN>
  static constexpr int kBeside = kN * static_cast<int>(sizeof(T));

  // Place of this chunk's coefficients in shared memory, rows [bn], a multiple of 8; in its last bits the number of the
  // chunk's source, and twice the number of its channels that the chunk has: two registers fewer.
  int packed;
  T* to;  // where the gradient at the chunk of the sample's first voxel goes

  // The coefficients of a block's channels from `first` on.
  FF_DEVICE static void load_constants(const Params& p, const ConvPlan& plan, int64_t n, int first, int at) {
    load_backward_rows<kConvThreads>(p, plan, n, first, at);
  }

  // Starts to copy x of the warp's rows, the block's channels from `first` on, to places kPitch bytes apart. The voxel of a
  // row has a number, or -1.
  template <int kN, int kPitch>
  FF_DEVICE static void load(const Params& p, const ConvPlan& plan, int64_t n, int first, int at, const int* numbers) {
    if (!p.part[0].coef && !p.part[1].coef) return;
    constexpr int kV = kLanes<T>, kChunks = kN / kV;
    const int lane = thread_anew() % 32;
    int channel = first + lane % kChunks * kV;
    const int second = p.source_of(channel);
    const Output& part = p.part[second];
    const int left = part.channels - channel;
    if (!part.coef || left <= 0) return;
    const T* sample = static_cast<const T*>(part.x) + n * plan.out.volume() * part.channels + channel;
#pragma unroll 1
    for (int r = lane / kChunks; r < kHalf; r += 32 / kChunks) {
      const int number = numbers[r], to = at + r * kPitch + lane % kChunks * 16;
      const T* from = number < 0 ? static_cast<const T*>(part.x)
                                 : sample + static_cast<int64_t>(number) * part.channels;
      if (p.aligned[second]) {
        copy_async16(to, from, number < 0 ? 0 : 16);
      } else {
        store_shared16(to, number < 0 ? Word16{} : load_chunk(from, left < kV ? left : kV, false));
      }
    }
    commit_copies();
  }
  FF_DEVICE static void wait() { wait_copies<0>(); }

  FF_DEVICE BackwardEpilogue(const Params& p, const ConvPlan& plan, const Chunk& chunk, int at) {
    int channel = chunk.channel;
    const int source = p.source_of(channel);
    const Output& part = p.part[source];
    const int left = part.channels - channel;
    packed = at | source | 2 * (left < 0 ? 0 : left < chunk.valid ? left : chunk.valid);
    to = static_cast<T*>(part.dx) + (chunk.n * plan.out.volume() * part.channels + channel);
  }

  template <int kN>
  FF_DEVICE void write(const Params& p, const ConvPlan& plan, const int (&number)[kFew], const Chunk&, int row,
                       int beside, int pitch, Running& running) const {
    const int source = packed & 1, valid = packed >> 1 & 3;
    const Output& part = p.part[source];
    if (!part.dx) return;
    float dv[kFew * kPair];
    // the gradient of a voxel that does not exist adds nothing to the sums
    const auto products = [&](float (&v)[kFew* kPair]) {
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        load_anew(row + i * pitch, &v[i * kPair]);
#pragma unroll
        for (int j = 0; j < kPair; ++j) v[i * kPair + j] = number[i] < 0 ? 0.0f : v[i * kPair + j];
      }
    };
    if (part.coef) {
      const auto x = [&](float (&v)[kFew* kPair]) {
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          Few<T, kPair> few;
          load_anew(beside + i * pitch, few.w);
          unpack_few<T>(few, &v[i * kPair]);
        }
      };
      affine_backward<kPair>(SharedRows{packed & ~7, plan.bn}, x, part.act, products, dv, running);
    } else {
      products(dv);
    }
    if (part.add) {
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        if (number[i] < 0) continue;
        float few[kPair];
        const T* from = to + static_cast<int64_t>(number[i]) * part.channels;
        unpack_few<T>(load_few<T, kPair>(from, valid, p.aligned[source]), few);
#pragma unroll
        for (int j = 0; j < kPair; ++j) dv[i * kPair + j] += few[j];
      }
    }
    put_voxels<T, kPair>(to, part.channels, valid, p.aligned[source], number, dv);
  }

  FF_DEVICE static void finish(const Params& p, const ConvPlan& plan, const Chunk& chunk, State& state) {
    if (!p.part[0].coef && !p.part[1].coef) return;
    const int columns = plan.bn / kPair;
    merge_rows<kConvThreads>(state, shared_memory(), columns);
    if (thread_index() < columns && chunk.valid > 0) write_partials(p, plan, chunk, state);
    state.clear();  // frees its registers
    conclude_backward(p, plan);
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

}  // namespace fastfilm::cuda
