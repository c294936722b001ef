// The algebra of a block's coefficients, in double; coefficients.h has the interface.
#include "coefficients.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace fastfilm {
namespace {

float widen_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t narrow_bf16(double value) {
  const float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double widen_f16(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  double value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                 : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                : std::ldexp(mantissa, -24);
  return h & 0x8000 ? -value : value;
}

uint16_t narrow_f16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (value != value) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size == 0) return sign;
  const int exponent = std::max(std::ilogb(size), -14);
  // nearbyint rounds to even; a mantissa that reaches 2048 carries into the exponent by itself
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + mantissa);
}

template <class T, class F>
void read_as(const void* data, int64_t count, double* to, const F& widen) {
  const T* from = static_cast<const T*>(data);
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

void read(const Numbers& from, int64_t count, double* to) {
  const auto plain = [](auto x) { return static_cast<double>(x); };
  switch (from.type) {
    case kFloat32:
      return read_as<float>(from.data, count, to, plain);
    case kFloat64:
      return read_as<double>(from.data, count, to, plain);
    case kBFloat16:
      return read_as<uint16_t>(from.data, count, to, widen_bf16);
    default:
      return read_as<uint16_t>(from.data, count, to, widen_f16);
  }
}

template <class T, class F>
void write_as(void* data, int64_t count, const double* from, const F& narrow) {
  T* to = static_cast<T*>(data);
  for (int64_t i = 0; i < count; ++i) to[i] = narrow(from[i]);
}

// Rounds to nearest even.
void write(const Numbers& to, const std::vector<double>& from) {
  if (!to) return;
  const auto count = static_cast<int64_t>(from.size());
  switch (to.type) {
    case kFloat32:
      return write_as<float>(to.data, count, from.data(), [](double x) { return static_cast<float>(x); });
    case kFloat64:
      return write_as<double>(to.data, count, from.data(), [](double x) { return x; });
    case kBFloat16:
      return write_as<uint16_t>(to.data, count, from.data(), narrow_bf16);
    default:
      return write_as<uint16_t>(to.data, count, from.data(), narrow_f16);
  }
}

// A vector [rows][C] in double. One row may be shared by all samples; without `numbers` it holds `absent`.
class Rows {
 public:
  Rows(const Numbers& numbers, int64_t rows, int64_t c, double absent)
      : present_(static_cast<bool>(numbers)), pitch_(numbers && rows > 1 ? c : 0) {
    values_.resize(pitch_ ? rows * c : c, absent);
    if (numbers) read(numbers, static_cast<int64_t>(values_.size()), values_.data());
  }
  double operator()(int64_t i, int64_t c) const { return values_[i * pitch_ + c]; }
  explicit operator bool() const { return present_; }

 private:
  bool present_;
  int64_t pitch_;
  std::vector<double> values_;
};

// A block's inputs and the statistics of its norm, all [N][C] in double: the centre and 1/sqrt(variance + eps) of
// scale * (y + shift), and the pivot, a constant near the mean of y that is a number of the coefficients' type.
class Block {
 public:
  Block(const BlockShape& shape, const BlockTensors& in, Storage precision)
      : shape(shape),
        in(in),
        first(shape.order != kActNormFilm),
        weight(in.norm_weight, 1, shape.c, 1.0),
        bias(in.norm_bias, 1, shape.c, 0.0),
        shift(first ? in.conv_bias : Numbers{}, 1, shape.c, 0.0),
        scale(shape.position == kDropoutNorm ? in.mask : Numbers{}, in.mask_rows, shape.c, 1.0),
        before_film(shape.position == kDropoutFilm ? in.mask : Numbers{}, in.mask_rows, shape.c, 1.0),
        at_end(shape.position == kDropoutEnd ? in.mask : Numbers{}, in.mask_rows, shape.c, 1.0),
        gamma(in.gamma, in.gamma_rows, shape.c, 1.0),
        beta(in.beta, in.beta_rows, shape.c, 0.0),
        wide(precision == kFloat64) {
    if (shape.norm == kNormNone) return;
    const int64_t size = shape.n * shape.c;
    centre.resize(size);
    variance.resize(size);
    inverse.resize(size);
    pivot.resize(size);
    if (shape.use_input) {
      stats.resize(2 * size);
      read(in.stats, 2 * size, stats.data());
      from_moments();
    } else {
      const Rows mean(in.running_mean, 1, shape.c, 0.0), var(in.running_var, 1, shape.c, 1.0);
      for (int64_t i = 0; i < shape.n; ++i) {
        for (int64_t c = 0; c < shape.c; ++c) {
          const int64_t at = i * shape.c + c;
          centre[at] = mean(0, c);
          variance[at] = var(0, c);
          pivot[at] = rounded(centre[at] - shift(i, c));
        }
      }
    }
    for (int64_t at = 0; at < size; ++at) inverse[at] = 1.0 / std::sqrt(variance[at] + shape.eps);
  }

  double mean(int64_t i, int64_t c) const { return (stats[i * shape.c + c] + shift(i, c)) * scale(i, c); }

  // Calls f(first sample, end, first channel, end) for every set of maps that share their statistics.
  template <class F>
  void each_set(const F& f) const {
    if (shape.norm == kNormBatch) {
      for (int64_t c = 0; c < shape.c; ++c) f(0, shape.n, c, c + 1);
      return;
    }
    const int64_t groups = shape.norm == kNormInstance ? shape.c : shape.groups;
    const int64_t width = shape.c / groups;
    for (int64_t i = 0; i < shape.n; ++i) {
      for (int64_t g = 0; g < groups; ++g) f(i, i + 1, g * width, (g + 1) * width);
    }
  }

  // k and offset of the norm as an affine of (y - pivot), before dropout's scale.
  double factor(int64_t at, int64_t c) const { return inverse[at] * weight(0, c); }
  double lifted(int64_t at, int64_t i, int64_t c) const { return (pivot[at] + shift(i, c)) * scale(i, c); }

  const BlockShape& shape;
  const BlockTensors& in;
  const bool first;  // the norm comes before the activation
  Rows weight, bias, shift, scale, before_film, at_end, gamma, beta;
  const bool wide;
  std::vector<double> stats, centre, variance, inverse, pivot;

 private:
  double rounded(double x) const { return wide ? x : static_cast<float>(x); }

  void from_moments() {
    const int64_t size = shape.n * shape.c;
    each_set([&](int64_t i0, int64_t i1, int64_t c0, int64_t c1) {
      const double count = static_cast<double>((i1 - i0) * (c1 - c0));
      double sum = 0, spread = 0;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t c = c0; c < c1; ++c) sum += mean(i, c);
      }
      const double m = sum / count;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          const double s = scale(i, c), d = mean(i, c) - m;
          spread += stats[size + i * shape.c + c] * s * s + d * d;
        }
      }
      const bool shared = shape.norm == kNormBatch && !scale;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t at = i * shape.c + c;
          centre[at] = m;
          variance[at] = spread / count;
          pivot[at] = shared ? rounded(m - shift(i, c)) : stats[at];
        }
      }
    });
  }
};

