// Device memory: pages of the host that exist once they are written, so that tens of GiB may be allocated here.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "standin.h"

using standin::kOk;
using standin::record;

namespace {
std::mutex lock;
std::map<void*, size_t> blocks;  // what was mapped, by its beginning
size_t in_use = 0;               // bytes that count against the device's memory

// With kernels that are only recorded, values matter to nobody but the host's own few flags and counters. A larger copy
// would write gigabytes of weights, for nothing.
constexpr size_t kCopiedInShapesOnly = 1 << 20;

constexpr size_t kSmallest = 64;  // an allocation of nothing has an address too

size_t total() { return static_cast<size_t>(standin::device_gib() * (1ull << 30)); }

int map_pages(void** address, size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = pages == MAP_FAILED ? nullptr : pages;
  if (pages == MAP_FAILED) {
    return standin::fail(standin::kOutOfMemory, "the host maps no " + std::to_string(size) + " bytes more");
  }
  std::lock_guard<std::mutex> guard(lock);
  blocks[pages] = size;
  return kOk;
}

void unmap_pages(void* address) {
  std::lock_guard<std::mutex> guard(lock);
  auto block = blocks.find(address);
  if (block == blocks.end()) return;
  munmap(address, block->second);
  blocks.erase(block);
}

int take(size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  if (in_use + size > total()) {
    return standin::fail(standin::kOutOfMemory, "out of device memory: " + std::to_string(size) + " bytes wanted, " +
                         std::to_string(in_use) + " of " + std::to_string(total()) + " in use");
  }
  in_use += size;
  record("\"event\":\"allocate\",\"bytes\":" + std::to_string(size));
  return kOk;
}

void give_back(size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  in_use -= size;
  record("\"event\":\"free\",\"bytes\":" + std::to_string(size));
}

int allocate(void** address, size_t size) {
  size = std::max(size, kSmallest);
  if (int error = take(size)) return error;
  int error = map_pages(address, size);
  if (error) give_back(size);
  return error;
}

// kind: 0 host to host, 1 host to device, 2 device to host, 3 device to device (aclrtMemcpyKind).
int copy(void* to, size_t room, const void* from, size_t size, int kind, const char* asynchronous) {
  static const char* const names[] = {"host to host", "host to device", "device to host", "device to device"};
  record(std::string("\"event\":\"copy\",\"kind\":\"") + (kind >= 0 && kind < 4 ? names[kind] : "unknown") +
         "\",\"bytes\":" + std::to_string(size) + ",\"asynchronous\":" + asynchronous);
  if (size > room) return standin::fail(standin::kInvalidParameter, "a copy is larger than its destination");
  if (size != 0 && !(standin::shapes_only() && size > kCopiedInShapesOnly)) memmove(to, from, size);
  return kOk;
}

int fill(void* to, size_t room, int value, size_t size) {
  record("\"event\":\"fill\",\"bytes\":" + std::to_string(size));
  if (size > room) return standin::fail(standin::kInvalidParameter, "a fill is larger than its destination");
  if (!(standin::shapes_only() && size > kCopiedInShapesOnly)) memset(to, value, size);
  return kOk;
}
}  // namespace

EXPORT int aclrtGetMemInfo(int, size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard<std::mutex> guard(lock);
  *total_bytes = total();
  *free_bytes = total() - in_use;
  return kOk;
}
EXPORT int aclrtMalloc(void** address, size_t size, int) { return allocate(address, size); }
EXPORT int aclrtMallocAlign32(void** address, size_t size, int) { return allocate(address, size); }
EXPORT int aclrtFree(void* address) {
  size_t size = 0;
  {
    std::lock_guard<std::mutex> guard(lock);
    auto block = blocks.find(address);
    if (block != blocks.end()) size = block->second;
  }
  if (size != 0) give_back(size);
  unmap_pages(address);
  return kOk;
}

// Addresses and the memory behind them, taken apart: the addresses are usable at once, the memory is counted.
EXPORT int aclrtReserveMemAddress(void** address, size_t size, size_t, void*, uint64_t) {
  return map_pages(address, std::max(size, kSmallest));
}
EXPORT int aclrtReleaseMemAddress(void* address) { unmap_pages(address); return kOk; }
EXPORT int aclrtMallocPhysical(void** handle, size_t size, const void*, uint64_t) {
  if (int error = take(size)) return error;
  *handle = new size_t(size);
  return kOk;
}
EXPORT int aclrtFreePhysical(void* handle) {
  give_back(*static_cast<size_t*>(handle));
  delete static_cast<size_t*>(handle);
  return kOk;
}
EXPORT int aclrtMapMem(void*, size_t, size_t, void*, uint64_t) { return kOk; }
EXPORT int aclrtUnmapMem(void*) { return kOk; }

EXPORT int aclrtMallocHost(void** address, size_t size) {
  return posix_memalign(address, kSmallest, std::max(size, kSmallest));
}
EXPORT int aclrtFreeHost(void* address) { free(address); return kOk; }

EXPORT int aclrtMemcpy(void* to, size_t room, const void* from, size_t size, int kind) {
  return copy(to, room, from, size, kind, "false");
}
EXPORT int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, int kind, void*) {
  return copy(to, room, from, size, kind, "true");
}
EXPORT int aclrtMemset(void* to, size_t room, int value, size_t size) { return fill(to, room, value, size); }
EXPORT int aclrtMemsetAsync(void* to, size_t room, int value, size_t size, void*) {
  return fill(to, room, value, size);
}
