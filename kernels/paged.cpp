// Attention on a serving engine's pages for the CPU: what torchgsrq/reference/paged.py means.
//
// Codes of the pages of a request are put side by side, which is a copy of few bytes; the kernels of attention.cpp read
// them. The window, the new tokens and the sinks are read where they are. Requests with one query share a call; others
// have their own.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <optional>

#include "exact.h"

namespace gsrq {
namespace {

enum PagedView : int64_t { kChunkView = 0, kDecodeView = 1 };
constexpr int64_t kSplit = 2048, kMostSplit = 16384, kNoLimit = std::numeric_limits<int64_t>::max() - 1;

// Where the codes of each head lie on a page: bytes before those of a head, for each token of the page, and its own.
struct Places {
  std::vector<int64_t> before, size;
  Places(const Codecs& key, const Codecs& value) {
    int64_t first = 0;
    for (const Codecs* side : {&key, &value})
      for (const auto& [part, h] : side->of_head) {
        before.push_back(first), size.push_back(side->parts[part].codes);
        first += size.back();
      }
  }
};

// The tokens of a step in full precision: the new ones, and pages of the window and of sinks.
struct Held {
  Tensor k, v, window, sinks, window_table, sink_pages;
  int64_t sink_tokens, dim, padded;
};

// A request of a step.
struct Request {
  int64_t first, queries, held, length, coded;  // its first row; new tokens; tokens before and after; most codes read
  std::vector<int64_t> exact_from;              // of each query
  int64_t splits, split, tiles, tile, rows_before, parts_before;
  const Call* call;
  bool plain;  // reads no codes: ordinary attention does it
};

// What query rows [row0, row0 + rows) of head h of request i read in full precision.
template <typename T>
void attend_exact(
    const Held& e, const Call& c, const Request& r, int64_t i, int64_t h, int64_t row0, int64_t rows, const float* q, Part part) {
  Exact<T> exact(c, i, h, row0, rows, q, part);
  const auto on_page = [&](const Tensor& held, int64_t page, int64_t place, int64_t n) {
    const T* k = held.const_data_ptr<T>() + page * held.stride(0) + h * held.stride(1) + place * held.stride(2);
    return Piece<T>{k, k + e.dim, held.stride(2), held.stride(2), n};
  };
  const auto table_of = [&](const Tensor& table) { return table.const_data_ptr<int32_t>() + i * table.stride(0); };
  auto [slot, end] = exact.seen();
  end = std::min(end, r.length);
  for (slot = std::max(slot, e.sink_tokens); slot < end;) {
    if (slot < r.held) {
      const int64_t size = e.window.size(2), n = std::min(std::min(r.held, end) - slot, size - slot % size);
      exact.add(on_page(e.window, table_of(e.window_table)[slot / size], slot % size, n), slot);
      slot += n;
    } else {
      const int64_t at = r.first + slot - r.held;
      const auto of = [&](const Tensor& x) { return x.const_data_ptr<T>() + at * x.stride(0) + h * x.stride(1); };
      exact.add({of(e.k), of(e.v), e.k.stride(0), e.v.stride(0), end - slot}, slot);
      slot = end;
    }
  }
  if (e.sink_tokens) exact.finish(on_page(e.sinks, *table_of(e.sink_pages), 0, std::min(e.sink_tokens, r.length)));
  else exact.finish({});
}

// Codes of all requests side by side, as the parts of a cache of one row a request.
class Gathered {
 public:
  Gathered(const Tensor& codes, const Tensor& table, const std::vector<Request>& requests, int64_t block,
           at::TensorList key_codec, at::IntArrayRef key_integers, at::TensorList value_codec,
           at::IntArrayRef value_integers, int64_t sinks) {
    const Codecs key(key_codec, key_integers), value(value_codec, value_integers);
    const Places places(key, value);
    const int64_t count = requests.size(), heads = key.heads;
    int64_t longest = 1;
    for (const Request& r : requests) longest = std::max(longest, r.coded);
    int64_t bytes = 0;
    for (int64_t size : places.size) bytes += size;
    space_.resize(ceil_div(count * longest * bytes, sizeof(float)) + 16);
    auto* to = reinterpret_cast<uint8_t*>(static_cast<float*>(space_));
    std::vector<uint8_t*> of_head(2 * heads);
    std::vector<Tensor> parts[2];
    std::vector<int64_t> stride(2 * heads);
    int64_t index = 0;
    for (const Codecs* side : {&key, &value}) {
      for (size_t part = 0; part < side->parts.size(); ++part) {
        const Codec& c = side->parts[part];
        for (int64_t head = 0; head < heads; ++head)
          if (side->of_head[head].first == static_cast<int64_t>(part)) {
            of_head[index * heads + head] = to + side->of_head[head].second * longest * c.codes;
            stride[index * heads + head] = c.heads * longest * c.codes;
          }
        parts[index].push_back(at::from_blob(to, {count, c.heads, longest, c.codes}, at::kByte));
        to += count * c.heads * longest * c.codes;
      }
      ++index;
    }
    const auto* from = codes.const_data_ptr<uint8_t>();
    const int64_t page_bytes = codes.stride(0);
    at::parallel_for(0, count * 2 * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t r = task / (2 * heads), head = task % (2 * heads), size = places.size[head];
        const int32_t* pages = table.const_data_ptr<int32_t>() + r * table.stride(0);
        uint8_t* out = of_head[head] + r * stride[head];
        for (int64_t first = 0; first < requests[r].coded; first += block) {
          const int64_t n = std::min(block, requests[r].coded - first);
          std::memcpy(out + first * size, from + pages[first / block] * page_bytes + places.before[head] * block, n * size);
        }
      }
    });
    const Tensor window = at::empty({count, 1, sinks, 1}, at::kFloat), start = at::zeros({count, 2}, at::kInt);
    const Tensor length = at::zeros({}, at::kInt), encoded = at::zeros({count}, at::kInt);
    index = 0;
    for (const auto& [tables, integers_of] : {std::pair(key_codec, key_integers), std::pair(value_codec, value_integers)}) {
      std::vector<Tensor> all{window, start, length, encoded};
      all.insert(all.end(), parts[index].begin(), parts[index].end());
      all.insert(all.end(), tables.begin(), tables.end());
      std::vector<int64_t> integers{sinks, 0, 1};
      integers.insert(integers.end(), integers_of.begin(), integers_of.end());
      (index++ ? value_ : key_).emplace(at::TensorList(all), at::IntArrayRef(integers));
    }
  }
  const Packed& key() const { return *key_; }
  const Packed& value() const { return *value_; }

