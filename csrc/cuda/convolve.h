// The convolution kernel, for the forward pass and for the gradient at the input; plan.h has the layout and its words.
//
// A block of threads has one sample, one block of output channels and one class of output voxels, and walks over its
// tiles. For each tile it takes every block of input channels:
//   load      starts the asynchronous copies of the slab (the gradient at the input needs two: dy, and y beside it)
//   wait      until the copies have arrived
//   affine    applies the pending affine, or the gradient of the moments, to the slab in place (`Operand::transform`)
//   MMA       multiplies the slab with the weights of the taps, part after part; the weights of the next part are
//             copied meanwhile, unless all weights are in shared memory from the start (`resident`)
// After a tile's last block the epilogue writes its voxels to global memory. They pass through the slabs' room
// (staging): each warp has a place there for 16 of its 32 voxels at a time, and waits for no other warp.
//
// Within a block of threads these steps follow each other. A multiprocessor holds two blocks wherever a layout with half
// of its shared memory exists (`resident_blocks`), and the steps of one run during those of the other:
//
//   block 0   load wait affine|MMA 0|MMA 1|MMA 2|epilogue|load wait affine|MMA 0|MMA 1| ...
//   block 1            MMA 1|MMA 2|epilogue|load wait affine|MMA 0|MMA 1|MMA 2|epilogue| ...
//
// Time runs to the right, | is a barrier, 0 to 2 are parts of the taps. Registers allow two blocks, too (kMinBlocks).
//
// A map with chunks that are not whole or do not lie on 16 bytes goes through ordinary loads and stores.
#pragma once

#include <type_traits>

#include "multiply.h"

namespace fastfilm::cuda {

// Channels of a voxel that one epilogue thread writes. Their constants and sums occupy registers, so they are few.
constexpr int kPair = 2;

// The channels of sample n that one epilogue thread writes.
struct Chunk {
  int64_t n;
  int channel, valid;
};

// Writes kV channels of a few voxels, of which `valid` exist, to a map at `to`, the place of a sample's first voxel. Voxels
// with a negative number do not exist.
template <class T, int kV, int kFew>
FF_DEVICE void put_voxels(T* to, int channels, int valid, bool aligned, const int (&number)[kFew],
                          const float (&v)[kFew * kV]) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (number[i] >= 0) store_few<T, kV>(to + static_cast<int64_t>(number[i]) * channels, kV, true, &v[i * kV]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (number[i] >= 0) store_few<T, kV>(to + static_cast<int64_t>(number[i]) * channels, valid, false, &v[i * kV]);
    }
  }
}

// The kernel. Its parts:
//   Operand    the contents of a slab; see operands.h
//   Epilogue   `Params`; `State`, kept over the tiles of a block, and `Running`, that of one tile; `load`, which starts to
//              copy the rest of what a half's voxels need to places beside their staged products, kBeside bytes each;
//              a constructor, which loads the constants of a chunk from where `load_constants` left them; `write`, which
//              gets the products of `kFew` voxels, with their numbers in the sample, or -1; `finish`, which merges the
//              threads' states
template <class T, int kN, int kK, template <class, int> class OperandOf, template <class> class EpilogueOf>
struct Convolve {
  using Operand = OperandOf<T, kK>;
  using Epilogue = EpilogueOf<T>;
  using State = typename Epilogue::State;
  struct Params {
    ConvPlan plan;
    typename Operand::Params in;
    const T* weights;
    typename Epilogue::Params epilogue;
  };
  // products on CUDA cores need more registers
  static constexpr int kThreads = kConvThreads, kMinBlocks = std::is_same_v<T, float> ? 1 : 2;
  static constexpr int kTapBytes = kN * kK * static_cast<int>(sizeof(T));

