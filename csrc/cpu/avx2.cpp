// The vector kernels compiled for AVX2 with FMA and F16C.
#include "kernels.h"

#ifdef FASTFILM_X86
#include <immintrin.h>

#include <cmath>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTFILM_ISA avx2
#define FASTFILM_TABLE kAVX2
#define FASTFILM_VECTOR_BYTES 32
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
