/* A CUDA driver and a compiler library without a GPU: memory is the machine's, kernels do nothing, and what
 * FAKE_CUDA_FAIL names fails. Built as libcuda.so and as libnvrtc.so.
 *
 * FAKE_CUDA_VERSION, FAKE_NVRTC_VERSION   12080 is 12.8, the default
 * FAKE_CUDA_ARCH                          compute capability without its dot, 90 by default
 * FAKE_CUDA_MEMORY                        bytes of the device, 16 GB by default
 * FAKE_CUDA_LOG                           file that gets a line for every kernel that is compiled
 * FAKE_CUDA_FAIL                          a list of FUNCTION=CODE, or FUNCTION@N=CODE from the N-th call of it on
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int result;
typedef unsigned long long pointer;
#define EXPORT __attribute__((visibility("default")))
enum { OUT_OF_MEMORY = 2 };

static long long setting(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text ? atoll(text) : otherwise;
}

/* What a call of `function` ends with: 0, or what the tests want. */
static result outcome(const char *function) {
    static struct { const char *name; long calls; } seen[64];
    size_t n = strlen(function);
    for (const char *at = getenv("FAKE_CUDA_FAIL"); at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        if (strncmp(at, function, n) != 0 || (at[n] != '=' && at[n] != '@')) continue;
        int i = 0;
        while (i < 63 && seen[i].name && strcmp(seen[i].name, function) != 0) i++;
        seen[i].name = function;
        seen[i].calls++;
        long first = at[n] == '@' ? atol(at + n + 1) : 1;
        return seen[i].calls < first ? 0 : atoi(strchr(at, '=') + 1);
    }
    return 0;
}
#define CHECK do { result failed = outcome(__func__); if (failed) return failed; } while (0)

static long long held;

static result allocate(pointer *out, size_t bytes) {
    if (held + (long long)bytes > setting("FAKE_CUDA_MEMORY", 16000000000LL)) return OUT_OF_MEMORY;
    /* The size stands in front, at a distance that keeps memory aligned. */
    size_t *block = calloc(1, bytes + 512);
    if (!block) return OUT_OF_MEMORY;
    block[0] = bytes;
    held += bytes;
    *out = (pointer)(size_t)((char *)block + 512);
    return 0;
}

static result release(pointer at) {
    size_t *block = (size_t *)(size_t)(at - 512);
    held -= block[0];
    free(block);
    return 0;
}

EXPORT result cuInit(unsigned flags) { (void)flags; CHECK; return 0; }
EXPORT result cuDriverGetVersion(int *out) { *out = setting("FAKE_CUDA_VERSION", 12080); return 0; }
EXPORT result cuDeviceGetCount(int *out) { CHECK; *out = 1; return 0; }
EXPORT result cuDeviceGet(int *out, int index) { *out = index; return 0; }
EXPORT result cuDeviceGetName(char *out, int n, int device) { (void)device; snprintf(out, n, "Fake GPU"); return 0; }
EXPORT result cuDeviceTotalMem_v2(size_t *out, int device) {
    (void)device;
    *out = setting("FAKE_CUDA_MEMORY", 16000000000LL);
    return 0;
}
EXPORT result cuDeviceGetAttribute(int *out, int attribute, int device) {
    (void)device;
    long long arch = setting("FAKE_CUDA_ARCH", 90);
    switch (attribute) {
        case 1: *out = 1024; break;                     /* threads of a block */
        case 2: case 3: *out = 1024; break;             /* on its axes */
        case 4: *out = 64; break;
        case 5: *out = 2147483647; break;               /* blocks of a grid */
        case 6: case 7: *out = 65535; break;
        case 10: *out = 32; break;                      /* warp */
        case 16: *out = 4; break;                       /* multiprocessors */
        case 75: *out = arch / 10; break;
        case 76: *out = arch % 10; break;
        case 97: *out = 227 << 10; break;               /* shared memory that a block can ask for */
        default: *out = 0;
    }
    return 0;
}
EXPORT result cuDevicePrimaryCtxRetain(void **out, int device) { (void)device; CHECK; *out = &held; return 0; }
EXPORT result cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
EXPORT result cuCtxSetCurrent(void *context) { (void)context; return 0; }
EXPORT result cuCtxGetCurrent(void **out) { *out = &held; return 0; }
EXPORT result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    *total = setting("FAKE_CUDA_MEMORY", 16000000000LL);
    *free_bytes = *total - held;
    return 0;
}

