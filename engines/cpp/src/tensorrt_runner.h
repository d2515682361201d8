#pragma once

#include "runtime.h"

namespace fuselage {

// TensorRT >= 10.15 on the first GPU, as engines/tensorrt_runner.py runs it: two contexts over one KV cache, decode as
// a CUDA graph. The headers' major version decides which library fits. Never executed on a GPU. Throws Error.
std::unique_ptr<Runner> open_tensorrt(const Engine& engine, const RunnerOptions& options);

}  // namespace fuselage
