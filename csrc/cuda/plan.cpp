// The choice of a convolution's layout: the tile, the blocks of channels and the blocks of threads.
#include "extents.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <limits>

namespace fastfilm::cuda {
namespace {

// log2 of the boxes that a tile may be; rows of at least 8 voxels keep ldmatrix free of bank conflicts.
constexpr Extent kTiles[] = {{0, 4, 4}, {0, 3, 5}, {0, 5, 3}, {0, 2, 6}, {2, 3, 3},
                             {1, 3, 4}, {1, 4, 3}, {2, 2, 4}, {3, 2, 3}};

// The (bn, bk) for which kernels are compiled: for 16-bit types and for float32.
struct Variant {
  int bn, bk;
};
constexpr Variant kVariants[] = {{64, 64}, {64, 32}, {64, 16}, {32, 32}, {32, 16}, {16, 64}, {16, 32}, {16, 16}};
constexpr Variant kVariantsFloat[] = {{32, 16}, {32, 8}};

// The (bm, bn) of the gradient at the weight.
constexpr Variant kWgradVariants[] = {{32, 64}, {32, 32}, {32, 16}};
constexpr Variant kWgradFloat[] = {{32, 16}};

// Numbers of a thread's state: moments, or five sums, of two channels. At the end all are merged in shared memory.
constexpr int kMoments = 5, kSums = 10;
constexpr int kCoefficients = 7, kConstants = 10;  // of a channel of the input, and of the output of a forward pass
constexpr int kPartBytes = 12 * 1024;            // weights that come at a time, at most, where a tap has less

// The slab of a tile whose voxels are `step` apart in it.
Extent slab_of(const Extent& tile_log2, const Extent& count, int step) {
  Extent slab;
  for (int i = 0; i < 3; ++i) axis(slab, i) = ((1 << axis(tile_log2, i)) - 1) * step + std::max(1, axis(count, i));
  return slab;
}

// Of a slab with blocks of `channels`. Threads read the table four numbers at a time, with as many between these as voxels
// are worked on at a time.
SlabShape shape_of(const Extent& size, int channels) {
  const auto inverse = [](int d) { return ((1u << 22) + d - 1) / d; };
  const int step = 8 * kConvThreads / channels;
  return {size, size.volume(), up(size.volume(), step) * step, inverse(size.w), inverse(size.w * size.h)};
}

Extent tiles_of(const Extent& size, const Extent& tile_log2) {
  return map(size, tile_log2, [](int n, int log2) { return (n + (1 << log2) - 1) >> log2; });
}

// Shared memory of a block of which a multiprocessor holds `blocks`; a block takes 1024 bytes beside its own.
int room(const Device& device, int blocks) { return (device.shared_bytes + 1024) / blocks - 1024; }

// Shares the tiles out to as many groups as fill the device, in equal numbers.
void share_out(int64_t tiles, int64_t others, int resident_blocks, const Device& device, int& groups, int& each) {
  const int64_t wanted = static_cast<int64_t>(device.multiprocessors) * resident_blocks / std::max<int64_t>(1, others);
  groups = static_cast<int>(std::max<int64_t>(1, std::min(wanted, tiles)));
  each = up(tiles, groups);
  groups = up(tiles, each);
}

// Whether the divisions by `shape_of` are exact for all voxels of a slab.
bool divides(const Extent& slab) {
  const int64_t voxels = slab.volume();
  return voxels <= 4096 && slab.w >= 4 && voxels * slab.h * slab.w < 1 << 22;
}

// Lays out the shared memory of a block: the weights, the slabs (the results pass through them, each warp's by
// themselves) and the constants of a slab.
bool fits(ConvPlan& p, const Variant& v, const Extent& tile, int element, bool resident, int most) {
  int voxels = 0, numbers = 0, taps = 1;
  for (int c = 0; c < p.classes; ++c) {
    const Extent slab = slab_of(tile, p.taps[c].count, p.slab_step);
    if (!divides(slab)) return false;
    voxels = std::max(voxels, slab.volume());
    numbers = std::max(numbers, shape_of(slab, v.bk).numbers);
    taps = std::max(taps, p.taps[c].count.volume());
  }
  const bool forward = p.slabs == 1;
  // a staged voxel of the gradient has x beside it
  const int staging = kTileVoxels / 2 * ((v.bn + 8) * 4 + (forward ? 0 : v.bn * element));
  const int tap_bytes = v.bn * v.bk * element;
  p.bn = v.bn;
  p.bk = v.bk;
  p.blocks_n = up(p.co, v.bn);
  p.blocks_k = up(p.ci, v.bk);
  p.tile_log2 = tile;
  p.resident = resident;
  p.slots = resident ? p.blocks_k : 2;
  p.slab_bytes = align(voxels * v.bk * element);
  const int slabs = std::max(p.slabs * p.slab_bytes, align(staging));
  const int states = (forward ? kMoments : kSums) * kConvThreads * 4, table = numbers * 4, rows = kTileVoxels * 4;
  const int of_result = (forward ? kConstants : kCoefficients) * v.bn * 4;
  const int constants = of_result + kCoefficients * v.bk * 4 + kMaxTaps * 4;
  // of weights that are not resident as many come at a time as there is room for
  for (p.part = resident ? taps : std::max(1, std::min(taps, kPartBytes / tap_bytes)); p.part > 0; --p.part) {
    p.weight_bytes = p.part * tap_bytes;
    const int64_t state_at = static_cast<int64_t>(p.slots) * p.weight_bytes + slabs;
    const int64_t all = state_at + states + table + rows + constants;
    if (all <= most) {
      p.state_at = static_cast<int>(state_at);
      p.table_at = p.state_at + states + of_result;
      p.rows_at = p.table_at + table;
      p.shared_bytes = std::max(static_cast<int>(all), kSums * kConvThreads * 4);
      return p.shared_bytes <= most;
    }
    if (resident) break;
  }
  return false;
}

template <class Plan, class Fits>
bool best_tile(Plan& plan, const Extent& size, int dims, const Extent& count, Fits fits_in) {
  double least = std::numeric_limits<double>::max();
  Plan best = plan;
  for (const Extent& tile : kTiles) {
    if ((dims == 2 && tile.d > 0) || !fits_in(plan, tile)) continue;
    const double cost = static_cast<double>(voxels_of(tiles_of(size, tile))) *
                        (slab_of(tile, count, plan.slab_step).volume() + kTileVoxels);
    if (cost < least) {
      least = cost;
      best = plan;
    }
  }
  plan = best;
  return least < std::numeric_limits<double>::max();
}

std::string does_not_fit(const Device& device) {
  return "no tile fits into " + std::to_string(device.shared_bytes) + " bytes of shared memory";
}

}  // namespace

std::string plan_conv(const ConvShape& s, Direction direction, const Device& device, ConvPlan& plan) {
  const int element = bytes_of(s.storage);
  ConvPlan p{};
  p.n = s.n;
  const bool forward = direction == Direction::kForward;
  p.slabs = forward ? 1 : 2;
  p.ci = forward ? s.ci : s.co;
  p.co = forward ? s.co : s.ci;
  p.in = forward ? s.in : s.out;
  p.out = forward ? s.out : s.in;
  Extent size = p.out;
  if (forward) {
    p.classes = 1;
    p.kernel_step = 1;
    p.taps[0] = {{s.kernel, {-s.padding.d, -s.padding.h, -s.padding.w}, {0, 0, 0}, {0, 0, 0}}};
    const bool one = s.kernel.volume() == 1;
    p.slab_step = one ? 1 : s.stride;
    p.load_step = one ? s.stride : 1;
    p.out_step = 1;
  } else {
    p.kernel_step = -s.stride;
    p.slab_step = p.load_step = 1;
    p.out_step = s.stride;
    const int depths = s.dims == 3 ? s.stride : 1;
    for (int d = 0; d < depths; ++d)
      for (int h = 0; h < s.stride; ++h)
        for (int w = 0; w < s.stride; ++w) p.taps[p.classes++] = {backward_box(s, {d, h, w})};
    size = {up(p.out.d, depths), up(p.out.h, s.stride), up(p.out.w, s.stride)};
  }
  Extent count{1, 1, 1};
  for (int c = 0; c < p.classes; ++c) count = map(count, p.taps[c].count, [](int a, int b) { return std::max(a, b); });

  bool found = false;
  const bool wide = element == 4;
  // twice as many blocks of half the channels where there would be fewer blocks than multiprocessors
  const int64_t blocks = p.n * p.classes * up(voxels_of(size), kTileVoxels) * up(p.co, 64);
  const int bn = p.co <= 16 ? 16 : p.co > 32 && blocks >= device.multiprocessors ? 64 : 32;
  const auto suits = [&](const Variant& v) { return wide || (v.bn == bn && (v.bk == 16 || v.bk / 2 < p.ci)); };
  for (p.resident_blocks = 2; p.resident_blocks > 0 && !found; p.resident_blocks -= !found) {
    for (const Variant *v = wide ? kVariantsFloat : kVariants,
                       *end = wide ? std::end(kVariantsFloat) : std::end(kVariants);
         v != end && !found; ++v) {
      if (!suits(*v)) continue;
      for (const bool resident : {true, false}) {
        found = found || best_tile(p, size, s.dims, count, [&](ConvPlan& q, const Extent& tile) {
          return fits(q, *v, tile, element, resident, room(device, p.resident_blocks));
        });
      }
    }
  }
  if (!found) return does_not_fit(device);

  p.tiles = tiles_of(size, p.tile_log2);
  for (int c = 0; c < p.classes; ++c) {
    p.taps[c].slab = shape_of(slab_of(p.tile_log2, p.taps[c].count, p.slab_step), p.bk);
    p.taps[c].weights = p.packed;
    p.packed += static_cast<int64_t>(p.blocks_n) * p.blocks_k * p.taps[c].count.volume() * p.bn * p.bk;
  }
  share_out(voxels_of(p.tiles), p.n * p.classes * p.blocks_n, p.resident_blocks, device, p.groups, p.tiles_a_group);
  if (voxels_of(p.out) > std::numeric_limits<int>::max()) return "a sample has too many voxels";
  plan = p;
  return "";
}

std::string plan_wgrad(const ConvShape& s, const Device& device, WgradPlan& plan) {
  const int element = bytes_of(s.storage);
  WgradPlan p{};
  p.n = s.n;
  p.ci = s.ci;
  p.co = s.co;
  p.in = s.in;
  p.out = s.out;
  p.kernel = s.kernel;
  p.base = {-s.padding.d, -s.padding.h, -s.padding.w};
  const bool one = s.kernel.volume() == 1;
  p.slab_step = one ? 1 : s.stride;
  p.load_step = one ? s.stride : 1;
  const Extent count{1, s.kernel.h, s.kernel.w};  // a block takes the taps of one depth
  bool found = false;
  const bool wide = element == 4;
  for (p.resident_blocks = 2; p.resident_blocks > 0 && !found; p.resident_blocks -= !found) {
    for (int i = 0; i < (wide ? 1 : 3) && !found; ++i) {
      const Variant& v = wide ? kWgradFloat[i] : kWgradVariants[i];
      if (!wide && v.bk > 16 && v.bk / 2 >= s.ci) continue;
      found = best_tile(p, s.out, s.dims, count, [&](WgradPlan& q, const Extent& tile) {
        const Extent slab = slab_of(tile, count, q.slab_step);
        q.bm = v.bn;
        q.bn = v.bk;
        q.tile_log2 = tile;
        q.slab_bytes = align(slab.volume() * v.bk * element);
        q.sums_at = q.slab_bytes + 2 * kTileVoxels * v.bn * element + kCoefficients * (v.bk + v.bn) * 4;
        q.table_at = q.sums_at + kConvThreads * 2 * 2 * 4;
        q.shared_bytes = q.table_at + (shape_of(slab, v.bk).numbers + kTileVoxels) * 4;
        return divides(slab) && q.shared_bytes <= room(device, p.resident_blocks);
      });
    }
  }
  if (!found) return does_not_fit(device);
  p.slab = shape_of(slab_of(p.tile_log2, count, p.slab_step), p.bn);
  p.tile = shape_of({1 << p.tile_log2.d, 1 << p.tile_log2.h, 1 << p.tile_log2.w}, p.bm);
  p.blocks_m = up(s.co, p.bm);
  p.blocks_n = up(s.ci, p.bn);
  p.tiles = tiles_of(s.out, p.tile_log2);
  const int64_t tiles = p.n * voxels_of(p.tiles);
  if (tiles > std::numeric_limits<int>::max()) return "the map has too many tiles";
  share_out(tiles, static_cast<int64_t>(p.blocks_m) * p.blocks_n * s.kernel.d, p.resident_blocks, device, p.groups,
            p.tiles_a_group);
  p.slots = p.groups * (s.storage == kFloat32 ? 1 : std::max(1, kConvThreads / 32 / (p.bm / 32 * (p.bn / 8))));
  plan = p;
  return "";
}

double bytes_an_output(const ConvPlan& p, int element) {
  double bytes = 0, outputs = 0;
  for (int c = 0; c < p.classes; ++c) {
    const Extent& count = p.taps[c].count;
    const double slab = static_cast<double>(slab_of(p.tile_log2, count, p.slab_step).volume()) * p.ci;
    const double weights = static_cast<double>(p.blocks_k) * count.volume() * p.bn * p.bk;
    bytes += (slab + (p.resident ? weights / p.tiles_a_group : weights)) * element;
    outputs += static_cast<double>(kTileVoxels) * p.co / p.blocks_n;
  }
  return bytes / outputs + element;
}

}  // namespace fastfilm::cuda