// Moves the running statistics: batch norm's towards those of all samples together, instance norm's towards the average
// of the samples' own.
void update_running(const Block& block) {
  const BlockShape& shape = block.shape;
  const double values = shape.norm == kNormBatch ? shape.n * shape.count : shape.count;
  const double unbiased = values / std::max(values - 1, 1.0);
  std::vector<double> running_mean(shape.c), running_var(shape.c);
  read(block.in.running_mean, shape.c, running_mean.data());
  read(block.in.running_var, shape.c, running_var.data());
  for (int64_t c = 0; c < shape.c; ++c) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < shape.n; ++i) {
      mean += block.centre[i * shape.c + c] / shape.n;
      variance += block.variance[i * shape.c + c] / shape.n;
    }
    running_mean[c] += shape.momentum * (mean - running_mean[c]);
    running_var[c] += shape.momentum * (variance * unbiased - running_var[c]);
  }
  write(block.in.running_mean, running_mean);
  write(block.in.running_var, running_var);
}

double one_slope(const BlockShape& shape, const BlockTensors& in) {
  double slope = shape.slope;
  if (in.slope && in.slope_count == 1) read(in.slope, 1, &slope);
  return slope;
}

}  // namespace

void block_coefficients(const BlockShape& shape, const BlockTensors& in, const Numbers& coef) {
  const Block block(shape, in, coef.type);
  const bool normed = shape.norm != kNormNone;
  const int64_t size = shape.n * shape.c;
  const Rows conv_bias(in.conv_bias, 1, shape.c, 0.0);
  const Rows slope(in.slope_count > 1 ? in.slope : Numbers{}, 1, shape.c, one_slope(shape, in));
  std::vector<double> out(kCoefRows * size);
  for (int64_t i = 0; i < shape.n; ++i) {
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t at = i * shape.c + c;
      double k = 1, offset = block.shift(i, c), p = 0;
      if (normed) {
        const double factor = block.factor(at, c);
        k = factor * block.scale(i, c);
        offset = (block.lifted(at, i, c) - block.centre[at]) * factor + block.bias(0, c);
        p = block.pivot[at];
      }
      const double film = block.gamma(i, c) * block.before_film(i, c), beta = block.beta(i, c);
      const double end = block.at_end(i, c);
      double row[kCoefRows] = {1, 0, end, 0, 0, 0, slope(0, c)};
      if (shape.order == kNormFilmAct) {
        row[kA] = k * film;
        row[kB] = offset * film + beta;
        row[kP] = p;
      } else if (shape.order == kNormActFilm) {
        row[kA] = k;
        row[kB] = offset;
        row[kP] = p;
        row[kG] = film * end;
        row[kS] = beta * end;
      } else {
        row[kB] = conv_bias(0, c);
        row[kG] = k * film * end;
        row[kS] = (offset * film + beta) * end;
        row[kQ] = p;
      }
      for (int64_t r = 0; r < kCoefRows; ++r) out[r * size + at] = row[r];
    }
  }
  write(coef, out);
  if (shape.update) update_running(block);
}

