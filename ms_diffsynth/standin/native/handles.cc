// Makes and destroys the objects of aclnn (libnnopbase), and knows which addresses are objects.
#include "handles.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "standin.h"

namespace standin {

namespace {
struct Dtype {
  const char* name;
  size_t size;
};
// aclDataType of AscendCL's reference. Left out is what an Atlas A2 has not: 8 and 4 bit floats, and packed integers.
const Dtype kDtypes[] = {{"float32", 4}, {"float16", 2}, {"int8", 1}, {"int32", 4}, {"uint8", 1}, {nullptr, 0},
                         {"int16", 2}, {"uint16", 2}, {"uint32", 4}, {"int64", 8}, {"uint64", 8}, {"float64", 8},
                         {"bool", 1}, {"string", 0}, {nullptr, 0}, {nullptr, 0}, {"complex64", 8}, {"complex128", 16},
                         {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0},
                         {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {"bfloat16", 2}};
constexpr int kDtypeCount = sizeof kDtypes / sizeof kDtypes[0];

std::mutex lock;
std::unordered_map<uint64_t, std::shared_ptr<Handle>> live;

Handle* keep(std::shared_ptr<Handle> handle) {
  std::lock_guard<std::mutex> guard(lock);
  Handle* address = handle.get();
  live[reinterpret_cast<uint64_t>(address)] = std::move(handle);
  return address;
}

int destroy(const Handle* handle) {  // an executor that still needs it holds it too
  std::lock_guard<std::mutex> guard(lock);
  live.erase(reinterpret_cast<uint64_t>(handle));
  return kOk;
}

template <typename T>
T read(const void* value) {
  T result;
  memcpy(&result, value, sizeof result);
  return result;
}

std::string real(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char text[40];
  snprintf(text, sizeof text, "%.17g", value);
  return text;
}

double from_half(uint16_t bits) {
  int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double value = exponent == 0    ? std::ldexp(fraction, -24)
                 : exponent == 31 ? (fraction ? NAN : INFINITY)
                                  : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -value : value;
}

std::string scalar_json(const void* value, int dtype) {
  switch (dtype) {
    case 0: return real(read<float>(value));
    case 1: return real(from_half(read<uint16_t>(value)));
    case 2: return std::to_string(read<int8_t>(value));
    case 3: return std::to_string(read<int32_t>(value));
    case 4: return std::to_string(read<uint8_t>(value));
    case 6: return std::to_string(read<int16_t>(value));
    case 7: return std::to_string(read<uint16_t>(value));
    case 8: return std::to_string(read<uint32_t>(value));
    case 9: return std::to_string(read<int64_t>(value));
    case 10: return std::to_string(read<uint64_t>(value));
    case 11: return real(read<double>(value));
    case 12: return read<uint8_t>(value) ? "true" : "false";
    case 27: {
      uint32_t bits = static_cast<uint32_t>(read<uint16_t>(value)) << 16;
      return real(read<float>(&bits));
    }
    default: return "null";
  }
}
}  // namespace

const char* dtype_name(int dtype) { return dtype >= 0 && dtype < kDtypeCount ? kDtypes[dtype].name : nullptr; }
size_t dtype_size(int dtype) { return dtype >= 0 && dtype < kDtypeCount ? kDtypes[dtype].size : 0; }

std::shared_ptr<Handle> find_handle(uint64_t address) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = live.find(address);
  return found == live.end() ? nullptr : found->second;
}

std::string json_list(const std::vector<int64_t>& numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i ? "," : "") + std::to_string(numbers[i]);
  return text + "]";
}

std::vector<int64_t> packed_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  return strides;
}

std::string tensor_json(int dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                        int64_t offset, int format, const void* address, bool addresses) {
  const char* name = dtype_name(dtype);
  std::string text = "{\"dtype\":\"" + (name ? std::string(name) : "dtype " + std::to_string(dtype)) +
                     "\",\"shape\":" + json_list(shape);
  std::vector<int64_t> packed = packed_strides(shape);
  bool contiguous = offset == 0;
  for (size_t i = 0; i < shape.size(); ++i) contiguous = contiguous && (shape[i] == 1 || strides[i] == packed[i]);
  if (!contiguous) text += ",\"strides\":" + json_list(strides) + ",\"offset\":" + std::to_string(offset);
  if (format != 2) text += ",\"format\":" + std::to_string(format);
  if (addresses) text += ",\"address\":" + std::to_string(reinterpret_cast<uint64_t>(address));
  return text + "}";
}

