// Encode, append and the assignment of k-means for the CPU: what torchgsrq/reference means by `encode` and `append_`,
// and torchgsrq/codec/kmeans.py by `nearest`, `sum_by_code` and `moments_by_code`.

#include <torch/library.h>

#include "tables.h"

namespace gsrq {
namespace {

constexpr int64_t kTile = 16;     // vectors searched at a time: their distances stay in the first-level cache
constexpr int64_t kMaxBeam = 64;

inline float reduce_min(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::minimum(a, b); }, x);
}

// The first of n values (a multiple of kWidth) that equals `value`.
int64_t find(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int found = (load(x + i) - Vec(value)).zero_mask();
    if (found) return i + __builtin_ctz(found);
  }
  return 0;
}

// x = squares - 2 x + cost: squared distances from products, n a multiple of kWidth. Gives the minima of the lanes.
inline Vec to_distances(float* x, const float* squares, float cost, int64_t n) {
  Vec low(kInf);
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec d = at::vec::fmadd(Vec(-2.f), load(x + i), load(squares + i) + Vec(cost));
    d.store(x + i);
    low = at::vec::minimum(low, d);
  }
  return low;
}

// The k lowest values seen, lowest first, the earlier of equals first.
struct Lowest {
  int64_t k, count = 0;
  float bound;  // no higher value can be among them
  float value[kMaxBeam];
  int64_t index[kMaxBeam];

  // `low` are minima of disjoint parts of what will be seen, so at least k values are no higher than the k-th of them.
  Lowest(int64_t k, Vec low) : k(k), bound(kInf) {
    for (int64_t i = 0; i < k && k <= kWidth; ++i) {
      bound = reduce_min(low);
      low = Vec::blendv(low, Vec(kInf), low <= Vec(bound));
    }
  }

  void see(const Vec& x, int64_t first) {
    int mask = (x > Vec(bound)).zero_mask();  // bits of those not above
    if (!mask) return;
    alignas(64) float each[kWidth];
    x.store(each);
    for (; mask; mask &= mask - 1) {
      const int64_t lane = __builtin_ctz(mask);
      if (count == k && !(each[lane] < value[k - 1])) continue;
      int64_t at = count < k ? count++ : k - 1;
      for (; at > 0 && each[lane] < value[at - 1]; --at) value[at] = value[at - 1], index[at] = index[at - 1];
      value[at] = each[lane], index[at] = first + lane;
      if (count == k) bound = value[k - 1];
    }
  }
};

