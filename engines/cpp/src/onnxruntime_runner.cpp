#include "onnxruntime_runner.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "choice.h"
#include "contract.h"
#include "error.h"
#include "onnxruntime_api.h"

namespace fuselage {
namespace {

using Shape = std::vector<std::int64_t>;

// Zero-filled memory that begins at a multiple of kBufferAlignment. calloc gives pages that nobody has touched, as
// numpy does: the first call pays for them in both programs.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t bytes) : raw_(std::calloc(1, static_cast<std::size_t>(bytes) + kBufferAlignment)) {
    if (raw_ == nullptr) throw Error("not enough memory for a buffer of " + std::to_string(bytes) + " bytes");
    const auto address = reinterpret_cast<std::uintptr_t>(raw_.get());
    data_ = static_cast<char*>(raw_.get()) + (-address & (kBufferAlignment - 1));
  }

  char* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> raw_;
  char* data_ = nullptr;
};

struct Tensor {
  Buffer buffer;
  std::int64_t bytes;
  ort::Owned<ort::Value> value;  // looks at `buffer`
};

// Everything bound for calls of one S. ONNX Runtime reads and writes these tensors where they are.
struct Call {
  std::int64_t tokens;  // S
  Tensor input_ids, position_ids;
  Tensor cache_write, logits_index;
  Tensor logits;
  ort::Owned<ort::IoBinding> binding;
};

int element_type(const Engine& engine) {
  if (engine.dtype == "float32") return ort::kFloat;
  if (engine.dtype == "float16") return ort::kFloat16;
  throw Error(engine.manifest() + ": not a dtype that runs here: expected float32 or float16, found " + engine.dtype);
}

std::string minimum_version(const Engine& engine) {
  // The build proved that the network runs, and with which kernels: an older library than the build's never did.
  const auto built_with = engine.runtime.find("onnxruntime");
  const bool newer =
      built_with != engine.runtime.end() && ort::is_version_at_least(built_with->second, kMinOnnxRuntime);
  return newer ? built_with->second : kMinOnnxRuntime;
}

class OnnxRuntimeRunner final : public Runner {
 public:
  OnnxRuntimeRunner(const Engine& engine, const RunnerOptions& options)
      : engine_(engine),
        type_(element_type(engine)),
        api_(options.library.empty() ? "libonnxruntime.so.1" : options.library, minimum_version(engine)),
        env_(api_.make<ort::CreateEnv, ort::Env>(ort::kLogWarning, "fuselage")),
        session_(session(options.threads)),
        run_options_(api_.make<ort::CreateRunOptions, ort::RunOptions>()),
        memory_(api_.make<ort::CreateCpuMemoryInfo, ort::MemoryInfo>(ort::kDeviceAllocator, ort::kDefaultMemory)) {
    check_interface();
  }

  void start(std::int64_t batch) override {
    batch_ = batch;
    filled_ = 0;
    capacity_ = 0;
    calls_.clear();
    caches_.clear();
    if (engine_.capacity) make_room(*engine_.capacity);
  }

  void prefill(const std::vector<std::int64_t>& input_ids, std::vector<std::int64_t>& next) override {
    choose(step(input_ids), engine_.vocab_size, next);
  }
  void decode(std::vector<std::int64_t>& tokens) override { choose(step(tokens), engine_.vocab_size, tokens); }
  CallTimes times() const override { return {run_, std::nullopt}; }
  std::map<std::string, std::string> versions() const override { return {{"onnxruntime", api_.version()}}; }
  std::string device() const override { return engine_.device(); }

 private:
  ort::Owned<ort::Session> session(std::optional<std::int64_t> threads) const {
    const auto options = api_.make<ort::CreateSessionOptions, ort::SessionOptions>();
    // 0: one per physical core
    api_.call<ort::SetIntraOpNumThreads>(options.get(), static_cast<int>(threads.value_or(0)));
    for (const auto& [key, value] : texts_field(engine_.options(), "session", engine_.manifest())) {
      api_.call<ort::AddSessionConfigEntry>(options.get(), key.c_str(), value.c_str());
    }
    return api_.make<ort::CreateSession, ort::Session>(env_.get(), engine_.network.c_str(), options.get());
  }

