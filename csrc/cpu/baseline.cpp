// The vector kernels compiled for the compiler's default target (SSE2, NEON, …).
#include <cmath>
#include <cstdint>

#include "kernels.h"

#define FASTFILM_ISA baseline
#define FASTFILM_TABLE kBaseline
#define FASTFILM_VECTOR_BYTES 16
#include "kernels.inc"
