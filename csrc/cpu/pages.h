// Large pages for memory that a kernel is about to write for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastfilm {

// Asks for large pages under a result of 32 MiB or more. Such a result is always fresh memory (glibc maps it anew), and
// the first touch of its 4 KiB pages takes longer than the pass that writes them. Smaller results come from the heap,
// whose pages stay as they are. This is a hint: where the system does not follow it, nothing changes.
inline void expect_large_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kLarge = 32 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (bytes >= kLarge && end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace fastfilm
