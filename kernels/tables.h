// The tables of a codec in the order that the kernels read them in. Made once per codec, kept while it lives.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "vector.h"

namespace gsrq {

constexpr int64_t kRotate = 256;  // positions that share one rotation of the query for the mean term

// The codec of some heads, as ops carry it: see Codec.tensors and Codec.integers in torchgsrq/codec/codec.py.
struct Codec {
  Tensor inv_freq, mean, transform, inverse, codebook;
  int64_t heads, dim, codes, width, groups, eta, frame;
  bool interleaved;

  // Tensors: the frequencies, and then the four tables of the codec, from `at` on.
  Codec(at::TensorList tensors, at::IntArrayRef integers, size_t at = 1)
      : inv_freq(tensors[0].contiguous()), mean(tensors[at].contiguous()), transform(tensors[at + 1].contiguous()),
        inverse(tensors[at + 2].contiguous()), codebook(tensors[at + 3].contiguous()), heads(mean.size(0)),
        dim(mean.size(1)), codes(codebook.size(1)), width(codebook.size(3)), groups(dim / width), eta(integers[1]),
        frame(integers[2]), interleaved(integers[0] != 0) {
    const std::vector<int64_t> square{heads, dim, dim}, book{heads, codes, kWords, width};
    TORCH_CHECK_VALUE(
        transform.sizes() == square && inverse.sizes() == square && codebook.sizes() == book && groups * width == dim &&
            groups <= codes && 2 * inv_freq.numel() <= dim && frame > 0,
        "these tables are no codec's: mean ", mean.sizes(), ", transform ", transform.sizes(), ", codebook ",
        codebook.sizes());
  }

  const at::Half* words(int64_t head, int64_t code) const {
    return codebook.const_data_ptr<at::Half>() + (head * codes + code) * kWords * width;
  }
};

// The codecs of a layer's keys, or of its values: see Codecs.
struct Codecs {
  std::deque<Codec> parts;
  std::vector<std::pair<int64_t, int64_t>> of_head;  // of each head of the layer: its part, and which it is there
  int64_t heads = 0, dim;

  Codecs(at::TensorList tensors, at::IntArrayRef integers) {
    const int64_t size = integers.size();
    for (int64_t at = 3; at < size; at += 1 + integers[at]) heads += integers[at];
    of_head.assign(heads, {-1, -1});
    for (int64_t at = 3; at < size; at += 1 + integers[at]) {
      const int64_t part = parts.size(), n = integers[at];
      TORCH_CHECK_VALUE(
          n > 0 && at + n < size && 4 * part + 5 <= static_cast<int64_t>(tensors.size()), "integers is no codec's: ", integers);
      parts.emplace_back(tensors, integers, 1 + 4 * part);
      TORCH_CHECK_VALUE(parts.back().heads == n, "integers names ", n, " heads of a codec of ", parts.back().heads);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t head = integers[at + 1 + i];
        TORCH_CHECK_VALUE(0 <= head && head < heads && of_head[head].first < 0, "integers is no codec's: ", integers);
        of_head[head] = {part, i};
      }
    }
    TORCH_CHECK_VALUE(heads > 0, "integers is no codec's: ", integers);
    dim = parts[0].dim;
  }
  Codecs(const Codecs&) = delete;
};

// Where a row of a cache begins, and the position of each of its slots: see GSRQTensor.start in tensor.py.
class RowStart {
 public:
  RowStart(const Tensor& start, int64_t b)
      : at_(start.const_data_ptr<int32_t>() + b * start.stride(0)), placed_(start.size(1) > 2) {}
  int64_t sink() const { return at_[1]; }
  int64_t position(int64_t slot) const { return placed_ ? at_[2 + slot] : slot - at_[0]; }
  // Where positions stop counting up with the slots, at the latest at `end`.
  int64_t end_of_run(int64_t slot, int64_t end) const {
    if (!placed_) return end;
    int64_t next = slot + 1;
    while (next < end && at_[2 + next] == at_[1 + next] + 1) ++next;
    return next;
  }

 private:
  const int32_t* at_;
  bool placed_;
};

// The parts of a GSRQTensor (tensor.py): what it owns, and then the tables of its codecs.
struct Packed {
  Tensor window, start, length, encoded;
  std::vector<Tensor> codes;  // of every part of the codecs, [batch, its heads, capacity, its bytes]
  Codecs codec;
  int64_t sinks, recent, block, ring;

