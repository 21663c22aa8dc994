// What a launcher's status means, for bindings that know nothing of the CUDA runtime.
#include "launch.cuh"

extern "C" const char* edlm_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
