// Winograd's convolution: tiles of the result in groups that fit into the cache; winograd.h has the interface.
#include "winograd.h"

#include <vector>

#include "walk.h"

namespace fastfilm {
namespace {

constexpr int64_t kTileBytes = 192 << 10;  // bytes of a group of tiles' transformed input
constexpr int64_t kMostTiles = 64;
constexpr int64_t kLine = 16;  // floats of a cache line

// The tiles of the result, 2 x 2 positions each, in order of sample, plane, row and column.
struct Tiles {
  explicit Tiles(const Convolution& conv)
      : conv(conv),
        across((conv.out[2] + 1) / 2),
        down((conv.out[1] + 1) / 2),
        count(conv.n * conv.out[0] * down * across) {}

  struct Place {
    int64_t i, z, y, x;  // sample, plane, and the first position
  };
  Place at(int64_t tile) const {
    const int64_t line = tile / across, plane = line / down;
    return {plane / conv.out[0], plane % conv.out[0], line % down * 2, tile % across * 2};
  }

  // The run of tiles from a place to the end of its row, at most `most`, with the places of their results.
  WinogradRun run(const Place& at, int64_t most, float* y) const {
    WinogradRun run{};
    run.column = at.x - conv.before[2];
    run.width = conv.size[2];
    const int64_t line = (at.i * conv.out[0] + at.z) * conv.out[1] + at.y;
    for (int i = 0; i < 2; ++i) {
      run.out[i] = at.y + i < conv.out[1] ? y + ((line + i) * conv.out[2] + at.x) * conv.co : nullptr;
    }
    run.columns = conv.out[2] - at.x;
    run.out_step = conv.co;
    run.tiles = std::min(most, across - at.x / 2);
    return run;
  }
  // Sets the input rows of a run, for plane `d` of the kernel.
  void read(const Place& at, int64_t d, const float* x, const float* zeros, WinogradRun& run) const {
    const int64_t z = at.z - conv.before[0] + d;
    for (int i = 0; i < 4; ++i) {
      const int64_t row = at.y - conv.before[1] + i;
      const bool inside = z >= 0 && z < conv.size[0] && row >= 0 && row < conv.size[1];
      const int64_t line = (at.i * conv.size[0] + z) * conv.size[1] + row;
      run.in[i] = inside ? x + line * conv.size[2] * conv.ci : zeros;
      run.in_step[i] = inside ? conv.ci : 0;
    }
  }

  const Convolution& conv;
  int64_t across, down, count;
};

int64_t block_width(const Convolution& conv) { return conv.co > 16 ? 32 : 16; }

}  // namespace

int64_t winograd_weights(const Convolution& conv) {
  const int64_t width = block_width(conv);
  return ceil_div(conv.co, width) * kWinograd * conv.kernel[0] * conv.ci * width;
}

void transform_winograd(const Convolution& conv, const float* weight, float* transformed, int threads) {
  const Kernels& kernels = current_kernels();
  const int64_t length = conv.kernel[0] * conv.ci, width = block_width(conv), blocks = ceil_div(conv.co, width);
  const int64_t* s = conv.strides;
  // a tap takes about eight times as long as an element of a pass over a map
  const bool few = blocks * length * width < grain(kParallelFrom) / 8;
  parallel_ranges(blocks * length, few ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task / length, j = task % length;
      const float* from = weight + block * width * s[0] + j / conv.ci * s[2] + j % conv.ci * s[1];
      float taps[9 * kWidest] = {};
      for (int64_t o = 0; o < std::min(width, conv.co - block * width); ++o) {
        for (int t = 0; t < 9; ++t) taps[t * width + o] = from[o * s[0] + t / 3 * s[3] + t % 3 * s[4]];
      }
      kernels.winograd_weight(taps, width, transformed + (block * kWinograd * length + j) * width, length * width);
    }
  });
}

void convolve_winograd(const Convolution& conv, const float* x, const float* transformed, const float* bias,
                       const float* coef, Activation act, float* y, int threads) {
  const Kernels& kernels = current_kernels();
  const int64_t length = conv.kernel[0] * conv.ci, width = block_width(conv), wide = width > 16;
  const int64_t blocks = ceil_div(conv.co, width);
  std::vector<float> added(blocks * width), zeros(conv.ci);
  if (bias) std::copy(bias, bias + conv.co, added.begin());
  expect_large_pages(y, conv.n * conv.out[0] * conv.out[1] * conv.out[2] * conv.co * 4);
  const Plan plan({kFloat32, act, conv.n, conv.out[2], conv.co, 1});
  std::unique_ptr<Expanded<float>> affine;
  if (coef) affine.reset(new Expanded<float>(plan, kCoefRows, conv.n, conv.co, coef));

  const Tiles tiles(conv);
  const int64_t fitting = kTileBytes / (kWinograd * length * 4) / kWinogradTiles * kWinogradTiles;
  const int64_t most = std::clamp<int64_t>(fitting, kWinogradTiles, kMostTiles);
  // planes a whole number of pages apart would share a few lines of the first-level cache
  const int64_t in_pitch = most * length + kLine, out_pitch = most * width + kLine;
  parallel_ranges(ceil_div(tiles.count, most), threads, [&](int64_t from_group, int64_t to_group) {
    std::vector<float> input(kWinograd * in_pitch), products(kWinograd * out_pitch);
    std::vector<WinogradRun> runs;
    for (int64_t group = from_group; group < to_group; ++group) {
      const int64_t first = group * most, count = std::min(most, tiles.count - first);
      runs.clear();
      for (int64_t t = 0; t < count; t += runs.back().tiles) {
        const Tiles::Place at = tiles.at(first + t);
        runs.push_back(tiles.run(at, count - t, y));
        WinogradRun& run = runs.back();
        for (int64_t d = 0; d < conv.kernel[0]; ++d) {
          tiles.read(at, d, x, zeros.data(), run);
          kernels.winograd_input(run, conv.ci, input.data() + t * length + d * conv.ci, length, in_pitch);
        }
      }
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t p = 0; p < kWinograd; ++p) {
          kernels.winograd_product[wide](input.data() + p * in_pitch, length,
                                         transformed + (block * kWinograd + p) * length * width, count,
                                         products.data() + p * out_pitch);
        }
        const int64_t channels = std::min(width, conv.co - block * width);
        const float* from = products.data();
        for (const WinogradRun& run : runs) {
          kernels.winograd_output(run, from, width, out_pitch, added.data() + block * width, block * width, channels);
          from += run.tiles * width;
        }
      }
      if (!affine) continue;
      // the affine of a finished block, on the parts of rows that these tiles cover
      int64_t t = 0;
      for (const WinogradRun& run : runs) {
        const float* coefs = affine->sample(tiles.at(first + t).i);
        t += run.tiles;
        for (float* row : run.out) {
          if (!row) continue;
          fastfilm::run(plan, kernels.apply[kFloat32][act],
                        {row, nullptr, row, 0, 0, 0, 0, coefs, plan.padded, nullptr, 0},
                        std::min(2 * run.tiles, run.columns) * conv.co, 0);
        }
      }
    }
  });
}

}  // namespace fastfilm
