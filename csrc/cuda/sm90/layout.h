// The layout of a convolution by warpgroup products (sm_90a): what a block of threads computes, and the contents of its
// shared memory. convolve.h has the kernel.
//
// A product has 64 rows and 128 columns. Columns are voxels, 16 rows of 8 of the output. Rows are output channels; where a
// layer has fewer than 64, several neighbouring rows of the output fill them: with 32 channels the first 32 rows are an output row
// and the other 32 the one below. Both read the same voxels, with the taps of the second one shifted by a row, so that
// the weights have one row of taps more, in part zeros.
//
// A warpgroup has two such products at a time (halves), and a block two warpgroups that multiply (a pair): a unit. The
// planes of a unit are boxes of input voxels of depth 1. In 3D the pair are two neighbouring depths: product c of the
// pair reads, for depth tap t, plane c + t. In 2D the pair lie beside each other: product c reads plane c.
#pragma once

#include "../plan.h"

namespace fastfilm::cuda::sm90 {

constexpr int kRows = 64;  // of a product: output channels times output rows
constexpr int kLines = 16;  // rows of eight voxels that a product's columns are
constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;  // two warpgroups that multiply, and one that brings
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kSliceBytes = kRows * 16 * 2;  // weights of one tap and 16 input channels
constexpr int kMostSlices = 6;  // that come at a time
constexpr int kStagingBytes = 32 * 32;  // of a warp: 32 voxels by 16 channels
constexpr int kPumpBytes = 48;  // what the thread that brings weights knows of them
constexpr int kAhead = 4;  // stagings of a backward pass, which bring x ahead

// A box of taps on one class of input voxels (with stride 2 those of a parity), which a result reads: tap t reads input
// voxel (j + t) * load_step + base for voxel j of the result's class.
struct Reads : Box {
  int first_tap;  // taps of the boxes in front of it, those that rows share included
  SlabShape slab;  // of a plane
};

// A class of output voxels, first + out_step * j.
struct Result {
  Extent first, size, units;  // size: its voxels along each axis
  int begin, end;  // its boxes of taps
  int taps;  // of all of them, those that rows share included
  int64_t weights;  // where its packed weights begin, in slices
};

struct Layout {
  int64_t n;
  int ci, co;  // channels that are summed over and produced
  Extent in, out;
  int classes;
  Result result[kMaxClasses];
  Reads reads[kMaxClasses];
  Extent load_step, out_step;
  int kernel_step;
  int shifts, shifts_log2, bn;  // output rows in a product, and output channels: 64 together, at least 16
  int bk;  // input channels at a time
  int blocks_n, blocks_k;
  int last_slices;  // slices of the last block of input channels; of the others bk / 16
  Extent half, pair;  // from one half of a warpgroup to the other, and from one warpgroup to the other, in voxels
  bool resident;  // all weights stay in shared memory
  int stages, stage_slices;  // rooms for weights, and slices in each
  int slots, chunk_bytes, slab_bytes;  // rooms for planes, bytes of 8 channels of a plane, and of a plane
  int numbers;  // of the table of a plane's voxels
  int slabs_at, beside_at, staging_at, staging_bytes, tables_at, inputs_at, outputs_at, barriers_at, pump_at,
      shared_bytes;
  int groups, units_a_group;  // blocks of one sample, class and block of output channels, and the units each takes
  int64_t packed;  // elements of the packed weights

  // Partial results of a sample and channel.
  FF_CONSTEXPR_DEVICE int partial_slots() const { return classes * groups * 2 * shifts; }
  FF_CONSTEXPR_DEVICE int slices_of(int block) const { return block + 1 < blocks_k ? bk / 16 : last_slices; }
  // Taps of a box, those that rows share included.
  FF_CONSTEXPR_DEVICE int lines(const Reads& r) const { return r.count.h + shifts - 1; }
  FF_CONSTEXPR_DEVICE int plane_taps(const Reads& r) const { return lines(r) * r.count.w; }
};

// The layout of the gradient at the weight. Rows of a product are 64 output channels, columns input channels, and 16 voxels
// are summed up at a time. A block has a block of channels of both and one depth of the taps, and walks over tiles of all
// samples. Each of three warpgroups has a row of the taps; of a kernel of 1, a third of the voxels.
struct WeightLayout {
  int64_t n;
  int ci, co;
  Extent in, out, kernel, base;
  Extent step;  // from one output voxel to the next one, in input voxels
  int bn, blocks_m, blocks_n;  // input channels, 64 or 32; blocks of 64 output channels, and of bn input channels
  Extent tile, tiles;  // output voxels, of depth 1
  SlabShape voxels, gradient;  // planes of the input and of the gradient
  int chunk_bytes, gradient_chunk_bytes, plane_bytes, gradient_bytes;
  int beside_at, tables_at, table_numbers, constants_at, constant_bytes, sums_at, shared_bytes;
  int groups, tiles_a_group, tiles_of_last, slots_a_group;  // slots of partial results that a block writes
  int partial_slots() const { return groups * slots_a_group; }
};

constexpr int kWeightThreads = 3 * kWarpgroup;
constexpr int kBefore = 4;  // numbers in front of a tile's tables
constexpr int kTurns = 3;  // tiles whose planes are in shared memory: one is multiplied, one transformed, one copied

std::string lay_out(const ConvShape& shape, const Device& device, WeightLayout& layout);
double useful(const WeightLayout& layout);
bool wins(const WeightLayout& layout);

// Fills in `layout`; returns an empty string, or the reason why these kernels do not take the convolution.
std::string lay_out(const ConvShape& shape, Direction direction, const Device& device, Layout& layout);

// The share of the products' work that is not padding: with channels that do not exist, taps that rows share, voxels
// outside of the map.
double useful(const Layout& layout);

// Whether these kernels are expected to be faster than those of convolve.h.
bool wins(const Layout& layout);

}  // namespace fastfilm::cuda::sm90
