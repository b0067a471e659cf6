// One call of attention: what it works on, what limits its scores, where its time goes. For attention.cpp and paged.cpp.
#pragma once

#include <array>
#include <chrono>

#include "tables.h"

namespace gsrq {
namespace {

enum View : int64_t { kWindow = 0, kExactTail = 1, kStreaming = 2 };
enum Causal : int64_t { kNotCausal = 0, kUpperLeft = 1, kLastAligned = 2 };

// ---------------------------------------------------------------------------------------------------------------------
// Where the time goes, for benchmarks; off otherwise.

enum Phase { kTables, kMean, kScores, kSoftmax, kValues, kDense, kMerge, kPhases };
std::atomic<bool> profiling{false};
std::atomic<int64_t> spent[kPhases];

struct Timer {
  using clock = std::chrono::steady_clock;
  const bool on = profiling.load(std::memory_order_relaxed);
  clock::time_point last = on ? clock::now() : clock::time_point();
  void lap(Phase phase) {
    if (!on) return;
    const auto now = clock::now();
    spent[phase] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count();
    last = now;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// What a call works on

struct Call {
  const Packed &key, &value;
  const LayerTables key_tables, value_tables;
  int64_t batch, heads, group, queries, rows, dim, padded, length;
  Tensor q;         // float32 [batch, heads, rows, dim], scaled
  Tensor mask;      // bool or float32, strides expanded to [batch, query heads, queries, width]; undefined for none
  Tensor tails[2];  // full-precision keys and values of the newest slots, or undefined
  double softcap;
  bool bfloat16;    // the model's precision
  std::vector<int64_t> code_limit;   // per row of the batch and query: codes of lower slots take part
  std::vector<int64_t> dense_first;  // the same: full-precision slots from here on take part
  std::vector<int64_t> last;         // per query: the causal limit
  std::vector<int64_t> coded;        // per row of the batch: the highest of its limits
  std::vector<int64_t> dense_low;    // per row of the batch: the first slot that is held in full precision

  Call(const Packed& key, const Packed& value)
      : key(key), value(value), key_tables(key.codec), value_tables(value.codec) {}
  int64_t query_of(int64_t row) const { return row % queries; }

  // The mask of a query row, from slot 0 on.
  template <typename T>
  const T* mask_row(int64_t b, int64_t h, int64_t row) const {
    return mask.const_data_ptr<T>() + b * mask.stride(0) + (h * group + row / queries) * mask.stride(1) +
        query_of(row) * mask.stride(2);
  }

};

// What a part of the slots contributes to some query rows.
struct Part {
  float *top, *mass, *out;  // [rows], [rows], [rows, padded]
  void clear(int64_t rows, int64_t padded) {
    std::fill_n(top, rows, -kInf);
    std::fill_n(mass, rows, 0.f);
    std::fill_n(out, rows * padded, 0.f);
  }
};

// Soft cap, mask and limits, on the scores of slots [first, first + n): score(t, row) is at scores[t * st + row * sr].
template <typename Hidden>
void restrict_scores(
    const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, const int64_t* slots, int64_t first, int64_t n,
    float* scores, int64_t st, int64_t sr, Hidden hidden) {
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * sr;
    if (c.softcap > 0) {
      const float cap = static_cast<float>(c.softcap);
      for (int64_t t = 0; t < n; ++t) s[t * st] = cap * std::tanh(s[t * st] / cap);
    }
    if (c.mask.defined()) {
      const int64_t step = c.mask.stride(3);
      if (c.mask.scalar_type() == at::kBool) {
        const bool* m = c.mask_row<bool>(b, h, row0 + r);
        for (int64_t t = 0; t < n; ++t)
          if (!m[(slots ? slots[t] : first + t) * step]) s[t * st] = -kInf;
      } else {
        const float* m = c.mask_row<float>(b, h, row0 + r);
        for (int64_t t = 0; t < n; ++t) s[t * st] += m[(slots ? slots[t] : first + t) * step];
      }
    }
    hidden(c.query_of(row0 + r), s);
  }
}

}  // namespace
}  // namespace gsrq
