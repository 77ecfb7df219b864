// The emulator: memory, the threads of a block, and the order in which they run.

#include "emulator.h"

#include <csignal>
#include <fstream>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;

// As much as a block may have, and some bytes behind it that nobody may write.
constexpr size_t SHARED_BYTES = 228 << 10, GUARD_BYTES = 1 << 10;
alignas(1024) unsigned char dynamic_shared_mem[SHARED_BYTES + GUARD_BYTES];

[[noreturn]] void emulator_fails(const char *what) {
    std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, emulator_thread(), what);
    std::_Exit(2);
}

namespace emulator {

enum class State { Ready, WaitsForWarp, WaitsForBlock, Done };

struct Fiber {
    ucontext_t context;
    State state;
    uint3 index;
};

constexpr size_t STACK_BYTES = 1 << 20;
std::vector<Fiber> fibers;
unsigned char *stacks;
ucontext_t scheduler;
size_t running;
uint64_t slots[1024];
void (*run_kernel)();

void *reserve(size_t bytes) {
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("mmap");
        std::_Exit(3);
    }
    return memory;
}

void enter() {
    run_kernel();
    fibers[running].state = State::Done;
}

void resume(size_t i) {
    running = i;
    threadIdx = fibers[i].index;
    fibers[i].state = State::Ready;
    swapcontext(&scheduler, &fibers[i].context);
}

// Whether all threads of a range wait for the same; some of them may not be there yet.
bool all_wait(size_t first, size_t end, State state) {
    for (size_t i = first; i < end; i++)
        if (fibers[i].state != state)
            return false;
    return true;
}

void run_block(bool backwards) {
    size_t n = fibers.size();
    // What nobody wrote is no number.
    std::memset(dynamic_shared_mem, 0xff, sizeof dynamic_shared_mem);
    for (size_t i = 0; i < n; i++) {
        Fiber &fiber = fibers[i];
        fiber.state = State::Ready;
        fiber.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                       unsigned(i / (blockDim.x * blockDim.y))};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (size_t done = 0; done < n;) {
        bool moved = false;
        for (size_t k = 0; k < n; k++) {
            size_t i = backwards ? n - 1 - k : k;
            if (fibers[i].state != State::Ready)
                continue;
            resume(i);
            moved = true;
            done += fibers[i].state == State::Done;
        }
        for (size_t first = 0; first < n; first += warpSize) {
            size_t end = first + warpSize < n ? first + warpSize : n;
            if (all_wait(first, end, State::WaitsForWarp)) {
                for (size_t i = first; i < end; i++)
                    fibers[i].state = State::Ready;
                moved = true;
            }
        }
        if (all_wait(0, n, State::WaitsForBlock)) {
            for (size_t i = 0; i < n; i++)
                fibers[i].state = State::Ready;
            moved = true;
        }
        if (!moved)
            emulator_fails("threads wait for others that never come");
    }
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (dynamic_shared_mem[SHARED_BYTES + i] != 0xff)
            emulator_fails("shared memory is written behind its end");
}

// A range of memory between pages that nobody may touch: at the one behind it when threads run first to last, at the one
// in front of it when they run last to first. What is left on the other side is no number, and stays as it is.
struct Buffer {
    std::vector<unsigned char> before;
    size_t room;
    unsigned char *pages, *start;

    explicit Buffer(std::vector<unsigned char> bytes) : before(std::move(bytes)) {
        size_t page = sysconf(_SC_PAGESIZE);
        room = (size() + page - 1) / page * page;
        unsigned char *memory = static_cast<unsigned char *>(reserve(room + 2 * page));
        mprotect(memory, page, PROT_NONE);
        mprotect(memory + page + room, page, PROT_NONE);
        start = pages = memory + page;
    }
    // Vectors of kernels have up to 16 bytes.
    size_t size() const { return (before.size() + 15) / 16 * 16; }
    void reset(bool backwards) {
        std::memset(pages, 0xff, room);
        start = backwards ? pages : pages + room - size();
        std::memcpy(start, before.data(), before.size());
    }
    std::vector<unsigned char> bytes() const { return {start, start + before.size()}; }
    bool is_alone() const {
        for (unsigned char *at = pages; at < pages + room; at++)
            if (*at != 0xff && (at < start || at >= start + before.size()))
                return false;
        return true;
    }
};

