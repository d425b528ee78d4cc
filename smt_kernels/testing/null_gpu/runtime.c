/* The CUDA runtime, driver, compiler and cuBLAS of one GPU that computes nothing, as PyTorch for CUDA 13 and Triton call them.

   Its memory is the host's, and copies and fills are done; kernels, products and graphs are counted and checked, not run. What a
   GPU refuses of the host is refused: launches beyond its limits, and in a capture whatever waits for it. A function that is not
   below does nothing and succeeds (exports.c, made by __init__.py). */

#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL /* names as they are exported, not as macros change them */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* What the host has asked for, as null_gpu_counts tells it. */
static struct { long kernels, triton, products, graphs, captured, to_device, to_host, waits; } counts;

void null_gpu_counts(long *out) { memcpy(out, &counts, sizeof counts); }

static cudaError_t last_error;

static cudaError_t refuse(cudaError_t error, const char *why) {
    fprintf(stderr, "null GPU: %s\n", why);
    return last_error = error;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return "an error of the null GPU"; }
const char *cudaGetErrorString(cudaError_t error) { return "refused by the null GPU, which says why on stderr"; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = cudaGetErrorString(error), CUDA_SUCCESS; }

/* ---- The device: its capability, shared memory and threads as ``environment`` in __init__.py gives them. */

static int capability, most_shared, most_threads, visible;

__attribute__((constructor)) static void begin(void) {
    const char *device = getenv("NULL_GPU"), *devices = getenv("CUDA_VISIBLE_DEVICES");
    if (!device || sscanf(device, "%d,%d,%d", &capability, &most_shared, &most_threads) != 3) {
        fprintf(stderr, "null GPU: not begun by python -m smt_kernels.testing.null_gpu\n");
        _exit(2);
    }
    visible = !devices || *devices == '0'; /* the first, or none */
}

