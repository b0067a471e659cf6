// Attention on codes for the CPU: what torchgsrq/reference.py means by `attention`.
//
// Each KV head is cut into parts: splits of the codes, and what is held in full precision. A part gives its highest
// score, its probability mass and its weighted sum for every query row; parts are merged at the end. Codes are read by
// look-up tables and probability histograms when the query rows are few, and decoded block by block when they are many.

#include <torch/library.h>

#include <array>
#include <chrono>

#include "tables.h"

namespace gsrq {
namespace {

constexpr int64_t kMaxLanes = 16;   // query rows per KV head that tables are made for
constexpr int64_t kChunk = 512;     // tokens whose scores are held between the passes
constexpr int64_t kShortestFrame = 64;  // shorter frames do not pay for their tables
constexpr int64_t kSlab = 8;        // codes whose tables (for 4 lanes) fit in the first-level cache
constexpr int64_t kBlock = 64;      // tokens decoded at a time
constexpr int64_t kTasks = 6, kShortestSplit = 2048, kLongestSplit = 16384;
constexpr int64_t kRowTile = 192;   // query rows that share a decoded block
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

struct Packed {
  Tensor codes, window, start, length, encoded;
  CodecView codec;
  int64_t sinks, recent, block, ring;

  Packed(at::TensorList kv, at::IntArrayRef layout)
      : codes(kv[0]), window(kv[1]), start(kv[2]), length(kv[3]), encoded(kv[4]), codec(kv.slice(5), layout.slice(3)),
        sinks(layout[0]), recent(layout[1]), block(layout[2]), ring(window.size(2) - layout[0]) {
    check_start(start, codes);
  }

  const uint8_t* codes_of(int64_t b, int64_t h) const {
    return codes.const_data_ptr<uint8_t>() + b * codes.stride(0) + h * codes.stride(1);
  }
  RowStart row(int64_t b) const { return RowStart(start, b); }
};

struct Call {
  const Packed &key, &value;
  std::shared_ptr<Tables> key_tables, value_tables;
  int64_t batch, heads, group, queries, rows, dim, padded, length;
  Tensor q;         // float32 [batch, heads, rows, dim], scaled
  Tensor mask;      // bool or float32, strides expanded to [batch, query heads, queries, width]; undefined for none
  Tensor tails[2];  // full-precision keys and values of the newest slots, or undefined
  double softcap;
  std::vector<int64_t> code_limit;   // per row of the batch and query: codes of lower slots take part
  std::vector<int64_t> dense_first;  // the same: full-precision slots from here on take part
  std::vector<int64_t> last;         // per query: the causal limit
  std::vector<int64_t> coded;        // per row of the batch: the highest of its limits
  std::vector<int64_t> dense_low;    // per row of the batch: the first slot that is held in full precision

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

// ---------------------------------------------------------------------------------------------------------------------
// Few query rows: tables and histograms

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
  FrameTables(const Call& call, const float* q, int64_t head)
      : c_(call), t_(*call.key_tables), head_(head), q_(q), turned_(kFrames * L * t_.padded),
        into_(kFrames * L * t_.padded_dims), planar_(kFrames * L * t_.codes * kWords), cosine_(t_.pairs + kWidth),
        sine_(t_.pairs + kWidth), table_(L * t_.codes * kWords) {}

  // The table of the frame of a position, [codes, 256, L]; `last` is where the split ends.
  const float* at(int64_t position, int64_t last) {
    const int64_t frame = t_.pairs ? (position - floor_mod(position, t_.frame)) / t_.frame : 0;
    if (frame != current_) {
      const int64_t all = t_.codes * kWords;
      if (frame >= first_ + count_ || frame < first_) make(frame, t_.pairs ? ceil_div(last - frame * t_.frame, t_.frame) : 1);
      interleave<L>(table_, planar_ + (frame - first_) * c_.rows * all, all, c_.rows, all);
      current_ = frame;
    }
    return table_;
  }

 private:
  static constexpr int64_t kFrames = 4;

