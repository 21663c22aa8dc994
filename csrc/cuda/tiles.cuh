// One read of a row of logits by a block, tile by tile: what sampling and log-probabilities have in common. As csrc/cpu/tiles.h, on a GPU.
#pragma once

#include "../tiles.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace edlm {

// A row as it is to be read: its logits stay untouched, and columns that are excluded count as -inf.
template <class T>
struct Row {
  Run<T> run;
  int mask;  // excluded too; -1: none
  const int64_t* forbidden;
  int num_forbidden;
  // A filter keeps logits above `cut`, and those equal to it at columns below `tie_end`.
  bool is_cut;
  float cut;
  int tie_end;

  // Whether a filter leaves a column.
  __device__ bool is_kept(int column, float x) const { return x > cut || (x == cut && column < tie_end); }

  __device__ float without_excluded(int column, float x) const {
    if (is_cut && !is_kept(column, x)) return kMinusInf;
    if (column == mask) return kMinusInf;
#pragma unroll 1
    for (int i = 0; i < num_forbidden; ++i)
      if (forbidden[i] == column) return kMinusInf;
    return x;
  }

  // Excluded ones of n neighbouring columns are -inf.
  template <int n>
  __device__ void exclude(int first, float (&x)[n]) const {
    const auto without = [&](int64_t column) {
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (first + i == column) x[i] = kMinusInf;
    };
    without(mask);
#pragma unroll 1
    for (int i = 0; i < num_forbidden; ++i) without(forbidden[i]);
    if (!is_cut) return;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (!is_kept(first + i, x[i])) x[i] = kMinusInf;
  }

  // One logit; -inf where it is excluded or there is none.
  __device__ float at(int column) const {
    return column < run.size ? without_excluded(column, to_float(read(run.begin + column))) : kMinusInf;
  }
};

template <class T>
__device__ Row<T> make_row(const void* logits, int64_t at, int64_t vocab, int64_t mask, const int64_t* forbidden, int64_t num_forbidden) {
  return {{static_cast<const T*>(logits) + at, static_cast<int>(vocab)}, static_cast<int>(mask), forbidden, static_cast<int>(num_forbidden), false, kMinusInf, 0};
}

// 2^x, within 2 ulp; 0 below 2^-126. One instruction.
__device__ inline float exp2_fast(float x) {
#if defined(EDLM_EMULATED)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The same where a column is decided: x is not rounded to a float first, and costs a few operations more.
__device__ inline float exp2_careful(double x) {
  const float high = static_cast<float>(x), low = static_cast<float>(x - high);
  return x < -150 ? 0.0f : exp2f(high) * (1.0f + 0.693147181f * low);
}

constexpr float kLog2E = 1.44269504f;
constexpr double kLog2EInDouble = 1.4426950408889634;

// A lane's share of a tile: kLaneColumns columns, in chunks of sixteen bytes. A chunk of the warp is 32 * kVec neighbouring columns, so
// that its loads are; a block of 64 columns is in kBlockLanes neighbouring lanes.
constexpr int kLaneColumns = kTile / kLanes;
template <class T>
constexpr int kChunks = kLaneColumns / kVec<T>;
template <class T>
constexpr int kBlockLanes = kBlock / kVec<T>;

template <class T>
__device__ int first_column(int tile, int chunk) {
  return tile * kTile + (chunk * kLanes + lane_of()) * kVec<T>;
}

// A tile of a row on its way to a warp. kAligned: the row begins at a multiple of sixteen bytes. Else a chunk is in two loads of a lane, which
// are aligned, and of which the second is its neighbour's first: memory is read once, the first cache level twice.
//
// In 16 bits a tile is fetched while the one before is measured, but for the second loads, which find most of it in the first cache level
// then. In float32 a tile alone is as many bytes, and two would need more registers
// than there are: it is loaded where it is got.
template <class T, bool kAligned>
struct TileInFlight {
  static constexpr bool kAhead = sizeof(T) == 2;
  uint4 ahead[kAhead ? kChunks<T> : 1];

  // Whether aligned loads of a tile stay within the row: all but the last, and the first where the row is not aligned.
  __device__ static bool is_whole(const Row<T>& row, int tile, unsigned shift) {
    return (kAligned || tile > 0) && (tile + 1) * kTile + (kAligned ? 0 : kVec<T> - static_cast<int>(shift / sizeof(T))) <= row.run.size;
  }

  __device__ static const uint4* address(const Row<T>& row, int tile, unsigned shift) {
    return reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row.run.begin + first_column<T>(tile, 0)) - (kAligned ? 0 : shift));
  }

  __device__ void fetch(const Row<T>& row, int tile, unsigned shift) {
    if (!kAhead || !is_whole(row, tile, shift)) return;
    const uint4* at = address(row, tile, shift);
#pragma unroll
    for (int j = 0; j < kChunks<T>; ++j) ahead[kAhead ? j : 0] = __ldg(at + j * kLanes);
  }

  // Its columns; excluded ones, and what lies beyond the vocabulary, are -inf.
  __device__ void get(const Row<T>& row, int tile, unsigned shift, float (&x)[kLaneColumns]) const {
    if (!is_whole(row, tile, shift)) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        const int column = first_column<T>(tile, i / kVec<T>) + i % kVec<T>;
        x[i] = column < row.run.size ? to_float(read(row.run.begin + column)) : kMinusInf;
      }
    } else if constexpr (kAligned) {
      get_whole<0>(row, tile, 0, x);
    } else {
      // One branch for all chunks: the words have names that are known when this is compiled.
      switch (shift / 4) {
        case 0: get_whole<0>(row, tile, shift, x); break;
        case 1: get_whole<1>(row, tile, shift, x); break;
        case 2: get_whole<2>(row, tile, shift, x); break;
        default: get_whole<3>(row, tile, shift, x); break;
      }
    }
    exclude(tile, row.mask, x);
