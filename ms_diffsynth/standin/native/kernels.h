// How the functions aclnnXGetWorkspaceSize(...), of any signature, are caught without knowing it.
//
// In the calling conventions of x86-64 (System V) and AArch64 (Linux), integers and pointers fill 6 or 8 registers in
// order, floats fill 8 others, and what is left lies on the stack in slots of 8 bytes. A function that names all these
// registers as parameters and has "..." after them can read every argument, by standard C++.
#pragma once
#include <cstdarg>
#include <cstdint>

#if defined(__x86_64__)
#define STANDIN_REGISTERS 6
#define STANDIN_PARAMETERS uint64_t i0, uint64_t i1, uint64_t i2, uint64_t i3, uint64_t i4, uint64_t i5
#define STANDIN_INTEGERS i0, i1, i2, i3, i4, i5
#elif defined(__aarch64__)
#define STANDIN_REGISTERS 8
#define STANDIN_PARAMETERS \
  uint64_t i0, uint64_t i1, uint64_t i2, uint64_t i3, uint64_t i4, uint64_t i5, uint64_t i6, uint64_t i7
#define STANDIN_INTEGERS i0, i1, i2, i3, i4, i5, i6, i7
#else
#error "the stand-in knows the calling conventions of x86-64 and AArch64 only"
#endif
#define STANDIN_FLOAT_PARAMETERS \
  double f0, double f1, double f2, double f3, double f4, double f5, double f6, double f7
#define STANDIN_FLOATS f0, f1, f2, f3, f4, f5, f6, f7

extern "C" int standin_prepare(const char* name, const uint64_t* integers, const double* floats, va_list stack);
extern "C" int standin_launch(void* executor);

// The two functions of one operator.
#define STANDIN_KERNEL(NAME)                                                                              \
  EXPORT int NAME##GetWorkspaceSize(STANDIN_PARAMETERS, STANDIN_FLOAT_PARAMETERS, ...) {                  \
    uint64_t integers[] = {STANDIN_INTEGERS};                                                             \
    double floats[] = {STANDIN_FLOATS};                                                                   \
    va_list stack;                                                                                        \
    va_start(stack, f7);                                                                                  \
    int result = standin_prepare(#NAME, integers, floats, stack);                                         \
    va_end(stack);                                                                                        \
    return result;                                                                                        \
  }                                                                                                       \
  EXPORT int NAME(void*, uint64_t, void* executor, void*) { return standin_launch(executor); }
