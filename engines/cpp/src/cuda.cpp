#include "cuda.h"

#include "error.h"

namespace fuselage {

Cuda::Cuda(const std::string& library)
    : library_(library.empty() ? "libcudart.so." + std::to_string(CUDART_VERSION / 1000) : library) {
  int version = 0, devices = 0;
  check(cudaRuntimeGetVersion(&version), "say its version");  // 13020 is 13.2
  if (version / 1000 != CUDART_VERSION / 1000) {  // structures are laid out in another way
    throw Error(library_.name() + ": CUDA of another version: expected " + std::to_string(CUDART_VERSION / 1000) +
                ", for which this program was built, found " + std::to_string(version / 1000));
  }
  check(cudaGetDeviceCount(&devices), "find a GPU");
  if (devices == 0) throw Error("CUDA finds no GPU");
}

void Cuda::check(cudaError_t code, const char* what) const {
  if (code != cudaSuccess) throw Error(std::string("CUDA cannot ") + what + ": " + cudaGetErrorString(code));
}

CudaOwned<void> device_memory(const Cuda& cuda, std::int64_t bytes) {
  void* memory = nullptr;
  cuda.check(cuda.cudaMalloc(&memory, static_cast<std::size_t>(bytes)), "allocate memory of the GPU");
  return {memory, [&cuda](void* address) { cuda.cudaFree(address); }};
}

CudaOwned<void> host_memory(const Cuda& cuda, std::int64_t bytes) {
  void* memory = nullptr;
  cuda.check(cuda.cudaMallocHost(&memory, static_cast<std::size_t>(bytes)), "allocate memory of the host");
  return {memory, [&cuda](void* address) { cuda.cudaFreeHost(address); }};
}

CudaOwned<CUstream_st> make_stream(const Cuda& cuda) {
  cudaStream_t stream = nullptr;
  // Non-blocking: work on the default stream, if anybody puts some there, does not hold ours up.
  cuda.check(cuda.cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream");
  return {stream, [&cuda](cudaStream_t made) { cuda.cudaStreamDestroy(made); }};
}

CudaOwned<CUevent_st> make_event(const Cuda& cuda) {
  cudaEvent_t event = nullptr;
  cuda.check(cuda.cudaEventCreate(&event), "make an event");
  return {event, [&cuda](cudaEvent_t made) { cuda.cudaEventDestroy(made); }};
}

CudaOwned<CUgraphExec_st> capture(const Cuda& cuda, cudaStream_t stream, const std::function<void()>& enqueue) {
  // Thread-local: the runtime's other threads may allocate while this one captures.
  cuda.check(cuda.cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin a graph");
  cudaGraph_t graph = nullptr;
  enqueue();
  cuda.check(cuda.cudaStreamEndCapture(stream, &graph), "record a step as a graph");
  const CudaOwned<CUgraph_st> recorded(graph, [&cuda](cudaGraph_t made) { cuda.cudaGraphDestroy(made); });
  cudaGraphExec_t executable = nullptr;
  cuda.check(cuda.cudaGraphInstantiate(&executable, graph, 0), "make a graph executable");
  return {executable, [&cuda](cudaGraphExec_t made) { cuda.cudaGraphExecDestroy(made); }};
}

}  // namespace fuselage
