// Python bindings. Tensors arrive as addresses and sizes, so that no PyTorch header is needed and one build
// serves every version of it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/coefficients.h"
#include "cpu/driver.h"

namespace py = pybind11;
using namespace fastfilm;

namespace {

using Address = std::uintptr_t;

void check_size(const char* name, int64_t value) {
  if (value < 0) {
    throw std::invalid_argument(std::string(name) + " must be >= 0, got " + std::to_string(value));
  }
}

void check_code(const char* name, int value, int count) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string(name) + " must be in [0, " + std::to_string(count) +
                                "), got " + std::to_string(value));
  }
}

class Call {
 public:
  Call(int storage, int act, int64_t n, int64_t s, int64_t c, int threads) {
    check_code("dtype", storage, kStorages);
    check_code("act", act, kActivations);
    check_size("n", n);
    check_size("s", s);
    check_size("c", c);
    if (threads < 1) {
      throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
    }
    int64_t left = std::numeric_limits<int64_t>::max() / 64;
    for (int64_t size : {n, s, c}) {
      if (size > left) throw std::invalid_argument("n * s * c does not fit in 64 bits");
      if (size > 0) left /= size;
    }
    map = {static_cast<Storage>(storage), static_cast<Activation>(act), n, s, c, threads};
  }

  // A feature map, which must not be null unless it is empty.
  void* feature_map(const char* name, Address address) const {
    const size_t align = map.storage == kFloat64 ? 8 : map.storage == kFloat32 ? 4 : 2;
    return pointer(name, address, align, map.n * map.s * map.c == 0);
  }

  // Coefficients, moments or their gradients.
  void* numbers(const char* name, Address address) const {
    return pointer(name, address, map.storage == kFloat64 ? 8 : 4, map.n * map.c == 0);
  }

  bool empty() const { return map.n * map.c == 0; }

  Map map;

 private:
  static void* pointer(const char* name, Address address, size_t align, bool may_be_null) {
    if (address == 0 && !may_be_null) throw std::invalid_argument(std::string(name) + " is null");
    if (address % align != 0) {
      throw std::invalid_argument(std::string(name) + " must be aligned to " +
                                  std::to_string(align) + " bytes");
    }
    return reinterpret_cast<void*>(address);
  }
};

void py_apply(Address y, Address coef, Address v, int dtype, int act, int64_t n, int64_t s, int64_t c,
              int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* y_ = call.feature_map("y", y);
  const void* coef_ = call.numbers("coef", coef);
  void* v_ = call.feature_map("v", v);
  if (!call.empty()) apply(call.map, y_, v_, coef_);
}

void py_apply_backward(Address dv, Address y, Address coef, Address dy, Address dcoef, int dtype,
                       int act, int64_t n, int64_t s, int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* dv_ = call.feature_map("dv", dv);
  const void* y_ = call.feature_map("y", y);
  const void* coef_ = call.numbers("coef", coef);
  void* dy_ = call.feature_map("dy", dy);
  void* dcoef_ = call.numbers("dcoef", dcoef);
  if (!call.empty()) apply_backward(call.map, dv_, y_, coef_, dy_, dcoef_);
}

void py_moments(Address y, Address pre, Address stats, int dtype, int act, int64_t n, int64_t s,
                int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* y_ = call.feature_map("y", y);
  const void* pre_ = pre ? call.numbers("pre", pre) : nullptr;
  void* stats_ = call.numbers("stats", stats);
  if (!pre_) call.map.act = kNone;
  if (!call.empty()) moments(call.map, y_, pre_, stats_);
}

void py_moments_backward(Address dy, Address dstats, Address y, Address stats, Address pre, Address e,
                         Address dpre, int dtype, int act, int64_t n, int64_t s, int64_t c,
                         int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* dy_ = dy ? call.feature_map("dy", dy) : nullptr;
  const void* dstats_ = call.numbers("dstats", dstats);
  const void* y_ = call.feature_map("y", y);
  const void* stats_ = call.numbers("stats", stats);
  const void* pre_ = pre ? call.numbers("pre", pre) : nullptr;
  void* e_ = call.feature_map("e", e);
  void* dpre_ = pre ? call.numbers("dpre", dpre) : nullptr;
  if (!pre_) call.map.act = kNone;
  if (!call.empty()) moments_backward(call.map, dy_, dstats_, y_, stats_, pre_, e_, dpre_);
}