float squared_norm(const float* x, int64_t n) {
  Vec sum(0.f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec v = load(x + i);
    sum = at::vec::fmadd(v, v, sum);
  }
  float total = reduce_sum(sum);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

// Beam search over the residual stages of one group, for up to kTile vectors; if eta > 1, ranked by the loss
// |e|^2 + (eta - 1) (e . y/|y|)^2 at the last stage, and followed by a sweep over the stages that only lowers it.
class Search {
 public:
  Search(const Run& codec, const Tables& tables)
      : c_(codec), t_(tables), beam_(std::clamp<int64_t>(codec.beam, 1, kMaxBeam)),
        stages_(ceil_div(codec.codes, codec.groups)), stride_(round_up(codec.width, kWidth)),
        extra_(static_cast<float>(codec.eta - 1)), distance_(kTile * beam_ * kWords), along_(kTile * kWords),
        cost_(kTile * beam_), path_(kTile * beam_ * stages_), next_path_(beam_ * stages_) {
    // Rows are padded with zeros to whole vectors.
    residual_.fill(kTile * beam_ * stride_), next_.fill(beam_ * stride_), pair_.fill(2 * kTile * stride_);
  }

  // y [n, ldy] of one head; codes of the group are written to out[i * bytes + stage * groups + group].
  void run(int64_t head, int64_t group, const float* y, int64_t ldy, int64_t n, uint8_t* out, int64_t bytes) {
    if (stages_ == 1) return nearest_words(head, group, y, ldy, n, out + group, bytes);
    const int64_t width = t_.width;
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(y + i * ldy, width, residual_ + i * beam_ * stride_);
      const float square = cost_[i * beam_] = squared_norm(y + i * ldy, width);
      const float scale = square > 0 ? 1 / std::sqrt(square) : 0.f;
      for (int64_t e = 0; e < width; ++e) unit(i)[e] = y[i * ldy + e] * scale;
    }
    int64_t alive = 1, stage = 0;  // candidates of every vector
    for (int64_t code = group; code < t_.codes; code += t_.groups, ++stage) {
      const float* squares = t_.squares + (head * t_.codes + code) * kWords;
      // One product for the live candidates of all vectors: |r - w|^2 - |r|^2 = |w|^2 - 2 r . w
      if (alive == 1)
        product(distance_, kWords, residual_, beam_ * stride_, 1, t_.columns_of(head, code), kWords, n, kWords, width);
      else
        product(distance_, kWords, residual_, stride_, 1, t_.columns_of(head, code), kWords, n * beam_, kWords, width);
      const at::Half* words = c_.words(head, code);
      const bool last = code + t_.groups >= t_.codes;
      if (last && extra_ > 0)
        product(along_, kWords, unit(0), stride_, 1, t_.columns_of(head, code), kWords, n, kWords, width);
      for (int64_t i = 0; i < n; ++i) {
        float* d = distance_ + i * (alive == 1 ? 1 : beam_) * kWords;
        const float* cost = &cost_[i * beam_];
        Vec low = to_distances(d, squares, cost[0], kWords);
        if (last) {  // the best of all is all that is needed
          const float* residuals = residual_ + i * beam_ * stride_;
          float least = kInf;
          int64_t of = 0;
          for (int64_t b = 0; b < alive; ++b) {
            if (b) low = to_distances(d + b * kWords, squares, cost[b], kWords);
            if (extra_ > 0) low = add_alignment(d + b * kWords, dot(residuals + b * stride_, unit(i), width), along_ + i * kWords);
            const float one = reduce_min(low);
            if (one < least) least = one, of = b;
          }
          const int64_t best = find(d + of * kWords, kWords, least);
          if (extra_ > 0)
            for (int64_t e = 0; e < width; ++e)
              pair_[i * stride_ + e] = residuals[of * stride_ + e] - static_cast<float>(words[best * width + e]);
          for (int64_t s = 0; s < stage; ++s)
            out[i * bytes + s * t_.groups + group] = path_[(i * beam_ + of) * stages_ + s];
          out[i * bytes + stage * t_.groups + group] = static_cast<uint8_t>(best);
          continue;
        }
        int64_t pick[kMaxBeam];
        pick[0] = find(d, kWords, reduce_min(low));  // the first candidate is always the greedy path
        if (beam_ > 1) {
          d[pick[0]] = kInf;
          low = Vec(kInf);
          for (int64_t j = 0; j < kWords; j += kWidth) low = at::vec::minimum(low, load(d + j));
          Lowest others(beam_ - 1, low);
          for (int64_t j = 0; j < kWords; j += kWidth) others.see(load(d + j), j);
          for (int64_t b = 1; b < alive; ++b)
            for (int64_t j = 0; j < kWords; j += kWidth) {
              const Vec base = load(squares + j) + Vec(cost[b]);
              others.see(at::vec::fmadd(Vec(-2.f), load(d + b * kWords + j), base), b * kWords + j);
            }
          for (int64_t b = 1; b < beam_; ++b) pick[b] = b <= others.count ? others.index[b - 1] : pick[0];
        }
        advance(i, stage, pick, words);
      }
      alive = beam_;
    }
    if (extra_ > 0 && stages_ > 1) sweep(head, group, n, out, bytes);
  }

 private:
  // One stage needs no search: the loss is a constant and |w|^2 - 2 eta (y . w) + (eta - 1) (y . w)^2 / |y|^2.
  void nearest_words(int64_t head, int64_t code, const float* y, int64_t ldy, int64_t n, uint8_t* out, int64_t bytes) const {
    constexpr int kRows = kWidth >= 16 ? 8 : 4;  // as many as there are registers for
    const at::Half* columns = t_.columns_of(head, code);
    const float* squares = t_.squares + (head * t_.codes + code) * kWords;
    const Vec lane = Vec::arange(0.f, 1.f);
    for (int64_t first = 0; first < n; first += kRows) {
      const float* row[kRows];
      Vec least[kRows], word[kRows];
      float bend[kRows];
      for (int r = 0; r < kRows; ++r) {
        row[r] = y + std::min(first + r, n - 1) * ldy;
        const float square = squared_norm(row[r], t_.width);
        bend[r] = square > 0 ? extra_ / square : 0.f;
        least[r] = Vec(kInf), word[r] = Vec(0.f);
      }
      for (int64_t j = 0; j < kWords; j += kWidth) {
        Vec along[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) along[r] = Vec(0.f);
        for (int64_t e = 0; e < t_.width; ++e) {
          const Vec column = load(columns + e * kWords + j);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) along[r] = at::vec::fmadd(Vec(row[r][e]), column, along[r]);
        }
        const Vec square = load(squares + j), index(static_cast<float>(j));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec slope = at::vec::fmadd(Vec(bend[r]), along[r], Vec(-2 * (extra_ + 1)));
          const Vec loss = at::vec::fmadd(slope, along[r], square);
          word[r] = Vec::blendv(word[r], index, loss < least[r]);
          least[r] = at::vec::minimum(least[r], loss);
        }
      }
      for (int r = 0; r < kRows && first + r < n; ++r) {  // the lowest word of the lanes that hold the least
        const Vec best(reduce_min(least[r]));
        out[(first + r) * bytes] = static_cast<uint8_t>(reduce_min(Vec::blendv(Vec(kInf), word[r] + lane, least[r] == best)));
      }
    }
  }

  float* unit(int64_t i) { return pair_ + (kTile + i) * stride_; }

  // distances += (eta - 1) (s - along)^2, with s the part of the residual along the vector. Gives the lanes' minima.
  Vec add_alignment(float* distances, float s, const float* along) const {
    Vec low(kInf);
    for (int64_t j = 0; j < kWords; j += kWidth) {
      const Vec apart = Vec(s) - load(along + j);
      const Vec d = at::vec::fmadd(Vec(extra_) * apart, apart, load(distances + j));
      d.store(distances + j);
      low = at::vec::minimum(low, d);
    }
    return low;
  }

  // Gives each stage in turn the codeword of least loss among the others; the final residuals are in pair_.
  void sweep(int64_t head, int64_t group, int64_t n, uint8_t* out, int64_t bytes) {
    const int64_t width = t_.width;
    for (int64_t code = group; code < t_.codes; code += t_.groups) {
      const at::Half* words = c_.words(head, code);
      for (int64_t i = 0; i < n; ++i) add_to(pair_ + i * stride_, words + out[i * bytes + code] * width, width);
      product(distance_, kWords, pair_, stride_, 1, t_.columns_of(head, code), kWords, n, kWords, width);
      product(along_, kWords, unit(0), stride_, 1, t_.columns_of(head, code), kWords, n, kWords, width);
      const float* squares = t_.squares + (head * t_.codes + code) * kWords;
      for (int64_t i = 0; i < n; ++i) {
        float *d = distance_ + i * kWords, *r = pair_ + i * stride_;
        to_distances(d, squares, 0.f, kWords);
        const int64_t best = find(d, kWords, reduce_min(add_alignment(d, dot(r, unit(i), width), along_ + i * kWords)));
        out[i * bytes + code] = static_cast<uint8_t>(best);
        for (int64_t e = 0; e < width; ++e) r[e] -= static_cast<float>(words[best * width + e]);
      }
    }
  }

  // The picked candidates of vector i take the place of those that they extend.
  void advance(int64_t i, int64_t stage, const int64_t* pick, const at::Half* words) {
    float* next = next_;
    float* old = residual_ + i * beam_ * stride_;
    uint8_t* path = &path_[i * beam_ * stages_];
    for (int64_t b = 0; b < beam_; ++b) {
      const int64_t parent = pick[b] / kWords, code = pick[b] % kWords;
      const at::Half* w = words + code * t_.width;
      const float* r = old + parent * stride_;
      float* to = next + b * stride_;
      int64_t e = 0;
      Vec sum(0.f);
      for (; e + kWidth <= t_.width; e += kWidth) {
        const Vec v = load(r + e) - load(w + e);
        v.store(to + e);
        sum = at::vec::fmadd(v, v, sum);
      }
      float cost = reduce_sum(sum);
      for (; e < t_.width; ++e) {
        to[e] = r[e] - static_cast<float>(w[e]);
        cost += to[e] * to[e];
      }
      cost_[i * beam_ + b] = cost;
      std::copy_n(path + parent * stages_, stage, &next_path_[b * stages_]);
      next_path_[b * stages_ + stage] = static_cast<uint8_t>(code);
    }
    std::copy_n(next, beam_ * stride_, old);
    std::copy(next_path_.begin(), next_path_.end(), path);
  }

  const Run& c_;
  const Tables& t_;
  const int64_t beam_, stages_, stride_;
  const float extra_;  // eta - 1
  Buffer residual_, next_, distance_, along_;
  Buffer pair_;  // [2, kTile, stride_]: final residuals, and the vectors themselves at length 1
  std::vector<float> cost_;
  std::vector<uint8_t> path_, next_path_;
};

