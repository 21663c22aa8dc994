// K exact draws a row from one read of the logits: arguments and kernels, free of torch.
#pragma once

#include <cstddef>

#include "tiles.h"

namespace edlm {

// Codes of a bad row; a kernel reports 4 * row + code, the smallest of all.
enum BadRow : int64_t { kNonFinite = 0, kNoSupport = 1, kOutOfRange = 2 };

// Rows are (b, l), b < batch, l < length. Strides are in elements; the vocabulary has unit stride.
struct SampleArgs {
  const void* logits;
  DType dtype;
  int64_t batch, length, vocab;
  int64_t stride_b, stride_l;
  const int64_t* seed;  // [batch]
  const int64_t* offset;
  int64_t offset_stride;       // 1: one a sequence; 0: one for all
  const int64_t* position;     // [batch * length], or null: l
  const int64_t* forbidden;    // [num_forbidden], ids in any order, may repeat; those outside the vocabulary are ignored
  int64_t num_forbidden;
  int64_t mask;                // excluded too; -1: none. Rows whose xt it is are drawn, the others keep their token. For the GPU's kernels:
  const int64_t* xt;           // [batch * length], or null: all rows are drawn. On a CPU the binding lists them
  const bool* active;          // the same shape, or null: a row where it is false is not drawn
  int64_t num_samples;
  double temperature;          // 0 is greedy
  int64_t top_k;               // 0: all
  double top_p;                // 1: all
  double min_p;                // 0: all
  int64_t* tokens;             // [batch, num_samples, length]
  float* log_probs;            // the same
  float* model_log_probs;      // the same, or null where it would equal log_probs
};

static inline bool is_filtered(const SampleArgs& args) {
  return args.temperature > 0 && (args.top_k > 0 || args.top_p < 1 || args.min_p > 0);
}

// Scratch of draw(), a thread: prefixes of tile masses, and a key for every column where a filter may have to sort them out.
static inline int64_t draw_scratch_doubles(const SampleArgs& args) {
  return num_tiles(args.vocab) + 8 + (is_filtered(args) ? args.vocab / 2 + kTile : 0);
}

// One instruction set's kernels. A row's bits depend on its logits alone: not on how rows or tiles are shared among threads.
struct SampleKernels {
  // Tiles [begin, end) of a row (b * length + l) into tiles[begin .. end).
  void (*tile_masses)(const SampleArgs&, int64_t row, int64_t begin, int64_t end, TileMass* tiles);
  // All draws of a row from its tiles, which a filter rewrites. Returns -1, or a BadRow code after writing token 0 and NaN.
  int64_t (*draw)(const SampleArgs&, int64_t row, TileMass* tiles, double* scratch);
  // The law of the first draw: the probability of each column, as the numbers that draw() compares uniforms with give it. For tests.
  int64_t (*law)(const SampleArgs&, int64_t row, TileMass* tiles, double* scratch, double* probs);
};

// The same on a GPU (cuda/sampling.cu), asynchronously, on a stream. All pointers are of the device; `scratch` has as many bytes as the first
// says, from a multiple of 16 on. *invalid becomes the smallest 4 * row + code of a bad row, or -1. Returns a cudaError_t.
extern "C" size_t edlm_cuda_sample_scratch(const SampleArgs* args);
extern "C" int edlm_cuda_sample(const SampleArgs* args, void* scratch, int64_t* invalid, void* stream);

}  // namespace edlm
