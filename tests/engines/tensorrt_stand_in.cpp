// TensorRT and the CUDA runtime as far as the C++ benchmark program uses them, on the CPU: a library that takes the place
// of both, made from the public headers. It checks what TensorRT asks of its callers and aborts where they fall short.
//
// Its model says as next token the sum of all tokens of the row modulo V, which it reads from the KV cache: a token in the
// wrong place, an old one left there, or a wrong position changes what comes next. It writes no logits: the program has no
// use for them.
//
// "engine.plan" is text: V, capacity, num_key_value_heads, head_dim, largest batch, largest S of prefill. `pure.h`, which
// the test makes of the headers, has a class Aborting<T> per interface T, with every function aborting.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "pure.h"

using namespace nvinfer1;

namespace {

#define CHECK(condition)                                                \
  if (!(condition)) {                                                   \
    std::fprintf(stderr, "stand-in: not so: %s\n", #condition);         \
    std::abort();                                                       \
  }

constexpr char const* kInputs[] = {"input_ids", "position_ids", "cache_write", "logits_index"};
constexpr char const* kPast[] = {"past_k_0", "past_v_0"};
constexpr char const* kPresent[] = {"present_k_0", "present_v_0"};

struct Plan {
  int64_t vocab_size, capacity, heads, head_dim, batch, tokens;
};

std::vector<std::function<void()>>* recording = nullptr;  // while a stream is captured
int enqueued = 0, captured = 0, launched = 0, allocated = 0;

Dims shape_of(Plan const& plan, std::string const& name) {
  if (name == "input_ids" || name == "position_ids") return {2, {-1, -1}};
  if (name == "cache_write" || name == "logits_index" || name == "next_tokens") return {1, {-1}};
  if (name == "logits") return {2, {-1, plan.vocab_size}};
  return {4, {-1, plan.heads, plan.capacity, plan.head_dim}};
}

class ContextImpl : public Aborting<apiv::VExecutionContext> {
 public:
  explicit ContextImpl(Plan const& plan) : plan_(plan) {}

  bool setOptimizationProfileAsync(int32_t index, cudaStream_t) noexcept override {
    profile_ = index;
    return index == 0 || index == 1;
  }
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override { CHECK(memory != nullptr && size >= 1000); }
  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    CHECK(profile_ >= 0);  // profiles before shapes
    shapes_[name] = dims;
    return dims.d[0] <= plan_.batch;
  }
  bool setTensorAddress(char const* name, void* address) noexcept override {
    CHECK(reinterpret_cast<uintptr_t>(address) % 256 == 0);
    addresses_[name] = address;
    return true;
  }
  int32_t inferShapes(int32_t, char const** names) noexcept override {
    for (char const* name : {kInputs[0], kInputs[1], kInputs[2], kInputs[3], kPast[0], kPast[1]}) {
      if (shapes_.count(name) == 0) return *names = name, 1;
    }
    return 0;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    CHECK(stream != nullptr);
    const char* unknown = nullptr;
    CHECK(inferShapes(1, &unknown) == 0);
    CHECK(addresses_.size() == 10);
    for (int i = 0; i < 2; ++i) CHECK(addresses_.at(kPast[i]) == addresses_.at(kPresent[i]));
    CHECK(addresses_.at(kPast[0]) != addresses_.at(kPast[1]));
    const int64_t tokens = shapes_.at("input_ids").d[1];
    CHECK(profile_ == 0 ? tokens == 1 : tokens <= plan_.tokens);
    if (recording != nullptr) {
      CHECK(ran_);  // once as it is, before it is captured
      recording->push_back([this] { run(); });
      ++captured;
    } else {
      run();
      ran_ = true;
      ++enqueued;
    }
    return true;
  }

 private:
  void run() {
    const auto* ids = static_cast<int64_t*>(addresses_.at("input_ids"));
    const auto* positions = static_cast<int64_t*>(addresses_.at("position_ids"));
    const auto* write = static_cast<int64_t*>(addresses_.at("cache_write"));
    const auto* index = static_cast<int64_t*>(addresses_.at("logits_index"));
    auto* next = static_cast<int64_t*>(addresses_.at("next_tokens"));
    auto* keys = static_cast<float*>(addresses_.at("past_k_0"));
    const int64_t batch = shapes_.at("input_ids").d[0], tokens = shapes_.at("input_ids").d[1];
    const int64_t row = plan_.heads * plan_.capacity * plan_.head_dim;
    for (int64_t b = 0; b < batch; ++b) {
      CHECK(write[b] + tokens <= plan_.capacity);
      for (int64_t s = 0; s < tokens; ++s) {
        CHECK(positions[b * tokens + s] == write[b] + s);
        keys[b * row + (write[b] + s) * plan_.head_dim] = static_cast<float>(ids[b * tokens + s]);
      }
      int64_t sum = 0;
      const int64_t last = positions[b * tokens + index[b]];
      for (int64_t p = 0; p < plan_.capacity; ++p) {
        const float key = keys[b * row + p * plan_.head_dim];
        CHECK(p <= last || key == 0);  // an earlier request's tokens are gone
        sum += static_cast<int64_t>(key);
      }
      next[b] = sum % plan_.vocab_size;
    }
  }

  const Plan plan_;
  int32_t profile_ = -1;
  bool ran_ = false;
  std::map<std::string, Dims> shapes_;
  std::map<std::string, void*> addresses_;
};

class Context : public IExecutionContext {
 public:
  explicit Context(Plan const& plan) : impl_(plan) { mImpl = &impl_; }

