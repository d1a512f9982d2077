/* A stand-in for Huawei's CANN on which torch_npu starts: device memory is host memory, and streams and events are always
   finished. It has no kernels: every launch fails, so that an operator that nothing emulates raises an error.

   build.py appends a function that returns 0 for each symbol that torch_npu needs and that is not here. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define NO_KERNEL 507899 /* ACL_ERROR_RT_INTERNAL_ERROR */
#define GIB ((size_t)1 << 30)

static int current;
static char handle[64][8]; /* Something to point to, for each device; nobody reads it. */

static int allocate(void **memory, size_t bytes) { return posix_memalign(memory, 512, bytes ? bytes : 512); }
static int make(void **made) { return (*made = malloc(8)) ? SUCCESS : NO_KERNEL; }
static int finished(int *status) { *status = 1; return SUCCESS; }
static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

/* Devices */
int aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)atoi(setting("MOEPORT_FAKE_NPUS", "2")); return SUCCESS; }
const char *aclrtGetSocName(void) { return setting("MOEPORT_FAKE_SOC", "Ascend910B2"); }
int aclrtSetDevice(int device) { current = device; return SUCCESS; }
int aclrtGetDevice(int *device) { *device = current; return SUCCESS; }
int aclrtGetCurrentContext(void **context) { *context = handle[current]; return SUCCESS; }
int aclrtSetCurrentContext(void *context) { return SUCCESS; }
int aclrtDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return SUCCESS; }
int aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) { *value = 24; return SUCCESS; }
int aclrtGetMemInfo(int kind, size_t *left, size_t *total) { *left = 60 * GIB; *total = 64 * GIB; return SUCCESS; }

/* Memory */
int aclrtMalloc(void **memory, size_t bytes, int policy) { return allocate(memory, bytes); }
int aclrtMallocAlign32(void **memory, size_t bytes, int policy) { return allocate(memory, bytes); }
int aclrtMallocHost(void **memory, size_t bytes) { return allocate(memory, bytes); }
int aclrtFree(void *memory) { free(memory); return SUCCESS; }
int aclrtFreeHost(void *memory) { free(memory); return SUCCESS; }
int aclrtMemcpy(void *to, size_t most, const void *from, size_t bytes, int kind) {
    memmove(to, from, bytes);
    return SUCCESS;
}
int aclrtMemcpyAsync(void *to, size_t most, const void *from, size_t bytes, int kind, void *stream) {
    return aclrtMemcpy(to, most, from, bytes, kind);
}
int aclrtMemset(void *memory, size_t most, int value, size_t bytes) { memset(memory, value, bytes); return SUCCESS; }
int aclrtMemsetAsync(void *memory, size_t most, int value, size_t bytes, void *stream) {
    return aclrtMemset(memory, most, value, bytes);
}

/* Streams and events */
int aclrtCreateStream(void **stream) { return make(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return make(stream); }
int aclrtDestroyStream(void *stream) { return SUCCESS; }
int aclrtStreamGetId(void *stream, int *id) { *id = 0; return SUCCESS; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return SUCCESS; /* 0: complete */ }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return make(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return make(event); }
int aclrtDestroyEvent(void *event) { free(event); return SUCCESS; }
int aclrtQueryEventStatus(void *event, int *status) { return finished(status); }
int aclrtQueryEventWaitStatus(void *event, int *status) { return finished(status); }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0.1f; return SUCCESS; }

/* Descriptions of tensors and settings of the compiler, which torch_npu makes before it launches anything */
void *aclCreateTensorDesc(void) { return handle; }
void *aclCreateDataBuffer(void) { return handle; }
void *aclopCreateAttr(void) { return handle; }
int aclSetCompileopt(int option, const char *value) { return SUCCESS; }
size_t aclGetCompileoptSize(int option) { return 2; }
int aclGetCompileopt(int option, char *value, size_t bytes) { strncpy(value, "1", bytes); return SUCCESS; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }

/* Launches */
int aclopCompileAndExecute(void) { return NO_KERNEL; }
int aclopCompileAndExecuteV2(void) { return NO_KERNEL; }
int aclrtLaunchKernel(void) { return NO_KERNEL; }
int rtKernelLaunch(void) { return NO_KERNEL; }
const char *aclGetRecentErrMsg(void) { return "the stand-in for CANN has no kernels: this operator is not emulated"; }
