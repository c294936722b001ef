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

// Applies the chain rule through the pending affine of each source. x of a half comes to the staging long before the
// products are written; the gradient takes its place there, and x of the other half the gradient's, group after group.
template <class T>
struct BackwardEpilogue {
  using Params = BackwardTargets<T>;
  static constexpr int kValues = 8;  // of a thread in two lines: voxel after voxel, both rows of each

  int64_t n;
  int block_n;
  // Of the thread's rows; complete once the four lanes that have a row add them. Those of PiecewiseLinear, where all
  // activations are.
  Sums<kCoefSums, 2> state;

  FF_DEVICE static void load_constants(const Params& p, const Layout& layout, int64_t n, int first, int at) {
    load_backward_rows<kConsumers>(p, layout, n, first, at);
  }

  FF_DEVICE BackwardEpilogue(const Params&, const Layout&, int64_t n, int block_n) : n(n), block_n(block_n) {
    state.clear();
  }

  // It has all lines of a half.
  FF_DEVICE static Staging staging(const Layout& layout) {
    return {static_cast<int>(layout.staging_at + thread_anew() / 32u * layout.staging_bytes)};
  }

  // The way through a source's maps of the 8 channels that a lane moves.
  struct Way {
    const T* x;
    uintptr_t dx;  // a number: from a pointer nvcc would make four stores of 4 bytes of one of 16
    int64_t channels, step;
    int place;  // in the staging
    bool plain, pending;  // plain: the channels are whole and lie on 16 bytes, and no former gradient is there

    FF_DEVICE Way(const Params& p, const Layout& layout, const Piece& piece, const Half& half, int64_t n) {
      int channel = piece.channel;
      const int source = p.source_of(channel);
      const Output& part = p.part[source];
      const int64_t at = (n * layout.out.volume() + piece.number(half)) * part.channels + channel;
      x = static_cast<const T*>(part.x) + at;
      dx = reinterpret_cast<uintptr_t>(part.dx) + at * sizeof(T);
      channels = part.channels;
      step = channels * piece.step();
      place = staging(layout).place(piece.voxel, piece.chunk);
      plain = p.plain[source] && channel < part.channels;
      pending = plain && part.coef;
    }
    // Starts to copy x of voxel i.
    FF_DEVICE void bring(int i, int lines) {
      copy_async16(place + i * Staging::kStep, x, 2 * i < lines ? 16 : 0);
      x += step;
    }
    FF_DEVICE T* gradient() const { return reinterpret_cast<T*>(dx); }
    // Writes the gradient at voxel i.
    FF_DEVICE void put(int i, int lines) {
      if (2 * i < lines) store16(gradient(), load_shared16(place + i * Staging::kStep));
      dx += step * sizeof(T);
    }
  };

