// The choice of a layout for warpgroup products.
#include "layout.h"

#include <algorithm>
#include <limits>

#include "../extents.h"

namespace fastfilm::cuda::sm90 {
namespace {

constexpr int kWarps = kConsumers / 32;
// Clocks, read off the machine code where they are not those of the tensor cores (benchmarks/counted/machine_code): the
// products of a slice with both halves; what a plane takes to be brought, beside its voxels; a voxel's 8 channels; an epilogue.
struct Clocks {
  double plane, chunk, epilogue;
};
constexpr double kSliceClocks = 128;
constexpr Clocks kForwardClocks{900, 1.8, 5500}, kBackwardClocks{900, 3.5, 5500};

// What the planner may choose.
struct Choice {
  int shifts, bk;
  Extent half, pair;
  bool resident;
  int slices;  // that come at a time
};

Extent plane_of(const Layout& p, const Reads& r) {
  return {1, kLines * p.shifts + r.count.h - 1 + p.half.h, 8 + r.count.w - 1 + p.half.w};
}

int taps_of(const Layout& p, const Reads& r) { return r.count.d * p.plane_taps(r); }

// Stages of `slices` slices that the weights of a result take, plane after plane.
int stages_of(const Layout& p, const Result& result, int slices) {
  int stages = 0;
  for (int k = 0; k < p.blocks_k; ++k)
    for (int r = result.begin; r < result.end; ++r) {
      stages += p.reads[r].count.d * up(p.plane_taps(p.reads[r]) * p.slices_of(k), slices);
    }
  return stages;
}

// Lays out shared memory; false if it does not fit.
bool fits(Layout& p, const Choice& choice, bool backward, int most) {
  p.shifts = choice.shifts;
  p.shifts_log2 = p.shifts / 2;
  p.bn = kRows / p.shifts;
  p.bk = choice.bk;
  p.half = choice.half;
  p.pair = choice.pair;
  p.resident = choice.resident;
  p.blocks_n = up(p.co, p.bn);
  p.blocks_k = up(p.ci, p.bk);
  p.last_slices = up(p.ci - (p.blocks_k - 1) * p.bk, 16);
  int voxels = 0, planes = 2;
  p.packed = 0;
  for (int c = 0; c < p.classes; ++c) {
    Result& result = p.result[c];
    result.taps = 0;
    for (int r = result.begin; r < result.end; ++r) {
      Reads& reads = p.reads[r];
      const Extent size = plane_of(p, reads);
      voxels = std::max(voxels, size.volume());
      planes = std::max(planes, reads.count.d + 1);
      reads.slab = {size, size.volume(), 0, ((1u << 22) + size.w - 1) / size.w, 0};
      reads.first_tap = result.taps;
      result.taps += taps_of(p, reads);
    }
    const Extent unit{1 + p.pair.d, kLines * p.shifts + p.half.h + p.pair.h, 8 + p.half.w + p.pair.w};
    result.units = map(result.size, unit, [](int n, int by) { return up(n, by); });
    result.weights = p.packed;
    p.packed += static_cast<int64_t>(p.blocks_n) * result.taps * ((p.blocks_k - 1) * (p.bk / 16) + p.last_slices);
  }
  p.packed *= kSliceBytes / 2;
  if (voxels > 4096) return false;
  p.stage_slices = choice.slices;
  const int stage = p.stage_slices * kSliceBytes;
  int all = 0;
  for (int c = 0; c < p.classes; ++c) all = std::max(all, stages_of(p, p.result[c], p.stage_slices));
  p.slots = planes + 2;
  p.chunk_bytes = (voxels | 1) * 16;  // an odd number of 16 bytes keeps the chunks of a voxel in different banks
  p.slab_bytes = p.bk / 8 * p.chunk_bytes;
  // the threads read so many numbers at a time to copy, three eighths of them to transform
  const int few = 4096 / p.bk;
  p.numbers = up(voxels + few / 4, few) * few;
  for (Reads& r : p.reads) r.slab.numbers = p.numbers;
  p.staging_bytes = (backward ? kAhead : 1) * kStagingBytes;
  const int rest = align(p.slots * p.slab_bytes) + (backward ? 2 : 0) * p.slab_bytes + kWarps * p.staging_bytes +
                   3 * p.numbers * 4 + 7 * p.blocks_k * p.bk * 4 + 10 * kRows * 4 + kPumpBytes + 128;
  const int left = (most - rest - 16 * p.slots) / (stage + 16);
  if (p.resident ? left < all : left < 3) return false;
  p.stages = p.resident ? all : std::min({left, all, 4});
  p.slabs_at = p.stages * stage;
  p.beside_at = align(p.slabs_at + p.slots * p.slab_bytes);
  p.staging_at = align(p.beside_at + (backward ? 2 : 0) * p.slab_bytes);
  p.tables_at = p.staging_at + kWarps * p.staging_bytes;
  p.inputs_at = p.tables_at + 3 * p.numbers * 4;
  p.outputs_at = p.inputs_at + 7 * p.blocks_k * p.bk * 4;
  p.barriers_at = p.outputs_at + 10 * kRows * 4;
  p.pump_at = p.barriers_at + 16 * (p.slots + p.stages);
  p.shared_bytes = p.pump_at + kPumpBytes;
  return p.shared_bytes <= most;
}

// Clocks of all units of a sample, about: the slowest of products, of what is brought and of the epilogues. With all weights
// in shared memory an epilogue hides behind the products of the other warpgroup; else in part.
double clocks(const Layout& p, const Clocks& of) {
  double sum = 0;
  for (int c = 0; c < p.classes; ++c) {
    const Result& result = p.result[c];
    double products = 0, bring = 0;
    for (int r = result.begin; r < result.end; ++r) {
      const Reads& reads = p.reads[r];
      const double slices = (p.blocks_k - 1) * (p.bk / 16) + p.last_slices;
      products += 2 * kSliceClocks * slices * taps_of(p, reads);
      bring += (of.plane + of.chunk * reads.slab.voxels * p.bk / 8) * (reads.count.d + 1) * p.blocks_k;
    }
    // stages that are not full cost a wait each
    products += 60.0 * stages_of(p, result, p.stage_slices);
    const double shared = p.resident ? products : 1.1 * products + of.epilogue / 2;
    const double multiply = std::max(shared, products / 2 + of.epilogue);
    sum += (std::max(multiply, bring) + 0.2 * std::min(multiply, bring)) *
           static_cast<double>(voxels_of(result.units)) * p.blocks_n;
  }
  return sum;
}

// Shares the units of a sample out to blocks so that the multiprocessors are done at about the same time.
void share_out(Layout& p, const Device& device) {
  int64_t units = 1;
  for (int c = 0; c < p.classes; ++c) units = std::max(units, voxels_of(p.result[c].units));
  const int64_t others = p.n * p.classes * p.blocks_n, most = std::min<int64_t>(units, 4 * device.multiprocessors);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t groups = 1; groups <= most; ++groups) {
    const int64_t each = (units + groups - 1) / groups;
    const int64_t waves = (groups * others + device.multiprocessors - 1) / device.multiprocessors;
    if (waves * (each + 1) < least) {  // a block's beginning and end take about a unit
      least = waves * (each + 1);
      p.units_a_group = static_cast<int>(each);
    }
  }
  p.groups = up(units, p.units_a_group);
}

}  // namespace

