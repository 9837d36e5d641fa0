/* Stands in for CANN so that torch_npu can be imported, and its autograd traced on fake tensors, without an NPU.
   Host memory plays the device, streams and events are dummies, and nothing can be computed: what would, fails.
   With -DSTRICT every call is refused, and nothing but the number of devices is known.
   Compiled under the name of each library that torch_npu wants (wheel.py). */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, OUT_OF_MEMORY = 207001, NO_DEVICE_SET = 107002, NOT_HERE = 507008 };
#define REFUSED(name) int name() { return NOT_HERE; }
#ifdef STRICT
#define DONE REFUSED
#define HANDLE REFUSED
#else
#define DONE(name) int name() { return OK; }
#define HANDLE(name) int name(void **handle) { return new_memory(handle, 64); }
#endif
#ifndef DEVICES
#define DEVICES 8
#endif

static __thread int current_device = -1;

static int new_memory(void **at, size_t bytes) { return posix_memalign(at, 512, bytes ? bytes : 512) ? OUT_OF_MEMORY : OK; }

/* devices */
const char *aclrtGetSocName() { return "Ascend910B1"; }
const char *aclGetRecentErrMsg() { return "there is no CANN here"; }
int aclrtGetDeviceCount(unsigned *count) { *count = DEVICES; return OK; }
DONE(aclInit) DONE(aclFinalize) DONE(aclrtResetDevice) DONE(aclrtSetCurrentContext) DONE(aclrtProcessReport)
DONE(aclmdlFinalizeDump) DONE(aclrtSetDeviceSatMode) DONE(aclrtSetOpExecuteTimeOut) DONE(aclrtSetOpWaitTimeout)
#ifdef STRICT
REFUSED(aclrtSetDevice) REFUSED(aclrtGetDevice) REFUSED(aclrtGetCurrentContext) REFUSED(aclrtDeviceCanAccessPeer)
REFUSED(aclrtGetMemInfo) REFUSED(aclrtMalloc) REFUSED(aclrtMallocAlign32) REFUSED(aclrtMallocHost) REFUSED(aclrtFree)
REFUSED(aclrtFreeHost) REFUSED(aclrtMemset) REFUSED(aclrtMemcpy) REFUSED(aclrtMemcpyAsync)
REFUSED(aclrtQueryEventStatus) REFUSED(aclrtStreamQuery) REFUSED(aclrtGetStreamId) REFUSED(aclrtEventElapsedTime)
REFUSED(aclGetCompileopt) REFUSED(aclrtGetSysParamOpt) REFUSED(aclrtCtxGetSysParamOpt)
#else
int aclrtSetDevice(int device) { current_device = device; return OK; }
int aclrtGetDevice(int *device) { *device = current_device; return current_device < 0 ? NO_DEVICE_SET : OK; }
int aclrtGetCurrentContext(void **context) { *context = &current_device; return OK; }
int aclrtDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return OK; }
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) { *available = *total = (size_t)64 << 30; return OK; }

/* memory */
int aclrtMalloc(void **at, size_t bytes, int policy) { return new_memory(at, bytes); }
int aclrtMallocAlign32(void **at, size_t bytes, int policy) { return new_memory(at, bytes); }
int aclrtMallocHost(void **at, size_t bytes) { return new_memory(at, bytes); }
int aclrtFree(void *at) { free(at); return OK; }
int aclrtFreeHost(void *at) { free(at); return OK; }
int aclrtMemset(void *to, size_t room, int value, size_t bytes) { memset(to, value, bytes); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { memmove(to, from, bytes); return OK; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
  memmove(to, from, bytes);
  return OK;
}

/* questions */
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; } /* 0 is done, of an event it is 1 */
int aclrtGetStreamId(void *stream, int *id) { *id = 0; return OK; }
int aclrtEventElapsedTime(float *ms, void *from, void *to) { *ms = 0; return OK; }
int aclGetCompileopt(int option, char *value, size_t bytes) { strncpy(value, "0", bytes); return OK; }
int aclrtGetSysParamOpt(int option, long *value) { *value = 0; return OK; }
int aclrtCtxGetSysParamOpt(int option, long *value) { *value = 0; return OK; }
#endif
REFUSED(aclrtFreePhysical) REFUSED(aclrtMallocPhysical) REFUSED(aclrtMapMem) REFUSED(aclrtUnmapMem)
REFUSED(aclrtMemExportToShareableHandle) REFUSED(aclrtMemImportFromShareableHandle)
REFUSED(aclrtMemSetPidToShareableHandle) REFUSED(aclrtReleaseMemAddress) REFUSED(aclrtReserveMemAddress)
REFUSED(aclrtDeviceEnablePeerAccess) REFUSED(aclrtDeviceGetBareTgid)

