// The convolution kernel, for the forward pass and for the gradient at the input; plan.h has the layout and its words.
//
// A block of threads has one sample, one block of output channels and one class of output voxels, and walks over its
// tiles. For each tile it takes every block of input channels, and of that every depth of the taps. An iteration:
//   load      starts the asynchronous copies of the next iteration: its slab, and its weights unless all weights are in
//             shared memory from the start (`resident`)
//   wait      until this iteration's copies have arrived
//   affine    applies the pending affine, or the gradient of the moments, to the slab in place (`Operand::transform`)
//   MMA       multiplies the slab with the weights of one depth, all taps of its height and width
// After a tile's last iteration the epilogue writes its voxels to global memory. They pass through the slab that was
// multiplied last (staging), in two halves.
//
// The timeline of two tiles t0 and t1 with two blocks of channels a and b, one depth, and room for two slabs (`buffers`
// = 2). Time runs to the right, | is a barrier:
//
//   iteration        t0 a                   t0 b                               t1 a
//   threads   load a|load b wait affine|MMA|load a wait affine|MMA|epilogue t0|load b wait affine|MMA| ...
//   slab 0    [copy t0 a.......] affine MMA [copy t1 a...................................] affine MMA
//   slab 1           [copy t0 b.......................] affine MMA staging     [copy t1 b.................
//
// So a slab's copies run during the products of the slab before it and, for the first slab of a tile, during the
// epilogue of the tile before it. A slab with several depths is loaded and gets its affine at the first depth; the
// iterations of the other depths load weights only. With room for one slab (`buffers` = 1) an iteration loads its own
// slab, with a barrier behind the wait, and nothing overlaps within a block.
//
// Two kinds of maps are not copied asynchronously: a map with chunks that are not whole or do not lie on 16 bytes goes
// through ordinary loads and stores, and a view (a pooled or resized map) is gathered from global memory by the affine.
#pragma once

#include <type_traits>

#include "multiply.h"

namespace fastfilm::cuda {

// Channels of a voxel that one epilogue thread writes. Their constants and sums occupy registers, so they are few.
constexpr int kQuad = 4;

// The channels of sample n that one epilogue thread writes.
struct Chunk {
  int64_t n;
  int channel, valid;
};

// A voxel of the result: its coordinates in the map, and its number among all voxels of the batch.
struct Voxel {
  Extent at;
  int64_t number;
};

// The companion of a convolution that computes nothing else from its slabs.
template <class T, int kN, int kK>
struct NoCompanion {
  struct Params {};
  FF_DEVICE NoCompanion(const Params&, const ConvPlan&, int) {}
};

// The kernel. Its parts:
//   Operand    what a slab holds; see operands.h
//   Epilogue   `Params`; `State`, kept over the tiles of a block; a constructor, which loads the constants of a chunk;
//              `write`, which gets the products of one voxel; `finish`, which merges the states of a block's threads
//   Companion  a second result that is computed from the same slabs; see both_gradients.cu
template <class T, int kN, int kK, template <class, int> class OperandOf, template <class> class EpilogueOf,
          template <class, int, int> class CompanionOf = NoCompanion>
struct Convolve {
  using Operand = OperandOf<T, kK>;
  using Companion = CompanionOf<T, kN, kK>;
  static constexpr bool kAlone = std::is_same_v<Companion, NoCompanion<T, kN, kK>>;
  using Epilogue = EpilogueOf<T>;
  using State = typename Epilogue::State;
  struct Params {
    ConvPlan plan;
    typename Operand::Params in;
    const T* weights;
    typename Epilogue::Params epilogue;
    typename Companion::Params companion;
  };
  static constexpr int kThreads = kConvThreads, kMinBlocks = 1;

  struct Step {
    int tile, k, depth;

    FF_DEVICE void advance(int blocks_k, int depths) {
      if (++depth < depths) return;
      depth = 0;
      if (++k < blocks_k) return;
      k = 0;
      ++tile;
    }
  };

