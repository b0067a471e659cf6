// Encode and append for the CPU: what torchgsrq/reference means by `encode`, `search` and `append_`.

#include <torch/library.h>

#include "tables.h"

namespace gsrq {
namespace {

constexpr int64_t kStretch = 64;  // tokens of a row and head that are a task; the cut depends on sizes alone

// The search for the codes of vectors of a head, in their metric: `search` of torchgsrq/reference/coding.py.
class Search {
 public:
  explicit Search(const Head& head)
      : c_(head.codec), t_(head.tables), head_(head.h), extra_(static_cast<float>(c_.eta - 1)),
        words_(ceil_div(t_.codes, t_.groups) * kWords * t_.width), whole_(kTile * t_.width), unit_(kTile * t_.width),
        rest_(kTile * t_.width), pull_(kTile * t_.width), codes_(ceil_div(t_.codes, t_.groups) * kTile) {}

  // Codes of y [n, ldy] to out [n, codes].
  void run(const float* y, int64_t ldy, int64_t n, uint8_t* out) {
    const int64_t size = kWords * t_.width;
    for (int64_t group = 0; group < t_.groups; ++group) {
      for (int64_t code = group, stage = 0; code < t_.codes; code += t_.groups, ++stage) {
        const at::Half* words = c_.words(head_, code);
        for (int64_t i = 0; i < size; i += kWidth) load(words + i).store(words_ + stage * size + i);
      }
      for (int64_t first = 0; first < n; first += kTile) {
        const int64_t some = std::min(kTile, n - first);
        side_by_side(whole_, y + first * ldy + group * t_.width, ldy, some, t_.width);
        const int64_t stages = ceil_div(t_.codes - group, t_.groups);
        if (stages == 1) one_stage(group);
        else several(group, stages);
        for (int64_t stage = 0; stage < stages; ++stage)
          for (int64_t r = 0; r < some; ++r)
            out[(first + r) * t_.codes + stage * t_.groups + group] = static_cast<uint8_t>(codes_[stage * kTile + r]);
      }
    }
  }

 private:
  const float* squares_of(int64_t code) const { return t_.squares + (head_ * t_.codes + code) * kWords; }

  // Squared norms of vectors [width, kTile], or of their products.
  void products(float* out, const float* a, const float* b) const {
    for (int64_t r = 0; r < kTile; r += kWidth) {
      Vec sum(0.f);
      for (int64_t e = 0; e < t_.width; ++e) sum = at::vec::fmadd(load(a + e * kTile + r), load(b + e * kTile + r), sum);
      sum.store(out + r);
    }
  }

  void keep(int64_t stage, const Least& least) {
    for (int b = 0; b < kBlocks; ++b) least.word[b].store(codes_ + stage * kTile + b * kWidth);
  }

  // Nothing is left by others: the loss is |w|^2 - 2 eta (y . w) + (eta - 1) (y . w)^2 / |y|^2 and a constant.
  void one_stage(int64_t group) {
    alignas(64) float square[kTile], bend[kTile];
    products(square, whole_, whole_);
    for (int64_t r = 0; r < kTile; ++r) bend[r] = square[r] > 0 ? extra_ / square[r] : 0.f;
    const Vec straight(-2 * (extra_ + 1));
    const float* const x[1] = {whole_};
    keep(0, least_words(x, words_, squares_of(group), kWords, t_.width, [&](const Vec* along, const Vec& of_word, int b) {
      return at::vec::fmadd(at::vec::fmadd(load(bend + b * kWidth), along[0], straight), along[0], of_word);
    }));
  }