  Packed(at::TensorList kv, at::IntArrayRef integers) : Packed(kv, kv.slice(4 + parts_of(integers)), integers) {}
  Packed(at::TensorList owned, at::TensorList tables, at::IntArrayRef integers)
      : window(owned[0]), start(owned[1]), length(owned[2]), encoded(owned[3]),
        codes(owned.begin() + 4, owned.begin() + 4 + parts_of(integers)), codec(tables, integers.slice(3)),
        sinks(integers[0]), recent(integers[1]), block(integers[2]), ring(window.size(2) - integers[0]) {
    const int64_t batch = window.size(0);
    for (size_t i = 0; i < codes.size(); ++i) {
      const Codec& c = codec.parts[i];
      TORCH_CHECK_VALUE(
          codes[i].dim() == 4 && codes[i].size(0) == batch && codes[i].size(1) == c.heads && codes[i].size(3) == c.codes &&
              codes[i].size(2) == capacity() && (codes[i].numel() == 0 || (codes[i].stride(3) == 1 && codes[i].stride(2) == c.codes)),
          "codes have shape ", codes[i].sizes(), " and strides ", codes[i].strides(), ", which are not this codec's");
    }
    TORCH_CHECK_VALUE(
        start.dim() == 2 && start.size(0) == batch && start.stride(1) == 1 &&
            (start.size(1) == 2 || start.size(1) >= 2 + capacity()),
        "start has shape ", start.sizes(), "; expected [", batch, ", 2] or [", batch, ", 2 + capacity]");
  }

  int64_t batch() const { return window.size(0); }
  int64_t capacity() const { return codes[0].size(2); }
  // The codes of a row and head, from its first slot on.
  uint8_t* codes_of(int64_t b, int64_t head) const {
    const auto [part, h] = codec.of_head[head];
    return static_cast<uint8_t*>(codes[part].data_ptr()) + b * codes[part].stride(0) + h * codes[part].stride(1);
  }

 private:
  static int64_t parts_of(at::IntArrayRef integers) {
    int64_t parts = 0;
    for (int64_t at = 6; at < static_cast<int64_t>(integers.size()); at += 1 + integers[at]) ++parts;
    return parts;
  }
};

// Of a codec. "Canonical" is the order of a vector's elements that rotations are simple in: first elements of the RoPE
// pairs, second elements, the rest. Rows are padded with zeros to whole vectors.
struct Tables {
  int64_t heads, dim, padded, codes, groups, width, pairs, frame;
  std::vector<float> inv_freq;
  std::vector<int64_t> order;              // canonical element -> element of the vector
  std::vector<double> step_cos, step_sin;  // rotation by kRotate positions
  Buffer mean;                             // [heads, padded], canonical
  Buffer mean_rows;                        // [heads, kRotate, padded]: rotated to the first kRotate positions
  int64_t rank = 0, padded_rank = 0;       // mean_rows is the product of two thin factors; slow pairs add little to them
  Buffer mean_into;                        // [heads, dim (canonical), padded_rank]
  Buffer mean_at;                          // [heads, rank, kRotate]
  Buffer transform;                        // [heads, dim (canonical), padded]
  Buffer inverse;                          // [heads, dim, padded (canonical)]
  Buffer inverse_t;                        // [heads, dim (canonical), padded]: the same, transposed
  Buffer squares;                          // [heads, codes, 256]: squared norms of the codewords
  std::vector<at::Half> columns;           // [heads, codes, width, 256]: the codewords, transposed
  std::vector<at::Half> wide_words;        // [heads, codes, 256, wide]: the codewords, padded if they need to be
  int64_t wide;

