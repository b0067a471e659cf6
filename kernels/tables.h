// The tables of a codec in the order that the kernels read them in. Made once per codec, kept while it lives.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <deque>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "vector.h"

namespace gsrq {

constexpr int64_t kRotate = 256;  // positions that share one rotation of the query for the mean term

// Heads that share a layout, in a codec that outlives this.
struct Run {
  int64_t heads, dim, groups, codes, dims, width, beam, eta, frame;
  bool interleaved;
  const float *mean, *transform, *inverse, *gains;  // gains: null for none
  const at::Half* codebook;
  const Tensor* inv_freq;
  int64_t before;  // bytes of the codes of a token that heads of earlier runs have

  int64_t bytes() const { return codes + (gains != nullptr); }
  const at::Half* words(int64_t head, int64_t code) const { return codebook + (head * codes + code) * kWords * width; }
};

// The codec as ops carry it: see Codec.tensors and Codec.integers in torchgsrq/codec/codec.py.
struct CodecView {
  Tensor mean, transform, inverse, codebook, inv_freq, gains;
  int64_t heads, dim, token_bytes = 0, unit = 0;
  std::vector<Run> runs;
  std::vector<std::pair<int64_t, int64_t>> of_head;  // of each head of the layer: its run, and which it is there

  CodecView(at::TensorList tensors, at::IntArrayRef integers)
      : mean(tensors[0].contiguous()), transform(tensors[1].contiguous()), inverse(tensors[2].contiguous()),
        codebook(tensors[3].contiguous()), inv_freq(tensors[4].contiguous()), gains(tensors[5].contiguous()),
        heads(mean.size(0)), dim(integers[0]), of_head(heads) {
    const float *m = mean.const_data_ptr<float>(), *into = transform.const_data_ptr<float>();
    const float *back = inverse.const_data_ptr<float>(), *g = gains.numel() ? gains.const_data_ptr<float>() : nullptr;
    const at::Half* words = codebook.const_data_ptr<at::Half>();
    const int64_t size = integers.size();
    int64_t known = 0;
    for (int64_t at = 5; at < size;) {
      TORCH_CHECK_VALUE(at + 4 <= size && integers[at] > 0, "layout is no codec's: ", integers);
      const int64_t groups = integers[at], codes = integers[at + 1], dims = integers[at + 2], n = integers[at + 3];
      const int64_t width = dims / groups;
      at += 4;
      TORCH_CHECK_VALUE(0 < n && n <= size - at && codes > 0, "layout is no codec's: ", integers);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t head = integers[at + i];
        TORCH_CHECK_VALUE(0 <= head && head < heads, "layout names head ", head, " of ", heads);
        of_head[head] = {static_cast<int64_t>(runs.size()), i};
      }
      at += n, known += n;
      runs.push_back(
          {n, dim, groups, codes, dims, width, integers[2], integers[3], integers[4], integers[1] != 0, m, into, back, g,
           words, &inv_freq, token_bytes});
      m += n * dim, into += n * dims * dim, back += n * dims * dim, words += n * codes * kWords * width;
      token_bytes += n * runs.back().bytes();
      unit = std::gcd(unit, runs.back().bytes());
    }
    TORCH_CHECK_VALUE(known == heads, "layout names ", known, " heads of ", heads, ": ", integers);
    const int64_t words_in = words - codebook.const_data_ptr<at::Half>(), into_in = into - transform.const_data_ptr<float>();
    TORCH_CHECK_VALUE(
        words_in == codebook.numel() && into_in == transform.numel() && into_in == inverse.numel(),
        "the tables of this codec have other sizes than its layout ", integers);
  }
  CodecView(const CodecView&) = delete;  // runs point into it