  void make(int64_t frame, int64_t wanted) {
    first_ = frame, count_ = std::min(kFrames, wanted);
    const int64_t rows = count_ * c_.rows, all = t_.codes * kWords;
    for (int64_t f = 0; f < count_; ++f) {
      cos_sin(cosine_, sine_, t_.inv_freq.data(), t_.pairs, (frame + f) * t_.frame);
      for (int64_t r = 0; r < c_.rows; ++r)
        rotate_back(turned_ + (f * c_.rows + r) * t_.padded, q_ + r * t_.padded, cosine_, sine_, t_.pairs, t_.padded);
    }
    // Into the metric of the codewords: q . (inverse y) = (inverse^T q) . y.
    const float* inverse = t_.inverse_t + head_ * t_.dim * t_.padded_dims;
    product(into_, t_.padded_dims, turned_, t_.padded, 1, inverse, t_.padded_dims, rows, t_.padded_dims, t_.dim);
    for (int64_t m = 0; m < t_.codes; ++m)
      product(
          planar_ + m * kWords, all, into_ + m % t_.groups * t_.width, t_.padded_dims, 1, t_.columns_of(head_, m),
          kWords, rows, kWords, t_.width);
  }

  const Call& c_;
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
  MeanScores(const Call& call, const float* q, int64_t head)
      : c_(call), t_(*call.key_tables), q_(q), into_(t_.mean_into + head * t_.dim * t_.padded_rank),
        mean_(t_.mean_at + head * t_.rank * kRotate), turned_(kTurns * c_.rows * t_.padded),
        thin_(kTurns * c_.rows * t_.padded_rank), planar_(kTurns * c_.rows * kRotate), cosine_(t_.pairs),
        sine_(t_.pairs), cos_(t_.pairs), sin_(t_.pairs) {}

  // Scores of n positions, [n, L].
  template <int L>
  void at(float* scores, int64_t position, int64_t n) {
    while (n > 0) {
      const int64_t place = floor_mod(position, kRotate), base = position - place;
      if (base < first_ || base >= first_ + count_ * kRotate) make(base, ceil_div(place + n, kRotate));
      const int64_t some = std::min(n, kRotate - place);
      interleave<L>(scores, planar_ + (base - first_) * c_.rows + place, kRotate, c_.rows, some);
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
      for (int64_t r = 0; r < c_.rows; ++r)
        rotate_back(
            turned_ + (turn * c_.rows + r) * t_.padded, q_ + r * t_.padded, cosine_.data(), sine_.data(), t_.pairs,
            t_.padded);
    }
    product(thin_, t_.padded_rank, turned_, t_.padded, 1, into_, t_.padded_rank, count_ * c_.rows, t_.padded_rank, t_.dim);
    product(planar_, kRotate, thin_, t_.padded_rank, 1, mean_, kRotate, count_ * c_.rows, kRotate, t_.rank);
  }

