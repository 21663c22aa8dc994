// Runs the kernels of csrc/cuda under sanitizers, and looks at what they write:
// `kernels sampling|million|log_probs|importance few|some|many ORDER [FAULT]`.
// Exit status 0: all is right; 10: the emulator has stopped a kernel, and printed why; 20: wrong results; else a sanitizer's.
#include "exact_buffers.h"

extern "C" void emulator_schedule(int order, uint64_t seed);

// Which of the faults is there that test_kernels_sanitized.py writes into a copy of the kernels. The kernels have none.
extern "C" int seeded_fault;
int seeded_fault = 0;

int main(int argc, char** argv) {
  using namespace edlm::exact;
  if (argc < 4) return 2;
  const std::string family = argv[1], amount = argv[2];
  const Size size = amount == "few" ? Size::kFew : amount == "some" ? Size::kSome : Size::kMany;
  emulator_schedule(std::atoi(argv[3]), 1);
  if (argc > 4) seeded_fault = std::atoi(argv[4]);
  if (family == "sampling") run_sampling(size);
  if (family == "million") run_sampling_of_a_million();
  if (family == "log_probs") run_log_probs(size);
  if (family == "importance") run_importance(size);
  if (present.empty()) return 2;  // nothing has run
  return failures > 0 ? 20 : 0;
}
