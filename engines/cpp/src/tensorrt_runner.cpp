#include "tensorrt_runner.h"

#include <NvInferRuntime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <nlohmann/json.hpp>

#include "contract.h"
#include "cuda.h"
#include "error.h"

static_assert(NV_TENSORRT_VERSION >= 101500, "TensorRT before 10.15 has no KV-cache layer");

namespace fuselage {
namespace {

constexpr std::int64_t kAlignment = 256;  // bytes: of every address that TensorRT is given
constexpr std::array<const char*, 4> kInputs{kInputIds, kPositionIds, kCacheWrite, kLogitsIndex};

std::int64_t aligned(std::int64_t bytes) { return product({(bytes + kAlignment - 1) / kAlignment, kAlignment}); }

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kWARNING) return;
    std::cerr << "TensorRT: " << text << "\n";
    if (severity <= Severity::kERROR && first_error_.empty()) first_error_ = text;
  }

  bool has_error() const { return !first_error_.empty(); }

  // Throws Error of what was logged first since the last call: the others follow from it.
  [[noreturn]] void fail(const std::string& problem) {
    std::string error;
    error.swap(first_error_);
    throw Error(error.empty() ? problem : problem + ": " + error);
  }

 private:
  std::string first_error_;
};

// A file as memory that is read when it is looked at: an engine may be larger than the host's memory.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file >= 0 && fstat(file, &status) == 0) {
      size_ = static_cast<std::size_t>(status.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    if (file >= 0) close(file);
    if (data_ == MAP_FAILED) throw Error(path + ": the engine cannot be read");
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  std::size_t size_ = 0;
};

// One optimization profile; sizes are min, opt, max.
struct Profile {
  std::int32_t index;
  std::array<std::int64_t, 3> batch, tokens;
};

Profile profile_named(const Engine& engine, const char* name) {
  const std::string where = engine.manifest();
  const auto sizes = [&](const Json& profile, const char* key) {
    const Json& values = field(profile, key, where);
    std::array<std::int64_t, 3> numbers{};
    if (!values.is_array() || values.size() != numbers.size()) throw Error(where + ": " + key + ": expected 3 sizes");
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = integer_field({{key, values[i]}}, key, where);
    return numbers;
  };
  const Json& profiles = field(engine.options(), "profiles", where);
  if (!profiles.is_array()) throw Error(where + ": profiles: expected a list");
  for (const Json& profile : profiles) {
    if (text_field(profile, "name", where) != name) continue;
    const std::int64_t index = integer_field(profile, "index", where, 0);
    if (index > INT32_MAX) throw Error(where + ": index: too large");
    return {static_cast<std::int32_t>(index), sizes(profile, "batch"), sizes(profile, "tokens")};
  }
  throw Error(where + ": there is no profile " + name);
}

nvinfer1::DataType data_type(const Engine& engine) {
  if (engine.dtype == "float32") return nvinfer1::DataType::kFLOAT;
  return engine.dtype == "float16" ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kBF16;
}

nvinfer1::Dims dims(const std::vector<std::int64_t>& sizes) {
  nvinfer1::Dims shape{};
  shape.nbDims = static_cast<std::int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), shape.d);
  return shape;
}

// The library, and the one function that makes everything else. Its major version must be the headers'.
class TensorRt {
 public:
  TensorRt(const Engine& engine, const RunnerOptions& options, Logger& logger)
      : library_(options.library.empty() ? "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR) : options.library) {
    const int number = library_.function<int()>("getInferLibVersion")();  // 110400 is 11.4.0
    version_ =
        std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." + std::to_string(number % 100);
    if (number / 10000 != NV_TENSORRT_MAJOR || number < 101500) {
      throw Error(library_.name() + ": TensorRT of another version: expected " + std::to_string(NV_TENSORRT_MAJOR) +
                  ", for which this program was built, found " + version_);
    }
    const auto create = library_.function<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL");
    void* runtime = create(&logger, NV_TENSORRT_VERSION);
    // Without a driver 11.4 logs an error and returns a pointer to nowhere.
    if (runtime == nullptr || logger.has_error()) logger.fail("TensorRT does not start");
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(runtime));
    // A version-compatible engine has its runtime inside, which is code. Its hash was checked.
    if (bool_field(engine.options(), "lean", engine.manifest())) runtime_->setEngineHostCodeAllowed(true);
  }

  const std::string& version() const { return version_; }
  nvinfer1::IRuntime& runtime() const { return *runtime_; }

 private:
  Library library_;
  std::string version_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