// The algebra of one kind of block; made once, called for every map of that kind.
class Coefficients {
 public:
  Coefficients(bool wide, int norm, int order, int position, bool use_input, bool update, int64_t n,
               int64_t c, int64_t groups, double count, double eps, double slope)
      : wide_(wide) {
    check_code("norm", norm, kNorms);
    check_code("order", order, kOrders);
    check_code("position", position, kDropoutPositions);
    check_size("n", n);
    check_size("c", c);
    if (c > 0 && n > std::numeric_limits<int64_t>::max() / 64 / c) {
      throw std::invalid_argument("n * c does not fit in 64 bits");
    }
    if (groups < 1 || c % groups != 0) {
      throw std::invalid_argument("groups must divide c = " + std::to_string(c) + ", got " +
                                  std::to_string(groups));
    }
    shape_ = {static_cast<Norm>(norm), static_cast<Order>(order),
              static_cast<DropoutPosition>(position), use_input, update, n, c, groups, count, eps,
              0.0, slope};
  }

  void forward(double momentum, Address running_mean, Address running_var, Address stats,
               Address norm_weight, Address norm_bias, Address conv_bias, Address gamma,
               int64_t gamma_rows, Address beta, int64_t beta_rows, Address mask, int64_t mask_rows,
               Address slope, int64_t slope_count, Address coef) const {
    BlockShape shape = shape_;
    shape.momentum = momentum;
    if (shape.n * shape.c == 0) return;
    const auto run = [&](auto zero) {
      using R = decltype(zero);
      const auto in = tensors<R>(true, running_mean, running_var, stats, norm_weight, norm_bias, conv_bias,
                                 gamma, gamma_rows, beta, beta_rows, mask, mask_rows, slope, slope_count);
      block_coefficients<R>(shape, in, get<R>("coef", coef, true));
    };
    wide_ ? run(0.0) : run(0.0f);
  }

  void backward(Address running_mean, Address running_var, Address stats, Address norm_weight,
                Address norm_bias, Address conv_bias, Address gamma, int64_t gamma_rows, Address beta,
                int64_t beta_rows, Address mask, int64_t mask_rows, Address slope, int64_t slope_count,
                Address dcoef, Address dstats, Address dnorm_weight, Address dnorm_bias,
                Address dconv_bias, Address dgamma, Address dbeta, Address dslope) const {
    if (shape_.n * shape_.c == 0) return;
    const auto run = [&](auto zero) {
      using R = decltype(zero);
      const auto in = tensors<R>(false, running_mean, running_var, stats, norm_weight, norm_bias, conv_bias,
                                 gamma, gamma_rows, beta, beta_rows, mask, mask_rows, slope, slope_count);
      const BlockGradients<R> out = {
          get<R>("dstats", dstats),         get<R>("dnorm_weight", dnorm_weight),
          get<R>("dnorm_bias", dnorm_bias), get<R>("dconv_bias", dconv_bias),
          get<R>("dgamma", dgamma),         get<R>("dbeta", dbeta),
          get<R>("dslope", dslope)};
      block_coefficients_backward<R>(shape_, in, get<R>("dcoef", dcoef, true), out);
    };
    wide_ ? run(0.0) : run(0.0f);
  }

 private:
  template <class R>
  static R* get(const char* name, Address address, bool needed = false) {
    if (needed && address == 0) throw std::invalid_argument(std::string(name) + " is null");
    if (address % sizeof(R) != 0) {
      throw std::invalid_argument(std::string(name) + " must be aligned to " +
                                  std::to_string(sizeof(R)) + " bytes");
    }
    return reinterpret_cast<R*>(address);
  }

