// The C ABI of ONNX Runtime, by slot number.
//
// The library in the Python wheel exports one function, OrtGetApiBase; all others are in a table of function pointers
// that ONNX Runtime only ever appends to. No package registry carries the header that names them, so the slots that
// this program uses stand here, counted from 0. Numbers and signatures are those of the public onnxruntime_c_api.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "system.h"

namespace fuselage::ort {

// What the library hands out and only it looks into.
struct Status;
struct Env;
struct MemoryInfo;
struct Session;
struct Value;
struct RunOptions;
struct TypeInfo;
struct TensorInfo;
struct SessionOptions;
struct IoBinding;
struct Allocator;

template <int Index, typename Signature>
struct Slot;

template <int Index, typename Result, typename... Arguments>
struct Slot<Index, Result(Arguments...)> {
  static constexpr int index = Index;
  using Function = Result (*)(Arguments...);
};

using GetErrorMessage = Slot<2, const char*(const Status*)>;
using CreateEnv = Slot<3, Status*(int log_level, const char* id, Env**)>;
using CreateSession = Slot<7, Status*(const Env*, const char* path, const SessionOptions*, Session**)>;
using CreateSessionOptions = Slot<10, Status*(SessionOptions**)>;
using SetIntraOpNumThreads = Slot<24, Status*(SessionOptions*, int)>;
using GetInputCount = Slot<30, Status*(const Session*, std::size_t*)>;
using GetOutputCount = Slot<31, Status*(const Session*, std::size_t*)>;
using GetInputTypeInfo = Slot<33, Status*(const Session*, std::size_t, TypeInfo**)>;
using GetOutputTypeInfo = Slot<34, Status*(const Session*, std::size_t, TypeInfo**)>;
using GetInputName = Slot<36, Status*(const Session*, std::size_t, Allocator*, char**)>;
using GetOutputName = Slot<37, Status*(const Session*, std::size_t, Allocator*, char**)>;
using CreateRunOptions = Slot<39, Status*(RunOptions**)>;
using CreateTensorWithData = Slot<49, Status*(const MemoryInfo*, void* data, std::size_t bytes,
                                              const std::int64_t* shape, std::size_t rank, int element_type, Value**)>;
using CastTypeInfoToTensorInfo = Slot<55, Status*(const TypeInfo*, const TensorInfo**)>;  // null: not a tensor
using GetElementType = Slot<60, Status*(const TensorInfo*, int*)>;
using GetDimensionsCount = Slot<61, Status*(const TensorInfo*, std::size_t*)>;
using GetDimensions = Slot<62, Status*(const TensorInfo*, std::int64_t*, std::size_t)>;  // -1: symbolic
using CreateCpuMemoryInfo = Slot<69, Status*(int allocator_type, int memory_type, MemoryInfo**)>;
using AllocatorFree = Slot<76, Status*(Allocator*, void*)>;
using GetDefaultAllocator = Slot<78, Status*(Allocator**)>;  // never released
using ReleaseStatus = Slot<93, void(Status*)>;
using AddSessionConfigEntry = Slot<130, Status*(SessionOptions*, const char* key, const char* value)>;
using RunWithBinding = Slot<133, Status*(Session*, const RunOptions*, const IoBinding*)>;
using CreateIoBinding = Slot<134, Status*(Session*, IoBinding**)>;
using BindInput = Slot<136, Status*(IoBinding*, const char* name, const Value*)>;
using BindOutput = Slot<137, Status*(IoBinding*, const char* name, const Value*)>;

// Which slot gives a handle back.
template <typename Handle>
struct Release;
template <>
struct Release<Env> : Slot<92, void(Env*)> {};
template <>
struct Release<MemoryInfo> : Slot<94, void(MemoryInfo*)> {};
template <>
struct Release<Session> : Slot<95, void(Session*)> {};
template <>
struct Release<Value> : Slot<96, void(Value*)> {};
template <>
struct Release<RunOptions> : Slot<97, void(RunOptions*)> {};
template <>
struct Release<TypeInfo> : Slot<98, void(TypeInfo*)> {};
template <>
struct Release<SessionOptions> : Slot<100, void(SessionOptions*)> {};
template <>
struct Release<IoBinding> : Slot<135, void(IoBinding*)> {};

// enum ONNXTensorElementDataType
inline constexpr int kFloat = 1, kInt64 = 7, kFloat16 = 10;
inline constexpr int kLogWarning = 2;       // enum OrtLoggingLevel
inline constexpr int kDeviceAllocator = 0;  // enum OrtAllocatorType
inline constexpr int kDefaultMemory = 0;    // enum OrtMemType

class Api;

template <typename Handle>
struct Releaser {
  const Api* api;
  void operator()(Handle* handle) const;
};
template <typename Handle>
using Owned = std::unique_ptr<Handle, Releaser<Handle>>;

class Api {
 public:
  // Opens the library and refuses one that is older than `least` (e.g. "1.25"). Throws Error.
  Api(const std::string& library, const std::string& least);

  const std::string& version() const { return version_; }

  template <typename S>
  typename S::Function function() const {
    return reinterpret_cast<typename S::Function>(table_[S::index]);
  }

  // Calls a slot that answers with a status; throws Error with the library's message.
  template <typename S, typename... Arguments>
  void call(Arguments... arguments) const {
    if (Status* status = function<S>()(arguments...)) fail(status);
  }

  // The same for a slot whose last argument takes a new handle.
  template <typename S, typename Handle, typename... Arguments>
  Owned<Handle> make(Arguments... arguments) const {
    Handle* handle = nullptr;
    call<S>(arguments..., &handle);
    return Owned<Handle>(handle, Releaser<Handle>{this});
  }

 private:
  [[noreturn]] void fail(Status* status) const;

  Library library_;
  std::string version_;
  void* const* table_ = nullptr;
};

template <typename Handle>
void Releaser<Handle>::operator()(Handle* handle) const {
  api->function<Release<Handle>>()(handle);
}

// Whether version `text` ("1.32.0") is at least `least` ("1.25"); parts that are not there count as 0.
bool is_version_at_least(const std::string& text, const std::string& least);

}  // namespace fuselage::ort