 private:
  ContextImpl impl_;
};

class EngineImpl : public Aborting<apiv::VCudaEngine> {
 public:
  explicit EngineImpl(Plan const& plan) : plan_(plan) {}

  int32_t getNbIOTensors() const noexcept override { return 10; }
  char const* getIOTensorName(int32_t index) const noexcept override {
    constexpr char const* kNames[] = {kInputs[0], kInputs[1], kInputs[2],    kInputs[3],  kPast[0],
                                      kPast[1],   "logits",   "next_tokens", kPresent[0], kPresent[1]};
    return kNames[index];
  }
  Dims getTensorShape(char const* name) const noexcept override { return shape_of(plan_, name); }
  DataType getTensorDataType(char const* name) const noexcept override {
    for (char const* input : kInputs) {
      if (std::strcmp(name, input) == 0) return DataType::kINT64;
    }
    return std::strcmp(name, "next_tokens") == 0 ? DataType::kINT64 : DataType::kFLOAT;
  }
  char const* getAliasedInputTensor(char const* name) const noexcept override {
    for (int i = 0; i < 2; ++i) {
      if (std::strcmp(name, kPresent[i]) == 0) return kPast[i];
    }
    return nullptr;
  }
  int64_t getDeviceMemorySizeV2() const noexcept override { return 1000; }
  int64_t getStreamableWeightsSize() const noexcept override { return 5000; }
  bool setWeightStreamingBudgetV2(int64_t budget) noexcept override { return budget <= 5000; }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
    CHECK(strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED);
    return new Context(plan_);
  }

 private:
  const Plan plan_;
};

class Engine : public ICudaEngine {
 public:
  explicit Engine(Plan const& plan) : impl_(plan) { mImpl = &impl_; }

 private:
  EngineImpl impl_;
};

class RuntimeImpl : public Aborting<apiv::VRuntime> {
 public:
  explicit RuntimeImpl(ILogger& logger) : logger_(logger) {}

  void setEngineHostCodeAllowed(bool) noexcept override {}
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    std::istringstream text(std::string(static_cast<char const*>(blob), size));
    Plan plan{};
    text >> plan.vocab_size >> plan.capacity >> plan.heads >> plan.head_dim >> plan.batch >> plan.tokens;
    if (text) return new Engine(plan);
    logger_.log(ILogger::Severity::kWARNING, "a warning");
    logger_.log(ILogger::Severity::kERROR, "the magic tag does not match");
    logger_.log(ILogger::Severity::kERROR, "what follows from it");
    return nullptr;
  }

 private:
  ILogger& logger_;
};

class Runtime : public IRuntime {
 public:
  explicit Runtime(ILogger& logger) : impl_(logger) { mImpl = &impl_; }

 private:
  RuntimeImpl impl_;
};

struct Count {
  ~Count() {
    std::fprintf(stderr, "stand-in: %d enqueued, %d captured, ", enqueued, captured);
    std::fprintf(stderr, "%d launched, %d allocated\n", launched, allocated);
  }
} count;

std::chrono::steady_clock::time_point& time_of(cudaEvent_t event) {
  return *reinterpret_cast<std::chrono::steady_clock::time_point*>(event);
}

using Graph = std::vector<std::function<void()>>;

}  // namespace

extern "C" {

int getInferLibVersion() { return NV_TENSORRT_VERSION; }
void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  CHECK(version == NV_TENSORRT_VERSION);
  return static_cast<IRuntime*>(new Runtime(*static_cast<ILogger*>(logger)));
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION - (std::getenv("STAND_IN_OLDER_CUDA") == nullptr ? 0 : 1000);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = std::getenv("STAND_IN_WITHOUT_GPU") == nullptr;
  return cudaSuccess;
}
char const* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "Stand-in");
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t size) {
  *memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*memory, 0xff, size);  // NaN, for who forgets to clear it
  ++allocated;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, size_t size) { return cudaMalloc(memory, size); }
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t{1} << 30;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  CHECK(recording == nullptr);
  std::memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  std::memset(memory, value, size);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  *stream = reinterpret_cast<cudaStream_t>(new int);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<int*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  CHECK(recording == nullptr);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  recording = new Graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(recording);
  recording = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  for (auto const& node : *reinterpret_cast<Graph*>(executable)) node();
  ++launched;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new std::chrono::steady_clock::time_point);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &time_of(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  time_of(event) = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t began, cudaEvent_t ended) {
  *ms = std::chrono::duration<float, std::milli>(time_of(ended) - time_of(began)).count();
  return cudaSuccess;
}
}
