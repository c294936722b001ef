// The gradient at a convolution's input by warpgroup products: its epilogue, and the function that launches it.
#include "../backward.h"

#include "calls.h"
#include "convolve.h"

namespace fastfilm::cuda::sm90 {
namespace {

// The coefficients of one channel in shared memory, rows [bn], as affine_backward takes them.
struct CoefficientsAt {
  int at, bn;
  FF_DEVICE void get(CoefRow r, float (&v)[1]) const { load_row(at + r * bn * 4, v); }
};

// Applies the chain rule through the pending affine of each source. x of a group comes to one of kAhead stagings, long
// before its products are written; the gradient takes its place there.
template <class T>
struct BackwardEpilogue {
  using Params = BackwardTargets<T>;

  int64_t n;
  int block_n;
  Sums<kCoefSums, 1> state[2];  // of the thread's rows; complete once the four lanes that have a row add them

  FF_DEVICE static void load_constants(const Params& p, const Layout& layout, int64_t n, int first, int at) {
    load_backward_rows<kConsumers>(p, layout, n, first, at);
  }

  FF_DEVICE BackwardEpilogue(const Params&, const Layout&, int64_t n, int block_n) : n(n), block_n(block_n) {
    state[0].clear();
    state[1].clear();
  }

  FF_DEVICE static Staging staging(const Layout& layout, int group) {
    return {layout.staging_at + thread_index() / 32 * layout.staging_bytes + group % kAhead * kStagingBytes};
  }

  // Starts to copy x of a group, where something is pending on it.
  FF_DEVICE void bring(const Params& p, const Layout& layout, const Result& result, const Extent& first, int g) const {
    const Group group(layout, result, first, g);
    const Piece piece(layout, block_n);
    int channel = piece.channel;
    const int source = p.source_of(channel), valid = p.part[source].channels - channel;
    const Output& part = p.part[source];
    if (part.coef && valid > 0) {
      const T* base = static_cast<const T*>(part.x);
      const T* sample = base + (n * layout.out.volume() * part.channels + channel);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int voxel = piece.voxel + 16 * i, number = group.number(piece.shift, voxel / 8, voxel % 8);
        const int to = staging(layout, g).place(voxel, piece.chunk);
        const T* from = number < 0 ? base : sample + static_cast<int64_t>(number) * part.channels;
        if (p.aligned[source]) {
          copy_async16(to, from, number < 0 ? 0 : 16);
        } else {
          store_shared16(to, number < 0 ? Word16{} : load_chunk(from, valid < 8 ? valid : 8, false));
        }
      }
    }
    commit_copies();
  }

  FF_DEVICE void begin(const Params& p, const Layout& layout, const Result& result, const Extent& first) {
#pragma unroll 1
    for (int g = 0; g < kAhead; ++g) bring(p, layout, result, first, g);
  }

