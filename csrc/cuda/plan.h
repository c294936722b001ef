// How a convolution is laid out: which voxels a tile reads, what shared memory holds, how many blocks there are.
//
// A tile is kTileVoxels output voxels, a box of powers of two. The box of input voxels that all its taps read (the
// slab) goes into shared memory once for each block of channels; every tap is served from there. 2D is depth 1.
//
// The gradient at the input is the same computation: with stride 2 the voxels of each parity form a class of their
// own, whose taps are a dense box again.
#pragma once

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

struct Extent {
  int d, h, w;
  FF_CONSTEXPR_DEVICE int volume() const { return d * h * w; }
};

// A convolution as its caller sees it.
struct ConvShape {
  int storage, dims;
  int64_t n;
  int ci, co;  // ci: of all sources together
  Extent in, out, kernel, padding;
  int stride;
};

// Voxels first + step * j of the result, and the box of taps that each of them reads: input voxel
// j * in_step + base + t for tap t, whose weights are those of kernel_first + t * kernel_step.
struct Taps {
  Extent count, base, out_first, kernel_first;
  int64_t weights;  // where its packed weights begin, in elements
};

struct ConvPlan {
  int64_t n;
  int ci, co;  // summed over, and produced: in a dgrad these are the layer's co and ci
  Extent in, out;
  int classes, kernel_step;
  Taps taps[kMaxClasses];
  int slab_step, load_step, out_step;  // in slab voxels, input voxels and output voxels
  Extent tile_log2, tiles;             // tiles: of one class
  int bn, bk, blocks_n, blocks_k;      // channels of the result and of the input at a time
  bool resident;                       // all weights of a block stay in shared memory
  int slots, weight_bytes;             // weight slabs in shared memory, and the size of one
  int buffers;                         // 2: the next slab is loaded while this one is used
  int slab_bytes, shared_bytes;
  int extra_at;                        // kJoint: shared memory of the weight's gradient
  int groups, tiles_a_group;           // blocks of one sample and class, and the tiles each takes
  int64_t packed;                      // elements of the packed weights
};

// kJoint: kBackward, and the gradient at the weight from the same slabs. It takes stride 1, maps of one size, 16-bit
// types, 2D or kernel 1, and no more output channels of the layer than a slab holds.
enum class Direction { kForward, kBackward, kJoint };

// An empty reason, or why there is no plan.
std::string plan_conv(const ConvShape& shape, Direction direction, const Device& device, ConvPlan& plan);

// What a wgrad block holds: the tile's gradient beside the slab, and the products of all taps of one depth.
struct WgradPlan {
  int64_t n;
  int ci, co;
  Extent in, out, kernel, base;
  int slab_step, load_step;
  Extent tile_log2, tiles;
  int bm, bn, blocks_m, blocks_n;  // output and input channels
  int buffers, slab_bytes, shared_bytes;
  int sums_at;  // in shared memory: what each thread has summed of the gradient
  int groups, tiles_a_group, slots;
};

// What a joint kernel has beside the rest: a tile of the input, its constants, and sums of the gradient.
int joint_bytes(const ConvPlan& plan, int element);

std::string plan_wgrad(const ConvShape& shape, const Device& device, WgradPlan& plan);

// Bytes that a plan moves between L2 and the multiprocessors for each output element.
double bytes_an_output(const ConvPlan& plan, int element);

}  // namespace fastfilm::cuda
