// What every runtime looks like to the rest of the program; mirrors the greedy half of Runner in engines/base.py.
//
// B = sequences side by side, S = tokens of one call, V = vocab_size. All rows of a benchmark have the same length.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine_folder.h"
#include "system.h"

namespace fuselage {

// What only the runtime can know of a call's time.
struct CallTimes {
  Clock::duration run;              // on the host, in the runtime's own call: all of a CPU's work, a GPU's enqueue
  std::optional<double> device_ms;  // on the GPU, between events around that call
};

// An opened engine with one KV cache. Calls follow one another.
class Runner {
 public:
  virtual ~Runner() = default;

  // Begins anew with `batch` empty sequences. How long they may become is checked before, by check_request.
  virtual void start(std::int64_t batch) = 0;

  // Appends input_ids [B, S]; writes each row's most likely next token, of several the first, to `next` [B].
  virtual void prefill(const std::vector<std::int64_t>& input_ids, std::vector<std::int64_t>& next) = 0;

  // Appends one token per sequence, [B]; writes the most likely next ones in their place.
  virtual void decode(std::vector<std::int64_t>& tokens) = 0;

  // Of the last prefill or decode.
  virtual CallTimes times() const = 0;

  virtual std::map<std::string, std::string> versions() const = 0;  // of what runs the engine
  virtual std::string device() const = 0;                           // "cpu", or the accelerator's name
};

struct RunnerOptions {
  std::optional<std::int64_t> threads;  // nullopt: the runtime's own choice
  std::string library;                  // of the runtime; empty: the usual name, on the loader's path
  std::string cuda_library;             // libcudart; empty: the usual name
};

// Opens an engine with its backend's runtime. Throws Error.
std::unique_ptr<Runner> open_engine(const Engine& engine, const RunnerOptions& options);

}  // namespace fuselage
