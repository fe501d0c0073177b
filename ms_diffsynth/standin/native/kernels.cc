// aclnn operators. The first function of each makes an executor that remembers the arguments, the second runs it.
#include "kernels.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "handles.h"
#include "standin.h"

namespace standin {

namespace {
constexpr int kMostArguments = 64;

struct Argument {
  std::shared_ptr<Handle> handle;  // or
  std::string text;                // as JSON: a number, or a string in quotes
};

struct Executor {
  std::string name;
  std::vector<Argument> arguments;
  uint64_t floats[8];
  bool repeatable = false;

  std::string json(bool addresses) const {
    std::string line = "\"event\":\"kernel\",\"path\":\"aclnn\",\"name\":\"" + name + "\",\"arguments\":[";
    for (size_t i = 0; i < arguments.size(); ++i) {
      const Argument& a = arguments[i];
      line += (i ? "," : "") + (a.handle ? a.handle->json(addresses) : a.text);
    }
    return line + "]";
  }
};

std::mutex lock;
std::unordered_map<void*, std::shared_ptr<Executor>> live;

std::shared_ptr<Executor> find_executor(void* address) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = live.find(address);
  return found == live.end() ? nullptr : found->second;
}

// A variable of the calling function lies a little above this one's own.
bool is_callers_variable(uint64_t value, uint64_t here) {
  return value % 8 == 0 && value > here && value - here < (1 << 18);
}

// Copies what lies at an address, up to 64 bytes of it, or fewer where the memory ends. A large number may look like an
// address: the kernel is let to look, by a write into a pipe, which refuses what is not there instead of faulting.
size_t read_memory(uint64_t address, char bytes[64]) {
  static std::mutex one_at_a_time;
  static int ends[2] = {-1, -1};
  std::lock_guard<std::mutex> guard(one_at_a_time);
  if (ends[0] < 0 && pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return 0;
  size_t done = 0;
  while (done < 64) {
    size_t in_page = std::min<size_t>(64 - done, 4096 - (address + done) % 4096);
    ssize_t written = write(ends[1], reinterpret_cast<void*>(address + done), in_page);
    if (written <= 0 || read(ends[0], bytes + done, written) != written) break;
    done += written;
  }
  return done;
}

// The text that an argument points to, if it is text.
bool read_text(uint64_t value, std::string* text) {
  if (value < (1ull << 32)) return false;
  char bytes[64];
  size_t size = read_memory(value, bytes);
  for (size_t i = 0; i < size; ++i) {
    if (bytes[i] == 0 && i > 0) {
      text->assign(bytes, i);
      return true;
    }
    if (!isprint(static_cast<unsigned char>(bytes[i]))) return false;
  }
  return false;
}

// The arguments, up to the two at their end: where to put the size of the workspace, and the executor.
bool read_arguments(Executor* executor, const uint64_t* registers, va_list stack, uint64_t** size, void*** made) {
  uint64_t here = reinterpret_cast<uint64_t>(&here), words[kMostArguments];
  for (int i = 0; i < kMostArguments; ++i) {
    words[i] = i < STANDIN_REGISTERS ? registers[i] : va_arg(stack, uint64_t);
    bool pair = i > 0 && is_callers_variable(words[i], here) && is_callers_variable(words[i - 1], here);
    if (pair && find_handle(words[i]) == nullptr && find_handle(words[i - 1]) == nullptr) {
      *size = reinterpret_cast<uint64_t*>(words[i - 1]);
      *made = reinterpret_cast<void**>(words[i]);
      executor->arguments.pop_back();
      return true;
    }
    Argument argument;
    argument.handle = find_handle(words[i]);
    std::string text;
    if (argument.handle == nullptr) {
      argument.text = read_text(words[i], &text) ? quoted(text) : std::to_string(static_cast<int64_t>(words[i]));
    }
    executor->arguments.push_back(argument);
  }
  return false;
}

const Handle* unknown_dtype(const std::vector<Argument>& arguments) {
  for (const Argument& argument : arguments) {
    const Handle* h = argument.handle.get();
    if (h != nullptr && h->kind == Handle::kTensor && dtype_name(h->dtype) == nullptr) return h;
  }
  return nullptr;
}
}  // namespace

}  // namespace standin

using namespace standin;

