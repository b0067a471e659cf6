// Products in bfloat16 by the processor's matrix tiles (AMX), which torch's own kernel drives.
#pragma once

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include <bit>

#include "vector.h"

namespace gsrq {

inline bool has_tiles() {
#ifdef CPU_CAPABILITY_AVX512
  static const bool found = at::cpu::init_amx() && at::native::cpublas::could_pack(at::kBFloat16);
  return found;
#else
  return false;
#endif
}

// Two floats as bfloat16, the nearest, in one word.
inline uint32_t pair_of(float first, float second) {
  const auto rounded = [](float x) { return std::bit_cast<uint32_t>(x) + 0x8000u; };
  return rounded(first) >> 16 | (rounded(second) & 0xffff0000u);
}

// A matrix of such pairs. A left factor [m, k] has rows [k / 2], a right one [k, n] pairs of rows, [k / 2, n].
class Pairs {
 public:
  // Rows x [m, k]; k is even, and there is room for up to 15 rows more.
  void rows(const float* x, int64_t ldx, int64_t m, int64_t k) {
    uint32_t* out = space(data_, (m + 15) * (k / 2));
    for (int64_t i = 0; i < m; ++i, x += ldx, out += k / 2)
      for (int64_t d = 0; d < k / 2; ++d) out[d] = pair_of(x[2 * d], x[2 * d + 1]);
  }
  // Pairs of rows of x [k, n], with zeros for those from k to `even`.
  void paired_rows(const float* x, int64_t ldx, int64_t k, int64_t n, int64_t even) {
    uint32_t* out = space(data_, even / 2 * n);
    std::fill(out + k / 2 * n, out + even / 2 * n, 0);
    for (int64_t t = 0; t < k; t += 2, out += n) {
      const float *a = x + t * ldx, *b = a + ldx;
      if (t + 1 < k) for (int64_t j = 0; j < n; ++j) out[j] = pair_of(a[j], b[j]);
      else for (int64_t j = 0; j < n; ++j) out[j] = pair_of(a[j], 0.f);
    }
  }
  // The transpose of another one's [m, n] as [n, ld]; columns from m on are zero.
  void transpose(const Pairs& other, int64_t m, int64_t n, int64_t ld) {
    uint32_t* out = space(data_, n * ld);
    const uint32_t* x = other.get();
    if (m < ld) std::fill_n(out, n * ld, 0);
    int64_t i = 0;
#ifdef CPU_CAPABILITY_AVX512
    for (; i + 16 <= m && n % 16 == 0; i += 16)
      for (int64_t j = 0; j < n; j += 16)
        at::vec::transpose_mxn<float, 16, 16>(
            reinterpret_cast<const float*>(x + i * n + j), n, reinterpret_cast<float*>(out + j * ld + i), ld);
#endif
    for (; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) out[j * ld + i] = x[i * n + j];
  }
  const at::BFloat16* halves() const { return reinterpret_cast<const at::BFloat16*>(get()); }

 private:
  static uint32_t* space(Buffer& data, int64_t pairs) {
    data.resize(pairs);
    return reinterpret_cast<uint32_t*>(static_cast<float*>(data));
  }
  const uint32_t* get() const { return reinterpret_cast<const uint32_t*>(static_cast<float*>(data_)); }

  Buffer data_;
};

// c [m, n] (+)= left [m, k] right [k, n].
inline void tiled_product(
    float* c, int64_t ldc, const Pairs& left, const Pairs& right, int64_t m, int64_t n, int64_t k, bool add) {
  at::native::cpublas::brgemm(m, n, k, k, n, ldc, add, left.halves(), right.halves(), c);
}

// To be called after the last product of a task.
inline void release_tiles() { at::native::cpublas::brgemm_release(); }

}  // namespace gsrq
