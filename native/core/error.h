#pragma once
#include <stdexcept>
#include <string>

namespace tpla {

// An error with a code of src/errors.ts; the addon turns it into a JavaScript Error with that `code`.
class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message) : std::runtime_error(message), code_(std::move(code)) {}
  const std::string& code() const { return code_; }

 private:
  std::string code_;
};

}  // namespace tpla
