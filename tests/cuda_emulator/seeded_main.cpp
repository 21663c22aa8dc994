// Runs one fault under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exact size. Exit status 0: nothing was noticed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" int sum_rows_launch(const float* x, float* out, int rows, int columns, int fault);
extern "C" const char* emulator_error();

int main(int, char** argv) {
  const int rows = 3, columns = 1112;
  std::vector<float> out(rows);
  float* aligned = nullptr;
  if (posix_memalign(reinterpret_cast<void**>(&aligned), 16, rows * columns * sizeof(float)) != 0) return 3;
  for (int i = 0; i < rows * columns; ++i) aligned[i] = static_cast<float>(i % 7);
  const int rc = sum_rows_launch(aligned, out.data(), rows, columns, std::atoi(argv[1]));
  std::printf("%d %s\n", rc, emulator_error());
  std::free(aligned);
  return rc == 0 ? 0 : 1;
}
