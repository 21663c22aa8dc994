// top-k, top-p, min-p of a row, in this order, by the block that has its tiles. As csrc/cpu/filters.h: a cut in the order of the logits, larger
// ones first, the lower id among equals.
//
// The cut is found by histograms: the first has bins of equal width in the logit, which spreads columns well; the bin where the running
// weight reaches its target is then split by the bits of its floats, eight at a time, until all that are left are equal. Masses are
// whole numbers of 2^-46 or so of the largest, so that atomic additions come to the same sum in any order.
#pragma once

#include "../sampling.h"
#include "tiles.cuh"

namespace edlm {

constexpr int kBins = 256;

struct Histogram {
  unsigned long long mass[kBins];
  unsigned count[kBins];
  // What thread 0 finds, for all.
  unsigned low, high;  // keys of the bin where the target is reached
  double before;       // weight above it
  int is_found;
};

// Weights of the columns: one each, or the softmax's mass.
struct Weights {
  bool by_mass;
  double max, inverse;  // of the softmax
  double unit, per_unit;  // whole numbers a unit of mass, a power of two; and one over it

  __device__ double mass_of(float x) const { return exp((static_cast<double>(x) - max) * inverse); }
  __device__ unsigned long long whole(float x) const { return static_cast<unsigned long long>(mass_of(x) * unit + 0.5); }
  __device__ double in_bin(const Histogram& h, int bin) const { return by_mass ? static_cast<double>(h.mass[bin]) * per_unit : h.count[bin]; }
};

// Keys above `key`, and the first `ties` columns whose key it is.
struct Cut {
  unsigned key;
  int ties, equal;  // equal: columns whose key it is
};

// Calls add(x) for every column of the row that is finite, by all threads; tiles without one as large as `least` are left out.
template <class T, class Add>
__device__ void for_each_column(const Row<T>& row, const TileMass* tiles, int n, float least, const Add& add) {
#pragma unroll 1
  for (int t = warp_of(); t < n; t += kWarps) {
    if (tiles[t].max < least || tiles[t].max == kMinusInf) continue;
#pragma unroll 1
    for (int column = t * kTile + lane_of(); column < (t + 1) * kTile; column += kLanes) {
      const float x = row.at(column);
      if (x > kMinusInf) add(x);
    }
  }
}

__device__ inline void clear(Histogram& h) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) h.mass[i] = 0, h.count[i] = 0;
  __syncthreads();
}

__device__ inline void add_to(Histogram& h, int bin, float x, const Weights& weights) {
  atomicAdd(&h.count[bin], 1u);
  if (weights.by_mass) atomicAdd(&h.mass[bin], weights.whole(x));
}

// By thread 0: the bin, from above, where the running weight reaches the target; the lowest that has columns where none does, be it by
// rounding. h.before grows by what lies above it.
__device__ inline int find_bin(Histogram& h, const Weights& weights, double target) {
  int found = 0;
  double before = h.before;
  for (int bin = kBins - 1; bin >= 0; --bin) {
    if (h.count[bin] == 0) continue;
    found = bin;
    h.before = before;
    before += weights.in_bin(h, bin);
    if (before >= target) break;
  }
  return found;
}

