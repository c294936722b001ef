// Device primitives: threads, barriers, asynchronous copies, matrix instructions, packed conversions, launches. The
// kernels use no other device functions; emulation/emulation.h implements these on the host.
//
// A kernel is a struct with `Params`, `kThreads`, `kMinBlocks` and `static FF_DEVICE void run(const Params&)`.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "types.h"

namespace fastfilm::cuda {

// Storage types. BFloat16 and Float16 hold bits and have no arithmetic; TensorFloat is float32 in memory and multiplied
// as tf32.
struct TensorFloat {
  float value;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Grid {
  int x, y, z;
};

}  // namespace fastfilm::cuda

#ifdef FASTFILM_EMULATED
#include "../emulation/emulation.h"
#else

#include <cuda_runtime_api.h>

#define FF_DEVICE __device__ __forceinline__
#define FF_HOST_DEVICE __host__ __device__ __forceinline__
// A function that is called and not inlined: its registers are not those of the code in front of the call.
#define FF_APART __device__ __noinline__

namespace fastfilm::cuda {

FF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FF_DEVICE Grid block_index() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
FF_DEVICE Grid grid_size() {
  return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
}

FF_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The same two, read anew: the compiler keeps nothing that follows from them in registers from one iteration of a loop to
// the next.
FF_DEVICE int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
FF_DEVICE Grid block_anew() {
  Grid block;
  asm volatile("mov.u32 %0, %%ctaid.x; mov.u32 %1, %%ctaid.y; mov.u32 %2, %%ctaid.z;"
               : "=r"(block.x), "=r"(block.y), "=r"(block.z));
  return block;
}

FF_DEVICE void barrier() { __syncthreads(); }
FF_DEVICE void warp_barrier() { __syncwarp(); }

// `fence` orders a thread's accesses to global memory in front of it before those behind it, as other blocks of threads
// see them. `arrive` adds 1 to a counter and returns its former value.
FF_DEVICE void fence() { __threadfence(); }
FF_DEVICE unsigned arrive(unsigned* counter) { return atomicAdd(counter, 1u); }

FF_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Functions take places in shared memory as distances from its beginning; this is the hardware's address of a place.
FF_DEVICE uint32_t shared_address(int at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + static_cast<uint32_t>(at);
}

// Copies `bytes` (0 or 16) from global to shared memory and zeroes the rest of the 16. The result is visible to the
// issuing thread after `wait_copies` and to the others after the barrier that follows.
FF_DEVICE void copy_async16(int shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
FF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FF_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads from shared memory that the compiler does not merge with others: two numbers, or one or two words.
FF_DEVICE void load_anew(int at, float* pair) {
  asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair[0]), "=f"(pair[1]) : "r"(shared_address(at)));
}
FF_DEVICE void load_anew(int at, uint32_t (&word)[1]) {
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(shared_address(at)));
}
FF_DEVICE void load_anew(int at, uint32_t (&words)[2]) {
  asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(shared_address(at)));
}

// Four 8x8 matrices of 16-bit elements; lane i says where row i % 8 of matrix i / 8 is.
FF_DEVICE void load_matrix4(uint32_t (&r)[4], int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Likewise, each matrix transposed.
FF_DEVICE void load_matrix4_transposed(uint32_t (&r)[4], int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a 16x16 (row-major), b 16x8 (column-major), d 16x8 float32.
FF_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FF_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b for a 16x8 (row-major), b 8x8 (column-major), of numbers that are rounded to tf32.
FF_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TensorFloat) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FF_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

FF_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
FF_DEVICE uint32_t float_to_bits(float f) { return __float_as_uint(f); }

FF_DEVICE float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
FF_DEVICE float to_float(Float16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
FF_DEVICE void from_float(float f, BFloat16& v) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f)); }
FF_DEVICE void from_float(float f, Float16& v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f)); }

