// Attention on codes for the CPU: what torchgsrq/reference/attention.py means by `attention`.
//
// Each KV head is cut into parts: splits of the codes, and what is held in full precision. A part gives its highest
// score, its probability mass and its weighted sum for every query row; parts are merged at the end. Codes are read by
// look-up tables and probability histograms when the query rows are few (by_tables.h), and decoded, block by block, when they
// are many (by_blocks.h).

#include <torch/library.h>

#include "exact.h"

namespace gsrq {
namespace {

constexpr int64_t kTasks = 6, kShortestSplit = 2048, kLongestSplit = 16384;

// The newest slots, from the window or the tails, and the sinks.
template <typename T>
void attend_exact(const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* q, Part part) {
  Timer timer;
  Exact<T> exact(c, b, h, row0, rows, q, part);
  const bool tailed = c.tails[0].defined();
  const Tensor &k = tailed ? c.tails[0] : c.key.window, &v = tailed ? c.tails[1] : c.value.window;
  const auto of = [&](const Tensor& x, int64_t i) { return x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1) + i * c.dim; };
  const auto piece = [&](const Tensor& k, const Tensor& v, int64_t i, int64_t n) {
    return Piece<T>{of(k, i), of(v, i), c.dim, c.dim, n};
  };
  auto [slot, end] = exact.seen();
  end = std::min(end, c.length);
  for (slot = std::max(slot, c.dense_low[b]); slot < end;) {
    const int64_t place = slot % c.key.ring, n = tailed ? end - slot : std::min(end - slot, c.key.ring - place);
    exact.add(piece(k, v, tailed ? k.size(2) - (c.length - slot) : c.key.sinks + place, n), slot);
    slot += n;
  }
  const int64_t sinks = std::min(c.key.sinks, c.length - RowStart(c.key.start, b).sink());
  exact.finish(piece(c.key.window, c.value.window, 0, std::max<int64_t>(sinks, 0)));
  timer.lap(kDense);
}

template <typename T>
void run(const Call& c, const c10::optional<Tensor>& sink_logits, Tensor& result) {
  const Tables& any = c.key_tables[0].tables;  // what heads differ in is not asked of it
  const Cut cut(c);
  const int64_t tile = cut.tile, tiles = std::max<int64_t>(1, ceil_div(c.rows, tile));
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
      canonical[i * c.padded + d] = d < c.dim ? q[i * c.dim + any.order[d]] : 0.f;
    }
  const auto part_at = [&](int64_t part, int64_t bh, int64_t row) {
    const int64_t i = part * total + bh * c.rows + row;
    return Part{space + i, space + parts * total + i, space + 2 * parts * total + i * c.padded};
  };
  const int64_t tasks = c.batch * c.heads * tiles * parts;
  std::atomic<int64_t> next{0};  // heads differ in what they take, so each thread takes the next task when it is free
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t bh = task / (tiles * parts), row0 = task / parts % tiles * tile, index = task % parts;
      const int64_t b = bh / c.heads, h = bh % c.heads, rows = std::min(tile, c.rows - row0);
      Part part = part_at(index, bh, row0);
      part.clear(rows, c.padded);
      const int64_t at = (bh * c.rows + row0) * c.padded;
      if (index == splits) {
        attend_exact<T>(c, b, h, row0, rows, plain + at, part);
        continue;
      }
      const int64_t first = index * length, last = std::min(c.coded[b], first + length);
      if (first >= last) continue;
      cut.attend(c, b, h, row0, rows, first, last, canonical + at, part);
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
      merge_parts([&](int64_t part) { return part_at(part, bh, row); }, splits, sink, c.value_tables[h], coded_sum, sum);
      if (all_finite(q + i * c.dim, c.dim)) std::copy_n(static_cast<float*>(sum), c.dim, out + i * c.dim);
      else std::fill_n(out + i * c.dim, c.dim, kNaN);
    }
  });
  timer.lap(kMerge);
}

Tensor attention(
    const Tensor& q, at::TensorList key_parts, at::IntArrayRef key_integers, at::TensorList value_parts,
    at::IntArrayRef value_integers, const c10::optional<Tensor>& mask, double scale, int64_t causal, double softcap,
    const c10::optional<Tensor>& sink_logits, const c10::optional<Tensor>& key_tail,
    const c10::optional<Tensor>& value_tail, const c10::optional<Tensor>& tail_start, int64_t view) {
  const Packed key(key_parts, key_integers), value(value_parts, value_integers);
  const int64_t heads = key.codec.heads, dim = key.codec.dim;
  TORCH_CHECK_VALUE(
      q.dim() == 4 && q.size(3) == dim && q.size(1) % heads == 0 && q.size(0) == key.batch(), "query has shape ",
      q.sizes(), "; this cache takes [batch=", key.batch(), ", a multiple of ", heads,
      " heads, queries, head_dim=", dim, "]");
  const int64_t length = *key.length.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(
      length == *value.length.const_data_ptr<int32_t>(), "the keys hold ", length, " tokens and the values ",
      *value.length.const_data_ptr<int32_t>());
  Tensor result = at::empty(q.sizes(), q.options().dtype(at::kFloat));
  Call c(key, value);
  c.batch = q.size(0), c.heads = heads, c.group = q.size(1) / heads, c.queries = q.size(2);
  c.rows = c.group * c.queries, c.dim = dim, c.length = length;
  if (c.batch * c.rows == 0) return result.to(q.scalar_type());
  c.padded = c.key_tables[0].tables.padded, c.softcap = softcap, c.bfloat16 = q.scalar_type() == at::kBFloat16;
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
    const int64_t encoded = key.encoded.const_data_ptr<int32_t>()[b], begin = RowStart(key.start, b).sink();
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
