// The interface of the vector kernels: the structs of their arguments, and the table of kernels that each instruction
// set has.
#pragma once

#include <cstdint>

#include "../activations.h"

namespace fastfilm {

enum Storage { kFloat32, kFloat64, kBFloat16, kFloat16, kStorages };

// Rows of the coefficients: v = g * (act(a * (y - p) + b; slope) - q) + s.
enum CoefRow { kA, kB, kG, kS, kP, kQ, kSlope, kCoefRows };

// Sums that the backward pass of `apply` accumulates for each channel.
enum ApplySum { kSumDvH, kSumDv, kSumDzY, kSumDz, kSumSlope, kApplySums };

// Rows of the coefficients of `residual`, where r = a2 * (y2 - p2) and z = a * (y - p) + b:
// inside:  v = act(z + r; slope),  outside:  v = g * (act(z; slope) - q) + s + r.
enum ResidualRow { kResA, kResB, kResP, kResG, kResQ, kResS, kResSlope, kResA2, kResP2, kResidualRows };

// Sums of the backward pass of `residual`: those of `apply`, and that of the gradient at r times (y2 - p2).
enum ResidualSum { kSumDrY2 = kApplySums, kResidualSums };

// Rows of the coefficients of `moments`, its sums, and those of its backward pass.
enum MomentsRow { kShift, kMomentsSlope, kPivot, kMomentsRows };
enum MomentsSum { kSum, kSumSquares, kMomentsSums };
enum MomentsBackwardRow { kBackShift, kBackSlope, kMean, kDu0, kDu1, kMomentsBackwardRows };
enum MomentsBackwardSum { kSumShift, kSumBackSlope, kMomentsBackwardSums };

// A part of a map: `rows` rows of `width` elements, `stride` elements apart, that share one row of coefficients.
// `width` is a multiple of the number of lanes. The rows are taken in blocks of `block`: within a block a column of
// vectors keeps its coefficients and its sums in registers; the sums are then added, in double, to sums[k * sum_stride
// + j].
struct Strip {
  const void* y;
  const void* dv;  // incoming gradient; may be null in the backward pass of `moments`
  void* out;       // may equal y
  int64_t rows, width, stride, block;
  const void* coef;  // coef[k * coef_stride + j], float (double for float64 storage)
  int64_t coef_stride;
  double* sums;  // null where they are not wanted
  int64_t sum_stride;
  const void* y2 = nullptr;  // `residual`: the other summand
  void* out2 = nullptr;      // `residual`: the gradient at it; null where it is not wanted
};

using StripKernel = void (*)(const Strip&);

// One row of a map that is gathered from rows of another: at each position the weighted sum, or the maximum, of
// all pairs of a source row and a tap of the last axis. `in_stride` and `out_stride` elements lie between
// positions, c of which are used.
struct GatherRow {
  const void* const* rows;
  const double* row_weight;  // not read for the maximum
  int64_t count, in_stride;
  const int64_t *start, *index;  // taps of position x: index[start[x]] ... index[start[x + 1] - 1]
  const double* weight;
  int64_t width, c;
  void* out;
  int64_t out_stride;
  // read for the sum only: positions of a source row, whether position x reads position x alone, and room for one
  // source row in the arithmetic's type with a spare vector
  int64_t in_width;
  bool same;
  void* room;
};

// One row of the gradient of a maximum, which goes to the first of the largest elements: it is added to `drows`, which
// have the layout of `rows`.
struct MaximumBackwardRow {
  GatherRow forward;  // `out` is not used
  const void* dout;
  int64_t dout_stride;
  void* const* drows;
};

constexpr int64_t kMaxTaps = 1024;  // taps of one position, all axes together

// One row of a convolution's result: `width` positions of `channels` channels, `out_stride` elements apart.
struct ConvolutionRow {
  const float* const* rows;  // input rows under the rows of the kernel; null where they are all zero
  int64_t count, length, step;  // rows of the kernel, their length KW * Ci, and floats between positions
  const float* weight;        // packed by convolution.cpp
  const float* bias;          // biases of all channels of the block
  int64_t width, channels;
  void* out;
  int64_t out_stride;
};

// The share of `count` rows of a map in the gradient of one row of a kernel.
struct KernelGradientRows {
  const float* const* x;  // the map's rows from their first zero on; null ones are left out
  const float* e;         // the gradient at as many rows of the result, [count][width], co of e_step channels each
  int64_t count, width, step, pitch, co, e_step;  // floats between positions of x; KW * Ci in whole vectors
  double* sums;                         // [co][pitch], added to
};

constexpr int kFewChannels = 2;            // with at most this many output channels, vectors lie along the kernel
constexpr int kConvolutions = kFewChannels + 3;  // 1 and 2 channels; blocks of 8, 16 and 32
constexpr int64_t kSumLength = 64;        // products that are added up before they join the others
constexpr int64_t kShortSum = 32;          // likewise, where the sums stay in the nearest cache
constexpr int64_t kConvolutionBlock = 16;  // most positions that are computed together

constexpr int kWinograd = 16;       // positions of a transformed tile
constexpr int kWinogradTiles = 16;  // a multiple of the tiles that are multiplied together
constexpr int kWidest = 32;         // channels of a block of results

// A run of tiles that lie side by side, `step` floats apart where they are transformed.
struct WinogradRun {
  const float* in[4];  // the map's rows at its first column
  int64_t in_step[4];  // floats from one of its columns to the next; 0: zeros of the padding
  int64_t column, width;  // the first tile's first column, outside of the map if negative; columns of the map
  float* out[2];  // the result's rows at the first tile's first column; null: the result ends before
  int64_t columns, out_step;  // columns of the result from there on, and floats from one to the next
  int64_t tiles;
};

using WinogradInput = void (*)(const WinogradRun& run, int64_t channels, float* to, int64_t step, int64_t plane);
using WinogradWeight = void (*)(const float* taps, int64_t width, float* out, int64_t plane);
using WinogradProduct = void (*)(const float* x, int64_t length, const float* w, int64_t count, float* out);
using WinogradOutput = void (*)(const WinogradRun& run, const float* products, int64_t step, int64_t plane,
                                const float* bias, int64_t first, int64_t channels);
using ConvolutionKernel = void (*)(const ConvolutionRow&);
using KernelGradientKernel = void (*)(const KernelGradientRows&);
using WidenKernel = void (*)(const void* from, float* to, int64_t count);
using GatherKernel = void (*)(const GatherRow&);
using MaximumBackwardKernel = void (*)(const MaximumBackwardRow&);

struct Kernels {
  const char* name;
  int vector_bytes;
  StripKernel apply[kStorages][kActivations];
  StripKernel apply_backward[kStorages][kActivations];
  StripKernel moments[kStorages][kActivations];
  StripKernel moments_backward[kStorages][kActivations];
  StripKernel residual_inside[kStorages][kActivations];
  StripKernel residual_outside[kStorages][kActivations];
  StripKernel residual_inside_backward[kStorages][kActivations];
  StripKernel residual_outside_backward[kStorages][kActivations];
  GatherKernel gather_sum[kStorages], gather_maximum[kStorages];
  MaximumBackwardKernel maximum_backward[kStorages];
  WidenKernel widen_row[kStorages];  // null for float64, like convolve_row
  ConvolutionKernel convolve_row[kStorages][kConvolutions];
  KernelGradientKernel kernel_gradient_rows;
  WinogradInput winograd_input;
  WinogradWeight winograd_weight;
  WinogradProduct winograd_product[2];  // 16 and 32 output channels
  WinogradOutput winograd_output;
};

extern const Kernels kBaseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTFILM_X86 1
extern const Kernels kAVX2;
extern const Kernels kAVX512;
#endif

}  // namespace fastfilm