// Codes of up to kTile vectors in their metric, y [n, t.padded_dims], which may change; out [n, bytes].
void search_tile(const Run& c, const Tables& t, Search& search, int64_t head, float* y, int64_t n, uint8_t* out) {
  const int64_t bytes = c.bytes(), gain = c.gains != nullptr;
  if (gain)
    for (int64_t i = 0; i < n; ++i) {
      float* row = y + i * t.padded_dims;
      const float norm = std::sqrt(squared_norm(row, t.dims));
      int64_t best = 0;
      for (int64_t g = 1; g < kWords; ++g)
        if (std::abs(norm - c.gains[g]) < std::abs(norm - c.gains[best])) best = g;
      for (int64_t e = 0; e < t.dims; ++e) row[e] /= c.gains[best];
      out[i * bytes] = static_cast<uint8_t>(best);
    }
  for (int64_t g = 0; g < t.groups; ++g) search.run(head, g, y + g * t.width, t.padded_dims, n, out + gain, bytes);
}

// Encodes vectors of one row and head: x(i) gives vector i as T, position(i) its position, out [n, bytes].
template <typename Source, typename Position>
void encode_rows(
    const Run& c, const Tables& t, Search& search, int64_t head, int64_t n, Source x, Position position, uint8_t* out) {
  Buffer vectors(kTile * t.padded), y(kTile * t.padded_dims), turned(t.padded), cosine(t.pairs), sine(t.pairs);
  const float* mean = t.mean + head * t.padded;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t some = std::min(kTile, n - first);
    for (int64_t i = 0; i < some; ++i) {
      float* v = vectors + i * t.padded;
      const auto* from = x(first + i);
      for (int64_t d = 0; d < t.dim; ++d) v[d] = static_cast<float>(from[t.order[d]]);
      std::fill(v + t.dim, v + t.padded, 0.f);
      // R(place - p) x - R(place) mean
      const int64_t p = position(first + i), place = floor_mod(p, t.frame);
      cos_sin(cosine, sine, t.inv_freq.data(), t.pairs, p - place);
      rotate_back(turned, v, cosine, sine, t.pairs, t.padded);
      cos_sin(cosine, sine, t.inv_freq.data(), t.pairs, -place);
      rotate_back(v, mean, cosine, sine, t.pairs, t.padded);
      for (int64_t d = 0; d < t.padded; d += kWidth) (load(turned + d) - load(v + d)).store(v + d);
    }
    product(
        y, t.padded_dims, vectors, t.padded, 1, t.transform + head * t.dim * t.padded_dims, t.padded_dims, some,
        t.padded_dims, t.dim);
    search_tile(c, t, search, head, y, some, out + first * c.bytes());
  }
}

