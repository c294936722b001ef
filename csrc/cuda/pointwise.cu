// The kernels of the passes over a map; pointwise.h has their formulas.
#include "pointwise.h"

#include <algorithm>

#include "affine.h"
#include "merge_partials.h"

namespace fastfilm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxGroups = 32;
constexpr int kBatch = 4;
constexpr int kRowsAThread = 16;  // fewer where the map is small, more where partial results would be many
constexpr int kMaxSlots = 4096;   // partial results of all samples together

int lanes(int storage) { return storage == kFloat32 ? 4 : 8; }

// A block has `groups` columns of chunks and kThreads / groups rows of voxels, and walks over `span` voxels.
struct Walk {
  int groups, blocks;
  int64_t span;
  Grid grid;
};

Walk walk_over(const Map& map) {
  const int64_t chunks = (map.c + lanes(map.storage) - 1) / lanes(map.storage);
  int groups = 1;
  while (groups < chunks && groups < kMaxGroups) groups *= 2;
  const int64_t rows = kThreads / groups;
  int64_t blocks = (map.s + rows * kRowsAThread - 1) / (rows * kRowsAThread);
  blocks = std::max<int64_t>(1, std::min(blocks, kMaxSlots / std::max<int64_t>(1, map.n)));
  int64_t span = (map.s + blocks - 1) / blocks;
  span = (span + rows - 1) / rows * rows;
  blocks = (map.s + span - 1) / span;
  return {groups,
          static_cast<int>(blocks),
          span,
          {static_cast<int>(blocks), static_cast<int>((chunks + groups - 1) / groups), static_cast<int>(map.n)}};
}

template <class T>
bool aligned(const Map& map, std::initializer_list<const void*> pointers) {
  if (map.c % kLanes<T>) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// The share of a thread: its chunk of channels and the voxels that it visits.
struct Place {
  int64_t n, first, last, step, channel;
  int valid, groups;

  FF_DEVICE Place(int groups, int64_t span, int64_t s, int64_t c, int v) : groups(groups) {
    const Grid block = block_index();
    const int t = thread_index();
    n = block.z;
    channel = (static_cast<int64_t>(block.y) * groups + t % groups) * v;
    const int64_t left = c - channel;
    valid = left >= v ? v : left > 0 ? static_cast<int>(left) : 0;
    first = block.x * span;
    last = valid == 0 ? first : first + span < s ? first + span : s;
    first += t / groups;
    step = kThreads / groups;
  }
  FF_DEVICE bool writes_partials() const { return thread_index() < groups && valid > 0; }
};

// The next voxels of a thread, loaded before the first of them is used.
template <class T>
struct Batch {
  int64_t at[kBatch];
  bool in[kBatch];

  FF_DEVICE Batch(const Place& place, int64_t voxel, int64_t s, int64_t c) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      in[j] = voxel + j * place.step < place.last;
      at[j] = (place.n * s + voxel + j * place.step) * c + place.channel;
    }
  }
  FF_DEVICE void load(const T* map, int valid, bool aligned, Word16 (&words)[kBatch]) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) words[j] = in[j] ? load_chunk(map + at[j], valid, aligned) : Word16{};
  }
};

template <class T>
struct Apply {
  struct Params {
    const T* y;
    const float* coef;
    T* v;
    int64_t n, s, c, span;
    int groups, act;
    bool aligned;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 2;

  static FF_DEVICE void run(const Params& p) {
    constexpr int kV = kLanes<T>;
    const Place at(p.groups, p.span, p.s, p.c, kV);
    Coefficients<kV> coef;
    coef.load(p.coef + at.n * p.c + at.channel, p.n * p.c, at.valid);
    for (int64_t voxel = at.first; voxel < at.last; voxel += kBatch * at.step) {
      const Batch<T> here(at, voxel, p.s, p.c);
      Word16 y[kBatch];
      here.load(p.y, at.valid, p.aligned, y);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        float v[kV];
        unpack16<T>(y[j], v);
        coef.apply(v, p.act);
        if (here.in[j]) store_chunk(p.v + here.at[j], at.valid, p.aligned, v);
      }
    }
  }
};

template <class T>
struct ApplyBackward {
  struct Params {
    const T *dv, *y;
    const float* coef;
    T* dy;
    float* partials;  // [N, blocks, 5, C]
    int64_t n, s, c, span;
    int groups, act;
    bool aligned;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 1;
  using State = Sums<kCoefSums, kLanes<T>>;

