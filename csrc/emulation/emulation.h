// The device primitives of cuda/primitives.h on the host: the threads of a block are fibers, which switch at barriers
// and at warp collectives.
//
// The emulation makes mistakes visible: shared memory starts as NaN, the target of an asynchronous copy is NaN until
// its wait, the order of threads may be drawn from a seed, and a barrier that not all threads reach or a misaligned
// access is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define FF_DEVICE inline
#define FF_HOST_DEVICE inline
#define FF_APART inline

namespace fastfilm::cuda {

namespace emulated {

using Body = void (*)(const void*);

struct Request {
  Grid grid;
  int threads, shared_bytes;
  Body body;
  const void* params;
};

// Runs all blocks; returns null, or the reason of a failure.
const char* run(const Request& request);

// Sets the seed of the order of blocks, and of that of threads, which is drawn anew at every switch. With 0 they run in
// order.
void set_seed(uint64_t seed);

// Sets a limit: of a launch of more blocks only the last one runs, for maps too large to run whole. 0: no limit.
void set_block_limit(int64_t value);

// Sets what query_device returns.
void set_device(int capability, int shared_bytes, int multiprocessors);
Device current_device();

// Notes the name of a kernel that was launched; `launches` gives the names since its last call.
void note(const char* kernel);
std::vector<std::string> launches();

void fail(const char* reason);

// The address of 16 (8) bytes of shared memory; an error if they are misaligned or not inside. `write16` notes that the
// current thread writes them.
unsigned char* shared16(const char* who, int at);
// Those of 16 or 8 bytes that are loaded.
unsigned char* read16(const char* who, int at);
unsigned char* read8(const char* who, int at);
unsigned char* shared8(const char* who, int at);
unsigned char* write16(const char* who, int at);
unsigned char* write8(const char* who, int at);

int thread_index();
Grid block_index();
Grid grid_size();
unsigned char* shared_memory();
// A barrier of all threads that have not ended.
void barrier();
void warp_barrier();
void fence();
// An error unless every thread of the block has come to a fence, which must follow in each of them too. Threads that
// have ended, and those that never come to one, are exempt.
unsigned arrive(unsigned* counter);
float shuffle_xor(float value, int mask);
void copy_async16(int shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int pending);
void load_matrix4(uint32_t (&r)[4], int row);
void load_matrix4_transposed(uint32_t (&r)[4], int row);
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t));
// multiply_add for float32, whose lower thirteen bits are ignored.
void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t round_to_tf32(uint32_t bits);

float widen_bfloat16(uint16_t bits);
float widen_float16(uint16_t bits);
uint16_t narrow_bfloat16(float f);
uint16_t narrow_float16(float f);

}  // namespace emulated

using emulated::arrive;
using emulated::barrier;
using emulated::warp_barrier;
using emulated::block_index;
using emulated::commit_copies;
using emulated::copy_async16;
using emulated::fence;
using emulated::grid_size;
using emulated::load_matrix4;
using emulated::load_matrix4_transposed;
using emulated::shared_memory;
using emulated::shuffle_xor;
using emulated::thread_index;
inline int thread_anew() { return thread_index(); }
inline Grid block_anew() { return block_index(); }

template <int kPending>
inline void wait_copies() {
  emulated::wait_copies(kPending);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TensorFloat) {
  emulated::multiply_add_tf32(d, a, b0, b1);
}
inline uint32_t round_to_tf32(uint32_t bits) { return emulated::round_to_tf32(bits); }
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  emulated::multiply_add(d, a, b0, b1, emulated::widen_bfloat16);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  emulated::multiply_add(d, a, b0, b1, emulated::widen_float16);
}

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline void load_anew(int at, float* pair) { std::memcpy(pair, shared_memory() + at, 8); }
template <int kWords>
void load_anew(int at, uint32_t (&words)[kWords]) {
  std::memcpy(words, shared_memory() + at, kWords * 4);
}

inline float to_float(BFloat16 v) { return emulated::widen_bfloat16(v.bits); }
inline float to_float(Float16 v) { return emulated::widen_float16(v.bits); }
inline void from_float(float f, BFloat16& v) { v.bits = emulated::narrow_bfloat16(f); }
inline void from_float(float f, Float16& v) { v.bits = emulated::narrow_float16(f); }

template <class T>
uint32_t pack(float low, float high, T) {
  T a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
inline uint32_t high_halves(uint32_t low, uint32_t high) { return (high & 0xffff0000u) | low >> 16; }

struct alignas(16) Word16 {
  uint32_t w[4];
};
inline Word16 load16(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) emulated::fail("load16: misaligned address");
  Word16 v;
  std::memcpy(&v, at, 16);
  return v;
}
inline void store16(void* at, const Word16& v) {
  if (reinterpret_cast<uintptr_t>(at) % 16) emulated::fail("store16: misaligned address");
  std::memcpy(at, &v, 16);
}

struct alignas(8) Word8 {
  uint32_t w[2];
};
inline Word8 load8(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8) emulated::fail("load8: misaligned address");
  Word8 v;
  std::memcpy(&v, at, 8);
  return v;
}
inline void store8(void* at, const Word8& v) {
  if (reinterpret_cast<uintptr_t>(at) % 8) emulated::fail("store8: misaligned address");
  std::memcpy(at, &v, 8);
}

inline Word16 load_shared16(int at) { return load16(emulated::read16("load_shared16", at)); }
inline void store_shared16(int at, const Word16& v) { store16(emulated::write16("store_shared16", at), v); }

template <class Kernel>
const char* launch(Grid grid, int shared_bytes, Stream, const typename Kernel::Params& params) {
  const emulated::Body body = [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); };
  return emulated::run({grid, Kernel::kThreads, shared_bytes, body, &params});
}

inline Device query_device() { return emulated::current_device(); }

}  // namespace fastfilm::cuda
