// The vector kernels compiled for AVX-512.
#include "kernels.h"

#ifdef FASTFILM_X86
#include <immintrin.h>

#include <cmath>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#define FASTFILM_ISA avx512
#define FASTFILM_TABLE kAVX512
#define FASTFILM_VECTOR_BYTES 64
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