  // `search_group` of torchgsrq/reference/coding.py, of several stages. The loss of a codeword among the others is
  // |w|^2 + (eta - 1) (w . u)^2 - 2 w . (r + (eta - 1) (r . u) u) and a constant, with r the rest and u = y/|y|.
  void several(int64_t group, int64_t stages) {
    const int64_t width = t_.width, steps = extra_ > 0 && stages > 2 ? 2 * stages - 1 : stages;
    alignas(64) float along[kTile];
    products(along, whole_, whole_);
    for (int64_t r = 0; r < kTile; ++r) along[r] = along[r] > 0 ? 1 / std::sqrt(along[r]) : 0.f;
    each_row([&](int64_t i, int64_t r) { unit_[i] = whole_[i] * along[r], rest_[i] = whole_[i]; });
    const float* const rest[1] = {rest_};
    const float* const both[2] = {pull_, unit_};
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t stage = step % stages;
      const float *words = words_ + stage * kWords * width, *squares = squares_of(stage * t_.groups + group);
      if (step >= stages) add_words(words, stage, 1.f);
      if (extra_ > 0 && step >= stages - 1) {
        products(along, rest_, unit_);
        each_row([&](int64_t i, int64_t r) { pull_[i] = -2 * (rest_[i] + extra_ * along[r] * unit_[i]); });
        keep(stage, least_words(both, words, squares, kWords, width, [&](const Vec* sums, const Vec& of_word, int) {
          return at::vec::fmadd(Vec(extra_) * sums[1], sums[1], of_word + sums[0]);
        }));
      } else {
        keep(stage, least_words(rest, words, squares, kWords, width, [](const Vec* sums, const Vec& of_word, int) {
          return at::vec::fmadd(Vec(-2.f), sums[0], of_word);
        }));
      }
      if (step < steps - 1) add_words(words, stage, -1.f);
    }
  }

  // Calls f(element, row) for vectors [width, kTile].
  template <typename F>
  void each_row(F f) const {
    for (int64_t e = 0; e < t_.width; ++e)
      for (int64_t r = 0; r < kTile; ++r) f(e * kTile + r, r);
  }

  void add_words(const float* words, int64_t stage, float sign) {
    for (int64_t r = 0; r < kTile; ++r) {
      const float* word = words + static_cast<int64_t>(codes_[stage * kTile + r]) * t_.width;
      for (int64_t e = 0; e < t_.width; ++e) rest_[e * kTile + r] += sign * word[e];
    }
  }

