#include "runtime.h"

#include "error.h"
#include "onnxruntime_runner.h"
#ifdef FUSELAGE_TENSORRT
#include "tensorrt_runner.h"
#endif

namespace fuselage {

std::unique_ptr<Runner> open_engine(const Engine& engine, const RunnerOptions& options) {
  if (engine.backend == "onnxruntime") return open_onnxruntime(engine, options);
  if (engine.backend == "tensorrt") {
#ifdef FUSELAGE_TENSORRT
    return open_tensorrt(engine, options);
#else
    throw Error("this program was built without TensorRT. Set TENSORRT_INCLUDE_DIR and build it again");
#endif
  }
  throw Error(engine.manifest() + ": this program has no backend " + engine.backend);
}

}  // namespace fuselage
