// Log-probabilities of given tokens, and their gradients: arguments and kernels, free of torch.
#pragma once

#include <cstddef>

#include "tiles.h"

namespace edlm {

// Rows are (b, l), b < batch, l < length; row r = b * length + l. Strides are in elements; the vocabulary has unit stride.
struct LogProbArgs {
  const void* logits;
  DType dtype;
  int64_t batch, length, vocab;
  int64_t stride_b, stride_l;
  const int64_t* tokens;  // [rows, num_tokens]
  int64_t num_tokens;
  const int64_t* forbidden;  // [num_forbidden]; those outside the vocabulary are ignored
  int64_t num_forbidden;
  double temperature;  // > 0
  float* log_probs;    // [rows, num_tokens]
  float* stats;        // [rows, 2]: the maximum of the row, and the log of the sum of exp((x - maximum) / temperature)
  double* running;     // [rows, 3], for fold(): maximum, sum and logit of the token, over the columns so far
  const float* grad;   // [rows, num_tokens], of log_probs
  void* grad_logits;   // of the dtype of the logits; may be the logits themselves
  int64_t grad_stride;
};

struct LogProbKernels {
  // Tiles [begin, end) of a row into tiles[begin .. end).
  void (*tile_masses)(const LogProbArgs&, int64_t row, int64_t begin, int64_t end, TileMass* tiles);
  // log_probs and stats of a row from its tiles (not looked at up to kSmallVocab columns); NaN where it holds NaN or +inf, or nothing finite. False: an id is out of range.
  bool (*gather)(const LogProbArgs&, int64_t row, const TileMass* tiles);
  // Folds a chunk of the vocabulary into `running`: tokens (one a row) count from the chunk's first column, and may lie outside.
  void (*fold)(const LogProbArgs&, int64_t row, const TileMass* tiles);
  // grad_logits of a row's tiles [begin, end), from stats. Tokens outside the vocabulary are ignored.
  void (*backward)(const LogProbArgs&, int64_t row, int64_t begin, int64_t end);
};

// The same on a GPU (cuda/log_probs.cu), asynchronously, on a stream; as sampling.h has it. *invalid becomes the first row with an id out of
// range, or -1. fold() and backward() are over all rows.
extern "C" size_t edlm_cuda_gather_scratch(const LogProbArgs* args);
extern "C" int edlm_cuda_gather(const LogProbArgs* args, void* scratch, int64_t* invalid, void* stream);
extern "C" int edlm_cuda_fold(const LogProbArgs* args, void* stream);
extern "C" int edlm_cuda_backward(const LogProbArgs* args, void* stream);

}  // namespace edlm
