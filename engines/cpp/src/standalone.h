#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "request.h"
#include "runtime.h"

namespace fuselage {

// What `bench` measures: every combination of the three lists.
struct BenchSettings {
  std::vector<std::int64_t> batch{1}, input_len{64}, output_len{32};
  std::int64_t rounds = 8;  // kept requests per combination
  std::int64_t warmup = 1;  // requests before those
  std::uint64_t seed = 0;   // of the input tokens
};

struct BenchReport {
  std::string results;  // JSON of engines/results.py
  std::string table;    // the same samples for people, by the metrics of trtexec
};

// Times one engine without anybody else. Throws Error.
BenchReport bench(const std::string& folder, const BenchSettings& settings, const RunnerOptions& options,
                  const std::optional<std::vector<std::int64_t>>& cpus, const std::vector<std::string>& command);

}  // namespace fuselage