// Both rounded to nearest, `low` in the lower half.
FF_DEVICE uint32_t pack(float low, float high, BFloat16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
FF_DEVICE uint32_t pack(float low, float high, Float16) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// The high halves of two words.
FF_DEVICE uint32_t high_halves(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }

struct alignas(16) Word16 {
  uint32_t w[4];
};
FF_DEVICE Word16 load16(const void* at) {
  const uint4 v = *static_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}
FF_DEVICE void store16(void* at, const Word16& v) {
  *static_cast<uint4*>(at) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

struct alignas(8) Word8 {
  uint32_t w[2];
};
FF_DEVICE Word8 load8(const void* at) {
  const uint2 v = *static_cast<const uint2*>(at);
  return {{v.x, v.y}};
}
FF_DEVICE void store8(void* at, const Word8& v) { *static_cast<uint2*>(at) = make_uint2(v.w[0], v.w[1]); }

FF_DEVICE Word16 load_shared16(int at) { return load16(shared_memory() + at); }
FF_DEVICE void store_shared16(int at, const Word16& v) { store16(shared_memory() + at, v); }

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Null if the launch was accepted, else the runtime's reason.
template <class Kernel>
const char* launch(Grid grid, int shared_bytes, Stream stream, const typename Kernel::Params& params) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(&entry<Kernel>), dim3(grid.x, grid.y, grid.z),
                             dim3(Kernel::kThreads), arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, so that the next launch does not report it again
  return cudaGetErrorString(error);
}

// The current device; all 0 if there is none.
inline Device query_device() {
  Device d;
  int index = 0;
  if (cudaGetDevice(&index) == cudaSuccess) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    d.capability = 10 * major + minor;
  }
  cudaGetLastError();
  return d;
}

}  // namespace fastfilm::cuda
#endif

namespace fastfilm::cuda {

FF_DEVICE float to_float(float v) { return v; }
FF_DEVICE void from_float(float f, float& v) { v = f; }
FF_DEVICE float to_float(TensorFloat v) { return v.value; }
FF_DEVICE void from_float(float f, TensorFloat& v) { v.value = f; }

// A word of an operand in the form that multiply_add takes: rounded to tf32 for TensorFloat, else unchanged.
template <class T>
FF_DEVICE uint32_t operand_word(uint32_t word) {
  return std::is_same_v<T, TensorFloat> ? round_to_tf32(word) : word;
}

// Elements of a storage type in 16 bytes.
template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

template <class T>
FF_DEVICE void unpack16(const Word16& word, float (&v)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = bits_to_float(word.w[i]);
    } else {
      v[2 * i] = to_float(T{static_cast<uint16_t>(word.w[i])});
      v[2 * i + 1] = to_float(T{static_cast<uint16_t>(word.w[i] >> 16)});
    }
  }
}
template <class T>
FF_DEVICE Word16 pack16(const float (&v)[kLanes<T>]) {
  Word16 word;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word.w[i] = float_to_bits(v[i]);
    } else {
      word.w[i] = pack(v[2 * i], v[2 * i + 1], T{});
    }
  }
  return word;
}

// v rounded up or down to a value of a 16-bit type, with the probabilities that keep the mean; `at`, the number of the
// element, takes the place of a random number. Rounding to nearest would lose an addend below half the last place of
// the value it is added to, at every voxel of a map alike (docs/design.md, Gradients).
template <class T>
FF_DEVICE float dithered(float v, int64_t at) {
  if constexpr (sizeof(T) == 4) return v;
  constexpr int kLost = std::is_same_v<T, BFloat16> ? 16 : 13;
  uint32_t h = static_cast<uint32_t>(at) * 0x9e3779b1u;
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
  const uint32_t bits = float_to_bits(v) + (h >> (32 - kLost));
  return v == v ? bits_to_float(bits >> kLost << kLost) : v;
}

// The same for four neighbouring numbers, packed in two words, by one hash: `at` is the number of the first one. Beside NaN,
// and where infinities of both signs meet, a number is rounded towards zero.
template <class T>
FF_DEVICE void dither_four(const float* v, uint32_t at, uint32_t* words) {
  static_assert(sizeof(T) == 2, "float32 is not rounded");
  constexpr int kLost = std::is_same_v<T, BFloat16> ? 16 : 13;
  uint32_t h = at * 0x9e3779b1u;
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
#pragma unroll
  for (int i = 0; i < 4; i += 2, h *= 0x297a2d39u) {
    const float either = v[i] + v[i + 1];
    const uint32_t random = either == either ? h ^ h >> 16 : 0;
    const uint32_t first = float_to_bits(v[i]) + (random & ((1u << kLost) - 1)),
                   second = float_to_bits(v[i + 1]) + (random >> (32 - kLost));
    words[i / 2] = kLost == 16 ? high_halves(first, second)
                               : pack(bits_to_float(first >> kLost << kLost), bits_to_float(second >> kLost << kLost), T{});
  }
}

// The reason that `launch` returned, with the kernel's name in front; empty if the launch was accepted.
inline std::string launched(const char* kernel, const char* reason) {
#ifdef FASTFILM_EMULATED
  emulated::note(kernel);
#endif
  return reason ? std::string("the kernel ") + kernel + " failed: " + reason : std::string();
}

}  // namespace fastfilm::cuda