std::string Handle::json(bool addresses) const {
  switch (kind) {
    case kTensor: return tensor_json(dtype, numbers, strides, offset, format, address, addresses);
    case kScalar: {
      const char* name = dtype_name(dtype);
      return "{\"scalar\":" + value + ",\"dtype\":\"" + (name ? name : "unknown") + "\"}";
    }
    case kNumbers: return json_list(numbers);
    case kFloats: {
      std::string text = "[";
      for (size_t i = 0; i < floats.size(); ++i) text += (i ? "," : "") + real(floats[i]);
      return text + "]";
    }
    case kList: {
      std::string text = "{\"list\":[";
      for (size_t i = 0; i < members.size(); ++i) {
        text += (i ? "," : "") + (members[i] ? members[i]->json(addresses) : "null");
      }
      return text + "]}";
    }
  }
  return "null";
}

}  // namespace standin

using standin::Handle;

namespace {
std::shared_ptr<Handle> make(Handle::Kind kind) {
  auto handle = std::make_shared<Handle>();
  handle->kind = kind;
  return handle;
}

Handle* make_list(Handle* const* members, uint64_t count) {
  auto list = make(Handle::kList);
  for (uint64_t i = 0; i < count; ++i) {
    list->members.push_back(standin::find_handle(reinterpret_cast<uint64_t>(members[i])));
  }
  return standin::keep(list);
}
}  // namespace

// The shape of what is stored is not kept: the arithmetic needs only the view.
EXPORT Handle* aclCreateTensor(const int64_t* shape, uint64_t rank, int dtype, const int64_t* strides, int64_t offset,
                               int format, const int64_t*, uint64_t, void* address) {
  auto tensor = make(Handle::kTensor);
  tensor->dtype = dtype;
  tensor->numbers.assign(shape, shape + rank);
  tensor->strides = strides ? std::vector<int64_t>(strides, strides + rank) : standin::packed_strides(tensor->numbers);
  tensor->offset = offset;
  tensor->format = format;
  tensor->address = static_cast<char*>(address);
  return standin::keep(tensor);
}
EXPORT Handle* aclCreateScalar(void* value, int dtype) {
  auto scalar = make(Handle::kScalar);
  scalar->dtype = dtype;
  scalar->value = standin::scalar_json(value, dtype);
  return standin::keep(scalar);
}
EXPORT Handle* aclCreateIntArray(const int64_t* values, uint64_t count) {
  auto array = make(Handle::kNumbers);
  array->numbers.assign(values, values + count);
  return standin::keep(array);
}
EXPORT Handle* aclCreateBoolArray(const uint8_t* values, uint64_t count) {
  auto array = make(Handle::kNumbers);
  array->numbers.assign(values, values + count);
  return standin::keep(array);
}
EXPORT Handle* aclCreateFloatArray(const float* values, uint64_t count) {
  auto array = make(Handle::kFloats);
  array->floats.assign(values, values + count);
  return standin::keep(array);
}
EXPORT Handle* aclCreateTensorList(Handle* const* members, uint64_t count) { return make_list(members, count); }
EXPORT Handle* aclCreateScalarList(Handle* const* members, uint64_t count) { return make_list(members, count); }

EXPORT int aclDestroyTensor(const Handle* handle) { return standin::destroy(handle); }
EXPORT int aclDestroyScalar(const Handle* handle) { return standin::destroy(handle); }
EXPORT int aclDestroyIntArray(const Handle* handle) { return standin::destroy(handle); }
EXPORT int aclDestroyBoolArray(const Handle* handle) { return standin::destroy(handle); }
EXPORT int aclDestroyFloatArray(const Handle* handle) { return standin::destroy(handle); }
EXPORT int aclDestroyTensorList(const Handle* handle) { return standin::destroy(handle); }
EXPORT int aclDestroyScalarList(const Handle* handle) { return standin::destroy(handle); }

EXPORT int aclGetViewShape(const Handle* tensor, int64_t** shape, uint64_t* rank) {  // the caller deletes the shape
  *rank = tensor->numbers.size();
  *shape = new int64_t[tensor->numbers.size() + 1];
  for (size_t i = 0; i < tensor->numbers.size(); ++i) (*shape)[i] = tensor->numbers[i];
  return standin::kOk;
}
EXPORT size_t aclDataTypeSize(int dtype) { return standin::dtype_size(dtype); }