 private:
  Buffer space_;
  std::optional<Packed> key_, value_;
};

// The requests of a step, and the first token that each query reads exactly.
std::vector<Request> requests_of(
    const Tensor& query_start, const Tensor& lengths, const Tensor& held_from, int64_t recent, int64_t block, int64_t view) {
  const auto *start = query_start.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>();
  std::vector<Request> found;
  for (int64_t r = 0; r < lengths.size(0); ++r) {
    Request one{};
    one.first = start[r], one.queries = start[r + 1] - start[r], one.length = length[r];
    one.held = one.length - one.queries;
    for (int64_t i = 0; i < one.queries; ++i) {
      const int64_t seen = view == kChunkView && one.queries > 1 ? one.held : one.held + i + 1;
      one.exact_from.push_back(std::max<int64_t>(
          encoded_tokens(seen, recent, block), held_from.const_data_ptr<int32_t>()[r]));
      one.coded = std::max(one.coded, one.exact_from.back());
    }
    found.push_back(one);
  }
  return found;
}

// A call of the kernels for the requests with so many queries, or for the one at `only`.
void limit(Call& c, const std::vector<Request>& requests, int64_t queries, int64_t only, int64_t group) {
  const int64_t rows = only < 0 ? requests.size() : only + 1;
  c.batch = rows, c.group = group, c.queries = queries, c.rows = group * queries;
  c.code_limit.assign(rows * queries, 0), c.coded.assign(rows, 0);
  for (int64_t i = 0; i < queries; ++i) c.last.push_back(only < 0 ? kNoLimit : requests[only].held + i);
  for (int64_t b = std::max<int64_t>(only, 0); b < rows; ++b) {
    if (requests[b].queries != queries) continue;
    std::copy(requests[b].exact_from.begin(), requests[b].exact_from.end(), c.code_limit.begin() + b * queries);
    c.coded[b] = requests[b].coded;
  }
  c.dense_first = c.code_limit;
}

