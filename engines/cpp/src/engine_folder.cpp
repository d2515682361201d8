#include "engine_folder.h"

#include <nlohmann/json.hpp>

#include "contract.h"
#include "error.h"

namespace fuselage {
namespace {

void check_files(const std::filesystem::path& folder, const std::string& network) {
  const std::string path = folder / kManifestFile;
  std::error_code code;
  if (std::filesystem::exists(folder / kMarkerFile, code)) {
    throw Error(folder.string() + ": folder is incomplete: the run that wrote it was interrupted");
  }
  const Json manifest = read_json(path);
  if (integer_field(manifest, "manifest_schema", path) != kManifestSchema) {
    throw Error(path + ": manifest of another version");
  }
  const std::string kind = text_field(manifest, "kind", path);
  if (kind != kEngineKind) throw Error(path + ": folder of another kind: expected engine, found " + kind);
  const Json& files = field(manifest, "files", path);
  for (const std::string& name : {std::string(kEngineFile), network}) {
    if (!files.is_object() || !files.contains(name)) throw Error(path + ": " + name + " is not in the manifest");
  }
  for (const auto& item : files.items()) {
    const std::filesystem::path name = item.key();
    for (const auto& part : name) {
      if (name.is_absolute() || part == "..") throw Error(path + ": path leaves the folder: " + item.key());
    }
    const auto expected = integer_field(item.value(), "bytes", path, 0);
    const auto found = std::filesystem::file_size(folder / name, code);
    if (code) throw Error((folder / name).string() + ": " + code.message());
    if (found != static_cast<std::uintmax_t>(expected)) {
      throw Error((folder / name).string() + ": file was altered: expected " + std::to_string(expected) +
                  " bytes, found " + std::to_string(found));
    }
  }
}

std::vector<CacheSlot> cache_slots(const Json& document, const std::string& path) {
  const Json& slots = field(document, "cache", path);
  if (!slots.is_array()) throw Error(path + ": cache: expected a list");
  std::vector<CacheSlot> cache;
  for (const Json& slot : slots) {
    cache.push_back({text_field(slot, "key", path), text_field(slot, "value", path),
                     text_field(slot, "present_key", path), text_field(slot, "present_value", path),
                     integer_field(slot, "num_key_value_heads", path), integer_field(slot, "head_dim", path)});
  }
  return cache;
}

}  // namespace

Engine read_engine_folder(const std::filesystem::path& folder) {
  std::error_code code;
  if (!std::filesystem::is_directory(folder, code)) throw Error(folder.string() + ": no such folder");
  const std::string path = folder / kEngineFile;
  Json document = read_json(path);
  if (const auto schema = integer_field(document, "engine_schema", path); schema != kEngineSchema) {
    throw Error(path + ": not an engine manifest of this version: expected engine_schema " +
                std::to_string(kEngineSchema) + ", found " + std::to_string(schema));
  }
  const std::string network = text_field(document, "network_file", path);
  check_files(folder, network);
  Engine engine{folder,
                folder / network,
                text_field(document, "backend", path),
                text_field(document, "label", path),
                text_field(document, "dtype", path),
                texts_field(document, "runtime", path),
                integer_field(document, "vocab_size", path),
                integer_field(document, "max_positions", path),
                optional_integer_field(document, "batch", path),
                optional_integer_field(document, "capacity", path),
                cache_slots(document, path),
                {}};
  engine.document = std::make_shared<const Json>(std::move(document));
  engine.dtype_bytes();  // refuses what no runtime here has
  return engine;
}

std::string Engine::manifest() const { return folder / kEngineFile; }

std::string Engine::device() const { return text_field(options(), "device", manifest()); }

std::int64_t Engine::dtype_bytes() const {
  if (dtype == "float32") return 4;
  if (dtype == "float16" || dtype == "bfloat16") return 2;
  throw Error(manifest() + ": not a dtype that runs here: " + dtype);
}

std::int64_t Engine::cache_bytes(std::int64_t sequences, std::int64_t positions) const {
  std::int64_t bytes = 0;
  for (const CacheSlot& slot : cache) {
    const auto one = product({2, sequences, slot.num_key_value_heads, positions, slot.head_dim, dtype_bytes()});
    if (__builtin_add_overflow(bytes, one, &bytes))
      throw Error(manifest() + ": the KV cache is larger than any memory");
  }
  return bytes;
}

std::int64_t product(std::initializer_list<std::int64_t> sizes) {
  std::int64_t all = 1;
  for (const std::int64_t size : sizes) {
    if (__builtin_mul_overflow(all, size, &all)) throw Error("a buffer would be larger than any memory");
  }
  return all;
}

}  // namespace fuselage
