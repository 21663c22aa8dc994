// Rows of logits shared among torch's threads: for bindings. What a row comes to depends on none of this.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace edlm {

// For i < n: read(i, begin, end, tiles) for the tiles of row i, then finish(i, tiles, scratch), `scratch` being doubles of a thread's own.
//
// Many rows: a thread takes whole rows, and their tiles stay in its cache. Few: threads share the tiles of all rows, then the rows.
template <class Read, class Finish>
void for_each_row(int64_t n, int64_t vocab, int64_t scratch_doubles, const Read& read, const Finish& finish) {
  const int64_t tiles = num_tiles(vocab), threads = torch::stable::get_num_threads();
  if (n >= 4 * threads || tiles < 8) {
    const int64_t grain = std::max<int64_t>(1, 16384 / vocab);  // small rows travel together
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      std::vector<TileMass> mass(tiles);
      std::vector<double> scratch(scratch_doubles);
      for (int64_t i = begin; i < end; ++i) {
        read(i, 0, tiles, mass.data());
        finish(i, mass.data(), scratch.data());
      }
    });
    return;
  }
  std::vector<TileMass> mass(n * tiles);
  torch::stable::parallel_for(0, n * tiles, 16, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / tiles, first = begin % tiles, last = std::min(tiles, first + end - begin);
      read(i, first, last, mass.data() + i * tiles);
      begin += last - first;
    }
  });
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(scratch_doubles);
    for (int64_t i = begin; i < end; ++i) finish(i, mass.data() + i * tiles, scratch.data());
  });
}

}  // namespace edlm
