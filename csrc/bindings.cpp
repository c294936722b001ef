// Python bindings of the CPU kernels. Tensors arrive as addresses and sizes, so no PyTorch header is needed and one
// build serves all versions of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/coefficients.h"
#include "cpu/convolution.h"
#include "cpu/driver.h"
#include "cpu/gather.h"
#include "cpu/residual.h"
#include "cpu/threads.h"
#include "cpu/winograd.h"

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
    throw std::invalid_argument(std::string(name) + " must be in [0, " + std::to_string(count) + "), got " +
                                std::to_string(value));
  }
}

size_t bytes_of(int storage) { return storage == kFloat64 ? 8 : storage == kFloat32 ? 4 : 2; }

void* aligned(const char* name, Address address, size_t bytes) {
  if (address % bytes != 0) {
    throw std::invalid_argument(std::string(name) + " must be aligned to " + std::to_string(bytes) + " bytes");
  }
  return reinterpret_cast<void*>(address);
}

// The map of one call, and the checks of its addresses.
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
    return pointer(name, address, bytes_of(map.storage), map.n * map.s * map.c == 0);
  }
  void* feature_map_or_null(const char* name, Address address) const {
    return address ? feature_map(name, address) : nullptr;
  }

  // Coefficients, moments or their gradients.
  void* numbers(const char* name, Address address) const {
    return pointer(name, address, map.storage == kFloat64 ? 8 : 4, empty());
  }
  void* numbers_or_null(const char* name, Address address) const { return address ? numbers(name, address) : nullptr; }

  bool empty() const { return map.n * map.c == 0; }

  Map map;

 private:
  static void* pointer(const char* name, Address address, size_t align, bool may_be_null) {
    if (address == 0 && !may_be_null) throw std::invalid_argument(std::string(name) + " is null");
    return aligned(name, address, align);
  }
};

void py_apply(Address y, Address coef, Address v, int dtype, int act, int64_t n, int64_t s, int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* y_ = call.feature_map("y", y);
  const void* coef_ = call.numbers("coef", coef);
  void* v_ = call.feature_map("v", v);
  if (!call.empty()) apply(call.map, y_, v_, coef_);
}

void py_apply_backward(Address dv, Address y, Address coef, Address dy, Address dcoef, int dtype, int act, int64_t n,
                       int64_t s, int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* dv_ = call.feature_map("dv", dv);
  const void* y_ = call.feature_map("y", y);
  const void* coef_ = call.numbers("coef", coef);
  void* dy_ = call.feature_map("dy", dy);
  void* dcoef_ = call.numbers("dcoef", dcoef);
  if (!call.empty()) apply_backward(call.map, dv_, y_, coef_, dy_, dcoef_);
}

void py_moments(Address y, Address pre, Address stats, int dtype, int act, int64_t n, int64_t s, int64_t c,
                int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* y_ = call.feature_map("y", y);
  const void* pre_ = call.numbers_or_null("pre", pre);
  void* stats_ = call.numbers("stats", stats);
  if (!pre_) call.map.act = kNone;
  if (!call.empty()) moments(call.map, y_, pre_, stats_);
}

void py_moments_backward(Address dy, Address dstats, Address y, Address stats, Address pre, Address e, Address dpre,
                         int dtype, int act, int64_t n, int64_t s, int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const void* dy_ = call.feature_map_or_null("dy", dy);
  const void* dstats_ = call.numbers("dstats", dstats);
  const void* y_ = call.feature_map("y", y);
  const void* stats_ = call.numbers("stats", stats);
  const void* pre_ = call.numbers_or_null("pre", pre);
  void* e_ = call.feature_map("e", e);
  void* dpre_ = pre ? call.numbers("dpre", dpre) : nullptr;
  if (!pre_) call.map.act = kNone;
  if (!call.empty()) moments_backward(call.map, dy_, dstats_, y_, stats_, pre_, e_, dpre_);
}

Summands summands(const Call& call, Address y, Address coef, Address y2, Address coef2, Address slope, bool inside) {
  return {call.feature_map("y", y),
          call.numbers_or_null("coef", coef),
          call.feature_map("y2", y2),
          call.numbers_or_null("coef2", coef2),
          call.numbers_or_null("slope", slope),
          inside};
}

