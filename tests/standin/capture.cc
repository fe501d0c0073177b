// Calls an aclnn function as MindSpore does, through a pointer of its real type. Built and run by `test_capture.py`.
#include <cstdint>
#include <cstdio>

#include "kernels.h"
#include "standin.h"

STANDIN_KERNEL(aclnnMany)
STANDIN_KERNEL(aclnnFew)

struct Handle;
extern "C" Handle* aclCreateTensor(const int64_t*, uint64_t, int, const int64_t*, int64_t, int, const int64_t*, uint64_t,
                                   void*);
extern "C" Handle* aclCreateScalar(void*, int);
extern "C" Handle* aclCreateIntArray(const int64_t*, uint64_t);
extern "C" int aclDestroyTensor(Handle*);
extern "C" void standin_install(int (*)(const char*));

using Many = int (*)(Handle*, Handle*, double, Handle*, bool, int64_t, float, const char*, Handle*, int8_t, int64_t, Handle*,
                     Handle*, double, int32_t, Handle*, uint64_t*, void**);
using Few = int (*)(Handle*, uint64_t*, void**);

int show(const char* call) {  // in the place of NumPy
  puts(call);
  return 0;
}

int main() {
  standin_install(show);
  float memory[6] = {};
  int64_t shape[] = {2, 3}, strides[] = {1, 2}, numbers[] = {7, -8};
  float value = 0.5f;
  Handle* t = aclCreateTensor(shape, 2, 0, nullptr, 0, 2, shape, 2, memory);
  Handle* transposed = aclCreateTensor(shape, 2, 27, strides, 0, 2, shape, 2, memory);
  Handle* scalar = aclCreateScalar(&value, 0);
  Handle* array = aclCreateIntArray(numbers, 2);
  uint64_t size = 99;
  void* executor = nullptr;
  int failed = reinterpret_cast<Many>(aclnnManyGetWorkspaceSize)(t, nullptr, 1.25, scalar, true, 2147483647, 2.5f, "BSND",
                                                                 array, -3, INT64_MAX, transposed, nullptr, -4.5, 17, t,
                                                                 &size, &executor);
  if (failed || size != 0 || executor == nullptr) return 1;
  aclDestroyTensor(t);  // the executor keeps it
  if (aclnnMany(nullptr, 0, executor, nullptr)) return 2;
  if (aclnnMany(nullptr, 0, executor, nullptr) == 0) return 3;  // launched, it is gone
  if (reinterpret_cast<Few>(aclnnFewGetWorkspaceSize)(transposed, &size, &executor)) return 4;
  return aclnnFew(nullptr, 0, executor, nullptr) ? 5 : 0;
}

EXPORT int Py_IsInitialized() { return 1; }  // arithmetic.cc asks before it computes
