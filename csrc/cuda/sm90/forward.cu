// The forward pass of a convolution by warpgroup products: its epilogue, and the function that launches it.
#include "../forward.h"

#include "calls.h"
#include "convolve.h"

namespace fastfilm::cuda::sm90 {
namespace {

// Adds the bias, sums the moments, and writes the raw output or, with `out_coef`, the finished one.
template <class T>
struct ForwardEpilogue {
  using Params = ForwardTargets<T>;

  int64_t n;
  int block_n;
  Moments<1> state[2];  // of the thread's rows; complete in the first of the four lanes that have a row

  FF_DEVICE static void load_constants(const Params& p, const Layout& layout, int64_t n, int first, int at) {
    load_forward_rows<kConsumers>(p, layout, n, first, at);
  }

  FF_DEVICE ForwardEpilogue(const Params&, const Layout&, int64_t n, int block_n) : n(n), block_n(block_n) {
    state[0].clear();
    state[1].clear();
  }

  FF_DEVICE void begin(const Params&, const Layout&, const Result&, const Extent&) {}

  FF_DEVICE void write(const Params& p, const Layout& layout, const Result& result, const Extent& first,
                       Accumulators& sums) {
    const int staging = layout.staging_at + thread_index() / 32 * layout.staging_bytes;
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      const Group group(layout, result, first, g);
      const int constants = layout.outputs_at;
      const auto constant = [&](int row, int r) {
        float v[1];
        load_row(constants + (row * layout.bn + product_row(r) % layout.bn) * 4, v);
        return v[0];
      };
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float bias = constant(kBiasRow, r);
#pragma unroll
        for (int line = 0; line < kGroupLines; ++line)
#pragma unroll
          for (int b = 0; b < 2; ++b) sums[0][4 * line + 2 * r + b] += bias;
      }
      if (!p.out_coef) put(p, layout, group, {staging}, sums, p.y);
      else if (p.raw) put(p, layout, group, {staging}, sums, p.raw);
      if (p.out_coef || p.pre) {
        // act(v + shift) is an affine without its other parts
        float v[16], slope[16], g_[2], q[2], s[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool whole = p.out_coef;
          const float a = whole ? constant(kA, r) : 1.0f, pivot = whole ? constant(kP, r) : 0.0f;
          const float shift = constant(whole ? static_cast<int>(kB) : kShiftRow, r);
          const float of_act = constant(whole ? static_cast<int>(kSlope) : kActSlopeRow, r);
          g_[r] = whole ? constant(kG, r) : 1.0f;
          q[r] = whole ? constant(kQ, r) : 0.0f;
          s[r] = whole ? constant(kS, r) : 0.0f;
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            if (i / 2 % 2 != r) continue;
            v[i] = a * (sums[0][i] - pivot) + shift;
            slope[i] = of_act;
          }
        }
        activate(v, slope, p.out_coef ? p.out_act : p.pre_act);
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[0][i] = g_[i / 2 % 2] * (v[i] - q[i / 2 % 2]) + s[i / 2 % 2];
        if (p.out_coef) put(p, layout, group, {staging}, sums, p.y);
      }
      if (p.partials) add_moments(layout, group, sums);
      next_group(sums);
    }
  }

  // Writes a group to a map.
  FF_DEVICE void put(const Params& p, const Layout& layout, const Group& group, const Staging& staging,
                     const Accumulators& sums, T* to) const {
    staging.store<T>(sums);
    warp_barrier();
    const Piece piece(layout, block_n);
    const int valid = layout.co - piece.channel;
    T* sample = to + (n * layout.out.volume() * layout.co + piece.channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int voxel = piece.voxel + 16 * i, number = group.number(piece.shift, voxel / 8, voxel % 8);
      if (number < 0 || valid <= 0) continue;
      const Word16 word = load_shared16(staging.place(voxel, piece.chunk));
      T* at = sample + static_cast<int64_t>(number) * layout.co;
      if (p.aligned) {
        store16(at, word);
      } else {
        float v[8];
        unpack16<T>(word, v);
        store_chunk(at, valid < 8 ? valid : 8, false, v);
      }
    }
    warp_barrier();
  }

  // Adds a group's values: their mean, then their deviations from it, then both to the state.
  FF_DEVICE void add_moments(const Layout& layout, const Group& group, const Accumulators& sums) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int lines = group.lines(product_row(r) / layout.bn), columns = group.result.size.w - group.origin.w;
      Moments<1> found;
      found.clear();
#pragma unroll
      for (int line = 0; line < kGroupLines; ++line)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const bool present = line < lines && product_voxel(b) < columns;
          found.count += present ? 1.0f : 0.0f;
          found.mean[0] += present ? sums[0][4 * line + 2 * r + b] : 0.0f;
        }
      found.mean[0] /= found.count > 0 ? found.count : 1.0f;
#pragma unroll
      for (int line = 0; line < kGroupLines; ++line)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const bool present = line < lines && product_voxel(b) < columns;
          const float d = present ? sums[0][4 * line + 2 * r + b] - found.mean[0] : 0.0f;
          found.m2[0] += d * d;
        }
      state[r].merge(found);
    }
  }

  FF_DEVICE void finish(const Params& p, const Layout& layout, const Result&, int consumer) {
    if (!p.partials) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        Moments<1> other;
        other.count = shuffle_xor(state[r].count, mask);
        other.mean[0] = shuffle_xor(state[r].mean[0], mask);
        other.m2[0] = shuffle_xor(state[r].m2[0], mask);
        state[r].merge(other);
      }
      const int row = product_row(r), channel = block_n * layout.bn + row % layout.bn;
      const int slot = (block_index().x * 2 + consumer) * layout.shifts + row / layout.bn;
      if (thread_index() % 4 || channel >= layout.co) continue;
      const int64_t at = n * layout.partial_slots() + slot;
      float* partial = p.partials + at * 2 * layout.co + channel;
      partial[0] = state[r].mean[0];
      partial[layout.co] = state[r].m2[0];
      if (row % layout.bn == 0) counts_of(p, layout, block_n)[at] = state[r].count;
    }
    conclude_forward(p, layout);
  }
};

template <class T>
std::string forward_of(const Layout& layout, const Forward& c, void* workspace, Stream stream, int storage) {
  ForwardTargets<T> targets;
  const std::string failure = begin_forward(layout, c, workspace, stream, storage, targets);
  if (!failure.empty()) return failure;
  const Sources in = sources_of<T>(c.inputs);
  return launch_conv<T, ActivatedPlanes, ForwardEpilogue>("sm90_fprop", layout, in, workspace, targets, stream);
}

}  // namespace

int64_t forward_workspace(const Layout& layout, int storage) { return forward_bytes(layout, storage); }

std::string forward(const Layout& layout, int storage, const Forward& call, void* workspace, Stream stream) {
  return storage == kBFloat16 ? forward_of<BFloat16>(layout, call, workspace, stream, storage)
                              : forward_of<Float16>(layout, call, workspace, stream, storage);
}

}  // namespace fastfilm::cuda::sm90
