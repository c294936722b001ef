// Python bindings of the CUDA kernels. Tensors arrive as addresses, sizes and a stream, so that no PyTorch header
// is needed and one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "convolution.h"
#include "pointwise.h"
#ifdef FASTFILM_EMULATED
#include "primitives.h"
#endif

namespace py = pybind11;
using namespace fastfilm::cuda;

namespace {

using Address = std::uintptr_t;

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(name) + " must be in [" + std::to_string(low) + ", " +
                                std::to_string(high) + "], got " + std::to_string(value));
  }
}

void check_storage(int storage) {
  if (storage != kFloat32 && storage != kBFloat16 && storage != kFloat16) {
    throw std::invalid_argument("dtype must be 0 (float32), 2 (bfloat16) or 3 (float16), got " +
                                std::to_string(storage));
  }
}

// An address that is present and lies on `align` bytes.
template <class T = void>
T* pointer(const char* name, Address address, size_t align = 4) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is null");
  if (address % align != 0) {
    throw std::invalid_argument(std::string(name) + " must be aligned to " + std::to_string(align) + " bytes, got " +
                                std::to_string(address));
  }
  return reinterpret_cast<T*>(address);
}

template <class T = void>
T* pointer_or_null(const char* name, Address address, size_t align = 4) {
  return address ? pointer<T>(name, address, align) : nullptr;
}

void check(const std::string& failure) {
  if (!failure.empty()) throw std::runtime_error(failure);
}

struct Call {
  Call(int storage, int act, int64_t n, int64_t s, int64_t c, Address stream) {
    check_storage(storage);
    check_range("act", act, 0, kActivations - 1);
    const int64_t most = std::numeric_limits<int32_t>::max();
    check_range("n", n, 1, 65535);  // the third dimension of a grid
    check_range("c", c, 1, most);
    check_range("s", s, 1, std::numeric_limits<int64_t>::max() / 64 / n / c);
    map = {storage, act, n, s, c, reinterpret_cast<Stream>(stream)};
  }
  // A feature map, aligned to its elements; whole chunks are used where it lies on 16 bytes.
  void* feature_map(const char* name, Address address) const {
    return pointer(name, address, map.storage == kFloat32 ? 4 : 2);
  }

  Map map;
};

int64_t py_reduction_workspace(int dtype, int64_t n, int64_t s, int64_t c) {
  return reduction_workspace(Call(dtype, 0, n, s, c, 0).map);
}

void py_apply(Address y, Address coef, Address v, int dtype, int act, int64_t n, int64_t s, int64_t c,
              Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  check(apply(call.map, call.feature_map("y", y), pointer<float>("coef", coef), call.feature_map("v", v)));
}

void py_apply_backward(Address dv, Address y, Address coef, Address dy, Address dcoef, Address workspace, int dtype,
                       int act, int64_t n, int64_t s, int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  check(apply_backward(call.map, call.feature_map("dv", dv), call.feature_map("y", y), pointer<float>("coef", coef),
                       call.feature_map("dy", dy), pointer<float>("dcoef", dcoef),
                       pointer<float>("workspace", workspace)));
}

void py_moments(Address y, Address pre, Address stats, Address workspace, int dtype, int act, int64_t n, int64_t s,
                int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  check(moments(call.map, call.feature_map("y", y), pointer_or_null<float>("pre", pre),
                pointer<float>("stats", stats), pointer<float>("workspace", workspace)));
}

void py_moments_backward(Address dy, Address dstats, Address y, Address stats, Address pre, Address e, Address dpre,
                         Address workspace, int dtype, int act, int64_t n, int64_t s, int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  const void* dy_ = dy ? call.feature_map("dy", dy) : nullptr;
  check(moments_backward(call.map, dy_, pointer<float>("dstats", dstats), call.feature_map("y", y),
                         pointer<float>("stats", stats), pointer_or_null<float>("pre", pre), call.feature_map("e", e),
                         pre ? pointer<float>("dpre", dpre) : nullptr, pointer<float>("workspace", workspace)));
}

// One convolution of one shape: its layouts, made when they are first needed, and its kernels.
class Convolution {
 public:
  using Three = std::array<int, 3>;

  Convolution(int storage, int dims, int64_t n, int ci, int co, Three in, Three out, Three kernel, Three padding,
              int stride, std::array<int, 3> device)
      : device_{device[1], device[2], device[0]} {
    check_storage(storage);
    check_range("dims", dims, 2, 3);
    check_range("n", n, 1, 65535);
    const int most = 1 << 24;
    check_range("ci", ci, 1, most);
    check_range("co", co, 1, most);
    check_range("stride", stride, 1, 2);
    for (int i = 0; i < 3; ++i) {
      const bool flat = i == 0 && dims == 2;
      check_range("in", in[i], 1, flat ? 1 : most);
      check_range("out", out[i], 1, flat ? 1 : most);
      check_range("kernel", kernel[i], 1, flat ? 1 : 3);
      check_range("padding", padding[i], 0, flat ? 0 : most);
      if (!flat && (kernel[i] != kernel[2] || kernel[i] == 2)) {
        throw std::invalid_argument("kernel must be 1 or 3 in every dimension");
      }
      const int step = flat ? 1 : stride;
      check_range("out", out[i], 1, (in[i] + 2 * padding[i] - kernel[i]) / step + 1);
    }
    shape_ = {storage, dims, n, ci, co, extent(in), extent(out), extent(kernel), extent(padding), stride};
  }

