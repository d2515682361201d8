#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "json.h"

namespace fuselage {

// The KV cache of one attention: two buffers [B, num_key_value_heads, capacity, head_dim]. The names are those of the
// network's inputs and outputs; a past and its present are bound to one buffer.
struct CacheSlot {
  std::string key, value, present_key, present_value;
  std::int64_t num_key_value_heads, head_dim;
};

// What an engine folder says about itself; see EngineManifest in engines/base.py.
struct Engine {
  std::filesystem::path folder;
  std::filesystem::path network;  // the file that the runtime opens
  std::string backend, label, dtype;
  std::map<std::string, std::string> runtime;  // versions of what built it
  std::int64_t vocab_size, max_positions;
  std::optional<std::int64_t> batch, capacity;  // fixed, or chosen at run time
  std::vector<CacheSlot> cache;
  std::shared_ptr<const Json> document;  // all of engine.json: options of the backend, and what results repeat

  const Json& options() const { return field(*document, "options", manifest()); }
  std::string device() const;
  std::string manifest() const;  // path of engine.json, for errors
  // Bytes of the caches of `sequences` with room for `positions` tokens each.
  std::int64_t cache_bytes(std::int64_t sequences, std::int64_t positions) const;
  std::int64_t dtype_bytes() const;
};

// Reads engine.json and holds the folder against its manifest: completeness, kind, presence and size of every file. The
// hashes are checked by who calls this program from Python. Throws Error.
Engine read_engine_folder(const std::filesystem::path& folder);

// The product of sizes that are not negative; throws Error where it does not fit.
std::int64_t product(std::initializer_list<std::int64_t> sizes);

}  // namespace fuselage