  static FF_DEVICE void run(const Params& p) {
    constexpr int kV = kLanes<T>;
    const Place at(p.groups, p.span, p.s, p.c, kV);
    Coefficients<kV> coef;
    coef.load(p.coef + at.n * p.c + at.channel, p.n * p.c, at.valid);
    State sums;
    sums.clear();
    for (int64_t voxel = at.first; voxel < at.last; voxel += kBatch * at.step) {
      const Batch<T> here(at, voxel, p.s, p.c);
      Word16 dv_raw[kBatch], y_raw[kBatch];
      here.load(p.dv, at.valid, p.aligned, dv_raw);
      here.load(p.y, at.valid, p.aligned, y_raw);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (!here.in[j]) continue;
        float dv[kV], y[kV];
        unpack16<T>(dv_raw[j], dv);
        unpack16<T>(y_raw[j], y);
        const auto copy = [](const float (&from)[kV]) {
          return [&from](float (&to)[kV]) {
#pragma unroll
            for (int i = 0; i < kV; ++i) to[i] = from[i];
          };
        };
        float dy[kV];
        affine_backward(coef, copy(y), p.act, copy(dv), dy, sums);
        if (p.dy) store_chunk(p.dy + here.at[j], at.valid, p.aligned, dy);
      }
    }
    merge_rows<kThreads>(sums, shared_memory(), p.groups);
    if (!at.writes_partials()) return;
    float* out = p.partials + (at.n * grid_size().x + block_index().x) * kCoefSums * p.c + at.channel;
#pragma unroll
    for (int r = 0; r < kCoefSums; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i)
        if (i < at.valid) out[r * p.c + i] = sums.row[r][i];
  }
};

// Shift and slope of the activation in front of the norm, of kV channels.
template <int kV>
FF_DEVICE void load_pre(const float* pre, int64_t c, int valid, float (&shift)[kV], float (&slope)[kV]) {
#pragma unroll
  for (int i = 0; i < kV; ++i) {
    const bool present = pre && i < valid;
    shift[i] = present ? pre[i] : 0.0f;
    slope[i] = present ? pre[c + i] : 0.0f;
  }
}

template <class T>
struct MomentsOf {
  struct Params {
    const T* y;
    const float* pre;
    float *partials, *counts;  // [N, blocks, 2, C] and [N, blocks]
    int64_t s, c, span;
    int groups, act;
    bool aligned;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 2;
  using State = Moments<kLanes<T>>;

  static FF_DEVICE void run(const Params& p) {
    constexpr int kV = kLanes<T>;
    const Place at(p.groups, p.span, p.s, p.c, kV);
    float shift[kV], slope[kV];
    load_pre(p.pre ? p.pre + at.channel : nullptr, p.c, at.valid, shift, slope);
    State state;
    state.clear();
    for (int64_t voxel = at.first; voxel < at.last; voxel += kBatch * at.step) {
      const Batch<T> here(at, voxel, p.s, p.c);
      Word16 y[kBatch];
      here.load(p.y, at.valid, p.aligned, y);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        float u[kV];
        unpack16<T>(y[j], u);
#pragma unroll
        for (int i = 0; i < kV; ++i) u[i] += shift[i];
        activate(u, slope, p.act);
        if (here.in[j]) state.add(u);
      }
    }
    merge_rows<kThreads>(state, shared_memory(), p.groups);
    if (!at.writes_partials()) return;
    const int64_t slot = at.n * grid_size().x + block_index().x;
    float* out = p.partials + slot * 2 * p.c + at.channel;
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      if (i < at.valid) {
        out[i] = state.mean[i];
        out[p.c + i] = state.m2[i];
      }
    }
    if (at.channel == 0) p.counts[slot] = state.count;
  }
};

template <class T>
struct MomentsBackward {
  struct Params {
    const T *dy, *y;
    const float *dstats, *stats, *pre;
    T* e;
    float* partials;  // [N, blocks, 2, C]; null: not wanted
    int64_t n, s, c, span;
    int groups, act;
    bool aligned;
  };
  static constexpr int kThreads = cuda::kThreads, kMinBlocks = 1;
  using State = Sums<2, kLanes<T>>;

  static FF_DEVICE void run(const Params& p) {
    constexpr int kV = kLanes<T>;
    const Place at(p.groups, p.span, p.s, p.c, kV);
    float shift[kV], slope[kV], mean[kV], dmean[kV], dvar[kV];
    load_pre(p.pre ? p.pre + at.channel : nullptr, p.c, at.valid, shift, slope);
    const int64_t nc = at.n * p.c + at.channel;
    const float scale = 1.0f / static_cast<float>(p.s);
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      const bool present = i < at.valid;
      mean[i] = present ? p.stats[nc + i] : 0.0f;
      dmean[i] = present ? p.dstats[nc + i] * scale : 0.0f;
      dvar[i] = present ? p.dstats[p.n * p.c + nc + i] * (2 * scale) : 0.0f;
    }
    State sums;
    sums.clear();
    for (int64_t voxel = at.first; voxel < at.last; voxel += kBatch * at.step) {
      const Batch<T> here(at, voxel, p.s, p.c);
      Word16 y_raw[kBatch], dy_raw[kBatch] = {};
      here.load(p.y, at.valid, p.aligned, y_raw);
      if (p.dy) here.load(p.dy, at.valid, p.aligned, dy_raw);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (!here.in[j]) continue;
        float y[kV], e[kV];
        unpack16<T>(y_raw[j], y);
        unpack16<T>(dy_raw[j], e);
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          float slope_z, slope_s;
          const float u = activate(y[i] + shift[i], slope[i], p.act, slope_z, slope_s);
          const float du = dmean[i] + (u - mean[i]) * dvar[i];
          e[i] += du * slope_z;
          // one sum of dy + du * slope_z, since the sums of both terms nearly cancel
          sums.row[0][i] += e[i];
          sums.row[1][i] += du * slope_s;
          e[i] = dithered<T>(e[i], here.at[j] + i);
        }
        store_chunk(p.e + here.at[j], at.valid, p.aligned, e);
      }
    }
    if (!p.partials) return;
    merge_rows<kThreads>(sums, shared_memory(), p.groups);
    if (!at.writes_partials()) return;
    float* out = p.partials + (at.n * grid_size().x + block_index().x) * 2 * p.c + at.channel;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < kV; ++i)
        if (i < at.valid) out[r * p.c + i] = sums.row[r][i];
  }
};

