// The classes of GE whose state lives in the caller, or whose answers MindSpore asks for: as its libraries use them.
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "standin.h"

#define PUBLIC __attribute__((visibility("default")))

namespace ge {

class PUBLIC StatusFactory {  // texts of status codes, registered when a library is loaded
 public:
  static StatusFactory* Instance();

 private:
  std::map<uint32_t, std::string> texts_;
};

StatusFactory* StatusFactory::Instance() {
  static StatusFactory factory;
  return &factory;
}

class PUBLIC AscendString {
 public:
  explicit AscendString(char const* text);
  const char* GetString() const;

 private:
  std::shared_ptr<std::string> text_;
};

AscendString::AscendString(char const* text) {
  if (text != nullptr) text_ = std::make_shared<std::string>(text);
}
const char* AscendString::GetString() const { return text_ ? text_->c_str() : ""; }

class PUBLIC Operator {
 public:
  Operator() = default;
  Operator(AscendString const& name, AscendString const& type);
  explicit Operator(AscendString const& type);
  Operator(char const* name, char const* type);
  explicit Operator(char const* type);
  Operator(std::string const& name, std::string const& type);
  explicit Operator(std::string const& type);
  virtual ~Operator() = default;

 private:
  std::shared_ptr<void> state_;
};

Operator::Operator(AscendString const&, AscendString const&) {}
Operator::Operator(AscendString const&) {}
Operator::Operator(char const*, char const*) {}
Operator::Operator(char const*) {}
Operator::Operator(std::string const&, std::string const&) {}
Operator::Operator(std::string const&) {}

// MindSpore asks whether an operator exists only for types it has a description of: all of them do.
class PUBLIC OperatorFactory {
 public:
  static Operator CreateOperator(char const* name, char const* type);
  static Operator CreateOperator(std::string const& name, std::string const& type);
  static bool IsExistOp(char const* type);
  static bool IsExistOp(std::string const& type);
};

Operator OperatorFactory::CreateOperator(char const*, char const*) { return Operator(); }
Operator OperatorFactory::CreateOperator(std::string const&, std::string const&) { return Operator(); }
bool OperatorFactory::IsExistOp(char const* type) {
  standin::record(std::string("\"event\":\"operator asked for\",\"name\":\"") + type + "\"");
  return true;
}
bool OperatorFactory::IsExistOp(std::string const& type) { return IsExistOp(type.c_str()); }

}  // namespace ge
