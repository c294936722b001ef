// Device primitives of sm_90a beside those of primitives.h: warpgroup products (wgmma), mbarriers, bulk copies, barriers
// of a part of the threads, register budgets. emulation/sm90.h implements these on the host.
//
// A place in shared memory is its distance in bytes from the beginning, as elsewhere. A warpgroup is four consecutive
// warps, of which the first has a number divisible by four.
//
// Shared memory is read in two ways. wgmma and bulk copies belong to the asynchronous proxy, all else (cp.async too) to
// the generic one: what a thread wrote is there for the asynchronous proxy only behind that thread's `fence_async`.
#pragma once

#include "../primitives.h"

namespace fastfilm::cuda {

// A matrix in shared memory as wgmma reads it, without swizzle: in 8x8 core matrices of 128 consecutive bytes, eight rows of
// 16 bytes. The start is a multiple of 16 bytes.
//   K-major    a row of a core matrix has eight k of one row or column of the product; `leading` bytes lead to the next
//              eight k, `stride` to the next eight rows or columns
//   MN-major   a row of a core matrix has eight rows or columns of the product at one k; `leading` leads to the next
//              eight k, `stride` to the next eight rows or columns
// (PTX ISA, Matrix Descriptor Format; the probes in benchmarks/campaign/probes ask a GPU about all of it.)
struct Descriptor {
  uint64_t bits;
  // The same matrix, 16 * units bytes further on.
  FF_DEVICE Descriptor operator+(int units) const {
    return {bits >> 32 << 32 | static_cast<uint32_t>(static_cast<uint32_t>(bits) + units)};
  }
};

}  // namespace fastfilm::cuda

// Whether the code that is compiled may use what sm_90a alone has. A kernel of this folder is empty elsewhere.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTFILM_EMULATED)
#define FF_SM90A 1
#endif

#ifdef FASTFILM_EMULATED
#include "../../emulation/sm90.h"
#else

namespace fastfilm::cuda {

FF_DEVICE Descriptor descriptor(int at, int leading, int stride) {
  return {static_cast<uint64_t>(shared_address(at) >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
          static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32};
}

// A number that all lanes of a warp have in common; the compiler sees that a branch on it does not part them.
FF_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// The same number, of which the compiler knows nothing: what follows from it is computed anew, and not kept in registers.
FF_DEVICE uint32_t unknown(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// What this thread wrote to shared memory is there for the asynchronous proxy, for threads that a barrier tells so.
FF_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An mbarrier, eight bytes. A phase ends when `count` arrivals and all announced bytes have come; the next one begins then.
// It must be initialised by one thread in front of a `barrier` of all.
FF_DEVICE void mbarrier_init(int at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}
FF_DEVICE void mbarrier_arrive(int at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
// Arrives, and announces that `bytes` come by bulk copies in this phase.
FF_DEVICE void mbarrier_expect(int at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity, 0 for the first one, has ended.
FF_DEVICE bool mbarrier_test(int at, int parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(shared_address(at)), "r"(parity)
               : "memory");
  return done;
}
// Waits until it has.
FF_DEVICE void mbarrier_wait(int at, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra.uni done;\n"
      "bra.uni again;\ndone:\n}\n" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// Starts to copy `bytes`, a multiple of 16, to shared memory; their arrival counts at the mbarrier. One thread calls it.
FF_DEVICE void copy_bulk(int to, const void* from, int bytes, int mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(mbarrier))
               : "memory");
}

// A barrier of `kThreads` threads, those that name the same kId from 1 to 15.
template <int kId, int kThreads>
FF_DEVICE void barrier_of() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Sets the registers of each thread of this warpgroup to kRegisters, a multiple of 8: more than it had, or fewer. More are
// there once other warpgroups have given up theirs.
template <int kRegisters>
FF_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FF_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Products of a warpgroup run asynchronously. `products_begin` stands in front of the first one of a group and behind every
// other access to its registers; `products_commit` closes the group; behind `products_wait<n>` all groups but the last n
// are done. Registers and shared memory of a product that is not done must not be touched.
FF_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FF_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
FF_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define FF_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FF_F8(i) FF_F4(i), FF_F4(i + 4)
#define FF_F16(i) FF_F8(i), FF_F8(i + 8)
#define FF_F32(i) FF_F16(i), FF_F16(i + 16)
#define FF_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FF_R16 FF_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FF_R32 FF_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FF_R64                                                                                   \
  FF_R32                                                                                         \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54" \
  ",%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define FF_PRODUCT(type, name)                                                                                        \
  FF_DEVICE void multiply_async(float (&d)[64], Descriptor a, Descriptor b, type) {                                   \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name \
                 " {" FF_R64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                                       \
                 : FF_F32(0), FF_F32(32)                                                                              \
                 : "l"(a.bits), "l"(b.bits));                                                                         \
  }
#define FF_PRODUCT_TRANSPOSED(type, name, n, count, registers, outputs, r0, r1)                                 \
  FF_DEVICE void multiply_async_transposed(float (&d)[count], Descriptor a, Descriptor b, type) {               \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name \
                 "." name " {" registers "}, " r0 ", " r1 ", p, 1, 1, 1, 1;\n}\n"                               \
                 : outputs                                                                                      \
                 : "l"(a.bits), "l"(b.bits));                                                                   \
  }

// d += a b, 64 rows by 128 columns and 16 k, both operands K-major in shared memory. Number i of thread t of the warpgroup
// is row t / 32 * 16 + t % 32 / 4 + (i & 2) * 4 and column i / 4 * 8 + t % 4 * 2 + (i & 1).
FF_PRODUCT(BFloat16, "bf16")
FF_PRODUCT(Float16, "f16")

// d += a b, 64 rows by 64 or 32 columns and 16 k, both operands MN-major in shared memory.
FF_PRODUCT_TRANSPOSED(BFloat16, "bf16", 64, 32, FF_R32, FF_F32(0), "%32", "%33")
FF_PRODUCT_TRANSPOSED(Float16, "f16", 64, 32, FF_R32, FF_F32(0), "%32", "%33")
FF_PRODUCT_TRANSPOSED(BFloat16, "bf16", 32, 16, FF_R16, FF_F16(0), "%16", "%17")
FF_PRODUCT_TRANSPOSED(Float16, "f16", 32, 16, FF_R16, FF_F16(0), "%16", "%17")

#undef FF_PRODUCT
#undef FF_PRODUCT_TRANSPOSED
#undef FF_F4
#undef FF_F8
#undef FF_F16
#undef FF_F32
#undef FF_R16
#undef FF_R32
#undef FF_R64

// Stores four 8x8 matrices of 16-bit elements, each transposed: lane i says where row i % 8 of matrix i / 8 goes.
// Register m of a lane has elements (lane / 4, lane % 4 * 2) and the next one of matrix m before it is transposed.
FF_DEVICE void store_matrix4_transposed(int row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

FF_DEVICE Word8 load_shared8(int at) { return load8(shared_memory() + at); }
FF_DEVICE void store_shared8(int at, const Word8& v) { store8(shared_memory() + at, v); }

}  // namespace fastfilm::cuda
#endif