static int attribute(int which) {
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor: return capability / 10;
        case cudaDevAttrComputeCapabilityMinor: return capability % 10;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 0x7fffffff;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return most_threads;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return most_shared;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return most_shared + 1024;
        case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: return 1000000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        case cudaDevAttrL2CacheSize: return 50 << 20;
        case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: return 1;
        default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { return *value = attribute(which), 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { return *value = attribute(which), 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
    memset(of, 0, sizeof *of);
    snprintf(of->name, sizeof of->name, "null GPU of capability %d.%d", capability / 10, capability % 10);
    of->major = capability / 10, of->minor = capability % 10;
    of->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount), of->warpSize = 32;
    of->maxThreadsPerBlock = 1024, of->maxThreadsPerMultiProcessor = most_threads;
    of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024, of->maxThreadsDim[2] = 64;
    of->maxGridSize[0] = 0x7fffffff, of->maxGridSize[1] = of->maxGridSize[2] = 65535, of->maxBlocksPerMultiProcessor = 32;
    of->regsPerBlock = of->regsPerMultiprocessor = 65536;
    of->sharedMemPerBlock = 49152, of->sharedMemPerBlockOptin = most_shared, of->sharedMemPerMultiprocessor = most_shared + 1024;
    of->totalGlobalMem = 80ul << 30, of->l2CacheSize = 50 << 20, of->memoryBusWidth = 5120, of->unifiedAddressing = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = visible, visible ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { return *can = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = visible, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)&capability, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { return *flags = 0, *active = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&capability, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *symbol, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *found) {
    CUresult error = cuGetProcAddress(symbol, function, version, flags);
    if (found) *found = error ? CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND : CU_GET_PROC_ADDRESS_SUCCESS;
    return error;
}
CUresult cuGetExportTable(const void **table, const CUuuid *which) { /* of what only NVIDIA's libraries know, its profiler for one */
    return *table = NULL, CUDA_ERROR_NOT_SUPPORTED;
}

/* ---- Streams, events and captures. A stream joins a capture by waiting for an event of it. */

typedef struct { long capture; } Stream; /* the last one that it was part of */
typedef struct { long capture; double time; } Event;
typedef struct { size_t nodes; } Graph;

static Stream legacy, per_thread;
static Graph *recorded; /* by the capture that is under way */
static long last_capture, capturing; /* the one that is under way; 0: none is */
static enum cudaStreamCaptureMode mode;
static __thread enum cudaStreamCaptureMode mode_of_thread;

static Stream *stream_of(cudaStream_t stream) {
    return !stream || stream == cudaStreamLegacy ? &legacy : stream == cudaStreamPerThread ? &per_thread : (Stream *)stream;
}

static int recording(const Stream *stream) { return capturing && stream->capture == capturing; }
static int recorded_by(const Event *event) { return capturing && event->capture == capturing; }

static int waits_are_refused(void) {
    return capturing && mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
}

/* Something is put into a stream: at once, or into the graph that it records. */
static cudaError_t put(Stream *stream, const char *what) {
    if (recording(stream)) return recorded->nodes++, counts.captured++, cudaSuccess;
    if (stream == &legacy && waits_are_refused()) {
        fprintf(stderr, "null GPU: %s: ", what);
        return refuse(cudaErrorStreamCaptureImplicit, "work on the default stream while another is recorded");
    }
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return *stream = calloc(1, sizeof(Stream)), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return free(stream), cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    counts.waits++;
    if (!recording(stream_of(stream)) && !waits_are_refused()) return cudaSuccess;
    return refuse(cudaErrorStreamCaptureUnsupported, "a wait for a stream in a capture");
}
cudaError_t cudaDeviceSynchronize(void) {
    counts.waits++;
    return capturing ? refuse(cudaErrorStreamCaptureUnsupported, "a wait for the device in a capture") : cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (!recording(stream_of(stream))) return cudaSuccess;
    return refuse(cudaErrorStreamCaptureUnsupported, "a stream is asked in a capture whether it is done");
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return *event = calloc(1, sizeof(Event)), cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(Event *)event = (Event){stream_of(stream)->capture, now.tv_sec * 1e3 + now.tv_nsec * 1e-6};
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (!recorded_by((Event *)event)) return cudaSuccess;
    return refuse(cudaErrorCapturedEvent, "an event of a capture is asked whether it is over");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return counts.waits++, cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { /* the host's, and never 0 */
    double passed = ((Event *)end)->time - ((Event *)start)->time;
    return *milliseconds = passed > 1e-3 ? passed : 1e-3, cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    if (recorded_by((Event *)event)) stream_of(stream)->capture = capturing;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode asked) {
    if (stream_of(stream) == &legacy) return refuse(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
    if (capturing) return refuse(cudaErrorStreamCaptureUnsupported, "a second capture at once");
    stream_of(stream)->capture = capturing = ++last_capture;
    recorded = calloc(1, sizeof(Graph)), mode = asked;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!recording(stream_of(stream))) return refuse(cudaErrorStreamCaptureInvalidated, "the end of a capture that has not begun");
    capturing = 0; /* and with it every stream that had joined */
    return *graph = (cudaGraph_t)recorded, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = recording(stream_of(stream)) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **before, const cudaGraphEdgeData **edges, size_t *n_before) {
    cudaStreamIsCapturing(stream, status);
    if (id) *id = capturing;
    if (graph) *graph = (cudaGraph_t)recorded;
    if (before) *before = NULL;
    if (n_before) *n_before = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *asked) {
    enum cudaStreamCaptureMode before = mode_of_thread;
    mode_of_thread = *asked, *asked = before;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return *made = (cudaGraphExec_t)graph, cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { return *n = ((Graph *)graph)->nodes, cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    return counts.graphs++, put(stream_of(stream), "a graph");
}

/* ---- Memory: two ranges of addresses, taken in turn, so that an address tells what it is. */

typedef struct { char *base, *top; } Range;

#define RANGE (1ul << 40)
static Range of_device, of_host; /* the latter is page-locked */
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

static int within(const Range *range, const void *address) { return range->base && (size_t)((char *)address - range->base) < RANGE; }

static cudaError_t take(Range *range, void **address, size_t bytes) {
    pthread_mutex_lock(&one_at_a_time);
    if (!range->base) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        range->base = range->top = mmap(NULL, RANGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    }
    size_t taken = (bytes + 2 * 4096 - 1) / 4096 * 4096; /* its size stands in front of it, in a page of its own */
    if (range->base == MAP_FAILED || range->top + taken + 4096 > range->base + RANGE) {
        pthread_mutex_unlock(&one_at_a_time);
        return refuse(cudaErrorMemoryAllocation, "no addresses are left");
    }
    *(size_t *)range->top = taken;
    *address = range->top + 4096, range->top += 4096 + taken;
    pthread_mutex_unlock(&one_at_a_time);
    return cudaSuccess;
}

static cudaError_t give_back(void *address) {
    if (address) madvise(address, *(size_t *)((char *)address - 4096), MADV_DONTNEED);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **address, size_t bytes) { return take(&of_device, address, bytes); }
cudaError_t cudaFree(void *address) { return give_back(address); }
cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) { return take(&of_host, address, bytes); }
cudaError_t cudaFreeHost(void *address) { return give_back(address); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return *total = 80ul << 30, *free = 79ul << 30, cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return take(&of_device, address, 1 << 20); }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *address) {
    memset(of, 0, sizeof *of);
    of->type = within(&of_device, address) ? cudaMemoryTypeDevice : within(&of_host, address) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (of->type != cudaMemoryTypeUnregistered) of->devicePointer = (void *)address;
    if (of->type == cudaMemoryTypeHost) of->hostPointer = (void *)address;
    return cudaSuccess;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    int on_device = within(&of_device, (void *)address), on_host = within(&of_host, (void *)address);
    if (!on_device && !on_host) return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
    else *(int *)value = which != CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? 0 : on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    return CUDA_SUCCESS;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, Stream *stream) {
    int to_device = within(&of_device, to), from_device = within(&of_device, from);
    counts.to_device += to_device && !from_device;
    counts.to_host += from_device && !to_device;
    if (recording(stream) && to_device != from_device && !within(&of_host, to_device ? from : to))
        return refuse(cudaErrorStreamCaptureUnsupported, "a copy between the device and pageable memory in a capture");
    cudaError_t error = put(stream, "a copy");
    if (!error && !recording(stream)) memmove(to, from, bytes);
    return error;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes, stream_of(stream));
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    counts.waits++;
    return capturing ? refuse(cudaErrorStreamCaptureUnsupported, "a copy that is waited for in a capture") : copy(to, from, bytes, &legacy);
}
cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    cudaError_t error = put(stream_of(stream), "a fill");
    if (!error && !recording(stream_of(stream))) memset(address, value, bytes);
    return error;
}
cudaError_t cudaMemset(void *address, int value, size_t bytes) { return cudaMemsetAsync(address, value, bytes, NULL); }

