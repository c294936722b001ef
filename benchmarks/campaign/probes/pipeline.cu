// cp.async with zero-filled halo, an affine in place, fence.proxy.async and wgmma, over a million tiles.
#include <algorithm>

#include "cases.h"
#include "wgmma.cuh"

namespace probes {
namespace {

using namespace tile;

constexpr int kBatches = 123;  // of 8192 tiles: 1,007,616 in all
constexpr int kMostSlots = 3;
constexpr int kHeader = 64;  // barriers
constexpr int kPlainThreads = 256;

constexpr int pipeline_bytes() { return 1024 + kWeightBytes + kMostSlots * kSlabBytes + kHeader; }

__global__ void fill(uint16_t* x, int count, uint32_t seed) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const float value = input(i, seed);
        x[i] = __float_as_uint(value) >> 16;  // small integers are exact in bfloat16
    }
}

// Checksums by plain arithmetic: a block a tile, 32 channels × one voxel a thread.
__global__ void __launch_bounds__(kPlainThreads) plain(const uint16_t* x, uint32_t* sums) {
    extern __shared__ uint8_t raw[];
    float* weights = reinterpret_cast<float*>(raw);  // [tap][channel][output]
    float* slab = weights + kTaps * kDepth * kRows;  // [channel][voxel]
    const int t = threadIdx.x;
    for (int i = t; i < kTaps * kDepth * kRows; i += kPlainThreads)
        weights[i] = weight(i / (kDepth * kRows), i % kRows, i / kRows % kDepth);
    for (int which = blockIdx.x; which < kTiles; which += gridDim.x) {
        __syncthreads();
        for (int i = t; i < kSlab * kDepth; i += kPlainThreads) {
            const int c = i % kDepth, from = source(which, i / kDepth);
            const float raw_value =
                from < 0 ? 0 : __uint_as_float(uint32_t(x[from * kDepth + c]) << 16);
            slab[c * kSlab + i / kDepth] = from < 0 ? 0 : raw_value * scale(c) + shift(c);
        }
        __syncthreads();
        const int voxel = t % kVoxels, first = t / kVoxels * 32;
        float acc[32] = {};
        for (int tap = 0; tap < kTaps; ++tap) {
            const int at = (voxel / 8 + tap / 3) * kPitch + voxel % 8 + tap % 3;
            for (int c = 0; c < kDepth; ++c) {
                const float value = slab[c * kSlab + at];
                const float* w = weights + (tap * kDepth + c) * kRows + first;
#pragma unroll
                for (int o = 0; o < 32; ++o) acc[o] += w[o] * value;
            }
        }
        uint32_t sum = 0;
        for (int o = 0; o < 32; ++o) sum += uint32_t(int(acc[o])) * mark(first + o, voxel);
        sum = __reduce_add_sync(~0u, sum);
        if (t % 32 == 0) atomicAdd(sums + which, sum);
    }
}

