#include "json.h"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "contract.h"
#include "error.h"

namespace fuselage {
namespace {

[[noreturn]] void refuse(const std::string& where, const char* key, const char* expected) {
  throw Error(where + ": " + key + ": expected " + expected);
}

}  // namespace

Json parse_json(const std::string& text, const std::string& where) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    throw Error(where + ": not JSON: byte " +
                std::to_string(error.byte));  // what() repeats the bytes, whatever they are
  }
}

Json read_json(const std::string& path) {
  std::error_code code;
  if (!std::filesystem::is_regular_file(path, code)) throw Error(path + ": file does not exist");
  const auto size = std::filesystem::file_size(path, code);
  if (code) throw Error(path + ": " + code.message());
  if (size > static_cast<std::uintmax_t>(kMaxJsonBytes)) throw Error(path + ": file is too large");
  std::ifstream file(path, std::ios::binary);
  std::string text(size, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) throw Error(path + ": cannot be read");
  return parse_json(text, path);
}

std::string dump_json(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

const Json& field(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object() || !object.contains(key)) throw Error(where + ": " + key + " is missing");
  return object.find(key).value();
}

std::string text_field(const Json& object, const char* key, const std::string& where) {
  const Json& value = field(object, key, where);
  if (!value.is_string()) refuse(where, key, "text");
  auto text = value.get<std::string>();
  if (text.find('\0') != std::string::npos) refuse(where, key, "text without NUL");
  return text;
}

std::int64_t integer_field(const Json& object, const char* key, const std::string& where, std::int64_t least) {
  const Json& value = field(object, key, where);
  const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= INT64_MAX : value.is_number_integer();
  if (!fits || value.get<std::int64_t>() < least) refuse(where, key, least > 0 ? "a positive integer" : "an integer");
  return value.get<std::int64_t>();
}

std::optional<std::int64_t> optional_integer_field(const Json& object, const char* key, const std::string& where) {
  if (field(object, key, where).is_null()) return std::nullopt;
  return integer_field(object, key, where);
}

bool bool_field(const Json& object, const char* key, const std::string& where) {
  const Json& value = field(object, key, where);
  if (!value.is_boolean()) refuse(where, key, "true or false");
  return value.get<bool>();
}

std::map<std::string, std::string> texts_field(const Json& object, const char* key, const std::string& where) {
  const Json& values = field(object, key, where);
  if (!values.is_object()) refuse(where, key, "an object of texts");
  std::map<std::string, std::string> texts;
  for (const auto& item : values.items()) texts[item.key()] = text_field(values, item.key().c_str(), where);
  return texts;
}

}  // namespace fuselage
