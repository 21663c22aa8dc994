// Tile-mass inverse CDF on a GPU: kernels, then launchers. csrc/cpu/sampling.cpp does the same on a CPU; ops/sampling.py is the reference.
//
// sample_rows: a block measures the tiles of a row (tiles.cuh) and its warps draw from them: a tile by a double prefix over tile masses, in it a
// block of 64 columns by the block sums, and then, from 64 logits that are read again, a column by a double prefix. Few rows are measured by
// several blocks each, and finished by a second launch. sample_small: rows of up to 128 columns, eight lanes each.
#include "../sampling.h"

#include "../philox.h"
#include "filters.cuh"
#include "tiles.cuh"

namespace edlm {
namespace {

// What a kernel does beside drawing: a temperature asks for a second sum, a filter for a cut.
enum class Mode { kPlain, kTempered, kFiltered };

// Row r = b * length + l of the logits.
struct Index {
  int64_t row, b, l;
};

__device__ Index index_of(const SampleArgs& args, int64_t r) {
  // There are fewer than 2^31 rows: a division of 64 bits takes five times as long.
  const int64_t b = args.length == 1 ? r : static_cast<unsigned>(r) / static_cast<unsigned>(args.length);
  return {r, b, r - b * args.length};
}

template <class T>
__device__ Row<T> row_of(const SampleArgs& args, const Index& at) {
  return make_row<T>(args.logits, at.b * args.stride_b + at.l * args.stride_l, args.vocab, args.mask, args.forbidden, args.num_forbidden);
}

__device__ bool is_drawn(const SampleArgs& args, int64_t row) {
  return args.xt == nullptr || (args.xt[row] == args.mask && (args.active == nullptr || args.active[row]));
}

__device__ Uniforms uniforms_of(const SampleArgs& args, const Index& at, int64_t k) {
  return philox_uniform(args.seed[at.b], args.position ? args.position[at.row] : at.l, k, args.offset[at.b * args.offset_stride],
                        Purpose::kToken);
}

__device__ void write(const SampleArgs& args, const Index& at, int64_t k, int64_t id, float log_prob, float model_log_prob) {
  const int64_t out = (at.b * args.num_samples + k) * args.length + at.l;
  args.tokens[out] = id;
  args.log_probs[out] = log_prob;
  if (args.model_log_probs) args.model_log_probs[out] = model_log_prob;
}

// A rounded log-probability is never above 0.
__device__ float bounded(double log_prob) { return static_cast<float>(log_prob < 0 ? log_prob : 0); }

// A row that is not drawn keeps its token, by threads thread, thread + threads, ...
__device__ void carry_over(const SampleArgs& args, const Index& at, int thread, int threads, int64_t* invalid) {
  const int64_t token = args.xt[at.row];
  const bool is_id = token >= 0 && token < args.vocab;
  if (!is_id && thread == 0) report(invalid, 4 * at.row + kOutOfRange);
#pragma unroll 1
  for (int64_t k = thread; k < args.num_samples; k += threads) write(args, at, k, is_id ? token : 0, 0, 0);
}

// Whatever the caller does with the report, no id that it reads is out of range.
__device__ void fail_row(const SampleArgs& args, const Index& at, int64_t code, int thread, int threads, int64_t* invalid) {
  if (thread == 0) report(invalid, 4 * at.row + code);
  const float nan = __uint_as_float(0x7FC00000u);
#pragma unroll 1
  for (int64_t k = thread; k < args.num_samples; k += threads) write(args, at, k, 0, nan, nan);
}

// The lowest column with the largest logit.
template <class T>
__device__ int argmax(const Row<T>& row, const TileMass* tiles, int n, float max, Board& board) {
  int tile = n - 1;
  for (int t = n - 1 - static_cast<int>(threadIdx.x); t >= 0; t -= kThreads)
    if (tiles[t].max == max) tile = t;
  tile = block_min(tile, board);
  int best = row.run.size - 1;
  if (warp_of() == 0) {
    for (int first = tile * kTile; first < (tile + 1) * kTile; first += kLanes) {
      const unsigned equal = __ballot_sync(kAllLanes, row.at(first + lane_of()) == max);
      if (equal == 0) continue;
      best = first + __ffs(static_cast<int>(equal)) - 1;
      break;
    }
  }
  return block_min(best, board);
}

// Where a draw's uniforms point: a block of 64 columns, and what share of the block's mass lies before the draw.
//
// Here and below, where rounding points at what has no mass, its neighbour that has is taken: an id is never one that cannot be.
struct Place {
  double share;
  int first;  // column
  float max;  // of the tile, which masses are measured against
};

// tiles[t].sum are prefix sums, and `total` the last of them.
__device__ Place place_of(const TileMass* tiles, int n, double total, const Uniforms& u) {
  int t = static_cast<int>(upper_bound(n, u.first * total, [&](int64_t i) { return tiles[i].sum; }));
  t = t < n ? t : n - 1;
  while (t > 0 && tiles[t].max == kMinusInf) --t;
  while (tiles[t].max == kMinusInf) ++t;

  const TileMass& tile = tiles[t];
  const double target = u.second * sum_of_blocks(tile);
  int block = -1;
  double before = 0, running = 0, mass = 0;
#pragma unroll 1
  for (int b = 0; b < kBlocksPerTile; ++b) {
    const double here = tile.block[b];
    if (here > 0 && (block < 0 || running <= target)) block = b, before = running, mass = here;
    running += here;
  }
  return {(target - before) / mass, t * kTile + block * kBlock, tile.max};
}

// So many lanes make a draw.
constexpr int kDrawLanes = 16, kDraws = kThreads / kDrawLanes;

struct Column {
  int id;
  float logit;
};

// The column there, by kDrawLanes lanes: each reads a few neighbours.
template <class T>
__device__ Column draw_column(const Row<T>& row, const Place& place, double scale) {
  constexpr int kEach = kBlock / kDrawLanes;
  const int first = place.first + lane_of() % kDrawLanes * kEach;
  float e[kEach];
  unsigned finite = 0;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) e[i] = first + i < row.run.size ? to_float(read(row.run.begin + first + i)) : kMinusInf;
  row.exclude(first, e);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    finite |= (e[i] > kMinusInf ? 1u : 0u) << i;
    e[i] = exp2_careful((e[i] - static_cast<double>(place.max)) * scale);
    sum += e[i];
  }
  const double prefix = warp_scan(sum, kDrawLanes), wanted = place.share * __shfl_sync(kAllLanes, prefix, kDrawLanes - 1, kDrawLanes);
  // This lane's first column whose prefix exceeds what is wanted; its last that can be, where none does.
  int mine = 0;
  double before = prefix - sum;
  bool is_hit = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    before += e[i];
    if (is_hit || !(finite >> i & 1)) continue;
    mine = first + i;
    is_hit = before > wanted;
  }
  const int shift = lane_of() / kDrawLanes * kDrawLanes;
  const unsigned ours = (1u << kDrawLanes) - 1, hits = __ballot_sync(kAllLanes, is_hit) >> shift & ours,
                 some = __ballot_sync(kAllLanes, finite != 0) >> shift & ours;
  const int from = hits ? __ffs(static_cast<int>(hits)) - 1 : 31 - __clz(static_cast<int>(some));
  const int id = __shfl_sync(kAllLanes, mine, from, kDrawLanes);
  return {id, to_float(read(row.run.begin + id))};
}