// Warpgroup 0 brings tiles and transforms them in place, warpgroup 1 multiplies, with a ring of slots between
// them. With one slot, the product follows each transform at once; with more, both work at a time.
template <int Slots, bool Fence>
__global__ void __launch_bounds__(256, 1) pipeline(const uint16_t* x, uint32_t* sums) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t raw[];
    uint8_t* shared = aligned_shared(raw);
    uint8_t* slabs = shared + kWeightBytes;
    const uint32_t weights = shared_address(shared), slab = shared_address(slabs);
    const uint32_t full = slab + kMostSlots * kSlabBytes, empty = full + 8 * kMostSlots;
    const int t = threadIdx.x % 128;
    for (int i = threadIdx.x; i < kTaps * kRows * kDepth; i += 256) {
        const int c = i % kDepth, co = i / kDepth % kRows, tap = i / (kDepth * kRows);
        *reinterpret_cast<uint16_t*>(shared + weight_byte(tap, co, c)) =
            __float_as_uint(float(weight(tap, co, c))) >> 16;
    }
    if (threadIdx.x == 0)
        for (int s = 0; s < Slots; ++s) barrier_init(full + 8 * s, 128), barrier_init(empty + 8 * s, 128);
    fence_proxy();
    __syncthreads();
    const int tiles = (kTiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);

    if (threadIdx.x < 128) {
        const int chunk = t % 2;  // both chunks of a voxel are next to each other in global memory
        float gain[8], offset[8];
        for (int c = 0; c < 8; ++c) gain[c] = scale(chunk * 8 + c), offset[c] = shift(chunk * 8 + c);
        const auto bring = [&](int i) {
            if (i >= Slots) barrier_wait(empty + 8 * (i % Slots), (i / Slots - 1) & 1);
            const int which = blockIdx.x + i * gridDim.x;
            for (int voxel = t / 2; voxel < kSlab; voxel += 64) {
                const int from = source(which, voxel);
                copy_unit(slab + i % Slots * kSlabBytes + slab_byte(chunk, voxel),
                          x + max(from, 0) * kDepth + chunk * 8, from >= 0);
            }
            copy_commit();
        };
        const auto transform = [&](int i) {
            const int which = blockIdx.x + i * gridDim.x;
            for (int voxel = t / 2; voxel < kSlab; voxel += 64) {
                if (source(which, voxel) < 0) continue;  // padding is zero behind the affine
                uint8_t* at = slabs + i % Slots * kSlabBytes + slab_byte(chunk, voxel);
                uint4 unit = *reinterpret_cast<uint4*>(at);
                uint32_t* pairs = reinterpret_cast<uint32_t*>(&unit);
                for (int p = 0; p < 4; ++p) {
                    const float low = __uint_as_float(pairs[p] << 16) * gain[2 * p] + offset[2 * p];
                    const float high =
                        __uint_as_float(pairs[p] & 0xffff0000u) * gain[2 * p + 1] + offset[2 * p + 1];
                    pairs[p] = __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
                }
                *reinterpret_cast<uint4*>(at) = unit;
            }
            if constexpr (Fence) fence_proxy();
            barrier_arrive(full + 8 * (i % Slots));
        };
        constexpr int ahead = Slots > 1;
        for (int i = 0; i < tiles + ahead; ++i) {
            if (i < tiles) bring(i);
            else copy_commit();
            copy_wait<ahead>();  // each thread transforms what it copied itself
            if (i >= ahead) transform(i - ahead);
        }
    } else {
        for (int i = 0; i < tiles; ++i) {
            barrier_wait(full + 8 * (i % Slots), i / Slots & 1);
            const uint32_t from = slab + i % Slots * kSlabBytes;
            float acc[kVoxels / 2] = {};
            wgmma_fence();
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap)
                wgmma<0, 0>(acc, descriptor(weights + weight_byte(tap, 0, 0), tile::weight_strides()),
                            descriptor(from + slab_start(tap), slab_strides()));
            wgmma_commit();
            wgmma_wait<0>();
            barrier_arrive(empty + 8 * (i % Slots));
            uint32_t sum = 0;
            for (int j = 0; j < kVoxels / 2; ++j)
                sum += uint32_t(__float2int_rn(acc[j])) * mark(accumulator_row(t, j),
                                                               accumulator_column(t, j));
            sum = __reduce_add_sync(~0u, sum);
            if (t % 32 == 0) atomicAdd(sums + blockIdx.x + i * gridDim.x, sum);
        }
    }
#endif
}

using Kernel = void (*)(const uint16_t*, uint32_t*);

