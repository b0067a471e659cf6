// What the CPU kernels share: small matrix products, rows of lanes, rotations, and the tables of a codec.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace gsrq {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t kWidth = Vec::size();  // floats in a vector register
constexpr int64_t kWords = 256;          // codewords of a table
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A dtype as Python prints it.
inline std::string name_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "torch.float32";
    case at::kHalf: return "torch.float16";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kDouble: return "torch.float64";
    default: return c10::toString(type);
  }
}

// Calls f with a null pointer to the C++ type of a dtype that windows and inputs may have.
template <typename F>
auto dispatch(at::ScalarType type, const char* name, F f) {
  switch (type) {
    case at::kFloat: return f(static_cast<const float*>(nullptr));
    case at::kBFloat16: return f(static_cast<const at::BFloat16*>(nullptr));
    case at::kHalf: return f(static_cast<const at::Half*>(nullptr));
    default: TORCH_CHECK_VALUE(false, name, " is ", name_of(type), "; expected float32, bfloat16 or float16");
  }
}

// How many of a row's `length` appended tokens are codes: config.py, encoded_tokens.
inline int64_t encoded_tokens(int64_t length, int64_t recent, int64_t block) {
  return length > recent ? (length - recent) / block * block : 0;
}

// Slots below which a row that begins at `first` is codes, of `length` held: reference/storage.py, coded_slots.
inline int64_t coded_slots(int64_t first, int64_t length, int64_t recent, int64_t block) {
  return std::min(length, first + encoded_tokens(length - first, recent, block));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t floor_mod(int64_t a, int64_t b) { return ((a % b) + b) % b; }

// Scratch memory, aligned for vector loads; not cleared. Each thread keeps what it has used for its next call: fresh
// pages would cost more than a short decode step.
class Buffer {
 public:
  explicit Buffer(int64_t floats = 0) { resize(floats); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { give_back(); }

  void resize(int64_t floats) {
    if (floats <= size_) return;
    give_back();
    auto& kept = pool();
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].size_ >= floats && kept[i].size_ <= 2 * floats + 1024) {
        data_ = kept[i].data_, size_ = kept[i].size_;
        kept[i] = kept.back();
        kept.pop_back();
        return;
      }
    size_ = round_up(floats, 16);
    data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
    TORCH_CHECK(data_, "out of memory for ", size_, " floats");
  }
  void fill(int64_t floats, float value = 0.f) {
    resize(floats);
    std::fill_n(data_, floats, value);
  }
  operator float*() const { return data_; }

 private:
  struct Block {
    float* data_;
    int64_t size_;
  };
  struct Pool : std::vector<Block> {
    ~Pool() {
      for (const Block& block : *this) std::free(block.data_);
    }
  };
  static Pool& pool() {
    thread_local Pool kept;
    return kept;
  }
  void give_back() {
    if (!data_) return;
    if (size_ <= kLargest && pool().size() < 32) pool().push_back({data_, size_});
    else std::free(data_);
    data_ = nullptr, size_ = 0;
  }
  static constexpr int64_t kLargest = 1 << 18;  // a megabyte

  float* data_ = nullptr;
  int64_t size_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Loads as float32

inline Vec load(const float* p) { return Vec::loadu(p); }

inline Vec load(const at::Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  alignas(64) float x[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) x[i] = static_cast<float>(p[i]);
  return Vec::loadu(x);
#endif
}

// out[i] (+)= in[i], any n
inline void add_to(float* out, const at::Half* in, int64_t n, bool add = true) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) (add ? load(out + i) + load(in + i) : load(in + i)).store(out + i);
#if defined(CPU_CAPABILITY_AVX512)
  for (; i + 8 <= n; i += 8) {  // a group of the default
    const __m256 more = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
    _mm256_storeu_ps(out + i, add ? _mm256_add_ps(_mm256_loadu_ps(out + i), more) : more);
  }
