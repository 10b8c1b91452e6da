// The part of CUDA's driver API that Triton's launchers call. Nothing is executed; launches are counted by kernel.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KERNELS 4096

static char names[KERNELS][256];
static int counts[KERNELS], kernels;

int dry_kernels(void) { return kernels; }
const char *dry_name(int kernel) { return names[kernel]; }
int dry_count(int kernel) { return counts[kernel]; }
void dry_reset(void) { memset(counts, 0, sizeof counts); }

int cuInit(unsigned flags) { return 100; }  // no device: PyTorch must not find one
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error"; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {  // of an H100
    case 10: *value = 32; break;       // threads of a warp
    case 12: *value = 65536; break;    // registers of a block
    case 13: *value = 1980000; break;  // clock in kHz
    case 16: *value = 132; break;      // multiprocessors
    case 36: *value = 2619000; break;  // memory clock in kHz
    case 37: *value = 5120; break;     // memory bus in bits
    case 81: *value = 233472; break;   // shared memory of a multiprocessor
    case 97: *value = 232448; break;   // shared memory of a block, opted in
    default: *value = 0;
    }
    return 0;
}

static int context = 1;
int cuCtxGetCurrent(void **current) { *current = &context; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetCurrent(void *current) { return 0; }
int cuDevicePrimaryCtxRetain(void **retained, int device) { *retained = &context; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }

int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    if (kernels == KERNELS) return 2;  // out of memory
    strncpy(names[kernels], name, sizeof names[0] - 1);
    *function = (void *)(uintptr_t)++kernels;
    return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads of a block, registers of a thread
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) { *clusters = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }

int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
    *(uint64_t *)value = pointer;
    return 0;
}

int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    counts[(int)(uintptr_t)function - 1]++;
    return 0;
}