  const Call& c_;
  const Tables& t_;
  const float *q_, *into_, *mean_;
  Buffer turned_, thin_, planar_;
  std::vector<float> cosine_, sine_;
  std::vector<double> cos_, sin_;
  int64_t first_ = 0, count_ = 0;
};

// One split of the codes, [first, last) of a row and head, for all of its query rows.
template <int L>
void attend_by_tables(const Call& c, int64_t b, int64_t h, int64_t first, int64_t last, const float* q, Part part) {
  using V = Lanes<L>;
  Timer timer;
  const Tables &kt = *c.key_tables, &vt = *c.value_tables;
  const int64_t key_bytes = c.key.codec.bytes(), value_bytes = c.value.codec.bytes();
  const int64_t key_gain = key_bytes - kt.codes, value_gain = value_bytes - vt.codes;
  const uint8_t *key_codes = c.key.codes_of(b, h), *value_codes = c.value.codes_of(b, h);
  const RowStart row = c.key.row(b);
  const int64_t sink = row.sink();
  FrameTables<L> tables(c, q, h);
  MeanScores means(c, q, h);
  Buffer scores(kChunk * L), of_mean(kChunk * L), histogram;
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
    means.at<L>(key_gain ? of_mean : scores, position, n);
    if (key_gain) scores.fill(n * L);
    timer.lap(kMean);
    const uint8_t* kc = key_codes + slot * key_bytes;
    for_slabs(kt.codes, [&](int64_t m, auto count) {
      add_table_scores<L, count.value>(scores, kc + key_gain + m, key_bytes, table + m * kWords * L, n);
    });
    if (key_gain) {  // the gain scales the codewords, not the mean
      const float* gains = c.key.codec.gain_table();
      for (int64_t t = 0; t < n; ++t)
        V::store(scores + t * L, V::load(scores + t * L) * gains[kc[t * key_bytes]] + V::load(of_mean + t * L));
    }
    timer.lap(kScores);

    if (limited)
      restrict_scores(c, b, h, 0, c.rows, nullptr, slot, n, scores, L, 1, [&](int64_t query, float* s) {
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

    const uint8_t* vc = value_codes + slot * value_bytes;
    if (value_gain) {
      const float* gains = c.value.codec.gain_table();
      for (int64_t t = 0; t < n; ++t) V::store(scores + t * L, V::load(scores + t * L) * gains[vc[t * value_bytes]]);
    }
    for_slabs(vt.codes, [&](int64_t m, auto count) {
      add_to_histogram<L, count.value>(histogram + m * kWords * L, vc + value_gain + m, value_bytes, scores, n);
    });
    timer.lap(kValues);
    slot = end;
  }

  // Histograms to vectors, in the metric; `finish` brings them back.
  std::copy_n(top, c.rows, part.top);
  std::copy_n(mass, c.rows, part.mass);
  for (int64_t m = 0; m < vt.codes; ++m) {
    const int64_t width = vt.width, begin = m % vt.groups * width;
    const float* bins = histogram + m * kWords * L;
    if (vt.wide == width) {
      product(part.out + begin, c.padded, bins, 1, L, c.value.codec.words(h, m), width, c.rows, width, kWords, true);
      continue;
    }
    Buffer sum(c.rows * vt.wide);
    const at::Half* words = vt.wide_words.data() + (h * vt.codes + m) * kWords * vt.wide;
    product(sum, vt.wide, bins, 1, L, words, vt.wide, c.rows, vt.wide, kWords);
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t e = 0; e < width; ++e) part.out[r * c.padded + begin + e] += sum[r * vt.wide + e];
  }
  timer.lap(kValues);
}

// ---------------------------------------------------------------------------------------------------------------------
// Many query rows: blocks of keys and values as plain vectors

// Online softmax over a block: scores [rows, kBlock] (n of them valid), values [n, padded].
void absorb(const Call& c, Part part, int64_t rows, float* scores, int64_t n, const float* values) {
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * kBlock;
    Vec high(-kInf);
    for (int64_t t = n; t < kBlock; ++t) s[t] = -kInf;
    for (int64_t t = 0; t < kBlock; t += kWidth) high = at::vec::maximum(high, Vec::loadu(s + t));
    const float now = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, high);
    if (now > part.top[r]) {
      const float fade = part.top[r] == -kInf ? 0.f : std::exp(part.top[r] - now);
      part.top[r] = now;
      part.mass[r] *= fade;
      float* o = part.out + r * c.padded;
      for (int64_t d = 0; d < c.padded; d += kWidth) (Vec::loadu(o + d) * Vec(fade)).store(o + d);
    }
    const Vec peak(part.top[r] == -kInf ? 0.f : part.top[r]);
    Vec sum(0.f);
    for (int64_t t = 0; t < kBlock; t += kWidth) {
      const Vec p = (Vec::loadu(s + t) - peak).exp_u20();
      p.store(s + t);
      sum = sum + p;
    }
    part.mass[r] += reduce_sum(sum);
  }
  product(part.out, c.padded, scores, kBlock, 1, values, c.padded, rows, c.padded, n, true);
}

// Sums of codewords of tokens [first, first + n), in the metric: [n, padded].
void add_codewords(const Packed& kv, const Tables& t, int64_t b, int64_t h, int64_t first, int64_t n, float* out) {
  const int64_t bytes = kv.codec.bytes(), gain = bytes - t.codes;
  const uint8_t* codes = kv.codes_of(b, h) + first * bytes;
  const float* gains = kv.codec.gain_table();
  const at::Half* words = kv.codec.words(h, 0);
  for (int64_t i = 0; i < n; ++i, codes += bytes) {
    float* row = out + i * t.padded;
    std::fill_n(row, t.padded, 0.f);
    for (int64_t m = 0; m < t.codes; ++m)
      add_to(row + m % t.groups * t.width, words + (m * kWords + codes[gain + m]) * t.width, t.width);
    if (gain)
      for (int64_t e = 0; e < t.dims; ++e) row[e] *= gains[codes[0]];
  }
}