#endif
  for (; i < n; ++i) out[i] = (add ? out[i] : 0.f) + static_cast<float>(in[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// C[m, n] (+)= A[m, k] B[k, n]. A has any strides; rows of B (float32 or float16) and C are contiguous; n is a multiple
// of kWidth.

template <int M, int N, typename T>
inline void product_tile(
    float* c, int64_t ldc, const float* a, int64_t am, int64_t ak, const T* b, int64_t ldb, int64_t k, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = add ? Vec::loadu(c + i * ldc + j * kWidth) : Vec(0.f);
  for (int64_t p = 0; p < k; ++p) {
    Vec row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + p * ldb + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec factor(a[i * am + p * ak]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] = at::vec::fmadd(factor, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j].store(c + i * ldc + j * kWidth);
}

// All rows of one panel of N vectors, while it is in the first-level cache.
template <int N, typename T>
inline void product_panel(
    float* c, int64_t ldc, const float* a, int64_t am, int64_t ak, const T* b, int64_t ldb, int64_t m, int64_t k,
    bool add) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) product_tile<6, N>(c + i * ldc, ldc, a + i * am, am, ak, b, ldb, k, add);
  c += i * ldc, a += i * am;
  switch (m - i) {
    case 1: return product_tile<1, N>(c, ldc, a, am, ak, b, ldb, k, add);
    case 2: return product_tile<2, N>(c, ldc, a, am, ak, b, ldb, k, add);
    case 3: return product_tile<3, N>(c, ldc, a, am, ak, b, ldb, k, add);
    case 4: return product_tile<4, N>(c, ldc, a, am, ak, b, ldb, k, add);
    case 5: return product_tile<5, N>(c, ldc, a, am, ak, b, ldb, k, add);
    default: return;
  }
}

template <typename T>
inline void product(
    float* c, int64_t ldc, const float* a, int64_t am, int64_t ak, const T* b, int64_t ldb, int64_t m, int64_t n,
    int64_t k, bool add = false) {
  constexpr int kWide = kWidth >= 16 ? 4 : 2;  // with 6 rows, as many accumulators as there are registers for
  int64_t j = 0;
  for (; j + kWide * kWidth <= n; j += kWide * kWidth) product_panel<kWide>(c + j, ldc, a, am, ak, b + j, ldb, m, k, add);
  for (; j < n; j += kWidth) product_panel<1>(c + j, ldc, a, am, ak, b + j, ldb, m, k, add);
}

inline void product(
    float* c, int64_t ldc, const float* a, int64_t am, int64_t ak, const Buffer& b, int64_t ldb, int64_t m, int64_t n,
    int64_t k, bool add = false) {
  product<float>(c, ldc, a, am, ak, b, ldb, m, n, k, add);
}

// Whether none of n floats is NaN or infinite.
inline bool all_finite(const float* x, int64_t n) {
  float zero = 0;
  for (int64_t i = 0; i < n; ++i) zero += x[i] * 0.f;
  return zero == 0;
}

inline float reduce_sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// The sums of four vectors, in the first four elements; the others are zero.
inline Vec sums_of(const Vec (&x)[4]) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
  const auto half = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
#else
  const auto half = [](__m256 v) { return v; };
#endif
  const __m256 pairs[2] = {_mm256_hadd_ps(half(x[0]), half(x[1])), _mm256_hadd_ps(half(x[2]), half(x[3]))};
  const __m256 four = _mm256_hadd_ps(pairs[0], pairs[1]);
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_zextps128_ps512(sums);
#else
  return _mm256_zextps128_ps256(sums);
#endif
#else
  alignas(64) float each[kWidth] = {};
  for (int i = 0; i < 4; ++i) each[i] = reduce_sum(x[i]);
  return load(each);
#endif
}