  explicit Tables(const Codec& c)
      : heads(c.heads), dim(c.dim), padded(round_up(c.dim, kWidth)), codes(c.codes), groups(c.groups), width(c.width),
        pairs(c.inv_freq.numel()), frame(c.frame), order(c.dim) {
    const float* f = c.inv_freq.const_data_ptr<float>();
    for (int64_t i = 0; i < pairs; ++i) {
      inv_freq.push_back(f[i]);
      step_cos.push_back(std::cos(kRotate * static_cast<double>(f[i])));
      step_sin.push_back(std::sin(kRotate * static_cast<double>(f[i])));
      order[i] = c.interleaved ? 2 * i : i;
      order[pairs + i] = c.interleaved ? 2 * i + 1 : i + pairs;
    }
    for (int64_t d = 2 * pairs; d < dim; ++d) order[d] = d;
    mean.fill(heads * padded);
    mean_rows.fill(heads * kRotate * padded);
    transform.fill(heads * dim * padded);
    inverse.fill(heads * dim * padded);
    inverse_t.fill(heads * dim * padded);
    const float *m = c.mean.const_data_ptr<float>(), *back = c.inverse.const_data_ptr<float>();
    const float* into = c.transform.const_data_ptr<float>();
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < dim; ++d) {
        mean[h * padded + d] = m[h * dim + order[d]];
        for (int64_t e = 0; e < dim; ++e) {
          inverse[(h * dim + e) * padded + d] = back[(h * dim + order[d]) * dim + e];
          inverse_t[(h * dim + d) * padded + e] = back[(h * dim + order[d]) * dim + e];
          transform[(h * dim + d) * padded + e] = into[(h * dim + e) * dim + order[d]];
        }
      }
    std::vector<float> cosine(pairs), sine(pairs);
    for (int64_t r = 0; r < kRotate; ++r) {
      cos_sin(cosine.data(), sine.data(), inv_freq.data(), pairs, r);
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; ++d) {
          const float* v = mean + h * padded;
          float x = v[d];
          if (d < pairs) x = v[d] * cosine[d] - v[d + pairs] * sine[d];
          else if (d < 2 * pairs) x = v[d] * cosine[d - pairs] + v[d - pairs] * sine[d - pairs];
          mean_rows[(h * kRotate + r) * padded + d] = x;
        }
    }
    factor_means();
    columns.resize(heads * codes * width * kWords);
    wide = round_up(width, kWidth);
    if (wide != width) wide_words.resize(heads * codes * kWords * wide, at::Half(0));
    squares.fill(heads * codes * kWords);
    at::parallel_for(0, heads * codes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const at::Half* w = c.words(i / codes, i % codes);
        for (int64_t j = 0; j < kWords; ++j) {
          float sum = 0;
          for (int64_t e = 0; e < width; ++e) {
            const float x = w[j * width + e];
            sum += x * x;
            columns[(i * width + e) * kWords + j] = w[j * width + e];
            if (wide != width) wide_words[(i * kWords + j) * wide + e] = w[j * width + e];
          }
          squares[i * kWords + j] = sum;
        }
      }
    });
  }

  const at::Half* columns_of(int64_t head, int64_t code) const {
    return columns.data() + (head * codes + code) * width * kWords;
  }

 private:
  // mean_rows of a head as a function of the position, one per element, spans few dimensions to the precision of
  // floats: an orthonormal basis of them by Gram-Schmidt, the element that is known worst first.
  void factor_means() {
    std::vector<double> basis(heads * dim * kRotate), into(heads * dim * dim), rest(dim * kRotate);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t r = 0; r < kRotate; ++r) rest[d * kRotate + r] = mean_rows[(h * kRotate + r) * padded + d];
      double enough = -1;
      for (int64_t j = 0; j < dim; ++j) {
        int64_t worst = 0;
        double most = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double* x = &rest[d * kRotate];
          const double square = std::inner_product(x, x + kRotate, x, 0.0);
          if (square > most) most = square, worst = d;
        }
        if (enough < 0) enough = most * 1e-13;
        if (most <= enough) break;
        rank = std::max(rank, j + 1);
        double* b = &basis[(h * dim + j) * kRotate];
        for (int64_t r = 0; r < kRotate; ++r) b[r] = rest[worst * kRotate + r] / std::sqrt(most);
        for (int64_t d = 0; d < dim; ++d) {
          double* x = &rest[d * kRotate];
          const double part = std::inner_product(x, x + kRotate, b, 0.0);
          into[(h * dim + d) * dim + j] = part;
          for (int64_t r = 0; r < kRotate; ++r) x[r] -= part * b[r];
        }
      }
    }
    padded_rank = round_up(rank, kWidth);
    mean_into.fill(heads * dim * padded_rank);
    mean_at.fill(heads * rank * kRotate);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < rank; ++j) {
        for (int64_t d = 0; d < dim; ++d) mean_into[(h * dim + d) * padded_rank + j] = into[(h * dim + d) * dim + j];
        for (int64_t r = 0; r < kRotate; ++r) mean_at[(h * rank + j) * kRotate + r] = basis[(h * dim + j) * kRotate + r];
      }
  }
};

// The tables of a codec, made once; found again by its tensors.
inline std::shared_ptr<Tables> tables_of(const Codec& c) {
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl>;
  struct Entry {
    Weak codebook, transform, inv_freq;
    std::shared_ptr<Tables> tables;
    bool gone() const { return codebook.expired() || transform.expired() || inv_freq.expired(); }
  };
  static std::mutex mutex;
  // Never destroyed: buffers go back to a pool of their thread, which is gone first when the process ends.
  static auto& known = *new std::unordered_multimap<c10::TensorImpl*, Entry>();
  const auto& codebook = c.codebook.getIntrusivePtr();
  const Weak transform(c.transform.getIntrusivePtr()), inv_freq(c.inv_freq.getIntrusivePtr());
  std::lock_guard<std::mutex> lock(mutex);
  const auto [begin, end] = known.equal_range(codebook.get());
  for (auto it = begin; it != end; ++it) {
    const Entry& e = it->second;
    if (!e.gone() && e.transform == transform && e.inv_freq == inv_freq) return e.tables;
  }
  for (auto it = known.begin(); it != known.end();) it = it->second.gone() ? known.erase(it) : std::next(it);
  auto tables = std::make_shared<Tables>(c);
  known.emplace(codebook.get(), Entry{Weak(codebook), transform, inv_freq, tables});
  return tables;
}

// A head of a layer: it is head h of a codec and of that codec's tables.
struct Head {
  const Codec& codec;
  const Tables& tables;
  int64_t h;
};

// The tables of a layer's codecs, by head.
class LayerTables {
 public:
  explicit LayerTables(const Codecs& codecs) : codecs_(&codecs) {
    for (const Codec& part : codecs.parts) tables_.push_back(tables_of(part));
  }
  Head operator[](int64_t head) const {
    const auto [part, h] = codecs_->of_head[head];
    return {codecs_->parts[part], *tables_[part], h};
  }

 private:
  const Codecs* codecs_;
  std::vector<std::shared_ptr<Tables>> tables_;
};

}  // namespace gsrq