  static FF_DEVICE void run(const Params& p) {
    const ConvPlan& plan = p.plan;
    const Grid block = block_index();
    const int block_n = block.y % plan.blocks_n;
    const Taps& taps = plan.taps[block.y / plan.blocks_n];
    const int64_t n = block.z;
    const int tiles = plan.tiles.volume(), first = block.x * plan.tiles_a_group;
    const int last = first + plan.tiles_a_group < tiles ? first + plan.tiles_a_group : tiles;

    const Extent& size = taps.slab.size;
    const Slab<T, kK> slab(taps.slab, plan.in, plan.load_step, plan.table_at);
    const int at = plan.slots * plan.weight_bytes, beside = at + plan.slab_bytes;
    const int constants = plan.shared_bytes - kMaxTaps * 4 - slab.kCoefBytes;
    const bool pending = p.in.pending();
    const int in_step = plan.slab_step * plan.load_step;
    const int count = taps.count.volume(), blocks_k = count > 0 ? plan.blocks_k : 0;

    // starts to copy the weights of a block of input channels from tap `tap` on, as many taps as a part has
    const auto load_weights = [&](int k, int tap, int slot) {
      const int bytes = (count - tap < plan.part ? count - tap : plan.part) * kTapBytes;
      const unsigned char* from = reinterpret_cast<const unsigned char*>(p.weights + taps.weights) +
                                  (static_cast<int64_t>(block_n * plan.blocks_k + k) * count + tap) * kTapBytes;
#pragma unroll 1
      for (int i = thread_index() * 16; i < bytes; i += kThreads * 16) {
        copy_async16(slot * plan.weight_bytes + i, from + i, 16);
      }
    };
    if (plan.resident) {
      for (int k = 0; k < blocks_k; ++k) load_weights(k, 0, k);
    } else if (blocks_k > 0) {
      load_weights(0, 0, 0);
    }

    // how far on in the slab a tap reads; every thread sees it behind the first barrier
    const auto shift = [&](int t) -> int& {
      return *reinterpret_cast<int*>(shared_memory() + plan.shared_bytes + (t - kMaxTaps) * 4);
    };
    if (const int t = thread_index(); t < count) {
      const int plane = taps.count.h * taps.count.w;
      shift(t) = (t / plane * size.h + t % plane / taps.count.w) * size.w + t % taps.count.w;
    }

    // writes the tables of a tile: of its slab, and of the voxels that the rows of the warps' products are
    const auto find = [&](int tile) {
      const Extent origin = tile_origin(plan.tiles, plan.tile_log2, tile);
      slab.find({origin.d * in_step + taps.base.d, origin.h * in_step + taps.base.h, origin.w * in_step + taps.base.w});
      const int thread = thread_anew();
      const Extent v = tile_voxel(plan.tile_log2, Multiplier<T, kN, kK>::voxel(thread / 32, thread % 32));
      const int d = taps.out_first.d + (origin.d + v.d) * plan.out_step;
      const int h = taps.out_first.h + (origin.h + v.h) * plan.out_step;
      const int w = taps.out_first.w + (origin.w + v.w) * plan.out_step;
      const bool present = d < plan.out.d && h < plan.out.h && w < plan.out.w;
      reinterpret_cast<int*>(shared_memory() + plan.rows_at)[thread] = present ? (d * plan.out.h + h) * plan.out.w + w
                                                                               : -1;
    };

    Multiplier<T, kN, kK> products(plan.tile_log2, size, plan.slab_step);
    hold(plan, true, [](State& state) { state.clear(); });
    Epilogue::load_constants(p.epilogue, plan, n, block_n * kN, constants_at(plan));
    find(first);
    barrier();
    int slot = 0;
    for (int tile = first; tile < last; ++tile) {
      products.clear();
#pragma unroll 1
      for (int k = 0; k < blocks_k; ++k) {
        const int64_t n = block_anew().z;
        Operand::load(slab, p.in, n, k, at, beside);
        // one block of channels has the same constants in every tile
        if (pending && (blocks_k > 1 || tile == first)) Operand::load_constants(p.in, n, plan.n, k, constants);
        commit_copies();
        wait_copies<0>();
        barrier();
        if (pending) {
          Operand::transform(slab, p.in, n, k, at, beside, constants);
          barrier();
        }
#pragma unroll 1
        for (int tap = 0; tap < count; tap += plan.part) {
          if (!plan.resident) {
            if (tap > 0) {
              wait_copies<0>();
              barrier();
            }
            // the slot that is filled now was read before the barrier
            const bool more = tap + plan.part < count;
            if (more || k + 1 < blocks_k || tile + 1 < last) {
              load_weights(more ? k : k + 1 < blocks_k ? k + 1 : 0, more ? tap + plan.part : 0, slot ^ 1);
            }
            commit_copies();
          }
          const int end = tap + plan.part < count ? tap + plan.part : count;
          int weights = (plan.resident ? k : slot) * plan.weight_bytes;
#pragma unroll 1
          for (int t = tap; t < end; ++t) {
            products.add(at, shift(t), weights);
            weights += kTapBytes;
          }
          slot ^= 1;
        }
        barrier();
      }
      write(p, products, at);
      // a warp reads and writes its own part of the table of rows
      warp_barrier();
      if (tile + 1 < last) find(tile + 1);
      barrier();
    }
    wait_copies<0>();
    hold(plan, false, [&](State& state) {
      barrier();
      const Grid block = block_anew();
      Epilogue::finish(p.epilogue, plan, chunk_of(plan, block.z, block.y % plan.blocks_n, thread_anew()), state);
    });
  }

