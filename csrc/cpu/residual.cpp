// The sum of two feature maps and its gradients; residual.h has the interface.
#include "residual.h"

#include <vector>

#include "walk.h"

namespace fastfilm {
namespace {

// One summand's coefficients at (n, c): M(y) = g * (act(a * (y - p) + b) - q) + s.
struct Affine {
  double a = 1, b = 0, g = 1, s = 0, p = 0, q = 0, slope = 0;

  template <class R>
  static Affine at(const R* coef, int64_t rows, int64_t i) {
    if (!coef) return {};
    return {coef[kA * rows + i], coef[kB * rows + i], coef[kG * rows + i],    coef[kS * rows + i],
            coef[kP * rows + i], coef[kQ * rows + i], coef[kSlope * rows + i]};
  }

  // Without activation M(y) = scale() * (y - p) + offset().
  double scale() const { return g * a; }
  double offset() const { return g * (b - q) + s; }

  // The gradients at the coefficients of a summand without activation, from the sums of dm and of dm * (y - p).
  template <class R>
  void gradient(double sum, double sum_y, R* dcoef, int64_t rows, int64_t i) const {
    dcoef[kA * rows + i] = static_cast<R>(g * sum_y);
    dcoef[kB * rows + i] = static_cast<R>(g * sum);
    dcoef[kG * rows + i] = static_cast<R>(a * sum_y + (b - q) * sum);
    dcoef[kS * rows + i] = static_cast<R>(sum);
    dcoef[kP * rows + i] = static_cast<R>(-g * a * sum);
    dcoef[kQ * rows + i] = static_cast<R>(-g * sum);
    dcoef[kSlope * rows + i] = R(0);
  }
};

template <class R>
std::vector<R> rows_of(const Map& map, const Summands& in) {
  const int64_t rows = map.n * map.c;
  const R *coef = static_cast<const R*>(in.coef), *coef2 = static_cast<const R*>(in.coef2);
  const R* slope = static_cast<const R*>(in.slope);
  std::vector<R> found(kResidualRows * rows);
  for (int64_t i = 0; i < rows; ++i) {
    const Affine first = Affine::at(coef, rows, i), second = Affine::at(coef2, rows, i);
    double values[kResidualRows];
    values[kResA] = in.inside ? first.scale() : first.a;
    values[kResB] = in.inside ? first.offset() + second.offset() : first.b;
    values[kResP] = first.p;
    values[kResG] = first.g;
    values[kResQ] = first.q;
    values[kResS] = first.s + second.offset();
    values[kResSlope] = !in.inside ? first.slope : slope ? slope[i % map.c] : 0;
    values[kResA2] = second.scale();
    values[kResP2] = second.p;
    for (int64_t k = 0; k < kResidualRows; ++k) found[k * rows + i] = static_cast<R>(values[k]);
  }
  return found;
}

template <class R>
void residual_as(const Map& map, const Summands& in, void* v) {
  const Plan plan(map);
  const std::vector<R> rows = rows_of<R>(map, in);
  const Expanded<R> expanded(plan, kResidualRows, map.n, map.c, rows.data());
  const auto& table = in.inside ? plan.kernels.residual_inside : plan.kernels.residual_outside;
  walk(map, plan, table[map.storage][map.act], in.y, nullptr, v, expanded, 0, in.y2);
}

template <class R>
void residual_backward_as(const Map& map, const void* dv, const Summands& in, const SummandGradients& out) {
  const Plan plan(map);
  const std::vector<R> coefs = rows_of<R>(map, in);
  const Expanded<R> expanded(plan, kResidualRows, map.n, map.c, coefs.data());
  const auto& table = in.inside ? plan.kernels.residual_inside_backward : plan.kernels.residual_outside_backward;
  const auto partial = walk(map, plan, table[map.storage][map.act], in.y, dv, out.dy, expanded, kResidualSums, in.y2,
                            out.dy2);
  const int64_t rows = map.n * map.c;
  R *dcoef = static_cast<R*>(out.dcoef), *dcoef2 = static_cast<R*>(out.dcoef2);
  R* dslope = static_cast<R*>(out.dslope);
  for (int64_t i = 0; i < rows; ++i) {
    double sums[kResidualSums] = {};
    const double* from = partial.data() + i / map.c * plan.chunks * kResidualSums * map.c + i % map.c;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      for (double& sum : sums) sum += *from, from += map.c;
    }
    const Affine first = Affine::at(static_cast<const R*>(in.coef), rows, i);
    const Affine second = Affine::at(static_cast<const R*>(in.coef2), rows, i);
    if (dcoef && in.inside) {
      first.gradient(sums[kSumDz], sums[kSumDzY], dcoef, rows, i);
    } else if (dcoef) {
      dcoef[kA * rows + i] = static_cast<R>(sums[kSumDzY]);
      dcoef[kB * rows + i] = static_cast<R>(sums[kSumDz]);
      dcoef[kG * rows + i] = static_cast<R>(sums[kSumDvH]);
      dcoef[kS * rows + i] = static_cast<R>(sums[kSumDv]);
      dcoef[kP * rows + i] = static_cast<R>(-first.a * sums[kSumDz]);
      dcoef[kQ * rows + i] = static_cast<R>(-first.g * sums[kSumDv]);
      dcoef[kSlope * rows + i] = static_cast<R>(sums[kSumSlope]);
    }
    if (dcoef2) {
      second.gradient(in.inside ? sums[kSumDz] : sums[kSumDv], sums[kSumDrY2], dcoef2, rows, i);
    }
    if (dslope) dslope[i] = static_cast<R>(sums[kSumSlope]);
  }
}

}  // namespace

void residual(const Map& map, const Summands& in, void* v) {
  map.storage == kFloat64 ? residual_as<double>(map, in, v) : residual_as<float>(map, in, v);
}

void residual_backward(const Map& map, const void* dv, const Summands& in, const SummandGradients& out) {
  map.storage == kFloat64 ? residual_backward_as<double>(map, dv, in, out)
                          : residual_backward_as<float>(map, dv, in, out);
}

}  // namespace fastfilm