  void check_rows(const char* name, int64_t rows) const {
    if (rows != 1 && rows != shape_.n) {
      throw std::invalid_argument(std::string(name) + " must have 1 or " + std::to_string(shape_.n) +
                                  " rows, got " + std::to_string(rows));
    }
  }

  template <class R>
  BlockTensors<R> tensors(bool moves, Address running_mean, Address running_var, Address stats,
                          Address norm_weight, Address norm_bias, Address conv_bias, Address gamma,
                          int64_t gamma_rows, Address beta, int64_t beta_rows, Address mask,
                          int64_t mask_rows, Address slope, int64_t slope_count) const {
    check_rows("gamma", gamma_rows);
    check_rows("beta", beta_rows);
    check_rows("mask", mask_rows);
    if (slope_count != 1 && slope_count != shape_.c) {
      throw std::invalid_argument("slope must have 1 or " + std::to_string(shape_.c) +
                                  " values, got " + std::to_string(slope_count));
    }
    const bool normed = shape_.norm != kNormNone;
    const bool running = (moves && shape_.update) || (normed && !shape_.use_input);
    BlockTensors<R> in;
    in.stats = get<R>("stats", stats, normed && shape_.use_input);
    in.norm_weight = get<R>("norm_weight", norm_weight);
    in.norm_bias = get<R>("norm_bias", norm_bias);
    in.conv_bias = get<R>("conv_bias", conv_bias);
    in.gamma = get<R>("gamma", gamma);
    in.beta = get<R>("beta", beta);
    in.mask = get<R>("mask", mask);
    in.slope = get<R>("slope", slope);
    in.running_mean = get<R>("running_mean", running_mean, running);
    in.running_var = get<R>("running_var", running_var, running);
    in.gamma_rows = gamma_rows;
    in.beta_rows = beta_rows;
    in.mask_rows = mask_rows;
    in.slope_count = slope_count;
    return in;
  }

  bool wide_;
  BlockShape shape_;
};

py::tuple instruction_sets() {
  const Kernels* const* list;
  const int count = available_kernels(&list);
  py::tuple names(count);
  for (int i = 0; i < count; ++i) names[i] = list[i]->name;
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!use_kernels(name.c_str())) {
    throw std::invalid_argument("name must be one of instruction_sets(), got '" + name + "'");
  }
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastfilm; fastfilm.ops.cpu is their interface.";
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("apply", &py_apply, py::arg("y"), py::arg("coef"), py::arg("v"), py::arg("dtype"),
        py::arg("act"), py::arg("n"), py::arg("s"), py::arg("c"), py::arg("threads"), release());
  m.def("apply_backward", &py_apply_backward, py::arg("dv"), py::arg("y"), py::arg("coef"),
        py::arg("dy"), py::arg("dcoef"), py::arg("dtype"), py::arg("act"), py::arg("n"), py::arg("s"),
        py::arg("c"), py::arg("threads"), release());
  m.def("moments", &py_moments, py::arg("y"), py::arg("pre"), py::arg("stats"), py::arg("dtype"),
        py::arg("act"), py::arg("n"), py::arg("s"), py::arg("c"), py::arg("threads"), release());
  m.def("moments_backward", &py_moments_backward, py::arg("dy"), py::arg("dstats"), py::arg("y"),
        py::arg("stats"), py::arg("pre"), py::arg("e"), py::arg("dpre"), py::arg("dtype"),
        py::arg("act"), py::arg("n"), py::arg("s"), py::arg("c"), py::arg("threads"), release());
  py::class_<Coefficients>(m, "Coefficients")
      .def(py::init<bool, int, int, int, bool, bool, int64_t, int64_t, int64_t, double, double, double>(),
           py::arg("wide"), py::arg("norm"), py::arg("order"), py::arg("position"), py::arg("use_input"),
           py::arg("update"), py::arg("n"), py::arg("c"), py::arg("groups"), py::arg("count"),
           py::arg("eps"), py::arg("slope"))
      .def("forward", &Coefficients::forward)
      .def("backward", &Coefficients::backward);
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return current_kernels().name; });
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
  m.attr("openmp") = has_openmp();
}