// Draws from a row whose tiles are measured.
template <class T, Mode kMode>
__device__ void finish_row(const SampleArgs& args, const Temperature& heat, int64_t r, TileMass* tiles, Board& board, int64_t* invalid) {
  const Index at = index_of(args, r);
  Row<T> row = row_of<T>(args, at);
  const int n = static_cast<int>(num_tiles(args.vocab));
  Total sum = weigh_tiles(tiles, n, heat.inverse, kMode != Mode::kPlain, board);
  if (!sum.is_finite || sum.max == kMinusInf) {  // the same for all threads
    fail_row(args, at, sum.is_finite ? kNoSupport : kNonFinite, static_cast<int>(threadIdx.x), kThreads, invalid);
    return;
  }
  if constexpr (kMode == Mode::kFiltered) {
    __shared__ Histogram histogram;
    filter_row(args, &row, tiles, n, sum.max, histogram, board);
    sum.total = weigh_tiles(tiles, n, heat.inverse, false, board).total;
  }
  if (args.temperature == 0) {
    const int id = argmax(row, tiles, n, sum.max, board);
    const float model = bounded(-log(sum.model_total));
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < args.num_samples; k += kThreads) write(args, at, k, id, 0, model);
    return;
  }
  // What all draws need, in shared memory rather than in registers of every thread.
  struct Sums {
    double max, total, log_total, log_model_total;
  };
  __shared__ Sums sums;
  if (threadIdx.x == 0) sums = {sum.max, sum.total, log(sum.total), kMode == Mode::kPlain ? 0.0 : log(sum.model_total)};
  __syncthreads();
  // A thread finds the place of a draw, kDrawLanes of them its column.
  __shared__ Place places[kThreads];