// Products of n rows of `a` with R rows of q, [R, dim]: out[t, r], in rows of whole vectors with zeros past R. dim
// is a multiple of kWidth.
template <int R>
inline void dots(float* out, int64_t ldo, const float* a, int64_t lda, const float* q, int64_t n, int64_t dim) {
  static_assert(R <= 4);
  for (int64_t t = 0; t < n; ++t, a += lda, out += ldo) {
    Vec sums[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
    for (int64_t d = 0; d < dim; d += kWidth) {
      const Vec x = load(a + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] = at::vec::fmadd(x, load(q + r * dim + d), sums[r]);
    }
    sums_of(sums).store(out);
  }
}

// Any n.
inline float squared_norm(const float* x, int64_t n) {
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

// ---------------------------------------------------------------------------------------------------------------------
// The best of a table's codewords for kTile vectors, which lie side by side: a vector's elements are kTile apart.

constexpr int kBlocks = 2;
constexpr int64_t kTile = kBlocks * kWidth;

struct Least {
  Vec loss[kBlocks] = {Vec(kInf), Vec(kInf)}, word[kBlocks] = {Vec(0.f), Vec(0.f)};

  // Ties go to the lower word, as words go up.
  void see(int block, const Vec& found, const Vec& which) {
#if defined(CPU_CAPABILITY_AVX512)
    const __mmask16 lower = _mm512_cmp_ps_mask(found, loss[block], _CMP_LT_OQ);
    word[block] = _mm512_mask_mov_ps(word[block], lower, which);
    loss[block] = _mm512_min_ps(found, loss[block]);
#else
    const Vec lower = found < loss[block];
    word[block] = Vec::blendv(word[block], which, lower);
    loss[block] = Vec::blendv(loss[block], found, lower);
#endif
  }
};

// The numbers of the words, since a load is cheaper than a conversion.
inline const std::array<float, kWords> kNumbers = [] {
  std::array<float, kWords> numbers;
  std::iota(numbers.begin(), numbers.end(), 0.f);
  return numbers;
}();

// Whether registers hold all elements of as many blocks, of a width that is known (0 is not).
constexpr bool fits(int width, int sums, int blocks) { return kWidth == 16 && width && width * sums * blocks <= 16; }

// `least_words` of kAtOnce blocks from `block` on.
template <int kSums, int kSize, int kAtOnce, typename Loss>
inline void see_words(
    Least& least_, const float* const (&x)[kSums], const float* words, const float* squares, int64_t count, int64_t width_,
    Loss loss, int block) {
  constexpr bool kHeld = fits(kSize, kSums, kAtOnce);
  constexpr int kAt = kHeld ? 2 : 4 / kSums;  // words at a time: as many sums as the units' latency asks for
  const int64_t width = kSize ? kSize : width_;
  const auto element = [&](int64_t e, int b, int d) { return Vec::loadu(x[d] + e * kTile + (block + b) * kWidth); };
  Vec held[kHeld ? kSize : 1][kAtOnce][kSums];
  if constexpr (kHeld) {
#pragma GCC unroll 16
    for (int e = 0; e < kSize; ++e)
#pragma GCC unroll 4
      for (int b = 0; b < kAtOnce; ++b)
#pragma GCC unroll 4
        for (int d = 0; d < kSums; ++d) held[e][b][d] = element(e, b, d);
  }
  Least least;
  const auto some = [&](int64_t first, auto number) {
    constexpr int kMany = number.value;
    Vec sums[kMany][kAtOnce][kSums];
#pragma GCC unroll 4
    for (int k = 0; k < kMany; ++k)
#pragma GCC unroll 4
      for (int b = 0; b < kAtOnce; ++b)
#pragma GCC unroll 4
        for (int d = 0; d < kSums; ++d) sums[k][b][d] = Vec(0.f);
#pragma GCC unroll 16
    for (int64_t e = 0; e < width; ++e) {
      Vec here[kAtOnce][kSums];
#pragma GCC unroll 4
      for (int b = 0; b < kAtOnce; ++b)
#pragma GCC unroll 4
        for (int d = 0; d < kSums; ++d) here[b][d] = kHeld ? held[kHeld ? e : 0][b][d] : element(e, b, d);
#pragma GCC unroll 4
      for (int k = 0; k < kMany; ++k) {
        const Vec of_word(words[(first + k) * width + e]);
#pragma GCC unroll 4
        for (int b = 0; b < kAtOnce; ++b)
#pragma GCC unroll 4
          for (int d = 0; d < kSums; ++d) sums[k][b][d] = at::vec::fmadd(here[b][d], of_word, sums[k][b][d]);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kMany; ++k)
#pragma GCC unroll 4
      for (int b = 0; b < kAtOnce; ++b)
        least.see(b, loss(sums[k][b], Vec(squares[first + k]), block + b), Vec(kNumbers[first + k]));
  };
  int64_t first = 0;
  for (; first + kAt <= count; first += kAt) some(first, std::integral_constant<int, kAt>());
  for (; first < count; ++first) some(first, std::integral_constant<int, 1>());
  for (int b = 0; b < kAtOnce; ++b) least_.loss[block + b] = least.loss[b], least_.word[block + b] = least.word[b];
}

// The words of least loss(sums, squared norm of the word, block), where sums[d] are the products of a word with the
// vectors that x[d] begins with, [width, kTile]; words is [count, width].
template <int kSums, typename Loss>
Least least_words(const float* const (&x)[kSums], const float* words, const float* squares, int64_t count, int64_t width, Loss loss) {
  Least least;
  const auto see = [&](auto size) {
    constexpr int kSize = size.value;
    constexpr int kAtOnce = fits(kSize, kSums, 1) && !fits(kSize, kSums, kBlocks) ? 1 : kBlocks;
    for (int block = 0; block < kBlocks; block += kAtOnce)
      see_words<kSums, kSize, kAtOnce>(least, x, words, squares, count, width, loss, block);
  };
  switch (width) {
    case 8: see(std::integral_constant<int, 8>()); break;
    case 16: see(std::integral_constant<int, 16>()); break;
    default: see(std::integral_constant<int, 0>());
  }
  return least;
}

// Up to kTile rows of x, side by side: [width, kTile], with zeros for those past the last.
inline void side_by_side(float* out, const float* x, int64_t ldx, int64_t n, int64_t width) {
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t e = 0; e < width; ++e) out[e * kTile + r] = r < n ? x[r * ldx + e] : 0.f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Lanes: the query rows of a KV head side by side, so that one load of a table entry serves them all.

template <int L>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * L)));
  static type load(const float* p) {
    type x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static void store(float* p, type x) { std::memcpy(p, &x, sizeof(x)); }
};

