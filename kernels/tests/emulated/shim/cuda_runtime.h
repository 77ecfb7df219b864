// CUDA C++ on a CPU, as far as kernels use it: blocks run one after the other, the threads of a block are fibers that
// change only where threads wait for each other. What a kernel forgot to wait for therefore shows: threads run first to
// last, then last to first, and must give the same bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// Shared memory of the block that runs; kernels declare it with their own size.
extern unsigned char dynamic_shared_mem[];

struct uint3 {
    unsigned x, y, z;
};
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
extern uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

template <class T> struct alignas(2 * sizeof(T)) Vector2 {
    T x, y;
};
template <class T> struct alignas(4 * sizeof(T)) Vector4 {
    T x, y, z, w;
};
using int2 = Vector2<int>;
using int4 = Vector4<int>;
using uint2 = Vector2<unsigned>;
using uint4 = Vector4<unsigned>;
using float2 = Vector2<float>;
using float4 = Vector4<float>;

[[noreturn]] void emulator_fails(const char *what);
void emulator_waits(bool for_block);
uint64_t *emulator_slot(unsigned lane);

inline void __syncthreads() { emulator_waits(true); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator_waits(false); }
inline void __threadfence() {}

// Lanes of a warp in which threads are numbered as CUDA does.
inline unsigned emulator_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline unsigned emulator_lane() { return emulator_thread() % warpSize; }

template <class T> T emulator_exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "one word per lane");
    std::memcpy(emulator_slot(emulator_lane()), &value, sizeof(T));
    __syncwarp();
    T other;
    std::memcpy(&other, emulator_slot(from), sizeof(T));
    __syncwarp();
    return other;
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return emulator_exchange(value, lane % warpSize); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator_exchange(value, emulator_lane() ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned delta) {
    return emulator_exchange(value, emulator_lane() < delta ? emulator_lane() : emulator_lane() - delta);
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned delta) {
    return emulator_exchange(value, emulator_lane() + delta >= warpSize ? emulator_lane() : emulator_lane() + delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    *emulator_slot(emulator_lane()) = predicate != 0;
    __syncwarp();
    unsigned bits = 0;
    for (unsigned lane = 0; lane < warpSize; lane++)
        bits |= unsigned(*emulator_slot(lane)) << lane;
    __syncwarp();
    return bits;
}
inline bool __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T> T __ldg(const T *from) { return *from; }

// Where C++ has them for float too, unqualified names mean those.
using std::abs;
using std::ceil;
using std::cos;
using std::erf;
using std::exp;
using std::floor;
using std::fma;
using std::isinf;
using std::isnan;
using std::log;
using std::pow;
using std::rint;
using std::round;
using std::sin;
using std::sqrt;
using std::tanh;
using std::trunc;
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float __powf(float a, float b) { return std::pow(a, b); }
template <class T, class U> auto min(T a, U b) { return b < a ? b : a; }
template <class T, class U> auto max(T a, U b) { return a < b ? b : a; }
template <class T> T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
