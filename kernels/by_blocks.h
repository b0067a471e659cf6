// Many query rows: blocks of keys and values as vectors, decoded or held in full precision. For attention.cpp and paged.cpp.
#pragma once

#include "by_tables.h"
#include "tiles.h"

namespace gsrq {
namespace {

constexpr int64_t kBlock = 64;    // tokens decoded at a time
constexpr int64_t kPadding = 16;  // rows of a left factor are a multiple of it: each size is a program of its own

// Whether matrix tiles multiply so many query rows with blocks of tokens: in the precision of the model alone.
inline bool by_tiles(const Call& c, int64_t rows) { return c.bfloat16 && rows > 2 * kWidth && has_tiles(); }

// out[j, r] = x[r, j]: rows of n elements, lanes apart.
inline void as_columns(float* out, int64_t lanes, const float* x, int64_t ldx, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) out[j * lanes + r] = x[r * ldx + j];
}

// Query rows for products with blocks of tokens: scores come as [tokens, lanes], lanes past the rows zero. Behind them must be
// room for kPadding tokens less one.
class Rows {
 public:
  const int64_t lanes;

  Rows(const Call& c, int64_t rows)
      : lanes(round_up(rows, kWidth)), rows_(rows), dim_(c.dim), few_(rows <= 4 && dim_ % kWidth == 0),
        tiled_(by_tiles(c, rows)) {
    if (!tiled_) data_.fill(dim_ * (few_ ? rows : lanes));
  }
  void set(const float* x, int64_t ldx) {
    if (tiled_) {
      left_.rows(x, ldx, rows_, dim_);
      return right_.transpose(left_, rows_, dim_ / 2, lanes);
    }
    if (!few_) return as_columns(data_, lanes, x, ldx, rows_, dim_);
    for (int64_t r = 0; r < rows_; ++r) std::copy_n(x + r * ldx, dim_, data_ + r * dim_);
  }
  // The products of the rows with n tokens, lda apart.
  void score(float* scores, const float* a, int64_t lda, int64_t n) {
    if (tiled_) {
      left_.rows(a, lda, n, dim_);
      return tiled_product(scores, lanes, left_, right_, round_up(n, kPadding), lanes, dim_, false);
    }
    if (!few_) return product(scores, lanes, a, lda, 1, data_, lanes, n, lanes, dim_);
    switch (rows_) {
      case 1: return dots<1>(scores, lanes, a, lda, data_, n, dim_);
      case 2: return dots<2>(scores, lanes, a, lda, data_, n, dim_);
      case 3: return dots<3>(scores, lanes, a, lda, data_, n, dim_);
      default: return dots<4>(scores, lanes, a, lda, data_, n, dim_);
    }
  }

 private:
  const int64_t rows_, dim_;
  const bool few_, tiled_;
  Buffer data_;
  Pairs left_, right_;
};

// The values of query rows, weighted by their probabilities: in part.out, or, where tiles add them, in columns until `finish`.
class Outputs {
 public:
  Outputs(const Call& c, Part part, int64_t rows)
      : part_(part), rows_(rows), lanes_(round_up(rows, kWidth)), padded_(c.padded), tiled_(by_tiles(c, rows)) {
    if (tiled_) columns_.fill(padded_ * lanes_);
  }
  // Multiplies the outputs of `some` rows from r on, at most kWidth.
  void fade(int64_t r, int64_t some, const float* by) {
    if (std::all_of(by, by + some, [](float x) { return x == 1.f; })) return;
    if (tiled_) {
      const Vec factors = load(by);
      for (float *x = columns_ + r, *end = x + padded_ * lanes_; x < end; x += lanes_) (load(x) * factors).store(x);
      return;
    }
    for (int64_t l = 0; l < some; ++l) {
      if (by[l] == 1.f) continue;
      float* o = part_.out + (r + l) * padded_;
      for (int64_t d = 0; d < padded_; d += kWidth) (load(o + d) * Vec(by[l])).store(o + d);
    }
  }
  // Adds n values [n, padded], ld apart, by probabilities [n, lanes].
  void add(const float* p, const float* values, int64_t ld, int64_t n) {
    if (!tiled_) return product(part_.out, padded_, p, 1, lanes_, values, ld, rows_, padded_, n, true);
    const int64_t terms = round_up(n, 32);
    right_.paired_rows(values, ld, n, padded_, terms);
    left_.transpose(right_, terms / 2, padded_, terms / 2);
    right_.paired_rows(p, lanes_, n, lanes_, terms);
    tiled_product(columns_, lanes_, left_, right_, padded_, lanes_, terms, true);
  }
  void finish() {
    if (!tiled_) return;
    for (int64_t d = 0; d < padded_; ++d)
      for (int64_t r = 0; r < rows_; ++r) part_.out[r * padded_ + d] = columns_[d * lanes_ + r];
    release_tiles();
  }

