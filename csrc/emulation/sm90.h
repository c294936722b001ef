// The device primitives of cuda/sm90/primitives.h on the host.
//
// Beside what emulation.h makes visible: what was written to shared memory and not fenced is NaN for the products, the
// registers of a product are NaN until its wait, bulk copies come late, and an operand that changes under a product, a
// product that nobody waits for, or a misuse of an mbarrier is an error. A deadlock says who waits for what.
#pragma once

namespace fastfilm::cuda {

namespace emulated {

// An error if the lanes differ.
int uniform(int value);
void fence_async();
void mbarrier_init(int at, int count);
void mbarrier_arrive(int at);
void mbarrier_expect(int at, int bytes);
bool mbarrier_test(int at, int parity);
void mbarrier_wait(int at, int parity);
void copy_bulk(int to, const void* from, int bytes, int mbarrier);
void barrier_of(int id, int threads);
void take_registers(int count);
void give_registers(int count);
void products_begin();
void products_commit();
void products_wait(int pending);
// d += a b, 64 rows by `columns`, both operands in shared memory, MN-major or K-major.
void multiply_async(float* d, int columns, bool mn_major, Descriptor a, Descriptor b, bool bfloat16);
void store_matrix4_transposed(int row, const uint32_t (&r)[4]);
uint64_t descriptor_bits(int at, int leading, int stride);

}  // namespace emulated

using emulated::copy_bulk;
using emulated::fence_async;
using emulated::mbarrier_arrive;
using emulated::mbarrier_expect;
using emulated::mbarrier_init;
using emulated::mbarrier_test;
using emulated::mbarrier_wait;
using emulated::products_begin;
using emulated::products_commit;
using emulated::store_matrix4_transposed;
using emulated::uniform;

inline Descriptor descriptor(int at, int leading, int stride) {
  return {emulated::descriptor_bits(at, leading, stride)};
}

inline uint32_t unknown(uint32_t value) { return value; }

template <int kId, int kThreads>
void barrier_of() {
  emulated::barrier_of(kId, kThreads);
}
template <int kRegisters>
void take_registers() {
  emulated::take_registers(kRegisters);
}
template <int kRegisters>
void give_registers() {
  emulated::give_registers(kRegisters);
}
template <int kPending>
void products_wait() {
  emulated::products_wait(kPending);
}

template <class T>
void multiply_async(float (&d)[64], Descriptor a, Descriptor b, T) {
  emulated::multiply_async(d, 128, false, a, b, std::is_same_v<T, BFloat16>);
}

// 64 or 32 columns.
template <int kNumbers, class T>
void multiply_async_transposed(float (&d)[kNumbers], Descriptor a, Descriptor b, T) {
  static_assert(kNumbers == 32 || kNumbers == 16);
  emulated::multiply_async(d, 2 * kNumbers, true, a, b, std::is_same_v<T, BFloat16>);
}

inline Word8 load_shared8(int at) { return load8(emulated::read8("load_shared8", at)); }
inline void store_shared8(int at, const Word8& v) { store8(emulated::write8("store_shared8", at), v); }

}  // namespace fastfilm::cuda
