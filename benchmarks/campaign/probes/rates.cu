// The rate of back-to-back wgmma on all multiprocessors, by where its operands lie.
#include <algorithm>
#include <cmath>

#include "layout.h"
#include "probe.h"
#include "wgmma.cuh"

namespace probes {
namespace {

constexpr int kSharedBytes = 227 * 1024;
constexpr int kMostSteps = 36;
constexpr double kTensorPeak = 4096;  // bf16 FLOP/clk/SM of an H100
constexpr double kSharedPeak = 128;   // bytes/clk/SM

// Where a kernel's operands start: in 16-byte units, added to a descriptor.
struct Walk {
    uint64_t a, b;              // descriptors of the first step; starts relative to shared memory
    uint32_t a_warpgroup, b_warpgroup, a_set[4], b_set[4];
    uint32_t a_step[kMostSteps], b_step[kMostSteps];
    int bytes;                  // of shared memory in use
};

// Every warpgroup has `Sets` accumulators of 64 × N, to each of which a step adds one wgmma; all steps of an
// iteration are one group: the other warpgroups' work hides its end.
template <int N, int Sets, int Steps, int Warpgroups, bool Registers, int TransA, int TransB>
__global__ void __launch_bounds__(128 * Warpgroups, 1)
    rate(const __grid_constant__ Walk walk, int iterations, long long* cycles, float* sink) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t raw[];
    uint8_t* shared = aligned_shared(raw);
    const int t = threadIdx.x;
    // bfloat16 of magnitude 1 to 2 with random sign and mantissa: zeros would draw too little power
    for (int i = t; i < walk.bytes / 4; i += blockDim.x)
        reinterpret_cast<uint32_t*>(shared)[i] = (tile::hash(i) & 0x807f807f) | 0x3f803f80;
    fence_proxy();
    __syncthreads();
    const int warpgroup = __shfl_sync(~0u, t / 128, 0);
    const uint32_t base = shared_address(shared) >> 4;
    uint32_t a = uint32_t(walk.a) + base + warpgroup * walk.a_warpgroup;
    uint32_t b = uint32_t(walk.b) + base + warpgroup * walk.b_warpgroup;
    const uint64_t a_high = walk.a >> 32 << 32, b_high = walk.b >> 32 << 32;
    uint32_t fragments[4][4];
    for (int k = 0; k < 4; ++k)
        for (int r = 0; r < 4; ++r)
            fragments[k][r] = (tile::hash(t * 16 + k * 4 + r) & 0x807f807f) | 0x3f803f80;
    float acc[Sets][N / 2] = {};
    const long long begin = clock64();
    for (int i = 0; i < iterations; ++i) {
        asm volatile("" : "+r"(a), "+r"(b));  // descriptors are sums made here, not registers kept
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < Steps; ++s)
#pragma unroll
            for (int set = 0; set < Sets; ++set) {
                const uint64_t from = b_high | (b + walk.b_step[s] + walk.b_set[set]);
                if constexpr (Registers) wgmma<TransA, TransB>(acc[set], fragments[s % 4], from);
                else
                    wgmma<TransA, TransB>(acc[set], a_high | (a + walk.a_step[s] + walk.a_set[set]),
                                          from);
            }
        wgmma_commit();
        wgmma_wait<0>();
    }
    __syncthreads();
    if (t == 0) cycles[blockIdx.x] = clock64() - begin;
    float sum = 0;
    for (int set = 0; set < Sets; ++set)
        for (int i = 0; i < N / 2; ++i) sum += acc[set][i];
    sink[blockIdx.x * blockDim.x + t] = sum;
#endif
}

using Kernel = void (*)(const Walk, int, long long*, float*);

// A kernel's operands, and the shape that its rate is computed from. Chunks of eight channels are an odd or an
// even number of 16-byte units apart.
struct Form {
    std::string name, asked;
    Kernel kernel;
    int n, sets, steps, warpgroups;
    bool registers;
    Walk walk;
};

constexpr uint32_t kWeights = kTaps * kRows * kChannels * 2 / kUnit;  // 16-byte units

uint32_t units(int voxels, bool even) { return even ? (voxels + 1) / 2 * 2 : voxels | 1; }

Walk start(Strides a, Strides b, uint32_t b_at) {
    Walk w{};
    w.a = descriptor(0, a);
    w.b = descriptor(b_at * kUnit, b);
    return w;
}

// 64 output channels as M, voxels as N: nine taps × 64 channels, a slab (or a half of it) for each set.
Walk fprop(int pitch, int lines, bool even, bool halves) {
    const uint32_t chunk = units(pitch * lines, even), slab = chunk * kChannels / 8;
    Walk w = start({kRows * kUnit, 128, 0}, {chunk * kUnit, uint32_t(pitch * kUnit), 0}, kWeights);
    w.b_set[1] = halves ? 8 : slab;
    w.b_warpgroup = halves ? slab : 2 * slab;
    for (int s = 0; s < kMostSteps; ++s) {
        const int tap = s / 4, k = s % 4;
        w.a_step[s] = (tap * 8 + k * 2) * kRows;
        w.b_step[s] = tap / 3 * pitch + tap % 3 + 2 * k * chunk;
    }
    w.bytes = (kWeights + 2 * w.b_warpgroup) * kUnit;
    return w;
}