extern "C" int standin_prepare(const char* name, const uint64_t* integers, const double* floats, va_list stack) {
  auto executor = std::make_shared<Executor>();
  executor->name = name;
  memcpy(executor->floats, floats, sizeof executor->floats);
  uint64_t* size;
  void** made;
  if (!read_arguments(executor.get(), integers, stack, &size, &made)) {
    return fail(kFailure, std::string(name) + ": the end of its arguments was not recognised");
  }
  if (const Handle* odd = unknown_dtype(executor->arguments)) {
    record(std::string("\"event\":\"refused\",\"name\":\"") + name + "\",\"dtype\":" + std::to_string(odd->dtype));
    return kInvalidParameter;
  }
  *size = 0;
  *made = executor.get();
  std::lock_guard<std::mutex> guard(lock);
  live[executor.get()] = executor;
  return kOk;
}

extern "C" int standin_launch(void* address) {
  auto executor = find_executor(address);
  if (executor == nullptr) return fail(kInvalidParameter, "an executor was launched that does not exist any more");
  if (recording()) record(executor->json(false));
  if (!executor->repeatable) {  // launched once, it is gone
    std::lock_guard<std::mutex> guard(lock);
    live.erase(address);
  }
  if (shapes_only()) return kOk;
  std::vector<int64_t> floats(executor->floats, executor->floats + 8);
  return compute("{" + executor->json(true) + ",\"floats\":" + json_list(floats) + "}");
}

EXPORT int aclnnInit(const char*) { return kOk; }
EXPORT int aclnnFinalize() { return kOk; }
EXPORT int aclSetAclOpExecutorRepeatable(void* address) {
  auto executor = find_executor(address);
  if (executor == nullptr) return kInvalidParameter;
  executor->repeatable = true;
  return kOk;
}
EXPORT int aclDestroyAclOpExecutor(void* address) {
  std::lock_guard<std::mutex> guard(lock);
  live.erase(address);
  return kOk;
}

// New addresses for the tensors of a repeatable executor. The tensor itself is given, so its place is not needed.
namespace {
int set_address(Handle* tensor, void* address) {
  if (tensor != nullptr) tensor->address = static_cast<char*>(address);
  return kOk;
}
int set_member_address(size_t member, Handle* list, void* address) {
  if (list != nullptr && member < list->members.size()) set_address(list->members[member].get(), address);
  return kOk;
}
}  // namespace
EXPORT int aclSetTensorAddr(void*, size_t, Handle* tensor, void* to) { return set_address(tensor, to); }
EXPORT int aclSetInputTensorAddr(void*, size_t, Handle* tensor, void* to) { return set_address(tensor, to); }
EXPORT int aclSetOutputTensorAddr(void*, size_t, Handle* tensor, void* to) { return set_address(tensor, to); }
EXPORT int AclSetTensorAddr(void*, size_t, Handle* tensor, void* to) { return set_address(tensor, to); }
EXPORT int AclSetInputTensorAddr(void*, size_t, Handle* tensor, void* to) { return set_address(tensor, to); }
EXPORT int AclSetOutputTensorAddr(void*, size_t, Handle* tensor, void* to) { return set_address(tensor, to); }
EXPORT int aclSetDynamicTensorAddr(void*, size_t, size_t member, Handle* list, void* to) {
  return set_member_address(member, list, to);
}
EXPORT int aclSetDynamicInputTensorAddr(void*, size_t, size_t member, Handle* list, void* to) {
  return set_member_address(member, list, to);
}
EXPORT int aclSetDynamicOutputTensorAddr(void*, size_t, size_t member, Handle* list, void* to) {
  return set_member_address(member, list, to);
}
EXPORT int AclSetDynamicTensorAddr(void*, size_t, size_t member, Handle* list, void* to) {
  return set_member_address(member, list, to);
}

// CANN's own cache of executors: there, and never with a hit, so that MindSpore makes every executor by the functions
// above.
EXPORT int InitHugeMemThreadLocal(void*, uint8_t) { return kOk; }
EXPORT void UnInitHugeMemThreadLocal(void*, uint8_t) {}
EXPORT void ReleaseHugeMem(void*, uint8_t) {}
EXPORT void* PTAGetExecCache(uint64_t, uint64_t*) { return nullptr; }
EXPORT void* PTAFindExecCache(uint8_t*, size_t, uint64_t*) { return nullptr; }
EXPORT uint8_t CanUsePTACache(const char*) { return 0; }
EXPORT void InitPTACacheThreadLocal() {}
EXPORT void UnInitPTACacheThreadLocal() {}
EXPORT void SetPTAHashKey(uint64_t) {}
EXPORT void SetPTACacheHashKey(uint8_t*, size_t) {}
EXPORT void AddTensorAddrToCachedList(void*) {}
EXPORT int IsEnableADumpFunc() { return 0; }
