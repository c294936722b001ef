// Small kernels on the emulation of sm_90a: right ones, and the same with one mistake each. Arguments: the name of a
// case and the seed of the order of threads. Prints "right", "wrong numbers" or the emulation's error.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "sm90_products.h"

namespace {

enum Mistake {
  kNone,
  kNoFence,
  kNoBegin,
  kNoCommit,
  kNoWait,
  kEarlyRelease,
  kNoArrival,
  kWrongParity,
  kTouched,
  kNoWarpAtBarrier,
  kPolls,
  kPollsForEver,
};

// A warpgroup brings operands, by bulk copies and by copies of its threads, another one multiplies them, and a third
// one ends at once.
struct Pipeline {
  using T = BFloat16;
  static constexpr int kThreads = 384, kMinBlocks = 1, kSteps = 5, kStages = 2;
  static constexpr int kA = 2 * 64 * kUnit, kB = 2 * 128 * kUnit, kStage = kA + kB;
  static constexpr int kFull = kStages * kStage, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
  struct Params {
    const T *a, *b;  // [step][chunk][64 or 128][8]
    float* out;  // [64][128]
    Mistake mistake;
  };
  static void run(const Params& p) {
    const int t = thread_index();
    if (t == 0) {
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(kFull + 8 * s, 128 + 1);
        mbarrier_init(kEmpty + 8 * s, 128);
      }
      fence_async();
    }
    barrier();
    const int warpgroup = uniform(t / 128);
    if (warpgroup == 0) {
      give_registers<40>();
      bring(p, t);
    } else if (warpgroup == 1) {
      take_registers<232>();
      multiply(p, t - 128);
    } else {
      give_registers<40>();
    }
  }
  static void bring(const Params& p, int t) {
    for (int i = 0; i < kSteps; ++i) {
      const int s = i % kStages;
      mbarrier_wait(kEmpty + 8 * s, (i / kStages + 1) % 2);
      if (t == 0) {
        mbarrier_expect(kFull + 8 * s, kA);
        copy_bulk(s * kStage, p.a + i * kA / 2, kA, kFull + 8 * s);
      }
      fill(s * kStage + kA, p.b + i * kB / 2, kB, t, 128);
      commit_copies();
      wait_copies<0>();
      if (!(p.mistake == kNoFence && t == 77)) fence_async();
      mbarrier_arrive(kFull + 8 * s);
    }
  }
  static void multiply(const Params& p, int t) {
    float d[64] = {};
    for (int i = 0; i < kSteps; ++i) {
      const int s = i % kStages, parity = i / kStages % 2, full = kFull + 8 * s;
      if (p.mistake == kPolls) {
        while (!mbarrier_test(full, parity)) {
        }
      } else {
        mbarrier_wait(full, p.mistake == kWrongParity && i == 3 ? 1 - parity : parity);
      }
      if (!(p.mistake == kNoBegin && i == 1)) products_begin();
      multiply_async(d, descriptor(s * kStage, 64 * kUnit, 8 * kUnit),
                     descriptor(s * kStage + kA, 128 * kUnit, 8 * kUnit), T{});
      if (!(p.mistake == kNoCommit && i == kSteps - 1)) products_commit();
      if (p.mistake == kEarlyRelease && i == 0) {
        mbarrier_arrive(kEmpty + 8 * s);
        for (int n = 0; n < 50; ++n) warp_barrier();
      }
      if (p.mistake == kTouched && t == 5) d[3] = 1;
      if (!(p.mistake == kNoWait && i == kSteps - 1)) products_wait<0>();
      if (p.mistake == kNoArrival && i == 1 && t == 40) continue;
      if (p.mistake == kEarlyRelease && i == 0) continue;
      mbarrier_arrive(kEmpty + 8 * s);
    }
    if (!(p.mistake == kNoWarpAtBarrier && t / 32 == 2)) barrier_of<2, 128>();
    if (p.mistake == kPollsForEver) {
      float lanes = 0;
      while (lanes < 32) {
        lanes = mbarrier_test(kFull + 8 * (kSteps % kStages), kSteps / kStages % 2);
        for (int mask = 16; mask > 0; mask /= 2) lanes += shuffle_xor(lanes, mask);
      }
    }
    for (int i = 0; i < 64; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
      p.out[row * 128 + column] = d[i];
    }
  }
  static std::string check(Mistake mistake) {
    std::vector<T> a(kSteps * kA / 2 + 8), b(kSteps * kB / 2 + 8);
    for (size_t i = 0; i < a.size(); ++i) a[i] = number<T>(value(6, i));
    for (size_t i = 0; i < b.size(); ++i) b[i] = number<T>(value(7, i));
    std::vector<float> out(64 * 128);
    if (const char* reason = launch<Pipeline>({2, 1, 1}, kBytes, nullptr, {a.data(), b.data(), out.data(), mistake})) {
      return reason;
    }
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < 128; ++n) {
        float sum = 0;
        for (int k = 0; k < 16 * kSteps; ++k) {
          sum += value(6, (k / 8 * 64 + m) * 8 + k % 8) * value(7, (k / 8 * 128 + n) * 8 + k % 8);
        }
        if (out[m * 128 + n] != sum) return "wrong numbers";
      }
    }
    return "right";
  }
};

