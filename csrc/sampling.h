// K exact draws a row from one read of the logits: arguments and kernels, free of torch.
#pragma once

#include <cstdint>

namespace edlm {

// Logical columns of a tile. Part of the RNG contract: the first uniform of a draw picks a tile, the second a column in it.
constexpr int kTile = 512;
constexpr int kBlock = 64;  // a draw re-reads one block element by element
constexpr int kBlocksPerTile = kTile / kBlock;

enum class DType { kFloat32, kBFloat16 };

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
  int64_t num_samples;
  double temperature;          // 0 is greedy
  int64_t* tokens;             // [batch, num_samples, length]
  float* log_probs;            // the same
  float* model_log_probs;      // the same, or null where it would equal log_probs
};

// What one read of a tile leaves. Sums are of exp((x - max) / temperature), of its blocks of 64 columns, and model_sum that of
// exp(x - max) over the tile (not written at temperature 1).
struct TileMass {
  float max;
  float block[kBlocksPerTile];
  float model_sum;
};

static inline int64_t num_tiles(const SampleArgs& args) { return (args.vocab + kTile - 1) / kTile; }

// What draw() wants beside the tiles of its row.
static inline int64_t draw_scratch_doubles(const SampleArgs& args) { return num_tiles(args) + 8; }

// 1 / T, within what a normal float holds: a temperature below 1e-30 is as good as greedy, one above 1e30 as good as uniform.
static inline double inverse_temperature(const SampleArgs& args) {
  const double t = args.temperature;
  return t == 0 ? 1.0 : t < 1e-30 ? 1e30 : t > 1e30 ? 1e-30 : 1.0 / t;
}

// One instruction set's kernels. A row's bits depend on its logits alone: not on how rows or tiles are shared among threads.
struct SampleKernels {
  // Tiles [begin, end) of a row (b * length + l) into tiles[begin .. end).
  void (*tile_masses)(const SampleArgs&, int64_t row, int64_t begin, int64_t end, TileMass* tiles);
  // All draws of a row from its tiles. Returns -1, or a BadRow code after writing token 0 and NaN.
  int64_t (*draw)(const SampleArgs&, int64_t row, const TileMass* tiles, double* scratch);
};

}  // namespace edlm