  // Shape of the codes of n tokens: those of a run are [its heads, n, its bytes], one run after the other.
  std::vector<int64_t> codes_shape(int64_t batch, int64_t n) const { return {batch, token_bytes / unit, n, unit}; }
  // Where the codes of a head begin, from the first of its row on. `codes` is of that shape, or longer in n.
  int64_t codes_at(const Tensor& codes, int64_t head) const {
    const auto [run, i] = of_head[head];
    return (runs[run].before + i * runs[run].bytes()) / unit * codes.stride(1);
  }
  int64_t bytes_of(int64_t head) const { return runs[of_head[head].first].bytes(); }
  void check_codes(const Tensor& codes) const {
    TORCH_CHECK_VALUE(
        codes.size(1) * codes.size(3) == token_bytes && codes.size(3) == unit &&
            (runs.size() == 1 || codes.numel() == 0 ||
             (codes.stride(1) == codes.size(2) * unit && codes.stride(2) == unit)),
        "codes have shape ", codes.sizes(), " and strides ", codes.strides(), ", which are not this codec's");
  }
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

inline void check_start(const Tensor& start, const Tensor& codes) {
  TORCH_CHECK_VALUE(
      start.dim() == 2 && start.size(0) == codes.size(0) && start.stride(1) == 1 &&
          (start.size(1) == 2 || start.size(1) >= 2 + codes.size(2)),
      "start has shape ", start.sizes(), "; expected [", codes.size(0), ", 2] or [", codes.size(0), ", 2 + capacity]");
}

// Of one run. "Canonical" is the order of a vector's elements that rotations are simple in: first elements of the RoPE pairs, second
// elements, the rest. Rows are padded with zeros to whole vectors.
struct Tables {
  int64_t heads, dim, padded, dims, padded_dims, codes, groups, width, pairs, frame;
  std::vector<float> inv_freq;
  std::vector<int64_t> order;              // canonical element -> element of the vector
  std::vector<double> step_cos, step_sin;  // rotation by kRotate positions
  Buffer mean;                             // [heads, padded], canonical
  Buffer mean_rows;                        // [heads, kRotate, padded]: rotated to the first kRotate positions
  int64_t rank = 0, padded_rank = 0;       // mean_rows is the product of two thin factors; slow pairs add little to them
  Buffer mean_into;                        // [heads, dim (canonical), padded_rank]
  Buffer mean_at;                          // [heads, rank, kRotate]
  Buffer transform;                        // [heads, dim (canonical), padded_dims]
  Buffer inverse;                          // [heads, dims, padded (canonical)]
  Buffer inverse_t;                        // [heads, dim (canonical), padded_dims]: the same, transposed
  Buffer squares;                          // [heads, codes, 256]: squared norms of the codewords
  std::vector<at::Half> columns;           // [heads, codes, width, 256]: the codewords, transposed
  std::vector<at::Half> wide_words;        // [heads, codes, 256, wide]: the codewords, padded if they need to be
  int64_t wide;

  explicit Tables(const Run& c)
      : heads(c.heads), dim(c.dim), padded(round_up(c.dim, kWidth)), dims(c.dims), padded_dims(round_up(c.dims, kWidth)),
        codes(c.codes), groups(c.groups), width(c.width), pairs(c.inv_freq->numel()), frame(c.frame), order(c.dim) {
    const float* f = c.inv_freq->const_data_ptr<float>();
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
    transform.fill(heads * dim * padded_dims);
    inverse.fill(heads * dims * padded);
    inverse_t.fill(heads * dim * padded_dims);
    const float *m = c.mean, *back = c.inverse, *into = c.transform;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < dim; ++d) {
        mean[h * padded + d] = m[h * dim + order[d]];
        for (int64_t e = 0; e < dims; ++e) {
          inverse[(h * dims + e) * padded + d] = back[(h * dim + order[d]) * dims + e];
          inverse_t[(h * dim + d) * padded_dims + e] = back[(h * dim + order[d]) * dims + e];
          transform[(h * dim + d) * padded_dims + e] = into[(h * dims + e) * dim + order[d]];
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

// The tables of every run of a codec; found again by its tensors.
using RunTables = std::deque<Tables>;  // whose elements never move
inline std::shared_ptr<RunTables> tables_of(const CodecView& c) {
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl>;
  struct Entry {
    Weak codebook, transform, inv_freq;
    std::shared_ptr<RunTables> tables;
    bool gone() const { return codebook.expired() || transform.expired() || inv_freq.expired(); }
    bool fits(const std::vector<Run>& runs) const {
      return std::equal(runs.begin(), runs.end(), tables->begin(), tables->end(), [](const Run& run, const Tables& t) {
        return run.codes == t.codes && run.heads == t.heads;
      });
    }
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
    if (!e.gone() && e.transform == transform && e.inv_freq == inv_freq && e.fits(c.runs)) return e.tables;
  }
  for (auto it = known.begin(); it != known.end();) it = it->second.gone() ? known.erase(it) : std::next(it);
  auto tables = std::make_shared<RunTables>();
  for (const Run& run : c.runs) tables->emplace_back(run);
  known.emplace(codebook.get(), Entry{Weak(codebook), transform, inv_freq, tables});
  return tables;
}

}  // namespace gsrq
