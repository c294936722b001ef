// Operands in shared memory with the products that they must give, made on the host.
//
// The expected values come from the logical arrays (a convolution, a matrix product, a unit's own number);
// `product` computes the same from the bytes and the descriptors as the PTX ISA words their layouts.
#pragma once

#include <string>
#include <vector>

#include "layout.h"
#include "probe.h"

namespace probes {

// One accumulated product on one warpgroup: D [64, n] is the sum over the steps of A [64, 16] B [16, n].
struct Case {
    std::string name;
    int n = 128;
    bool registers = false;               // A from registers, not from shared memory
    bool a_mn = false, b_mn = false;      // MN-major operands
    bool map = false;                     // one of three that show what is read
    bool holds = true;                    // false: the other assignment of the strides, which should not
    std::vector<uint16_t> image;          // shared memory, bfloat16
    std::vector<uint16_t> fragments;      // [step][64][16] for A from registers
    std::vector<uint64_t> a, b;           // a descriptor for each step; starts relative to the image
    std::vector<float> expected;          // [64][n]

    void put(uint32_t byte, float value) {
        if (image.size() <= byte / 2) image.resize((byte / kUnit + 1) * (kUnit / 2));
        image[byte / 2] = narrow(value);
    }
    void fragment(int step, int row, int k, float value) {
        fragments.resize(b.size() * kRows * kStep);
        fragments[(step * kRows + row) * kStep + k] = narrow(value);
    }
};

// Byte of element (row, k) of an operand: row of A, column of B.
inline uint32_t element(uint64_t d, bool mn_major, int row, int k) {
    const uint32_t start = (d & 0x3fff) * 16, leading = (d >> 16 & 0x3fff) * 16;
    const uint32_t stride = (d >> 32 & 0x3fff) * 16, groups = row / 8 * stride;
    if (d >> 62 == 1) {
        const uint32_t byte = start + groups + row % 8 * 128 + k * 2;
        return byte ^ (byte >> 7 & 7) << 4;
    }
    const int along = mn_major ? row % 8 : k % 8, across = mn_major ? k % 8 : row % 8;
    return start + groups + k / 8 * leading + across * 16 + along * 2;
}

inline std::vector<float> product(const Case& c) {
    std::vector<float> d(kRows * c.n);
    const auto read = [&](uint32_t byte) {
        return byte / 2 < c.image.size() ? widen(c.image[byte / 2]) : 0.f;
    };
    for (size_t s = 0; s < c.b.size(); ++s)
        for (int m = 0; m < kRows; ++m)
            for (int k = 0; k < kStep; ++k) {
                const float a = c.registers ? widen(c.fragments[(s * kRows + m) * kStep + k])
                                            : read(element(c.a[s], c.a_mn, m, k));
                if (a == 0) continue;
                for (int n = 0; n < c.n; ++n)
                    d[m * c.n + n] += a * read(element(c.b[s], c.b_mn, n, k));
            }
    return d;
}

// Small integers that differ from place to place.
inline float value(uint32_t seed, uint32_t i) {
    return float(int(tile::hash(i * 2 + 1 + tile::hash(seed)) % 7) - 3);
}

// A slab [chunk of 8 channels][voxel][16 bytes] behind the other operand.
struct Slab {
    int pitch, lines;
    bool even = false;  // an even number of 16-byte units between chunks
    uint32_t base = 128 * 1024;

