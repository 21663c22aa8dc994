// EDLM_HD: a function for the host and, where nvcc compiles it, for the GPU too.
#pragma once

#if defined(__CUDACC__)
#define EDLM_HD __host__ __device__
#else
#define EDLM_HD
#endif