/* streams and events */
HANDLE(aclrtCreateStream) HANDLE(aclrtCreateStreamWithConfig)
HANDLE(aclrtCreateEventWithFlag) HANDLE(aclrtCreateEventExWithFlag)
DONE(aclrtDestroyStream) DONE(aclrtDestroyStreamForce) DONE(aclrtDestroyEvent) DONE(aclrtResetEvent)
DONE(aclrtRecordEvent) DONE(aclrtStreamWaitEvent) DONE(aclrtSynchronizeEvent) DONE(aclrtSynchronizeStream)
DONE(aclrtSynchronizeStreamWithTimeout) DONE(aclrtSynchronizeDevice) DONE(aclrtSynchronizeDeviceWithTimeout)
DONE(aclrtSetStreamFailureMode) DONE(aclrtGetStreamAttribute)

/* settings */
size_t aclGetCompileoptSize(int option) { return 16; }
DONE(aclSetCompileopt) DONE(aclopSetCompileFlag) DONE(aclrtSetSysParamOpt) DONE(aclrtCtxSetSysParamOpt)
/* libatb.so: what libop_plugin_atb.so wants to be loaded with; nothing of it is called */
REFUSED(_ZN3atb13CreateContextEPPNS_7ContextE) REFUSED(_ZN3atb14DestroyContextEPNS_7ContextE)
REFUSED(_ZN3atb16DestroyOperationEPNS_9OperationE) REFUSED(_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE)
#define ATB_OPERATION(length, name) \
  REFUSED(_ZN3atb15CreateOperationINS_5infer##length##name##EEEiRKT_PPNS_9OperationE)
ATB_OPERATION(11, LinearParam) ATB_OPERATION(12, ElewiseParam) ATB_OPERATION(12, RmsNormParam)
ATB_OPERATION(14, GroupTopkParam) ATB_OPERATION(18, SelfAttentionParam) ATB_OPERATION(19, PagedAttentionParam)
ATB_OPERATION(20, ReshapeAndCacheParam) ATB_OPERATION(9, RopeParam)

DONE(aclAppLog) DONE(MsprofRegisterCallback) DONE(MsprofReportAdditionalInfo) DONE(MsprofReportApi)
DONE(MsprofReportCompactInfo)
unsigned long MsprofGetHashId(const char *text, size_t length) { return 0; }
unsigned long MsprofSysCycleTime() { return 0; }

/* operators */
REFUSED(aclCreateDataBuffer) REFUSED(aclCreateTensorDesc) REFUSED(aclDestroyDataBuffer) REFUSED(aclDestroyTensorDesc)
REFUSED(aclGetDeviceCapability) REFUSED(aclGetTensorDescDimV2) REFUSED(aclGetTensorDescFormat)
REFUSED(aclGetTensorDescNumDims) REFUSED(aclGetTensorDescType) REFUSED(aclSetTensorDescName)
REFUSED(aclSetTensorFormat) REFUSED(aclSetTensorPlaceMent) REFUSED(aclSetTensorShape) REFUSED(aclmdlInitDump)
REFUSED(aclmdlSetDump) REFUSED(aclopCompileAndExecute) REFUSED(aclopCreateAttr) REFUSED(aclopDestroyAttr)
REFUSED(aclopSetAttrBool) REFUSED(aclopSetAttrDataType) REFUSED(aclopSetAttrFloat) REFUSED(aclopSetAttrInt)
REFUSED(aclopSetAttrListBool) REFUSED(aclopSetAttrListFloat) REFUSED(aclopSetAttrListInt)
REFUSED(aclopSetAttrListListInt) REFUSED(aclopSetAttrString) REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtBinaryLoadFromData) REFUSED(aclrtGetFunctionAddr) REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister) REFUSED(rtGetC2cCtrlAddr) REFUSED(rtKernelLaunch)