#pragma unroll 1
  for (int64_t first = 0; first < args.num_samples; first += kThreads) {
    const int count = static_cast<int>(args.num_samples - first < kThreads ? args.num_samples - first : kThreads);
    const int thread = static_cast<int>(threadIdx.x), team = thread / kDrawLanes;
    if (thread < count) places[thread] = place_of(tiles, n, sums.total, uniforms_of(args, at, first + thread));
    __syncthreads();
#pragma unroll 1
    for (int k = team; k - team % (kLanes / kDrawLanes) < count; k += kDraws) {  // a warp's lanes stay together
      const Column column = draw_column(row, places[k < count ? k : count - 1], heat.exact_scale);
      if (k >= count || thread % kDrawLanes != 0) continue;
      const double d = static_cast<double>(column.logit) - sums.max;
      write(args, at, first + k, column.id, bounded(d * heat.inverse - sums.log_total), bounded(d - sums.log_model_total));
    }
    __syncthreads();
  }
}

template <class T, Mode kMode>
__global__ void __launch_bounds__(kThreads, kMode == Mode::kFiltered ? 2 : 4)
    sample_rows(const __grid_constant__ SampleArgs args, const __grid_constant__ Temperature heat, TileMass* scratch, Phase phase, int parts, bool is_shared, int64_t* invalid) {
  DYN_SHARED(TileMass, in_shared);
  __shared__ Board board;
  const int n = static_cast<int>(num_tiles(args.vocab));
  if (phase == Phase::kMeasure && blockIdx.x == 0 && threadIdx.x == 0) *invalid = -1;
  const int64_t r = blockIdx.x / static_cast<unsigned>(parts);
  const Index at = index_of(args, r);
  if (!is_drawn(args, r)) {
    if (phase != Phase::kMeasure) carry_over(args, at, static_cast<int>(threadIdx.x), kThreads, invalid);
    return;
  }
  TileMass* in_memory = scratch == nullptr ? nullptr : scratch + r * n;
  TileMass* tiles = phase == Phase::kMeasure ? in_memory : gather_tiles(is_shared ? in_shared : nullptr, in_memory, n, phase);
  if (phase != Phase::kFinish) {
    const int share = (n + parts - 1) / parts, begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts)) * share;
    read_tiles<T, kMode != Mode::kPlain>(row_of<T>(args, at), heat.scale, begin, begin + share < n ? begin + share : n, tiles);
  }
  if (phase == Phase::kMeasure) return;
  __syncthreads();
  finish_row<T, kMode>(args, heat, r, tiles, board, invalid);
}

// --- rows of few columns: eight lanes each, one prefix in double over all columns -----------------------------------------------------

constexpr int kTeam = 8, kTeams = kThreads / kTeam;

// Odd, so that rows begin in different banks.
__host__ __device__ inline int small_stride(int64_t vocab) { return static_cast<int>(vocab) | 1; }