  // Where the epilogue's constants are in shared memory, behind the threads' states.
  static FF_DEVICE int constants_at(const ConvPlan& plan) { return plan.state_at + State::kFloats * kThreads * 4; }

  // Calls f(this thread's state), which lies in shared memory meanwhile: the products leave no registers for it.
  template <class F>
  static FF_DEVICE void hold(const ConvPlan& plan, bool fresh, F f) {
    float* held = reinterpret_cast<float*>(shared_memory() + plan.state_at) + thread_index();
    State state;
    if (!fresh) state.each([&](int i, float& number) { number = held[i * kThreads]; });
    f(state);
    state.each([&](int i, float& number) { held[i * kThreads] = number; });
  }

  static constexpr int kV = kPair, kChunks = kN / kV;

  static FF_DEVICE Chunk chunk_of(const ConvPlan& plan, int64_t n, int block_n, int thread) {
    const int channel = block_n * kN + thread % kChunks * kV, left = plan.co - channel;
    return {n, channel, left < 0 ? 0 : left < kV ? left : kV};
  }

  // The epilogue of a tile. A warp's products pass through its place in shared memory, half after half, so that a
  // thread gets neighbouring channels of a voxel, and `kFew` voxels at a time.
  static FF_DEVICE void write(const Params& p, Multiplier<T, kN, kK>& products, int at) {
    constexpr int kRows = 32 / kChunks, kFew = Epilogue::kFew;
    constexpr int kProducts = kStagingPitch<kN> * 4, kPitch = kProducts + Epilogue::template kBeside<kN>;
    const ConvPlan& plan = p.plan;
    const Grid block = block_anew();
    const int thread = thread_anew(), lane = thread % 32, staging = at + thread / 32 * kHalf * kPitch;
    const int* numbers = reinterpret_cast<const int*>(shared_memory() + plan.rows_at) + thread / 32 * 32;
#pragma unroll 1
    for (int half = 0; half < 2; ++half, numbers += kHalf) {
      if (half == 1) {
        warp_barrier();
        products.next_half();
      }
      products.stage(staging, kPitch / 4);
      Epilogue::template load<kN, kPitch>(p.epilogue, plan, block.z, block.y % plan.blocks_n * kN, staging + kProducts,
                                          numbers);
      Epilogue::wait();
      warp_barrier();
      // made here, where the registers of the staged half are free
      const Chunk chunk = chunk_of(plan, block.z, block.y % plan.blocks_n, thread_anew());
      typename Epilogue::Running running;
      running.clear();
      const Epilogue epilogue(p.epilogue, plan, chunk, constants_at(plan) + lane % kChunks * kV * 4);
#pragma unroll 1
      for (int r = lane / kChunks; r < kHalf && chunk.valid > 0; r += kFew * kRows) {
        const int row = staging + r * kPitch, channel = lane % kChunks * kV;
        int number[kFew];
#pragma unroll
        for (int i = 0; i < kFew; ++i) number[i] = numbers[r + i * kRows];
        epilogue.template write<kN>(p.epilogue, plan, number, chunk, row + channel * 4,
                                    row + kProducts + channel * static_cast<int>(sizeof(T)), kRows * kPitch, running);
      }
      hold(plan, false, [&](State& state) { running.merge_into(state); });
    }
  }
};

// Launches the kernel of a layout; kernels are compiled for the layouts of plan.cpp.
template <class T, template <class, int> class Operand, template <class> class Epilogue>
std::string launch_conv(const char* name, const ConvPlan& plan, const typename Operand<T, 16>::Params& in,
                        const void* weights, const typename Epilogue<T>::Params& epilogue, Stream stream) {
  const Grid grid{plan.groups, plan.blocks_n * plan.classes, static_cast<int>(plan.n)};
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    return launched(
        name, launch<Kernel>(grid, plan.shared_bytes, stream, {plan, in, static_cast<const T*>(weights), epilogue}));
  };
  if constexpr (sizeof(T) == 4) {
    return plan.bk == 16 ? start(Convolve<T, 32, 16, Operand, Epilogue>{})
                         : start(Convolve<T, 32, 8, Operand, Epilogue>{});
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
      case 3216:
        return start(Convolve<T, 32, 16, Operand, Epilogue>{});
      case 1664:
        return start(Convolve<T, 16, 64, Operand, Epilogue>{});
      case 1632:
        return start(Convolve<T, 16, 32, Operand, Epilogue>{});
      default:
        return start(Convolve<T, 16, 16, Operand, Epilogue>{});
    }
  }
}

}  // namespace fastfilm::cuda
