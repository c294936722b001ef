// Convolutions on the CPU by direct sums, and the gradient at their kernels; convolution.h has the interface.
#include "convolution.h"

#include <cstdlib>
#include <vector>

#include "walk.h"

namespace fastfilm {
namespace {

constexpr int64_t kThreadsFrom = 1 << 19;  // products; fewer take less time than waking the threads
// The gradient at a weight is summed in parts of the map: the fewest positions of a part, the most parts, and the most
// doubles of all their sums.
constexpr int64_t kPartPositions = 4096, kMostParts = 16, kPartSums = 1 << 22;

// Rows of the input that one thread holds in float, with zeros on both sides. They are held because neighbouring rows
// of the result read the same ones.
class InputRows {
 public:
  InputRows(const Convolution& conv, const Kernels& kernels, const void* x, int64_t lines = 1)
      : conv_(conv), widen_(kernels.widen_row[conv.storage]), x_(x) {
    itemsize_ = conv.storage == kFloat32 ? 4 : 2;
    const int64_t planes = conv.kernel[0], height = conv.size[1];
    // kernels compute up to kConvolutionBlock positions, also of a shorter row, and read the input under all of them;
    // the input's row is held whole
    const int64_t read = (std::max(conv.out[2], kConvolutionBlock) - 1) * conv.stride[2] + conv.kernel[2];
    const int64_t positions = std::max(read, conv.size[2] + conv.before[2]);
    pitch_ = positions * conv.ci + kernels.vector_bytes / 4;
    // all rows of the planes that `lines` rows of the result read, if they fit, else only the rows that they read
    each_ = planes * height * pitch_ * 4 <= kHeld ? height : conv.kernel[1] + (lines - 1) * conv.stride[1];
    memory_.resize(planes * each_ * pitch_);
    holds_.assign(planes * each_, -1);
  }

  // The row of sample i that row r of the kernel reads for row (z, y) of the result; null outside of the map.
  const float* under(int64_t i, int64_t z, int64_t y, int64_t r) {
    return get(i, z * conv_.stride[0] - conv_.before[0] + r / conv_.kernel[1],
               y * conv_.stride[1] - conv_.before[1] + r % conv_.kernel[1]);
  }

 private:
  const float* get(int64_t i, int64_t z, int64_t y) {
    if (z < 0 || y < 0 || z >= conv_.size[0] || y >= conv_.size[1]) return nullptr;
    const int64_t number = (i * conv_.size[0] + z) * conv_.size[1] + y;
    const int64_t slot = z % conv_.kernel[0] * each_ + y % each_;
    float* row = memory_.data() + slot * pitch_;
    if (holds_[slot] != number) {
      const int64_t length = conv_.size[2] * conv_.ci;
      widen_(offset(x_, number * length * itemsize_), row + conv_.before[2] * conv_.ci, length);
      holds_[slot] = number;
    }
    return row;
  }

  static constexpr int64_t kHeld = 256 << 10;  // bytes: half of a small second-level cache

  const Convolution& conv_;
  WidenKernel widen_;
  const void* x_;
  int64_t itemsize_, pitch_, each_;
  std::vector<float> memory_;
  std::vector<int64_t> holds_;
};

// The weight in the order in which the kernels read it: [blocks][KD * KH][KW * Ci][width], or with `few`
// [KD * KH][Co][KW * Ci, padded], where the vectors lie along the kernel.
std::vector<float> packed(const Convolution& conv, const Kernels& kernels, const void* weight, int64_t width, bool few,
                          int threads) {
  const int64_t lanes = kernels.vector_bytes / 4, rows = conv.kernel[0] * conv.kernel[1];
  const int64_t length = conv.kernel[2] * conv.ci, blocks = ceil_div(conv.co, width);
  const int64_t pitch = few ? ceil_div(length, lanes) * lanes : length, step = few ? 1 : width;
  const int64_t* s = conv.strides;
  const float* from = static_cast<const float*>(weight);
  std::vector<float> widened, to(blocks * rows * pitch * width);
  if (conv.storage != kFloat32) {
    int64_t ahead = 0, span = 1;  // elements in memory before `weight` (negative strides), and in all
    for (int i = 0; i < 5; ++i) {
      const int64_t extent = ((i == 0 ? conv.co : i == 1 ? conv.ci : conv.kernel[i - 2]) - 1) * s[i];
      span += std::abs(extent);
      if (extent < 0) ahead -= extent;
    }
    widened.resize(span);
    kernels.widen_row[conv.storage](offset(weight, -2 * ahead), widened.data(), span);
    from = widened.data() + ahead;
  }
  parallel_ranges(conv.co * rows, conv.co * rows * length < grain(kParallelFrom) ? 1 : threads,
                  [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t o = row / rows, r = row % rows;
      float* at = to.data() + (few ? (r * conv.co + o) * pitch : (o / width * rows + r) * length * width + o % width);
      const float* taps = from + o * s[0] + r / conv.kernel[1] * s[2] + r % conv.kernel[1] * s[3];
      for (int64_t x = 0; x < conv.kernel[2]; ++x) {
        for (int64_t c = 0; c < conv.ci; ++c, at += step) *at = taps[x * s[4] + c * s[1]];
      }
    }
  });
  return to;
}

}  // namespace

