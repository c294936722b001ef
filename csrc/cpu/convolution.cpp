#include "convolution.h"

#include <vector>

#include "walk.h"

namespace fastfilm {
namespace {

// Rows of the input that one thread holds in float, with zeros on both sides: neighbouring rows of the result read
// the same ones.
class InputRows {
 public:
  InputRows(const Convolution& conv, const Kernels& kernels, const void* x)
      : conv_(conv), widen_(kernels.widen_row[conv.storage]), x_(x) {
    itemsize_ = conv.storage == kFloat32 ? 4 : 2;
    const int64_t planes = conv.kernel[0], height = conv.size[1];
    const int64_t positions = std::max(conv.out[2], kConvolutionBlock) + conv.kernel[2] - 1;
    pitch_ = positions * conv.ci + kernels.vector_bytes / 4;
    // all rows of the planes that a row of the result reads, if they fit; else just the rows it reads
    each_ = planes * height * pitch_ * 4 <= kHeld ? height : conv.kernel[1];
    memory_.resize(planes * each_ * pitch_);
    holds_.assign(planes * each_, -1);
  }

  // Row (z, y) of sample i; null outside of the map.
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

 private:
  static constexpr int64_t kHeld = 256 << 10;  // bytes: half of a small second-level cache

  const Convolution& conv_;
  WidenKernel widen_;
  const void* x_;
  int64_t itemsize_, pitch_, each_;
  std::vector<float> memory_;
  std::vector<int64_t> holds_;
};

float number(Storage storage, const void* p, int64_t at, WidenKernel widen) {
  float value;
  widen(offset(p, at * (storage == kFloat32 ? 4 : 2)), &value, 1);
  return value;
}

// [blocks][KD * KH][KW * Ci][width], or [KD * KH][Co][KW * Ci, padded] where the vectors lie along the kernel.
std::vector<float> packed(const Convolution& conv, const Kernels& kernels, const void* weight, int64_t width,
                          bool few) {
  const int64_t lanes = kernels.vector_bytes / 4, rows = conv.kernel[0] * conv.kernel[1];
  const int64_t length = conv.kernel[2] * conv.ci, blocks = ceil_div(conv.co, width);
  const int64_t pitch = few ? ceil_div(length, lanes) * lanes : length;
  std::vector<float> to(blocks * rows * pitch * width);
  const int64_t* s = conv.strides;
  const WidenKernel widen = kernels.widen_row[conv.storage];
  for (int64_t o = 0; o < conv.co; ++o) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t base = o * s[0] + r / conv.kernel[1] * s[2] + r % conv.kernel[1] * s[3];
      for (int64_t x = 0; x < conv.kernel[2]; ++x) {
        for (int64_t c = 0; c < conv.ci; ++c) {
          const int64_t j = x * conv.ci + c, from = base + x * s[4] + c * s[1];
          const float value = conv.storage == kFloat32 ? static_cast<const float*>(weight)[from]
                                                       : number(conv.storage, weight, from, widen);
          const int64_t at = few ? (r * conv.co + o) * pitch + j
                                 : ((o / width * rows + r) * length + j) * width + o % width;
          to[at] = value;
        }
      }
    }
  }
  return to;
}

}  // namespace

void convolve(const Convolution& conv, const void* x, const void* weight, const void* bias, const float* coef,
              Activation act, void* y) {
  const Kernels& kernels = current_kernels();
  const int64_t rows_out = conv.out[0] * conv.out[1], total = conv.n * rows_out;
  const int64_t kernel_rows = conv.kernel[0] * conv.kernel[1], length = conv.kernel[2] * conv.ci;
  const bool few = conv.co <= kFewChannels;
  const int variant = few ? static_cast<int>(conv.co) - 1 : kFewChannels + (conv.co > 16 ? 2 : conv.co > 8 ? 1 : 0);
  const int64_t width = few ? conv.co : 8 << (variant - kFewChannels);
  const std::vector<float> weights = packed(conv, kernels, weight, width, few);
  std::vector<float> added(ceil_div(conv.co, width) * width);
  if (bias) kernels.widen_row[conv.storage](bias, added.data(), conv.co);
  const ConvolutionKernel kernel = kernels.convolve_row[conv.storage][variant];
  const int64_t itemsize = conv.storage == kFloat32 ? 4 : 2;
  expect_large_pages(y, total * conv.out[2] * conv.co * itemsize);
  const Plan plan({conv.storage, act, conv.n, conv.out[2], conv.co, 1});
  std::unique_ptr<Expanded<float>> affine;
  if (coef) affine.reset(new Expanded<float>(plan, kCoefRows, conv.n, conv.co, coef));
  const int64_t threads = total * conv.out[2] * conv.co * kernel_rows * length > kParallelFrom ? conv.threads : 1;
  const int64_t each = ceil_div(total, threads);
  parallel_for(threads, static_cast<int>(threads), [&](int64_t part, int) {
    InputRows input(conv, kernels, x);
    std::vector<const float*> rows(kernel_rows);
    for (int64_t task = part * each; task < std::min(total, (part + 1) * each); ++task) {
      const int64_t i = task / rows_out, z = task % rows_out / conv.out[1], line = task % conv.out[1];
      for (int64_t r = 0; r < kernel_rows; ++r) {
        rows[r] = input.get(i, z - conv.before[0] + r / conv.kernel[1], line - conv.before[1] + r % conv.kernel[1]);
      }
      void* row = offset(y, task * conv.out[2] * conv.co * itemsize);
      for (int64_t at = 0; at < conv.co; at += width) {
        kernel({rows.data(), kernel_rows, length, conv.ci, weights.data() + at * kernel_rows * length,
                added.data() + at, conv.out[2], std::min(width, conv.co - at),
                offset(row, at * itemsize), conv.co});
      }
      if (affine) {
        run(plan, kernels.apply[conv.storage][act],
            {row, nullptr, row, 0, 0, 0, 0, affine->sample(i), plan.padded, nullptr, 0}, conv.out[2] * conv.co, 0);
      }
    }
  });
}

}  // namespace fastfilm