struct Launch {
    std::vector<Buffer> buffers;
    // For each pointer of the kernel, which buffer it is.
    std::vector<uint64_t> pointers;
    std::vector<uint64_t> info;
};
Launch launch;

uint64_t number(std::istream &in) {
    uint64_t value = 0;
    in.read(reinterpret_cast<char *>(&value), sizeof value);
    return value;
}

// Words of 64 bits: cubes on three axes; units on three axes; count of buffers, and for each its size and bytes; count of
// pointers, and their buffers; count of words of `info_st`, and these.
void read(const char *path) {
    std::ifstream in(path, std::ios::binary);
    for (unsigned *n : {&gridDim.x, &gridDim.y, &gridDim.z, &blockDim.x, &blockDim.y, &blockDim.z})
        *n = number(in);
    for (uint64_t count = number(in); count > 0; count--) {
        std::vector<unsigned char> bytes(number(in));
        in.read(reinterpret_cast<char *>(bytes.data()), bytes.size());
        launch.buffers.emplace_back(std::move(bytes));
    }
    launch.pointers.resize(number(in));
    for (uint64_t &pointer : launch.pointers)
        pointer = number(in);
    launch.info.resize(number(in));
    for (uint64_t &word : launch.info)
        word = number(in);
    if (!in)
        emulator_fails("the input is cut off");
}

void *pointer(size_t at) {
    if (at >= launch.pointers.size())
        emulator_fails("the kernel has more pointers than buffers");
    return launch.buffers[launch.pointers[at]].start;
}

void info(void *to, size_t bytes) {
    size_t given = launch.info.size() * sizeof(uint64_t);
    std::memcpy(to, launch.info.data(), given < bytes ? given : bytes);
}

int run(void (*kernel)(), int count, char **paths) {
    if (count != 3)
        emulator_fails("usage: emulator IN OUT");
    signal(SIGSEGV, [](int) { emulator_fails("memory outside a buffer, or at an odd place for its type"); });
    read(paths[1]);
    run_kernel = kernel;
    fibers.resize(size_t(blockDim.x) * blockDim.y * blockDim.z);
    if (fibers.size() > 1024)
        emulator_fails("more than 1024 threads");
    stacks = static_cast<unsigned char *>(reserve(fibers.size() * STACK_BYTES));
    std::vector<std::vector<unsigned char>> first;
    for (bool backwards : {false, true}) {
        for (Buffer &buffer : launch.buffers)
            buffer.reset(backwards);
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
                    run_block(backwards);
        for (size_t i = 0; i < launch.buffers.size(); i++) {
            if (!launch.buffers[i].is_alone())
                emulator_fails("memory outside a buffer is written");
            auto bytes = launch.buffers[i].bytes();
            if (!backwards)
                first.push_back(bytes);
            else if (bytes != first[i])
                emulator_fails("the result depends on which thread runs first");
        }
    }
    std::ofstream out(paths[2], std::ios::binary);
    for (const auto &bytes : first)
        out.write(reinterpret_cast<const char *>(bytes.data()), bytes.size());
    return out ? 0 : 3;
}

} // namespace emulator

void emulator_waits(bool for_block) {
    using namespace emulator;
    fibers[running].state = for_block ? State::WaitsForBlock : State::WaitsForWarp;
    swapcontext(&fibers[running].context, &scheduler);
}

uint64_t *emulator_slot(unsigned lane) {
    size_t first = emulator_thread() / warpSize * warpSize;
    return &emulator::slots[first + lane];
}
