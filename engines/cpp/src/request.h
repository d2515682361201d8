// One timed request, as engines/worker.py times it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runtime.h"

namespace fuselage {

// `batch` sequences of `input_len` tokens side by side, `output_len` new tokens each.
struct RequestShape {
  std::int64_t batch, input_len, output_len;
};

struct Sample {
  double ttft_ms;               // prefill and the choice of the first token
  std::vector<double> step_ms;  // [output_len - 1] decode and the choice of the next token
  double request_ms;            // from the start of prefill to the last token
  // [output_len] of prefill, then of each decode step; see CallTimes
  std::vector<double> run_ms;
  std::vector<double> device_ms;                  // empty: the runtime has no device of its own
  std::vector<std::vector<std::int64_t>> tokens;  // [output_len][B] what was generated
};

// Throws Error where the engine cannot hold a request of this shape.
void check_request(const Engine& engine, const RequestShape& shape);

// Input ids [batch, input_len] in [0, vocab_size): SplitMix64 outputs that start from `seed`, modulo vocab_size.
// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
std::vector<std::int64_t> token_ids(const RequestShape& shape, std::int64_t vocab_size, std::uint64_t seed);

// Generates greedily and times every token. Runner::start is not timed: a server has its room before a request arrives.
Sample time_request(Runner& runner, const Engine& engine, const RequestShape& shape, std::uint64_t seed);

}  // namespace fuselage
