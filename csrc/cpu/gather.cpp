// Views of a feature map and the gradient of a maximum; gather.h has the interface.
#include "gather.h"

#include <vector>

#include "walk.h"

namespace fastfilm {
namespace {

// Rows of a map with its pending affine applied. The last few are kept, since neighbouring rows of a result read the
// same ones.
template <class R>
class Rows {
 public:
  Rows(const Map& row, const Plan& plan, const Expanded<R>* coef, const void* y, int64_t in_stride, int64_t per_sample,
       int64_t kept)
      : row_(row), plan_(plan), coef_(coef), y_(y), per_sample_(per_sample) {
    bytes_ = row.s * in_stride * plan.itemsize;
    if (coef) {
      memory_.resize(kept * bytes_);
      holds_.assign(kept, -1);
      used_.assign(kept, 0);
    }
  }

  // Begins a result row: the rows that `get` returns from here on, at most kept - 1, stay until the next `begin`.
  void begin() { ++now_; }

  // Row `at` of sample `i`.
  const void* get(int64_t i, int64_t at) {
    const int64_t number = i * per_sample_ + at;
    const void* source = offset(y_, number * bytes_);
    if (!coef_) return source;
    for (size_t slot = 0; slot < holds_.size(); ++slot) {
      if (holds_[slot] != number) continue;
      used_[slot] = now_;
      return memory_.data() + slot * bytes_;
    }
    while (used_[next_] == now_) next_ = (next_ + 1) % holds_.size();
    const size_t slot = next_;
    next_ = (next_ + 1) % holds_.size();
    holds_[slot] = number;
    used_[slot] = now_;
    char* to = memory_.data() + slot * bytes_;
    run(plan_, plan_.kernels.apply[row_.storage][row_.act],
        {source, nullptr, to, 0, 0, 0, 0, coef_->sample(i), plan_.padded, nullptr, 0}, row_.s * row_.c, 0);
    return to;
  }

 private:
  const Map& row_;
  const Plan& plan_;
  const Expanded<R>* coef_;
  const void* y_;
  int64_t per_sample_, bytes_;
  std::vector<char> memory_;
  std::vector<int64_t> holds_, used_;
  int64_t now_ = 0;
  size_t next_ = 0;
};

int64_t most_taps(const Axis& axis) {
  int64_t most = 1;
  for (int64_t x = 0; x < axis.out; ++x) most = std::max(most, axis.start[x + 1] - axis.start[x]);
  return most;
}

// The parts of a gather that all rows of a view share, and the search for the source rows of one of them.
template <class R>
struct Walk {
  Walk(const Map& map, const View& view, const void* coef)
      : view(view),
        row{map.storage, map.act, map.n, view.axis[2].in, map.c, 1},
        plan(row),
        source_rows(view.axis[0].in * view.axis[1].in),
        rows_each(most_taps(view.axis[0]) * most_taps(view.axis[1])) {
    if (coef) expanded.reset(new Expanded<R>(plan, kCoefRows, map.n, map.c, static_cast<const R*>(coef)));
  }

  // Finds the source rows that result row (z, y) of sample i reads, their weights and their numbers.
  void find(Rows<R>& rows, int64_t i, int64_t z, int64_t y, std::vector<const void*>& found,
            std::vector<double>& weight, std::vector<int64_t>* number = nullptr) const {
    const Axis &depth = view.axis[0], &height = view.axis[1];
    rows.begin();
    found.clear();
    weight.clear();
    if (number) number->clear();
    for (int64_t a = depth.start[z]; a < depth.start[z + 1]; ++a) {
      for (int64_t b = height.start[y]; b < height.start[y + 1]; ++b) {
        const int64_t at = depth.index[a] * height.in + height.index[b];
        found.push_back(rows.get(i, at));
        weight.push_back(depth.weight[a] * height.weight[b]);
        if (number) number->push_back(i * source_rows + at);
      }
    }
  }

