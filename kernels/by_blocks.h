// Many query rows: blocks of keys and values as plain vectors, decoded or held in full precision. For attention.cpp alone.
#pragma once

#include "by_tables.h"

namespace gsrq {
namespace {

constexpr int64_t kBlock = 64;      // tokens decoded at a time

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

// Sums of codewords of tokens, from the first of `codes` on, in the metric: [n, padded].
void add_codewords(const Head& head, const uint8_t* codes, int64_t n, float* out) {
  const Tables& t = head.tables;
  const at::Half* words = head.codec.words(head.h, 0);
  for (int64_t i = 0; i < n; ++i, codes += t.codes) {
    float* row = out + i * t.padded;
    std::fill_n(row, t.padded, 0.f);
    for (int64_t m = 0; m < t.codes; ++m)
      add_to(row + m % t.groups * t.width, words + (m * kWords + codes[m]) * t.width, t.width);
  }
}

// Keys of tokens [first, first + n) as plain vectors in the canonical order, transposed: [padded, kBlock].
class KeyDecoder {
 public:
  KeyDecoder(const Call& c, int64_t b, int64_t h)
      : row_(c.key.start, b), head_(c.key_tables[h]), t_(head_.tables), codes_(c.key.codes_of(b, h)), sums_(kBlock * t_.padded), keys_(kBlock * t_.padded),
        frame_cos_(t_.pairs), frame_sin_(t_.pairs), turn_cos_(t_.pairs), turn_sin_(t_.pairs) {}

  void decode(float* out, int64_t first, int64_t n) {
    int64_t turned = std::numeric_limits<int64_t>::min(), framed = turned;
    add_codewords(head_, codes_ + first * t_.codes, n, sums_);
    product(keys_, t_.padded, sums_, t_.padded, 1, t_.inverse + head_.h * t_.dim * t_.padded, t_.padded, n, t_.padded, t_.dim);
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
    transpose(out, kBlock, keys_, t_.padded, n, t_.padded);
  }

 private:
  const RowStart row_;
  const Head head_;
  const Tables& t_;
  const uint8_t* codes_;
  Buffer sums_, keys_, frame_cos_, frame_sin_, turn_cos_, turn_sin_;
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
  KeyDecoder decoder(c, b, h);
  const Head value = c.value_tables[h];
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
    add_codewords(value, c.value.codes_of(b, h) + slot * value.tables.codes, n, values);
    absorb(c, part, rows, scores, n, values);
    timer.lap(kValues);
  }
}

// What is held in full precision: the newest slots, from the window or the tails, and the sinks.
template <typename T>
void attend_dense(
    const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* q, Part part) {
  Timer timer;
  const int64_t sink = RowStart(c.key.start, b).sink();
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

}  // namespace
}  // namespace gsrq
