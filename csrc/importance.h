// From energies to the next state: arguments and kernels of select_candidate, resample and reverse_step. Free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edlm {

enum class Real { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Rows of numbers as they lie; strides are in elements.
struct Rows {
  const void* data;  // null: none
  Real type;
  int64_t stride_row, stride_column;
};

// One stream of uniforms a row. A stride of 0 is one step for all rows.
struct Streams {
  const int64_t* seed;
  int64_t seed_stride;
  const int64_t* offset;
  int64_t offset_stride;
};

struct SelectArgs {
  Rows energy;
  Rows correction;
  int64_t candidates;
  double log_candidates, log_others;  // log of candidates and of candidates - 1
  double temperature;                 // 0 is greedy
  Streams streams;
  int64_t* index;        // [batch]
  float* log_weights;    // [batch, candidates]
  float* ess;            // [batch]
  float* log_z;          // [batch]
  float* log_z_loo;      // [batch, candidates]
};

// In the order of SCHEMES in ops/importance.py.
enum Scheme : int64_t { kSystematic = 0, kStratified = 1, kMultinomial = 2, kResidual = 3 };

struct ResampleArgs {
  Rows log_weights;
  int64_t particles;
  Scheme scheme;
  Streams streams;
  int64_t* ancestors;  // [batch, particles]
};

struct ReverseArgs {
  int64_t length, candidates;
  const int64_t* xt;
  int64_t xt_stride_b, xt_stride_l;
  const int64_t* x0;
  int64_t x0_stride_b, x0_stride_k, x0_stride_l;
  const int64_t* index;  // one outside 0 .. candidates - 1 is clamped: the binding reports it
  int64_t index_stride;
  const void* open_time;
  bool is_double;  // open_time and s
  int64_t open_stride_b, open_stride_l;
  const void* s;
  int64_t s_stride;
  int64_t* xs;  // [batch, length]
};

static inline int64_t padded(int64_t n) { return (n + 7) / 8 * 8; }

// Scratch, a thread: the double numbers of one row.
static inline int64_t scratch_doubles(const SelectArgs& args) { return 2 * padded(args.candidates); }
static inline int64_t scratch_doubles(const ResampleArgs& args) { return padded(args.particles); }

// One instruction set's kernels. Rows [begin, end); the first of them that is bad, or -1. A row's bits depend on that row alone.
struct ImportanceKernels {
  int64_t (*select)(const SelectArgs&, int64_t begin, int64_t end, double* scratch);
  int64_t (*resample)(const ResampleArgs&, int64_t begin, int64_t end, double* scratch);
  // Positions [begin, end) of all sequences, one after the other.
  void (*reverse)(const ReverseArgs&, int64_t begin, int64_t end);
};

// The same on a GPU (cuda/importance.cu), asynchronously, on a stream; as sampling.h has it. *invalid becomes the first row that is bad, or -1.
extern "C" int edlm_cuda_select(const SelectArgs* args, int64_t batch, int64_t* invalid, void* stream);
extern "C" size_t edlm_cuda_resample_scratch(const ResampleArgs* args, int64_t batch);
extern "C" int edlm_cuda_resample(const ResampleArgs* args, void* scratch, int64_t batch, int64_t* invalid, void* stream);
extern "C" int edlm_cuda_reverse(const ReverseArgs* args, int64_t batch, int64_t* invalid, void* stream);

}  // namespace edlm
