// JSON with checked fields: whatever a file holds, these functions return a value of the type asked for or throw Error.
// Only who builds or walks JSON includes nlohmann/json.hpp, which takes a second to compile.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

namespace fuselage {

using Json = nlohmann::ordered_json;

// Parses `text`; `where` (a file, say) begins the error.
Json parse_json(const std::string& text, const std::string& where);

// Reads a file of at most kMaxJsonBytes.
Json read_json(const std::string& path);

// One line of UTF-8; bytes that are not become U+FFFD.
std::string dump_json(const Json& value);

// The field `key` of `object`, `where` begins the error. Integers are >= `least`.
const Json& field(const Json& object, const char* key, const std::string& where);
std::string text_field(const Json& object, const char* key, const std::string& where);
std::int64_t integer_field(const Json& object, const char* key, const std::string& where, std::int64_t least = 1);
// null is nullopt; the key must be there.
std::optional<std::int64_t> optional_integer_field(const Json& object, const char* key, const std::string& where);
bool bool_field(const Json& object, const char* key, const std::string& where);
std::map<std::string, std::string> texts_field(const Json& object, const char* key, const std::string& where);

}  // namespace fuselage
