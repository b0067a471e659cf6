// What is held in full precision: tokens in pieces, read where they lie. For attention.cpp and paged.cpp.
#pragma once

#include "by_blocks.h"

namespace gsrq {
namespace {

// Tokens side by side in memory; rows of keys and of values are ldk and ldv elements apart.
template <typename T>
struct Piece {
  const T *k, *v;
  int64_t ldk, ldv, n;
};

// Attention of query rows [row0, row0 + rows) of a head to tokens in full precision; q is [rows, padded], plain.
template <typename T>
class Exact {
 public:
  Exact(const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* q, Part part)
      : c_(c), b_(b), h_(h), row0_(row0), rows_(rows), sink_(RowStart(c.key.start, b).sink()), part_(part), q_(c, rows),
        outputs_(c, part, rows), scores_((kBlock + kPadding - 1) * q_.lanes) {
    q_.set(q, c.padded);
  }

  // The tokens that any of the rows may see of those in full precision, as slots [low, end).
  std::pair<int64_t, int64_t> seen() const {
    int64_t low = std::numeric_limits<int64_t>::max(), last = -1;
    for (int64_t r = row0_; r < row0_ + rows_; ++r) {
      const int64_t query = c_.query_of(r);
      low = std::min(low, from_slot(query)), last = std::max(last, c_.last[query]);
    }
    return {low, last + 1};
  }

  // Tokens from `slot` on; sinks among them are left to `finish`.
  void add(Piece<T> piece, int64_t slot) {
    while (piece.n > 0) {
      if (n_ == kBlock) flush();
      const int64_t some = std::min(piece.n, kBlock - n_);
      pieces_.push_back(piece), pieces_.back().n = some;
      std::iota(slots_ + n_, slots_ + n_ + some, slot);
      n_ += some, slot += some, piece.n -= some, piece.k += some * piece.ldk, piece.v += some * piece.ldv;
    }
  }

  // The first sinks of the row, last of all.
  void finish(Piece<T> sinks) {
    flush();
    of_sinks_ = true;
    add(sinks, sink_);
    flush();
    outputs_.finish();
  }

 private:
  int64_t from_slot(int64_t query) const { return c_.dense_first[b_ * c_.queries + query]; }

  // Rows of floats, ld apart.
  const float* floats(const T* x, int64_t& ld, int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
      if (c_.dim == c_.padded) return x;
    }
    plain_.resize(kBlock * c_.padded);
    for (int64_t i = 0; i < n; ++i) {
      float* row = plain_ + i * c_.padded;
      at::vec::convert(x + i * ld, row, c_.dim);
      std::fill(row + c_.dim, row + c_.padded, 0.f);
    }
    ld = c_.padded;
    return plain_;
  }

  void flush() {
    if (!n_) return;
    const int64_t lanes = q_.lanes;
    float* scores = scores_;
    for (const Piece<T>& piece : pieces_) {
      int64_t ld = piece.ldk;
      const float* k = floats(piece.k, ld, piece.n);
      q_.score(scores, k, ld, piece.n);
      scores += piece.n * lanes;
    }
    const int64_t first = slots_[0], last = slots_[n_ - 1];  // slots ascend
    const bool with_sinks = of_sinks_ || (first < sink_ + c_.key.sinks && last >= sink_);
    restrict_scores(c_, b_, h_, row0_, rows_, slots_, 0, n_, scores_, lanes, 1, [&](int64_t query, float* s) {
      if (!with_sinks && first >= from_slot(query) && last <= c_.last[query]) return;  // nothing is hidden
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t slot = slots_[i];
        const bool is_sink = slot >= sink_ && slot < sink_ + c_.key.sinks;
        if (slot > c_.last[query] || is_sink != of_sinks_ || (!of_sinks_ && slot < from_slot(query))) s[i * lanes] = -kInf;
      }
    });
    soften(part_, outputs_, rows_, lanes, scores_, n_);
    scores = scores_;
    for (const Piece<T>& piece : pieces_) {
      int64_t ld = piece.ldv;
      const float* v = floats(piece.v, ld, piece.n);
      outputs_.add(scores, v, ld, piece.n);
      scores += piece.n * lanes;
    }
    pieces_.clear();
    n_ = 0;
  }

  const Call& c_;
  const int64_t b_, h_, row0_, rows_, sink_;
  const Part part_;
  Rows q_;
  Outputs outputs_;
  bool of_sinks_ = false;
  int64_t n_ = 0, slots_[kBlock];
  std::vector<Piece<T>> pieces_;
  Buffer scores_, plain_;
};

}  // namespace
}  // namespace gsrq