void py_residual(Address y, Address coef, Address y2, Address coef2, Address slope, bool inside, Address v, int dtype,
                 int act, int64_t n, int64_t s, int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const Summands in = summands(call, y, coef, y2, coef2, slope, inside);
  void* v_ = call.feature_map("v", v);
  if (!call.empty()) residual(call.map, in, v_);
}

void py_residual_backward(Address dv, Address y, Address coef, Address y2, Address coef2, Address slope, bool inside,
                          Address dy, Address dcoef, Address dy2, Address dcoef2, Address dslope, int dtype, int act,
                          int64_t n, int64_t s, int64_t c, int threads) {
  Call call(dtype, act, n, s, c, threads);
  const Summands in = summands(call, y, coef, y2, coef2, slope, inside);
  const void* dv_ = call.feature_map("dv", dv);
  const SummandGradients out = {call.feature_map("dy", dy), coef ? call.numbers("dcoef", dcoef) : nullptr,
                                call.feature_map_or_null("dy2", dy2), coef2 ? call.numbers("dcoef2", dcoef2) : nullptr,
                                slope ? call.numbers("dslope", dslope) : nullptr};
  if (!call.empty()) residual_backward(call.map, dv_, in, out);
}

// The view that `axes` describes with five numbers an axis: in, out, and the addresses of start, index and weight.
View view_of(const std::array<int64_t, 15>& axes, bool maximum) {
  View view;
  view.maximum = maximum;
  int64_t taps = 1;
  for (int i = 0; i < 3; ++i) {
    const int64_t* a = axes.data() + 5 * i;
    Axis& axis = view.axis[i];
    axis = {a[0], a[1], reinterpret_cast<const int64_t*>(a[2]), reinterpret_cast<const int64_t*>(a[3]),
            reinterpret_cast<const double*>(a[4])};
    check_size("axis", axis.in);
    check_size("axis", axis.out);
    if (!axis.start || !axis.index || !axis.weight) throw std::invalid_argument("axis is null");
    int64_t most = 0;
    for (int64_t x = 0; x < axis.out; ++x) {
      most = std::max(most, axis.start[x + 1] - axis.start[x]);
      for (int64_t t = axis.start[x]; t < axis.start[x + 1]; ++t) {
        if (axis.index[t] < 0 || axis.index[t] >= axis.in) throw std::invalid_argument("axis index out of range");
      }
    }
    taps *= most;
  }
  if (taps > kMaxTaps) {
    throw std::invalid_argument("a position may have " + std::to_string(kMaxTaps) + " taps, got " +
                                std::to_string(taps));
  }
  return view;
}

void py_gather(Address y, int64_t in_stride, Address coef, Address out, int64_t out_stride, int dtype, int act,
               int64_t n, int64_t c, int threads, bool maximum, const std::array<int64_t, 15>& axes) {
  const View view = view_of(axes, maximum);
  Call call(dtype, act, n, axes[0] * axes[5] * axes[10], c, threads);
  const void* y_ = call.feature_map("y", y);
  const void* coef_ = call.numbers_or_null("coef", coef);
  void* out_ = call.feature_map("out", out);
  if (in_stride < c || out_stride < c || (coef && in_stride != c)) {
    throw std::invalid_argument("strides must be at least c, and c where there are coefficients");
  }
  if (!call.empty()) gather(call.map, view, y_, in_stride, coef_, out_, out_stride);
}

void py_maximum_backward(Address y, Address coef, Address dout, int64_t dout_stride, Address dv, int dtype, int act,
                         int64_t n, int64_t c, int threads, const std::array<int64_t, 15>& axes) {
  const View view = view_of(axes, true);
  Call call(dtype, act, n, axes[0] * axes[5] * axes[10], c, threads);
  const void* y_ = call.feature_map("y", y);
  const void* coef_ = call.numbers_or_null("coef", coef);
  const void* dout_ = call.feature_map("dout", dout);
  void* dv_ = call.feature_map("dv", dv);
  if (dout_stride < c) throw std::invalid_argument("dout_stride must be at least c");
  if (!call.empty()) maximum_backward(call.map, view, y_, coef_, dout_, dout_stride, dv_);
}