template <class T>
__global__ void __launch_bounds__(kThreads, 4) sample_small(const __grid_constant__ SampleArgs args, const __grid_constant__ Temperature heat, int64_t* invalid) {
  DYN_SHARED(double, shared);
  const int vocab = static_cast<int>(args.vocab), stride = small_stride(vocab);
  const int team = static_cast<int>(threadIdx.x) / kTeam, lane = static_cast<int>(threadIdx.x) % kTeam;
  double* prefix = shared + team * stride;
  float* x = reinterpret_cast<float*>(shared + kTeams * stride) + team * stride;
  const int64_t rows = args.batch * args.length;
  // All threads of a block stay together, whether they have a row or not.
  const int64_t first = blockIdx.x * int64_t{kTeams};
  const bool is_row = first + team < rows;
  const Index at = index_of(args, is_row ? first + team : rows - 1);
  const bool is_here = is_row && is_drawn(args, at.row);
  if (is_row && !is_here) carry_over(args, at, lane, kTeam, invalid);
  if (is_here) {
    const Row<T> row = row_of<T>(args, at);
    for (int c = lane; c < vocab; c += kTeam) x[c] = row.at(c);
  }
  __syncwarp();
  // A lane's columns, from here on, are neighbours.
  const int each = (vocab + kTeam - 1) / kTeam, begin = lane * each, end = !is_here ? begin : begin + each < vocab ? begin + each : vocab;
  float max = kMinusInf;
  for (int c = begin; c < end; ++c) max = fmaxf(max, x[c]);
  for (int step = kTeam / 2; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, step));
  const float reference = max == kMinusInf ? 0.0f : max;
  double mass = 0, model = 0;
  for (int c = begin; c < end; ++c) {
    const double d = static_cast<double>(x[c]) - reference;
    mass += exp2_careful(d * heat.exact_scale);
    prefix[c] = mass;
    if (args.model_log_probs) model += exp2_careful(d * kLog2EInDouble);
  }
  const double inclusive = warp_scan(mass, kTeam), before = inclusive - mass;
  const double total = __shfl_sync(kAllLanes, inclusive, kTeam - 1, kTeam);
  for (int step = kTeam / 2; step > 0; step /= 2) model += __shfl_xor_sync(kAllLanes, model, step);
  for (int c = begin; c < end; ++c) prefix[c] += before;
  int best = vocab - 1;  // the lowest of the largest
  for (int c = end - 1; c >= begin; --c)
    if (x[c] == max) best = c;
  for (int step = kTeam / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, best, step);
    best = other < best ? other : best;
  }
  __syncwarp();
  if (is_here && (!(total <= 1e30) || max == kMinusInf)) {
    fail_row(args, at, total <= 1e30 ? kNoSupport : kNonFinite, lane, kTeam, invalid);
  } else if (is_here) {
    const double log_total = log(total), log_model_total = args.model_log_probs ? log(model) : 0.0;
    for (int64_t k = lane; k < args.num_samples; k += kTeam) {
      if (args.temperature == 0) {
        write(args, at, k, best, 0, bounded(-log_model_total));
        continue;
      }
      const double target = uniforms_of(args, at, k).second * total;  // there is one tile, for the first to choose from
      int id = static_cast<int>(upper_bound(vocab, target, [&](int64_t c) { return prefix[c]; }));
      id = id < vocab ? id : vocab - 1;
      while (id > 0 && x[id] == kMinusInf) --id;
      while (x[id] == kMinusInf) ++id;
      const double d = static_cast<double>(x[id]) - max;
      write(args, at, k, id, bounded(d * heat.inverse - log_total), bounded(d - log_model_total));
    }
  }
}

// --- launchers ------------------------------------------------------------------------------------------------------------------------

bool is_small(const SampleArgs& args) { return args.vocab <= kSmallVocab && !is_filtered(args); }

template <class T>
cudaError_t launch(const SampleArgs& args, TileMass* scratch, int64_t* invalid, cudaStream_t stream) {
  if (is_small(args)) {
    if (const cudaError_t error = clear_report(invalid, stream); error != cudaSuccess) return error;
    const Temperature heat = temperature_of(args.temperature);
    const auto sample_small_kernel = sample_small<T>;
    const size_t shared = kTeams * small_stride(args.vocab) * (sizeof(double) + sizeof(float));
    const int64_t blocks = (args.batch * args.length + kTeams - 1) / kTeams;
    if (const cudaError_t error = allow_shared(sample_small_kernel, shared); error != cudaSuccess) return error;
    LAUNCH(sample_small_kernel, grid_for(blocks), dim3(kThreads), shared, stream, args, heat, invalid);
    return cudaGetLastError();
  }
  if (is_filtered(args)) return launch_rows(sample_rows<T, Mode::kFiltered>, args, scratch, invalid, stream);
  if (args.temperature != 1.0) return launch_rows(sample_rows<T, Mode::kTempered>, args, scratch, invalid, stream);
  return launch_rows(sample_rows<T, Mode::kPlain>, args, scratch, invalid, stream);
}

}  // namespace

extern "C" size_t edlm_cuda_sample_scratch(const SampleArgs* args) {
  return is_small(*args) ? 0 : plan_rows(args->batch * args->length, args->vocab).scratch;
}

extern "C" int edlm_cuda_sample(const SampleArgs* args, void* scratch, int64_t* invalid, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->batch * args->length == 0) return clear_report(invalid, on);
  switch (args->dtype) {
    case DType::kFloat32: return launch<float>(*args, static_cast<TileMass*>(scratch), invalid, on);
    case DType::kBFloat16: return launch<__nv_bfloat16>(*args, static_cast<TileMass*>(scratch), invalid, on);
    case DType::kFloat16: return launch<__half>(*args, static_cast<TileMass*>(scratch), invalid, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace edlm
