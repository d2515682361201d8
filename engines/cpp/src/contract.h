// What the Python side says as well. tests/engines/test_cpp_program.py holds the two together.
#pragma once

#include <cstdint>

namespace fuselage {

// engines/worker.py, engines/results.py
inline constexpr std::int64_t kProtocol = 1;
inline constexpr std::int64_t kResultsSchema = 2;

// engines/base.py, exporter/writers/files.py
inline constexpr char kEngineFile[] = "engine.json";
inline constexpr char kEngineKind[] = "engine";
inline constexpr std::int64_t kEngineSchema = 1;
inline constexpr char kManifestFile[] = "fuselage.manifest.json";
inline constexpr char kMarkerFile[] = ".fuselage-incomplete";
inline constexpr std::int64_t kManifestSchema = 1;
inline constexpr std::int64_t kMaxJsonBytes = 64 << 20;

// exporter/network.py: names of a network's inputs and outputs
inline constexpr char kInputIds[] = "input_ids";
inline constexpr char kPositionIds[] = "position_ids";
inline constexpr char kCacheWrite[] = "cache_write";
inline constexpr char kLogitsIndex[] = "logits_index";
inline constexpr char kLogits[] = "logits";
inline constexpr char kNextTokens[] = "next_tokens";

// engines/onnxruntime.py
inline constexpr char kMinOnnxRuntime[] = "1.25";
inline constexpr std::int64_t kCacheStep = 128;       // positions
inline constexpr std::int64_t kBufferAlignment = 64;  // bytes

}  // namespace fuselage