// Splits the keys low .. high until all that are left are equal; weight `before` lies above them.
template <class T>
__device__ Cut split_keys(const Row<T>& row, const TileMass* tiles, int n, const Weights& weights, double target, Histogram& h) {
  for (;;) {
    const unsigned low = h.low, high = h.high;
    const int undecided = low == high ? 0 : 32 - __clz(static_cast<int>(high - low)), shift = undecided > 8 ? undecided - 8 : 0;
    clear(h);
    for_each_column(row, tiles, n, float_of(low), [&](float x) {
      const unsigned key = key_of(x);
      if (key >= low && key <= high) add_to(h, static_cast<int>((key - low) >> shift), x, weights);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      const int bin = find_bin(h, weights, target);
      const unsigned first = low + (static_cast<unsigned>(bin) << shift), last = first + ((1u << shift) - 1);
      h.low = first;
      h.high = last < high ? last : high;
      h.is_found = bin;
    }
    __syncthreads();
    if (shift > 0) continue;
    const double each = weights.by_mass ? weights.mass_of(float_of(h.low)) : 1.0;
    const int equal = static_cast<int>(h.count[h.is_found]);
    const double ties = each > 0 ? ceil((target - h.before) / each) : 1.0;
    const Cut cut{h.low, ties < 1 ? 1 : ties > equal ? equal : static_cast<int>(ties), equal};
    __syncthreads();
    return cut;
  }
}

// Where, in descending order, the running weight of the row's columns reaches the target. `depth`: how far below the maximum that is likely
// to be; it is found wherever it is.
template <class T>
__device__ Cut select_cut(const Row<T>& row, const TileMass* tiles, int n, const Weights& weights, double target, float depth, Histogram& h) {
  const float max = static_cast<float>(weights.max), least = max - depth, scale = (kBins - 1) / depth;
  const bool is_linear = depth > 1e-30f && depth < 1e30f && least < max;
  // Bins of equal width; the lowest has everything below `least`, so that any float is in one.
  const auto bin_of = [&](float x) {
    const float at = (x - least) * scale;
    return at >= 0 ? static_cast<int>(fminf(at, kBins - 2.0f)) + 1 : 0;
  };
  if (threadIdx.x == 0) h.before = 0, h.low = key_of(-3.402823466e38f), h.high = key_of(max);
  __syncthreads();
  if (is_linear) {
    clear(h);
    for_each_column(row, tiles, n, kMinusInf, [&](float x) { add_to(h, bin_of(x), x, weights); });
    __syncthreads();
    if (threadIdx.x == 0) {
      const int bin = find_bin(h, weights, target);
      // The keys of that bin: the floats where bin_of, which never falls, changes.
      const auto first_key = [&](int wanted) {
        unsigned below = key_of(kMinusInf), from = key_of(max);
        while (from - below > 1) {
          const unsigned middle = below + (from - below) / 2;
          (bin_of(float_of(middle)) >= wanted ? from : below) = middle;
        }
        return from;
      };
      if (bin > 0) h.low = first_key(bin);
      if (bin < bin_of(max)) h.high = first_key(bin + 1) - 1;
    }
    __syncthreads();
  }
  return split_keys(row, tiles, n, weights, target, h);
}

// The least float x with (x - max) / T >= log(min_p), as a key.
__device__ inline unsigned min_p_key(double min_p, const Weights& softmax) {
  const double line = log(min_p);
  unsigned fails = key_of(kMinusInf), passes = key_of(static_cast<float>(softmax.max));
  while (passes - fails > 1) {
    const unsigned middle = fails + (passes - fails) / 2;
    ((static_cast<double>(float_of(middle)) - softmax.max) * softmax.inverse >= line ? passes : fails) = middle;
  }
  return passes;
}

// The column of the cut's last equal that stays. tile.model_sum is free for a count by then.
template <class T>
__device__ int find_tie_end(const Row<T>& row, TileMass* tiles, int n, const Cut& cut, Board& board) {
  const float value = float_of(cut.key);
  for (int t = warp_of(); t < n; t += kWarps) {
    int equal = 0;
    if (tiles[t].max >= value) {
#pragma unroll 1
      for (int column = t * kTile + lane_of(); column < (t + 1) * kTile; column += kLanes) equal += row.at(column) == value;
      equal = __reduce_add_sync(kAllLanes, equal);
    }
    if (lane_of() == 0) tiles[t].model_sum = static_cast<float>(equal);
  }
  __syncthreads();
  int end = row.run.size;
  if (warp_of() == 0) {
    int seen = 0, t = 0;
    while (t < n - 1 && seen + static_cast<int>(tiles[t].model_sum) < cut.ties) seen += static_cast<int>(tiles[t++].model_sum);
    for (int first = t * kTile; first < (t + 1) * kTile; first += kLanes) {
      unsigned equal = __ballot_sync(kAllLanes, row.at(first + lane_of()) == value);
      const int here = __popc(equal);
      if (seen + here >= cut.ties) {
        for (int skip = cut.ties - seen; skip > 1; --skip) equal &= equal - 1;
        end = first + __ffs(static_cast<int>(equal));
        break;
      }
      seen += here;
    }
  }
  return block_min(end, board);
}

// Finds the row's cut and measures the tiles anew. The largest logit always stays, so the row's maximum does.
template <class T>
__device__ void filter_row(const SampleArgs& args, Row<T>* row, TileMass* tiles, int n, float max, Histogram& h, Board& board) {
  const int vocab = row->run.size;
  int bits = 0;
  while ((int64_t{1} << bits) < vocab) ++bits;
  Weights softmax{true, max, inverse_temperature(args.temperature), ldexp(1.0, 62 - bits), ldexp(1.0, bits - 62)}, counts = softmax;
  counts.by_mass = false;
  Cut cut{0, 0, 0};  // key 0 is below that of every number: all stay
  float depth = 0;   // of the lowest tile's maximum
  for (int t = static_cast<int>(threadIdx.x); t < n; t += kThreads)
    if (tiles[t].max > kMinusInf) depth = fmaxf(depth, max - tiles[t].max);
  depth = block_max(depth, board) + 8.0f;
  if (args.top_k > 0 && args.top_k < vocab) cut = select_cut(*row, tiles, n, counts, static_cast<double>(args.top_k), depth, h);
  if (args.top_p < 1) {
    // What top-k left, as whole numbers: sums of them have no order.
    unsigned long long mass = 0;
    for_each_column(*row, tiles, n, cut.key == 0 ? kMinusInf : float_of(cut.key), [&](float x) {
      if (key_of(x) > cut.key) mass += softmax.whole(x);
    });
    double total = static_cast<double>(block_sum(mass, board)) * softmax.per_unit;
    if (cut.ties > 0) total += cut.ties * softmax.mass_of(float_of(cut.key));
    const Cut of_top_k = cut;
    // Columns further down weigh less than what may be cut off, all of them together.
    const double room = -log((1 - args.top_p) * total / vocab) / softmax.inverse;
    cut = select_cut(*row, tiles, n, softmax, args.top_p * total, room < 1e30 ? fmaxf(static_cast<float>(room) * 1.001f, 1e-3f) : 1e30f, h);
    if (cut.key < of_top_k.key || (cut.key == of_top_k.key && cut.ties > of_top_k.ties && of_top_k.ties > 0)) cut = of_top_k;
  }
  if (args.min_p > 0) {
    const unsigned key = min_p_key(args.min_p, softmax);
    if (key > cut.key) cut = {key, 0, 0};  // all of its equals stay
  }
  const int tie_end = cut.ties < cut.equal ? find_tie_end(*row, tiles, n, cut, board) : vocab;
  row->is_cut = true;
  row->cut = cut.key == 0 ? kMinusInf : float_of(cut.key);
  row->tie_end = tie_end;
  __syncthreads();
#pragma unroll 1
  for (int t = warp_of(); t < n; t += kWarps) {
    const bool stays = tiles[t].max >= row->cut;
    __syncwarp();  // all lanes have looked, before one writes
    if (!stays) {
      if (lane_of() < kBlocksPerTile) tiles[t].block[lane_of()] = 0;
      if (lane_of() == 0) tiles[t].max = kMinusInf;
      continue;
    }
    float x[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) x[i] = row->at(first_column<T>(t, i / kVec<T>) + i % kVec<T>);
    measure_tile<T, false>(x, static_cast<float>(softmax.inverse * kLog2EInDouble), tiles + t);
  }
  __syncthreads();
}

}  // namespace edlm