// A thread's searches of a codec's runs, each made when it is first needed.
class Searches {
 public:
  Searches(const CodecView& codec, const RunTables& tables) : c_(codec), t_(tables), found_(codec.runs.size()) {}

  // `encode_rows` of a head of the layer.
  template <typename Source, typename Position>
  void encode(int64_t head, int64_t n, Source x, Position position, uint8_t* out) {
    const auto [run, h] = c_.of_head[head];
    if (!found_[run]) found_[run] = std::make_unique<Search>(c_.runs[run], t_[run]);
    encode_rows(c_.runs[run], t_[run], *found_[run], h, n, x, position, out);
  }

 private:
  const CodecView& c_;
  const RunTables& t_;
  std::vector<std::unique_ptr<Search>> found_;
};

template <typename T>
bool all_finite(const T* x, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::isfinite(static_cast<float>(x[i]));
  return finite;
}

bool all_finite(const Tensor& x) {
  return dispatch(x.scalar_type(), "x", [&](auto type) {
    return all_finite(static_cast<decltype(type)>(x.const_data_ptr()), x.numel());
  });
}

// One task is a stretch of tokens of a row and head; the cut depends on sizes alone.
constexpr int64_t kStretch = 64;

Tensor encode(const Tensor& x_, const Tensor& position_, at::TensorList codec, at::IntArrayRef layout) {
  const CodecView c(codec, layout);
  TORCH_CHECK_VALUE(
      x_.dim() == 4 && x_.size(3) == c.dim, "x has shape ", x_.sizes(), "; expected [batch, heads, n, head_dim=", c.dim, "]");
  TORCH_CHECK_VALUE(
      position_.dim() == 2 && position_.size(0) == x_.size(0) && position_.size(1) == x_.size(2), "position has shape ",
      position_.sizes(), "; expected (", x_.size(0), ", ", x_.size(2), ")");
  TORCH_CHECK_VALUE(x_.is_floating_point(), "x is ", name_of(x_.scalar_type()), "; expected a floating dtype");
  const Tensor x = (x_.scalar_type() == at::kDouble ? x_.to(at::kFloat) : x_).contiguous();
  TORCH_CHECK_VALUE(all_finite(x), "x holds NaN or inf, which no codeword stands for");
  const Tensor position = position_.to(at::kLong).contiguous();
  const int64_t batch = x.size(0), heads = x.size(1), n = x.size(2);
  TORCH_CHECK_VALUE(heads == c.heads, "x has shape ", x.sizes(), "; this codec is for ", c.heads, " heads");
  Tensor out = at::empty(c.codes_shape(batch, n), x.options().dtype(at::kByte));
  if (!out.numel()) return out;
  const auto t = tables_of(c);
  const int64_t stretches = ceil_div(n, kStretch);
  dispatch(x.scalar_type(), "x", [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    at::parallel_for(0, batch * heads * stretches, 1, [&](int64_t begin, int64_t end) {
      Searches searches(c, *t);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t bh = task / stretches, first = task % stretches * kStretch, b = bh / heads, h = bh % heads;
        uint8_t* to = out.mutable_data_ptr<uint8_t>() + b * out.stride(0) + c.codes_at(out, h);
        const T* from = x.const_data_ptr<T>() + (bh * n + first) * c.dim;
        const int64_t* at = position.const_data_ptr<int64_t>() + b * n + first;
        searches.encode(
            h, std::min(kStretch, n - first), [&](int64_t i) { return from + i * c.dim; }, [&](int64_t i) { return at[i]; },
            to + first * c.bytes_of(h));
      }
    });
  });
  return out;
}