    int voxels() const { return pitch * lines; }
    uint32_t chunk() const { return (even ? (voxels() + 1) / 2 * 2 : voxels() | 1) * kUnit; }
    uint32_t at(int voxel, int channel) const {
        return base + channel / 8 * chunk() + voxel * kUnit + channel % 8 * 2;
    }
    // K-major: rows are voxels. MN-major: rows are channels, k are voxels. Both take eight voxels of a line.
    Strides k_major() const { return {chunk(), uint32_t(pitch * kUnit), 0}; }
    Strides mn_major() const { return {uint32_t(pitch * kUnit), chunk(), 0}; }
};

inline Strides swapped(Strides s) { return {s.stride, s.leading, s.swizzle}; }

constexpr Strides weight_strides(int rows) { return {uint32_t(rows * kUnit), 128, 0}; }

// Convolution with one weight [rows, 64 channels] a tap, which is a distance in voxels. Voxels are columns
// of D (fprop, dgrad), eight of a line, from `column` on; or its 64 rows, with 32 output channels as columns.
inline Case convolution(const std::string& name, Slab slab, std::vector<int> taps, int n,
                        bool registers = false, int column = 0, bool voxels_as_m = false) {
    Case c;
    c.name = name, c.n = n, c.registers = registers;
    const int outputs = voxels_as_m ? n : kRows, places = voxels_as_m ? kRows : n;
    const auto weight = [&](int tap, int o, int ch) {
        return value(5, (tap * outputs + o) * kChannels + ch);
    };
    const auto input = [&](int voxel, int ch) { return value(6, voxel * kChannels + ch); };
    const auto voxel = [&](int i) { return i / 8 * slab.pitch + i % 8 + column; };
    for (int v = 0; v < slab.voxels(); ++v)
        for (int ch = 0; ch < kChannels; ++ch) c.put(slab.at(v, ch), input(v, ch));
    for (size_t t = 0; t < taps.size(); ++t)
        for (int k = 0; k < kChannels; k += kStep) {
            const uint32_t weights = (t * kChannels + k) / 8 * outputs * kUnit;
            const uint64_t w = descriptor(weights, weight_strides(outputs));
            const uint64_t x = descriptor(slab.at(column + taps[t], k), slab.k_major());
            c.a.push_back(voxels_as_m ? x : w);
            c.b.push_back(voxels_as_m ? w : x);
            for (int o = 0; o < outputs; ++o)
                for (int ch = k; ch < k + kStep; ++ch) {
                    const float put = weight(t, o, ch);
                    if (registers) c.fragment(c.b.size() - 1, o, ch - k, put);
                    c.put(weights + (ch - k) / 8 * outputs * kUnit + o * kUnit + ch % 8 * 2, put);
                }
        }
    c.expected.resize(kRows * n);
    for (int o = 0; o < outputs; ++o)
        for (int i = 0; i < places; ++i) {
            float sum = 0;
            for (size_t t = 0; t < taps.size(); ++t)
                for (int ch = 0; ch < kChannels; ++ch)
                    sum += weight(t, o, ch) * input(voxel(i) + taps[t], ch);
            c.expected[voxels_as_m ? i * n + o : o * n + i] = sum;
        }
    return c;
}

// Weight gradient of one tap: e [64 channels, 128 voxels] times the slab [128 voxels, 64 channels], the voxels
// as k. e comes from registers or, as an MN-major operand, from a slab of its own of the same pitch.
inline Case weight_gradient(const std::string& name, Slab slab, int tap, bool registers) {
    constexpr int lines = 16;
    Case c;
    c.name = name, c.n = kChannels, c.registers = registers, c.a_mn = c.b_mn = true;
    const Slab other{slab.pitch, lines, slab.even, 0};
    const auto e = [&](int line, int x, int ch) { return value(7, (line * 8 + x) * kChannels + ch); };
    const auto input = [&](int voxel, int ch) { return value(8, voxel * kChannels + ch); };
    for (int v = 0; v < slab.voxels(); ++v)
        for (int ch = 0; ch < kChannels; ++ch) c.put(slab.at(v, ch), input(v, ch));
    for (int line = 0; line < lines; line += 2) {
        c.a.push_back(descriptor(other.at(line * slab.pitch, 0), other.mn_major()));
        c.b.push_back(descriptor(slab.at(line * slab.pitch + tap, 0), slab.mn_major()));
        for (int ch = 0; ch < kChannels; ++ch)
            for (int k = 0; k < kStep; ++k) {
                const float put = e(line + k / 8, k % 8, ch);
                if (registers) c.fragment(line / 2, ch, k, put);
                c.put(other.at((line + k / 8) * slab.pitch + k % 8, ch), put);
            }
    }
    c.expected.resize(kRows * kChannels);
    for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kChannels; ++n)
            for (int line = 0; line < lines; ++line)
                for (int x = 0; x < 8; ++x)
                    c.expected[m * kChannels + n] +=
                        e(line, x, m) * input(line * slab.pitch + x + tap, n);
    return c;
}

