// Python bindings of the CUDA kernels. Tensors arrive as addresses, sizes and a stream, so no PyTorch header is needed
// and one build serves all versions of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "calls.h"
#include "pack.h"
#include "pointwise.h"
#include "sm90/calls.h"
#ifdef FASTFILM_EMULATED
#include "primitives.h"
#endif

namespace py = pybind11;
using namespace fastfilm::cuda;
using fastfilm::kActivations;

#ifndef FASTFILM_CUDA_ARCHS
#define FASTFILM_CUDA_ARCHS "80;90a"
#endif

namespace {

// Whether the kernels of sm90/ were compiled, which need a target of their own.
const bool kBuiltForWarpgroups = std::string(FASTFILM_CUDA_ARCHS).find("90a") != std::string::npos;

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

// An address as a pointer; an error if it is null or not a multiple of `align`.
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
  // A feature map, aligned to its elements. Kernels take 16 bytes at a time where it lies on 16 bytes.
  void* feature_map(const char* name, Address address) const {
    return pointer(name, address, map.storage == kFloat32 ? 4 : 2);
  }

  Map map;
};

int64_t py_reduction_workspace(int dtype, int64_t n, int64_t s, int64_t c) {
  return reduction_workspace(Call(dtype, 0, n, s, c, 0).map);
}

void py_apply(Address y, Address coef, Address v, int dtype, int act, int64_t n, int64_t s, int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  check(apply(call.map, call.feature_map("y", y), pointer<float>("coef", coef), call.feature_map("v", v)));
}

void py_apply_backward(Address dv, Address y, Address coef, Address dy, Address dcoef, Address workspace, int dtype,
                       int act, int64_t n, int64_t s, int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  check(apply_backward(call.map, call.feature_map("dv", dv), call.feature_map("y", y), pointer<float>("coef", coef),
                       dy ? call.feature_map("dy", dy) : nullptr, pointer<float>("dcoef", dcoef),
                       pointer<float>("workspace", workspace)));
}

void py_moments(Address y, Address pre, Address stats, Address workspace, int dtype, int act, int64_t n, int64_t s,
                int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  check(moments(call.map, call.feature_map("y", y), pointer_or_null<float>("pre", pre), pointer<float>("stats", stats),
                pointer<float>("workspace", workspace)));
}

void py_moments_backward(Address dy, Address dstats, Address y, Address stats, Address pre, Address e, Address dpre,
                         Address workspace, int dtype, int act, int64_t n, int64_t s, int64_t c, Address stream) {
  const Call call(dtype, act, n, s, c, stream);
  const void* dy_ = dy ? call.feature_map("dy", dy) : nullptr;
  check(moments_backward(call.map, dy_, pointer<float>("dstats", dstats), call.feature_map("y", y),
                         pointer<float>("stats", stats), pointer_or_null<float>("pre", pre), call.feature_map("e", e),
                         pre ? pointer<float>("dpre", dpre) : nullptr, pointer<float>("workspace", workspace)));
}

// A block behind its convolution, as far as it does not change from call to call.
class BlockOf {
 public:
  BlockOf(int norm, int order, int position, bool use_input, bool update, double eps, double unbiased, double slope) {
    check_range("norm", norm, 0, kNorms - 1);
    check_range("order", order, 0, kOrders - 1);
    check_range("position", position, 0, kPositions - 1);
    if (use_input && norm == kNoNorm) throw std::invalid_argument("use_input needs a norm");
    if (update && !use_input) throw std::invalid_argument("update needs use_input");
    block_.norm = norm;
    block_.order = order;
    block_.position = position;
    block_.uses_input = use_input;
    block_.update = update;
    block_.eps = static_cast<float>(eps);
    block_.unbiased = static_cast<float>(unbiased);
    block_.slope_value = static_cast<float>(slope);
  }

  // (address, dtype, step, pitch) of running mean and variance, norm weight and bias, bias, gamma, beta, mask and slope.
  using Tensors = std::array<std::array<int64_t, 4>, 9>;

