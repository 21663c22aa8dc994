// Runs the CPU kernels on one tensor without torch, for processors that are emulated: test_aarch64.py compiles this with the kernels.
// Arguments: rows, vocab, dtype (0 float32, 1 bfloat16, 2 float16), draws, temperature, top_k, top_p, min_p. Logits come by standard
// input; int64 tokens [rows, draws], float32 log_probs [rows, draws] and the gradient of their sum [rows, vocab] go to standard output.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "log_probs.h"
#include "sampling.h"

namespace edlm::baseline {
extern const SampleKernels kSampleKernels;
extern const LogProbKernels kLogProbKernels;
}  // namespace edlm::baseline

int main(int, char** argv) {
  using namespace edlm;
  const int64_t rows = std::atoll(argv[1]), vocab = std::atoll(argv[2]), draws = std::atoll(argv[4]);
  const DType dtype = static_cast<DType>(std::atoi(argv[3]));
  const int64_t width = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<char> logits(rows * vocab * width), grad_logits(logits.size());
  if (std::fread(logits.data(), 1, logits.size(), stdin) != logits.size()) return 1;

  std::vector<int64_t> seed(rows), tokens(rows * draws), position(rows, 3);
  std::vector<float> log_probs(rows * draws), model(rows * draws), stats(2 * rows), scores(rows * draws), ones(rows * draws, 1.0f);
  for (int64_t i = 0; i < rows; ++i) seed[i] = 5 + i;
  const int64_t offset = 2, forbidden = vocab - 1;

  SampleArgs args{};
  args.logits = logits.data();
  args.dtype = dtype;
  args.batch = rows;
  args.length = 1;
  args.vocab = args.stride_b = vocab;
  args.seed = seed.data();
  args.offset = &offset;
  args.position = position.data();
  args.forbidden = &forbidden;
  args.num_forbidden = 1;
  args.num_samples = draws;
  args.temperature = std::atof(argv[5]);
  args.top_k = std::atoll(argv[6]);
  args.top_p = std::atof(argv[7]);
  args.min_p = std::atof(argv[8]);
  args.tokens = tokens.data();
  args.log_probs = log_probs.data();
  args.model_log_probs = model.data();

  LogProbArgs gather{};
  gather.logits = logits.data();
  gather.dtype = dtype;
  gather.batch = rows;
  gather.length = 1;
  gather.vocab = gather.stride_b = gather.grad_stride = vocab;
  gather.tokens = tokens.data();
  gather.num_tokens = draws;
  gather.forbidden = &forbidden;
  gather.num_forbidden = 1;
  gather.temperature = 0.7;
  gather.log_probs = scores.data();
  gather.stats = stats.data();
  gather.grad = ones.data();
  gather.grad_logits = grad_logits.data();

  std::vector<TileMass> tiles(num_tiles(vocab));
  std::vector<double> scratch(draw_scratch_doubles(args));
  for (int64_t r = 0; r < rows; ++r) {
    baseline::kSampleKernels.tile_masses(args, r, 0, num_tiles(vocab), tiles.data());
    if (baseline::kSampleKernels.draw(args, r, tiles.data(), scratch.data()) >= 0) return 2;
    baseline::kLogProbKernels.tile_masses(gather, r, 0, num_tiles(vocab), tiles.data());
    if (!baseline::kLogProbKernels.gather(gather, r, tiles.data())) return 3;
    baseline::kLogProbKernels.backward(gather, r, 0, num_tiles(vocab));
  }
  std::fwrite(tokens.data(), 8, tokens.size(), stdout);
  std::fwrite(log_probs.data(), 4, log_probs.size(), stdout);
  std::fwrite(scores.data(), 4, scores.size(), stdout);
  std::fwrite(grad_logits.data(), 1, grad_logits.size(), stdout);
}