// Ordinary attention of a request that reads no codes and had no tokens before.
void attend_plain(const Request& r, const Tensor& q, const Tensor& k, const Tensor& v, double scale, Tensor& result) {
  const int64_t group = q.size(1) / k.size(1);
  const auto all = [&](const Tensor& x) { return x.narrow(0, r.first, r.queries).transpose(0, 1).unsqueeze(0); };
  const auto repeated = [&](const Tensor& x) { return group == 1 ? all(x) : all(x).repeat_interleave(group, 1); };
  const Tensor out = at::scaled_dot_product_attention(all(q), repeated(k), repeated(v), {}, 0.0, true, scale);
  result.narrow(0, r.first, r.queries).copy_(out[0].transpose(0, 1));
}

template <typename T>
void attend(const Gathered& g, const Held& e, std::vector<Request>& requests, const Tensor& q, double scale, Tensor& result) {
  const int64_t heads = g.key().codec.heads, group = q.size(1) / heads, padded = e.padded, count = requests.size();
  const Tables& any = requests.empty() ? *tables_of(g.key().codec.parts[0]) : requests[0].call->key_tables[0].tables;
  int64_t rows = 0, parts = 0, tasks = 0;
  std::vector<int64_t> task_end;
  for (Request& r : requests) {
    const int64_t mine = group * r.queries;
    r.tile = Cut(*r.call).tile, r.tiles = ceil_div(mine, r.tile);
    r.split = std::clamp(ceil_div(r.coded, 2), kSplit, kMostSplit), r.splits = ceil_div(r.coded, r.split);
    r.rows_before = rows, r.parts_before = parts;
    if (!r.plain) {
      rows += heads * mine, parts += heads * mine * (r.splits + 1);
      tasks += heads * r.tiles * (r.splits + 1);
    }
    task_end.push_back(tasks);
  }
  Buffer canonical(rows * padded), plain(rows * padded), space(parts * (2 + padded));
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Request& r = requests[i];
      if (r.plain) continue;
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t row = 0; row < group * r.queries; ++row) {
          const int64_t token = r.first + row % r.queries, head = h * group + row / r.queries;
          const T* from = q.const_data_ptr<T>() + token * q.stride(0) + head * q.stride(1);
          const int64_t at = (r.rows_before + h * group * r.queries + row) * padded;
          for (int64_t d = 0; d < padded; ++d) {
            plain[at + d] = d < e.dim ? static_cast<float>(from[d]) * static_cast<float>(scale) : 0.f;
            canonical[at + d] = d < e.dim ? static_cast<float>(from[any.order[d]]) * static_cast<float>(scale) : 0.f;
          }
        }
    }
  });
  const auto part_at = [&](const Request& r, int64_t index, int64_t h, int64_t row) {
    const int64_t i = r.parts_before + (index * heads + h) * group * r.queries + row;
    return Part{space + i, space + parts + i, space + 2 * parts + i * padded};
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t i = std::upper_bound(task_end.begin(), task_end.end(), task) - task_end.begin();
      const Request& r = requests[i];
      const Call& c = *r.call;
      const int64_t at = task - (i ? task_end[i - 1] : 0), index = at % (r.splits + 1), tile = at / (r.splits + 1) % r.tiles;
      const int64_t h = at / (r.splits + 1) / r.tiles, row0 = tile * r.tile, some = std::min(r.tile, c.rows - row0);
      Part part = part_at(r, index, h, row0);
      part.clear(some, padded);
      const int64_t first_row = (r.rows_before + h * c.rows + row0) * padded;
      if (index == r.splits) {
        attend_exact<T>(e, c, r, i, h, row0, some, plain + first_row, part);
        continue;
      }
      const int64_t first = index * r.split, last = std::min(r.coded, first + r.split);
      const float* rows_of = canonical + first_row;
      Cut(c).attend(c, i, h, row0, some, first, last, rows_of, part);
    }
  });
  at::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    Buffer coded_sum, sum;
    for (int64_t task = begin; task < end; ++task) {
      const Request& r = requests[task / heads];
      const int64_t h = task % heads;
      if (r.plain) continue;
      for (int64_t row = 0; row < group * r.queries; ++row) {
        const Head value = r.call->value_tables[h];
        merge_parts([&](int64_t part) { return part_at(r, part, h, row); }, r.splits, -kInf, value, coded_sum, sum);
        if (!all_finite(plain + (r.rows_before + h * group * r.queries + row) * padded, padded)) std::fill_n(static_cast<float*>(sum), e.dim, kNaN);
        T* out = result.mutable_data_ptr<T>() + (r.first + row % r.queries) * result.stride(0) + (h * group + row / r.queries) * result.stride(1);
        std::copy_n(static_cast<float*>(sum), e.dim, out);
      }
    }
  });
}

