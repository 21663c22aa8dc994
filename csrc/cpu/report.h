// Which row is bad: the smallest code that any thread adds, so that the message does not depend on the order of work.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

namespace edlm {

class Report {
 public:
  void add(int64_t code) {
    int64_t seen = smallest_.load(std::memory_order_relaxed);
    while (code < seen && !smallest_.compare_exchange_weak(seen, code, std::memory_order_relaxed)) {
    }
  }
  // -1: nothing was added.
  int64_t code() const {
    const int64_t code = smallest_.load();
    return code == std::numeric_limits<int64_t>::max() ? -1 : code;
  }

 private:
  std::atomic<int64_t> smallest_{std::numeric_limits<int64_t>::max()};
};

}  // namespace edlm