  Block call(const Tensors& tensors, double momentum, Address coef) const {
    Block b = block_;
    b.momentum = static_cast<float>(momentum);
    b.coef = pointer<float>("coef", coef);
    Numbers* const to[] = {&b.running_mean, &b.running_var, &b.norm_weight, &b.norm_bias, &b.bias,
                           &b.gamma,        &b.beta,        &b.mask,        &b.slope};
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto& t = tensors[i];
      if (t[0] == 0) continue;
      check_storage(static_cast<int>(t[1]));
      void* data = pointer("a tensor of the block", static_cast<Address>(t[0]), bytes_of(static_cast<int>(t[1])));
      *to[i] = {data, static_cast<int>(t[1]), static_cast<int>(t[2]), static_cast<int>(t[3])};
    }
    const bool normed = b.norm != kNoNorm && !b.uses_input;
    if ((b.update || normed) && !(b.running_mean.data && b.running_var.data)) {
      throw std::invalid_argument("running statistics are null");
    }
    return b;
  }

 private:
  Block block_{};
};

// One convolution of one shape: its layouts, made when they are first needed, and its kernels.
class Convolution {
 public:
  using Three = std::array<int, 3>;

  Convolution(int storage, int dims, int64_t n, int ci, int co, Three in, Three out, Three kernel, Three padding,
              int stride, std::array<int, 3> device, bool tf32, const std::string& wgmma)
      : device_{device[1], device[2], device[0]}, wgmma_(wgmma) {
    if (wgmma != "where faster" && wgmma != "always" && wgmma != "never") {
      throw std::invalid_argument("wgmma must be 'where faster', 'always' or 'never', got '" + wgmma + "'");
    }
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
    if (tf32 && storage != kFloat32) throw std::invalid_argument("tf32 is a way to multiply float32");
    shape_ = {tf32 ? kTensorFloat : storage,
              dims,
              n,
              ci,
              co,
              extent(in),
              extent(out),
              extent(kernel),
              extent(padding),
              stride};
  }

  int64_t forward_bytes() {
    return std::visit([&](const auto& plan) { return forward_workspace(plan, shape_.storage); },
                      plan(Direction::kForward));
  }
  // Bytes of the workspace of `gradients` at the input, at the weight, or at both.
  int64_t gradients_bytes(bool at_input, bool at_weight) {
    int64_t bytes = at_weight ? beside_weight() : 0;
    if (at_input) {
      bytes += std::visit([&](const auto& plan) { return backward_workspace(plan, shape_.storage); },
                          plan(Direction::kBackward));
    }
    return bytes;
  }

  // Throws if one of the three kernels has no layout on the device.
  void check_plans() {
    plan(Direction::kForward);
    plan(Direction::kBackward);
    wgrad();
  }

  // One source or two, each (x, coef, channels, act).
  using Sources = std::vector<std::array<int64_t, 4>>;
  // (dy, y, stats, dstats, pre, scale, pre_act). Without y the gradient at the raw output is dy, or scale * dy.
  using GivenGradient = std::array<int64_t, 7>;
  // One source or two: (x, coef, channels, act, dx, dcoef, add).
  using Outputs = std::vector<std::array<int64_t, 7>>;

  void forward(const Sources& sources, Address weight, const std::array<int64_t, 5>& strides, Address bias, Address pre,
               int pre_act, Address out_coef, int out_act, Address y, Address raw, Address stats, const BlockOf* block,
               const BlockOf::Tensors& tensors, double momentum, Address coef, Address workspace, Address stream) {
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
    call.raw = pointer_or_null("raw", raw, element());
    call.stats = pointer_or_null<float>("stats", stats);
    if (block) call.block = block->call(tensors, momentum, coef);
    if (call.block.uses_input && !call.stats) throw std::invalid_argument("stats is null");
    using fastfilm::cuda::forward;
    check(std::visit([&](const auto& plan) {
      return forward(plan, shape_.storage, call, work(workspace), reinterpret_cast<Stream>(stream));
    }, plan(Direction::kForward)));
  }

  // The gradients at the sources, if there are outputs, and at the weight, if there are sources.
  void gradients(const GivenGradient& gradient, Address weight, const std::array<int64_t, 5>& strides,
                 const Outputs& outputs, const Sources& sources, Address dweight,
                 const std::array<int64_t, 5>& dstrides, Address dpre, Address workspace, Address stream_) {
    if (outputs.empty() && sources.empty()) throw std::invalid_argument("no gradient is wanted");
    const Stream stream = reinterpret_cast<Stream>(stream_);
    const Gradient at_output = gradient_of(gradient);
    char* memory = static_cast<char*>(work(workspace));
    Backward at_input{at_output, {}, {}};
    if (!outputs.empty()) backward_of(outputs, weight, strides, at_input);
    WeightSums left{};
    if (!sources.empty()) {
      WeightGradient call{at_output,
                          {},
                          pointer("dweight", dweight, element()),
                          weight_strides(dstrides),
                          pointer_or_null<float>("dpre", dpre)};
      inputs(sources, call.inputs);
      check(std::visit([&](const auto& plan) {
        return weight_gradient(plan, shape_.storage, call, memory, left, stream);
      }, wgrad()));
      memory += beside_weight();
    }
    if (outputs.empty()) {
      check(prepare(Packing<ConvPlan>{}, {left}, shape_.storage, stream));
    } else {
      check(std::visit([&](const auto& plan) { return backward(plan, shape_.storage, at_input, left, memory, stream); },
                       plan(Direction::kBackward)));
    }
  }

