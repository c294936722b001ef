// Which bytes of shared memory wgmma reads: un-swizzled operands at any 16-byte start, row pitches of a slab,
// K-major and MN-major.
#include <functional>

#include "cases.h"
#include "wgmma.cuh"

namespace probes {
namespace {

constexpr int kSharedBytes = 200 * 1024;

// One warpgroup brings the image into shared memory and adds up the steps.
template <int N, bool Registers, int TransA, int TransB>
__global__ void __launch_bounds__(128)
    operands(const uint4* image, int units, const uint32_t* fragments, const uint64_t* a,
             const uint64_t* b, int steps, float* d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t raw[];
    uint8_t* shared = aligned_shared(raw);
    const int t = threadIdx.x;
    // zeros behind the image: what a wrong rule reads there is a number
    for (int i = t; i < (kSharedBytes - 1024) / kUnit; i += 128)
        reinterpret_cast<uint4*>(shared)[i] = i < units ? image[i] : uint4{};
    fence_proxy();
    __syncthreads();
    const uint64_t base = shared_address(shared) >> 4;  // starts stay below 2^18 bytes: no carry
    float acc[N / 2] = {};
    for (int s = 0; s < steps; ++s) {
        uint32_t f[4] = {};
        if constexpr (Registers)
            for (int r = 0; r < 4; ++r)
                f[r] = fragments[((s * kRows + fragment_row(t, r)) * kStep + fragment_column(t, r)) / 2];
        wgmma_fence();
        if constexpr (Registers) wgmma<TransA, TransB>(acc, f, base + b[s]);
        else wgmma<TransA, TransB>(acc, base + a[s], base + b[s]);
        wgmma_commit();
        wgmma_wait<0>();
    }
    for (int i = 0; i < N / 2; ++i) d[accumulator_row(t, i) * N + accumulator_column(t, i)] = acc[i];
#endif
}

using Kernel = void (*)(const uint4*, int, const uint32_t*, const uint64_t*, const uint64_t*, int,
                        float*);

Kernel choose(const Case& c) {
    if (c.registers && c.n == 128 && !c.b_mn) return operands<128, true, 0, 0>;
    if (c.registers && c.n == 64 && !c.b_mn) return operands<64, true, 0, 0>;
    if (c.registers && c.n == 64 && c.b_mn) return operands<64, true, 0, 1>;
    if (c.n == 128 && !c.a_mn && !c.b_mn) return operands<128, false, 0, 0>;
    if (c.n == 64 && !c.a_mn && !c.b_mn) return operands<64, false, 0, 0>;
    if (c.n == 32 && !c.a_mn && !c.b_mn) return operands<32, false, 0, 0>;
    if (c.n == 64 && c.a_mn && c.b_mn) return operands<64, false, 1, 1>;
    if (c.n == 32 && c.a_mn && !c.b_mn) return operands<32, false, 1, 0>;
    throw std::runtime_error("no kernel for the case " + c.name);
}

std::vector<float> on_device(Case c) {
    const Kernel kernel = choose(c);
    c.image.resize((c.image.size() + 7) / 8 * 8);
    if (c.image.size() * 2 + 1024 > kSharedBytes) throw std::runtime_error(c.name + " is too large");
    const Buffer<uint16_t> image(c.image), fragments(c.fragments);
    const Buffer<uint64_t> a(c.a), b(c.b);
    const Buffer<float> d(kRows * c.n);
    allow_shared(kernel, kSharedBytes);
    kernel<<<1, 128, kSharedBytes>>>(reinterpret_cast<const uint4*>(image.data()),
                                     int(c.image.size() / 8),
                                     reinterpret_cast<const uint32_t*>(fragments.data()), a.data(),
                                     b.data(), int(c.b.size()), d.data());
    finish("operands");
    return d.values();
}

std::vector<int> taps(int pitch) {
    std::vector<int> out;
    for (int t = 0; t < kTaps; ++t) out.push_back(t / 3 * pitch + t % 3);
    return out;
}

void add(std::vector<Case>& to, const std::vector<Case>& more) {
    to.insert(to.end(), more.begin(), more.end());
}

// A convolution with 64 and with 128 voxels, and what is read at each of the nine taps.
std::vector<Case> k_major(int pitch) {
    std::vector<Case> out;
    const std::string at = "pitch " + std::to_string(pitch);
    for (int column = 0; column + 10 <= pitch; column += 8)
        for (int n : {64, 128})
            out.push_back(convolution(at + ", " + std::to_string(n) + " voxels from column " +
                                          std::to_string(column),
                                      {pitch, n / 8 + 2}, taps(pitch), n, false, column));
    out.push_back(convolution(at + ", even chunks", {pitch, 18, true}, taps(pitch), 128));
    for (int tap : taps(pitch))
        add(out, map(at + ", start " + std::to_string(tap * kUnit), {pitch, 18}, Major::k, tap));
    return out;
}

std::vector<Case> mn_major(int pitch, bool registers) {
    std::vector<Case> out;
    const std::string at = "pitch " + std::to_string(pitch) + ", start ";
    for (int tap : taps(pitch)) {
        const std::string name = at + std::to_string(tap * kUnit);
        out.push_back(weight_gradient(name, {pitch, 18}, tap, registers));
        add(out, map(name, {pitch, 18}, Major::mn, tap, !registers));
    }
    return out;
}

std::vector<Case> voxels_as_m(int pitch) {
    std::vector<Case> out;
    const std::string at = "pitch " + std::to_string(pitch);
    out.push_back(convolution(at, {pitch, 10}, taps(pitch), 32, false, 0, true));
    for (int tap : taps(pitch))
        add(out, map(at + ", start " + std::to_string(tap * kUnit), {pitch, 10}, Major::k, tap, true));
    return out;
}

struct Question {
    std::string name, asked;
    std::function<std::vector<Case>()> cases;
};

const std::vector<Question>& questions() {
    // eight columns of a slab 18 wide are core matrices of one stride; sixteen are not, so 16 × 16 voxels are
    // two products of 8 × 16
    static const Slab aligned{8, 16, true}, wide{18, 18};
    static const std::vector<Question> all{
        {"baseline_swizzled", "both operands with the 128-byte swizzle",
         [] { return std::vector<Case>{swizzled()}; }},
        {"baseline_aligned", "no swizzle, core matrices one after another, n = 128, 64, 32",
         [] {
             return std::vector<Case>{convolution("n 128", aligned, {0}, 128),
                                      convolution("n 64", {8, 8, true}, {0}, 64),
                                      convolution("n 32", {8, 8, true}, {0}, 32, false, 0, true)};
         }},
        {"baseline_registers", "A from registers, B without swizzle and aligned",
         [] {
             return std::vector<Case>{convolution("n 128", aligned, {0}, 128, true),
                                      convolution("n 64", {8, 8, true}, {0}, 64, true)};
         }},
        {"k_major_strides", "K-major B: LBO = the chunk, SBO = the row pitch; and the other way round",
         [] {
             std::vector<Case> out = map("LBO chunk, SBO pitch", wide, Major::k, 0);
             add(out, map("LBO pitch, SBO chunk", wide, Major::k, 0, false, true));
             return out;
         }},
        {"mn_major_strides", "MN-major B: LBO = the row pitch, SBO = the chunk; and the other way round",
         [] {
             std::vector<Case> out = map("LBO pitch, SBO chunk", wide, Major::mn, 0);
             add(out, map("LBO chunk, SBO pitch", wide, Major::mn, 0, false, true));
             return out;
         }},
        {"k_major_run", "K-major B, 128 voxels in a row (SBO 128), started 0 to 8 voxels further",
         [] {
             return std::vector<Case>{
                 convolution("run", {8, 18}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, 128)};
         }},
        {"k_major_pitch10", "K-major B, nine taps of a slab 10 wide", [] { return k_major(10); }},
        {"k_major_pitch18", "K-major B, nine taps of a slab 18 wide", [] { return k_major(18); }},
        {"a_registers", "A from registers, K-major B of slabs 10 and 18 wide",
         [] {
             return std::vector<Case>{convolution("pitch 10", {10, 18}, taps(10), 128, true),
                                      convolution("pitch 18", wide, taps(18), 128, true)};
         }},
        {"mn_major_pitch10", "MN-major B, nine taps of a slab 10 wide, A from registers",
         [] { return mn_major(10, true); }},
        {"mn_major_pitch18", "MN-major B, nine taps of a slab 18 wide, A from registers",
         [] { return mn_major(18, true); }},
        {"mn_major_both", "both operands MN-major from slabs 18 wide",
         [] { return mn_major(18, false); }},
        {"voxels_as_m", "K-major A, nine taps of slabs 10 and 18 wide, n = 32",
         [] {
             std::vector<Case> out = voxels_as_m(10);
             add(out, voxels_as_m(18));
             return out;
         }},
    };
    return all;
}

int differing(const std::vector<float>& got, const std::vector<float>& expected) {
    int count = 0;
    for (size_t i = 0; i < got.size(); ++i) count += !(got[i] == expected[i]);
    return count;
}

// The strides in bytes that a map shows, from its three parts.
std::string seen(const Case& c, const std::vector<std::vector<float>>& parts) {
    const bool as_a = !c.registers;
    const auto byte = [&](int row, int k) {
        const int i = as_a ? row * c.n + k : k * c.n + row;
        return int((parts[1][i] * 256 + parts[0][i]) * kUnit + parts[2][i] * 2);
    };
    const int zero = byte(0, 0);
    std::string out = "it reads from " + std::to_string(zero);
    for (int row : {1, 8, 16})
        out += ", row +" + std::to_string(row) + ": " + std::to_string(byte(row, 0) - zero);
    for (int k : {1, 8}) out += ", k +" + std::to_string(k) + ": " + std::to_string(byte(0, k) - zero);
    return out + " bytes";
}

Answer ask(const std::string& name) {
    Question question;
    for (const Question& q : questions())
        if (q.name == name) question = q;
    const std::vector<Case> cases = question.cases();
    int errors = 0, bad = 0, held = 0, others = 0, others_right = 0;
    std::string first, sight;
    std::vector<std::vector<float>> parts;
    int part_errors = 0;
    for (const Case& c : cases) {
        const std::vector<float> got = on_device(c);
        const int wrong = differing(got, c.expected);
        if (c.holds) {
            ++held, errors += wrong, bad += wrong > 0;
            if (wrong && first.empty()) first = c.name + ": " + std::to_string(wrong) + " values";
        } else {
            ++others, others_right += wrong == 0;
        }
        if (!c.map) continue;
        parts.push_back(got), part_errors += wrong;
        if (parts.size() < 3) continue;
        if (part_errors && sight.empty()) sight = c.name + ", " + seen(c, parts);
        parts.clear(), part_errors = 0;
    }
    std::string note = question.asked + "; " + std::to_string(held - bad) + " of " +
                       std::to_string(held) + " products are exact";
    if (!first.empty()) note += "; first wrong: " + first;
    if (others)
        note += others_right == others ? "; the other assignment is exact"
                                       : "; the other assignment is wrong";
    if (!sight.empty()) note += "; " + sight;
    return {errors == 0, double(errors), "errors", note};
}

}  // namespace

std::vector<Probe> operand_probes() {
    std::vector<Probe> out;
    for (const Question& q : questions()) out.push_back({q.name, ask});
    return out;
}

std::string operand_mistakes() {
    std::string out;
    for (const Question& question : questions()) {
        int others = 0, wrong = 0;
        for (const Case& c : question.cases()) {
            choose(c);
            const int count = differing(product(c), c.expected);
            if (c.holds && count)
                out += question.name + ", " + c.name + ": " + std::to_string(count) + " values differ\n";
            others += !c.holds, wrong += !c.holds && count;
        }
        if (others && !wrong) out += question.name + ": the other assignment cannot be told apart\n";
    }
    return out;
}

}  // namespace probes
