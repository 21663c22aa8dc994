// Memory for kernels under sanitizers: exact allocations, outputs that show what was not written, rows with gaps between them.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tiles.h"

// AddressSanitizer's, in a program that is linked with it. This code is not compiled for it: it is the kernels that are watched.
extern "C" [[gnu::weak]] void __asan_poison_memory_region(const volatile void* at, size_t size);
extern "C" [[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* at, size_t size);

extern "C" const char* emulator_error();

namespace edlm::exact {

// What is wrong is printed under the name of the case that runs, and the program ends when that is much.
inline int failures = 0;
inline std::string present;

[[gnu::format(printf, 2, 3)]] inline void expect(bool holds, const char* format, ...) {
  if (holds) return;
  std::printf("%s: ", present.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  if (++failures == 10) std::exit(20);
}

// A launcher's status. A kernel that was stopped leaves nothing to look at.
inline void expect_launched(int rc) {
  if (rc == 0) return;
  std::printf("%s: stopped: %s\n", present.c_str(), emulator_error());
  std::exit(10);
}

inline bool is_near(double a, double b, double absolute, double relative) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::abs(a - b) <= absolute + relative * std::abs(b);
}

inline uint32_t bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}

// Numbers for inputs.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // About normal.
  double normal() { return 1.7 * (uniform() + uniform() + uniform() + uniform() - 2.0); }

 private:
  uint64_t state_;
};

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }
template <class T>
T from(double x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(x));
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(x));
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(x);
}

template <class T>
constexpr DType kDType = sizeof(T) == 4              ? DType::kFloat32
                         : std::is_same_v<T, __half> ? DType::kFloat16
                                                     : DType::kBFloat16;
// Elements of sixteen bytes: the offsets at which a row may begin, as far as its loads care.
template <class T>
constexpr int kOffsets = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr const char* kName = sizeof(T) == 8              ? "double"
                              : sizeof(T) == 4            ? "float"
                              : std::is_same_v<T, __half> ? "half"
                                                          : "bf16";

// n elements in an allocation of that size, at a multiple of sixteen bytes. Not written yet.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(std::malloc(n * sizeof(T)))), size_(n) {
    std::memset(static_cast<void*>(data_), kUnwritten, n * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(static_cast<int64_t>(from.size())) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = from[i];
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    permit(0, size_);
    std::free(data_);
  }

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }
  // From here on an access of these is AddressSanitizer's to report.
  void forbid(int64_t begin, int64_t end) {
    if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(data_ + begin, (end - begin) * sizeof(T));
  }
  void permit(int64_t begin, int64_t end) {
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(data_ + begin, (end - begin) * sizeof(T));
  }

  bool is_written(int64_t i) const {
    unsigned char none[sizeof(T)];
    std::memset(none, kUnwritten, sizeof none);
    return std::memcmp(data_ + i, none, sizeof none) != 0;
  }
  void expect_written(const char* name) const {
    for (int64_t i = 0; i < size_; ++i) expect(is_written(i), "%s[%ld] was not written", name, static_cast<long>(i));
  }

 private:
  static constexpr int kUnwritten = 0xA5;

  T* data_;
  int64_t size_;
};

// Rows of `vocab` elements with gaps between them and `lead` elements before the first. Gaps may not be touched: they hold what
// Buffer puts there, or NaN.
template <class T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t vocab, int64_t lead, int64_t gap)
      : rows_(rows), vocab_(vocab), lead_(lead), stride_(vocab + gap), memory_(lead + (rows - 1) * stride_ + vocab) {}

  T* data() { return memory_.data() + lead_; }
  T* row(int64_t r) { return data() + r * stride_; }
  int64_t stride() const { return stride_; }
  bool is_written(int64_t r, int64_t c) const { return memory_.is_written(lead_ + r * stride_ + c); }

  void set(const std::vector<std::vector<float>>& values) {
    for (int64_t i = 0; i < memory_.size(); ++i) memory_[i] = from<T>(std::numeric_limits<double>::quiet_NaN());
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < vocab_; ++c) row(r)[c] = from<T>(values[r][c]);
    forbid_gaps();
  }
  void forbid_gaps() {
    memory_.forbid(0, lead_);
    for (int64_t r = 0; r + 1 < rows_; ++r) memory_.forbid(lead_ + r * stride_ + vocab_, lead_ + (r + 1) * stride_);
  }
  // A row that nobody may look at.
  void forbid_row(int64_t r) { memory_.forbid(lead_ + r * stride_, lead_ + r * stride_ + vocab_); }
  void expect_gaps_unwritten(const char* name) {
    memory_.permit(0, memory_.size());
    for (int64_t i = 0; i < memory_.size(); ++i) {
      const int64_t at = i - lead_;
      if (at < 0 || at % stride_ >= vocab_)
        expect(!memory_.is_written(i), "%s: written between rows, at %ld", name, static_cast<long>(at));
    }
  }

 private:
  int64_t rows_, vocab_, lead_, stride_;
  Buffer<T> memory_;
};

// As T holds it.
template <class T>
std::vector<std::vector<float>> rounded(std::vector<std::vector<float>> rows) {
  for (auto& row : rows)
    for (float& x : row) x = to_float(from<T>(x));
  return rows;
}

// What rows are made of.
enum class Content { kNormal, kTies, kWide, kNan, kInfinite, kNothing };

inline std::vector<float> make_row_of(Content content, int64_t vocab, Random& random) {
  std::vector<float> x(vocab);
  for (float& v : x) {
    switch (content) {
      case Content::kTies:
        v = static_cast<float>(random.below(4));
        break;
      case Content::kWide:
        v = static_cast<float>(random.normal() * 1e4);
        break;
      default:
        v = static_cast<float>(3 * random.normal());
    }
    if (random.below(16) == 0 || content == Content::kNothing) v = -std::numeric_limits<float>::infinity();
  }
  float& one = x[random.below(vocab)];
  if (content == Content::kNan) one = std::numeric_limits<float>::quiet_NaN();
  if (content == Content::kInfinite) one = std::numeric_limits<float>::infinity();
  return x;
}

// How much is run. kFew is for ThreadSanitizer, where a block takes a tenth of a second; kSome, one dtype, is for further orders.
enum class Size { kFew, kSome, kMany };

void run_sampling(Size size);
void run_sampling_of_a_million();
void run_log_probs(Size size);
void run_importance(Size size);

}  // namespace edlm::exact