// A product of two matrices, both with the 128-byte swizzle: rows of 64 channels, eight rows an atom.
inline Case swizzled() {
    Case c;
    c.name = "128-byte swizzle";
    const uint32_t base = 16 * 1024;
    const auto put = [&](uint32_t from, int row, int ch, float x) {
        const uint32_t byte = from + row * 128 + (ch / 8 ^ row % 8) * kUnit + ch % 8 * 2;
        c.put(byte, x);
    };
    c.expected.resize(kRows * c.n);
    for (int ch = 0; ch < kChannels; ++ch) {
        for (int m = 0; m < kRows; ++m) put(0, m, ch, value(1, m * kChannels + ch));
        for (int n = 0; n < c.n; ++n) put(base, n, ch, value(2, n * kChannels + ch));
        for (int m = 0; m < kRows; ++m)
            for (int n = 0; n < c.n; ++n)
                c.expected[m * c.n + n] +=
                    value(1, m * kChannels + ch) * value(2, n * kChannels + ch);
    }
    for (int k = 0; k < kChannels; k += kStep) {
        c.a.push_back(descriptor(k * 2, {16, 1024, 1}));
        c.b.push_back(descriptor(base + k * 2, {16, 1024, 1}));
    }
    return c;
}

// Three products with a unit matrix show which element of the slab each place of an operand reads: the slab
// holds its 16-byte units' numbers modulo 256, then over 256, then the element's place in its unit.
enum class Major { k, mn };
inline std::vector<Case> map(const std::string& name, Slab slab, Major major, int start,
                             bool as_a = false, bool swap = false) {
    std::vector<Case> out;
    slab.base = 1024;  // strides taken the other way round must stay in shared memory
    for (int part = 0; part < 3; ++part) {
        Case c;
        c.name = name, c.n = as_a ? 32 : major == Major::k ? 128 : kChannels;
        c.map = true, c.registers = !as_a, c.holds = !swap;
        (as_a ? c.a_mn : c.b_mn) = major == Major::mn;
        const auto id = [&](uint32_t unit, int at) {
            return float(part == 0 ? unit % 256 : part == 1 ? unit / 256 : at);
        };
        const uint32_t units = slab.chunk() / kUnit * (kChannels / 8);
        for (uint32_t u = 0; u < units; ++u)
            for (int at = 0; at < 8; ++at) c.put(slab.base + u * kUnit + at * 2, id(u, at));
        const Strides s = major == Major::k ? slab.k_major() : slab.mn_major();
        const uint64_t x = descriptor(slab.at(start, 0), swap ? swapped(s) : s);
        const int rows = as_a ? kRows : c.n;
        c.a.push_back(x), c.b.push_back(x);
        if (as_a) c.b[0] = descriptor(0, weight_strides(c.n));
        for (int k = 0; k < kStep; ++k) {
            if (as_a) c.put(k / 8 * c.n * kUnit + k * kUnit + k % 8 * 2, 1);
            else c.fragment(0, k, k, 1);
        }
        c.expected.resize(kRows * c.n);
        for (int row = 0; row < rows; ++row)
            for (int k = 0; k < kStep; ++k) {
                const int channel = major == Major::k ? k : row, i = major == Major::k ? row : k;
                const int voxel = start + i / 8 * slab.pitch + i % 8;
                const uint32_t unit = channel / 8 * (slab.chunk() / kUnit) + voxel;
                c.expected[as_a ? row * c.n + k : k * c.n + row] = id(unit, channel % 8);
            }
        out.push_back(c);
    }
    return out;
}

}  // namespace probes