#pragma unroll 1
    for (int i = 0; i < row.num_forbidden; ++i) {
      const int64_t id = row.forbidden[i];
      exclude(tile, id >= 0 && id < row.run.size ? static_cast<int>(id) : -1, x);
    }
    if (!row.is_cut) return;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (!row.is_kept(first_column<T>(tile, i / kVec<T>) + i % kVec<T>, x[i])) x[i] = kMinusInf;
  }

 private:
  template <int kWord>
  __device__ void get_whole(const Row<T>& row, int tile, unsigned shift, float (&x)[kLaneColumns]) const {
    const uint4* at = address(row, tile, shift);
#pragma unroll
    for (int j = 0; j < kChunks<T>; ++j) {
      const uint4 here = kAhead ? ahead[kAhead ? j : 0] : __ldg(at + j * kLanes);
      if constexpr (kAligned)
        unpack({here.x, here.y, here.z, here.w}, x + j * kVec<T>, T{});
      else
        shifted<T, kWord>(here, __ldg(at + j * kLanes + 1), shift, x + j * kVec<T>);
    }
  }

  // One column is -inf, if it is in this tile.
  __device__ static void exclude(int tile, int column, float (&x)[kLaneColumns]) {
    const int within = column - tile * kTile, vector = within / kVec<T>;
    if (static_cast<unsigned>(within) >= kTile) return;
    const int index = vector / kLanes * kVec<T> + within % kVec<T>;
    if (vector % kLanes != lane_of()) return;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (i == index) x[i] = kMinusInf;
  }
};

// A chunk's sum in an order that its columns alone decide.
template <int n>
__device__ float sum_in_pairs(const float* x) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    return sum_in_pairs<n / 2>(x) + sum_in_pairs<n / 2>(x + n / 2);
  }
}

// The mass of a tile from a warp's columns: maximum, sums of blocks, and with kModel the sum of exp(x - maximum) at temperature 1. `scale` is
// log2(e) / T. A NaN or +inf makes its block's sum NaN: maxima pass over NaN, but x - max does not.
template <class T, bool kModel>
__device__ void measure_tile(const float (&x)[kLaneColumns], float scale, TileMass* tile) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kLaneColumns; ++i) top = fmaxf(top, x[i]);
  top = warp_max(fmaxf(top, kMinusInf));
  // All -inf: measure against 0 instead, so that the sums are 0 rather than NaN, unless there is a NaN.
  const float reference = top == kMinusInf ? 0.0f : top;
  float sum[kChunks<T>], model = 0;
