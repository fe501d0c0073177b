// The older way of running one operator: aclopCompileAndExecute. On a device each new combination of operator, shapes,
// dtypes and attributes is looked up in CANN's binary packages or compiled on the host.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "handles.h"
#include "standin.h"

using namespace standin;

namespace {
struct Description {  // aclTensorDesc
  int dtype;
  int format;
  std::vector<int64_t> shape;
  bool constant = false;  // its value is given on the host
  std::string value;      // the bytes of it
};
struct Buffer {  // aclDataBuffer
  void* address;
  size_t size;
};
struct Attributes {  // aclopAttr, as JSON
  std::string json;
  int add(const char* name, const std::string& value) {
    json += (json.empty() ? "" : ",") + quoted(name) + ":" + value;
    return kOk;
  }
};

std::string number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char text[40];
  snprintf(text, sizeof text, "%.17g", value);
  return text;
}

template <typename Value, typename Text>
std::string list(int count, const Value* values, Text text) {
  std::string result = "[";
  for (int i = 0; i < count; ++i) result += (i ? "," : "") + text(values[i]);
  return result + "]";
}

std::string whole(int64_t value) { return std::to_string(value); }

std::string dtype_text(int dtype) {
  const char* name = dtype_name(dtype);
  return quoted(name ? name : "dtype " + std::to_string(dtype));
}

std::string tensors(int count, const Description* const* descriptions, const Buffer* const* buffers, bool addresses) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    const Description& d = *descriptions[i];
    const void* address = d.constant ? d.value.data() : buffers[i] ? buffers[i]->address : nullptr;
    text += (i ? "," : "") +
            tensor_json(d.dtype, d.shape, packed_strides(d.shape), 0, d.format, address, addresses);
  }
  return text + "]";
}

int run(const char* name, int inputs, const Description* const* in, const Buffer* const* in_data, int outputs,
        const Description* const* out, const Buffer* const* out_data, const Attributes* attributes) {
  for (bool addresses : {false, true}) {
    if (addresses ? shapes_only() : !recording()) continue;
    std::string call = "\"event\":\"kernel\",\"path\":\"aclop\",\"name\":" + quoted(name) +
                       ",\"inputs\":" + tensors(inputs, in, in_data, addresses) +
                       ",\"outputs\":" + tensors(outputs, out, out_data, addresses) + ",\"attributes\":{" +
                       (attributes ? attributes->json : "") + "}";
    if (addresses) return compute("{" + call + "}");
    record(call);
  }
  return kOk;
}
}  // namespace

EXPORT Description* aclCreateTensorDesc(int dtype, int rank, const int64_t* shape, int format) {
  auto* description = new Description;
  description->dtype = dtype;
  description->format = format;
  description->shape.assign(shape, shape + rank);
  return description;
}
EXPORT void aclDestroyTensorDesc(const Description* description) { delete description; }
EXPORT int aclSetTensorFormat(Description*, int) { return kOk; }  // of the stored tensor, which is the plain one here
EXPORT int aclSetTensorShape(Description*, int, const int64_t*) { return kOk; }
EXPORT void aclSetTensorDescName(Description*, const char*) {}
EXPORT int aclSetTensorPlaceMent(Description*, int) { return kOk; }
EXPORT int aclSetTensorConst(Description* description, void* value, size_t size) {
  description->constant = true;
  description->value.assign(static_cast<char*>(value), size);
  return kOk;
}
EXPORT size_t aclGetTensorDescNumDims(const Description* description) { return description->shape.size(); }
EXPORT int64_t aclGetTensorDescDim(const Description* description, size_t i) { return description->shape[i]; }
EXPORT int aclGetTensorDescDimV2(const Description* description, size_t i, int64_t* size) {
  *size = description->shape[i];
  return kOk;
}
EXPORT size_t aclGetTensorDescSize(const Description* description) {
  size_t size = dtype_size(description->dtype);
  for (int64_t n : description->shape) size *= n;
  return size;
}

EXPORT Buffer* aclCreateDataBuffer(void* address, size_t size) { return new Buffer{address, size}; }
EXPORT int aclDestroyDataBuffer(const Buffer* buffer) { delete buffer; return kOk; }
EXPORT int aclUpdateDataBuffer(Buffer* buffer, void* address, size_t size) { *buffer = {address, size}; return kOk; }
EXPORT void* aclGetDataBufferAddr(const Buffer* buffer) { return buffer->address; }

EXPORT Attributes* aclopCreateAttr() { return new Attributes; }
EXPORT void aclopDestroyAttr(const Attributes* attributes) { delete attributes; }
EXPORT int aclopSetAttrBool(Attributes* a, const char* name, uint8_t v) { return a->add(name, v ? "true" : "false"); }
EXPORT int aclopSetAttrInt(Attributes* a, const char* name, int64_t v) { return a->add(name, whole(v)); }
EXPORT int aclopSetAttrFloat(Attributes* a, const char* name, float v) { return a->add(name, number(v)); }
EXPORT int aclopSetAttrString(Attributes* a, const char* name, const char* v) { return a->add(name, quoted(v)); }
EXPORT int aclopSetAttrDataType(Attributes* a, const char* name, int v) { return a->add(name, dtype_text(v)); }
EXPORT int aclopSetAttrListInt(Attributes* a, const char* name, int n, const int64_t* v) {
  return a->add(name, list(n, v, whole));
}
EXPORT int aclopSetAttrListFloat(Attributes* a, const char* name, int n, const float* v) {
  return a->add(name, list(n, v, number));
}
EXPORT int aclopSetAttrListBool(Attributes* a, const char* name, int n, const uint8_t* v) {
  return a->add(name, list(n, v, whole));
}
EXPORT int aclopSetAttrListString(Attributes* a, const char* name, int n, const char** v) {
  return a->add(name, list(n, v, quoted));
}
EXPORT int aclopSetAttrListDataType(Attributes* a, const char* name, int n, const int* v) {
  return a->add(name, list(n, v, dtype_text));
}
EXPORT int aclopSetAttrListListInt(Attributes* a, const char* name, int n, const int* counts, const int64_t* const* v) {
  std::string text = "[";
  for (int i = 0; i < n; ++i) text += (i ? "," : "") + list(counts[i], v[i], whole);
  return a->add(name, text + "]");
}

EXPORT int aclopCompileAndExecute(const char* name, int inputs, Description** in, Buffer** in_data, int outputs,
                                  Description** out, Buffer** out_data, Attributes* attributes, int, int, const char*,
                                  void*) {
  return run(name, inputs, in, in_data, outputs, out, out_data, attributes);
}
EXPORT int aclopCompileAndExecuteV2(const char* name, int inputs, Description** in, Buffer** in_data, int outputs,
                                    Description** out, Buffer** out_data, Attributes* attributes, int, int, const char*,
                                    void*) {
  return run(name, inputs, in, in_data, outputs, out, out_data, attributes);
}
EXPORT int aclopSetCompileFlag(int) { return kOk; }
EXPORT int aclSetCompileopt(int, const char*) { return kOk; }