// Everything bound for the calls of one profile, large enough for its longest: none allocates while it is timed.
struct Call {
  std::int64_t tokens;  // S of the last call, whose shapes are set; 0: there was none
  // input_ids [B, S], position_ids [B, S], cache_write [B], logits_index [B], int64, each from an aligned place on: one
  // copy brings all to the GPU.
  std::array<std::int64_t, 4> offsets;  // bytes
  std::int64_t input_bytes;
  CudaOwned<void> host_inputs, device_inputs;
  CudaOwned<void> logits;  // on the device, [B, V]: TensorRT wants a place for them
  CudaOwned<void> host_tokens, device_tokens;  // [B] int64
  CudaOwned<CUgraphExec_st> graph;

  std::int64_t* input(std::size_t index) const {
    return reinterpret_cast<std::int64_t*>(static_cast<char*>(host_inputs.get()) + offsets[index]);
  }
};

// A context with its profile set once: switching profiles costs time, and a graph holds one context's shapes.
struct Phase {
  const char* name;
  Profile profile;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  std::optional<Call> call;  // of the batch that was started
};

class TensorRtRunner final : public Runner {
 public:
  TensorRtRunner(const Engine& engine, const RunnerOptions& options)
      : engine_(engine),
        cuda_(options.cuda_library),  // before TensorRT, which crashes where there is no driver
        tensorrt_(engine, options, logger_),
        stream_(make_stream(cuda_)),
        began_(make_event(cuda_)),
        ended_(make_event(cuda_)) {
    {
      const MappedFile plan(engine.network);
      plan_.reset(tensorrt_.runtime().deserializeCudaEngine(plan.data(), plan.size()));
    }
    if (plan_ == nullptr) logger_.fail(engine.network.string() + ": TensorRT does not load the engine");
    check_interface();
    is_capturable_ = set_streaming_budget();
    const std::int64_t bytes = std::max(plan_->getDeviceMemorySizeV2(), kAlignment);
    activations_ = device_memory(cuda_, bytes);  // one block for both contexts: their calls follow one another
    for (Phase* phase : {&prefill_, &decode_}) {
      phase->profile = profile_named(engine, phase->name);
      phase->context.reset(plan_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
      if (phase->context == nullptr) logger_.fail("TensorRT makes no execution context");
      must(phase->context->setOptimizationProfileAsync(phase->profile.index, stream_.get()), "choose a profile");
      phase->context->setDeviceMemoryV2(activations_.get(), bytes);
    }
    synchronize();
  }

  void start(std::int64_t batch) override {
    if (batch < decode_.profile.batch[0] || batch > decode_.profile.batch[2]) {
      throw Error("the engine cannot run this batch: expected " + std::to_string(decode_.profile.batch[0]) + " to " +
                  std::to_string(decode_.profile.batch[2]) + ", found " + std::to_string(batch));
    }
    if (batch != batch_) {
      prefill_.call.reset();  // a graph must not outlive what it reads
      decode_.call.reset();
      caches_.clear();
      allocate_caches(batch);
    }
    // Also between requests: a NaN that an earlier one left there would spread through the mask.
    for (const auto& [name, cache] : caches_) {
      cuda_.check(cuda_.cudaMemsetAsync(cache.memory.get(), 0, cache.bytes, stream_.get()), "clear a cache");
    }
    synchronize();
    batch_ = batch;
    filled_ = 0;
  }

  void prefill(const std::vector<std::int64_t>& input_ids, std::vector<std::int64_t>& next) override {
    const std::int64_t tokens = static_cast<std::int64_t>(input_ids.size()) / batch_;
    run_ = {};
    device_ms_ = 0;
    for (std::int64_t first = 0; first < tokens; first += prefill_.profile.tokens[2]) {
      step(input_ids, tokens, first, std::min(tokens - first, prefill_.profile.tokens[2]), next);
    }
  }

  void decode(std::vector<std::int64_t>& tokens) override {
    run_ = {};
    device_ms_ = 0;
    step(tokens, 1, 0, 1, tokens);
  }

  CallTimes times() const override { return {run_, device_ms_}; }
  std::map<std::string, std::string> versions() const override { return {{"tensorrt", tensorrt_.version()}}; }

  std::string device() const override {
    cudaDeviceProp properties{};
    cuda_.check(cuda_.cudaGetDeviceProperties(&properties, 0), "describe the GPU");
    return properties.name;
  }

 private:
  struct Cache {
    CudaOwned<void> memory;
    std::size_t bytes;
  };

  // Appends `tokens` of every row from `first` on, of rows that are `row` long; writes what follows them to `next` [B],
  // which may be `input_ids`.
  void step(const std::vector<std::int64_t>& input_ids, std::int64_t row, std::int64_t first, std::int64_t tokens,
            std::vector<std::int64_t>& next) {
    if (filled_ + tokens > *engine_.capacity) throw Error("the KV cache is full");  // TensorRT ignores such a write
    Phase& phase = tokens == 1 ? decode_ : prefill_;
    if (!phase.call) phase.call = bind(*phase.context, phase.profile.tokens[2]);
    Call& call = *phase.call;
    if (call.tokens != tokens) set_tokens(*phase.context, call, tokens);
    for (std::int64_t b = 0; b < batch_; ++b) {
      for (std::int64_t s = 0; s < tokens; ++s) {
        call.input(0)[b * tokens + s] = input_ids[static_cast<std::size_t>(b * row + first + s)];
        call.input(1)[b * tokens + s] = filled_ + s;
      }
      call.input(2)[b] = filled_;
      call.input(3)[b] = tokens - 1;
    }
    copy(call.device_inputs.get(), call.host_inputs.get(), call.input_bytes, cudaMemcpyHostToDevice);
    cuda_.check(cuda_.cudaEventRecord(began_.get(), stream_.get()), "record an event");
    const auto began = Clock::now();
    if (call.graph == nullptr) {
      enqueue(phase);
    } else {
      cuda_.check(cuda_.cudaGraphLaunch(call.graph.get(), stream_.get()), "run a graph");
    }
    run_ += Clock::now() - began;
    cuda_.check(cuda_.cudaEventRecord(ended_.get(), stream_.get()), "record an event");
    copy(call.host_tokens.get(), call.device_tokens.get(), 8 * batch_, cudaMemcpyDeviceToHost);
    synchronize();
    float elapsed_ms = 0;
    cuda_.check(cuda_.cudaEventElapsedTime(&elapsed_ms, began_.get(), ended_.get()), "time a step");
    device_ms_ += static_cast<double>(elapsed_ms);
    filled_ += tokens;
    // A step must run as it is before it is captured; not later, for a request that warms up may have but one.
    if (&phase == &decode_ && call.graph == nullptr && is_capturable_) {
      call.graph = capture(cuda_, stream_.get(), [&] { enqueue(phase); });
    }
    std::copy_n(static_cast<const std::int64_t*>(call.host_tokens.get()), batch_, next.begin());
  }

  void enqueue(Phase& phase) { must(phase.context->enqueueV3(stream_.get()), "run a step"); }

  // Makes the buffers of calls with up to `longest` tokens and binds them, and each cache as both its past and present.
  Call bind(nvinfer1::IExecutionContext& context, std::int64_t longest) {
    Call call{};
    const std::array<std::int64_t, 4> elements{product({batch_, longest}), product({batch_, longest}), batch_, batch_};
    for (std::size_t index = 0; index < elements.size(); ++index) {
      call.offsets[index] = call.input_bytes;
      call.input_bytes += aligned(product({8, elements[index]}));
    }
    call.host_inputs = host_memory(cuda_, call.input_bytes);
    call.device_inputs = device_memory(cuda_, call.input_bytes);
    call.logits = device_memory(cuda_, product({batch_, engine_.vocab_size, 4}));
    call.host_tokens = host_memory(cuda_, 8 * batch_);
    call.device_tokens = device_memory(cuda_, 8 * batch_);
    const auto bind_tensor = [&](const std::string& name, void* address) {
      must(context.setTensorAddress(name.c_str(), address), "take an address for " + name);
    };
    for (std::size_t index = 0; index < kInputs.size(); ++index) {
      bind_tensor(kInputs[index], static_cast<char*>(call.device_inputs.get()) + call.offsets[index]);
    }
    bind_tensor(kLogits, call.logits.get());
    bind_tensor(kNextTokens, call.device_tokens.get());
    for (const CacheSlot& slot : engine_.cache) {
      bind_tensor(slot.key, caches_.at(slot.key).memory.get());
      bind_tensor(slot.value, caches_.at(slot.value).memory.get());
      bind_tensor(slot.present_key, caches_.at(slot.key).memory.get());
      bind_tensor(slot.present_value, caches_.at(slot.value).memory.get());
    }
    return call;
  }

  // Sets the shapes of a call with S = `tokens`.
  void set_tokens(nvinfer1::IExecutionContext& context, Call& call, std::int64_t tokens) {
    const auto set_shape = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
      must(context.setInputShape(name.c_str(), dims(shape)), "take the shape of " + name);
    };
    set_shape(kInputIds, {batch_, tokens});
    set_shape(kPositionIds, {batch_, tokens});
    set_shape(kCacheWrite, {batch_});
    set_shape(kLogitsIndex, {batch_});
    for (const CacheSlot& slot : engine_.cache) {
      const std::vector<std::int64_t> shape{batch_, slot.num_key_value_heads, *engine_.capacity, slot.head_dim};
      set_shape(slot.key, shape);
      set_shape(slot.value, shape);
    }
    const char* unknown = nullptr;
    if (context.inferShapes(1, &unknown) != 0) {
      logger_.fail(std::string("TensorRT lacks the shape of ") + (unknown == nullptr ? "an input" : unknown));
    }
    call.tokens = tokens;
  }

