// The emulation of a warpgroup's products (wgmma): each warp computes its 16 rows when it issues a product, and finds
// them in its registers behind the wait. sm90.h has the interface.
#include "../cuda/sm90/primitives.h"

#include <algorithm>
#include <array>

#include "state.h"

namespace fastfilm::cuda::emulated {
namespace {

constexpr int kRows = 16, kDepth = 16, kMaxColumns = 128;

// Operands in shared memory are chunks of 16 bytes, of eight numbers. K-major, the chunks 2 i and 2 i + 1 are row or
// column i; MN-major, chunk n / 8 * 16 + k has eight columns at one k.
using Chunk = std::array<unsigned char, 16>;

struct Layout {
  int start, leading, stride;
  bool swizzled;
};

Layout decode(uint64_t bits) {
  const auto field = [&](int at) { return static_cast<int>(bits >> at & 0x3fff) * 16; };
  const int mode = static_cast<int>(bits >> 62);
  if (mode > 1) fail("wgmma: a mode of the swizzle that is not emulated");
  return {field(0), field(16), field(32), mode == 1};
}

void read_chunk(Chunk& chunk, int at) {
  if (at + 16 > block->request.shared_bytes) fail("wgmma: an operand is not inside shared memory");
  std::memcpy(chunk.data(), block->shared.get() + at, 16);
  for (int half = 0; half < 2; ++half) {
    if (!visible_to_products(at + 8 * half)) std::memset(chunk.data() + 8 * half, 0xff, 8);
  }
}

// Rows or columns `first` to first + count of an operand, as the asynchronous proxy sees them.
void read_operand(std::vector<Chunk>& chunks, uint64_t bits, bool mn_major, int first, int count) {
  const Layout l = decode(bits);
  chunks.resize(count * 2);
  for (int c = 0; c < count * 2; ++c) {
    const int across = mn_major ? c % 16 % 8 : (first + c / 2) % 8;
    const int group = mn_major ? first / 8 + c / 16 : (first + c / 2) / 8;
    const int deeper = mn_major ? c % 16 / 8 : c % 2;
    int at = l.start + group * l.stride;
    if (l.swizzled) {
      at += across * 128 + deeper * 16;
      at ^= (at >> 7 & 7) << 4;
    } else {
      at += deeper * l.leading + across * 16;
    }
    read_chunk(chunks[c], at);
  }
}

// Numbers of a 16-bit type as float32.
void widen(float* out, const uint16_t* bits, int count, bool bfloat16) {
  for (int i = 0; i < count && bfloat16; ++i) {
    const uint32_t word = static_cast<uint32_t>(bits[i]) << 16;
    std::memcpy(out + i, &word, 4);
  }
  for (int i = 0; i < count && !bfloat16; ++i) {
    uint32_t word = (bits[i] & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &word, 4);
    f *= 0x1p112f;  // which is right for subnormal numbers too
    std::memcpy(&word, &f, 4);
    word |= (bits[i] & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    word |= (bits[i] & 0x8000u) << 16;
    std::memcpy(out + i, &word, 4);
  }
}

// A product that is not done, with what it read.
struct Pending {
  uint64_t group;
  uint64_t a_bits, b_bits;
  int columns;
  bool mn_major;
  std::vector<Chunk> a, b;
};

// The true numbers of registers in products that are not done.
struct Accumulator {
  float* d[kWarp];
  int columns;
  uint64_t group;  // of the last product
  float sums[kRows][kMaxColumns];
};

struct Issue {
  float* d;
  uint64_t a_bits, b_bits;
  int columns;
  bool mn_major, bfloat16;
};

}  // namespace

struct Products {
  Issue lanes[kWarp];
  std::deque<Pending> pending;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  uint64_t group = 0;  // that is open,
  bool issued = false; // and whether it has products
  uint64_t done = 0;   // groups
};

void FreeProducts::operator()(Products* products) const { delete products; }

namespace {

Products& own_products() {
  auto& products = block->products[block->current / kWarp];
  if (!products) products.reset(new Products);
  return *products;
}

int row_of(int lane, int i) { return lane / 4 + (i & 2) * 4; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

void check_untouched(const Accumulator& sums) {
  static const std::vector<unsigned char> untouched(kMaxColumns / 2 * 4, 0xff);
  for (const float* d : sums.d) {
    if (std::memcmp(d, untouched.data(), sums.columns / 2 * 4)) {
      fail("wgmma: an accumulator was written before the product was done");
    }
  }
}

Accumulator& accumulator(Products& products) {
  const Issue& first = products.lanes[0];
  for (auto& sums : products.accumulators) {
    if (sums->d[0] != first.d) continue;
    if (sums->columns != first.columns) fail("wgmma: products of two sizes share registers");
    check_untouched(*sums);
    return *sums;
  }
  products.accumulators.emplace_back(new Accumulator);
  Accumulator& sums = *products.accumulators.back();
  sums.columns = first.columns;
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = sums.d[lane] = products.lanes[lane].d;
    for (int i = 0; i < sums.columns / 2; ++i) sums.sums[row_of(lane, i)][column_of(lane, i)] = d[i];
    // a NaN
    std::memset(d, 0xff, sums.columns / 2 * 4);
  }
  return sums;
}

// Four numbers: compilers take loops over them apart before they see that they fit a vector.
using Four = float __attribute__((vector_size(16)));

template <int kColumns>
void add_product(Accumulator& sums, const float (&a)[kRows][kDepth], const float (&b)[kDepth][kMaxColumns]) {
  for (int n = 0; n < kColumns; n += 16) {
    for (int row = 0; row < kRows; row += 2) {
      Four sum[2][4] = {}, right[4];
      for (int k = 0; k < kDepth; ++k) {
        std::memcpy(right, &b[k][n], sizeof(right));
        for (int r = 0; r < 2; ++r) {
          for (int i = 0; i < 4; ++i) sum[r][i] += a[row + r][k] * right[i];
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < 16; ++i) sums.sums[row + r][n + i] += sum[r][i / 4][i % 4];
      }
    }
  }
}

void compute(const Pending& p, bool bfloat16, Accumulator& sums) {
  uint16_t a_bits[kRows][kDepth], b_bits[kDepth][kMaxColumns];
  float a[kRows][kDepth], b[kDepth][kMaxColumns];
  if (p.mn_major) {
    for (int c = 0; c < 2 * kRows; ++c) {
      uint16_t rows[8];
      std::memcpy(rows, p.a[c].data(), sizeof(rows));
      for (int row = 0; row < 8; ++row) a_bits[c / 16 * 8 + row][c % 16] = rows[row];
    }
    for (int c = 0; c < 2 * p.columns; ++c) std::memcpy(&b_bits[c % 16][c / 16 * 8], p.b[c].data(), 16);
  } else {
    std::memcpy(a_bits, p.a.data(), sizeof(a_bits));
    for (int n = 0; n < p.columns; ++n) {
      uint16_t column[kDepth];
      std::memcpy(column, p.b[2 * n].data(), sizeof(column));
      for (int k = 0; k < kDepth; ++k) b_bits[k][n] = column[k];
    }
  }
  widen(a[0], a_bits[0], kRows * kDepth, bfloat16);
  for (int k = 0; k < kDepth; ++k) widen(b[k], b_bits[k], p.columns, bfloat16);
  switch (p.columns) {
    case 128:
      return add_product<128>(sums, a, b);
    case 64:
      return add_product<64>(sums, a, b);
    default:
      return add_product<32>(sums, a, b);
  }
}

void read_operands(std::vector<Chunk>& a, std::vector<Chunk>& b, const Pending& p) {
  read_operand(a, p.a_bits, p.mn_major, block->current / kWarp % kGroup * kRows, kRows);
  read_operand(b, p.b_bits, p.mn_major, 0, p.columns);
}

// An error if what the product reads is no longer what it was.
void finish(const Pending& p) {
  static std::vector<Chunk> a, b;
  a.clear();
  read_operands(a, b, p);
  if (a != p.a || b != p.b) fail("wgmma: an operand in shared memory changed before the product was done");
}

void issue(Products& products) {
  const Issue& first = products.lanes[0];
  const int warp_first = block->current / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Issue& other = products.lanes[lane];
    if (other.a_bits != first.a_bits || other.b_bits != first.b_bits || other.columns != first.columns ||
        other.bfloat16 != first.bfloat16 || other.mn_major != first.mn_major) {
      fail("wgmma: the lanes of a warp do not agree on a product");
    }
    if (!block->fibers[warp_first + lane].began) fail("wgmma: no products_begin in front of a product");
  }
  Accumulator& sums = accumulator(products);
  products.pending.emplace_back();
  Pending& p = products.pending.back();
  p.group = sums.group = products.group;
  p.a_bits = first.a_bits;
  p.b_bits = first.b_bits;
  p.columns = first.columns;
  p.mn_major = first.mn_major;
  read_operands(p.a, p.b, p);
  compute(p, first.bfloat16, sums);
  products.issued = true;
}

}  // namespace

uint64_t descriptor_bits(int at, int leading, int stride) {
  if ((at | leading | stride) & 15) fail("descriptor: not a multiple of 16 bytes");
  if (at < 0 || at >= 1 << 18 || leading < 0 || leading >= 1 << 18 || stride < 0 || stride >= 1 << 18) {
    fail("descriptor: a distance that it cannot hold");
  }
  return static_cast<uint64_t>(at >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32;
}

void products_begin() { fiber().began = true; }

void multiply_async(float* d, int columns, bool mn_major, Descriptor a, Descriptor b, bool bfloat16) {
  Products& products = own_products();
  products.lanes[block->current % kWarp] = {d, a.bits, b.bits, columns, mn_major, bfloat16};
  meet([&products](Rendezvous&) { issue(products); });
}

void products_commit() {
  Products& products = own_products();
  fiber().began = false;
  meet([&products](Rendezvous&) {
    ++products.group;
    products.issued = false;
  });
}

void products_wait(int pending) {
  Products& products = own_products();
  meet([&products, pending](Rendezvous&) {
    // a product takes its time: with a seed other warps may run as far as they can before it is done
    if (seed && !products.pending.empty()) {
      for (auto rounds = block->random() % 3; rounds > 0; --rounds) wait_for_round();
    }
    while (products.group - products.done > static_cast<uint64_t>(pending)) {
      while (!products.pending.empty() && products.pending.front().group == products.done) {
        finish(products.pending.front());
        products.pending.pop_front();
      }
      ++products.done;
    }
    auto& all = products.accumulators;
    const auto done = [&products](const std::unique_ptr<Accumulator>& sums) {
      if (sums->group >= products.done) return false;
      check_untouched(*sums);
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < sums->columns / 2; ++i) {
          sums->d[lane][i] = sums->sums[row_of(lane, i)][column_of(lane, i)];
        }
      }
      return true;
    };
    all.erase(std::remove_if(all.begin(), all.end(), done), all.end());
  });
}

void end_products() {
  const auto& products = block->products[block->current / kWarp];
  if (!products) return;
  if (products->issued) fail("wgmma: products were not committed");
  if (products->done != products->group) fail("wgmma: products were never waited for");
}

}  // namespace fastfilm::cuda::emulated