// A convolution of one form, made once and called for every map of that form. Its sizes are [N, Ci, Co], then three
// each of the map, the kernel, the zeros in front, the result and the stride.
class PyConvolution {
 public:
  PyConvolution(int dtype, const std::array<int64_t, 18>& sizes, const std::array<int64_t, 5>& strides) {
    check_code("dtype", dtype, kStorages);
    if (dtype == kFloat64) throw std::invalid_argument("dtype must not be float64");
    for (int64_t size : sizes) check_size("sizes", size);
    conv_ = {static_cast<Storage>(dtype), sizes[0], sizes[1], sizes[2], {}, {}, {}, {}, {}, {}};
    for (int i = 0; i < 3; ++i) {
      conv_.size[i] = sizes[3 + i];
      conv_.kernel[i] = sizes[6 + i];
      conv_.before[i] = sizes[9 + i];
      conv_.out[i] = sizes[12 + i];
      conv_.stride[i] = sizes[15 + i];
      if (conv_.kernel[i] < 1 || conv_.stride[i] < 1) throw std::invalid_argument("kernel and stride must be positive");
      // behind the map there may be as many zeros as in front
      const int64_t last = (conv_.out[i] - 1) * conv_.stride[i] + conv_.kernel[i];
      if (conv_.out[i] > 0 && last > conv_.size[i] + 2 * conv_.before[i]) {
        throw std::invalid_argument("the result is larger than map and zeros allow");
      }
    }
    std::copy(strides.begin(), strides.end(), conv_.strides);
  }

  void run(Address x, Address weight, Address bias, Address coef, Address y, int act, int threads) const {
    const Checked c = checked(x, weight, bias, coef, y, act, threads);
    if (c.y) convolve(conv_, c.x, c.weight, c.bias, c.coef, static_cast<Activation>(act), c.y, threads);
  }

  // `transformed` is 0, or the address of a weight that `transform` wrote; `weight` is not read then.
  void run_winograd(Address x, Address weight, Address bias, Address coef, Address y, int act, int threads,
                    Address transformed) const {
    check_winograd();
    const Checked c = checked(x, transformed ? transformed : weight, bias, coef, y, act, threads);
    if (!c.y) return;
    std::vector<float> made;
    const float* weights = static_cast<const float*>(c.weight);
    if (!transformed) {
      made.resize(winograd_weights(conv_));
      transform_winograd(conv_, weights, made.data(), threads);
      weights = made.data();
    }
    convolve_winograd(conv_, static_cast<const float*>(c.x), weights, static_cast<const float*>(c.bias), c.coef,
                      static_cast<Activation>(act), static_cast<float*>(c.y), threads);
  }

  int64_t transformed() const {
    check_winograd();
    return winograd_weights(conv_);
  }

  void transform(Address weight, Address to, int threads) const {
    check_winograd();
    const Call call(kFloat32, 0, 1, 1, conv_.co * conv_.ci, threads);
    const void* weight_ = call.feature_map("weight", weight);
    transform_winograd(conv_, static_cast<const float*>(weight_), static_cast<float*>(call.feature_map("to", to)),
                       threads);
  }

  void kernel_gradient(Address x, Address e, Address dkernel, int threads) const {
    if (conv_.storage != kFloat32) throw std::invalid_argument("dtype must be float32");
    const Call in(kFloat32, 0, conv_.n, conv_.size[0] * conv_.size[1] * conv_.size[2], conv_.ci, threads);
    const Call out(kFloat32, 0, conv_.n, conv_.out[0] * conv_.out[1] * conv_.out[2], conv_.co, 1);
    const void* x_ = in.feature_map("x", x);
    const void* e_ = out.feature_map("e", e);
    // the gradient is zero, not empty, where there is nothing to sum
    void* dkernel_ = Call(kFloat32, 0, 1, 1, conv_.co * conv_.ci, 1).feature_map("dkernel", dkernel);
    convolve_kernel_gradient(conv_, static_cast<const float*>(x_), static_cast<const float*>(e_),
                             static_cast<float*>(dkernel_), threads);
  }

 private:
  void check_winograd() const {
    const bool dense = conv_.stride[0] == 1 && conv_.stride[1] == 1 && conv_.stride[2] == 1;
    if (conv_.storage != kFloat32 || conv_.kernel[1] != 3 || conv_.kernel[2] != 3 || !dense) {
      throw std::invalid_argument("dtype must be float32, the kernel 3 x 3 along the last axes and the stride 1");
    }
  }

  struct Checked {
    const void *x, *weight, *bias;
    const float* coef;
    void* y;  // null: the result is empty
  };

