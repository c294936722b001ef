// The layout of a convolution on the GPU: the voxels that a tile reads, the contents of shared memory, the number of
// blocks.
//
// A tile is kTileVoxels output voxels, a box of powers of two. The box of input voxels that all its taps read (the
// slab) goes into shared memory once for each block of channels; all taps read it there. A 2D map has depth 1.
//
// The gradient at the input is the same computation: with stride 2 the voxels of each parity form a class of their
// own, whose taps are a dense box again.
#pragma once

#include <cstdint>
#include <string>

#include "types.h"

#ifdef __CUDACC__
#define FF_CONSTEXPR_DEVICE __host__ __device__
#else
#define FF_CONSTEXPR_DEVICE
#endif

namespace fastfilm::cuda {

constexpr int kTileVoxels = 256;
constexpr int kConvThreads = 256;
constexpr int kMaxClasses = 8;
constexpr int kMaxTaps = 28;  // 27, and as many as fill 16 bytes

struct Extent {
  int d, h, w;
  FF_CONSTEXPR_DEVICE int volume() const { return d * h * w; }
};

// The size of a slab; how many numbers its table of voxels has; and 2^22 divided by its row and by its plane, rounded up:
// with these a voxel's number becomes coordinates by multiplications.
struct SlabShape {
  Extent size;
  int voxels, numbers;
  uint32_t by_row, by_plane;
};

// The form of a convolution as the caller gives it.
struct ConvShape {
  int storage, dims;
  int64_t n;
  int ci, co;  // channels of all sources together, and of the result
  Extent in, out, kernel, padding;
  int stride;
};

// A class of output voxels, out_first + out_step * j, and the box of `count` taps that each of them reads. Tap t reads
// input voxel (j * slab_step + t) * load_step + base with the kernel's weights at kernel_first + t * kernel_step.
struct Box {
  Extent count, base, out_first, kernel_first;
};
struct Taps : Box {
  int64_t weights;  // the place where its packed weights begin, in elements
  SlabShape slab;   // the voxels that the taps of a tile read
};

struct ConvPlan {
  int64_t n;
  int ci, co;  // channels that are summed over and produced; in a dgrad the layer's co and ci
  Extent in, out;
  int classes, kernel_step;
  Taps taps[kMaxClasses];
  int slab_step, load_step, out_step;  // in slab voxels, input voxels and output voxels
  Extent tile_log2, tiles;             // size of a tile; tiles of one class along each axis
  int bn, bk, blocks_n, blocks_k;      // channels of the result and of the input at a time
  int part;                            // taps whose weights come into shared memory at a time
  bool resident;                       // all weights of a block stay in shared memory
  int slots, weight_bytes;             // rooms for the weights of a part in shared memory, and the size of one
  int slabs, slab_bytes;               // 2: the second slab holds the raw output beside its gradient
  int state_at;                        // where the threads' states are in shared memory, from tile to tile
  int table_at, rows_at;               // where the numbers of the slab's voxels are, and of the rows of the products
  int shared_bytes, resident_blocks;   // of a block of threads; blocks that a multiprocessor has room for, 1 or 2
  int groups, tiles_a_group;           // blocks of one sample and class, and the tiles each takes
  int64_t packed;                      // elements of the packed weights

  // Partial results of a sample and channel.
  FF_CONSTEXPR_DEVICE int partial_slots() const { return classes * groups; }
};

// The results of a kernel: kForward the convolution, kBackward the gradient at the input.
enum class Direction { kForward, kBackward };

// Fills in `plan`; returns an empty string, or the reason why there is no layout.
std::string plan_conv(const ConvShape& shape, Direction direction, const Device& device, ConvPlan& plan);

// The layout of the gradient at the weight. A block holds the gradient of a tile beside the slab of the input, and
// accumulates the products of all taps of one depth.
struct WgradPlan {
  int64_t n;
  int ci, co;
  Extent in, out, kernel, base;
  int slab_step, load_step;
  Extent tile_log2, tiles;
  SlabShape slab, tile;
  int bm, bn, blocks_m, blocks_n;  // output and input channels
  int slab_bytes, shared_bytes, resident_blocks;
  int sums_at;   // place in shared memory of the sums of the gradient, one state a thread
  int table_at;  // and of the numbers of the voxels of the tile and of the slab
  int groups, tiles_a_group, slots;
};

std::string plan_wgrad(const ConvShape& shape, const Device& device, WgradPlan& plan);

// Bytes that a layout moves between L2 and the multiprocessors for each output element.
double bytes_an_output(const ConvPlan& plan, int element);

}  // namespace fastfilm::cuda
