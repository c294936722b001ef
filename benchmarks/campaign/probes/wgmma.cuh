// PTX instructions of sm_90a that the probes ask about.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace probes {

__device__ inline uint32_t shared_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

// The start of dynamic shared memory, rounded up to 1024 bytes (an atom of the 128-byte swizzle).
__device__ inline uint8_t* aligned_shared(uint8_t* raw) {
    return raw + (1024 - shared_address(raw) % 1024) % 1024;
}

// Writes of this thread to shared memory become visible to wgmma, after the next barrier.
__device__ inline void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#define PROBES_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PROBES_F16(i) PROBES_F4(i), PROBES_F4(i + 4), PROBES_F4(i + 8), PROBES_F4(i + 12)
#define PROBES_F32 PROBES_F16(0), PROBES_F16(16)
#define PROBES_F64 PROBES_F32, PROBES_F16(32), PROBES_F16(48)
#define PROBES_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PROBES_R32 PROBES_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PROBES_R64                                                                           \
    PROBES_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51" \
               ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d += a b. A comes from shared memory (descriptor) or from four registers, B from shared memory. TransA and
// TransB are 1 for an operand that is MN-major. p0 to p6 are the operands' numbers after the accumulators.
#define PROBES_WGMMA(n, count, regs, outs, p0, p1, p2, p3, p4, p5)                                   \
    template <int TransA, int TransB>                                                                \
    __device__ inline void wgmma(float (&d)[count], uint64_t a, uint64_t b) {                        \
        asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" regs "}, " p0      \
                     ", " p1 ", p, 1, 1, " p2 ", " p3 ";\n}\n"                                       \
                     : outs                                                                          \
                     : "l"(a), "l"(b), "n"(TransA), "n"(TransB));                                    \
    }                                                                                                \
    template <int TransA, int TransB>                                                                \
    __device__ inline void wgmma(float (&d)[count], const uint32_t (&a)[4], uint64_t b) {            \
        asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" regs "}, {" p0     \
                     ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1, " p5 ";\n}\n"                      \
                     : outs                                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TransB));             \
    }

PROBES_WGMMA(32, 16, PROBES_R16, PROBES_F16(0), "%16", "%17", "%18", "%19", "%20", "%21")
PROBES_WGMMA(64, 32, PROBES_R32, PROBES_F32, "%32", "%33", "%34", "%35", "%36", "%37")
PROBES_WGMMA(128, 64, PROBES_R64, PROBES_F64, "%64", "%65", "%66", "%67", "%68", "%69")

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the phase of this parity to end; a trap after about two seconds, so that a lost arrival costs
// this probe and not the machine.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
    const long long begin = clock64();
    for (int done = 0; !done;) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.s32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
        if (!done && clock64() - begin > 4000000000ll) __trap();
    }
    __syncwarp();  // wgmma needs the warp in one piece
}

// Sixteen bytes from global to shared memory; zeros where `inside` is false (`from` is then not read).
__device__ inline void copy_unit(uint32_t to, const void* from, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ inline void store_transposed(uint32_t to, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

}  // namespace probes

#endif
