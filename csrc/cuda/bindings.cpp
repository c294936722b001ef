// Python bindings of the CUDA kernels. Tensors arrive as addresses, sizes and a stream, so that no PyTorch header
// is needed and one build serves every version of it.
#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>
#include <string>

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
#ifdef FASTFILM_EMULATED
  m.def("set_seed", &emulated::set_seed, py::arg("seed"));
#endif
}
