// The device, its contexts, streams and events. Everything is done at once, in the thread that asks for it: a stream is
// a name, an event a point of time, and a synchronisation only a line of the log.
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "standin.h"

using standin::kOk;
using standin::record;

namespace {
constexpr char kChip[] = "Ascend910B2";  // an Atlas A2 training card
constexpr int64_t kMatrixCores = 24, kVectorCores = 48;
constexpr int kHostAndDevice = 1;  // ACL_HOST: the program runs on the host

int32_t device = 0;
char context[64];
thread_local void* current_context = nullptr;

int synchronise(const char* what) {
  record(std::string("\"event\":\"synchronise\",\"what\":\"") + what + "\"");
  return kOk;
}

struct Event {
  double milliseconds;
};

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

void start() {
  static bool started = false;
  if (started) return;
  started = true;
  fprintf(stderr,
          "ms_diffsynth.standin: device Ascend is a stand-in on the CPU (%s), for tests and planning, not for "
          "training\n", standin::shapes_only() ? "kernels are recorded, not computed" : "NumPy");
}
}  // namespace

EXPORT int aclInit(const char*) { start(); return kOk; }
EXPORT int aclFinalize() { return kOk; }
EXPORT int aclrtGetDeviceCount(uint32_t* count) { *count = 8; return kOk; }
EXPORT int aclrtSetDevice(int32_t id) { start(); device = id; return kOk; }
EXPORT int aclrtResetDevice(int32_t) { return kOk; }
EXPORT int aclrtGetDevice(int32_t* id) { *id = device; return kOk; }
EXPORT int aclrtGetRunMode(int* mode) { *mode = kHostAndDevice; return kOk; }
EXPORT const char* aclrtGetSocName() { return kChip; }
EXPORT int rtGetSocVersion(char* name, uint32_t size) { snprintf(name, size, "%s", kChip); return kOk; }
EXPORT int rtGetDeviceInfo(uint32_t, int32_t, int32_t, int64_t* value) { *value = kMatrixCores; return kOk; }
EXPORT int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) { *can = 1; return kOk; }
EXPORT int aclrtDeviceGetBareTgid(int32_t* process) { *process = getpid(); return kOk; }
EXPORT int aclsysGetCANNVersion(int, void*) { return 1; }  // no version to tell

// Limits of cores: type 0 counts matrix (cube) cores, the other vector cores.
EXPORT int aclrtGetDeviceResLimit(int, int type, uint32_t* n) { *n = type ? kVectorCores : kMatrixCores; return kOk; }
EXPORT int aclrtGetStreamResLimit(void*, int type, uint32_t* n) { return aclrtGetDeviceResLimit(0, type, n); }
EXPORT int aclrtGetResInCurrentThread(int type, uint32_t* n) { return aclrtGetDeviceResLimit(0, type, n); }

EXPORT int aclrtCreateContext(void** made, int32_t) { *made = current_context = context; return kOk; }
EXPORT int aclrtGetCurrentContext(void** now_in) { *now_in = current_context ? current_context : context; return kOk; }
EXPORT int aclrtSetCurrentContext(void* wanted) { current_context = wanted; return kOk; }
EXPORT int aclrtDestroyContext(void*) { return kOk; }

EXPORT int aclrtCreateStream(void** stream) { *stream = calloc(1, 64); return kOk; }
EXPORT int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }
EXPORT int aclrtDestroyStream(void*) { return kOk; }  // kept: 64 bytes, and work may still name it
EXPORT int aclrtDestroyStreamForce(void*) { return kOk; }
EXPORT int aclrtStreamQuery(void*, int* status) { *status = 0; return kOk; }  // complete
EXPORT int aclrtDeviceGetStreamPriorityRange(int32_t* least, int32_t* greatest) {
  *least = 7, *greatest = 0;
  return kOk;
}

EXPORT int aclrtSynchronizeStream(void*) { return synchronise("stream"); }
EXPORT int aclrtSynchronizeStreamWithTimeout(void*, int32_t) { return synchronise("stream"); }
EXPORT int aclrtSynchronizeDevice() { return synchronise("device"); }
EXPORT int aclrtSynchronizeDeviceWithTimeout(int32_t) { return synchronise("device"); }
EXPORT int aclrtSynchronizeEvent(void*) { return synchronise("event"); }
EXPORT int aclrtSynchronizeEventWithTimeout(void*, int32_t) { return synchronise("event"); }

EXPORT int aclrtCreateEvent(void** event) { *event = calloc(1, sizeof(Event)); return kOk; }
EXPORT int aclrtCreateEventWithFlag(void** event, uint32_t) { return aclrtCreateEvent(event); }
EXPORT int aclrtCreateEventExWithFlag(void** event, uint32_t) { return aclrtCreateEvent(event); }
EXPORT int aclrtDestroyEvent(void* event) { free(event); return kOk; }
EXPORT int aclrtRecordEvent(void* event, void*) {
  if (event != nullptr) static_cast<Event*>(event)->milliseconds = now();
  return kOk;
}
EXPORT int aclrtResetEvent(void*, void*) { return kOk; }
EXPORT int aclrtStreamWaitEvent(void*, void*) { return kOk; }
EXPORT int aclrtQueryEventStatus(void*, int* status) { *status = 1; return kOk; }  // recorded and complete
EXPORT int aclrtQueryEvent(void*, int* status) { *status = 0; return kOk; }        // complete (older function)
EXPORT int aclrtEventElapsedTime(float* milliseconds, void* begin, void* end) {
  *milliseconds = static_cast<float>(static_cast<Event*>(end)->milliseconds - static_cast<Event*>(begin)->milliseconds);
  return kOk;
}
EXPORT int aclrtEventGetTimestamp(void* event, uint64_t* microseconds) {
  *microseconds = static_cast<uint64_t>(static_cast<Event*>(event)->milliseconds * 1e3);
  return kOk;
}

// Host functions that a stream calls: at once. The thread that waits for reports never gets one.
EXPORT int aclrtLaunchCallback(void (*function)(void*), void* data, int, void*) { function(data); return kOk; }
EXPORT int aclrtSubscribeReport(uint64_t, void*) { return kOk; }
EXPORT int aclrtProcessReport(int32_t milliseconds) {
  usleep(milliseconds > 0 && milliseconds < 100 ? milliseconds * 1000 : 100000);
  return kOk;
}

// Descriptions that are made, filled by functions without effect, and handed back.
EXPORT void* aclrtAllocatorCreateDesc() { return calloc(1, 64); }
EXPORT void* aclmdlCreateExecConfigHandle() { return calloc(1, 64); }