/* ---- Kernels: PyTorch's, and by the driver Triton's and what PyTorch compiles. */

static cudaError_t start(const char *name, dim3 grid, dim3 block, size_t shared, Stream *stream) {
    counts.kernels++;
    int grid_fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!grid_fits || !threads || threads > 1024 || shared > (size_t)most_shared) {
        fprintf(stderr, "null GPU: %s: %u x %u x %u programs of %zu threads, %zu bytes of shared memory: ",
                name, grid.x, grid.y, grid.z, threads, shared);
        return refuse(cudaErrorInvalidConfiguration, "a launch beyond the limits");
    }
    return put(stream, name);
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return start("a kernel of PyTorch", grid, block, shared, stream_of(stream));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return start("a kernel of PyTorch", grid, block, shared, stream_of(stream));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) {
    return start("a kernel of PyTorch", how->gridDim, how->blockDim, how->dynamicSmemBytes, stream_of(how->stream));
}
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    return pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    return *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t *)stream = pushed.stream, cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
void **__cudaRegisterFatBinary(void *code) {
    static void *handle;
    return &handle;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *kernel) {
    memset(of, 0, sizeof *of);
    of->numRegs = 32, of->maxThreadsPerBlock = 1024, of->maxDynamicSharedSizeBytes = most_shared;
    of->binaryVersion = of->ptxVersion = capability;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *kernel, int threads, size_t shared, unsigned flags) {
    return *n = 2, cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { return function(data), cudaSuccess; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)malloc(1), CUDA_SUCCESS; }
CUresult cuModuleLoad(CUmodule *module, const char *file) { return cuModuleLoadData(module, file); }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return *function = (CUfunction)strdup(name), CUDA_SUCCESS; /* a function is its name */
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    return which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > most_shared ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction function, int threads, size_t shared) {
    return *n = 2, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
    CUstream stream, void **arguments, void **extra) {
    counts.triton++;
    dim3 grid = {x, y, z}, block = {block_x, block_y, block_z};
    return start((const char *)function, grid, block, shared, stream_of(stream)) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **extra) {
    return cuLaunchKernel(function, how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->blockDimY, how->blockDimZ,
                          how->sharedMemBytes, how->hStream, arguments, extra);
}

/* ---- cuBLAS, whose handles have room for a stream, and NVRTC. Neither header is needed: a call is by registers alone. */

#define HANDLE(name) int name(void **handle) { return *handle = calloc(1, sizeof(void *)), 0; }
HANDLE(cublasCreate_v2) HANDLE(cublasLtCreate) HANDLE(nvrtcCreateProgram)

int cublasSetStream_v2(void **handle, cudaStream_t stream) { return *handle = stream, 0; }
static int product(Stream *stream) { return counts.products++, counts.kernels++, put(stream, "a product"); }
#define PRODUCT(name) int name(void **handle) { return product(stream_of(*handle)); }
PRODUCT(cublasSgemm_v2) PRODUCT(cublasDgemm_v2) PRODUCT(cublasSgemv_v2) PRODUCT(cublasDgemv_v2) PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmBatched) PRODUCT(cublasDgemmBatched) PRODUCT(cublasGemmBatchedEx)

int cublasLtMatmul(void *handle, void *how, void *alpha, void *a, void *of_a, void *b, void *of_b, void *beta, void *c, void *of_c,
                   void *d, void *of_d, void *algorithm, void *workspace, size_t bytes, cudaStream_t stream) {
    return product(stream_of(stream));
}
/* One result, without a workspace: 8 words of an algorithm, its workspace, and a status that is 0. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *how, void *a, void *b, void *c, void *d, void *preference, int asked,
                                   unsigned long *results, int *found) {
    return memset(results, 0, 10 * 8), *found = 1, 0;
}
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
int nvrtcGetLoweredName(void *program, const char *name, const char **lowered) { return *lowered = "compiled by PyTorch", 0; }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { return *bytes = 1, 0; }
int nvrtcGetPTXSize(void *program, size_t *bytes) { return *bytes = 1, 0; }