  static_assert(kAhead == kGroups, "a half's groups are in the stagings");
  FF_DEVICE void begin(const Params& p, const Layout& layout, const Result& result, const Extent& first) {
    const Half half(layout, result, first, 0);
    const Piece piece(layout, block_n);
    const int lines = piece.lines(half);
    Way way(p, layout, piece, half, n);
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroupVoxels; ++i) {
        if (way.pending) way.bring(g * kGroupVoxels + i, lines);
      }
      commit_copies();
    }
    if (!way.plain) bring(p, layout, half);
  }

  FF_DEVICE void write(const Params& p, const Layout& layout, const Result& result, const Extent& first,
                       Accumulators& sums) {
    const bool linear = pending(p) && is_linear(p);
#pragma unroll 1
    for (int h = 0; h < kHalves; ++h) {
      const Half half(layout, result, first, h), next(layout, result, first, 1);
      if (!half.full()) clear_absent(half, sums);
      if (pending(p) && !linear) apply(p, layout, sums);
      PiecewiseLinear channels[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float row[kCoefRows];
        const int act = coefficients(p, layout, r, row);
        channels[r].load(row, act);
      }
      const Piece piece(layout, block_n);
      Way way(p, layout, piece, half, n);
      way.x += way.channels * piece.to_next();
      const int row = staging(layout).row(), lines = way.plain ? piece.lines(half) : 0, next_lines = piece.lines(next);
      const bool brings = way.pending && h == 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        wait_copies<kAhead - 1>();
        warp_barrier();
        if (linear) {
#pragma unroll
          for (int line = g * kGroupLines; line < (g + 1) * kGroupLines; line += 2) {
            uint32_t x[4];
            load_matrix4_transposed(x, row + line * Staging::kLine);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int r = i / 2 % 2;
              float& v = sums[0][line * 4 + i];
              v = channels[r].add(to_float(T{static_cast<uint16_t>(x[i / 2] >> i % 2 * 16)}), v, r, state);
            }
          }
        }
        warp_barrier();
#pragma unroll
        for (int line = g * kGroupLines; line < (g + 1) * kGroupLines; line += 2) {
          stage<T>(sums, line, row + line * Staging::kLine);
        }
        warp_barrier();
#pragma unroll
        for (int i = g * kGroupVoxels; i < (g + 1) * kGroupVoxels; ++i) {
          way.put(i, lines);
          if (brings) way.bring(i, next_lines);
        }
        commit_copies();
      }
      if (!way.plain) put(p, layout, half);
      if (h == 0) {
        next_half(sums);
        if (!way.plain) bring(p, layout, next);
      }
    }
  }

  // Starts to copy x of a half where the voxels of a lane are not plain.
  FF_DEVICE void bring(const Params& p, const Layout& layout, const Half& half) const {
    const Piece piece(layout, block_n);
    int channel = piece.channel;
    const int source = p.source_of(channel), valid = p.part[source].channels - channel;
    const Output& part = p.part[source];
    if (!part.coef || valid <= 0) return;
    const int lines = piece.lines(half);
    Way way(p, layout, piece, half, n);
#pragma unroll 1
    for (int i = 0; i < kVoxels; ++i, way.x += way.step) {
      const int to = way.place + i * Staging::kStep;
      if (p.aligned[source]) copy_async16(to, way.x, 2 * i < lines ? 16 : 0);
      else store_shared16(to, 2 * i < lines ? load_chunk(way.x, valid < 8 ? valid : 8, false) : Word16{});
      commit_copies();  // in time for the voxel's group, which leaves the last kAhead - 1 out
    }
  }

  // Writes the gradient at a half from the staging where the voxels of a lane are not plain.
  FF_DEVICE void put(const Params& p, const Layout& layout, const Half& half) const {
    const Piece piece(layout, block_n);
    int channel = piece.channel;
    const int source = p.source_of(channel), valid = p.part[source].channels - channel;
    const Output& part = p.part[source];
    if (!part.dx || valid <= 0) return;
    const int lines = piece.lines(half);
    Way way(p, layout, piece, half, n);
#pragma unroll 1
    for (int i = 0; i < kVoxels && 2 * i < lines; ++i, way.dx += way.step * sizeof(T)) {
      float v[8], old[8];
      unpack16<T>(load_shared16(way.place + i * Staging::kStep), v);
      if (part.add) {
        unpack16<T>(load_chunk(way.gradient(), valid < 8 ? valid : 8, p.aligned[source]), old);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += old[j];
      }
      store_chunk(way.gradient(), valid < 8 ? valid : 8, p.aligned[source], v);
    }
  }

  FF_DEVICE static bool pending(const Params& p) { return p.part[0].coef || p.part[1].coef; }
  FF_DEVICE static bool is_linear(const Params& p) {
    return PiecewiseLinear::is(p.part[0].act) && PiecewiseLinear::is(p.part[1].act);
  }

  // The coefficients of the thread's row r; returns its activation.
  FF_DEVICE int coefficients(const Params& p, const Layout& layout, int r, float (&row)[kCoefRows]) const {
    const int number = product_row(r) & (layout.bn - 1);
    int channel = block_n * layout.bn + number;
    const float* from = reinterpret_cast<const float*>(shared_memory() + layout.outputs_at) + number;
#pragma unroll
    for (int i = 0; i < kCoefRows; ++i) row[i] = from[i * layout.bn];
    return p.part[p.source_of(channel)].act;
  }

  // Voxels that are not in the map add nothing to the sums.
  FF_DEVICE static void clear_absent(const Half& half, Accumulators& sums) {
    const int lines = half.lines(product_row(0) >> (6 - half.p.shifts_log2));  // of both rows
    const int columns = half.columns() - product_voxel(0);  // from this thread's first one on
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[0][i] = i / 4 < lines && i % 2 < columns ? sums[0][i] : 0.0f;
  }

  // Applies the chain rule for any activation to a half. The groups take turns in the place of the first one.
  FF_DEVICE void apply(const Params& p, const Layout& layout, Accumulators& sums) {
    const int row = product_row(0) & (layout.bn - 1);
    int acts = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int channel = block_n * layout.bn + row + 8 * r;
      acts |= p.part[p.source_of(channel)].act << 8 * r;
    }
    const CoefficientsAt coef{layout.outputs_at + row * 4, layout.bn};
    wait_copies<0>();
    warp_barrier();
    int row_at = staging(layout).row();
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g, row_at += kGroupLines * Staging::kLine) {
#pragma unroll
      for (int line = 0; line < kGroupLines; line += 2) {
        uint32_t x[4];
        load_matrix4_transposed(x, row_at + line * Staging::kLine);
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
          const auto products = [&](float (&v)[kValues]) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) v[i] = turns == 1 || i % 2 == turn ? number(i) : 0.0f;
          };
          float v[kValues];
          affine_backward<2>(coef, inputs, turn == 0 ? acts & 0xff : acts >> 8, products, v, state);
#pragma unroll
          for (int i = 0; i < kValues; ++i) number(i) = turns == 1 || i % 2 == turn ? v[i] : number(i);
        }
      }
      next_group(sums);
    }
  }

  // Moves the numbers of the next four lines to the place of the first four, and these behind the others.
  FF_DEVICE static void next_group(Accumulators& sums) {
    constexpr int kOf = 4 * kGroupLines;
#pragma unroll
    for (int i = 0; i < kOf; ++i) {
      const float first = sums[0][i];
#pragma unroll
      for (int g = 0; g + 1 < kGroups; ++g) sums[0][g * kOf + i] = sums[0][(g + 1) * kOf + i];
      sums[0][64 - kOf + i] = first;
    }
  }

  FF_DEVICE void finish(const Params& p, const Layout& layout, const Result& result, int consumer) {
    wait_copies<0>();
    if (!pending(p)) return;
    if (is_linear(p)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float row[kCoefRows];
        const int act = coefficients(p, layout, r, row);
        PiecewiseLinear channel;
        channel.load(row, act);
        channel.conclude(row, act, r, state);
      }
    }
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