  // Holds the network's inputs and outputs against the engine's manifest, so that nothing is bound with a wrong size.
  void check_interface() const {
    const std::int64_t any = -1;
    const std::int64_t batch = engine_.batch.value_or(any), capacity = engine_.capacity.value_or(any);
    std::map<std::string, std::pair<int, Shape>> inputs, outputs;
    inputs[kInputIds] = inputs[kPositionIds] = {ort::kInt64, {batch, any}};
    inputs[kCacheWrite] = inputs[kLogitsIndex] = {ort::kInt64, {batch}};
    outputs[kLogits] = {ort::kFloat, {batch, engine_.vocab_size}};
    for (const CacheSlot& slot : engine_.cache) {
      const Shape shape{batch, slot.num_key_value_heads, capacity, slot.head_dim};
      inputs[slot.key] = inputs[slot.value] = outputs[slot.present_key] = outputs[slot.present_value] = {type_, shape};
    }
    auto found = described<ort::GetOutputCount, ort::GetOutputName, ort::GetOutputTypeInfo>();
    found.erase(kNextTokens);  // of networks for TensorRT; nobody reads it here
    if (described<ort::GetInputCount, ort::GetInputName, ort::GetInputTypeInfo>() != inputs || found != outputs) {
      throw Error(engine_.network.string() + ": the network is not what its manifest says");
    }
  }

  template <typename GetCount, typename GetName, typename GetTypeInfo>
  std::map<std::string, std::pair<int, Shape>> described() const {
    ort::Allocator* allocator = nullptr;
    api_.call<ort::GetDefaultAllocator>(&allocator);
    std::size_t count = 0;
    api_.call<GetCount>(session_.get(), &count);
    std::map<std::string, std::pair<int, Shape>> tensors;
    for (std::size_t index = 0; index < count; ++index) {
      char* name = nullptr;
      api_.call<GetName>(session_.get(), index, allocator, &name);
      auto& [type, shape] = tensors[name];
      api_.call<ort::AllocatorFree>(allocator, static_cast<void*>(name));
      const auto info = api_.make<GetTypeInfo, ort::TypeInfo>(session_.get(), index);
      const ort::TensorInfo* tensor = nullptr;
      api_.call<ort::CastTypeInfoToTensorInfo>(info.get(), &tensor);
      if (tensor == nullptr) continue;  // a sequence or a map: element type 0 is nothing we expect
      api_.call<ort::GetElementType>(tensor, &type);
      std::size_t rank = 0;
      api_.call<ort::GetDimensionsCount>(tensor, &rank);
      shape.resize(rank);
      api_.call<ort::GetDimensions>(tensor, shape.data(), rank);
    }
    return tensors;
  }

  // Appends input_ids [B, S]; returns the logits of each row's last token, [B, V], valid until the next call.
  const float* step(const std::vector<std::int64_t>& input_ids) {
    const std::int64_t tokens = static_cast<std::int64_t>(input_ids.size()) / batch_;
    make_room(filled_ + tokens);
    Call& call = bound_call(tokens);
    std::copy(input_ids.begin(), input_ids.end(), call.input_ids.buffer.as<std::int64_t>());
    auto* positions = call.position_ids.buffer.as<std::int64_t>();
    for (std::int64_t i = 0; i < batch_ * tokens; ++i) positions[i] = filled_ + i % tokens;
    std::fill_n(call.cache_write.buffer.as<std::int64_t>(), batch_, filled_);
    std::fill_n(call.logits_index.buffer.as<std::int64_t>(), batch_, tokens - 1);
    const auto began = Clock::now();
    api_.call<ort::RunWithBinding>(session_.get(), run_options_.get(), call.binding.get());
    run_ = Clock::now() - began;
    filled_ += tokens;
    return call.logits.buffer.as<float>();
  }

