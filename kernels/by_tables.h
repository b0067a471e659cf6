// Few query rows: scores by look-up tables, values by probability histograms. For attention.cpp and paged.cpp.
#pragma once

#include "call.h"

namespace gsrq {
namespace {

constexpr int64_t kMaxLanes = 16;   // query rows that share tables
constexpr int64_t kChunk = 512;     // tokens whose scores are held between the passes
constexpr int64_t kSlab = 8;        // codes whose tables (for 4 lanes) fit in the first-level cache

template <int L, int N>
void add_table_scores(float* scores, const uint8_t* codes, int64_t stride, const float* table, int64_t n) {
  using V = Lanes<L>;
  for (int64_t t = 0; t < n; ++t, codes += stride) {
    auto sum = V::load(scores + t * L);
#pragma GCC unroll 8
    for (int m = 0; m < N; ++m) sum += V::load(table + (m * kWords + codes[m]) * L);
    V::store(scores + t * L, sum);
  }
}

template <int L, int N>
void add_to_histogram(float* histogram, const uint8_t* codes, int64_t stride, const float* p, int64_t n) {
  using V = Lanes<L>;
  for (int64_t t = 0; t < n; ++t, codes += stride) {
    const auto weight = V::load(p + t * L);
#pragma GCC unroll 8
    for (int m = 0; m < N; ++m) {
      float* bin = histogram + (m * kWords + codes[m]) * L;
      V::store(bin, V::load(bin) + weight);
    }
  }
}

// The highest of scores [n, L] for each lane, with several chains of comparisons at work.
template <int L>
std::array<float, L> highest_of(const float* scores, int64_t n) {
  constexpr int kChains = 4;
  constexpr int64_t kStep = kChains * std::max<int64_t>(kWidth, L);  // whole tokens
  Vec high[kStep / kWidth];
  for (auto& h : high) h = Vec(-kInf);
  int64_t i = 0;
  for (; i + kStep <= n * L; i += kStep)
#pragma GCC unroll 8
    for (int64_t j = 0; j < kStep / kWidth; ++j) high[j] = at::vec::maximum(high[j], load(scores + i + j * kWidth));
  std::array<float, L> found;
  found.fill(-kInf);
  for (int64_t j = 0; j < kStep / kWidth; ++j) {
    alignas(64) float each[kWidth];
    high[j].store(each);
    for (int64_t l = 0; l < kWidth; ++l) {
      float& lane = found[(j * kWidth + l) % L];
      lane = std::max(lane, each[l]);
    }
  }
  for (; i < n * L; ++i) found[i % L] = std::max(found[i % L], scores[i]);
  return found;
}

// Calls f with the number of codes of each slab as a constant, so that its loop over them is unrolled.
template <typename F>
void for_slabs(int64_t codes, F f) {
  for (int64_t m = 0; m < codes; m += kSlab) {
    switch (std::min(kSlab, codes - m)) {
      case 1: f(m, std::integral_constant<int, 1>()); break;
      case 2: f(m, std::integral_constant<int, 2>()); break;
      case 3: f(m, std::integral_constant<int, 3>()); break;
      case 4: f(m, std::integral_constant<int, 4>()); break;
      case 5: f(m, std::integral_constant<int, 5>()); break;
      case 6: f(m, std::integral_constant<int, 6>()); break;
      case 7: f(m, std::integral_constant<int, 7>()); break;
      default: f(m, std::integral_constant<int, 8>()); break;
    }
  }
}

// The look-up tables of a split, made for several frames at once so that the codewords are read once for all.
template <int L>
class FrameTables {
 public:
  FrameTables(int64_t rows, const float* q, const Head& head)
      : rows_(rows), t_(head.tables), head_(head.h), q_(q), turned_(kFrames * L * t_.padded),
        into_(kFrames * L * t_.padded), planar_(kFrames * L * t_.codes * kWords), cosine_(t_.pairs + kWidth),
        sine_(t_.pairs + kWidth), table_(L * t_.codes * kWords) {}

  // The table of the frame of a position, [codes, 256, L]; `last` is where the split ends.
  const float* at(int64_t position, int64_t last) {
    const int64_t frame = t_.pairs ? (position - floor_mod(position, t_.frame)) / t_.frame : 0;
    if (frame != current_) {
      const int64_t all = t_.codes * kWords;
      if (frame >= first_ + count_ || frame < first_) make(frame, t_.pairs ? ceil_div(last - frame * t_.frame, t_.frame) : 1);
      interleave<L>(table_, planar_ + (frame - first_) * rows_ * all, all, rows_, all);
      current_ = frame;
    }
    return table_;
  }

 private:
  static constexpr int64_t kFrames = 4;

