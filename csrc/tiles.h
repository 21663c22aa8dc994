// What the families that read a vocabulary share: tiles of a row of logits, and how a row is described. Free of torch.
#pragma once

#include <cstdint>

#include "device.h"

namespace edlm {

// Logical columns of a tile. Part of the RNG contract: the first uniform of a draw picks a tile, the second a column in it.
constexpr int kTile = 512;
constexpr int kBlock = 64;
constexpr int kBlocksPerTile = kTile / kBlock;

// Rows of up to so many columns are read at once where they are finished, and have no tiles to keep.
constexpr int kSmallVocab = 128;

enum class DType { kFloat32, kBFloat16, kFloat16 };

// What one read of a tile leaves. The sums are of exp((x - max) / temperature) over blocks of 64 columns; model_sum is that of
// exp(x - max) over the tile, where it is asked for.
struct TileMass {
  float max;
  float block[kBlocksPerTile];
  float model_sum;
  double sum;  // of the blocks
};

EDLM_HD static inline int64_t num_tiles(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

// 1 / T, within what a normal float holds: a temperature below 1e-30 is as good as greedy, one above 1e30 as good as uniform.
EDLM_HD static inline double inverse_temperature(double t) { return t == 0 ? 1.0 : t < 1e-30 ? 1e30 : t > 1e30 ? 1e-30 : 1.0 / t; }

}  // namespace edlm
