// A stand-in for the libraries of CANN: what the files of this folder share.
//
// Everything here is written from facts that are public: the names that MindSpore's wheel leaves undefined or looks up,
// the descriptions of the functions in CANN's documentation (AscendCL, aclnn, HCCL reference), MindSpore's public
// source, and the two platforms' calling conventions. No code or header of CANN is in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {

// Results of AscendCL's functions (aclError in its documentation).
constexpr int kOk = 0;
constexpr int kInvalidParameter = 161002;  // an aclnn function refuses its arguments
constexpr int kOutOfMemory = 207001;       // the device has no memory left
constexpr int kFailure = 500000;           // an internal error
constexpr int kBoundExceeded = 34;         // a bounded C function (libc_sec) refuses: ERANGE

// --- record.cc: settings and the log ---------------------------------------------------------------------------------
bool recording();
bool shapes_only();              // kernels are recorded and not computed
double device_gib();             // memory that the device says it has
void record(const std::string& fields);  // one line of the log: {fields}
std::string quoted(const std::string& text);

// Keeps a message for aclGetRecentErrMsg, which MindSpore shows, and writes it into the log. Returns `code`.
int fail(int code, const std::string& message);

// --- handles.cc, aclop.cc: dtypes ------------------------------------------------------------------------------------
const char* dtype_name(int dtype);  // "float32", or nullptr for a dtype that an Atlas A2 does not have
size_t dtype_size(int dtype);       // bytes

// --- arithmetic.cc: the way to NumPy ---------------------------------------------------------------------------------
int compute(const std::string& call);  // kOk, or what fail() returned

}  // namespace standin