EXPORT result cuStreamCreate(void **out, unsigned flags) { (void)flags; *out = &held; return 0; }
EXPORT result cuStreamDestroy_v2(void *stream) { (void)stream; return 0; }
EXPORT result cuStreamSynchronize(void *stream) { (void)stream; CHECK; return 0; }
EXPORT result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { (void)stream, (void)event, (void)flags; return 0; }
EXPORT result cuEventCreate(void **out, unsigned flags) { (void)flags; CHECK; *out = &held; return 0; }
EXPORT result cuEventRecord(void *event, void *stream) { (void)event, (void)stream; CHECK; return 0; }
EXPORT result cuEventSynchronize(void *event) { (void)event; CHECK; return 0; }
EXPORT result cuEventDestroy_v2(void *event) { (void)event; return 0; }

EXPORT result cuMemAllocAsync(pointer *out, size_t bytes, void *stream) { (void)stream; CHECK; return allocate(out, bytes); }
EXPORT result cuMemAlloc_v2(pointer *out, size_t bytes) { CHECK; return allocate(out, bytes); }
EXPORT result cuMemFreeAsync(pointer at, void *stream) { (void)stream; return release(at); }
EXPORT result cuMemFree_v2(pointer at) { return release(at); }
EXPORT result cuMemAllocHost_v2(void **out, size_t bytes) { *out = calloc(1, bytes); return *out ? 0 : OUT_OF_MEMORY; }
EXPORT result cuMemFreeHost(void *at) { free(at); return 0; }
EXPORT result cuMemcpyHtoDAsync_v2(pointer to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    CHECK;
    memcpy((void *)(size_t)to, from, bytes);
    return 0;
}
EXPORT result cuMemcpyDtoHAsync_v2(void *to, pointer from, size_t bytes, void *stream) {
    (void)stream;
    CHECK;
    memcpy(to, (const void *)(size_t)from, bytes);
    return 0;
}

EXPORT result cuModuleLoadData(void **out, const void *image) {
    CHECK;
    /* Only what the library below has made. */
    if (strncmp(image, ".version", 8) != 0) return 218;
    *out = &held;
    return 0;
}
EXPORT result cuModuleGetFunction(void **out, void *module, const char *name) { (void)module, (void)name; *out = &held; return 0; }
EXPORT result cuFuncSetAttribute(void *function, int attribute, int value) { (void)function, (void)attribute, (void)value; return 0; }
EXPORT result cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                             unsigned shared, void *stream, void **arguments, void **extra) {
    (void)function, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)arguments, (void)extra;
    CHECK;
    return 0;
}
EXPORT result cuGetErrorName(int code, const char **out) { (void)code; *out = "CUDA_ERROR"; return 0; }
EXPORT result cuGetErrorString(int code, const char **out) { (void)code; *out = "a failure that was asked for"; return 0; }

EXPORT result nvrtcVersion(int *major, int *minor) {
    long long version = setting("FAKE_NVRTC_VERSION", 12080);
    *major = version / 1000;
    *minor = version % 1000 / 10;
    return 0;
}
EXPORT result nvrtcCreateProgram(void **out, const char *source, const char *name, int headers, const char **texts, const char **names) {
    (void)name, (void)headers, (void)texts, (void)names;
    *out = strdup(source);
    return 0;
}
EXPORT result nvrtcCompileProgram(void *program, int n, const char **options) {
    (void)n, (void)options;
    CHECK;
    const char *log = getenv("FAKE_CUDA_LOG");
    FILE *file = log ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%zu\n", strlen(program));
        fclose(file);
    }
    return 0;
}
static const char PTX[] = ".version 8.7\n";
EXPORT result nvrtcGetPTXSize(void *program, size_t *out) { (void)program; *out = sizeof PTX; return 0; }
EXPORT result nvrtcGetPTX(void *program, char *out) { (void)program; memcpy(out, PTX, sizeof PTX); return 0; }
static const char WORDS[] = "a mistake that was asked for";
EXPORT result nvrtcGetProgramLogSize(void *program, size_t *out) { (void)program; *out = sizeof WORDS; return 0; }
EXPORT result nvrtcGetProgramLog(void *program, char *out) { (void)program; memcpy(out, WORDS, sizeof WORDS); return 0; }
EXPORT result nvrtcDestroyProgram(void **program) { free(*program); *program = NULL; return 0; }
EXPORT const char *nvrtcGetErrorString(int code) { (void)code; return "a failure that was asked for"; }