void check_tables(std::initializer_list<Tensor> tables) {
  for (const Tensor& x : tables)
    TORCH_CHECK_VALUE(x.scalar_type() == at::kInt && x.stride(-1) == 1, "lengths and tables are int32, rows in one piece");
}

Tensor paged_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codes, const c10::optional<Tensor>& window,
    const c10::optional<Tensor>& sinks, const Tensor& query_start, const Tensor& lengths, const Tensor& held_from,
    const Tensor& table, const c10::optional<Tensor>& window_table, const c10::optional<Tensor>& sink_pages,
    at::TensorList key_codec, at::IntArrayRef key_integers, at::TensorList value_codec, at::IntArrayRef value_integers,
    at::IntArrayRef sizes, double scale, double softcap, int64_t view) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1,
      "queries, keys and values are [tokens, heads, head_dim]; got ", q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && k.scalar_type() == v.scalar_type(), "q, k and v differ in dtype");
  check_tables({query_start, lengths, held_from, table});
  const int64_t group = q.size(1) / k.size(1);
  std::vector<Request> requests = requests_of(query_start, lengths, held_from, sizes[2], sizes[3], view);
  const Gathered g(codes, table, requests, sizes[0], key_codec, key_integers, value_codec, value_integers, sizes[1]);
  Tensor result = at::zeros({q.size(0), q.size(1), q.size(2)}, q.options());
  Held e{k, v, window.value_or(Tensor()), sinks.value_or(Tensor()), window_table.value_or(Tensor()),
         sink_pages.value_or(Tensor()), sizes[1], q.size(2), round_up(q.size(2), kWidth)};
  std::deque<Call> calls;
  const Call* single = nullptr;
  for (int64_t i = 0; i < static_cast<int64_t>(requests.size()); ++i) {
    Request& r = requests[i];
    r.plain = r.queries > 1 && !r.held && !r.coded && softcap == 0;
    if (r.queries == 1 && single) {
      r.call = single;
      continue;
    }
    Call& c = calls.emplace_back(g.key(), g.value());
    c.heads = g.key().codec.heads, c.dim = e.dim, c.padded = e.padded, c.softcap = softcap, c.length = r.length;
    c.bfloat16 = q.scalar_type() == at::kBFloat16;
    limit(c, requests, r.queries, r.queries == 1 ? -1 : i, group);
    r.call = &c;
    if (r.queries == 1) single = &c;
    if (r.plain) attend_plain(r, q, k, v, scale, result);
  }
  dispatch(q.scalar_type(), "q", [&](auto type) {
    attend<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(g, e, requests, q, scale, result);
  });
  return result;
}

// How many tokens of a request are on pages of codes: `coded_tokens` of torchgsrq/reference/paged.py.
int64_t coded_tokens(int64_t length, at::IntArrayRef sizes) {
  return std::max(encoded_tokens(length, sizes[2], sizes[3]), length / sizes[0] * sizes[0]);
}