  const Codec& c_;
  const Tables& t_;
  const int64_t head_;
  const float extra_;  // eta - 1
  Buffer words_;                       // [stages, 256, width]: of the current group
  Buffer whole_, unit_, rest_, pull_;  // [width, kTile]: vectors y, y/|y|, what the other stages leave, see `several`
  Buffer codes_;                       // [stages, kTile]
};

// Encodes vectors of a row and head: x(i) gives vector i, position(i) its position, out [n, codes].
template <typename Source, typename Position>
void encode_rows(const Head& head, int64_t n, Source x, Position position, uint8_t* out) {
  const Tables& t = head.tables;
  Search search(head);
  Buffer vectors(kStretch * t.padded), y(kStretch * t.padded), frame_cos(t.pairs), frame_sin(t.pairs), turn_cos(t.pairs),
      turn_sin(t.pairs), plain(t.padded);
  int64_t framed = std::numeric_limits<int64_t>::min(), turned = framed;  // where the current angles begin
  for (int64_t first = 0; first < n; first += kStretch) {
    const int64_t some = std::min(kStretch, n - first);
    for (int64_t i = 0; i < some; ++i) {
      float* v = vectors + i * t.padded;
      const auto* from = x(first + i);
      for (int64_t d = 0; d < t.dim; ++d) plain[d] = static_cast<float>(from[t.order[d]]);
      std::fill(plain + t.dim, plain + t.padded, 0.f);
      // R(place - p) x - R(place) mean, of which the last is known at the first kRotate places, and turned on from there
      const int64_t p = position(first + i), place = floor_mod(p, t.frame), turn = floor_mod(place, kRotate);
      if (p - place != framed) cos_sin(frame_cos, frame_sin, t.inv_freq.data(), t.pairs, framed = p - place);
      if (place - turn != turned) cos_sin(turn_cos, turn_sin, t.inv_freq.data(), t.pairs, -(turned = place - turn));
      rotate_back(v, plain, frame_cos, frame_sin, t.pairs, t.padded);
      rotate_back(plain, t.mean_rows + (head.h * kRotate + turn) * t.padded, turn_cos, turn_sin, t.pairs, t.padded);
      for (int64_t d = 0; d < t.padded; d += kWidth) (load(v + d) - load(plain + d)).store(v + d);
    }
    product(y, t.padded, vectors, t.padded, 1, t.transform + head.h * t.dim * t.padded, t.padded, some, t.padded, t.dim);
    search.run(y, t.padded, some, out + first * t.codes);
  }
}

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

Tensor encode(const Tensor& x_, const Tensor& position_, at::TensorList tensors, at::IntArrayRef integers) {
  const Codec c(tensors, integers);
  TORCH_CHECK_VALUE(
      x_.dim() == 4 && x_.size(1) == c.heads && x_.size(3) == c.dim, "x has shape ", x_.sizes(),
      "; expected [batch, heads=", c.heads, ", n, head_dim=", c.dim, "]");
  TORCH_CHECK_VALUE(
      position_.dim() == 2 && position_.size(0) == x_.size(0) && position_.size(1) == x_.size(2), "position has shape ",
      position_.sizes(), "; expected (", x_.size(0), ", ", x_.size(2), ")");
  TORCH_CHECK_VALUE(x_.is_floating_point(), "x is ", name_of(x_.scalar_type()), "; expected a floating dtype");
  const Tensor x = (x_.scalar_type() == at::kDouble ? x_.to(at::kFloat) : x_).contiguous();
  TORCH_CHECK_VALUE(all_finite(x), "x holds NaN or inf, which no codeword stands for");
  const Tensor position = position_.to(at::kLong).contiguous();
  const int64_t batch = x.size(0), n = x.size(2);
  Tensor out = at::empty({batch, c.heads, n, c.codes}, x.options().dtype(at::kByte));
  if (!out.numel()) return out;
  const auto t = tables_of(c);
  const int64_t stretches = ceil_div(n, kStretch);
  dispatch(x.scalar_type(), "x", [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    at::parallel_for(0, batch * c.heads * stretches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t bh = task / stretches, first = task % stretches * kStretch;
        const T* from = x.const_data_ptr<T>() + (bh * n + first) * c.dim;
        const int64_t* at = position.const_data_ptr<int64_t>() + bh / c.heads * n + first;
        encode_rows(
            Head{c, *t, bh % c.heads}, std::min(kStretch, n - first), [&](int64_t i) { return from + i * c.dim; },
            [&](int64_t i) { return at[i]; }, out.mutable_data_ptr<uint8_t>() + (bh * n + first) * c.codes);
      }
    });
  });
  return out;
}