// A kernel of some statements.
template <int kCount>
struct Statements {
  static constexpr int kThreads = kCount, kMinBlocks = 1;
  struct Params {
    std::function<void(int thread)> body;
  };
  static void run(const Params& p) { p.body(thread_index()); }
};

template <int kThreads>
std::string result(std::function<void(int)> body) {
  const char* reason = launch<Statements<kThreads>>({1, 1, 1}, 4096, nullptr, {std::move(body)});
  return reason ? reason : "right";
}

alignas(16) unsigned char some_bytes[1024];

// An mbarrier at 0 of `count` arrivals, and what follows.
std::string with_mbarrier(int count, std::function<void(int)> body) {
  return result<64>([&](int t) {
    if (t == 0) {
      mbarrier_init(0, count);
      fence_async();
    }
    barrier();
    body(t);
  });
}

using Case = std::function<std::string()>;

const std::map<std::string, Case>& cases() {
  static const std::map<std::string, Case> all = {
      {"convolution_bfloat16", Convolution<BFloat16>::check},
      {"convolution_float16", Convolution<Float16>::check},
      {"gradient_bfloat16_64", [] { return Gradient<BFloat16, 64>::check(); }},
      {"gradient_bfloat16_32", [] { return Gradient<BFloat16, 32>::check(); }},
      {"gradient_float16_32", [] { return Gradient<Float16, 32>::check(); }},
      {"swizzle", Swizzle::check},
      {"pipeline", [] { return Pipeline::check(kNone); }},
      {"pipeline_polls", [] { return Pipeline::check(kPolls); }},
      {"no_fence", [] { return Pipeline::check(kNoFence); }},
      {"no_begin", [] { return Pipeline::check(kNoBegin); }},
      {"no_commit", [] { return Pipeline::check(kNoCommit); }},
      {"no_wait", [] { return Pipeline::check(kNoWait); }},
      {"early_release", [] { return Pipeline::check(kEarlyRelease); }},
      {"no_arrival", [] { return Pipeline::check(kNoArrival); }},
      {"wrong_parity", [] { return Pipeline::check(kWrongParity); }},
      {"touched", [] { return Pipeline::check(kTouched); }},
      {"no_warp_at_barrier", [] { return Pipeline::check(kNoWarpAtBarrier); }},
      {"polls_for_ever", [] { return Pipeline::check(kPollsForEver); }},
      {"lanes_disagree",
       [] {
    return result<128>([](int t) {
      float d[64] = {};
      products_begin();
      multiply_async(d, descriptor(t == 9 ? 16 : 0, 128, 128), descriptor(0, 128, 128), Float16{});
    });
  }},
      {"unwritten_operand",
       [] {
    return result<128>([](int) {
      float d[64] = {};
      products_begin();
      multiply_async(d, descriptor(0, 128, 128), descriptor(0, 128, 128), Float16{});
      products_commit();
      products_wait<0>();
      if (d[0] != 0) emulated::fail("NaN");
    });
  }},
      {"special_numbers",
       [] {
    const std::string first = Numbers<BFloat16>::check();
    return first == "right" ? Numbers<Float16>::check() : first;
  }},
      {"read_too_early",
       [] {
    return result<128>([](int t) {
      for (int at = t * 16; at < 4096; at += 2048) store_shared16(at, {});
      fence_async();
      barrier();
      float d[64] = {};
      products_begin();
      multiply_async(d, descriptor(0, 128, 128), descriptor(0, 128, 128), Float16{});
      products_commit();
      products_wait<1>();
      const float early = d[0];
      products_wait<0>();
      if (d[0] != 0) emulated::fail("wrong numbers");
      if (early != 0) emulated::fail("NaN");
    });
  }},
      {"outside",
       [] {
    return result<128>([](int) {
      float d[64] = {};
      products_begin();
      multiply_async(d, descriptor(0, 128, 128), descriptor(2048, 1024, 128), Float16{});
    });
  }},
      {"not_initialised", [] { return with_mbarrier(1, [](int) { mbarrier_arrive(8); }); }},
      {"initialised_twice", [] { return with_mbarrier(1, [](int) { mbarrier_init(0, 1); }); }},
      {"no_barrier_behind_initialisation",
       [] {
    return result<64>([](int t) {
      if (t >= 32) return;
      if (t == 0) mbarrier_init(0, 1), mbarrier_arrive(0);
      warp_barrier();
      mbarrier_wait(0, 0);
    });
  }},
      {"too_many_arrivals",
       [] {
    return with_mbarrier(1, [](int t) {
      if (t != 3) return;
      mbarrier_expect(0, 32);
      copy_bulk(1024, some_bytes, 32, 0);
      mbarrier_arrive(0);
    });
  }},
      {"bulk_copy",
       [] {
    return with_mbarrier(1, [](int t) {
      if (t == 3) {
        mbarrier_expect(0, 48);
        copy_bulk(1024, some_bytes + 16, 32, 0);
        copy_bulk(512, some_bytes, 16, 0);
        if (shared_memory()[1024] != 0xff) emulated::fail("a bulk copy was there at once");
      }
      mbarrier_wait(0, 0);
      if (std::memcmp(shared_memory() + 1024, some_bytes + 16, 32)) emulated::fail("wrong bytes");
      if (std::memcmp(shared_memory() + 512, some_bytes, 16)) emulated::fail("wrong bytes");
    });
  }},
      {"bulk_copy_not_waited_for",
       [] {
    return with_mbarrier(1, [](int t) {
      if (t != 3) return;
      mbarrier_expect(0, 32);
      copy_bulk(1024, some_bytes, 32, 0);
      for (int i = 0; i < 3; ++i) mbarrier_test(0, 1);
    });
  }},
      {"bulk_copies_run_over",
       [] {
    return with_mbarrier(1, [](int t) {
      if (t != 3) return;
      for (int i = 0; i < 2; ++i) {
        mbarrier_expect(0, 32);
        copy_bulk(1024, some_bytes, 32, 0);
        while (shared_memory()[1024] == 0xff) mbarrier_test(0, i % 2);
      }
    });
  }},
      {"bulk_copy_announced_too_long",
       [] {
    return with_mbarrier(1, [](int t) {
      if (t == 3) mbarrier_expect(0, 48), copy_bulk(1024, some_bytes, 32, 0);
      mbarrier_wait(0, 0);
    });
  }},
      {"bulk_copy_misaligned",
       [] {
    return with_mbarrier(1, [](int t) {
      if (t == 3) mbarrier_expect(0, 32), copy_bulk(1024, some_bytes + 8, 32, 0);
    });
  }},
      {"bulk_copy_to_unfenced_mbarrier",
       [] {
    return result<64>([](int t) {
      if (t == 0) mbarrier_init(0, 1);
      barrier();
      if (t == 0) mbarrier_expect(0, 32), copy_bulk(1024, some_bytes, 32, 0);
      mbarrier_wait(0, 0);
    });
  }},
      {"registers_beyond",
       [] {
    return result<384>([](int t) {
      if (t < 128) {
        give_registers<32>();
      } else {
        take_registers<240>();
      }
    });
  }},
      {"registers",
       [] {
    return result<384>([](int t) {
      if (t < 128) {
        give_registers<24>();
      } else {
        take_registers<240>();
      }
    });
  }},
      {"registers_of_two_warps",
       [] {
    return result<256>([](int t) {
      if (t < 64) give_registers<24>();
    });
  }},
      {"registers_taken_but_fewer", [] { return result<256>([](int) { take_registers<128>(); }); }},
      {"part_of_a_warp",
       [] {
    return result<128>([](int t) {
      if (t < 16 || t >= 112) barrier_of<1, 32>();
    });
  }},
      {"two_counts",
       [] {
    return result<128>([](int t) {
      if (t < 64) {
        barrier_of<1, 96>();
      } else {
        barrier_of<1, 64>();
      }
    });
  }},
      {"not_uniform", [] { return result<128>([](int t) { uniform(t / 40); }); }},
      {"ended_threads",
       [] {
    static unsigned counter;
    counter = 0;
    return result<256>([](int t) {
      if (t >= 128) return;
      fence();
      barrier();
      if (t == 0) arrive(&counter);
      barrier();
      fence();
      barrier();
    });
  }},
      {"no_fence_in_front_of_arrival",
       [] {
    static unsigned counter;
    counter = 0;
    return result<128>([](int t) {
      barrier();
      if (t == 0) arrive(&counter);
      barrier();
      fence();
    });
  }},
      {"first_fence_behind_arrival",
       [] {
    static unsigned counter;
    counter = 0;
    return result<128>([](int t) {
      if (t < 64) fence();
      barrier();
      if (t == 0) arrive(&counter);
      barrier();
      fence();
    });
  }},
      {"device",
       [] {
    const Device plain = query_device();
    emulated::set_device(90, 227 * 1024, 132);
    const Device set = query_device();
    return plain.capability == 80 && plain.shared_bytes == 163 * 1024 && plain.multiprocessors == 2 &&
                   set.capability == 90 && set.shared_bytes == 227 * 1024 && set.multiprocessors == 132
               ? "right"
               : "wrong numbers";
  }},
  };
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !cases().count(argv[1])) {
    for (const auto& entry : cases()) std::printf("%s\n", entry.first.c_str());
    return argc != 1;
  }
  for (size_t i = 0; i < sizeof(some_bytes); ++i) some_bytes[i] = static_cast<unsigned char>(i * 7 % 251);
  emulated::set_seed(std::strtoull(argv[2], nullptr, 10));
  std::printf("%s\n", cases().at(argv[1])().c_str());
  return 0;
}
