// A probe: a question to the device with one line as its answer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace probes {

struct Answer {
    bool pass;
    double figure;
    std::string unit, note;
};

struct Probe {
    std::string name;
    Answer (*ask)(const std::string& name);
};

// The probes of each source file, and its host-side check (mistakes as text, empty where all is right).
std::vector<Probe> operand_probes();
std::vector<Probe> rate_probes();
std::vector<Probe> pipeline_probes();
std::vector<Probe> store_probes();
std::string operand_mistakes();
std::string rate_mistakes();
std::string pipeline_mistakes();
std::string store_mistakes();

// Throws with the place and CUDA's words.
inline void check(cudaError_t error, const char* place) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(place) + ": " + cudaGetErrorString(error));
}

// Reports a launch that failed, then waits for the kernel and reports what it met.
inline void finish(const char* kernel) {
    check(cudaGetLastError(), (std::string("launch of ") + kernel).c_str());
    check(cudaDeviceSynchronize(), kernel);
}

template <class Kernel>
void allow_shared(Kernel* kernel, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory");
}

// Values in the device's memory, freed at the end of the scope.
template <class T>
class Buffer {
   public:
    explicit Buffer(size_t count) : count_(count ? count : 1) {
        check(cudaMalloc(&data_, count_ * sizeof(T)), "cudaMalloc");
        clear();
    }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
        if (!values.empty())
            check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
                  "copy to the device");
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() const { return data_; }
    void clear() { check(cudaMemset(data_, 0, count_ * sizeof(T)), "cudaMemset"); }
    std::vector<T> values() const {
        std::vector<T> out(count_);
        check(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
              "copy from the device");
        return out;
    }

   private:
    T* data_ = nullptr;
    size_t count_;
};

// bfloat16 of a float, to nearest even, and back.
inline uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

}  // namespace probes