// The second half of encode, for graphs that do the first, the change to the metric, with what comes before it.
Tensor search(const Tensor& y_, at::TensorList codec, at::IntArrayRef layout) {
  const CodecView all(codec, layout);
  TORCH_CHECK_VALUE(all.runs.size() == 1, "search takes a codec whose heads have one layout");
  const auto tables = tables_of(all);
  const Run& c = all.runs[0];
  const Tables* t = &tables->front();
  const int64_t heads = y_.dim() == 3 ? y_.size(0) : -1;
  TORCH_CHECK_VALUE(
      heads == c.heads && y_.size(2) == t->dims && y_.scalar_type() == at::kFloat, "y has shape ", y_.sizes(),
      " and is ", name_of(y_.scalar_type()), "; expected float32 [", c.heads, ", n, ", t->dims, "]");
  const Tensor y = y_.contiguous();
  TORCH_CHECK_VALUE(all_finite(y), "x holds NaN or inf, which no codeword stands for");
  const int64_t n = y.size(1), tiles = ceil_div(n, kTile);
  Tensor out = at::empty({heads, n, c.bytes()}, y.options().dtype(at::kByte));
  at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    Search found(c, *t);
    Buffer rows(kTile * t->padded_dims);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tiles, first = task % tiles * kTile, some = std::min(kTile, n - first);
      for (int64_t i = 0; i < some; ++i)
        std::copy_n(y.const_data_ptr<float>() + (head * n + first + i) * t->dims, t->dims, rows + i * t->padded_dims);
      search_tile(c, *t, found, head, rows, some, out.mutable_data_ptr<uint8_t>() + (head * n + first) * c.bytes());
    }
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------