std::string lay_out(const ConvShape& s, Direction direction, const Device& device, Layout& layout) {
  if (bytes_of(s.storage) != 2) return "warpgroup products take float16 and bfloat16";
  const bool backward = direction == Direction::kBackward;
  Layout p{};
  p.n = s.n;
  p.ci = backward ? s.co : s.ci;
  p.co = backward ? s.ci : s.co;
  p.in = backward ? s.out : s.in;
  p.out = backward ? s.in : s.out;
  const Extent step{s.dims == 3 ? s.stride : 1, s.stride, s.stride}, one{1, 1, 1};
  p.load_step = backward ? one : step;
  p.out_step = backward ? step : one;
  p.kernel_step = backward ? -s.stride : s.stride;
  int boxes = 0;
  if (!backward) p.result[p.classes++] = {{0, 0, 0}, p.out, {}, 0, 0, 0, 0};
  for (int d = 0; d < step.d; ++d)
    for (int h = 0; h < step.h; ++h)
      for (int w = 0; w < step.w; ++w) {
        Box box;
        if (backward) {
          box = backward_box(s, {d, h, w});
          p.result[p.classes] = {box.out_first, {}, {}, boxes, boxes, 0, 0};
          for (int i = 0; i < 3; ++i) {
            axis(p.result[p.classes].size, i) = up(std::max(0, axis(p.out, i) - axis(box.out_first, i)), axis(step, i));
          }
        } else {
          const Extent first{d, h, w};
          box = {{}, {d - s.padding.d, h - s.padding.h, w - s.padding.w}, {0, 0, 0}, first};
          for (int i = 0; i < 3; ++i) {
            axis(box.count, i) = std::max(0, up(axis(s.kernel, i) - axis(first, i), axis(step, i)));
          }
        }
        if (box.count.volume() > 0) {
          p.reads[boxes++] = {box, 0, {}};
          p.result[backward ? p.classes : 0].end = boxes;
        }
        p.classes += backward;
      }

  const int wide = kLines;  // rows of a half
  double least = std::numeric_limits<double>::max();
  for (const int shifts : {1, 2, 4}) {
    if (shifts > 1 && kRows / shifts < std::min(p.co, kRows)) continue;
    for (const int bk : {64, 32, 16})
      for (const Extent& half : {Extent{0, 0, 8}, Extent{0, wide * shifts, 0}})
        for (const bool resident : {true, false})
          for (const int slices : {6, 4, 3})
            for (const bool below : {false, true}) {
              if (bk > 16 && bk / 2 >= p.ci) continue;
              if (below && s.dims == 3) continue;
              const Extent pair = s.dims == 3 ? Extent{1, 0, 0}
                                  : below     ? Extent{0, wide * shifts + half.h, 0}
                                              : Extent{0, 0, 8 + half.w};
              Layout q = p;
              if (!fits(q, {shifts, bk, half, pair, resident, slices}, backward, device.shared_bytes)) continue;
              const double cost = clocks(q, backward ? kBackwardClocks : kForwardClocks);
              if (cost < least) {
                least = cost;
                layout = q;
              }
            }
  }
  if (least == std::numeric_limits<double>::max()) {
    return "no plane fits into " + std::to_string(device.shared_bytes) + " bytes of shared memory";
  }
  if (voxels_of(p.out) > std::numeric_limits<int>::max()) return "a sample has too many voxels";
  share_out(layout, device);
  return "";
}

double useful(const Layout& p) {
  double done = 0, wanted = 0;
  for (int c = 0; c < p.classes; ++c) {
    const Result& result = p.result[c];
    const double slices = (p.blocks_k - 1) * (p.bk / 16) + p.last_slices;
    const double products = 4.0 * kRows * kLines * 8 * 16 * slices * result.taps;
    done += products * static_cast<double>(voxels_of(result.units)) * p.blocks_n;
    for (int r = result.begin; r < result.end; ++r) {
      wanted += static_cast<double>(voxels_of(result.size)) * p.ci * p.co * p.reads[r].count.volume();
    }
  }
  return done > 0 ? wanted / done : 0;
}

// By the rates of both: with a third of the tensor cores' work these reach what mma.sync reaches with all of its own.
bool wins(const Layout& layout) { return useful(layout) >= 0.2; }

}  // namespace fastfilm::cuda::sm90
