// The bounded C functions of libc_sec (their names and behaviour are those of ISO C, annex K).
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "standin.h"

using standin::kBoundExceeded;
using standin::kOk;

EXPORT int memcpy_s(void* to, size_t room, const void* from, size_t size) {
  if (size > room) return kBoundExceeded;
  memcpy(to, from, size);
  return kOk;
}
EXPORT int memcpy_sOptAsm(void* to, size_t room, const void* from, size_t size) {
  return memcpy_s(to, room, from, size);
}
EXPORT int memmove_s(void* to, size_t room, const void* from, size_t size) {
  if (size > room) return kBoundExceeded;
  memmove(to, from, size);
  return kOk;
}
EXPORT int memset_s(void* to, size_t room, int value, size_t size) {
  if (size > room) return kBoundExceeded;
  memset(to, value, size);
  return kOk;
}
EXPORT int memset_sOptAsm(void* to, size_t room, int value, size_t size) { return memset_s(to, room, value, size); }
EXPORT int strncpy_s(char* to, size_t room, const char* from, size_t size) {
  size_t length = strnlen(from, size);
  if (length >= room) return kBoundExceeded;
  memcpy(to, from, length);
  to[length] = 0;
  return kOk;
}
EXPORT int strcpy_s(char* to, size_t room, const char* from) { return strncpy_s(to, room, from, strlen(from)); }
EXPORT int vsnprintf_s(char* to, size_t room, size_t size, const char* format, va_list values) {
  return vsnprintf(to, room < size + 1 ? room : size + 1, format, values);
}
EXPORT int snprintf_s(char* to, size_t room, size_t size, const char* format, ...) {
  va_list values;
  va_start(values, format);
  int written = vsnprintf_s(to, room, size, format, values);
  va_end(values);
  return written;
}
EXPORT int sprintf_s(char* to, size_t room, const char* format, ...) {
  va_list values;
  va_start(values, format);
  int written = vsnprintf(to, room, format, values);
  va_end(values);
  return written;
}