  int64_t forward_bytes() { return forward_workspace(plan(Direction::kForward), shape_.storage); }
  int64_t backward_bytes() { return backward_workspace(plan(Direction::kBackward), shape_.storage); }
  int64_t weight_bytes() { return weight_gradient_workspace(wgrad()); }

  // Throws if one of the three kernels has no layout on the device.
  void check_plans() {
    plan(Direction::kForward);
    plan(Direction::kBackward);
    wgrad();
  }

  // (x, coef, channels, act) of one source or of two.
  using Sources = std::vector<std::array<int64_t, 4>>;

  void forward(const Sources& sources, Address weight, const std::array<int64_t, 5>& strides, Address bias,
               Address pre, int pre_act, Address out_coef, int out_act, Address y, Address stats, Address workspace,
               Address stream) {
    check_range("pre_act", pre_act, 0, kActivations - 1);
    check_range("out_act", out_act, 0, kActivations - 1);
    Forward call{};
    inputs(sources, call.inputs);
    call.weight = weight_of(weight, strides);
    call.bias = pointer_or_null<float>("bias", bias);
    call.pre = pointer_or_null<float>("pre", pre);
    call.out_coef = pointer_or_null<float>("out_coef", out_coef);
    call.pre_act = pre_act;
    call.out_act = out_act;
    call.y = pointer("y", y, element());
    call.stats = pointer_or_null<float>("stats", stats);
    check(fastfilm::cuda::forward(plan(Direction::kForward), shape_.storage, call, work(workspace),
                                  reinterpret_cast<Stream>(stream)));
  }

  void backward(Address e, Address weight, const std::array<int64_t, 5>& strides, const Sources& source, Address dx,
                Address dcoef, Address workspace, Address stream) {
    Backward call{};
    Input given[2] = {};
    inputs(source, given);
    call.e = pointer("e", e, element());
    call.weight = weight_of(weight, strides);
    call.input = given[0];
    call.dx = pointer("dx", dx, element());
    call.dcoef = call.input.coef ? pointer<float>("dcoef", dcoef) : nullptr;
    check(fastfilm::cuda::backward(plan(Direction::kBackward), shape_.storage, call, work(workspace),
                                   reinterpret_cast<Stream>(stream)));
  }

  void weight_gradient(Address e, const Sources& sources, Address dweight, Address workspace, Address stream) {
    WeightGradient call{};
    call.e = pointer("e", e, element());
    inputs(sources, call.inputs);
    call.dweight = pointer("dweight", dweight, element());
    check(fastfilm::cuda::weight_gradient(wgrad(), shape_.storage, call, work(workspace),
                                          reinterpret_cast<Stream>(stream)));
  }

  // How the kernel "forward", "backward" or "weight" is laid out.
  py::dict facts(const std::string& kernel) {
    py::dict facts;
    if (kernel == "weight") {
      const WgradPlan& p = wgrad();
      describe(facts, p.tile_log2, p.bm, p.bn, p.buffers, p.shared_bytes, p.tiles_a_group);
      return facts;
    }
    if (kernel != "forward" && kernel != "backward") {
      throw std::invalid_argument("kernel must be forward, backward or weight, got '" + kernel + "'");
    }
    const ConvPlan& p = plan(kernel == "backward" ? Direction::kBackward : Direction::kForward);
    describe(facts, p.tile_log2, p.bn, p.bk, p.buffers, p.shared_bytes, p.tiles_a_group);
    facts["resident"] = p.resident;
    facts["bytes_an_output"] = bytes_an_output(p, static_cast<int>(element()));
    return facts;
  }

 private:
  static void describe(py::dict& facts, const Extent& tile, int rows, int columns, int buffers, int shared, int tiles) {
    facts["tile"] = py::make_tuple(1 << tile.d, 1 << tile.h, 1 << tile.w);
    facts["channels"] = py::make_tuple(rows, columns);
    facts["buffers"] = buffers;
    facts["shared_bytes"] = shared;
    facts["tiles_a_block"] = tiles;
  }
  static Extent extent(const Three& e) { return {e[0], e[1], e[2]}; }
  size_t element() const { return shape_.storage == kFloat32 ? 4 : 2; }
  void* work(Address workspace) const { return pointer("workspace", workspace, 16); }

