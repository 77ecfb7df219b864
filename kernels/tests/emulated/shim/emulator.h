// Runs a kernel: `emulator::run(KERNEL, argc, argv)` with `PROGRAM IN OUT`, where the first file says what to run (see `read`
// in `emulator.cpp`) and the second one gets the memory afterwards.
#pragma once

#include "cuda_runtime.h"

namespace emulator {

void *pointer(size_t at);
void info(void *to, size_t bytes);
int run(void (*kernel)(), int count, char **paths);

// The arguments of a kernel: pointers are buffers in order, a struct is `info_st`.
template <class T> T argument(size_t &next) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(pointer(next++));
    } else {
        // Words behind the last that matters may be missing.
        T value{};
        info(&value, sizeof value);
        return value;
    }
}

template <class... A> struct Entry {
    static inline void (*kernel)(A...);

    // Braces evaluate from left to right.
    struct Call {
        Call(std::decay_t<A>... arguments) { kernel(arguments...); }
    };
    static void call() {
        size_t next = 0;
        Call{argument<std::decay_t<A>>(next)...};
    }
};

template <class... A> int run(void (*kernel)(A...), int count, char **paths) {
    Entry<A...>::kernel = kernel;
    return run(&Entry<A...>::call, count, paths);
}

} // namespace emulator
