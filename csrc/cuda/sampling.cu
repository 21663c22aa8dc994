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
  const int64_t b = args.length == 1 ? r : r / args.length;
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

struct Column {
  int id;
  float logit;
};

// One draw by a warp. tiles[t].sum are prefix sums, and `total` the last of them.
//
// Where rounding points at what has no mass, its neighbour that has is taken: an id is never one that cannot be.
template <class T>
__device__ Column draw_column(const Row<T>& row, const TileMass* tiles, int n, double total, double scale, const Uniforms& u) {
  int t = static_cast<int>(upper_bound(n, u.first * total, [&](int64_t i) { return tiles[i].sum; }));
  t = t < n ? t : n - 1;
  while (t > 0 && tiles[t].max == kMinusInf) --t;
  while (tiles[t].max == kMinusInf) ++t;

  const TileMass& tile = tiles[t];
  const double in_tile = sum_of_blocks(tile);
  const double target = u.second * in_tile;
  int block = -1;
  double before = 0, running = 0, mass = 0;
#pragma unroll 1
  for (int b = 0; b < kBlocksPerTile; ++b) {
    const double here = tile.block[b];
    if (here > 0 && (block < 0 || running <= target)) block = b, before = running, mass = here;
    running += here;
  }
  const double share = (target - before) / mass;

  // Two neighbouring columns a lane.
  const int first = t * kTile + block * kBlock + 2 * lane_of();
  const float x[2] = {row.at(first), row.at(first + 1)};
  const double e[2] = {exp2_careful((x[0] - static_cast<double>(tile.max)) * scale),
                       exp2_careful((x[1] - static_cast<double>(tile.max)) * scale)};
  const double prefix = warp_scan(e[0] + e[1]);
  const double wanted = share * __shfl_sync(kAllLanes, prefix, kLanes - 1);
  const unsigned finite = __ballot_sync(kAllLanes, x[0] > kMinusInf || x[1] > kMinusInf);
  const unsigned hits = __ballot_sync(kAllLanes, prefix > wanted) & finite;
  const int lane = hits ? __ffs(static_cast<int>(hits)) - 1 : 31 - __clz(static_cast<int>(finite));
  const bool is_second = !(x[0] > kMinusInf) || (prefix - e[1] <= wanted && x[1] > kMinusInf);
  const int side = __shfl_sync(kAllLanes, static_cast<int>(is_second), lane);
  return {t * kTile + block * kBlock + 2 * lane + side, __shfl_sync(kAllLanes, is_second ? x[1] : x[0], lane)};
}

// Draws from a row whose tiles are measured.
template <class T, Mode kMode>
__device__ void finish_row(const SampleArgs& args, int64_t r, TileMass* tiles, Board& board, int64_t* invalid) {
  const Index at = index_of(args, r);
  Row<T> row = row_of<T>(args, at);
  const int n = static_cast<int>(num_tiles(args.vocab));
  const double inverse = inverse_temperature(args.temperature);
  Total sum = weigh_tiles(tiles, n, inverse, kMode != Mode::kPlain, board);
  if (!sum.is_finite || sum.max == kMinusInf) {  // the same for all threads
    fail_row(args, at, sum.is_finite ? kNoSupport : kNonFinite, static_cast<int>(threadIdx.x), kThreads, invalid);
    return;
  }
  const double log_model_total = kMode == Mode::kPlain ? 0.0 : log(sum.model_total);
  if constexpr (kMode == Mode::kFiltered) {
    __shared__ Histogram histogram;
    filter_row(args, &row, tiles, n, sum.max, histogram, board);
    sum.total = weigh_tiles(tiles, n, inverse, false, board).total;
  }
  if (args.temperature == 0) {
    const int id = argmax(row, tiles, n, sum.max, board);
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < args.num_samples; k += kThreads) write(args, at, k, id, 0, bounded(-log_model_total));
    return;
  }
  const double log_total = log(sum.total);
#pragma unroll 1
  for (int64_t k = warp_of(); k < args.num_samples; k += kWarps) {
    const Column column = draw_column(row, tiles, n, sum.total, inverse * kLog2EInDouble, uniforms_of(args, at, k));
    const double d = static_cast<double>(column.logit) - sum.max;
    if (lane_of() == 0) write(args, at, k, column.id, bounded(d * inverse - log_total), bounded(d - log_model_total));
  }
}