void block_coefficients_backward(const BlockShape& shape, const BlockTensors& in, const Numbers& dcoef,
                                 const BlockTensors& out) {
  const Block block(shape, in, dcoef.type);
  const bool normed = shape.norm != kNormNone;
  const int64_t size = shape.n * shape.c;
  std::vector<double> dcentre(size), dvariance(size), dstats(2 * size), d(kCoefRows * size);
  std::vector<double> dweight(shape.c), dbias(shape.c), dshift(shape.c), dslope(shape.c);
  const int64_t gamma_pitch = in.gamma_rows > 1 ? shape.c : 0, beta_pitch = in.beta_rows > 1 ? shape.c : 0;
  std::vector<double> dgamma(in.gamma_rows * shape.c), dbeta(in.beta_rows * shape.c);
  read(dcoef, kCoefRows * size, d.data());
  for (int64_t i = 0; i < shape.n; ++i) {
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t at = i * shape.c + c;
      double row[kCoefRows];
      for (int64_t r = 0; r < kCoefRows; ++r) row[r] = d[r * size + at];
      const double before = block.before_film(i, c), film = block.gamma(i, c) * before;
      const double end = block.at_end(i, c), s = block.scale(i, c);
      const double factor = normed ? block.factor(at, c) : 1.0;
      const double away = normed ? block.lifted(at, i, c) - block.centre[at] : 0.0;
      const double k = factor * s, offset = normed ? away * factor + block.bias(0, c) : block.shift(i, c);
      double dk, doffset, dfilm, dbeta_here;
      if (shape.order == kNormActFilm) {
        dk = row[kA];
        doffset = row[kB];
        dfilm = row[kG] * end;
        dbeta_here = row[kS] * end;
      } else {
        const bool act_first = shape.order == kActNormFilm;
        const double dproduct = act_first ? row[kG] * end : row[kA];
        dbeta_here = act_first ? row[kS] * end : row[kB];
        dk = dproduct * film;
        doffset = dbeta_here * film;
        dfilm = dproduct * k + dbeta_here * offset;
        if (act_first) dshift[c] += row[kB];
      }
      dgamma[i * gamma_pitch + c] += dfilm * before;
      dbeta[i * beta_pitch + c] += dbeta_here;
      dslope[c] += row[kSlope];
      if (!normed) {
        if (block.first) dshift[c] += doffset;
        continue;
      }
      const double dfactor = dk * s + doffset * away;
      dbias[c] += doffset;
      dweight[c] += dfactor * block.inverse[at];
      const double inverse = block.inverse[at];
      dvariance[at] = -0.5 * dfactor * block.weight(0, c) * inverse * inverse * inverse;
      dcentre[at] = -doffset * factor;
      if (block.first) dshift[c] += doffset * factor * s;
    }
  }
  if (normed && shape.use_input) {
    block.each_set([&](int64_t i0, int64_t i1, int64_t c0, int64_t c1) {
      const double count = static_cast<double>((i1 - i0) * (c1 - c0));
      double dc = 0, dv = 0;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          dc += dcentre[i * shape.c + c] / count;
          dv += dvariance[i * shape.c + c] / count;
        }
      }
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t at = i * shape.c + c;
          const double s = block.scale(i, c);
          const double dmean = (dc + 2 * dv * (block.mean(i, c) - block.centre[at])) * s;
          if (block.first) dshift[c] += dmean;
          dstats[at] = dmean;
          dstats[size + at] = dv * s * s;
        }
      }
    });
  }
  write(out.stats, dstats);
  write(out.norm_weight, dweight);
  write(out.norm_bias, dbias);
  write(out.conv_bias, dshift);
  write(out.gamma, dgamma);
  write(out.beta, dbeta);
  if (in.slope_count == 1) dslope = {std::accumulate(dslope.begin(), dslope.end(), 0.0)};
  write(out.slope, dslope);
}

}  // namespace fastfilm