  const View& view;
  Map row;
  Plan plan;
  std::unique_ptr<Expanded<R>> expanded;
  int64_t source_rows, rows_each;
};

// Whether every position of the result is the position of the map at the same place.
bool is_same(const Axis& axis) {
  bool same = axis.in == axis.out;
  for (int64_t x = 0; same && x < axis.out; ++x) {
    same = axis.start[x] == x && axis.start[x + 1] == x + 1 && axis.index[x] == x && axis.weight[x] == 1.0;
  }
  return same;
}

// Whether no two positions of the result read the same position of the map.
bool disjoint(const Axis& axis) {
  for (int64_t x = 1; x < axis.out; ++x) {
    const int64_t last = axis.start[x], end = axis.start[x + 1];
    if (last > axis.start[x - 1] && end > last && axis.index[last - 1] >= axis.index[last]) return false;
  }
  return true;
}

int threads_for(const Map& map, int64_t elements) { return elements > grain(kParallelFrom) ? map.threads : 1; }

template <class R>
void gather_as(const Map& map, const View& view, const void* y, int64_t in_stride, const void* coef, void* out,
               int64_t out_stride) {
  const Walk<R> walk(map, view, coef);
  const Axis &height = view.axis[1], &width = view.axis[2];
  const int64_t result_rows = view.axis[0].out * height.out;
  const GatherKernel kernel = view.maximum ? walk.plan.kernels.gather_maximum[map.storage]
                                           : walk.plan.kernels.gather_sum[map.storage];
  const int threads = threads_for(map, map.n * result_rows * width.out * map.c);
  const bool same = is_same(width);
  expect_large_pages(out, map.n * result_rows * width.out * out_stride * walk.plan.itemsize);
  // a thread takes consecutive rows, so that it finds the rows that it keeps
  parallel_ranges(map.n * result_rows, threads, [&](int64_t from, int64_t to) {
    Rows<R> rows(walk.row, walk.plan, walk.expanded.get(), y, in_stride, walk.source_rows, 2 * walk.rows_each);
    std::vector<const void*> found;
    std::vector<double> weight;
    std::vector<R> room(view.maximum ? 0 : width.in * map.c + walk.plan.lanes);
    for (int64_t task = from; task < to; ++task) {
      const int64_t i = task / result_rows, at = task % result_rows;
      walk.find(rows, i, at / height.out, at % height.out, found, weight);
      kernel({found.data(), weight.data(), static_cast<int64_t>(found.size()), in_stride, width.start, width.index,
              width.weight, width.out, map.c, offset(out, task * width.out * out_stride * walk.plan.itemsize),
              out_stride, width.in, same, room.data()});
    }
  });
}

template <class R>
void maximum_backward_as(const Map& map, const View& view, const void* y, const void* coef, const void* dout,
                         int64_t dout_stride, void* dv) {
  const Walk<R> walk(map, view, coef);
  const Axis &height = view.axis[1], &width = view.axis[2];
  const int64_t result_rows = view.axis[0].out * height.out, row_bytes = width.in * map.c * walk.plan.itemsize;
  // rows whose windows overlap are taken by one thread
  const int64_t unit = disjoint(view.axis[0]) && disjoint(height) ? 1 : result_rows;
  const int64_t total = map.n * result_rows / std::max<int64_t>(unit, 1);
  const int threads = static_cast<int>(std::clamp<int64_t>(total, 1, threads_for(map, map.n * map.s * map.c)));
  parallel_ranges(total, threads, [&](int64_t from, int64_t to) {
    Rows<R> rows(walk.row, walk.plan, walk.expanded.get(), y, map.c, walk.source_rows, 2 * walk.rows_each);
    std::vector<const void*> found;
    std::vector<double> weight;
    std::vector<int64_t> number;
    std::vector<void*> drows;
    for (int64_t task = from * unit; task < to * unit; ++task) {
      const int64_t i = task / result_rows, at = task % result_rows;
      walk.find(rows, i, at / height.out, at % height.out, found, weight, &number);
      drows.clear();
      for (int64_t n : number) drows.push_back(offset(dv, n * row_bytes));
      walk.plan.kernels.maximum_backward[map.storage](
          {{found.data(), weight.data(), static_cast<int64_t>(found.size()), map.c, width.start, width.index,
            width.weight, width.out, map.c, nullptr, 0, 0, false, nullptr},
           offset(dout, task * width.out * dout_stride * walk.plan.itemsize),
           dout_stride,
           drows.data()});
    }
  });
}

}  // namespace

void gather(const Map& map, const View& view, const void* y, int64_t in_stride, const void* coef, void* out,
            int64_t out_stride) {
  if (map.storage == kFloat64) return gather_as<double>(map, view, y, in_stride, coef, out, out_stride);
  gather_as<float>(map, view, y, in_stride, coef, out, out_stride);
}

void maximum_backward(const Map& map, const View& view, const void* y, const void* coef, const void* dout,
                      int64_t dout_stride, void* dv) {
  if (map.storage == kFloat64) {
    return maximum_backward_as<double>(map, view, y, coef, dout, dout_stride, dv);
  }
  maximum_backward_as<float>(map, view, y, coef, dout, dout_stride, dv);
}

}  // namespace fastfilm