Answer ask(const std::string& name) {
    const bool fence = name == "pipeline";
    const Kernel kernels[2] = {fence ? pipeline<1, true> : pipeline<1, false>,
                               fence ? pipeline<kMostSlots, true> : pipeline<kMostSlots, false>};
    const int plain_bytes = (kTaps * kDepth * kRows + kDepth * kSlab) * int(sizeof(float));
    int device = 0, processors = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
    for (Kernel k : kernels) allow_shared(k, pipeline_bytes());
    allow_shared(plain, plain_bytes);
    const int count = kImages * kImage * kImage * kDepth;
    Buffer<uint16_t> x(count);
    Buffer<uint32_t> expected(kTiles), got(kTiles);
    long long tiles = 0, wrong[2] = {0, 0};
    for (int batch = 0; batch < kBatches; ++batch) {
        fill<<<processors * 4, 256>>>(x.data(), count, batch);
        expected.clear();
        plain<<<processors * 4, kPlainThreads, plain_bytes>>>(x.data(), expected.data());
        finish("plain");
        const std::vector<uint32_t> right = expected.values();
        for (int k = 0; k < 2; ++k) {
            got.clear();
            kernels[k]<<<processors, 256, pipeline_bytes()>>>(x.data(), got.data());
            finish("pipeline");
            const std::vector<uint32_t> sums = got.values();
            for (int i = 0; i < kTiles; ++i) wrong[k] += sums[i] != right[i];
        }
        tiles += kTiles;
        if (batch == 0 && std::all_of(right.begin(), right.end(), [](uint32_t s) { return s == 0; }))
            throw std::runtime_error("the plain computation gave nothing");
    }
    const std::string each = " of " + std::to_string(tiles) + " tiles differ with ";
    std::string note = fence ? "cp.async, affine in place, fence.proxy.async, wgmma: "
                             : "the same without the fence, for information (always PASS): ";
    note += std::to_string(wrong[0]) + each + "one slot, " + std::to_string(wrong[1]) + each +
            std::to_string(kMostSlots) + " slots";
    return {!fence || wrong[0] + wrong[1] == 0, double(wrong[0] + wrong[1]), "tiles", note};
}

}  // namespace

std::vector<Probe> pipeline_probes() {
    return {{"pipeline", ask}, {"pipeline_without_fence", ask}};
}

// A tile in the middle and the corners: the slab as the producer fills it, multiplied by its descriptors,
// against the convolution of the image with zeros around it.
std::string pipeline_mistakes() {
    std::string out;
    const int last = kTiles - 1;
    for (int which : {0, kAcross - 1, kAcross + 5, last - kAcross + 1, last}) {
        Case c;
        c.name = "tile " + std::to_string(which);
        const uint32_t slab = kWeightBytes;
        for (int tap = 0; tap < kTaps; ++tap) {
            for (int co = 0; co < kRows; ++co)
                for (int ch = 0; ch < kDepth; ++ch)
                    c.put(weight_byte(tap, co, ch), float(weight(tap, co, ch)));
            c.a.push_back(descriptor(weight_byte(tap, 0, 0), tile::weight_strides()));
            c.b.push_back(descriptor(slab + slab_start(tap), slab_strides()));
        }
        for (int voxel = 0; voxel < kSlab; ++voxel)
            for (int ch = 0; ch < kDepth; ++ch) {
                const int from = source(which, voxel);
                const float x = from < 0 ? 0 : input(from * kDepth + ch, 3) * scale(ch) + shift(ch);
                c.put(slab + slab_byte(ch / 8, voxel) + ch % 8 * 2, x);
            }
        const int image = which / (kAcross * kDown), across = which % kAcross * kColumns;
        const int down = which / kAcross % kDown * kLines;
        int wrong = 0;
        const std::vector<float> got = product(c);
        for (int co = 0; co < kRows; ++co)
            for (int v = 0; v < kVoxels; ++v) {
                float sum = 0;
                for (int dy = -1; dy <= 1; ++dy)
                    for (int dx = -1; dx <= 1; ++dx) {
                        const int line = down + v / kColumns + dy, at = across + v % kColumns + dx;
                        if (line < 0 || at < 0 || line >= kImage || at >= kImage) continue;
                        for (int ch = 0; ch < kDepth; ++ch) {
                            const int i = ((image * kImage + line) * kImage + at) * kDepth + ch;
                            sum += weight((dy + 1) * 3 + dx + 1, co, ch) *
                                   (input(i, 3) * scale(ch) + shift(ch));
                        }
                    }
                wrong += got[co * kVoxels + v] != sum;
            }
        if (wrong) out += c.name + ": " + std::to_string(wrong) + " values differ\n";
    }
    return out;
}

}  // namespace probes