// The second half of encode, for graphs that do the first, the change to the metric, with what comes before it.
Tensor search(const Tensor& y_, at::TensorList tensors, at::IntArrayRef integers) {
  const Codec c(tensors, integers);
  const auto t = tables_of(c);
  TORCH_CHECK_VALUE(
      y_.dim() == 3 && y_.size(0) == c.heads && y_.size(2) == c.dim && y_.scalar_type() == at::kFloat, "y has shape ",
      y_.sizes(), " and is ", name_of(y_.scalar_type()), "; expected float32 [", c.heads, ", n, ", c.dim, "]");
  const Tensor y = y_.contiguous();
  TORCH_CHECK_VALUE(all_finite(y), "x holds NaN or inf, which no codeword stands for");
  const int64_t n = y.size(1), stretches = ceil_div(n, kStretch);
  Tensor out = at::empty({c.heads, n, c.codes}, y.options().dtype(at::kByte));
  at::parallel_for(0, c.heads * stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / stretches, first = task % stretches * kStretch, at = head * n + first;
      Search(Head{c, *t, head}).run(
          y.const_data_ptr<float>() + at * c.dim, c.dim, std::min(kStretch, n - first),
          out.mutable_data_ptr<uint8_t>() + at * c.codes);
    }
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------

// The rows of a batch that hold NaN or inf, in words.
std::string rows_with_infinite(const Tensor& x) {
  std::string rows;
  for (int64_t b = 0; b < x.size(0); ++b)
    if (!all_finite(x[b])) rows += (rows.empty() ? "" : ", ") + std::to_string(b);
  return rows;
}

// Refuses what append_ cannot write, after the words `side`; gives the first slot. x is contiguous.
int64_t check_append(const Packed& kv, const Tensor& x, const Tensor& slots, const char* side = "") {
  const int64_t n = x.dim() == 4 ? x.size(2) : -1, heads = kv.codec.heads, dim = kv.codec.dim;
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.size(0) == kv.batch() && x.size(1) == heads && x.size(3) == dim, side, "x has shape ", x.sizes(),
      "; this cache takes [", kv.batch(), ", ", heads, ", n, ", dim, "] (batch, KV heads, tokens, head_dim)");
  TORCH_CHECK_VALUE(
      x.scalar_type() == kv.window.scalar_type(), side, "x is ", name_of(x.scalar_type()), "; this cache holds ",
      name_of(kv.window.scalar_type()));
  TORCH_CHECK_VALUE(
      slots.dim() == 1 && slots.size(0) == n, side, "slots has shape ", slots.sizes(), "; expected [", n,
      "], one slot per token");
  const int64_t held = *kv.length.const_data_ptr<int32_t>();
  if (n == 0) return held;
  const Tensor at = slots.to(at::kLong).contiguous();
  const int64_t first = at.const_data_ptr<int64_t>()[0];
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_VALUE(
        at.const_data_ptr<int64_t>()[i] == first + i, side, "slots=", slots.slice(0, 0, 8).toString(),
        " are not consecutive; a quantized cache is written in order");
  TORCH_CHECK_VALUE(
      0 <= first && first <= held, side, "slots start at ", first, ", but the cache holds ", held,
      " tokens: that would leave a hole");
  TORCH_CHECK_VALUE(
      first + n <= kv.capacity(), side, "slots up to ", first + n - 1, " do not fit a capacity of ", kv.capacity(),
      " tokens");
  TORCH_CHECK_VALUE(
      all_finite(x), side, "x holds NaN or inf in row(s) ", rows_with_infinite(x), "; nothing was written");
  return first;
}