template <class State>
constexpr int scratch() {
  return kThreads * static_cast<int>(sizeof(State));
}

// f<T>() for the storage type of a map.
#define FF_FOR_STORAGE(storage, T, ...) \
  switch (storage) {                    \
    case kBFloat16: {                   \
      using T = BFloat16;               \
      __VA_ARGS__                       \
    }                                   \
    case kFloat16: {                    \
      using T = Float16;                \
      __VA_ARGS__                       \
    }                                   \
    default: {                          \
      using T = float;                  \
      __VA_ARGS__                       \
    }                                   \
  }

template <class T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}

}  // namespace

Device device() { return query_device(); }

int64_t reduction_workspace(const Map& map) {
  // `apply_backward` needs most, five sums a slot; `moments` has two and a count
  return map.n * walk_over(map).blocks * (kCoefSums * map.c + 1);
}

std::string apply(const Map& m, const void* y, const float* coef, void* v) {
  const Walk w = walk_over(m);
  FF_FOR_STORAGE(m.storage, T, {
    return launched("apply", launch<Apply<T>>(w.grid, 0, m.stream,
                                              {in<T>(y), coef, static_cast<T*>(v), m.n, m.s, m.c, w.span, w.groups,
                                               m.act, aligned<T>(m, {y, v})}));
  })
}

std::string apply_backward(const Map& m, const void* dv, const void* y, const float* coef, void* dy, float* dcoef,
                           float* workspace) {
  const Walk w = walk_over(m);
  FF_FOR_STORAGE(m.storage, T, {
    const std::string failure = launched(
        "apply_backward", launch<ApplyBackward<T>>(w.grid, scratch<typename ApplyBackward<T>::State>(), m.stream,
                                                   {in<T>(dv), in<T>(y), coef, static_cast<T*>(dy), workspace, m.n, m.s,
                                                    m.c, w.span, w.groups, m.act, aligned<T>(m, {dv, y, dy})}));
    if (!failure.empty()) return failure;
    return finish_coefficients(workspace, coef, m.n, w.blocks, m.c, dcoef, m.stream);
  })
}

std::string moments(const Map& m, const void* y, const float* pre, float* stats, float* workspace) {
  const Walk w = walk_over(m);
  float* counts = workspace + m.n * w.blocks * 2 * m.c;
  FF_FOR_STORAGE(m.storage, T, {
    const std::string failure = launched(
        "moments", launch<MomentsOf<T>>(w.grid, scratch<typename MomentsOf<T>::State>(), m.stream,
                                        {in<T>(y), pre, workspace, counts, m.s, m.c, w.span, w.groups,
                                         pre ? m.act : kNone, aligned<T>(m, {y})}));
    if (!failure.empty()) return failure;
    return finish_moments(workspace, counts, m.n, w.blocks, m.c, stats, m.stream);
  })
}

std::string moments_backward(const Map& m, const void* dy, const float* dstats, const void* y, const float* stats,
                             const float* pre, void* e, float* dpre, float* workspace) {
  const Walk w = walk_over(m);
  FF_FOR_STORAGE(m.storage, T, {
    const std::string failure = launched(
        "moments_backward", launch<MomentsBackward<T>>(
                                w.grid, scratch<typename MomentsBackward<T>::State>(), m.stream,
                                {in<T>(dy), in<T>(y), dstats, stats, pre, static_cast<T*>(e), pre ? workspace : nullptr,
                                 m.n, m.s, m.c, w.span, w.groups, pre ? m.act : kNone, aligned<T>(m, {dy, y, e})}));
    if (!failure.empty() || !pre) return failure;
    return sum_rows(workspace, m.n * w.blocks, 2 * m.c, dpre, m.stream);
  })
}

}  // namespace fastfilm::cuda
