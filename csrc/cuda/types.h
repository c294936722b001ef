// Types that kernels and host code share: storage types, activations, the device. No CUDA header is included.
#pragma once

#include <cstdint>
#include <string>

#include "../activations.h"

namespace fastfilm::cuda {

// Codes of the storage types, as in the CPU extension (where 1 is float64). kTensorFloat is float32 whose factors are
// rounded to tf32, ten bits behind the point; it is a way to compute a convolution and no type of a map.
enum Storage { kFloat32 = 0, kBFloat16 = 2, kFloat16 = 3, kTensorFloat = 4 };

inline int bytes_of(int storage) { return storage == kFloat32 || storage == kTensorFloat ? 4 : 2; }

using Stream = void*;

struct Device {
  int multiprocessors = 0;
  int shared_bytes = 0;  // shared memory that one block may have
  int capability = 0;    // 10 * major + minor
};

// The current device.
Device device();

}  // namespace fastfilm::cuda