  static FF_DEVICE void run(const Params& p) {
    const ConvPlan& plan = p.plan;
    const Grid block = block_index();
    const int block_n = block.y % plan.blocks_n;
    const Taps& taps = plan.taps[block.y / plan.blocks_n];
    const int64_t n = block.z;
    const int tiles = plan.tiles.volume(), first = block.x * plan.tiles_a_group;
    const int last = first + plan.tiles_a_group < tiles ? first + plan.tiles_a_group : tiles;

    const Extent size = slab_size(plan.tile_log2, taps.count, plan.slab_step);
    const Slab<T, kK> slab(size, plan.in, plan.load_step);
    const int slabs = plan.slots * plan.weight_bytes, coefs = slabs + plan.buffers * plan.slab_bytes;
    const bool pending = Operand::pending(p.in);
    const int in_step = plan.slab_step * plan.load_step, depths = taps.count.d;

    const auto load_weights = [&](int k, int depth, int slot) {
      const int bytes = taps.count.h * taps.count.w * kN * kK * static_cast<int>(sizeof(T));
      const unsigned char* from = reinterpret_cast<const unsigned char*>(p.weights + taps.weights) +
                                  (static_cast<int64_t>(block_n * plan.blocks_k + k) * depths + depth) * bytes;
      for (int i = thread_index() * 16; i < bytes; i += kThreads * 16) {
        copy_async16(slot * plan.weight_bytes + i, from + i, 16);
      }
    };
    const auto origin = [&](int tile) -> Extent {
      const Extent at = tile_origin(plan.tiles, plan.tile_log2, tile);
      return {at.d * in_step + taps.base.d, at.h * in_step + taps.base.h, at.w * in_step + taps.base.w};
    };
    Companion companion(p.companion, plan, block_n);
    const auto load = [&](const Step& s, int buffer, int slot) {
      if (!plan.resident) load_weights(s.k, s.depth, slot);
      if (s.depth > 0) return;
      Operand::load(slab, p.in, n, origin(s.tile), s.k, slabs + buffer * plan.slab_bytes);
      if (pending) Operand::load_constants(p.in, n, plan.n, s.k, coefs + buffer * slab.kCoefBytes);
      if constexpr (!kAlone) companion.load(n, tile_origin(plan.tiles, plan.tile_log2, s.tile), buffer);
    };

    if (plan.resident) {
      for (int k = 0; k < plan.blocks_k; ++k)
        for (int depth = 0; depth < depths; ++depth) load_weights(k, depth, k * depths + depth);
    }
    const bool ahead = plan.buffers == 2;
    Step step{first, 0, 0};
    int buffer = 0, slot = 0;
    if (ahead && depths > 0) load(step, 0, 0);
    commit_copies();
    barrier();

    Multiplier<T, kN, kK> products(plan.tile_log2, size, plan.slab_step);
    State state;
    state.clear();
    for (int tile = first; tile < last; ++tile) {
      products.clear();
#pragma unroll 1
      for (int i = 0; i < plan.blocks_k * depths; ++i) {
        const Step now = step;
        step.advance(plan.blocks_k, depths);
        if (ahead) {
          if (step.tile < last) load(step, step.depth == 0 ? buffer ^ 1 : buffer, slot ^ 1);
          commit_copies();
          wait_copies<1>();
        } else {
          load(now, 0, slot);
          commit_copies();
          wait_copies<0>();
          barrier();
        }
        const int at = slabs + buffer * plan.slab_bytes;
        if constexpr (!kAlone) {
          companion.transform(n, tile_origin(plan.tiles, plan.tile_log2, now.tile), buffer, slab, p.in,
                              origin(now.tile), at, coefs + buffer * slab.kCoefBytes);
        } else if (pending && now.depth == 0) {
          Operand::transform(slab, p.in, n, origin(now.tile), now.k, at, coefs + buffer * slab.kCoefBytes);
        }
        barrier();
        if constexpr (!kAlone) companion.add(size, at, buffer);
        int weights = (plan.resident ? now.k * depths + now.depth : slot) * plan.weight_bytes;
#pragma unroll 1
        for (int y = 0; y < taps.count.h; ++y) {
#pragma unroll 1
          for (int x = 0; x < taps.count.w; ++x) {
            products.add(at, (now.depth * size.h + y) * size.w + x, weights);
            weights += kN * kK * static_cast<int>(sizeof(T));
          }
        }
        barrier();
        slot ^= 1;
        if (ahead && step.depth == 0 && i + 1 < plan.blocks_k * depths) buffer ^= 1;
      }
      write(p, taps, n, block_n, tile, products, slabs + buffer * plan.slab_bytes, state);
      if (ahead && depths > 0) buffer ^= 1;
    }
    wait_copies<0>();
    if constexpr (!kAlone) companion.finish(n);
    Epilogue::finish(p.epilogue, plan, chunk_of(plan, n, block_n), state);
  }