void paged_append(
    const Tensor& codes, const c10::optional<Tensor>& window, const Tensor& k, const Tensor& v, const Tensor& query_start,
    const Tensor& lengths, const Tensor& table, const c10::optional<Tensor>& window_table, at::TensorList key_codec,
    at::IntArrayRef key_integers, at::TensorList value_codec, at::IntArrayRef value_integers, at::IntArrayRef sizes) {
  using Encode = Tensor(const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef);
  static const auto encode = c10::Dispatcher::singleton().findSchemaOrThrow("torchgsrq::encode", "").typed<Encode>();
  check_tables({query_start, lengths, table});
  struct Due { int64_t request, row, held, token; };
  std::vector<Due> due;
  const auto *start = query_start.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < lengths.size(0); ++r) {
    const int64_t held = length[r] - (start[r + 1] - start[r]), high = coded_tokens(length[r], sizes);
    for (int64_t token = coded_tokens(held, sizes); token < high; ++token) due.push_back({r, start[r], held, token});
  }
  const int64_t n = due.size(), dim = k.size(2), block = sizes[0];
  if (!n) return;
  const Codecs key(key_codec, key_integers), value(value_codec, value_integers);
  const Places places(key, value);
  Tensor position = at::empty({1, n}, at::kLong);
  for (int64_t i = 0; i < n; ++i) position.mutable_data_ptr<int64_t>()[i] = due[i].token;
  uint8_t* pages = codes.mutable_data_ptr<uint8_t>();
  int64_t side = 0;
  for (const auto& [x, codecs, tables, integers_of] :
       {std::tuple(&k, &key, key_codec, key_integers), std::tuple(&v, &value, value_codec, value_integers)}) {
    const int64_t heads = codecs->heads;
    for (size_t part = 0; part < codecs->parts.size(); ++part) {
      std::vector<int64_t> mine;
      for (int64_t h = 0; h < heads; ++h)
        if (codecs->of_head[h].first == static_cast<int64_t>(part)) mine.push_back(h);
      const int64_t some = mine.size();
      Tensor given = at::empty({1, some, n, dim}, x->options());
      dispatch(x->scalar_type(), "k", [&](auto type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        for (int64_t h = 0; h < some; ++h)
          for (int64_t i = 0; i < n; ++i) {
            const Due& d = due[i];
            const T* from = x->const_data_ptr<T>() + (d.row + d.token - d.held) * x->stride(0) + mine[h] * x->stride(1);
            if (d.token < d.held) {
              const int64_t size = window->size(2);
              const int64_t page = window_table->const_data_ptr<int32_t>()[d.request * window_table->stride(0) + d.token / size];
              from = window->const_data_ptr<T>() + page * window->stride(0) + mine[h] * window->stride(1) +
                  d.token % size * window->stride(2) + side * dim;
            }
            std::copy_n(from, dim, given.mutable_data_ptr<T>() + (h * n + i) * dim);
          }
      });
      const std::vector<Tensor> one{tables[0], tables[1 + 4 * part], tables[2 + 4 * part], tables[3 + 4 * part], tables[4 + 4 * part]};
      const Tensor found = encode.call(given, position, one, integers_of.slice(0, 3));
      const int64_t size = found.size(3);
      const uint8_t* from = found.const_data_ptr<uint8_t>();
      for (int64_t h = 0; h < some; ++h) {
        const int64_t before = places.before[side * heads + mine[h]];
        for (int64_t i = 0; i < n; ++i) {
          const int64_t page = table.const_data_ptr<int32_t>()[due[i].request * table.stride(0) + due[i].token / block];
          std::memcpy(
              pages + page * codes.stride(0) + before * block + due[i].token % block * size, from + (h * n + i) * size, size);
        }
      }
    }
    ++side;
  }
}

void paged_hold(const Tensor& held, const Tensor& k, const Tensor& v, const Tensor& slots_) {
  const Tensor slots = slots_.to(at::kLong).contiguous();
  const int64_t block = held.size(2), heads = k.size(1), dim = k.size(2);
  TORCH_CHECK_VALUE(held.scalar_type() == k.scalar_type(), "k is ", name_of(k.scalar_type()), "; the pages hold ", name_of(held.scalar_type()));
  dispatch(k.scalar_type(), "k", [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const int64_t* slot = slots.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < k.size(0); ++i) {
      if (slot[i] < 0) continue;
      for (int64_t h = 0; h < heads; ++h) {
        T* to = held.mutable_data_ptr<T>() + slot[i] / block * held.stride(0) + h * held.stride(1) + slot[i] % block * held.stride(2);
        std::copy_n(k.const_data_ptr<T>() + i * k.stride(0) + h * k.stride(1), dim, to);
        std::copy_n(v.const_data_ptr<T>() + i * v.stride(0) + h * v.stride(1), dim, to + dim);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(torchgsrq, CPU, m) {
  m.impl("paged_append_", paged_append);
  m.impl("paged_hold_", paged_hold);
  m.impl("paged_attention", paged_attention);
}

}  // namespace gsrq