// Both operands K-major with every core matrix on 128 bytes, with swizzle or without; 128 voxels a set.
Walk aligned(bool swizzle) {
    const uint32_t set = 128 * kChannels * 2 / kUnit;
    const Strides sw{16, 1024, 1};
    Walk w = swizzle ? start(sw, sw, kWeights)
                     : start({kRows * kUnit, 128, 0}, {128 * kUnit, 128, 0}, kWeights);
    w.b_set[1] = set, w.b_warpgroup = 2 * set;
    for (int s = 0; s < kMostSteps; ++s) {
        w.a_step[s] = s / 4 * 512 + s % 4 * (swizzle ? 2 : 2 * kRows);
        w.b_step[s] = s % 4 * (swizzle ? 2 : 256);
    }
    w.bytes = (kWeights + 4 * set) * kUnit;
    return w;
}

// Weight gradient of a 16 × 16 tile: a warpgroup for each kernel row, an accumulator for each tap of the row,
// steps of two lines of eight voxels; e from registers, or from [chunk][256 voxels] before the slab.
Walk wgrad(bool even) {
    const uint32_t pitch = 18, chunk = units(18 * 18, even), e_chunk = units(256, even);
    Walk w = start({128, e_chunk * kUnit, 0}, {pitch * kUnit, chunk * kUnit, 0}, e_chunk * 8);
    w.b_set[1] = 1, w.b_set[2] = 2, w.b_warpgroup = pitch;
    for (int s = 0; s < 16; ++s) {
        w.a_step[s] = s * 16;
        w.b_step[s] = s / 8 * 8 + s % 8 * 2 * pitch;
    }
    w.bytes = (e_chunk + chunk) * 8 * kUnit;
    return w;
}

// Voxels as M (8 × 8 a set, four of them a 16 × 16 tile), 32 output channels as N.
Walk voxels_as_m() {
    const uint32_t pitch = 18, chunk = units(18 * 18, false), weights = kWeights / 2;
    Walk w = start({chunk * kUnit, pitch * kUnit, 0}, {32 * kUnit, 128, 0}, chunk * 16);
    w.a_warpgroup = chunk * 8;
    for (uint32_t set = 0; set < 4; ++set) w.a_set[set] = set / 2 * 8 * pitch + set % 2 * 8;
    for (int s = 0; s < kMostSteps; ++s) {
        const int tap = s / 4, k = s % 4;
        w.a_step[s] = tap / 3 * pitch + tap % 3 + 2 * k * chunk;
        w.b_step[s] = (tap * 8 + k * 2) * 32;
    }
    w.bytes = (weights + chunk * 16) * kUnit;
    return w;
}

const std::vector<Form>& forms() {
    // the figures behind each kernel repeat its template's
    static const Kernel n128 = rate<128, 2, 36, 2, false, 0, 0>;
    static const Kernel n128_registers = rate<128, 2, 36, 2, true, 0, 0>;
    static const Kernel n64 = rate<64, 2, 36, 2, false, 0, 0>;
    static const Kernel n32 = rate<32, 4, 36, 2, false, 0, 0>;
    static const Kernel gradient = rate<64, 3, 16, 3, true, 0, 1>;
    static const Kernel gradient_shared = rate<64, 3, 16, 3, false, 1, 1>;
    const std::string odd = ", odd chunks";
    const std::string even = ", even chunks";
    static const std::vector<Form> all{
        {"rate_swizzled", "128-byte swizzle", n128, 128, 2, 36, 2, false, aligned(true)},
        {"rate_aligned", "no swizzle, aligned to 128", n128, 128, 2, 36, 2, false, aligned(false)},
        {"rate_pitch18_odd", "nine taps, pitch 18" + odd, n128, 128, 2, 36, 2, false,
         fprop(18, 18, false, true)},
        {"rate_pitch18_even", "nine taps, pitch 18" + even, n128, 128, 2, 36, 2, false,
         fprop(18, 18, true, true)},
        {"rate_pitch10_odd", "nine taps, pitch 10" + odd, n128, 128, 2, 36, 2, false,
         fprop(10, 18, false, false)},
        {"rate_pitch10_even", "nine taps, pitch 10" + even, n128, 128, 2, 36, 2, false,
         fprop(10, 18, true, false)},
        {"rate_a_registers", "nine taps, pitch 18" + odd, n128_registers, 128, 2, 36, 2, true,
         fprop(18, 18, false, true)},
        {"rate_n64", "nine taps, 8 x 8 tiles, pitch 10" + odd, n64, 64, 2, 36, 2, false,
         fprop(10, 10, false, false)},
        {"rate_wgrad_odd", "MN-major B, pitch 18" + odd, gradient, 64, 3, 16, 3, true, wgrad(false)},
        {"rate_wgrad_even", "MN-major B, pitch 18" + even, gradient, 64, 3, 16, 3, true, wgrad(true)},
        {"rate_wgrad_shared", "MN-major A and B, pitch 18" + odd, gradient_shared, 64, 3, 16, 3, false,
         wgrad(false)},
        {"rate_voxels_as_m", "voxels as M, nine taps, pitch 18" + odd, n32, 32, 4, 36, 2, false,
         voxels_as_m()},
    };
    return all;
}

