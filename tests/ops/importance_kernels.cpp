// The importance kernels on one matrix without torch, for processors that are emulated: test_aarch64.py compiles this with them.
// Arguments: batch, candidates, scheme. Energies float32 [B, K] come by standard input. To standard output go, of select_candidate: index int64 [B],
// log_weights and log_z_loo float32 [B, K], ess and log_z float32 [B]; of resample with the negated energies: ancestors int64 [B, K]; of
// reverse_step from tokens -1 to tokens k at opening times (l + 1) / K and s = 0.5: xs int64 [B, K].
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "importance.h"

namespace edlm::baseline {
extern const ImportanceKernels kImportanceKernels;
}

int main(int, char** argv) {
  using namespace edlm;
  const int64_t batch = std::atoll(argv[1]), k = std::atoll(argv[2]), scheme = std::atoll(argv[3]), n = batch * k;
  std::vector<float> energy(n), negated(n), log_weights(n), loo(n), ess(batch), log_z(batch);
  if (std::fread(energy.data(), 4, n, stdin) != static_cast<size_t>(n)) return 1;
  for (int64_t i = 0; i < n; ++i) negated[i] = -energy[i];
  std::vector<int64_t> seed(batch), index(batch), ancestors(n), xt(n, -1), x0(n * k), xs(n);
  for (int64_t b = 0; b < batch; ++b) seed[b] = 5 + b;
  const int64_t offset = 2;
  const Streams streams{seed.data(), 1, &offset, 0};

  SelectArgs select{};
  select.energy = {energy.data(), Real::kFloat32, k, 1};
  select.candidates = k;
  select.log_candidates = std::log(static_cast<double>(k));
  select.log_others = std::log(static_cast<double>(k - 1));
  select.temperature = 0.7;
  select.streams = streams;
  select.index = index.data();
  select.log_weights = log_weights.data();
  select.ess = ess.data();
  select.log_z = log_z.data();
  select.log_z_loo = loo.data();
  std::vector<double> scratch(scratch_doubles(select));
  if (baseline::kImportanceKernels.select(select, 0, batch, scratch.data()) >= 0) return 2;

  ResampleArgs resample{};
  resample.log_weights = {negated.data(), Real::kFloat32, k, 1};
  resample.particles = k;
  resample.scheme = static_cast<Scheme>(scheme);
  resample.streams = streams;
  resample.ancestors = ancestors.data();
  if (baseline::kImportanceKernels.resample(resample, 0, batch, scratch.data()) >= 0) return 3;

  // Sequences of length k, k candidates each.
  std::vector<double> open_time(n);
  for (int64_t i = 0; i < n; ++i) open_time[i] = static_cast<double>(i % k + 1) / static_cast<double>(k);
  for (int64_t i = 0; i < n * k; ++i) x0[i] = i / k % k;
  const double s = 0.5;
  ReverseArgs reverse{};
  reverse.length = reverse.candidates = k;
  reverse.xt = xt.data();
  reverse.xt_stride_b = k;
  reverse.x0 = x0.data();
  reverse.x0_stride_b = k * k;
  reverse.x0_stride_k = k;
  reverse.xt_stride_l = reverse.x0_stride_l = reverse.open_stride_l = reverse.index_stride = 1;
  reverse.index = index.data();
  reverse.open_time = open_time.data();
  reverse.is_double = true;
  reverse.open_stride_b = k;
  reverse.s = &s;
  reverse.xs = xs.data();
  baseline::kImportanceKernels.reverse(reverse, 0, n);

  std::fwrite(index.data(), 8, batch, stdout);
  std::fwrite(log_weights.data(), 4, n, stdout);
  std::fwrite(loo.data(), 4, n, stdout);
  std::fwrite(ess.data(), 4, batch, stdout);
  std::fwrite(log_z.data(), 4, batch, stdout);
  std::fwrite(ancestors.data(), 8, n, stdout);
  std::fwrite(xs.data(), 8, n, stdout);
}