#pragma unroll
  for (int j = 0; j < kChunks<T>; ++j) {
    float e[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) e[i] = exp2_fast((x[j * kVec<T> + i] - reference) * scale);
    sum[j] = sum_in_pairs<kVec<T>>(e);
    if constexpr (kModel) {
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) e[i] = exp2_fast((x[j * kVec<T> + i] - reference) * kLog2E);
      model += sum_in_pairs<kVec<T>>(e);
    }
  }
  // The chunks' sums over the lanes of a block, all at once: while there are several, each half of the lanes keeps half of them, and
  // gives the other half away.
  const int lane = lane_of();
  int chunk = 0, count = kChunks<T>;
#pragma unroll
  for (int step = kBlockLanes<T> / 2; step > 0; step /= 2) {
    const bool is_upper = (lane & step) != 0;
    if (count > 1) {
      count /= 2;
#pragma unroll
      for (int j = 0; j < kChunks<T> / 2; ++j) {
        if (j >= count) break;
        const float mine = is_upper ? sum[j + count] : sum[j], theirs = is_upper ? sum[j] : sum[j + count];
        sum[j] = mine + __shfl_xor_sync(kAllLanes, theirs, step);
      }
      chunk += is_upper ? count : 0;
    } else {
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], step);
    }
  }
  constexpr int kKeepers = kBlockLanes<T> / kChunks<T>;  // neighbouring lanes that have come to the same sum
  constexpr int kBlocksPerChunk = kLanes / kBlockLanes<T>;
  if (lane % kKeepers == 0) tile->block[chunk * kBlocksPerChunk + lane / kBlockLanes<T>] = sum[0];
  if constexpr (kModel) model = warp_sum(model);
  if (lane == 0) {
    tile->max = top;
    if constexpr (kModel) tile->model_sum = model;
  }
}

template <class T, bool kModel, bool kAligned>
__device__ void read_run_of_tiles(const Row<T>& row, float scale, int begin, int end, TileMass* tiles) {
  const unsigned shift = row.run.shift();
  TileInFlight<T, kAligned> flight{};
  int t = begin + warp_of();
  if (t < end) flight.fetch(row, t, shift);
#pragma unroll 1
  for (; t < end; t += kWarps) {
    float x[kLaneColumns];
    flight.get(row, t, shift, x);
    if (t + kWarps < end) flight.fetch(row, t + kWarps, shift);
    measure_tile<T, kModel>(x, scale, tiles + t);
  }
}

// Tiles [begin, end) of a row into tiles[begin .. end), by the warps of a block.
template <class T, bool kModel>
__device__ void read_tiles(const Row<T>& row, float scale, int begin, int end, TileMass* tiles) {
  if (row.run.shift() == 0)
    read_run_of_tiles<T, kModel, true>(row, scale, begin, end, tiles);
  else
    read_run_of_tiles<T, kModel, false>(row, scale, begin, end, tiles);
}

// 1 / T, and what it makes of an exponent. Of the host's making: a kernel then has them for nothing, beside its other arguments.
struct Temperature {
  double inverse;
  float scale;         // log2(e) / T
  double exact_scale;
};

static inline Temperature temperature_of(double t) {
  const double inverse = inverse_temperature(t);
  return {inverse, static_cast<float>(inverse * kLog2EInDouble), inverse * kLog2EInDouble};
}

// What a row's tiles come to.
struct Total {
  bool is_finite;  // no NaN, no +inf
  float max;
  double total;        // of exp((x - max) / T)
  double model_total;  // of exp(x - max); where it was asked for
};

__device__ inline double sum_of_blocks(const TileMass& tile) {
  const float* b = tile.block;
  return ((static_cast<double>(b[0]) + b[1]) + (static_cast<double>(b[2]) + b[3])) +
         ((static_cast<double>(b[4]) + b[5]) + (static_cast<double>(b[6]) + b[7]));
}

