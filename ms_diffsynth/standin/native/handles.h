// The objects that an aclnn function is given: tensors, scalars, arrays of numbers, and lists of these.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace standin {

struct Handle {
  enum Kind { kTensor, kScalar, kNumbers, kFloats, kList } kind;
  int dtype = 0;                     // of a tensor or scalar
  std::vector<int64_t> numbers;      // a tensor's shape; integers or booleans
  std::vector<int64_t> strides;      // of a tensor, in elements
  int64_t offset = 0;                // of a tensor's first element, in elements
  int format = 0;                    // of a tensor; 2 is plain (ND)
  char* address = nullptr;           // of a tensor's memory
  std::vector<float> floats;         // an array of floats
  std::string value;                 // of a scalar, as JSON
  std::vector<std::shared_ptr<Handle>> members;

  // As JSON; the addresses are for the arithmetic only, they would make any two logs differ.
  std::string json(bool addresses) const;
};

std::string tensor_json(int dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                        int64_t offset, int format, const void* address, bool addresses);
std::string json_list(const std::vector<int64_t>& numbers);
std::vector<int64_t> packed_strides(const std::vector<int64_t>& shape);

// The live handle at this address, or nothing: how an argument is told from a number.
std::shared_ptr<Handle> find_handle(uint64_t address);

}  // namespace standin
