// The compiler's part for g++: teams are threads of the operating system, one team at a time.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

#define DEVICE inline
#define SHARED static  // one team runs at a time, so a static variable is the team's
#define UNROLL

DEVICE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float float_of_half(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return float(value);
}
DEVICE uint16_t half_of_float(float value) {
    const _Float16 half = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
DEVICE uint16_t bfloat_of_float(float value) {  // to the nearest, ties to even
    const uint32_t bits = bits_of_float(value);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
DEVICE uint32_t halves_of_floats(float low, float high) {
    return half_of_float(low) | uint32_t(half_of_float(high)) << 16;
}
DEVICE uint32_t bfloats_of_floats(float low, float high) {
    return bfloat_of_float(low) | uint32_t(bfloat_of_float(high)) << 16;
}

// The build turns contraction to fused multiply-adds off (-ffp-contract=off).
DEVICE float product(float a, float b) { return a * b; }
DEVICE float sum(float a, float b) { return a + b; }
DEVICE float exponential(float x) { return std::exp(x); }
DEVICE float logarithm(float x) { return std::log(x); }
DEVICE float root(float x) { return std::sqrt(x); }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float larger(float a, float b) { return std::fmax(a, b); }

// Memory as a V, at a multiple of V's alignment. A GPU stops at any other address; a CPU does not,
// so they are counted, and the tests look at the count.
extern "C" {
inline std::atomic<int> misaligned{0};
}
template <class V>
DEVICE V& as(void* address) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(V) != 0) misaligned++;
    return *reinterpret_cast<V*>(address);
}
template <class V>
DEVICE const V& as(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(V) != 0) misaligned++;
    return *reinterpret_cast<const V*>(address);
}

template <class T>
DEVICE T read_once(const void* from) {
    return as<T>(from);
}
template <class T>
DEVICE T read_only(const T* from) {
    return as<T>(static_cast<const void*>(from));
}
template <class V>
DEVICE void write_once(void* to, const V& value) {
    static_assert(sizeof(V) == 16);
    as<V>(to) = value;
}

struct Meeting {  // what the threads of the running team share
    std::barrier<> barrier;
    std::vector<float> values;
    explicit Meeting(int threads) : barrier(threads), values(threads) {}
};

struct Block {
    Meeting* meeting;
    int64_t team, teams;
    int own;

    int64_t index() const { return team; }
    int64_t count() const { return teams; }
    int thread() const { return own; }
    int threads() const { return int(meeting->values.size()); }
    void sync() const { meeting->barrier.arrive_and_wait(); }

    template <class Merge>
    float merged(float value, Merge merge) const {
        sync();
        meeting->values[own] = value;
        sync();
        float result = meeting->values[0];
        for (int i = 1; i < threads(); i++) result = merge(result, meeting->values[i]);
        return result;
    }
    float sum(float value) const {
        return merged(value, [](float a, float b) { return a + b; });
    }
    float largest(float value) const {
        return merged(value, [](float a, float b) { return std::fmax(a, b); });
    }
};
using Warp = Block;

template <class Body>
void run(int64_t teams, int threads, Body body) {
    Meeting meeting(threads);
    const auto work = [&](int own) {
        for (int64_t team = 0; team < teams; team++) {
            body(Block{&meeting, team, teams, own});
            meeting.barrier.arrive_and_wait();
        }
    };
    std::vector<std::thread> others;
    for (int own = 1; own < threads; own++) others.emplace_back(work, own);
    work(0);
    for (std::thread& other : others) other.join();
}

#define KERNEL(NAME, ARGUMENTS, TEAM, THREADS, ...)                                  \
    extern "C" void NAME(int64_t teams, int threads, const ARGUMENTS* given) {         \
        run(teams, threads, [&](const Block& team) { __VA_ARGS__(team, *given); });  \
    }
#define FULL_KERNEL KERNEL
