#include "coefficients.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// Row i of a vector [rows][C] that may be shared by all samples, or `absent` where there is none.
class Rows {
 public:
  Rows(const Numbers& numbers, int64_t rows, int64_t c, double absent)
      : numbers_(numbers), pitch_(rows > 1 ? c : 0), absent_(absent) {}
  double operator()(int64_t i, int64_t c) const {
    return numbers_ ? numbers_[i * pitch_ + c] : absent_;
  }
  explicit operator bool() const { return static_cast<bool>(numbers_); }

 private:
  Numbers numbers_;
  int64_t pitch_;
  double absent_;
};

// The statistics a norm divides by, all [N][C] in double: the centre and 1/sqrt(variance + eps) of
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
      from_moments();
    } else {
      for (int64_t i = 0; i < shape.n; ++i) {
        for (int64_t c = 0; c < shape.c; ++c) {
          const int64_t at = i * shape.c + c;
          centre[at] = in.running_mean[c];
          variance[at] = in.running_var[c];
          pivot[at] = rounded(centre[at] - shift(i, c));
        }
      }
    }
    for (int64_t at = 0; at < size; ++at) inverse[at] = 1.0 / std::sqrt(variance[at] + shape.eps);
  }

  double mean(int64_t i, int64_t c) const {
    return (in.stats[i * shape.c + c] + shift(i, c)) * scale(i, c);
  }

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
  double lifted(int64_t at, int64_t i, int64_t c) const {
    return (pivot[at] + shift(i, c)) * scale(i, c);
  }

  const BlockShape& shape;
  const BlockTensors& in;
  const bool first;  // the norm stands in front of the activation
  Rows weight, bias, shift, scale, before_film, at_end, gamma, beta;
  const bool wide;
  std::vector<double> centre, variance, inverse, pivot;

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
          spread += in.stats[size + i * shape.c + c] * s * s + d * d;
        }
      }
      const bool shared = shape.norm == kNormBatch && !scale;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t at = i * shape.c + c;
          centre[at] = m;
          variance[at] = spread / count;
          pivot[at] = shared ? rounded(m - shift(i, c)) : in.stats[at];
        }
      }
    });
  }
};

// Batch norm keeps the statistics of all samples, instance norm the means of those of each.
void update_running(const Block& block) {
  const BlockShape& shape = block.shape;
  const double values = shape.norm == kNormBatch ? shape.n * shape.count : shape.count;
  const double unbiased = values / std::max(values - 1, 1.0);
  for (int64_t c = 0; c < shape.c; ++c) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < shape.n; ++i) {
      mean += block.centre[i * shape.c + c] / shape.n;
      variance += block.variance[i * shape.c + c] / shape.n;
    }
    const double m = block.in.running_mean[c], v = block.in.running_var[c];
    block.in.running_mean.set(c, m + shape.momentum * (mean - m));
    block.in.running_var.set(c, v + shape.momentum * (variance * unbiased - v));
  }
}

}  // namespace

double Numbers::operator[](int64_t i) const {
  switch (type) {
    case kFloat32:
      return static_cast<const float*>(data)[i];
    case kFloat64:
      return static_cast<const double*>(data)[i];
    case kBFloat16:
      return widen_bf16(static_cast<const uint16_t*>(data)[i]);
    default:
      return widen_f16(static_cast<const uint16_t*>(data)[i]);
  }
}

void Numbers::set(int64_t i, double value) const {
  switch (type) {
    case kFloat32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case kFloat64:
      static_cast<double*>(data)[i] = value;
      break;
    case kBFloat16:
      static_cast<uint16_t*>(data)[i] = narrow_bf16(value);
      break;
    default:
      static_cast<uint16_t*>(data)[i] = narrow_f16(value);
  }
}

void block_coefficients(const BlockShape& shape, const BlockTensors& in, const Numbers& coef) {
  const Block block(shape, in, coef.type);
  const bool normed = shape.norm != kNormNone;
  const int64_t size = shape.n * shape.c;
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
      double row[kCoefRows] = {1, 0, end, 0, 0, 0, shape.slope};
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
        row[kB] = in.conv_bias ? in.conv_bias[c] : 0.0;
        row[kG] = k * film * end;
        row[kS] = (offset * film + beta) * end;
        row[kQ] = p;
      }
      if (in.slope) row[kSlope] = in.slope[in.slope_count > 1 ? c : 0];
      for (int64_t r = 0; r < kCoefRows; ++r) coef.set(r * size + at, row[r]);
    }
  }
  if (shape.update) update_running(block);
}

void block_coefficients_backward(const BlockShape& shape, const BlockTensors& in, const Numbers& dcoef,
                                 const BlockTensors& out) {
  const Block block(shape, in, dcoef.type);
  const bool normed = shape.norm != kNormNone;
  const int64_t size = shape.n * shape.c;
  std::vector<double> dcentre(size), dvariance(size);
  std::vector<double> dweight(shape.c), dbias(shape.c), dshift(shape.c), dslope(shape.c);
  std::vector<double> dgamma(shape.c), dbeta(shape.c);
  const bool one_gamma = in.gamma_rows == 1, one_beta = in.beta_rows == 1;
  for (int64_t i = 0; i < shape.n; ++i) {
    for (int64_t c = 0; c < shape.c; ++c) {
      const int64_t at = i * shape.c + c;
      double row[kCoefRows];
      for (int64_t r = 0; r < kCoefRows; ++r) row[r] = dcoef[r * size + at];
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
      if (out.gamma && !one_gamma) out.gamma.set(at, dfilm * before);
      if (out.beta && !one_beta) out.beta.set(at, dbeta_here);
      dgamma[c] += dfilm * before;
      dbeta[c] += dbeta_here;
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
          if (!out.stats) continue;
          out.stats.set(at, dmean);
          out.stats.set(size + at, dv * s * s);
        }
      }
    });
  }
  const auto give = [](const Numbers& to, const std::vector<double>& from) {
    for (size_t i = 0; to && i < from.size(); ++i) to.set(static_cast<int64_t>(i), from[i]);
  };
  give(out.norm_weight, dweight);
  give(out.norm_bias, dbias);
  give(out.conv_bias, dshift);
  if (one_gamma) give(out.gamma, dgamma);
  if (one_beta) give(out.beta, dbeta);
  if (out.slope && in.slope_count > 1) give(out.slope, dslope);
  if (out.slope && in.slope_count == 1) {
    double sum = 0;
    for (double d : dslope) sum += d;
    out.slope.set(0, sum);
  }
}

}  // namespace fastfilm