void convolve(const Convolution& conv, const void* x, const void* weight, const void* bias, const float* coef,
              Activation act, void* y, int threads) {
  const Kernels& kernels = current_kernels();
  const int64_t rows_out = conv.out[0] * conv.out[1], total = conv.n * rows_out;
  const int64_t kernel_rows = conv.kernel[0] * conv.kernel[1], length = conv.kernel[2] * conv.ci;
  const int64_t step = conv.stride[2] * conv.ci;
  const bool few = conv.co <= kFewChannels;
  // blocks of 32 channels, unless half of the last one would be empty
  const int64_t rest = conv.co % 32, block = conv.co <= 8 ? 0 : rest > 0 && rest <= 16 ? 1 : 2;
  const int variant = static_cast<int>(few ? conv.co - 1 : kFewChannels + block);
  const int64_t width = few ? conv.co : 8 << (variant - kFewChannels);
  const std::vector<float> weights = packed(conv, kernels, weight, width, few, threads);
  std::vector<float> added(ceil_div(conv.co, width) * width);
  if (bias) kernels.widen_row[conv.storage](bias, added.data(), conv.co);
  const ConvolutionKernel kernel = kernels.convolve_row[conv.storage][variant];
  const int64_t itemsize = conv.storage == kFloat32 ? 4 : 2;
  expect_large_pages(y, total * conv.out[2] * conv.co * itemsize);
  const Plan plan({conv.storage, act, conv.n, conv.out[2], conv.co, 1});
  std::unique_ptr<Expanded<float>> affine;
  if (coef) affine.reset(new Expanded<float>(plan, kCoefRows, conv.n, conv.co, coef));
  if (total * conv.out[2] * conv.co * kernel_rows * length < grain(kThreadsFrom)) threads = 1;
  parallel_ranges(total, threads, [&](int64_t from, int64_t to) {
    InputRows input(conv, kernels, x);
    std::vector<const float*> rows(kernel_rows);
    for (int64_t task = from; task < to; ++task) {
      const int64_t i = task / rows_out, z = task % rows_out / conv.out[1], line = task % conv.out[1];
      for (int64_t r = 0; r < kernel_rows; ++r) {
        rows[r] = input.under(i, z, line, r);
      }
      void* row = offset(y, task * conv.out[2] * conv.co * itemsize);
      for (int64_t at = 0; at < conv.co; at += width) {
        kernel({rows.data(), kernel_rows, length, step, weights.data() + at * kernel_rows * length, added.data() + at,
                conv.out[2], std::min(width, conv.co - at), offset(row, at * itemsize), conv.co});
      }
      if (affine) {
        run(plan, kernels.apply[conv.storage][act],
            {row, nullptr, row, 0, 0, 0, 0, affine->sample(i), plan.padded, nullptr, 0}, conv.out[2] * conv.co, 0);
      }
    }
  });
}

void convolve_kernel_gradient(const Convolution& conv, const float* x, const float* e, float* dkernel, int threads) {
  const Kernels& kernels = current_kernels();
  const int64_t rows_out = conv.out[0] * conv.out[1], rows = conv.kernel[0] * conv.kernel[1];
  const int64_t lanes = kernels.vector_bytes / 4, pitch = ceil_div(conv.kernel[2] * conv.ci, lanes) * lanes;
  const int64_t total = conv.n * rows_out, size = rows * conv.co * pitch, step = conv.stride[2] * conv.ci;
  const int64_t positions = total * conv.out[2],
                lines = std::max<int64_t>(1, kSumLength / std::max<int64_t>(1, conv.out[2]));
  if (positions * size < grain(kThreadsFrom)) threads = 1;
  // The number of parts depends on the form alone, so the result has the same bits for any number of threads. Blocks of
  // channels share no sums, so their number may depend on the threads; each block widens the map again.
  const int64_t most = std::max<int64_t>(1, std::min({total, kMostParts, kPartSums / std::max<int64_t>(1, size)}));
  const int64_t parts = std::clamp<int64_t>(positions / grain(kPartPositions), 1, most);
  const int64_t block = threads > 1 ? ceil_div(ceil_div(conv.co, ceil_div(4 * threads, parts)), 8) * 8 : conv.co;
  const int64_t blocks = ceil_div(conv.co, std::max<int64_t>(1, block));
  std::vector<double> sums(size * parts);
  parallel_for(parts * blocks, threads, [&](int64_t job, int) {
    const int64_t part = job / blocks, first = job % blocks * block, last = (part + 1) * total / parts;
    InputRows input(conv, kernels, x, lines);
    std::vector<const float*> found(lines);
    double* own = sums.data() + part * size + first * pitch;
    for (int64_t task = part * total / parts, count; task < last; task += count) {
      const int64_t i = task / rows_out, z = task % rows_out / conv.out[1], line = task % conv.out[1];
      count = std::min({lines, conv.out[1] - line, last - task});
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < count; ++j) {
          found[j] = input.under(i, z, line + j, r);
        }
        kernels.kernel_gradient_rows({found.data(), e + task * conv.out[2] * conv.co + first, count, conv.out[2], step,
                                      pitch, std::min(block, conv.co - first), conv.co, own + r * conv.co * pitch});
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t j = 0; j < size; ++j) sums[j] += sums[part * size + j];
  }
  const int64_t* s = conv.strides;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < conv.co; ++o) {
      float* to = dkernel + o * s[0] + r / conv.kernel[1] * s[2] + r % conv.kernel[1] * s[3];
      const double* from = sums.data() + (r * conv.co + o) * pitch;
      for (int64_t k = 0; k < conv.kernel[2]; ++k) {
        for (int64_t c = 0; c < conv.ci; ++c) to[k * s[4] + c * s[1]] = static_cast<float>(*from++);
      }
    }
  }
}

}  // namespace fastfilm