  void make(int64_t frame, int64_t wanted) {
    first_ = frame, count_ = std::min(kFrames, wanted);
    const int64_t rows = count_ * rows_, all = t_.codes * kWords;
    for (int64_t f = 0; f < count_; ++f) {
      cos_sin(cosine_, sine_, t_.inv_freq.data(), t_.pairs, (frame + f) * t_.frame);
      for (int64_t r = 0; r < rows_; ++r)
        rotate_back(turned_ + (f * rows_ + r) * t_.padded, q_ + r * t_.padded, cosine_, sine_, t_.pairs, t_.padded);
    }
    // Into the metric of the codewords: q . (inverse y) = (inverse^T q) . y.
    const float* inverse = t_.inverse_t + head_ * t_.dim * t_.padded;
    product(into_, t_.padded, turned_, t_.padded, 1, inverse, t_.padded, rows, t_.padded, t_.dim);
    for (int64_t m = 0; m < t_.codes; ++m)
      product(
          planar_ + m * kWords, all, into_ + m % t_.groups * t_.width, t_.padded, 1, t_.columns_of(head_, m),
          kWords, rows, kWords, t_.width);
  }

  const int64_t rows_;
  const Tables& t_;
  const int64_t head_;
  const float* q_;
  Buffer turned_, into_, planar_, cosine_, sine_, table_;
  int64_t first_ = 0, count_ = 0, current_ = std::numeric_limits<int64_t>::min();
};

// Scores of the mean: q . R(position) mean, by rotating the query to every multiple of kRotate positions, and through the
// thin factors of what the mean does within those.
class MeanScores {
 public:
  MeanScores(int64_t rows, const float* q, const Head& head)
      : rows_(rows), t_(head.tables), q_(q), into_(t_.mean_into + head.h * t_.dim * t_.padded_rank),
        mean_(t_.mean_at + head.h * t_.rank * kRotate), turned_(kTurns * rows_ * t_.padded),
        thin_(kTurns * rows_ * t_.padded_rank), planar_(kTurns * rows_ * kRotate), cosine_(t_.pairs),
        sine_(t_.pairs), cos_(t_.pairs), sin_(t_.pairs) {}

  // Scores of n positions, [n, L].
  template <int L>
  void at(float* scores, int64_t position, int64_t n) {
    while (n > 0) {
      const int64_t place = floor_mod(position, kRotate), base = position - place;
      if (base < first_ || base >= first_ + count_ * kRotate) make(base, ceil_div(place + n, kRotate));
      const int64_t some = std::min(n, kRotate - place);
      interleave<L>(scores, planar_ + (base - first_) * rows_ + place, kRotate, rows_, some);
      scores += some * L, position += some, n -= some;
    }
  }

 private:
  static constexpr int64_t kTurns = 4;

  void make(int64_t base, int64_t wanted) {
    const bool follows = count_ && base == first_ + count_ * kRotate;
    first_ = base, count_ = std::min(kTurns, wanted);
    for (int64_t turn = 0; turn < count_; ++turn) {
      if (!turn && !follows) {
        for (int64_t i = 0; i < t_.pairs; ++i) {
          const double angle = static_cast<double>(base) * t_.inv_freq[i];
          cos_[i] = std::cos(angle), sin_[i] = std::sin(angle);
        }
      } else {
        for (int64_t i = 0; i < t_.pairs; ++i) {
          const double c = cos_[i], s = sin_[i];
          cos_[i] = c * t_.step_cos[i] - s * t_.step_sin[i];
          sin_[i] = s * t_.step_cos[i] + c * t_.step_sin[i];
        }
      }
      for (int64_t i = 0; i < t_.pairs; ++i) cosine_[i] = cos_[i], sine_[i] = sin_[i];
      for (int64_t r = 0; r < rows_; ++r)
        rotate_back(
            turned_ + (turn * rows_ + r) * t_.padded, q_ + r * t_.padded, cosine_.data(), sine_.data(), t_.pairs,
            t_.padded);
    }
    product(thin_, t_.padded_rank, turned_, t_.padded, 1, into_, t_.padded_rank, count_ * rows_, t_.padded_rank, t_.dim);
    product(planar_, kRotate, thin_, t_.padded_rank, 1, mean_, kRotate, count_ * rows_, kRotate, t_.rank);
  }

