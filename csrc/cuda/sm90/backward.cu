// The gradient at a convolution's input by warpgroup products: its epilogue, and the function that launches it.
#include "../backward.h"

#include "calls.h"
#include "convolve.h"

namespace fastfilm::cuda::sm90 {
namespace {

// The coefficients of a thread's two channels in shared memory, rows [bn], as affine_backward takes them. The second one is 8
// channels behind the first one.
struct CoefficientsAt {
  int at, bn;
  FF_DEVICE void get(CoefRow row, float (&v)[2]) const {
    const float* from = reinterpret_cast<const float*>(shared_memory() + at) + row * bn;
    v[0] = from[0];
    v[1] = from[8];
  }
};

// Applies the chain rule through the pending affine of each source. x of a group comes to one of kAhead stagings, long
// before its products are written; the gradient takes its place there.
template <class T>
struct BackwardEpilogue {
  using Params = BackwardTargets<T>;
  static constexpr int kValues = 8;  // of a thread in two lines: voxel after voxel, both rows of each

  int64_t n;
  int block_n;
  Sums<kCoefSums, 2> state;     // of the thread's rows; complete once the four lanes that have a row add them

  FF_DEVICE static void load_constants(const Params& p, const Layout& layout, int64_t n, int first, int at) {
    load_backward_rows<kConsumers>(p, layout, n, first, at);
  }

  FF_DEVICE BackwardEpilogue(const Params&, const Layout&, int64_t n, int block_n) : n(n), block_n(block_n) {
    state.clear();
  }

  // The groups of both halves take turns in the stagings.
  FF_DEVICE static Staging staging(const Layout& layout, int group) {
    return {layout.staging_at + thread_anew() / 32 * layout.staging_bytes + group % kAhead * kStagingBytes};
  }

  // Starts to copy x of a group, where something is pending on it.
  FF_DEVICE void bring(const Params& p, const Layout& layout, const Half& half, int group) const {
    const Piece piece(half, block_n);
    int channel = piece.channel;
    const int source = p.source_of(channel), valid = p.part[source].channels - channel;
    const Output& part = p.part[source];
    if (part.coef && valid > 0) {
      const T* base = static_cast<const T*>(part.x);
      const T* sample = base + (n * layout.out.volume() * part.channels + channel);
      const Staging to = staging(layout, group);
      piece.each(group, [&](int voxel, int number) {
        const T* from = sample + static_cast<int64_t>(number) * part.channels;
        if (p.aligned[source]) copy_async16(to.place(voxel, piece.chunk), from, 16);
        else store_shared16(to.place(voxel, piece.chunk), load_chunk(from, valid < 8 ? valid : 8, false));
      }, [&](int voxel) { store_shared16(to.place(voxel, piece.chunk), Word16{}); });
    }
    commit_copies();
  }

  static_assert(kAhead == kGroups, "a half's groups are in the stagings");
  FF_DEVICE void begin(const Params& p, const Layout& layout, const Result& result, const Extent& first) {
    const Half half(layout, result, first, 0);
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) bring(p, layout, half, g);
  }

  FF_DEVICE void write(const Params& p, const Layout& layout, const Result& result, const Extent& first,
                       Accumulators& sums) {
    // the activations of the thread's rows, mostly the same
    const int row = product_row(0) & (layout.bn - 1);
    int acts = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int channel = block_n * layout.bn + row + 8 * r;
      acts |= p.part[p.source_of(channel)].act << 8 * r;
    }
    const CoefficientsAt coef{layout.outputs_at + row * 4, layout.bn};
#pragma unroll 1
    for (int h = 0; h < kHalves; ++h) {
      const Half half(layout, result, first, h);
      int lines = half.lines(product_row(0) >> (6 - layout.shifts_log2));  // of both rows
      const int columns = half.columns() - product_voxel(0);  // from this thread's first one on
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        const Staging at = staging(layout, g);
        wait_copies<kAhead - 1>();
        warp_barrier();
        if (p.part[0].coef || p.part[1].coef) {
#pragma unroll
          for (int line = 0; line < kGroupLines; line += 2) {
            uint32_t x[4];
            load_matrix4_transposed(x, at.row(line));
            // number i: of row i % 2, voxel i / 2 % 2 of line i / 4
            const auto number = [&](int i) -> float& { return sums[0][(line + i / 4) * 4 + i % 2 * 2 + i / 2 % 2]; };
            const auto inputs = [&](float (&y)[kValues]) {
#pragma unroll
              for (int i = 0; i < kValues; ++i) {
                y[i] = to_float(T{static_cast<uint16_t>(unknown(x[i / 4 * 2 + i % 2]) >> i / 2 % 2 * 16)});
              }
            };
            // where the rows belong to sources with different activations, one after the other
            const int turns = (acts & 0xff) == acts >> 8 ? 1 : 2;
#pragma unroll 1
            for (int turn = 0; turn < turns; ++turn) {
              // a voxel that is not in the map adds nothing to the sums
              const auto products = [&](float (&v)[kValues]) {
#pragma unroll
                for (int i = 0; i < kValues; ++i) {
                  const bool present = line + i / 4 < lines && i / 2 % 2 < columns;
                  v[i] = present && (turns == 1 || i % 2 == turn) ? number(i) : 0.0f;
                }
              };
              float v[kValues];
              affine_backward<2>(coef, inputs, turn == 0 ? acts & 0xff : acts >> 8, products, v, state);
#pragma unroll
              for (int i = 0; i < kValues; ++i) number(i) = turns == 1 || i % 2 == turn ? v[i] : number(i);
            }
          }
        }
        warp_barrier();
        at.store<T>(sums, 0);
        warp_barrier();
        put(p, layout, half, g);
        if (h == 0) bring(p, layout, Half(layout, result, first, 1), g);
        else commit_copies();
        next_group(sums);
        lines -= kGroupLines;
      }
      if (h == 0) next_half(sums);
    }
  }

  // Puts the numbers of the next four lines in the place of the first four.
  FF_DEVICE static void next_group(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < 64 - 4 * kGroupLines; ++i) sums[0][i] = sums[0][i + 4 * kGroupLines];
  }

  // Writes a group from its staging to the gradients of the sources.
  FF_DEVICE void put(const Params& p, const Layout& layout, const Half& half, int group) const {
    const Piece piece(half, block_n);
    int channel = piece.channel;
    const int source = p.source_of(channel), valid = p.part[source].channels - channel;
    const Output& part = p.part[source];
    if (!part.dx || valid <= 0) return;
    T* sample = static_cast<T*>(part.dx) + (n * layout.out.volume() * part.channels + channel);
    const Staging from = staging(layout, group);
    piece.each(group, [&](int voxel, int number) {
      const Word16 word = load_shared16(from.place(voxel, piece.chunk));
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
    }, [](int) {});
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
        float sum = state.row[i][r];
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
