// Matrix fragments of a warp. Every lane holds and computes the whole matrix; the first one stores it, so that others that
// read it without waiting read something else.
#pragma once

#include "cuda_bf16.h"

// What takes most of the time is worth vectors.
#if defined(__GNUC__) && !defined(__clang__)
#define EMULATOR_FAST __attribute__((optimize("O3")))
#else
#define EMULATOR_FAST
#endif

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
    static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
    T at[rows * columns];
};

// What the instructions ask of addresses. Fragments of other sizes than CUDA's stand for those of other devices.
template <class F, class T> void emulator_checks_matrix(const F &, const T *memory, unsigned stride) {
    if (F::rows != 16)
        return;
    if (reinterpret_cast<uintptr_t>(memory) % 32 != 0)
        emulator_fails("a matrix does not start at a multiple of 32 bytes");
    if (stride * sizeof(T) % 16 != 0)
        emulator_fails("rows of a matrix are no multiple of 16 bytes apart");
}

template <class F, class T> void emulator_loads(F &f, const T *memory, unsigned stride, bool by_rows) {
    emulator_checks_matrix(f, memory, stride);
    for (int r = 0; r < F::rows; r++)
        for (int c = 0; c < F::columns; c++)
            f.at[r * F::columns + c] = by_rows ? memory[r * stride + c] : memory[c * stride + r];
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout> &f, const T *memory, unsigned stride) {
    emulator_loads(f, memory, stride, std::is_same_v<Layout, row_major>);
}

template <int M, int N, int K, class T>
void load_matrix_sync(fragment<accumulator, M, N, K, T> &f, const T *memory, unsigned stride, layout_t layout) {
    emulator_loads(f, memory, stride, layout == mem_row_major);
}

template <int M, int N, int K, class T>
void store_matrix_sync(T *memory, const fragment<accumulator, M, N, K, T> &f, unsigned stride, layout_t layout) {
    emulator_checks_matrix(f, memory, stride);
    if (emulator_lane() != 0)
        return;
    for (int r = 0; r < M; r++)
        for (int c = 0; c < N; c++)
            memory[layout == mem_row_major ? r * stride + c : c * stride + r] = f.at[r * N + c];
}

template <class F, class T> void fill_fragment(F &f, T value) {
    for (auto &x : f.at)
        x = value;
}

template <int M, int N, int K, class T, class S, class La, class Lb>
EMULATOR_FAST void mma_sync(fragment<accumulator, M, N, K, S> &d, const fragment<matrix_a, M, N, K, T, La> &a,
              const fragment<matrix_b, M, N, K, T, Lb> &b, const fragment<accumulator, M, N, K, S> &c) {
    float right[K * N];
    for (int i = 0; i < K * N; i++)
        right[i] = b.at[i];
    for (int r = 0; r < M; r++) {
        float sums[N];
        for (int n = 0; n < N; n++)
            sums[n] = c.at[r * N + n];
        for (int k = 0; k < K; k++) {
            float left = a.at[r * K + k];
            for (int n = 0; n < N; n++)
                sums[n] += left * right[k * N + n];
        }
        for (int n = 0; n < N; n++)
            d.at[r * N + n] = sums[n];
    }
}

} // namespace wmma
} // namespace nvcuda
