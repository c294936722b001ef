// stmatrix.trans turns an accumulator tile [channel][voxel] into [voxel][channel] for 16-byte stores.
#include "layout.h"
#include "probe.h"
#include "wgmma.cuh"

namespace probes {
namespace {

constexpr int kVoxels = 128;
constexpr int kPitch = kRows * 2 + 16;  // bytes a voxel in shared memory; 16 more against bank conflicts

// The value of channel m at voxel n: exact in bfloat16, and no two of a row, a column or a unit alike.
PROBES_BOTH int content(int m, int n) { return (m * 37 + n * 2 + m * n / 64) % 251; }

// A warpgroup with accumulators as wgmma leaves them; `out` is [voxel][64 channels].
__global__ void __launch_bounds__(128) transposed(uint4* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __shared__ __align__(16) uint8_t staging[kVoxels * kPitch];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    for (int j = 0; j < kVoxels / 16; ++j) {
        uint32_t pairs[4];
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * j + 2 * q, m = accumulator_row(t, i), n = accumulator_column(t, i);
            pairs[q] = __float_as_uint(float(content(m, n))) >> 16 |
                       (__float_as_uint(float(content(m, n + 1))) & 0xffff0000u);
        }
        store_transposed(shared_address(staging) + stored_byte(warp, lane, j, kPitch), pairs);
    }
    __syncthreads();
    for (int i = t; i < kVoxels * kRows / 8; i += 128)
        out[i] = *reinterpret_cast<const uint4*>(staging + i / 8 * kPitch + i % 8 * 16);
#endif
}

Answer ask(const std::string&) {
    const Buffer<uint16_t> out(kVoxels * kRows);
    transposed<<<1, 128>>>(reinterpret_cast<uint4*>(out.data()));
    finish("transposed");
    const std::vector<uint16_t> got = out.values();
    int errors = 0;
    for (int n = 0; n < kVoxels; ++n)
        for (int m = 0; m < kRows; ++m) errors += widen(got[n * kRows + m]) != content(m, n);
    return {errors == 0, double(errors), "errors",
            "stmatrix.x4.trans of a 64 x 128 accumulator tile into [voxel][channel], then 16-byte stores"};
}

}  // namespace

std::vector<Probe> store_probes() { return {{"stmatrix_trans", ask}}; }

// stmatrix.trans stores element (r, c) of an 8 × 8 matrix, held by lane 4 r + c / 2, in row c at place r.
std::string store_mistakes() {
    std::vector<int> staging(kVoxels * kPitch / 2, -1);
    for (int warp = 0; warp < 4; ++warp)
        for (int j = 0; j < kVoxels / 16; ++j)
            for (int q = 0; q < 4; ++q)
                for (int r = 0; r < 8; ++r)
                    for (int c = 0; c < 8; ++c) {
                        const int t = warp * 32 + r * 4 + c / 2, i = 8 * j + 2 * q + c % 2;
                        const int byte = stored_byte(warp, q * 8 + c, j, kPitch) + r * 2;
                        staging[byte / 2] = content(accumulator_row(t, i), accumulator_column(t, i));
                    }
    int wrong = 0;
    for (int n = 0; n < kVoxels; ++n)
        for (int m = 0; m < kRows; ++m) wrong += staging[n * kPitch / 2 + m] != content(m, n);
    return wrong ? "stmatrix: " + std::to_string(wrong) + " values differ\n" : "";
}

}  // namespace probes