template <class T, Mode kMode>
__global__ void __launch_bounds__(kThreads, kMode == Mode::kFiltered ? 2 : 4)
    sample_rows(const __grid_constant__ SampleArgs args, TileMass* scratch, Phase phase, int parts, bool is_shared, int64_t* invalid) {
  DYN_SHARED(TileMass, in_shared);
  __shared__ Board board;
  const int n = static_cast<int>(num_tiles(args.vocab));
  const float scale = static_cast<float>(inverse_temperature(args.temperature) * kLog2EInDouble);
  if (phase == Phase::kMeasure && blockIdx.x == 0 && threadIdx.x == 0) *invalid = -1;
  const int64_t r = static_cast<int64_t>(blockIdx.x) / parts;
  const Index at = index_of(args, r);
  if (!is_drawn(args, r)) {
    if (phase != Phase::kMeasure) carry_over(args, at, static_cast<int>(threadIdx.x), kThreads, invalid);
    return;
  }
  TileMass* in_memory = scratch == nullptr ? nullptr : scratch + r * n;
  TileMass* tiles = phase == Phase::kMeasure ? in_memory : gather_tiles(is_shared ? in_shared : nullptr, in_memory, n, phase);
  if (phase != Phase::kFinish) {
    const int share = (n + parts - 1) / parts, begin = (static_cast<int>(blockIdx.x) % parts) * share;
    read_tiles<T, kMode != Mode::kPlain>(row_of<T>(args, at), scale, begin, begin + share < n ? begin + share : n, tiles);
  }
  if (phase == Phase::kMeasure) return;
  __syncthreads();
  finish_row<T, kMode>(args, r, tiles, board, invalid);
}

// --- rows of few columns: eight lanes each, one prefix in double over all columns -----------------------------------------------------

constexpr int kTeam = 8, kTeams = kThreads / kTeam;

// Odd, so that rows begin in different banks.
__host__ __device__ inline int small_stride(int64_t vocab) { return static_cast<int>(vocab) | 1; }

template <class T>
__global__ void __launch_bounds__(kThreads, 4) sample_small(const __grid_constant__ SampleArgs args, int64_t* invalid) {
  DYN_SHARED(double, shared);
  const int vocab = static_cast<int>(args.vocab), stride = small_stride(vocab);
  const int team = static_cast<int>(threadIdx.x) / kTeam, lane = static_cast<int>(threadIdx.x) % kTeam;
  double* prefix = shared + team * stride;
  float* x = reinterpret_cast<float*>(shared + kTeams * stride) + team * stride;
  const double inverse = inverse_temperature(args.temperature);
  const double scale = inverse * kLog2EInDouble;
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
    mass += exp2_careful(d * scale);
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
      write(args, at, k, id, bounded(d * inverse - log_total), bounded(d - log_model_total));
    }
  }
}

// --- launchers ------------------------------------------------------------------------------------------------------------------------

bool is_small(const SampleArgs& args) { return args.vocab <= kSmallVocab && !is_filtered(args); }

template <class T, Mode kMode>
cudaError_t launch_rows(const SampleArgs& args, TileMass* scratch, int64_t* invalid, cudaStream_t stream) {
  const auto sample_rows_kernel = sample_rows<T, kMode>;
  const int64_t rows = args.batch * args.length;
  const Plan plan = plan_rows(rows, args.vocab);
  if (const cudaError_t error = allow_shared(sample_rows_kernel, plan.shared); error != cudaSuccess) return error;
  if (plan.first == Phase::kWhole) {
    if (const cudaError_t error = clear_report(invalid, stream); error != cudaSuccess) return error;
    LAUNCH(sample_rows_kernel, grid_for(rows), dim3(kThreads), plan.shared, stream, args, scratch, Phase::kWhole, 1, true, invalid);
    return cudaGetLastError();
  }
  LAUNCH(sample_rows_kernel, grid_for(rows * plan.parts), dim3(kThreads), 0, stream, args, scratch, Phase::kMeasure, plan.parts, false,
         invalid);
  LAUNCH(sample_rows_kernel, grid_for(rows), dim3(kThreads), plan.shared, stream, args, scratch, Phase::kFinish, 1, plan.shared > 0, invalid);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const SampleArgs& args, TileMass* scratch, int64_t* invalid, cudaStream_t stream) {
  if (is_small(args)) {
    if (const cudaError_t error = clear_report(invalid, stream); error != cudaSuccess) return error;
    const auto sample_small_kernel = sample_small<T>;
    const size_t shared = kTeams * small_stride(args.vocab) * (sizeof(double) + sizeof(float));
    const int64_t blocks = (args.batch * args.length + kTeams - 1) / kTeams;
    LAUNCH(sample_small_kernel, grid_for(blocks), dim3(kThreads), shared, stream, args, invalid);
    return cudaGetLastError();
  }
  if (is_filtered(args)) return launch_rows<T, Mode::kFiltered>(args, scratch, invalid, stream);
  if (args.temperature != 1.0) return launch_rows<T, Mode::kTempered>(args, scratch, invalid, stream);
  return launch_rows<T, Mode::kPlain>(args, scratch, invalid, stream);
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