  FF_DEVICE void write(const Params& p, const Layout& layout, const Result& result, const Extent& first,
                       Accumulators& sums) {
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      const Group group(layout, result, first, g);
      const Staging at = staging(layout, g);
      wait_copies<kAhead - 1>();
      warp_barrier();
      uint32_t x[kGroupLines / 2][4];
#pragma unroll
      for (int i = 0; i < kGroupLines / 2; ++i) load_matrix4_transposed(x[i], at.row(2 * i));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = product_row(r), columns = result.size.w - group.origin.w;
        int channel = block_n * layout.bn + row % layout.bn;
        const Output& part = p.part[p.source_of(channel)];
        const int lines = channel < part.channels ? group.lines(row / layout.bn) : 0;
        float v[2 * kGroupLines];
#pragma unroll
        for (int i = 0; i < 2 * kGroupLines; ++i) {
          const bool present = i / 2 < lines && product_voxel(i % 2) < columns;
          v[i] = present ? sums[0][i / 2 * 4 + 2 * r + i % 2] : 0.0f;
        }
        if (part.coef) {
          float y[2 * kGroupLines], dv[2 * kGroupLines];
#pragma unroll
          for (int i = 0; i < 2 * kGroupLines; ++i) {
            dv[i] = v[i];
            const uint32_t pair = x[i / 4][i / 2 % 2 * 2 + r];
            // what lies in the place of a voxel or channel that does not exist may be anything
            const bool present = i / 2 < lines && product_voxel(i % 2) < columns;
            y[i] = present ? to_float(T{static_cast<uint16_t>(pair >> i % 2 * 16)}) : 0.0f;
          }
          const auto given = [](const float (&from)[2 * kGroupLines]) {
            return [&from](float (&to)[2 * kGroupLines]) {
#pragma unroll
              for (int i = 0; i < 2 * kGroupLines; ++i) to[i] = from[i];
            };
          };
          const CoefficientsAt coef{layout.outputs_at + row % layout.bn * 4, layout.bn};
          affine_backward<1>(coef, given(y), part.act, given(dv), v, state[r]);
        }
#pragma unroll
        for (int i = 0; i < 2 * kGroupLines; ++i) sums[0][i / 2 * 4 + 2 * r + i % 2] = v[i];
      }
      warp_barrier();
      at.store<T>(sums);
      warp_barrier();
      put(p, layout, group, at);
      warp_barrier();
      if (g + kAhead < kGroups) bring(p, layout, result, first, g + kAhead);
      else commit_copies();
      next_group(sums);
    }
  }

  // Writes a group from its staging to the gradients of the sources.
  FF_DEVICE void put(const Params& p, const Layout& layout, const Group& group, const Staging& staging) const {
    const Piece piece(layout, block_n);
    int channel = piece.channel;
    const int source = p.source_of(channel), valid = p.part[source].channels - channel;
    const Output& part = p.part[source];
    if (!part.dx || valid <= 0) return;
    T* sample = static_cast<T*>(part.dx) + (n * layout.out.volume() * part.channels + channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int voxel = piece.voxel + 16 * i, number = group.number(piece.shift, voxel / 8, voxel % 8);
      if (number < 0) continue;
      Word16 word = load_shared16(staging.place(voxel, piece.chunk));
      T* at = sample + static_cast<int64_t>(number) * part.channels;
      if (part.add || !p.aligned[source]) {
        float v[8], old[8];
        unpack16<T>(word, v);
        if (part.add) {
          unpack16<T>(load_chunk(at, valid < 8 ? valid : 8, p.aligned[source]), old);
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] += old[j];
        }
        store_chunk(at, valid < 8 ? valid : 8, p.aligned[source], v);
      } else {
        store16(at, word);
      }
    }
  }

  FF_DEVICE void finish(const Params& p, const Layout& layout, const Result& result, int consumer) {
    wait_copies<0>();
    if (!p.part[0].coef && !p.part[1].coef) return;
    const int which = static_cast<int>(&result - layout.result);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = product_row(r), channel = block_n * layout.bn + row % layout.bn;
      const int64_t group = which * layout.groups + block_index().x;
      const int64_t slot = n * layout.partial_slots() + (group * 2 + consumer) * layout.shifts + row / layout.bn;
      float* partial = p.partials + slot * kCoefSums * layout.co + channel;
#pragma unroll
      for (int i = 0; i < kCoefSums; ++i) {
        float sum = state[r].row[i][0];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (thread_index() % 4 == 0 && channel < layout.co) partial[static_cast<int64_t>(i) * layout.co] = sum;
      }
    }
    conclude_backward(p, layout);
  }
};

template <class T>
std::string backward_of(const Layout& layout, const Backward& c, const WeightSums& left, void* workspace, Stream stream,
                        int storage) {
  BackwardTargets<T> targets;
  const std::string failure = begin_backward(layout, c, left, workspace, stream, storage, targets);
  if (!failure.empty()) return failure;
  const Gradients gradient = gradients_of<T>(c.gradient, layout.ci, layout.in);
  return launch_conv<T, GradientPlanes, BackwardEpilogue>("sm90_dgrad", layout, gradient, workspace, targets, stream);
}

}  // namespace

int64_t backward_workspace(const Layout& layout, int storage) { return backward_bytes(layout, storage); }

std::string backward(const Layout& layout, int storage, const Backward& call, const WeightSums& left, void* workspace,
                     Stream stream) {
  return storage == kBFloat16 ? backward_of<BFloat16>(layout, call, left, workspace, stream, storage)
                              : backward_of<Float16>(layout, call, left, workspace, stream, storage);
}

}  // namespace fastfilm::cuda::sm90