// Refuses what append_ cannot write; gives the first slot.
int64_t check_append(
    const Tensor& codes, const Tensor& window, const Tensor& length, const CodecView& c, const Tensor& x,
    const Tensor& slots) {
  const int64_t n = x.dim() == 4 ? x.size(2) : -1;
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.size(0) == codes.size(0) && x.size(1) == c.heads && x.size(3) == c.dim, "x has shape ",
      x.sizes(), "; this cache takes [", codes.size(0), ", ", c.heads, ", n, ", c.dim,
      "] (batch, KV heads, tokens, head_dim)");
  TORCH_CHECK_VALUE(
      x.scalar_type() == window.scalar_type(), "x is ", name_of(x.scalar_type()), "; this cache holds ",
      name_of(window.scalar_type()));
  TORCH_CHECK_VALUE(
      slots.dim() == 1 && slots.size(0) == n, "slots has shape ", slots.sizes(), "; expected [", n, "], one slot per token");
  const int64_t held = *length.const_data_ptr<int32_t>();
  if (n == 0) return held;
  const Tensor at = slots.to(at::kLong).contiguous();
  const int64_t first = at.const_data_ptr<int64_t>()[0];
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_VALUE(
        at.const_data_ptr<int64_t>()[i] == first + i, "slots=", slots.slice(0, 0, 8).toString(),
        " are not consecutive; a quantized cache is written in order");
  TORCH_CHECK_VALUE(
      0 <= first && first <= held, "slots start at ", first, ", but the cache holds ", held,
      " tokens: that would leave a hole");
  TORCH_CHECK_VALUE(
      first + n <= codes.size(2), "slots up to ", first + n - 1, " do not fit a capacity of ", codes.size(2), " tokens");
  TORCH_CHECK_VALUE(all_finite(x.contiguous()), "x holds NaN or inf; nothing was written");
  return first;
}

void check_append_op(at::TensorList kv, at::IntArrayRef layout, const Tensor& x, const Tensor& slots) {
  check_append(kv[0], kv[1], kv[3], CodecView(kv.slice(5), layout.slice(3)), x, slots);
}

