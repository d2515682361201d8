#include "onnxruntime_api.h"

#include <cstdlib>
#include <vector>

#include "error.h"

namespace fuselage::ort {
namespace {

struct ApiBase {
  void* const* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

// The newest slot that is used, 137, has been there since API version 7. 16 is the one that was run.
constexpr std::uint32_t kApiVersion = 16;

std::vector<long> version_numbers(const std::string& text) {
  std::vector<long> numbers;
  const char* at = text.c_str();
  while (numbers.size() < 3) {
    char* end = nullptr;
    numbers.push_back(std::strtol(at, &end, 10));
    at = *end == '.' ? end + 1 : end;
  }
  return numbers;
}

}  // namespace

bool is_version_at_least(const std::string& text, const std::string& least) {
  return version_numbers(text) >= version_numbers(least);
}

Api::Api(const std::string& library, const std::string& least) : library_(library) {
  const auto get_base = library_.function<const ApiBase*()>("OrtGetApiBase");
  const ApiBase* base = get_base();
  version_ = base->get_version();
  if (!is_version_at_least(version_, least)) {
    throw Error(library_.name() + ": ONNX Runtime is too old: expected " + least + " or later, found " + version_);
  }
  table_ = base->get_api(kApiVersion);
  if (table_ == nullptr) throw Error(library_.name() + ": ONNX Runtime " + version_ + " has no C API version 16");
}

void Api::fail(Status* status) const {
  const std::string message = function<GetErrorMessage>()(status);
  function<ReleaseStatus>()(status);
  throw Error("ONNX Runtime: " + message);
}

}  // namespace fuselage::ort