// Keys of tokens [first, first + n) as plain vectors in the canonical order, transposed: [padded, kBlock].
class KeyDecoder {
 public:
  KeyDecoder(const Call& c, int64_t b, int64_t h)
      : c_(c), t_(*c.key_tables), b_(b), h_(h), sums_(kBlock * t_.padded), keys_(kBlock * t_.padded),
        frame_cos_(t_.pairs), frame_sin_(t_.pairs), turn_cos_(t_.pairs), turn_sin_(t_.pairs) {}

  void decode(float* out, int64_t first, int64_t n) {
    const RowStart row = c_.key.row(b_);
    int64_t turned = std::numeric_limits<int64_t>::min(), framed = turned;
    add_codewords(c_.key, t_, b_, h_, first, n, sums_);
    product(keys_, t_.padded, sums_, t_.padded, 1, t_.inverse + h_ * t_.dims * t_.padded, t_.padded, n, t_.padded, t_.dims);
    const int64_t pairs = t_.pairs;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t position = row.position(first + i);
      const int64_t turn = floor_mod(position, kRotate), place = floor_mod(position, t_.frame);
      if (position - turn != turned) cos_sin(turn_cos_, turn_sin_, t_.inv_freq.data(), pairs, turned = position - turn);
      if (position - place != framed) cos_sin(frame_cos_, frame_sin_, t_.inv_freq.data(), pairs, framed = position - place);
      const float* mean = t_.mean_rows + (h_ * kRotate + turn) * t_.padded;
      float* k = keys_ + i * t_.padded;
      const float *cf = frame_cos_, *sf = frame_sin_, *ct = turn_cos_, *st = turn_sin_;
      int64_t p = 0;
      for (; p + kWidth <= pairs; p += kWidth) {
        const Vec a = load(k + p), b = load(k + pairs + p), ma = load(mean + p), mb = load(mean + pairs + p);
        (a * load(cf + p) - b * load(sf + p) + ma * load(ct + p) - mb * load(st + p)).store(k + p);
        (b * load(cf + p) + a * load(sf + p) + mb * load(ct + p) + ma * load(st + p)).store(k + pairs + p);
      }
      for (; p < pairs; ++p) {
        const float a = k[p], b = k[pairs + p], ma = mean[p], mb = mean[pairs + p];
        k[p] = a * cf[p] - b * sf[p] + ma * ct[p] - mb * st[p];
        k[pairs + p] = b * cf[p] + a * sf[p] + mb * ct[p] + ma * st[p];
      }
      for (int64_t d = 2 * pairs; d < t_.dim; ++d) k[d] += mean[d];
    }
    transpose(out, kBlock, keys_, t_.padded, n, t_.padded);
  }

 private:
  const Call& c_;
  const Tables& t_;
  const int64_t b_, h_;
  Buffer sums_, keys_, frame_cos_, frame_sin_, turn_cos_, turn_sin_;
};

// Slots [first, last) of the codes for query rows [row0, row0 + rows); q is in the canonical order.
void attend_by_blocks(
    const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, int64_t first, int64_t last, const float* q,
    Part part) {
  Timer timer;
  const int64_t sink = c.key.row(b).sink();
  const int64_t* limits = c.code_limit.data() + b * c.queries;
  int64_t widest = 0;
  for (int64_t r = row0; r < row0 + rows; ++r) widest = std::max(widest, limits[c.query_of(r)]);
  last = std::min(last, widest);
  KeyDecoder decoder(c, b, h);
  Buffer keys, values(kBlock * c.padded), scores(rows * kBlock);
  keys.fill(c.padded * kBlock);
  for (int64_t slot = first; slot < last; slot += kBlock) {
    const int64_t n = std::min(kBlock, last - slot);
    decoder.decode(keys, slot, n);
    timer.lap(kTables);
    product(scores, kBlock, q, c.padded, 1, keys, kBlock, rows, kBlock, c.dim);
    timer.lap(kScores);
    restrict_scores(c, b, h, row0, rows, nullptr, slot, n, scores, 1, kBlock, [&](int64_t query, float* s) {
      for (int64_t t = std::max<int64_t>(0, limits[query] - slot); t < n; ++t) s[t] = -kInf;
      for (int64_t t = std::max(slot, sink); t < std::min(slot + n, sink + c.key.sinks); ++t) s[t - slot] = -kInf;
    });
    timer.lap(kSoftmax);
    add_codewords(c.value, *c.value_tables, b, h, slot, n, values);
    absorb(c, part, rows, scores, n, values);
    timer.lap(kValues);
  }
}

