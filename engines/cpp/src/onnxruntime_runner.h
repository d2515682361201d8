#pragma once

#include "runtime.h"

namespace fuselage {

// ONNX Runtime on CPU, as engines/onnxruntime.py runs it: the same session options, cache growth and binding. Throws
// Error.
std::unique_ptr<Runner> open_onnxruntime(const Engine& engine, const RunnerOptions& options);

}  // namespace fuselage