  // How the kernel "forward", "backward" or "weight" is laid out.
  py::dict facts(const std::string& kernel) {
    py::dict facts;
    if (kernel == "weight") {
      if (const auto* layout = std::get_if<sm90::WeightLayout>(&wgrad())) {
        describe_warpgroups(facts, *layout);
        return facts;
      }
      const WgradPlan& p = std::get<WgradPlan>(wgrad());
      facts["instruction"] = "mma";
      facts["why_not_wgmma"] = why_not_wgmma_[kernel];
      describe(facts, p, p.bm, p.bn);
      return facts;
    }
    if (kernel != "forward" && kernel != "backward") {
      throw std::invalid_argument("kernel must be forward, backward or weight, got '" + kernel + "'");
    }
    const Plan& plan = this->plan(kernel == "backward" ? Direction::kBackward : Direction::kForward);
    if (const auto* p = std::get_if<sm90::Layout>(&plan)) {
      describe_warpgroups(facts, *p);
      return facts;
    }
    const ConvPlan& p = std::get<ConvPlan>(plan);
    facts["instruction"] = "mma";
    facts["why_not_wgmma"] = why_not_wgmma_[kernel];
    describe(facts, p, p.bn, p.bk);
    facts["resident"] = p.resident;
    facts["part"] = p.part;
    facts["bytes_an_output"] = bytes_an_output(p, static_cast<int>(element()));
    return facts;
  }

 private:
  void backward_of(const Outputs& outputs, Address weight, const std::array<int64_t, 5>& strides,
                   Backward& call) const {
    call.weight = weight_of(weight, strides);
    if (outputs.size() > 2) throw std::invalid_argument("there must be one source or two");
    int64_t channels = 0;
    for (size_t i = 0; i < outputs.size(); ++i) channels += output_of(outputs[i], call.outputs[i]);
    check_channels(channels, call.outputs[0].channels, outputs.size() == 2);
  }
  // The part of a workspace that the gradient at the weight uses.
  int64_t beside_weight() {
    const int64_t bytes = std::visit([](const auto& plan) { return weight_gradient_workspace(plan); }, wgrad());
    return (bytes + 255) / 256 * 256;
  }

  template <class Plan>
  static void describe(py::dict& facts, const Plan& p, int rows, int columns) {
    facts["tile"] = py::make_tuple(1 << p.tile_log2.d, 1 << p.tile_log2.h, 1 << p.tile_log2.w);
    facts["channels"] = py::make_tuple(rows, columns);
    facts["shared_bytes"] = p.shared_bytes;
    facts["blocks"] = p.resident_blocks;
    facts["tiles_a_block"] = p.tiles_a_group;
    facts["groups"] = p.groups;
  }
  static void describe_warpgroups(py::dict& facts, const sm90::Layout& p) {
    facts["instruction"] = "wgmma";
    facts["tile"] = py::make_tuple(1 + p.pair.d, sm90::kLines * p.shifts + p.half.h + p.pair.h,
                                   8 + p.half.w + p.pair.w);
    facts["channels"] = py::make_tuple(p.bn, p.bk);
    facts["shared_bytes"] = p.shared_bytes;
    facts["blocks"] = 1;
    facts["tiles_a_block"] = p.units_a_group;
    facts["groups"] = p.groups;
    facts["resident"] = p.resident;
    facts["part"] = p.stage_slices;
    facts["shifts"] = p.shifts;
    facts["useful"] = sm90::useful(p);
    int height = 0, width = 0;
    for (const sm90::Reads& reads : p.reads) {
      height = std::max(height, reads.slab.size.h);
      width = std::max(width, reads.slab.size.w);
    }
    facts["plane"] = py::make_tuple(height, width);
    facts["slots"] = p.slots;
    facts["stages"] = p.stages;
  }
  static void describe_warpgroups(py::dict& facts, const sm90::WeightLayout& p) {
    facts["instruction"] = "wgmma";
    facts["tile"] = py::make_tuple(p.tile.d, p.tile.h, p.tile.w);
    facts["channels"] = py::make_tuple(sm90::kRows, p.bn);
    facts["slots"] = sm90::kTurns;
    facts["shared_bytes"] = p.shared_bytes;
    facts["blocks"] = 1;
    facts["tiles_a_block"] = p.tiles_a_group;
    facts["groups"] = p.groups;
  }
  static Extent extent(const Three& e) { return {e[0], e[1], e[2]}; }
  size_t element() const { return bytes_of(shape_.storage); }
  void* work(Address workspace) const { return pointer("workspace", workspace, 16); }