void append(
    Tensor& codes, Tensor& window, Tensor& length, Tensor& encoded, const Tensor& start, at::TensorList codec,
    at::IntArrayRef layout, const Tensor& x_, const Tensor& slots) {
  const int64_t sinks = layout[0], recent = layout[1], block = layout[2];
  const CodecView c(codec, layout.slice(3));
  const int64_t first = check_append(codes, window, length, c, x_, slots);
  check_start(start, codes);
  c.check_codes(codes);
  const int64_t batch = x_.size(0), heads = x_.size(1), n = x_.size(2), ring = window.size(2) - sinks;
  if (n == 0 || batch == 0) return;
  const Tensor x = x_.contiguous();
  // What is due to become codes, row by row: each by its own length.
  struct Stretch { int64_t row, low, tokens; };
  std::vector<Stretch> due;
  std::vector<int64_t> coded(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t was = std::min<int64_t>(encoded.const_data_ptr<int32_t>()[b], first);
    coded[b] = std::max(was, coded_slots(RowStart(start, b).sink(), first + n, recent, block));
    for (int64_t low = was; low < coded[b]; low += kStretch) due.push_back({b, low, std::min(kStretch, coded[b] - low)});
  }
  const auto t = due.empty() ? nullptr : tables_of(c);
  dispatch(x.scalar_type(), "x", [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const T* data = x.const_data_ptr<T>();
    T* held = window.mutable_data_ptr<T>();
    const auto window_of = [&](int64_t bh) { return held + bh / heads * window.stride(0) + bh % heads * window.stride(1); };
    if (!due.empty())
      at::parallel_for(0, static_cast<int64_t>(due.size()) * heads, 1, [&](int64_t begin, int64_t end) {
        Searches searches(c, *t);
        for (int64_t task = begin; task < end; ++task) {
          const auto [b, low, tokens] = due[task / heads];
          const int64_t h = task % heads, bh = b * heads + h;
          uint8_t* out = codes.mutable_data_ptr<uint8_t>() + b * codes.stride(0) + c.codes_at(codes, h);
          // Tokens from before this call are in the window, the others are new.
          searches.encode(
              h, tokens,
              [&, low = low](int64_t i) {
                const int64_t slot = low + i;
                return slot < first ? window_of(bh) + (sinks + slot % ring) * c.dim : data + (bh * n + slot - first) * c.dim;
              },
              [&, low = low, row = RowStart(start, b)](int64_t i) { return row.position(low + i); },
              out + low * c.bytes_of(h));
        }
      });
    const int64_t kept = std::max(first, *std::min_element(coded.begin(), coded.end()));
    for (int64_t bh = 0; bh < batch * heads; ++bh) {
      T* rows = window_of(bh);
      for (int64_t slot = kept; slot < first + n; ++slot)
        std::copy_n(data + (bh * n + slot - first) * c.dim, c.dim, rows + (sinks + slot % ring) * c.dim);
      for (int64_t i = 0; i < sinks; ++i) {
        const int64_t slot = RowStart(start, bh / heads).sink() + i;
        if (first <= slot && slot < first + n)
          std::copy_n(data + (bh * n + slot - first) * c.dim, c.dim, rows + i * c.dim);
      }
    }
  });
  *length.mutable_data_ptr<int32_t>() = static_cast<int32_t>(first + n);
  std::copy(coded.begin(), coded.end(), encoded.mutable_data_ptr<int32_t>());
}

// To the keys and values of a layer, or to neither; each has codes, window, start, length, encoded.
void append_pair(
    at::TensorList key, at::TensorList key_codec, at::IntArrayRef key_layout, at::TensorList value,
    at::TensorList value_codec, at::IntArrayRef value_layout, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const auto parts = [](at::TensorList kv) { return std::vector<Tensor>(kv.begin(), kv.end()); };
  std::vector<Tensor> to_key = parts(key), to_value = parts(value);
  check_append(to_value[0], to_value[1], to_value[3], CodecView(value_codec, value_layout.slice(3)), v, slots);
  append(to_key[0], to_key[1], to_key[3], to_key[4], to_key[2], key_codec, key_layout, k, slots);
  append(to_value[0], to_value[1], to_value[3], to_value[4], to_value[2], value_codec, value_layout, v, slots);
}