  void allocate_caches(std::int64_t batch) {
    std::size_t available = 0, total = 0;
    cuda_.check(cuda_.cudaMemGetInfo(&available, &total), "say how much memory is free");
    const std::int64_t needed = engine_.cache_bytes(batch, *engine_.capacity);
    if (static_cast<std::uint64_t>(needed) > available) {
      throw Error("not enough GPU memory for a KV cache of " + std::to_string(batch) + " x " +
                  std::to_string(*engine_.capacity) + " tokens: expected " + std::to_string(needed) + " bytes, found " +
                  std::to_string(available));
    }
    for (const CacheSlot& slot : engine_.cache) {
      const std::int64_t bytes =
          product({batch, slot.num_key_value_heads, *engine_.capacity, slot.head_dim, engine_.dtype_bytes()});
      for (const std::string& name : {slot.key, slot.value}) {
        caches_[name] = {device_memory(cuda_, bytes), static_cast<std::size_t>(bytes)};
      }
    }
  }

  // Holds the engine's tensors against its manifest, so that nothing is bound with a wrong size.
  void check_interface() {
    const std::string wrong = engine_.network.string() + ": the engine is not what its manifest says";
    if (!engine_.capacity) throw Error(engine_.manifest() + ": an engine of TensorRT has a cache of fixed capacity");
    using Tensor = std::pair<nvinfer1::DataType, std::vector<std::int64_t>>;
    std::map<std::string, Tensor> expected, found;
    const std::int64_t any = -1, batch = engine_.batch.value_or(any);
    expected[kInputIds] = expected[kPositionIds] = {nvinfer1::DataType::kINT64, {batch, any}};
    expected[kCacheWrite] = expected[kLogitsIndex] = {nvinfer1::DataType::kINT64, {batch}};
    expected[kLogits] = {nvinfer1::DataType::kFLOAT, {batch, engine_.vocab_size}};
    expected[kNextTokens] = {nvinfer1::DataType::kINT64, {batch}};
    for (const CacheSlot& slot : engine_.cache) {
      const Tensor cache{data_type(engine_), {batch, slot.num_key_value_heads, *engine_.capacity, slot.head_dim}};
      for (const auto& [past, present] : {std::pair(slot.key, slot.present_key), {slot.value, slot.present_value}}) {
        expected[past] = expected[present] = cache;
        const char* alias = plan_->getAliasedInputTensor(present.c_str());
        if (alias == nullptr || alias != past) throw Error(wrong + ": it does not update " + present + " in place");
      }
    }
    for (std::int32_t index = 0; index < plan_->getNbIOTensors(); ++index) {
      const char* name = plan_->getIOTensorName(index);
      const nvinfer1::Dims shape = plan_->getTensorShape(name);
      found[name] = {plan_->getTensorDataType(name), {shape.d, shape.d + std::max(shape.nbDims, 0)}};
    }
    if (found != expected) throw Error(wrong);
  }

