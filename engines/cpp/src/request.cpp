#include "request.h"

#include "error.h"

namespace fuselage {

void check_request(const Engine& engine, const RequestShape& shape) {
  const auto refuse = [](const std::string& problem, std::int64_t expected, std::int64_t found) {
    throw Error(problem + ": expected " + std::to_string(expected) + ", found " + std::to_string(found));
  };
  if (engine.batch && shape.batch != *engine.batch) {
    refuse("the engine has a fixed batch", *engine.batch, shape.batch);
  }
  std::int64_t longest = 0;
  if (__builtin_add_overflow(shape.input_len, shape.output_len, &longest)) longest = INT64_MAX;
  if (longest > engine.max_positions) {
    refuse("input and output are longer than the positions the model knows", engine.max_positions, longest);
  }
  if (engine.capacity && longest > *engine.capacity) {
    refuse("input and output are longer than the tokens the KV cache holds", *engine.capacity, longest);
  }
  check_memory(product({shape.batch, shape.input_len, 8}), "the input tokens");
  check_memory(product({shape.batch, shape.output_len, 128}), "what is kept of every token");
  if (engine.device() != "cpu") return;  // what follows is in a GPU's own memory, which its runner looks at
  check_memory(product({shape.batch, engine.vocab_size, 4}), "the logits");
  check_memory(engine.cache_bytes(shape.batch, longest), "the KV cache");
}

std::vector<std::int64_t> token_ids(const RequestShape& shape, std::int64_t vocab_size, std::uint64_t seed) {
  std::vector<std::int64_t> ids(static_cast<std::size_t>(product({shape.batch, shape.input_len})));
  std::uint64_t state = seed;
  for (std::int64_t& id : ids) {
    std::uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    z ^= z >> 31;
    id = static_cast<std::int64_t>(z % static_cast<std::uint64_t>(vocab_size));
  }
  return ids;
}

Sample time_request(Runner& runner, const Engine& engine, const RequestShape& shape, std::uint64_t seed) {
  check_request(engine, shape);
  const auto input_ids = token_ids(shape, engine.vocab_size, seed);
  const auto steps = static_cast<std::size_t>(shape.output_len);
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(shape.batch));
  Sample sample{};
  sample.tokens.assign(steps, tokens);  // nothing is allocated between the stamps
  std::vector<Clock::time_point> stamps(steps + 1);
  std::vector<CallTimes> times(steps);

  runner.start(shape.batch);
  stamps[0] = Clock::now();
  for (std::size_t step = 0; step < steps; ++step) {
    step == 0 ? runner.prefill(input_ids, tokens) : runner.decode(tokens);
    stamps[step + 1] = Clock::now();
    times[step] = runner.times();
    sample.tokens[step] = tokens;
  }

  sample.ttft_ms = milliseconds(stamps[1] - stamps[0]);
  sample.request_ms = milliseconds(stamps[steps] - stamps[0]);
  for (std::size_t step = 1; step < steps; ++step) {
    sample.step_ms.push_back(milliseconds(stamps[step + 1] - stamps[step]));
  }
  for (const CallTimes& time : times) {
    sample.run_ms.push_back(milliseconds(time.run));
    if (time.device_ms) sample.device_ms.push_back(*time.device_ms);
  }
  return sample;
}

}  // namespace fuselage