  Checked checked(Address x, Address weight, Address bias, Address coef, Address y, int act, int threads) const {
    const int64_t* size = conv_.size;
    const int64_t* out_size = conv_.out;
    const Call in(conv_.storage, 0, conv_.n, size[0] * size[1] * size[2], conv_.ci, threads);
    const Call out(conv_.storage, act, conv_.n, out_size[0] * out_size[1] * out_size[2], conv_.co, threads);
    if (out.map.n * out.map.s * out.map.c == 0) return {};
    return {in.feature_map("x", x), out.feature_map("weight", weight), out.feature_map_or_null("bias", bias),
            static_cast<const float*>(out.numbers_or_null("coef", coef)), out.feature_map("y", y)};
  }

  Convolution conv_;
};

// The algebra of one kind of block, made once and called for every map of that kind.
constexpr int kTensors = 10;

class Coefficients {
 public:
  Coefficients(bool wide, int norm, int order, int position, bool use_input, bool update, int64_t n, int64_t c,
               int64_t groups, double count, double eps, double slope)
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
      throw std::invalid_argument("groups must divide c = " + std::to_string(c) + ", got " + std::to_string(groups));
    }
    shape_ = {static_cast<Norm>(norm),
              static_cast<Order>(order),
              static_cast<DropoutPosition>(position),
              use_input,
              update,
              n,
              c,
              groups,
              count,
              eps,
              0.0,
              slope};
  }

  // Ten addresses in the order of BlockTensors, and their types, four bits each, first lowest.
  void forward(double momentum, const std::array<Address, kTensors>& addresses, uint64_t types,
               const std::array<int64_t, 4>& rows, Address coef) const {
    BlockShape shape = shape_;
    shape.momentum = momentum;
    if (shape.n * shape.c == 0) return;
    const BlockTensors in = tensors(addresses, types, rows);
    if (shape.update) check_running(in);
    block_coefficients(shape, in, coefficients("coef", coef));
  }

  void backward(const std::array<Address, kTensors>& addresses, uint64_t types, const std::array<int64_t, 4>& rows,
                Address dcoef, const std::array<Address, kTensors>& gradients) const {
    if (shape_.n * shape_.c == 0) return;
    const BlockTensors in = tensors(addresses, types, rows);
    BlockTensors out;
    const auto members = all(out);
    for (int i = 0; i < kTensors; ++i) *members[i] = numbers(kNames[i], gradients[i], types >> 4 * i);
    block_coefficients_backward(shape_, in, coefficients("dcoef", dcoef), out);
  }

 private:
  static constexpr const char* kNames[kTensors] = {"running_mean", "running_var", "stats", "norm_weight", "norm_bias",
                                                   "conv_bias",    "gamma",       "beta",  "mask",        "slope"};

  static std::array<Numbers*, kTensors> all(BlockTensors& t) {
    return {&t.running_mean, &t.running_var, &t.stats, &t.norm_weight, &t.norm_bias,
            &t.conv_bias,    &t.gamma,       &t.beta,  &t.mask,        &t.slope};
  }

  static Numbers numbers(const char* name, Address address, uint64_t type) {
    const int code = static_cast<int>(type & 15);
    check_code(name, code, kStorages);
    return {aligned(name, address, bytes_of(code)), static_cast<Storage>(code)};
  }

  Numbers coefficients(const char* name, Address address) const {
    if (address == 0) throw std::invalid_argument(std::string(name) + " is null");
    return numbers(name, address, wide_ ? kFloat64 : kFloat32);
  }

  static void check_running(const BlockTensors& in) {
    if (!in.running_mean || !in.running_var) throw std::invalid_argument("running_mean is null");
  }

  BlockTensors tensors(const std::array<Address, kTensors>& addresses, uint64_t types,
                       const std::array<int64_t, 4>& rows) const {
    BlockTensors in;
    const auto members = all(in);
    for (int i = 0; i < kTensors; ++i) *members[i] = numbers(kNames[i], addresses[i], types >> 4 * i);
    const bool normed = shape_.norm != kNormNone;
    if (normed && !shape_.use_input) check_running(in);
    if (normed && shape_.use_input && !in.stats) throw std::invalid_argument("stats is null");
    for (int i = 0; i < 3; ++i) {
      if (rows[i] != 1 && rows[i] != shape_.n) {
        throw std::invalid_argument(std::string(kNames[6 + i]) + " must have 1 or " + std::to_string(shape_.n) +
                                    " rows, got " + std::to_string(rows[i]));
      }
    }
    if (rows[3] != 1 && rows[3] != shape_.c) {
      throw std::invalid_argument("slope must have 1 or " + std::to_string(shape_.c) + " values, got " +
                                  std::to_string(rows[3]));
    }
    in.gamma_rows = rows[0];
    in.beta_rows = rows[1];
    in.mask_rows = rows[2];
    in.slope_count = rows[3];
    return in;
  }

  bool wide_;
  BlockShape shape_;
};

