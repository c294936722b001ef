// The choice of a layout for the gradient at the weight by warpgroup products.
#include <algorithm>
#include <limits>

#include "../extents.h"
#include "layout.h"

namespace fastfilm::cuda::sm90 {
namespace {

// A plane of so many channels; the threads read numbers of its table behind its end.
SlabShape shape_of(const Extent& size, int channels) {
  const auto inverse = [](int d) { return ((1u << 22) + d - 1) / d; };
  const int at_once = 4 * kWeightThreads / (channels / 8);
  return {size, size.volume(), up(size.volume(), at_once) * at_once, inverse(size.w), inverse(size.w * size.h)};
}

bool fits(WeightLayout& p, const ConvShape& s, int bn, const Extent& tile, int most) {
  const bool strided = s.stride == 2 && s.kernel.w > 1;
  p.bn = bn;
  p.blocks_m = up(s.co, kRows);
  p.blocks_n = up(s.ci, bn);
  p.tile = tile;
  p.tiles = map(s.out, tile, [](int n, int by) { return up(n, by); });
  const int halo = strided ? 1 : s.kernel.w - 1;
  p.voxels = shape_of({strided ? 4 : 1, tile.h + halo, tile.w + halo}, bn);
  p.gradient = shape_of(tile, kRows);
  if (p.voxels.voxels > 2048) return false;
  p.chunk_bytes = (p.voxels.voxels | 1) * 16;
  p.gradient_chunk_bytes = (p.gradient.voxels | 1) * 16;
  p.plane_bytes = align(bn / 8 * p.chunk_bytes);
  p.gradient_bytes = align(kRows / 8 * p.gradient_chunk_bytes);
  p.beside_at = kTurns * (p.plane_bytes + p.gradient_bytes);
  p.tables_at = p.beside_at + 2 * p.gradient_bytes;
  p.table_numbers = kBefore + p.voxels.numbers + p.gradient.numbers;
  p.constants_at = p.tables_at + kTurns * p.table_numbers * 4;
  p.constant_bytes = 7 * (bn + kRows) * 4;
  p.sums_at = p.constants_at + 2 * p.constant_bytes;
  p.shared_bytes = p.sums_at + 8 * kWeightThreads * 4;
  return p.shared_bytes <= most;
}

// Clocks of all tiles and blocks, about: the slower of the products and of what the threads do meanwhile, iteration by
// iteration of its loops (read off the machine code).
double clocks(const WeightLayout& p, int64_t n) {
  const double taps = p.kernel.h * p.kernel.w, steps = p.tile.volume() / 16.0;
  const double products = taps * steps * p.bn / 2;
  const int inputs = up(p.voxels.voxels * p.bn / 4, 4 * kWeightThreads);
  const int gradients = up(p.gradient.voxels * kRows / 4, 2 * kWeightThreads);
  const double threads = 3000 + 60 * steps + 460 * inputs + 560 * gradients;
  return std::max(products, threads) * static_cast<double>(voxels_of(p.tiles)) * n * p.blocks_m * p.blocks_n *
         p.kernel.d;
}

}  // namespace

std::string lay_out(const ConvShape& s, const Device& device, WeightLayout& layout) {
  if (bytes_of(s.storage) != 2) return "warpgroup products take float16 and bfloat16";
  WeightLayout p{};
  p.n = s.n;
  p.ci = s.ci;
  p.co = s.co;
  p.in = s.in;
  p.out = s.out;
  p.kernel = s.kernel;
  p.base = {-s.padding.d, -s.padding.h, -s.padding.w};
  p.step = {s.dims == 3 ? s.stride : 1, s.stride, s.stride};
  p.slots_a_group = s.kernel.w == 1 ? 3 : 1;
  double least = std::numeric_limits<double>::max();
  for (const int bn : {64, 32}) {
    if (bn == 64 && s.ci <= 32) continue;
    for (const Extent& tile :
         {Extent{1, 16, 16}, Extent{1, 8, 16}, Extent{1, 16, 8}, Extent{1, 8, 8}, Extent{1, 32, 8}}) {
      WeightLayout q = p;
      if (!fits(q, s, bn, tile, device.shared_bytes)) continue;
      const double cost = clocks(q, s.n);
      if (cost < least) {
        least = cost;
        layout = q;
      }
    }
  }
  if (least == std::numeric_limits<double>::max()) {
    return "no tile fits into " + std::to_string(device.shared_bytes) + " bytes of shared memory";
  }
  const int64_t tiles = s.n * voxels_of(layout.tiles);
  if (tiles > std::numeric_limits<int>::max()) return "the map has too many tiles";
  if (std::max(voxels_of(s.in), voxels_of(s.out)) > std::numeric_limits<int>::max())
    return "a sample has too many voxels";
  const int64_t others = static_cast<int64_t>(layout.blocks_m) * layout.blocks_n * s.kernel.d;
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(tiles, device.multiprocessors / others));
  layout.tiles_a_group = up(tiles, wanted);
  layout.groups = up(tiles, layout.tiles_a_group);
  layout.tiles_of_last = static_cast<int>(tiles - static_cast<int64_t>(layout.groups - 1) * layout.tiles_a_group);
  return "";
}

double useful(const WeightLayout& p) {
  const double channels = static_cast<double>(p.ci) * p.co /
                          (static_cast<double>(p.blocks_m) * kRows * p.blocks_n * p.bn);
  const double voxels = static_cast<double>(voxels_of(p.out)) /
                        (static_cast<double>(voxels_of(p.tiles)) * p.tile.volume());
  return channels * voxels;
}

// By the clocks counted in both, in TFLOP/s of an H200: where all products are of use these kernels reach about 330 with 64
// input channels at a time and 210 with 32, those of mma.sync 120.
bool wins(const WeightLayout& p) { return useful(p) * (p.bn == 64 ? 330 : 210) > 120; }

}  // namespace fastfilm::cuda::sm90