double round_to(double x, double unit) { return std::round(x / unit) * unit; }

Answer ask(const std::string& name) {
    Form form{};
    for (const Form& f : forms())
        if (f.name == name) form = f;
    int device = 0, processors = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
    const int threads = 128 * form.warpgroups;
    Buffer<long long> cycles(processors);
    Buffer<float> sink(processors * threads);
    allow_shared(form.kernel, kSharedBytes);
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    const double an_iteration = 2.0 * kRows * form.n * kStep * form.sets * form.steps * form.warpgroups;
    const int iterations = int(12e6 * kTensorPeak / an_iteration);  // about 7 ms at the peak
    double seconds = 1e30, clocks = 1e30;
    for (int round = 0; round < 4; ++round) {  // the first warms up
        check(cudaEventRecord(begin), "event");
        form.kernel<<<processors, threads, kSharedBytes>>>(form.walk, iterations, cycles.data(),
                                                           sink.data());
        check(cudaEventRecord(end), "event");
        finish("rate");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end), "event");
        const std::vector<long long> all = cycles.values();
        if (round == 0) continue;
        seconds = std::min(seconds, ms * 1e-3);
        clocks = std::min(clocks, double(*std::max_element(all.begin(), all.end())));
    }
    const double a_processor = an_iteration * iterations;
    const double rate = a_processor / clocks;  // FLOP/clk/SM
    const double bytes = ((form.registers ? 0 : kRows) + form.n) * kStep * 2;
    const double bytes_a_flop = bytes / (2.0 * kRows * form.n * kStep);
    const double bound = std::min(kTensorPeak, kSharedPeak / bytes_a_flop);
    char note[400];
    snprintf(note, sizeof note,
             "m64n%dk16, A from %s, %s: %.0f of %.0f FLOP/clk/SM, %.0f of %.0f B/clk of shared memory; "
             "%.0f %% of the lower limit (%s; PASS from 85 %%)",
             form.n, form.registers ? "registers" : "shared memory", form.asked.c_str(), rate,
             kTensorPeak, rate * bytes_a_flop, kSharedPeak, 100 * rate / bound,
             bound < kTensorPeak ? "shared memory" : "tensor cores");
    const double figure = a_processor * processors / seconds * 1e-12;
    return {rate >= 0.85 * bound, round_to(figure, 0.1), "TFLOP/s", note};
}

}  // namespace

std::vector<Probe> rate_probes() {
    std::vector<Probe> out;
    for (const Form& form : forms()) out.push_back({form.name, ask});
    return out;
}

// Every 16-byte unit that a form reads lies in its shared memory, and no byte of A in B.
std::string rate_mistakes() {
    std::string out;
    for (const Form& form : forms()) {
        const Walk& w = form.walk;
        uint64_t last[2] = {0, 0};
        for (int warpgroup = 0; warpgroup < form.warpgroups; ++warpgroup)
            for (int s = 0; s < form.steps; ++s)
                for (int set = 0; set < form.sets; ++set)
                    for (int operand = form.registers; operand < 2; ++operand) {
                        const uint64_t d = operand ? w.b : w.a;
                        const uint64_t leading = d >> 16 & 0x3fff, stride = d >> 32 & 0x3fff;
                        const uint64_t begin =
                            (d & 0x3fff) +
                            (operand ? w.b_step[s] + w.b_set[set] + warpgroup * w.b_warpgroup
                                     : w.a_step[s] + w.a_set[set] + warpgroup * w.a_warpgroup);
                        const uint64_t rows = (operand ? form.n : kRows) / 8 - 1;
                        // with swizzle, eight rows of 128 bytes are one atom and k lies within it
                        const uint64_t end = d >> 62 ? begin / 64 * 64 + rows * stride + 64
                                                     : begin + rows * stride + leading + 8;
                        last[operand] = std::max(last[operand], end);
                    }
        if (last[1] * kUnit > uint64_t(w.bytes) || w.bytes + 1024 > kSharedBytes)
            out += form.name + ": B ends at " + std::to_string(last[1] * kUnit) + " of " +
                   std::to_string(w.bytes) + " bytes\n";
        if (last[0] > (w.b & 0x3fff)) out += form.name + ": A reaches into B\n";
        if (last[1] * kUnit + 2048 * 16 < uint64_t(w.bytes))
            out += form.name + ": B reads less than it brought\n";
    }
    return out;
}

}  // namespace probes
