// Are the uniforms of eight draws at once those of one, to the last bit? test_uniforms.py compiles this for each instruction set.
#include <cstdio>

#include "cpu/uniforms.h"

int main() {
  using namespace edlm;
  for (int64_t i = 0; i < 20000; ++i) {
    const int64_t seed = (i - 9000) * 0x9E3779B97F4A7C15, position = i * 977, candidate = i % 5 == 0 ? (int64_t{1} << 32) - 4 : i, offset = i * i;
    Uniforms8 eight;
    philox_uniform8(seed, position, candidate, offset, Purpose::kToken, &eight);
    for (int j = 0; j < 8; ++j) {
      const Uniforms one = philox_uniform(seed, position, candidate + j, offset, Purpose::kToken);
      if (one.first != eight.first[j] || one.second != eight.second[j]) {
        std::printf("seed %lld, candidate %lld differ\n", static_cast<long long>(seed), static_cast<long long>(candidate + j));
        return 1;
      }
    }
  }
}