// What is held in full precision: the newest slots, from the window or the tails, and the sinks.
template <typename T>
void attend_dense(
    const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* q, Part part) {
  Timer timer;
  const int64_t sink = c.key.row(b).sink();
  const int64_t* from_slot = c.dense_first.data() + b * c.queries;
  const Packed* kv[2] = {&c.key, &c.value};
  Buffer plain, keys, values, scores(rows * kBlock);
  for (Buffer* buffer : {&plain, &keys, &values}) buffer->fill(kBlock * c.padded);
  int64_t slots[kBlock];
  const auto block = [&](int64_t n, bool of_sinks) {
    for (int which = 0; which < 2; ++which) {
      const Packed& p = *kv[which];
      const Tensor& tail = c.tails[which];
      const bool tailed = tail.defined() && !of_sinks;
      const Tensor& from = tailed ? tail : p.window;
      const T* rows_of = from.const_data_ptr<T>() + b * from.stride(0) + h * from.stride(1);
      float* out = which ? values : plain;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t index = of_sinks ? slots[i] - sink
            : tailed                   ? from.size(2) - (c.length - slots[i])
                                       : p.sinks + slots[i] % p.ring;
        at::vec::convert(rows_of + index * c.dim, out + i * c.padded, c.dim);
      }
    }
    if (rows <= kMaxLanes) {  // a transposed block would not pay
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < rows; ++r) scores[r * kBlock + i] = dot(q + r * c.padded, plain + i * c.padded, c.padded);
    } else {
      transpose(keys, kBlock, plain, c.padded, n, c.padded);
      product(scores, kBlock, q, c.padded, 1, keys, kBlock, rows, kBlock, c.dim);
    }
    restrict_scores(c, b, h, row0, rows, slots, 0, n, scores, 1, kBlock, [&](int64_t query, float* s) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t slot = slots[i];
        const bool is_sink = slot >= sink && slot < sink + c.key.sinks;
        if (slot > c.last[query] || is_sink != of_sinks || (!of_sinks && slot < from_slot[query])) s[i] = -kInf;
      }
    });
    absorb(c, part, rows, scores, n, values);
  };
  int64_t lowest = c.length, highest = -1;
  for (int64_t r = row0; r < row0 + rows; ++r) {
    lowest = std::min(lowest, from_slot[c.query_of(r)]);
    highest = std::max(highest, c.last[c.query_of(r)]);
  }
  for (int64_t first = std::max(lowest, c.dense_low[b]); first < std::min(c.length, highest + 1); first += kBlock) {
    const int64_t n = std::min(kBlock, c.length - first);
    std::iota(slots, slots + n, first);
    block(n, false);
  }
  for (int64_t first = 0; first < c.key.sinks; first += kBlock) {
    const int64_t n = std::min({kBlock, c.key.sinks - first, c.length - sink - first});
    if (n <= 0) break;
    std::iota(slots, slots + n, sink + first);
    block(n, true);
  }
  timer.lap(kDense);
}

// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
void run(const Call& c, const c10::optional<Tensor>& sink_logits, Tensor& result) {
  const bool framed = !c.key_tables->pairs || c.key_tables->frame >= kShortestFrame;
  const bool by_tables = c.rows <= kMaxLanes && framed;
  const int64_t tile = by_tables ? c.rows : kRowTile, tiles = std::max<int64_t>(1, ceil_div(c.rows, tile));
  // The cut depends on sizes alone, never on the number of threads, so that results do not either: enough parts for a
  // few threads, but a part's histograms and first tables should serve many tokens.
  const int64_t wanted = ceil_div(kTasks, c.batch * c.heads * tiles);
  const int64_t coded = *std::max_element(c.coded.begin(), c.coded.end());
  const int64_t length = std::clamp(ceil_div(coded, wanted), kShortestSplit, kLongestSplit);
  const int64_t splits = ceil_div(coded, length);
  const int64_t parts = splits + 1, per_row = 2 + c.padded, total = c.batch * c.heads * c.rows;
  Buffer space(parts * total * per_row), canonical(total * c.padded), plain(total * c.padded);
  const float* q = c.q.const_data_ptr<float>();
  for (int64_t i = 0; i < total; ++i)
    for (int64_t d = 0; d < c.padded; ++d) {
      plain[i * c.padded + d] = d < c.dim ? q[i * c.dim + d] : 0.f;
      canonical[i * c.padded + d] = d < c.dim ? q[i * c.dim + c.key_tables->order[d]] : 0.f;
    }
  const auto part_at = [&](int64_t part, int64_t bh, int64_t row) {
    const int64_t i = part * total + bh * c.rows + row;
    return Part{space + i, space + parts * total + i, space + 2 * parts * total + i * c.padded};
  };
  at::parallel_for(0, c.batch * c.heads * tiles * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / (tiles * parts), row0 = task / parts % tiles * tile, index = task % parts;
      const int64_t b = bh / c.heads, h = bh % c.heads, rows = std::min(tile, c.rows - row0);
      Part part = part_at(index, bh, row0);
      part.clear(rows, c.padded);
      const int64_t at = (bh * c.rows + row0) * c.padded;
      if (index == splits) {
        attend_dense<T>(c, b, h, row0, rows, plain + at, part);
        continue;
      }
      const int64_t first = index * length, last = std::min(c.coded[b], first + length);
      if (first >= last) continue;
      if (!by_tables) attend_by_blocks(c, b, h, row0, rows, first, last, canonical + at, part);
      else if (rows <= 4) attend_by_tables<4>(c, b, h, first, last, canonical + at, part);
      else if (rows <= 8) attend_by_tables<8>(c, b, h, first, last, canonical + at, part);
      else attend_by_tables<16>(c, b, h, first, last, canonical + at, part);
    }
  });

  Timer timer;
  const float* logits = nullptr;
  Tensor logits_;
  if (sink_logits.has_value()) logits_ = sink_logits->to(at::kFloat).contiguous(), logits = logits_.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, total, 64, [&](int64_t begin, int64_t end) {
    Buffer coded_sum, sum;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t bh = i / c.rows, h = bh % c.heads, row = i % c.rows;
      const float sink = logits ? logits[h * c.group + row / c.queries] : -kInf;
      float top = sink;
      for (int64_t p = 0; p < parts; ++p) top = std::max(top, *part_at(p, bh, row).top);
      float coded_mass = 0, mass = sink == -kInf ? 0.f : std::exp(sink - top);
      coded_sum.fill(c.padded), sum.fill(c.padded);
      for (int64_t p = 0; p < parts; ++p) {
        const Part part = part_at(p, bh, row);
        if (*part.top == -kInf) continue;
        const float weight = std::exp(*part.top - top);
        (p < splits ? coded_mass : mass) += weight * *part.mass;
        float* to = p < splits ? coded_sum : sum;
        for (int64_t d = 0; d < c.padded; d += kWidth)
          at::vec::fmadd(Vec(weight), Vec::loadu(part.out + d), Vec::loadu(to + d)).store(to + d);
      }
      // From the metric of the value codec, and its mean, to plain values.
      const Tables& vt = *c.value_tables;
      product(sum, c.padded, coded_sum, c.padded, 1, vt.inverse + h * vt.dims * vt.padded, vt.padded, 1, c.padded, vt.dims, true);
      mass += coded_mass;
      const float* mean = vt.mean + h * vt.padded;
      const float scale = mass > 0 ? 1 / mass : 0.f;
      for (int64_t d = 0; d < c.dim; ++d) out[i * c.dim + d] = (sum[d] + coded_mass * mean[d]) * scale;
    }
  });
  timer.lap(kMerge);
}