  // Chooses how many weights stay on the GPU, before there are contexts; returns whether all of them do. Only then can
  // a step be captured: else TensorRT copies weights, and waits for them, within it.
  bool set_streaming_budget() {
    if (!bool_field(engine_.options(), "weight_streaming", engine_.manifest())) return true;
    const std::int64_t all = plan_->getStreamableWeightsSize();
    const auto wanted = optional_integer_field(engine_.options(), "weight_streaming_budget", engine_.manifest());
    const std::int64_t budget = wanted ? std::min(*wanted, all) : plan_->getWeightStreamingAutomaticBudget();
    must(plan_->setWeightStreamingBudgetV2(budget), "stream weights with " + std::to_string(budget) + " bytes");
    return budget >= all;
  }

  void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind) const {
    cuda_.check(cuda_.cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream_.get()), "copy");
  }

  void synchronize() const { cuda_.check(cuda_.cudaStreamSynchronize(stream_.get()), "finish a step"); }

  void must(bool succeeded, const std::string& what) {
    if (!succeeded) logger_.fail("TensorRT does not " + what);
  }

  // In this order: contexts go before the engine, and that before the runtime.
  const Engine engine_;
  Logger logger_;
  const Cuda cuda_;
  const TensorRt tensorrt_;
  const CudaOwned<CUstream_st> stream_;
  const CudaOwned<CUevent_st> began_, ended_;
  std::unique_ptr<nvinfer1::ICudaEngine> plan_;
  bool is_capturable_ = false;
  CudaOwned<void> activations_;
  std::map<std::string, Cache> caches_;  // by input name, [B, Hkv, C, d]
  Phase prefill_{"prefill", {}, nullptr, std::nullopt}, decode_{"decode", {}, nullptr, std::nullopt};
  std::int64_t batch_ = 0, filled_ = 0;
  Clock::duration run_{};
  double device_ms_ = 0;
};

}  // namespace

std::unique_ptr<Runner> open_tensorrt(const Engine& engine, const RunnerOptions& options) {
  return std::make_unique<TensorRtRunner>(engine, options);
}

}  // namespace fuselage
