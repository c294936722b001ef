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
#pragma unroll 1
    for (int h = 0; h < kHalves; ++h) {
      const Half half(layout, result, first, h);
      const auto constant = [&](int row, int r) {
        float v[1];
        load_row(layout.outputs_at + (row * layout.bn + (product_row(r) & (layout.bn - 1))) * 4, v);
        return v[0];
      };
      const float bias[2] = {constant(kBiasRow, 0), constant(kBiasRow, 1)};
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[0][i] += bias[i / 2 % 2];
      if (!p.out_coef) put(p, layout, half, sums, p.y);
      else if (p.raw) put(p, layout, half, sums, p.raw);
      if (p.out_coef || p.pre) {
        // act(v + shift) is an affine without its other parts
        const bool whole = p.out_coef;
        float a[2], pivot[2], shift[2], slope[64];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          a[r] = whole ? constant(kA, r) : 1.0f;
          pivot[r] = whole ? constant(kP, r) : 0.0f;
          shift[r] = constant(whole ? static_cast<int>(kB) : kShiftRow, r);
          const float of_act = constant(whole ? static_cast<int>(kSlope) : kActSlopeRow, r);
#pragma unroll
          for (int i = 0; i < 64; ++i) slope[i] = i / 2 % 2 == r ? of_act : slope[i];
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = a[i / 2 % 2] * (sums[0][i] - pivot[i / 2 % 2]) + shift[i / 2 % 2];
        activate(sums[0], slope, whole ? p.out_act : p.pre_act);
        if (whole) {
          const float g[2] = {constant(kG, 0), constant(kG, 1)}, q[2] = {constant(kQ, 0), constant(kQ, 1)};
          const float s[2] = {constant(kS, 0), constant(kS, 1)};
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[0][i] = g[i / 2 % 2] * (sums[0][i] - q[i / 2 % 2]) + s[i / 2 % 2];
          put(p, layout, half, sums, p.y);
        }
      }
      if (p.partials) {
        if (half.full()) add_moments<true>(half, sums);
        else add_moments<false>(half, sums);
      }
      if (h == 0) next_half(sums);
    }
  }

  // Writes a half to a map.
  FF_DEVICE void put(const Params& p, const Layout& layout, const Half& half, const Accumulators& sums, T* to) const {
    const Staging staging{static_cast<int>(layout.staging_at + thread_anew() / 32u * layout.staging_bytes)};
    const Piece piece(layout, block_n);
    const int row = staging.row(), place = staging.place(piece.voxel, piece.chunk);
    const int valid = layout.co - piece.channel, lines = valid > 0 ? piece.lines(half) : 0;
    const int number = piece.number(half), step = piece.step();
    T* sample = to + (n * layout.out.volume() * layout.co + piece.channel);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int line = 0; line < kGroupLines; line += 2) {
        stage<T>(sums, group * kGroupLines + line, row + line * Staging::kLine);
      }
      warp_barrier();
#pragma unroll
      for (int i = 0; i < kGroupVoxels; ++i) {
        const int voxel = group * kGroupVoxels + i;
        if (2 * voxel >= lines) continue;
        const Word16 word = load_shared16(place + i * Staging::kStep);
        T* at = sample + static_cast<int64_t>(number + voxel * step) * layout.co;
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
  }

  // Adds a half's values: their mean, then their deviations from it, then both to the state. kFull: all are in the map.
  template <bool kFull>
  FF_DEVICE void add_moments(const Half& half, const Accumulators& sums) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int lines = kFull ? kLines : half.lines(product_row(r) >> (6 - half.p.shifts_log2));
      const auto present = [&](int line, int b) {
        return kFull || (line < lines && product_voxel(b) < half.columns());
      };
      const auto value = [&](int line, int b) { return sums[0][4 * line + 2 * r + b]; };
      Moments<1> found;
      found.clear();
      float total = 0;
#pragma unroll
      for (int line = 0; line < kLines; ++line)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          found.count += present(line, b) ? 1.0f : 0.0f;
          total += present(line, b) ? value(line, b) : 0.0f;
        }
      found.mean[0] = total / (found.count > 0 ? found.count : 1.0f);
#pragma unroll
      for (int line = 0; line < kLines; ++line)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const float d = present(line, b) ? value(line, b) - found.mean[0] : 0.0f;
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
using Activated = ActivatedPlanes<T>;

template <class T>
std::string forward_of(const Layout& layout, const Forward& c, void* workspace, Stream stream, int storage) {
  ForwardTargets<T> targets;
  const std::string failure = begin_forward(layout, c, workspace, stream, storage, targets);
  if (!failure.empty()) return failure;
  const Sources in = sources_of<T>(c.inputs);
  return launch_conv<T, Activated, ForwardEpilogue>("sm90_fprop", layout, in, workspace, targets, stream);
}

}  // namespace

int64_t forward_workspace(const Layout& layout, int storage) { return forward_bytes(layout, storage); }

std::string forward(const Layout& layout, int storage, const Forward& call, void* workspace, Stream stream) {
  return storage == kBFloat16 ? forward_of<BFloat16>(layout, call, workspace, stream, storage)
                              : forward_of<Float16>(layout, call, workspace, stream, storage);
}

}  // namespace fastfilm::cuda::sm90