  const int64_t rows_;
  const Tables& t_;
  const float *q_, *into_, *mean_;
  Buffer turned_, thin_, planar_;
  std::vector<float> cosine_, sine_;
  std::vector<double> cos_, sin_;
  int64_t first_ = 0, count_ = 0;
};

// One split of the codes, [first, last) of a row and head, for query rows [row0, row0 + rows), at most L.
template <int L>
void attend_by_tables(
    const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, int64_t first, int64_t last, const float* q, Part part) {
  using V = Lanes<L>;
  Timer timer;
  const Head key = c.key_tables[h], value = c.value_tables[h];
  const Tables &kt = key.tables, &vt = value.tables;
  const uint8_t *key_codes = c.key.codes_of(b, h), *value_codes = c.value.codes_of(b, h);
  const RowStart row(c.key.start, b);
  const int64_t sink = row.sink();
  FrameTables<L> tables(rows, q, key);
  MeanScores means(rows, q, key);
  Buffer scores(kChunk * L), histogram;
  histogram.fill(vt.codes * kWords * L);
  alignas(64) float top[L], mass[L], peak[std::max<int64_t>(L, kWidth)];
  std::fill_n(top, L, -kInf);
  std::fill_n(mass, L, 0.f);
  bool limited = c.mask.defined() || c.softcap > 0;
  const int64_t* limits = c.code_limit.data() + b * c.queries;
  for (int64_t i = 0; i < c.queries; ++i) limited |= limits[i] < c.coded[b];

  for (int64_t slot = first; slot < last;) {
    const int64_t position = row.position(slot);
    int64_t end = std::min(last, slot + kChunk);
    if (kt.pairs) end = row.end_of_run(slot, std::min(end, slot + kt.frame - floor_mod(position, kt.frame)));
    const int64_t n = end - slot;
    const float* table = tables.at(position, position + last - slot);
    timer.lap(kTables);
    means.at<L>(scores, position, n);
    timer.lap(kMean);
    const uint8_t* kc = key_codes + slot * kt.codes;
    for_slabs(kt.codes, [&](int64_t m, auto count) {
      add_table_scores<L, count.value>(scores, kc + m, kt.codes, table + m * kWords * L, n);
    });
    timer.lap(kScores);

    if (limited)
      restrict_scores(c, b, h, row0, rows, nullptr, slot, n, scores, L, 1, [&](int64_t query, float* s) {
        for (int64_t t = std::max<int64_t>(0, limits[query] - slot); t < n; ++t) s[t * L] = -kInf;
      });
    for (int64_t t = std::max(slot, sink); t < std::min(end, sink + c.key.sinks); ++t)
      std::fill_n(scores + (t - slot) * L, L, -kInf);
    const std::array<float, L> highest = highest_of<L>(scores, n);
    bool fades = false;
    for (int l = 0; l < L; ++l) {
      const float now = highest[l];
      if (now > top[l]) {
        const float fade = top[l] == -kInf ? 0.f : std::exp(top[l] - now);
        fades |= mass[l] > 0;
        top[l] = now;
        mass[l] *= fade;
        peak[l] = fade;
      } else {
        peak[l] = 1.f;
      }
    }
    if (fades) {
      const auto fade = V::load(peak);
      for (int64_t i = 0; i < vt.codes * kWords; ++i) V::store(histogram + i * L, V::load(histogram + i * L) * fade);
    }
    for (int64_t l = 0; l < std::max<int64_t>(L, kWidth); ++l) peak[l] = top[l % L] == -kInf ? 0.f : top[l % L];
    constexpr int64_t kSums = L > kWidth ? L / kWidth : 1;
    Vec sums[kSums];
    for (auto& s : sums) s = Vec(0.f);
    int64_t i = 0;
    for (; i + kSums * kWidth <= n * L; i += kSums * kWidth)
      for (int64_t j = 0; j < kSums; ++j) {
        const Vec p = (Vec::loadu(scores + i + j * kWidth) - Vec::loadu(peak + j * kWidth)).exp_u20();
        p.store(scores + i + j * kWidth);
        sums[j] = sums[j] + p;
      }
    for (; i < n * L; ++i) {
      const float p = std::exp(scores[i] - peak[i % L]);
      scores[i] = p;
      mass[i % L] += p;
    }
    for (int64_t j = 0; j < kSums; ++j) {
      alignas(64) float each[kWidth];
      sums[j].store(each);
      for (int64_t l = 0; l < kWidth; ++l) mass[(j * kWidth + l) % L] += each[l];
    }
    timer.lap(kSoftmax);

    const uint8_t* vc = value_codes + slot * vt.codes;
    for_slabs(vt.codes, [&](int64_t m, auto count) {
      add_to_histogram<L, count.value>(histogram + m * kWords * L, vc + m, vt.codes, scores, n);
    });
    timer.lap(kValues);
    slot = end;
  }

  // Histograms to vectors, in the metric; `finish` brings them back.
  std::copy_n(top, rows, part.top);
  std::copy_n(mass, rows, part.mass);
  for (int64_t m = 0; m < vt.codes; ++m) {
    const int64_t width = vt.width, begin = m % vt.groups * width;
    const float* bins = histogram + m * kWords * L;
    if (vt.wide == width) {
      product(part.out + begin, c.padded, bins, 1, L, value.codec.words(value.h, m), width, rows, width, kWords, true);
      continue;
    }
    Buffer sum(rows * vt.wide);
    const at::Half* words = vt.wide_words.data() + (value.h * vt.codes + m) * kWords * vt.wide;
    product(sum, vt.wide, bins, 1, L, words, vt.wide, rows, vt.wide, kWords);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = 0; e < width; ++e) part.out[r * c.padded + begin + e] += sum[r * vt.wide + e];
  }
  timer.lap(kValues);
}

}  // namespace
}  // namespace gsrq