 private:
  const Part part_;
  const int64_t rows_, lanes_, padded_;
  const bool tiled_;
  Buffer columns_;
  Pairs left_, right_;
};

// Online softmax over a block of n tokens: scores [n, lanes] become probabilities, by which their values are to be added.
void soften(Part part, Outputs& outputs, int64_t rows, int64_t lanes, float* scores, int64_t n) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int64_t some = std::min(kWidth, rows - r);
    float* s = scores + r;
    Vec high(-kInf);
    for (int64_t t = 0; t < n; ++t) high = at::vec::maximum(high, load(s + t * lanes));
    alignas(64) float now[kWidth], fade[kWidth] = {};
    high.store(now);
    for (int64_t l = 0; l < some; ++l) {
      float& top = part.top[r + l];
      fade[l] = 1.f;
      if (now[l] > top) {
        fade[l] = top == -kInf ? 0.f : std::exp(top - now[l]);
        top = now[l];
        part.mass[r + l] *= fade[l];
      }
      now[l] = top == -kInf ? 0.f : top;
    }
    for (int64_t l = some; l < kWidth; ++l) now[l] = 0.f;
    const Vec peak = load(now);
    Vec sum(0.f);
    for (int64_t t = 0; t < n; ++t) {
      const Vec p = (load(s + t * lanes) - peak).exp_u20();
      p.store(s + t * lanes);
      sum = sum + p;
    }
    sum.store(now);
    for (int64_t l = 0; l < some; ++l) part.mass[r + l] += now[l];
    outputs.fade(r, some, fade);
  }
}

// Sums of codewords of tokens, from the first of `codes` on, in the metric: [n, padded].
void add_codewords(const Head& head, const uint8_t* codes, int64_t n, float* out) {
  const Tables& t = head.tables;
  const auto add = [&](auto known) {
    const int64_t width = known.value ? known.value : t.width;
    for (int64_t i = 0; i < n; ++i, out += t.padded) {
      const at::Half* words = head.codec.words(head.h, 0);
      for (int64_t stage = 0; stage < t.codes; stage += t.groups) {
        const int64_t groups = std::min(t.groups, t.codes - stage);
        for (int64_t g = 0; g < groups; ++g, words += kWords * width)
          add_to(out + g * width, words + *codes++ * width, width, stage > 0);
      }
      std::fill(out + t.dim, out + t.padded, 0.f);
    }
  };
  switch (t.width) {
    case 8: return add(std::integral_constant<int64_t, 8>());
    case 16: return add(std::integral_constant<int64_t, 16>());
    default: add(std::integral_constant<int64_t, 0>());
  }
}

// Scores of codes, by their keys as plain vectors in the canonical order.
class DecodedScores {
 public:
  DecodedScores(const Call& c, int64_t b, int64_t h, int64_t rows, const float* q)
      : row_(c.key.start, b), head_(c.key_tables[h]), t_(head_.tables), codes_(c.key.codes_of(b, h)),
        inverse_(t_.inverse + head_.h * t_.dim * t_.padded), sums_(kBlock * t_.padded),
        keys_(kBlock * t_.padded), frame_cos_(t_.pairs), frame_sin_(t_.pairs), turn_cos_(t_.pairs), turn_sin_(t_.pairs),
        tiled_(by_tiles(c, rows)), plain_(c, rows) {
    plain_.set(q, t_.padded);
    if (tiled_) pairs_of_inverse_.paired_rows(inverse_, t_.padded, t_.dim, t_.padded, t_.dim);
  }

  // Scores of n slots from `first` on, [n, lanes].
  void score(float* scores, int64_t first, int64_t n) {
    int64_t turned = std::numeric_limits<int64_t>::min(), framed = turned;
    add_codewords(head_, codes_ + first * t_.codes, n, sums_);
    if (tiled_) {
      left_.rows(sums_, t_.padded, n, t_.dim);
      tiled_product(keys_, t_.padded, left_, pairs_of_inverse_, round_up(n, kPadding), t_.padded, t_.dim, false);
    } else {
      product(keys_, t_.padded, sums_, t_.padded, 1, inverse_, t_.padded, n, t_.padded, t_.dim);
    }
    const int64_t pairs = t_.pairs;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t position = row_.position(first + i);
      const int64_t turn = floor_mod(position, kRotate), place = floor_mod(position, t_.frame);
      if (position - turn != turned) cos_sin(turn_cos_, turn_sin_, t_.inv_freq.data(), pairs, turned = position - turn);
      if (position - place != framed) cos_sin(frame_cos_, frame_sin_, t_.inv_freq.data(), pairs, framed = position - place);
      const float* mean = t_.mean_rows + (head_.h * kRotate + turn) * t_.padded;
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
    plain_.score(scores, keys_, t_.padded, n);
  }

 private:
  const RowStart row_;
  const Head head_;
  const Tables& t_;
  const uint8_t* codes_;
  const float* inverse_;
  Buffer sums_, keys_, frame_cos_, frame_sin_, turn_cos_, turn_sin_;
  const bool tiled_;
  Pairs left_, pairs_of_inverse_;
  Rows plain_;
};