  // Why not the kernels of sm90/, whose layout `lay_out` makes; empty: they are chosen.
  template <class Layout, class F>
  std::string why_not(Layout& layout, F lay_out) const {
    if (wgmma_ == "never") return "wgmma is 'never'";
    if (device_.capability != 90) return "the GPU is sm_" + std::to_string(device_.capability) + ", not sm_90";
    if (!kBuiltForWarpgroups) return "built without the target 90a";
    const std::string reason = lay_out(layout);
    if (!reason.empty() || wgmma_ == "always" || sm90::wins(layout)) return reason;
    return "only " + std::to_string(static_cast<int>(100 * sm90::useful(layout))) +
           " % of their products would be of use";
  }

  using Plan = std::variant<ConvPlan, sm90::Layout>;

  const Plan& plan(Direction direction) {
    std::optional<Plan>& slot = direction == Direction::kForward ? forward_ : backward_;
    if (!slot) {
      sm90::Layout layout;
      const std::string reason = why_not(
          layout, [&](sm90::Layout& to) { return sm90::lay_out(shape_, direction, device_, to); });
      why_not_wgmma_[direction == Direction::kForward ? "forward" : "backward"] = reason;
      if (reason.empty()) {
        slot = layout;
      } else {
        ConvPlan made;
        check(plan_conv(shape_, direction, device_, made));
        slot = made;
      }
    }
    return *slot;
  }
  using WeightPlan = std::variant<WgradPlan, sm90::WeightLayout>;

  const WeightPlan& wgrad() {
    if (!wgrad_) {
      sm90::WeightLayout layout;
      const std::string reason = why_not(layout,
                                         [&](sm90::WeightLayout& to) { return sm90::lay_out(shape_, device_, to); });
      why_not_wgmma_["weight"] = reason;
      if (reason.empty()) {
        wgrad_ = layout;
      } else {
        WgradPlan made;
        check(plan_wgrad(shape_, device_, made));
        wgrad_ = made;
      }
    }
    return *wgrad_;
  }
  Weight weight_of(Address weight, const std::array<int64_t, 5>& s) const {
    return {pointer("weight", weight, element()), weight_strides(s)};
  }
  static WeightStrides weight_strides(const std::array<int64_t, 5>& s) { return {s[0], s[1], s[2], s[3], s[4]}; }
  template <class T = void>
  static T* at(const char* name, int64_t address, size_t align = 4) {
    return pointer_or_null<T>(name, static_cast<Address>(address), align);
  }
  Gradient gradient_of(const GivenGradient& g) const {
    check_range("pre_act", g[6], 0, kActivations - 1);
    Gradient to{pointer("dy", static_cast<Address>(g[0]), element()),
                at("y", g[1], element()),
                at<float>("stats", g[2]),
                at<float>("dstats", g[3]),
                at<float>("pre", g[4]),
                at<float>("scale", g[5]),
                static_cast<int>(g[6])};
    if (to.y && !(to.stats && to.dstats)) throw std::invalid_argument("y needs stats and dstats");
    return to;
  }
  void inputs(const Sources& sources, Input (&to)[2]) const {
    if (sources.empty() || sources.size() > 2) throw std::invalid_argument("there must be one source or two");
    int64_t channels = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      const auto& s = sources[i];
      check_range("channels", s[2], 1, shape_.ci);
      check_range("act", s[3], 0, kActivations - 1);
      to[i] = {pointer("x", static_cast<Address>(s[0]), element()), at<float>("coef", s[1]), static_cast<int>(s[2]),
               static_cast<int>(s[3])};
      channels += s[2];
    }
    check_channels(channels, to[0].channels, sources.size() == 2);
  }
  int64_t output_of(const std::array<int64_t, 7>& s, Output& to) const {
    check_range("channels", s[2], 1, shape_.ci);
    check_range("act", s[3], 0, kActivations - 1);
    to = {at("x", s[0], element()),
          at<float>("coef", s[1]),
          static_cast<int>(s[2]),
          static_cast<int>(s[3]),
          at("dx", s[4], element()),
          at<float>("dcoef", s[5]),
          s[6] != 0};
    if (to.dx && to.coef && !to.dcoef) throw std::invalid_argument("dcoef is null");
    if (to.dx && to.coef && !to.x) throw std::invalid_argument("x is null");
    return s[2];
  }
  void check_channels(int64_t channels, int first, bool two) const {
    if (channels != shape_.ci) {
      throw std::invalid_argument("the sources must have " + std::to_string(shape_.ci) + " channels together, got " +
                                  std::to_string(channels));
    }
    const int lanes = 16 / static_cast<int>(element());
    if (two && first % lanes) {
      throw std::invalid_argument("the channels of the first of two sources must be a multiple of " +
                                  std::to_string(lanes) + ", got " + std::to_string(first));
    }
  }

  ConvShape shape_{};
  Device device_;
  std::string wgmma_;
  std::map<std::string, std::string> why_not_wgmma_;  // of each kernel that has a layout
  std::optional<Plan> forward_, backward_;
  std::optional<WeightPlan> wgrad_;
};