// ---------------------------------------------------------------------------------------------------------------------

// Nearest of up to 256 centers [batch, codewords, width] for x [batch, n, width]: codes and squared distances.
std::tuple<Tensor, Tensor> nearest(const Tensor& x_, const Tensor& centers_) {
  const Tensor x = x_.contiguous(), centers = centers_.contiguous();
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2), count = centers.size(1), wide = round_up(count, kWidth);
  Tensor codes = at::empty({batch, n}, x.options().dtype(at::kLong)), errors = at::empty({batch, n}, x.options());
  Buffer columns, squares;
  columns.fill(batch * width * wide), squares.fill(batch * wide, kInf);
  for (int64_t b = 0; b < batch; ++b) {
    const float* from = centers.const_data_ptr<float>() + b * count * width;
    transpose(columns + b * width * wide, wide, from, width, count, width);
    for (int64_t i = 0; i < count; ++i) squares[b * wide + i] = squared_norm(from + i * width, width);
  }
  constexpr int64_t kRows = 48;
  const int64_t tiles = ceil_div(n, kRows);
  at::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    Buffer distance(kRows * wide);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, first = task % tiles * kRows, some = std::min(kRows, n - first);
      const float* rows = x.const_data_ptr<float>() + (b * n + first) * width;
      product(distance, wide, rows, width, 1, columns + b * width * wide, wide, some, wide, width);
      for (int64_t i = 0; i < some; ++i) {
        float* d = distance + i * wide;
        const int64_t code = find(d, wide, reduce_min(to_distances(d, squares + b * wide, 0.f, wide)));
        codes.mutable_data_ptr<int64_t>()[b * n + first + i] = code;
        errors.mutable_data_ptr<float>()[b * n + first + i] = std::max(0.f, d[code] + squared_norm(rows + i * width, width));
      }
    }
  });
  return {codes, errors};
}

// Sums of the rows of x [batch, n, width] that share a code [batch, n]: [batch, count, width].
Tensor sum_by_code(const Tensor& x_, const Tensor& code_, int64_t count) {
  const Tensor x = x_.contiguous(), code = code_.contiguous();
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  Tensor out = at::zeros({batch, count, width}, x.options());
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* row = x.const_data_ptr<float>() + b * n * width;
      float* sums = out.mutable_data_ptr<float>() + b * count * width;
      for (int64_t i = 0; i < n; ++i, row += width) {
        float* to = sums + code.const_data_ptr<int64_t>()[b * n + i] * width;
        for (int64_t e = 0; e < width; ++e) to[e] += row[e];
      }
    }
  });
  return out;
}

// Sums of weight x x^T over the rows of x [batch, n, width] that share a code [batch, n]: [batch, count, width, width].
Tensor moments_by_code(const Tensor& x_, const Tensor& weight_, const Tensor& code_, int64_t count) {
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), code = code_.contiguous();
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  Tensor out = at::zeros({batch, count, width, width}, x.options());
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* row = x.const_data_ptr<float>() + b * n * width;
      float* sums = out.mutable_data_ptr<float>() + b * count * width * width;
      for (int64_t i = 0; i < n; ++i, row += width) {
        float* to = sums + code.const_data_ptr<int64_t>()[b * n + i] * width * width;
        for (int64_t e = 0; e < width; ++e, to += width) {
          const float factor = weight.const_data_ptr<float>()[b * n + i] * row[e];
          for (int64_t f = 0; f < width; ++f) to[f] += factor * row[f];
        }
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchgsrq, CPU, m) {
  m.impl("encode", encode);
  m.impl("encode_at_once", encode);
  m.impl("search", search);
  m.impl("append_", append);
  m.impl("append_pair_", append_pair);
  m.impl("nearest", nearest);
  m.impl("sum_by_code", sum_by_code);
  m.impl("moments_by_code", moments_by_code);
  m.impl("check_append", check_append_op);
}

}  // namespace gsrq