  static constexpr int kV = kQuad, kChunks = kN / kV;

  static FF_DEVICE Chunk chunk_of(const ConvPlan& plan, int64_t n, int block_n) {
    const int channel = block_n * kN + thread_index() % kChunks * kV, left = plan.co - channel;
    return {n, channel, left < 0 ? 0 : left < kV ? left : kV};
  }

  // The epilogue of a tile. Its products pass through shared memory at `at`, half after half, so that a thread gets
  // neighbouring channels of a voxel.
  static FF_DEVICE void write(const Params& p, const Taps& taps, int64_t n, int block_n, int tile,
                              const Multiplier<T, kN, kK>& products, int at, State& state) {
    const ConvPlan& plan = p.plan;
    const Chunk chunk = chunk_of(plan, n, block_n);
    const Epilogue epilogue(p.epilogue, plan, chunk);
    const Extent origin = tile_origin(plan.tiles, plan.tile_log2, tile);
    float* staging = reinterpret_cast<float*>(shared_memory() + at);
    // not unrolled, since the accumulators leave no registers for it
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      products.stage(half, staging);
      barrier();
#pragma unroll 1
      for (int r = thread_index() / kChunks; r < kHalf; r += kThreads / kChunks) {
        const Extent v = tile_voxel(plan.tile_log2, half * kHalf + r);
        const int d = taps.out_first.d + (origin.d + v.d) * plan.out_step;
        const int h = taps.out_first.h + (origin.h + v.h) * plan.out_step;
        const int w = taps.out_first.w + (origin.w + v.w) * plan.out_step;
        if (chunk.valid == 0 || d >= plan.out.d || h >= plan.out.h || w >= plan.out.w) continue;
        float values[kV];
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          values[i] = staging[r * kStagingPitch<kN> + thread_index() % kChunks * kV + i];
        }
        const int64_t number = ((n * plan.out.d + d) * plan.out.h + h) * plan.out.w + w;
        epilogue.write(p.epilogue, plan, {{d, h, w}, number}, chunk, values, state);
      }
      barrier();
    }
  }
};

// Launches the variant of a plan; kernels are compiled for the variants of plan.cpp.
template <class T, template <class, int> class Operand, template <class> class Epilogue>
std::string launch_conv(const char* name, const ConvPlan& plan, const typename Operand<T, 16>::Params& in,
                        const void* weights, const typename Epilogue<T>::Params& epilogue, Stream stream) {
  const Grid grid{plan.groups, plan.blocks_n * plan.classes, static_cast<int>(plan.n)};
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    return launched(name, launch<Kernel>(grid, plan.shared_bytes, stream,
                                         {plan, in, static_cast<const T*>(weights), epilogue, {}}));
  };
  if constexpr (sizeof(T) == 4) {
    return plan.bk == 16 ? start(Convolve<T, 32, 16, Operand, Epilogue>{}) : start(Convolve<T, 32, 8, Operand, Epilogue>{});
  } else {
    switch (plan.bn * 100 + plan.bk) {
      case 6464:
        return start(Convolve<T, 64, 64, Operand, Epilogue>{});
      case 6432:
        return start(Convolve<T, 64, 32, Operand, Epilogue>{});
      case 6416:
        return start(Convolve<T, 64, 16, Operand, Epilogue>{});
      case 3232:
        return start(Convolve<T, 32, 32, Operand, Epilogue>{});
      default:
        return start(Convolve<T, 32, 16, Operand, Epilogue>{});
    }
  }
}

}  // namespace fastfilm::cuda