bool py_same_bytes(Address a, Address b, int64_t count) {
  check_size("count", count);
  if (count > 0 && (!a || !b)) throw std::invalid_argument("a and b must not be null");
  return count == 0 || std::memcmp(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), count) == 0;
}

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastfilm; fastfilm.ops.launchers.cpu is their interface.";
  using release = py::call_guard<py::gil_scoped_release>;
  // a function that runs without the interpreter's lock, and the names of its arguments
  const auto def = [&m](const char* name, auto function, auto... arguments) {
    m.def(name, function, py::arg(arguments)..., release());
  };
  def("apply", &py_apply, "y", "coef", "v", "dtype", "act", "n", "s", "c", "threads");
  def("apply_backward", &py_apply_backward, "dv", "y", "coef", "dy", "dcoef", "dtype", "act", "n", "s", "c", "threads");
  def("moments", &py_moments, "y", "pre", "stats", "dtype", "act", "n", "s", "c", "threads");
  def("moments_backward", &py_moments_backward, "dy", "dstats", "y", "stats", "pre", "e", "dpre", "dtype", "act", "n",
      "s", "c", "threads");
  def("residual", &py_residual, "y", "coef", "y2", "coef2", "slope", "inside", "v", "dtype", "act", "n", "s", "c",
      "threads");
  def("residual_backward", &py_residual_backward, "dv", "y", "coef", "y2", "coef2", "slope", "inside", "dy", "dcoef",
      "dy2", "dcoef2", "dslope", "dtype", "act", "n", "s", "c", "threads");
  def("gather", &py_gather, "y", "in_stride", "coef", "out", "out_stride", "dtype", "act", "n", "c", "threads",
      "maximum", "axes");
  def("maximum_backward", &py_maximum_backward, "y", "coef", "dout", "dout_stride", "dv", "dtype", "act", "n", "c",
      "threads", "axes");
  py::class_<PyConvolution>(m, "Convolution")
      .def(py::init<int, const std::array<int64_t, 18>&, const std::array<int64_t, 5>&>(), py::arg("dtype"),
           py::arg("sizes"), py::arg("strides"))
      .def("run", &PyConvolution::run, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("coef"), py::arg("y"),
           py::arg("act"), py::arg("threads"), release())
      .def("run_winograd", &PyConvolution::run_winograd, py::arg("x"), py::arg("weight"), py::arg("bias"),
           py::arg("coef"), py::arg("y"), py::arg("act"), py::arg("threads"), py::arg("transformed") = 0, release())
      .def_property_readonly("transformed", &PyConvolution::transformed)
      .def("transform", &PyConvolution::transform, py::arg("weight"), py::arg("to"), py::arg("threads"), release())
      .def("kernel_gradient", &PyConvolution::kernel_gradient, py::arg("x"), py::arg("e"), py::arg("dkernel"),
           py::arg("threads"), release());
  py::class_<Coefficients>(m, "Coefficients")
      .def(py::init<bool, int, int, int, bool, bool, int64_t, int64_t, int64_t, double, double, double>(),
           py::arg("wide"), py::arg("norm"), py::arg("order"), py::arg("position"), py::arg("use_input"),
           py::arg("update"), py::arg("n"), py::arg("c"), py::arg("groups"), py::arg("count"), py::arg("eps"),
           py::arg("slope"))
      .def("forward", &Coefficients::forward)
      .def("backward", &Coefficients::backward);
  def("same_bytes", &py_same_bytes, "a", "b", "count");
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return current_kernels().name; });
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
  m.def("split_finely", &split_finely, py::arg("on"));
  m.def("openmp", [](bool on) { return g_openmp.exchange(on); }, py::arg("on"));
}