// out[i][l] = in[l][i] for n entries of `rows` lanes; lanes past the rows are zero.
template <int L>
inline void interleave(float* out, const float* in, int64_t ldi, int64_t rows, int64_t n) {
  int64_t done = 0;
#if defined(CPU_CAPABILITY_AVX512)
  // Four lanes at a time: pairs (a b) and (c d), then both in the order of the entries.
  const __m512i low_pairs = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high_pairs = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const auto lane = [&](int64_t l, int64_t i) { return l < rows ? _mm512_loadu_ps(in + l * ldi + i) : _mm512_setzero_ps(); };
  done = n / 16 * 16;
  for (int l = 0; l < L; l += 4)
    for (int64_t i = 0; i < done; i += 16) {
      const __m512 a = lane(l, i), b = lane(l + 1, i), c = lane(l + 2, i), d = lane(l + 3, i);
      const __m512d ab0 = _mm512_castps_pd(_mm512_permutex2var_ps(a, low_pairs, b));
      const __m512d cd0 = _mm512_castps_pd(_mm512_permutex2var_ps(c, low_pairs, d));
      const __m512d ab1 = _mm512_castps_pd(_mm512_permutex2var_ps(a, high_pairs, b));
      const __m512d cd1 = _mm512_castps_pd(_mm512_permutex2var_ps(c, high_pairs, d));
      const __m512d four[4] = {
          _mm512_permutex2var_pd(ab0, low, cd0), _mm512_permutex2var_pd(ab0, high, cd0),
          _mm512_permutex2var_pd(ab1, low, cd1), _mm512_permutex2var_pd(ab1, high, cd1)};
      float* o = out + i * L + l;
      for (int j = 0; j < 4; ++j, o += 4 * L) {
        if constexpr (L == 4) {
          _mm512_storeu_pd(o, four[j]);
        } else {
          const __m512 x = _mm512_castpd_ps(four[j]);
          _mm_storeu_ps(o, _mm512_castps512_ps128(x));
          _mm_storeu_ps(o + L, _mm512_extractf32x4_ps(x, 1));
          _mm_storeu_ps(o + 2 * L, _mm512_extractf32x4_ps(x, 2));
          _mm_storeu_ps(o + 3 * L, _mm512_extractf32x4_ps(x, 3));
        }
      }
    }
#endif
  for (int64_t i = done; i < n; ++i)
    for (int l = 0; l < L; ++l) out[i * L + l] = l < rows ? in[l * ldi + i] : 0.f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotation: cos and sin of position * frequency, exact for any position.

inline void cos_sin(float* cosine, float* sine, const float* inv_freq, int64_t pairs, int64_t position) {
  alignas(64) float angle[kWidth];
  for (int64_t i = 0; i < pairs; i += kWidth) {
    const int64_t n = std::min(kWidth, pairs - i);
    for (int64_t j = 0; j < n; ++j) {
      const double turns = static_cast<double>(position) * static_cast<double>(inv_freq[i + j]) * (0.5 / M_PI);
      angle[j] = static_cast<float>((turns - std::nearbyint(turns)) * (2 * M_PI));
    }
    const Vec x = Vec::loadu(angle, n);
    x.cos().store(cosine + i, n);
    x.sin().store(sine + i, n);
  }
}

// Rotate the canonical vector x (tables.h) by minus the angles; elements past the pairs are copied.
inline void rotate_back(float* out, const float* x, const float* cosine, const float* sine, int64_t pairs, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= pairs; i += kWidth) {
    const Vec c = load(cosine + i), s = load(sine + i), a = load(x + i), b = load(x + pairs + i);
    (a * c + b * s).store(out + i);
    (b * c - a * s).store(out + pairs + i);
  }
  for (; i < pairs; ++i) {
    const float a = x[i], b = x[pairs + i];
    out[i] = a * cosine[i] + b * sine[i];
    out[pairs + i] = b * cosine[i] - a * sine[i];
  }
  std::copy(x + 2 * pairs, x + n, out + 2 * pairs);
}

}  // namespace gsrq
