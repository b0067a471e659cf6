// K-means for the CPU: what torchgsrq/codec/kmeans.py means by `nearest`, `sum_by_code` and `moments_by_code`.

#include <torch/library.h>

#include "vector.h"

namespace gsrq {
namespace {

// Nearest of up to 256 centers [batch, codewords, width] for x [batch, n, width]: codes and squared distances.
std::tuple<Tensor, Tensor> nearest(const Tensor& x_, const Tensor& centers_) {
  const Tensor x = x_.contiguous(), centers = centers_.contiguous();
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2), count = centers.size(1);
  Tensor codes = at::empty({batch, n}, x.options().dtype(at::kLong)), errors = at::empty({batch, n}, x.options());
  const float* words = centers.const_data_ptr<float>();
  Buffer squares(batch * count);
  for (int64_t i = 0; i < batch * count; ++i) squares[i] = squared_norm(words + i * width, width);
  constexpr int64_t kStretch = 16 * kTile;
  const int64_t stretches = ceil_div(n, kStretch);
  at::parallel_for(0, batch * stretches, 1, [&](int64_t begin, int64_t end) {
    Buffer tile(kTile * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / stretches, low = task % stretches * kStretch, high = std::min(n, low + kStretch);
      for (int64_t first = low; first < high; first += kTile) {
        const int64_t some = std::min(kTile, high - first), at = b * n + first;
        const float* rows = x.const_data_ptr<float>() + at * width;
        side_by_side(tile, rows, width, some, width);
        const float* const sides[1] = {tile};
        const Least least = least_words(
            sides, words + b * count * width, squares + b * count, count, width,
            [](const Vec* sums, const Vec& of_word, int) { return at::vec::fmadd(Vec(-2.f), sums[0], of_word); });
        alignas(64) float loss[kTile], word[kTile];
        for (int k = 0; k < kBlocks; ++k) least.loss[k].store(loss + k * kWidth), least.word[k].store(word + k * kWidth);
        for (int64_t r = 0; r < some; ++r) {
          codes.mutable_data_ptr<int64_t>()[at + r] = static_cast<int64_t>(word[r]);
          errors.mutable_data_ptr<float>()[at + r] = std::max(0.f, loss[r] + squared_norm(rows + r * width, width));
        }
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
  m.impl("nearest", nearest);
  m.impl("sum_by_code", sum_by_code);
  m.impl("moments_by_code", moments_by_code);
}

}  // namespace gsrq