// Weighs the n tiles of a row against each other, in double, by a whole block. tile.sum becomes the prefix sum of the masses.
__device__ inline Total weigh_tiles(TileMass* tiles, int n, double inverse, bool has_model, Board& board) {
  Total result{true, kMinusInf, 0, 0};
  const int each = (n + kThreads - 1) / kThreads, begin = static_cast<int>(threadIdx.x) * each, end = begin + each < n ? begin + each : n;
  float max = kMinusInf;
  int bad = 0;
#pragma unroll 1
  for (int t = begin; t < end; ++t) {
    max = fmaxf(max, tiles[t].max);
    tiles[t].sum = sum_of_blocks(tiles[t]);
    bad |= !(tiles[t].sum <= 1e30);
  }
  result.is_finite = !__syncthreads_or(bad);
  result.max = max = block_max(max, board);
  if (!result.is_finite || max == kMinusInf) return result;
  double mass = 0, model = 0;
#pragma unroll 1
  for (int t = begin; t < end; ++t) {
    const double d = static_cast<double>(tiles[t].max) - max;
    mass += tiles[t].sum * exp(d * inverse);
    tiles[t].sum = mass;
    if (has_model) model += tiles[t].model_sum * exp(d);
  }
  const double before = block_scan(mass, board, &result.total) - mass;
#pragma unroll 1
  for (int t = begin; t < end; ++t) tiles[t].sum += before;
  if (has_model) result.model_total = block_sum(model, board);
  __syncthreads();
  return result;
}

// How a row's tiles reach the block that weighs them: measured there, where there are many rows; or by several blocks, and left in memory for
// a second kernel, where few rows would leave most of the machine idle, or where a row has more tiles than shared memory holds.
enum class Phase { kWhole, kMeasure, kFinish };

struct Plan {
  Phase first;       // kWhole, or kMeasure and then kFinish
  int parts;         // blocks that measure a row
  size_t shared;     // bytes, for the tiles of a row; 0 where they stay in memory
  size_t scratch;    // bytes, for the tiles of all rows
};

static inline Plan plan_rows(int64_t rows, int64_t vocab) {
  const int64_t n = num_tiles(vocab), most = (n + kWarps - 1) / kWarps;
  const int64_t bytes = n * static_cast<int64_t>(sizeof(TileMass));
  const int64_t blocks = 4 * static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount));
  const bool fits = bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticShared;
  int64_t parts = rows > 0 ? blocks / rows : 1;
  parts = parts < 1 ? 1 : parts > most ? most : parts;
  Plan plan{Phase::kWhole, 1, fits ? static_cast<size_t>(bytes) : 0, 0};
  if (parts > 1 || !fits) plan = {Phase::kMeasure, static_cast<int>(parts), plan.shared, static_cast<size_t>(rows * bytes)};
  return plan;
}

// Launches a kernel over the rows of `args`, as they are planned: once, or once to measure and once to finish.
template <class Args>
cudaError_t launch_rows(void (*kernel)(Args, Temperature, TileMass*, Phase, int, bool, int64_t*), const Args& args, TileMass* scratch,
                        int64_t* invalid, cudaStream_t stream) {
  const int64_t rows = args.batch * args.length;
  const Plan plan = plan_rows(rows, args.vocab);
  const Temperature heat = temperature_of(args.temperature);
  if (const cudaError_t error = allow_shared(kernel, plan.shared); error != cudaSuccess) return error;
  if (plan.first == Phase::kWhole) {
    if (const cudaError_t error = clear_report(invalid, stream); error != cudaSuccess) return error;
    LAUNCH(kernel, grid_for(rows), dim3(kThreads), plan.shared, stream, args, heat, scratch, Phase::kWhole, 1, true, invalid);
    return cudaGetLastError();
  }
  LAUNCH(kernel, grid_for(rows * plan.parts), dim3(kThreads), 0, stream, args, heat, scratch, Phase::kMeasure, plan.parts, false, invalid);
  LAUNCH(kernel, grid_for(rows), dim3(kThreads), plan.shared, stream, args, heat, scratch, Phase::kFinish, 1, plan.shared > 0, invalid);
  return cudaGetLastError();
}

// The tiles of a row where they are weighed: in shared memory if they fit.
__device__ inline TileMass* gather_tiles(TileMass* shared, TileMass* scratch, int n, Phase phase) {
  if (shared == nullptr) return scratch;
  if (phase == Phase::kFinish) {
    constexpr int kWords = sizeof(TileMass) / sizeof(uint4);
    static_assert(sizeof(TileMass) % sizeof(uint4) == 0);
    for (int i = static_cast<int>(threadIdx.x); i < n * kWords; i += kThreads)
      reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(scratch)[i];
  }
  return shared;
}

}  // namespace edlm