// Appends what check_append let pass, and which begins at slot `first`.
void append(Packed& kv, const Tensor& x, int64_t first) {
  const int64_t batch = x.size(0), heads = x.size(1), n = x.size(2), sinks = kv.sinks, ring = kv.ring, dim = kv.codec.dim;
  if (n == 0 || batch == 0) return;
  // What is due to become codes, row by row: each by its own length.
  struct Stretch { int64_t row, low, tokens; };
  std::vector<Stretch> due;
  std::vector<int64_t> coded(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t was = std::min<int64_t>(kv.encoded.const_data_ptr<int32_t>()[b], first);
    coded[b] = std::max(was, coded_slots(RowStart(kv.start, b).sink(), first + n, kv.recent, kv.block));
    for (int64_t low = was; low < coded[b]; low += kStretch) due.push_back({b, low, std::min(kStretch, coded[b] - low)});
  }
  dispatch(x.scalar_type(), "x", [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const T* data = x.const_data_ptr<T>();
    T* held = kv.window.mutable_data_ptr<T>();
    const auto window_of = [&](int64_t bh) {
      return held + bh / heads * kv.window.stride(0) + bh % heads * kv.window.stride(1);
    };
    if (!due.empty()) {
      const LayerTables tables(kv.codec);
      std::atomic<int64_t> next{0};  // heads differ in what they take, so each thread takes the next task when it is free
      const int64_t tasks = static_cast<int64_t>(due.size()) * heads;
      at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t task = next++; task < tasks; task = next++) {
          const auto [b, low, tokens] = due[task / heads];
          const int64_t h = task % heads, bh = b * heads + h;
          const Head head = tables[h];
          // Tokens from before this call are in the window, the others are new.
          encode_rows(
              head, tokens,
              [&, low = low](int64_t i) {
                const int64_t slot = low + i;
                return slot < first ? window_of(bh) + (sinks + slot % ring) * dim : data + (bh * n + slot - first) * dim;
              },
              [&, low = low, row = RowStart(kv.start, b)](int64_t i) { return row.position(low + i); },
              kv.codes_of(b, h) + low * head.codec.codes);
        }
      });
    }
    const int64_t kept = std::max(first, *std::min_element(coded.begin(), coded.end()));
    for (int64_t bh = 0; bh < batch * heads; ++bh) {
      T* rows = window_of(bh);
      for (int64_t slot = kept; slot < first + n; ++slot)
        std::copy_n(data + (bh * n + slot - first) * dim, dim, rows + (sinks + slot % ring) * dim);
      for (int64_t i = 0; i < sinks; ++i) {
        const int64_t slot = RowStart(kv.start, bh / heads).sink() + i;
        if (first <= slot && slot < first + n)
          std::copy_n(data + (bh * n + slot - first) * dim, dim, rows + i * dim);
      }
    }
  });
  *kv.length.mutable_data_ptr<int32_t>() = static_cast<int32_t>(first + n);
  std::copy(coded.begin(), coded.end(), kv.encoded.mutable_data_ptr<int32_t>());
}

void append_op(
    at::TensorList owned, at::TensorList tables, at::IntArrayRef integers, const Tensor& x_, const Tensor& slots) {
  Packed kv(owned, tables, integers);
  const Tensor x = x_.contiguous();
  append(kv, x, check_append(kv, x, slots));
}

// What is held in full precision before `first`, and the new vectors: entry i is slot first - ring + i.
Tensor tail(const Packed& kv, const Tensor& x, int64_t first) {
  const Tensor at = at::arange(first - kv.ring, first, at::kLong).remainder_(kv.ring).add_(kv.sinks);
  return at::cat({kv.window.index_select(2, at), x}, 2);
}

// To the keys and values of a layer, or to neither; gives what new queries may see exactly, if asked for.
std::tuple<Tensor, Tensor, Tensor> append_pair(
    at::TensorList key, at::TensorList key_codec, at::IntArrayRef key_integers, at::TensorList value,
    at::TensorList value_codec, at::IntArrayRef value_integers, const Tensor& k_, const Tensor& v_, const Tensor& slots,
    bool tails) {
  const Tensor k = k_.contiguous(), v = v_.contiguous();
  Packed keys(key, key_codec, key_integers), values(value, value_codec, value_integers);
  const int64_t first = check_append(keys, k, slots, "keys: "), first_value = check_append(values, v, slots, "values: ");
  Tensor key_tail, value_tail, start;
  if (tails) {
    key_tail = tail(keys, k, first), value_tail = tail(values, v, first_value);
    start = keys.encoded.clamp_max(first);
  } else {
    key_tail = at::empty({0}, k.options()), value_tail = at::empty({0}, v.options());
    start = at::empty({0}, keys.encoded.options());
  }
  append(keys, k, first);
  append(values, v, first_value);
  return {key_tail, value_tail, start};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchgsrq, CPU, m) {
  m.impl("encode", encode);
  m.impl("search", search);
  m.impl("append_", append_op);
  m.impl("append_pair_", append_pair);
}

}  // namespace gsrq