  // Grows the caches to hold `needed` positions, zero-filled: a NaN there would spread through the mask.
  void make_room(std::int64_t needed) {
    if (needed <= capacity_) return;
    const std::int64_t capacity = engine_.capacity.value_or((needed + kCacheStep - 1) / kCacheStep * kCacheStep);
    check_memory(engine_.cache_bytes(batch_, capacity),
                 "a KV cache of " + std::to_string(batch_) + " x " + std::to_string(capacity) + " tokens");
    calls_.clear();  // they look at the old caches
    for (const CacheSlot& slot : engine_.cache) {
      for (const std::string& name : {slot.key, slot.value}) {
        Tensor grown = tensor({batch_, slot.num_key_value_heads, capacity, slot.head_dim}, type_);
        if (const auto old = caches_.find(name); old != caches_.end()) {
          const std::int64_t heads = batch_ * slot.num_key_value_heads;
          const std::int64_t old_bytes = old->second.bytes / heads, new_bytes = grown.bytes / heads;
          for (std::int64_t head = 0; head < heads; ++head) {
            std::memcpy(grown.buffer.data() + head * new_bytes, old->second.buffer.data() + head * old_bytes,
                        static_cast<std::size_t>(old_bytes));
          }
        }
        caches_.insert_or_assign(name, std::move(grown));
      }
    }
    capacity_ = capacity;
  }

  Call& bound_call(std::int64_t tokens) {
    if (const auto found = calls_.find(tokens); found != calls_.end()) return found->second;
    // One call of decode and one of prefill are kept; prefills of many lengths would keep many buffers.
    for (auto call = calls_.begin(); call != calls_.end();)
      call = call->first == 1 ? std::next(call) : calls_.erase(call);
    return calls_.emplace(tokens, bind(tokens)).first->second;
  }

  // Makes the tensors of a call with S = `tokens` and binds them, and each cache as both its past and its present.
  Call bind(std::int64_t tokens) {
    Call call{tokens,
              tensor({batch_, tokens}, ort::kInt64),
              tensor({batch_, tokens}, ort::kInt64),
              tensor({batch_}, ort::kInt64),
              tensor({batch_}, ort::kInt64),
              tensor({batch_, engine_.vocab_size}, ort::kFloat),
              api_.make<ort::CreateIoBinding, ort::IoBinding>(session_.get())};
    ort::IoBinding* binding = call.binding.get();
    const auto bind_input = [&](const std::string& name, const Tensor& tensor) {
      api_.call<ort::BindInput>(binding, name.c_str(), tensor.value.get());
    };
    const auto bind_output = [&](const std::string& name, const Tensor& tensor) {
      api_.call<ort::BindOutput>(binding, name.c_str(), tensor.value.get());
    };
    bind_input(kInputIds, call.input_ids);
    bind_input(kPositionIds, call.position_ids);
    bind_input(kCacheWrite, call.cache_write);
    bind_input(kLogitsIndex, call.logits_index);
    bind_output(kLogits, call.logits);
    for (const CacheSlot& slot : engine_.cache) {
      bind_input(slot.key, caches_.at(slot.key));
      bind_input(slot.value, caches_.at(slot.value));
      bind_output(slot.present_key, caches_.at(slot.key));
      bind_output(slot.present_value, caches_.at(slot.value));
    }
    return call;
  }

  Tensor tensor(const Shape& shape, int type) const {
    std::int64_t bytes = type == ort::kInt64 ? 8 : type == ort::kFloat ? 4 : 2;
    for (const std::int64_t size : shape) bytes = product({bytes, size});
    Buffer buffer(bytes);
    auto value = api_.make<ort::CreateTensorWithData, ort::Value>(memory_.get(), static_cast<void*>(buffer.data()),
                                                                  static_cast<std::size_t>(bytes), shape.data(),
                                                                  shape.size(), type);
    return {std::move(buffer), bytes, std::move(value)};
  }

  const Engine engine_;
  const int type_;  // of activations and KV cache
  const ort::Api api_;
  const ort::Owned<ort::Env> env_;
  const ort::Owned<ort::Session> session_;
  const ort::Owned<ort::RunOptions> run_options_;
  const ort::Owned<ort::MemoryInfo> memory_;
  std::int64_t batch_ = 0, filled_ = 0, capacity_ = 0;
  std::map<std::string, Tensor> caches_;  // by input name, [B, Hkv, capacity, d]
  std::map<std::int64_t, Call> calls_;    // by S: that of decode, and the last prefill's
  Clock::duration run_{};
};

}  // namespace

std::unique_ptr<Runner> open_onnxruntime(const Engine& engine, const RunnerOptions& options) {
  return std::make_unique<OnnxRuntimeRunner>(engine, options);
}

}  // namespace fuselage
