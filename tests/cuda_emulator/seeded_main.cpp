// Runs one fault of one kernel under sanitizers, on buffers of exact size: `seeded rows|ticket|grid|chain FAULT ORDER`.
// Exit status 0: nothing was noticed; 10: the emulator has stopped the kernel, and printed why; 20: wrong sums; else a sanitizer's.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

extern "C" int sum_rows_launch(const float* x, float* out, int rows, int columns, int fault);
extern "C" int sum_by_ticket_launch(const float* x, float* partial, unsigned* ticket, float* out, int n, int fault);
extern "C" int sum_by_grid_launch(const float* x, float* partial, float* out, int n, int fault);
extern "C" int sum_by_chain_launch(const float* x, unsigned* ticket, float* out, int n, int fault);
extern "C" const char* emulator_error();
extern "C" void emulator_schedule(int order, uint64_t seed);

int main(int, char** argv) {
  const std::string kernel = argv[1];
  const int fault = std::atoi(argv[2]), rows = kernel == "rows" ? 5 : 1, columns = 1040, n = rows * columns;
  emulator_schedule(std::atoi(argv[3]), 1);
  float* x = nullptr;
  if (posix_memalign(reinterpret_cast<void**>(&x), 16, n * sizeof(float)) != 0) return 3;
  std::vector<float> sums(rows), partial(4, std::numeric_limits<float>::quiet_NaN());
  for (int i = 0; i < n; ++i) sums[i / columns] += x[i] = static_cast<float>(i % 11);
  std::vector<float> out(rows), by_grid(8);
  unsigned ticket = 0;
  int rc = 0;
  if (kernel == "rows") {
    rc = sum_rows_launch(x, out.data(), rows, columns, fault);
  } else if (kernel == "ticket") {
    out.resize(2);
    for (int launch = 0; launch < 2 && rc == 0; ++launch) rc = sum_by_ticket_launch(x, partial.data(), &ticket, out.data(), n, fault);
    out.resize(1);
  } else if (kernel == "chain") {
    rc = sum_by_chain_launch(x, &ticket, out.data(), n, fault);
  } else {
    rc = sum_by_grid_launch(x, partial.data(), by_grid.data(), n, fault);
    out = by_grid;
    sums = std::vector<float>(4, sums[0]);
    sums.resize(8, 2 * sums[0]);
  }
  std::free(x);
  if (rc != 0) std::printf("%s\n", emulator_error());
  return rc != 0 ? 10 : out != sums ? 20 : 0;
}