// Slots [first, last) of the codes for query rows [row0, row0 + rows); q is in the canonical order.
void attend_by_blocks(
    const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, int64_t first, int64_t last, const float* q,
    Part part) {
  Timer timer;
  const int64_t sink = RowStart(c.key.start, b).sink();
  const int64_t* limits = c.code_limit.data() + b * c.queries;
  int64_t widest = 0;
  for (int64_t r = row0; r < row0 + rows; ++r) widest = std::max(widest, limits[c.query_of(r)]);
  last = std::min(last, widest);
  DecodedScores scored(c, b, h, rows, q);
  const int64_t lanes = round_up(rows, kWidth);
  Outputs outputs(c, part, rows);
  const Head value = c.value_tables[h];
  Buffer values(kBlock * c.padded), scores(kBlock * lanes);
  for (int64_t slot = first; slot < last;) {
    const int64_t n = std::min(kBlock, last - slot);
    scored.score(scores, slot, n);
    timer.lap(kScores);
    restrict_scores(c, b, h, row0, rows, nullptr, slot, n, scores, lanes, 1, [&](int64_t query, float* s) {
      for (int64_t t = std::max<int64_t>(0, limits[query] - slot); t < n; ++t) s[t * lanes] = -kInf;
      for (int64_t t = std::max(slot, sink); t < std::min(slot + n, sink + c.key.sinks); ++t) s[(t - slot) * lanes] = -kInf;
    });
    timer.lap(kSoftmax);
    add_codewords(value, c.value.codes_of(b, h) + slot * value.tables.codes, n, values);
    soften(part, outputs, rows, lanes, scores, n);
    outputs.add(scores, values, c.padded, n);
    timer.lap(kValues);
    slot += n;
  }
  outputs.finish();
}

// How query rows of a KV head are cut up, and which form reads their codes: look-up tables of scores, or decoded blocks.
struct Cut {
  bool by_tables;
  int64_t tile;  // rows at a time

  explicit Cut(const Call& c) {
    const int64_t rows = c.rows;
    const Tables& any = c.key_tables[0].tables;  // what heads differ in is not asked of it
    by_tables = !by_tiles(c, rows) && 4 * rows <= 3 * any.dim && (!any.pairs || any.frame >= kShortestFrame);
    const int64_t most = by_tables ? kMaxLanes : kRowTile;
    tile = rows <= most ? std::max<int64_t>(rows, 1) : by_tables ? most : ceil_div(rows, ceil_div(rows, most));
  }

  void attend(
      const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, int64_t first, int64_t last, const float* q,
      Part part) const {
    if (!by_tables) attend_by_blocks(c, b, h, row0, rows, first, last, q, part);
    else if (rows <= 4) attend_by_tables<4>(c, b, h, row0, rows, first, last, q, part);
    else if (rows <= 8) attend_by_tables<8>(c, b, h, row0, rows, first, last, q, part);
    else attend_by_tables<16>(c, b, h, row0, rows, first, last, q, part);
  }

 private:
  static constexpr int64_t kShortestFrame = 64;  // shorter frames do not pay for their tables
  static constexpr int64_t kRowTile = 384;       // that share a block
};

// The output of a query row from its parts, of which the first `splits` are of codes: float32, plain, in sum [padded].
// ``sink`` is a logit that takes probability and gives nothing.
template <typename PartAt>
void merge_parts(PartAt part_at, int64_t splits, float sink, const Head& value, Buffer& coded_sum, Buffer& sum) {
  const Tables& t = value.tables;
  float top = sink;
  for (int64_t p = 0; p <= splits; ++p) top = std::max(top, *part_at(p).top);
  float coded_mass = 0, mass = sink == -kInf ? 0.f : std::exp(sink - top);
  coded_sum.fill(t.padded), sum.fill(t.padded);
  for (int64_t p = 0; p <= splits; ++p) {
    const Part part = part_at(p);
    if (*part.top == -kInf) continue;
    const float weight = std::exp(*part.top - top);
    (p < splits ? coded_mass : mass) += weight * *part.mass;
    float* to = p < splits ? coded_sum : sum;
    for (int64_t d = 0; d < t.padded; d += kWidth)
      at::vec::fmadd(Vec(weight), load(part.out + d), load(to + d)).store(to + d);
  }
  // From the metric of the value codec, and its mean, to plain values.
  if (coded_mass > 0)
    product(sum, t.padded, coded_sum, t.padded, 1, t.inverse + value.h * t.dim * t.padded, t.padded, 1, t.padded, t.dim, true);
  mass += coded_mass;
  const float* mean = t.mean + value.h * t.padded;
  const float scale = mass > 0 ? 1 / mass : 0.f;
  for (int64_t d = 0; d < t.dim; ++d) sum[d] = (sum[d] + coded_mass * mean[d]) * scale;
}

}  // namespace
}  // namespace gsrq