  const ConvPlan& plan(Direction direction) {
    std::optional<ConvPlan>& slot = direction == Direction::kForward ? forward_ : backward_;
    if (!slot) {
      ConvPlan made;
      check(plan_conv(shape_, direction, device_, made));
      slot = made;
    }
    return *slot;
  }
  const WgradPlan& wgrad() {
    if (!wgrad_) {
      WgradPlan made;
      check(plan_wgrad(shape_, device_, made));
      wgrad_ = made;
    }
    return *wgrad_;
  }
  Weight weight_of(Address weight, const std::array<int64_t, 5>& s) const {
    return {pointer("weight", weight, element()), {s[0], s[1], s[2], s[3], s[4]}};
  }
  void inputs(const Sources& sources, Input (&to)[2]) const {
    if (sources.empty() || sources.size() > 2) throw std::invalid_argument("there must be one source or two");
    int64_t channels = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      const auto& s = sources[i];
      check_range("channels", s[2], 1, shape_.ci);
      check_range("act", s[3], 0, kActivations - 1);
      to[i] = {pointer("x", static_cast<Address>(s[0]), element()),
               pointer_or_null<float>("coef", static_cast<Address>(s[1])), static_cast<int>(s[2]),
               static_cast<int>(s[3])};
      channels += s[2];
    }
    if (channels != shape_.ci) {
      throw std::invalid_argument("the sources must have " + std::to_string(shape_.ci) + " channels together, got " +
                                  std::to_string(channels));
    }
    const int lanes = 16 / static_cast<int>(element());
    if (sources.size() == 2 && to[0].channels % lanes) {
      throw std::invalid_argument("the channels of the first of two sources must be a multiple of " +
                                  std::to_string(lanes) + ", got " + std::to_string(to[0].channels));
    }
  }

  ConvShape shape_{};
  Device device_;
  std::optional<ConvPlan> forward_, backward_;
  std::optional<WgradPlan> wgrad_;
};

py::tuple py_device() {
  const Device d = device();
  return py::make_tuple(d.capability, d.multiprocessors, d.shared_bytes);
}

#ifndef FASTFILM_CUDA_ARCHS
#define FASTFILM_CUDA_ARCHS "80"
#endif

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of fastfilm; fastfilm.ops.cuda is their interface.";
  m.attr("architectures") = FASTFILM_CUDA_ARCHS;
  m.def("device", &py_device);
  m.def("reduction_workspace", &py_reduction_workspace, py::arg("dtype"), py::arg("n"), py::arg("s"), py::arg("c"));
  m.def("apply", &py_apply, py::arg("y"), py::arg("coef"), py::arg("v"), py::arg("dtype"), py::arg("act"),
        py::arg("n"), py::arg("s"), py::arg("c"), py::arg("stream"));
  m.def("apply_backward", &py_apply_backward, py::arg("dv"), py::arg("y"), py::arg("coef"), py::arg("dy"),
        py::arg("dcoef"), py::arg("workspace"), py::arg("dtype"), py::arg("act"), py::arg("n"), py::arg("s"),
        py::arg("c"), py::arg("stream"));
  m.def("moments", &py_moments, py::arg("y"), py::arg("pre"), py::arg("stats"), py::arg("workspace"),
        py::arg("dtype"), py::arg("act"), py::arg("n"), py::arg("s"), py::arg("c"), py::arg("stream"));
  m.def("moments_backward", &py_moments_backward, py::arg("dy"), py::arg("dstats"), py::arg("y"), py::arg("stats"),
        py::arg("pre"), py::arg("e"), py::arg("dpre"), py::arg("workspace"), py::arg("dtype"), py::arg("act"),
        py::arg("n"), py::arg("s"), py::arg("c"), py::arg("stream"));
  py::class_<Convolution>(m, "Convolution")
      .def(py::init<int, int, int64_t, int, int, Convolution::Three, Convolution::Three, Convolution::Three,
                    Convolution::Three, int, Convolution::Three>(),
           py::arg("dtype"), py::arg("dims"), py::arg("n"), py::arg("ci"), py::arg("co"), py::arg("in_size"),
           py::arg("out_size"), py::arg("kernel"), py::arg("padding"), py::arg("stride"), py::arg("device"))
      .def("check", &Convolution::check_plans)
      .def("forward_workspace", &Convolution::forward_bytes)
      .def("backward_workspace", &Convolution::backward_bytes)
      .def("weight_gradient_workspace", &Convolution::weight_bytes)
      .def("forward", &Convolution::forward, py::arg("sources"), py::arg("weight"), py::arg("strides"),
           py::arg("bias"), py::arg("pre"), py::arg("pre_act"), py::arg("out_coef"), py::arg("out_act"),
           py::arg("y"), py::arg("stats"), py::arg("workspace"), py::arg("stream"))
      .def("backward", &Convolution::backward, py::arg("e"), py::arg("weight"), py::arg("strides"),
           py::arg("source"), py::arg("dx"), py::arg("dcoef"), py::arg("workspace"), py::arg("stream"))
      .def("weight_gradient", &Convolution::weight_gradient, py::arg("e"), py::arg("sources"), py::arg("dweight"),
           py::arg("workspace"), py::arg("stream"))
      .def("facts", &Convolution::facts, py::arg("kernel"));
#ifdef FASTFILM_EMULATED
  m.def("set_seed", &emulated::set_seed, py::arg("seed"));
  m.def("set_block_limit", &emulated::set_block_limit, py::arg("value"));
#endif
}