Tensor attention(
    const Tensor& q, at::TensorList key_parts, at::IntArrayRef key_layout, at::TensorList value_parts,
    at::IntArrayRef value_layout, const c10::optional<Tensor>& mask, double scale, int64_t causal, double softcap,
    const c10::optional<Tensor>& sink_logits, const c10::optional<Tensor>& key_tail,
    const c10::optional<Tensor>& value_tail, const c10::optional<Tensor>& tail_start, int64_t view) {
  const Packed key(key_parts, key_layout), value(value_parts, value_layout);
  const int64_t heads = key.codec.heads, dim = key.codec.dim;
  TORCH_CHECK_VALUE(
      q.dim() == 4 && q.size(3) == dim && q.size(1) % heads == 0 && q.size(0) == key.codes.size(0), "query has shape ",
      q.sizes(), "; this cache takes [batch=", key.codes.size(0), ", a multiple of ", heads,
      " heads, queries, head_dim=", dim, "]");
  const int64_t length = *key.length.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(
      length == *value.length.const_data_ptr<int32_t>(), "the keys hold ", length, " tokens and the values ",
      *value.length.const_data_ptr<int32_t>());
  Tensor result = at::empty(q.sizes(), q.options().dtype(at::kFloat));
  Call c{key, value};
  c.batch = q.size(0), c.heads = heads, c.group = q.size(1) / heads, c.queries = q.size(2);
  c.rows = c.group * c.queries, c.dim = dim, c.length = length;
  if (c.batch * c.rows == 0) return result.to(q.scalar_type());
  c.key_tables = tables_of(key.codec), c.value_tables = tables_of(value.codec);
  c.padded = c.key_tables->padded, c.softcap = softcap;
  c.q = q.to(at::kFloat).mul(scale).contiguous();
  if (mask.has_value()) {
    TORCH_CHECK_VALUE(
        mask->size(-1) >= length, "mask has shape ", mask->sizes(), "; its last size must cover the ", length,
        " tokens held");
    c.mask = mask->scalar_type() == at::kBool ? *mask : mask->to(at::kFloat);
    c.mask = c.mask.expand({c.batch, q.size(1), c.queries, mask->size(-1)});
  }
  const bool tailed = key_tail.has_value() && value_tail.has_value();
  if (tailed) c.tails[0] = key_tail->contiguous(), c.tails[1] = value_tail->contiguous();
  for (int64_t i = 0; i < c.queries; ++i)
    c.last.push_back(causal == kNotCausal ? length - 1 : causal == kUpperLeft ? i : length - c.queries + i);
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t encoded = key.encoded.const_data_ptr<int32_t>()[b], begin = key.row(b).sink();
    const int64_t held_from = tail_start.has_value() ? tail_start->const_data_ptr<int32_t>()[b] : 0;
    c.dense_low.push_back(tailed ? std::max<int64_t>(held_from, 0) : encoded);
    c.coded.push_back(0);
    for (int64_t i = 0; i < c.queries; ++i) {
      int64_t boundary = encoded;
      if (view == kExactTail) boundary = held_from;
      if (view == kStreaming)
        boundary = std::max(coded_slots(begin, length - c.queries + i + 1, key.recent, key.block), held_from);
      c.dense_first.push_back(boundary);
      c.code_limit.push_back(std::max<int64_t>(0, std::min({boundary, encoded, c.last[i] + 1})));
      c.coded.back() = std::max(c.coded.back(), c.code_limit.back());
    }
  }
  dispatch(key.window.scalar_type(), "the window", [&](auto type) {
    run<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(c, sink_logits, result);
  });
  return result.to(q.scalar_type());
}

// Nanoseconds that all threads spent per phase since the last call; profiling goes on or off.
std::vector<double> profile(bool on) {
  std::vector<double> found;
  for (auto& s : spent) found.push_back(static_cast<double>(s.exchange(0)));
  profiling = on;
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchgsrq, m) {
  m.def("cpu_profile(bool on) -> float[]", profile);
}
TORCH_LIBRARY_IMPL(torchgsrq, CPU, m) {
  m.impl("attention", attention);
}

}  // namespace gsrq