py::tuple py_device() {
  const Device d = device();
  return py::make_tuple(d.capability, d.multiprocessors, d.shared_bytes);
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of fastfilm; fastfilm.ops.launchers.cuda is their interface.";
  m.attr("architectures") = FASTFILM_CUDA_ARCHS;
  m.def("device", &py_device);
  // a function or method, and the names of its arguments
  const auto def = [](auto& scope, const char* name, auto function, auto... arguments) {
    scope.def(name, function, py::arg(arguments)...);
  };
  def(m, "reduction_workspace", &py_reduction_workspace, "dtype", "n", "s", "c");
  def(m, "apply", &py_apply, "y", "coef", "v", "dtype", "act", "n", "s", "c", "stream");
  def(m, "apply_backward", &py_apply_backward, "dv", "y", "coef", "dy", "dcoef", "workspace", "dtype", "act", "n", "s",
      "c", "stream");
  def(m, "moments", &py_moments, "y", "pre", "stats", "workspace", "dtype", "act", "n", "s", "c", "stream");
  def(m, "moments_backward", &py_moments_backward, "dy", "dstats", "y", "stats", "pre", "e", "dpre", "workspace",
      "dtype", "act", "n", "s", "c", "stream");
  py::class_<BlockOf> block(m, "Block");
  block.def(py::init<int, int, int, bool, bool, double, double, double>(), py::arg("norm"), py::arg("order"),
            py::arg("position"), py::arg("use_input"), py::arg("update"), py::arg("eps"), py::arg("unbiased"),
            py::arg("slope"));
  py::class_<Convolution> convolution(m, "Convolution");
  convolution.def(py::init<int, int, int64_t, int, int, Convolution::Three, Convolution::Three, Convolution::Three,
                           Convolution::Three, int, Convolution::Three, bool, const std::string&>(),
                  py::arg("dtype"), py::arg("dims"), py::arg("n"), py::arg("ci"), py::arg("co"), py::arg("in_size"),
                  py::arg("out_size"), py::arg("kernel"), py::arg("padding"), py::arg("stride"), py::arg("device"),
                  py::arg("tf32") = false, py::arg("wgmma") = "where faster");
  def(convolution, "check", &Convolution::check_plans);
  def(convolution, "forward_workspace", &Convolution::forward_bytes);
  def(convolution, "gradients_workspace", &Convolution::gradients_bytes, "at_input", "at_weight");
  def(convolution, "forward", &Convolution::forward, "sources", "weight", "strides", "bias", "pre", "pre_act",
      "out_coef", "out_act", "y", "raw", "stats", "block", "tensors", "momentum", "coef", "workspace", "stream");
  def(convolution, "gradients", &Convolution::gradients, "gradient", "weight", "strides", "outputs", "sources",
      "dweight", "dstrides", "dpre", "workspace", "stream");
  def(convolution, "facts", &Convolution::facts, "kernel");
#ifdef FASTFILM_EMULATED
  m.def("set_seed", &emulated::set_seed, py::arg("seed"));
  m.def("launches", &emulated::launches);
  m.def("set_block_limit", &emulated::set_block_limit, py::arg("value"));
#endif
}
