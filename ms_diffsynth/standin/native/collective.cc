// HCCL with one rank: a collective copies what it was given. Several ranks are refused: they need a way between
// processes.
#include <cstdio>
#include <cstring>

#include "standin.h"

using standin::kOk;
using standin::record;

namespace {
constexpr size_t kRootInfoBytes = 4108;  // what HcclRootInfo holds, by HCCL's reference

struct Communicator {
  char name[128];
};

size_t bytes_of(int dtype) {  // HcclDataType
  static const size_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
  return dtype >= 0 && dtype < 12 ? sizes[dtype] : 0;
}

int make(uint32_t ranks, void** made) {
  if (ranks != 1) {
    return standin::fail(standin::kFailure, "HCCL of the stand-in has one rank, not " + std::to_string(ranks) +
                         ": run on one device");
  }
  static int count = 0;
  auto* communicator = new Communicator;
  snprintf(communicator->name, sizeof communicator->name, "standin_%d", count++);
  *made = communicator;
  return kOk;
}

int collective(const char* name, void* from, void* to, uint64_t count, int dtype) {
  size_t size = count * bytes_of(dtype);
  record(std::string("\"event\":\"collective\",\"name\":\"") + name + "\",\"bytes\":" + std::to_string(size));
  if (size == 0 && count != 0) return standin::fail(standin::kInvalidParameter, std::string(name) + ": unknown dtype");
  if (to != from && !standin::shapes_only()) memmove(to, from, size);
  return kOk;
}
}  // namespace

EXPORT int HcclGetRootInfo(void* info) { memset(info, 0, kRootInfoBytes); return kOk; }
EXPORT int HcclCommInitRootInfo(uint32_t ranks, const void*, uint32_t, void** made) { return make(ranks, made); }
EXPORT int HcclCommInitRootInfoConfig(uint32_t ranks, const void*, uint32_t, const void*, void** made) {
  return make(ranks, made);
}
EXPORT int HcclCommInitClusterInfo(const char*, uint32_t, void** made) { return make(1, made); }
EXPORT int HcclCommInitClusterInfoConfig(const char*, uint32_t, void*, void** made) { return make(1, made); }
EXPORT int HcclCreateSubCommConfig(void**, uint32_t ranks, uint32_t*, uint64_t, uint32_t, void*, void** made) {
  return make(ranks, made);
}
EXPORT int HcclCommDestroy(void* communicator) { delete static_cast<Communicator*>(communicator); return kOk; }
EXPORT int HcclGetRankSize(void*, uint32_t* ranks) { *ranks = 1; return kOk; }
EXPORT int HcclGetRankId(void*, uint32_t* rank) { *rank = 0; return kOk; }
EXPORT int HcclGetCommName(void* communicator, char* name) {
  strcpy(name, static_cast<Communicator*>(communicator)->name);
  return kOk;
}
EXPORT int HcclBarrier(void*, void*) { return kOk; }
EXPORT int HcclAllReduce(void* from, void* to, uint64_t count, int dtype, int, void*, void*) {
  return collective("AllReduce", from, to, count, dtype);
}
EXPORT int HcclReduce(void* from, void* to, uint64_t count, int dtype, int, uint32_t, void*, void*) {
  return collective("Reduce", from, to, count, dtype);
}
EXPORT int HcclBroadcast(void* data, uint64_t count, int dtype, uint32_t, void*, void*) {
  return collective("Broadcast", data, data, count, dtype);
}
EXPORT int HcclAllGather(void* from, void* to, uint64_t count, int dtype, void*, void*) {
  return collective("AllGather", from, to, count, dtype);
}
EXPORT int HcclReduceScatter(void* from, void* to, uint64_t count, int dtype, int, void*, void*) {
  return collective("ReduceScatter", from, to, count, dtype);
}
