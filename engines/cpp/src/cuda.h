// The CUDA runtime, opened by name so that the program starts without it, and handles that give themselves back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>

#include "system.h"

namespace fuselage {

class Cuda {
 public:
  // Opens the library and checks its version, which must be the headers', and that there is a GPU. Throws Error.
  explicit Cuda(const std::string& library);

  void check(cudaError_t code, const char* what) const;

// The header renames some functions (cudaEventElapsedTime_v2): the library is asked for the name after that.
#define FUSELAGE_TEXT(name) #name
#define FUSELAGE_CUDA_FUNCTION(name) \
  std::add_pointer_t<decltype(::name)> name = library_.function<decltype(::name)>(FUSELAGE_TEXT(name))

 private:
  Library library_;

 public:
  FUSELAGE_CUDA_FUNCTION(cudaEventCreate);
  FUSELAGE_CUDA_FUNCTION(cudaEventDestroy);
  FUSELAGE_CUDA_FUNCTION(cudaEventElapsedTime);
  FUSELAGE_CUDA_FUNCTION(cudaEventRecord);
  FUSELAGE_CUDA_FUNCTION(cudaFree);
  FUSELAGE_CUDA_FUNCTION(cudaFreeHost);
  FUSELAGE_CUDA_FUNCTION(cudaGetDeviceCount);
  FUSELAGE_CUDA_FUNCTION(cudaGetDeviceProperties);
  FUSELAGE_CUDA_FUNCTION(cudaGetErrorString);
  FUSELAGE_CUDA_FUNCTION(cudaGraphDestroy);
  FUSELAGE_CUDA_FUNCTION(cudaGraphExecDestroy);
  FUSELAGE_CUDA_FUNCTION(cudaGraphInstantiate);
  FUSELAGE_CUDA_FUNCTION(cudaGraphLaunch);
  FUSELAGE_CUDA_FUNCTION(cudaMalloc);
  FUSELAGE_CUDA_FUNCTION(cudaMallocHost);
  FUSELAGE_CUDA_FUNCTION(cudaMemcpyAsync);
  FUSELAGE_CUDA_FUNCTION(cudaMemGetInfo);
  FUSELAGE_CUDA_FUNCTION(cudaMemsetAsync);
  FUSELAGE_CUDA_FUNCTION(cudaRuntimeGetVersion);
  FUSELAGE_CUDA_FUNCTION(cudaStreamBeginCapture);
  FUSELAGE_CUDA_FUNCTION(cudaStreamCreateWithFlags);
  FUSELAGE_CUDA_FUNCTION(cudaStreamDestroy);
  FUSELAGE_CUDA_FUNCTION(cudaStreamEndCapture);
  FUSELAGE_CUDA_FUNCTION(cudaStreamSynchronize);

#undef FUSELAGE_CUDA_FUNCTION
#undef FUSELAGE_TEXT
};

template <typename Handle>
using CudaOwned = std::unique_ptr<Handle, std::function<void(Handle*)>>;

// Memory of the GPU and of the host, the latter such that copies are asynchronous. Throw Error.
CudaOwned<void> device_memory(const Cuda& cuda, std::int64_t bytes);
CudaOwned<void> host_memory(const Cuda& cuda, std::int64_t bytes);
CudaOwned<CUstream_st> make_stream(const Cuda& cuda);
CudaOwned<CUevent_st> make_event(const Cuda& cuda);

// Records what `enqueue` puts on the stream as a graph.
CudaOwned<CUgraphExec_st> capture(const Cuda& cuda, cudaStream_t stream, const std::function<void()>& enqueue);

}  // namespace fuselage
