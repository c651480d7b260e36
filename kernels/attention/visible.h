// Which keys the queries of a tile see: masks, causality, windows and block maps, as one bit for each query and key.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>

#include "../linear/vnni/kernel.h"

namespace ditc {

constexpr int64_t BLOCK = 128;   // keys of a block: what is below 1/510 of the largest of its block is lost
constexpr int64_t PANEL = 32;    // keys of a panel: a block is looked at from the first panel that is seen to the last
constexpr int64_t SPARSE = 64;   // queries and keys of an entry of a block map
constexpr int64_t WORDS = BLOCK / 64;

inline uint64_t lowest(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

inline Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Type::F32;
    case at::kBFloat16: return Type::BF16;
    case at::kHalf: return Type::F16;
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", type);
  }
}

// Bool or floating, broadcast to [B, H, Lq, Lk] by strides of zero: it is never written out.
class Mask {
 public:
  Mask() = default;

  Mask(const at::Tensor& mask, at::IntArrayRef scores) {
    const auto type = mask.scalar_type();
    TORCH_CHECK_TYPE(type == at::kBool || at::isFloatingType(type), "a mask is bool or floating, got ", type);
    const int64_t missing = 4 - mask.dim();
    bool fits = missing >= 0;
    at::Tensor own = mask;
    for (int64_t d = 0; fits && d < mask.dim(); ++d) {
      fits = mask.size(d) == 1 || mask.size(d) == scores[missing + d];
      // what was expanded by the caller is read where it lies, too
      if (mask.size(d) > 1 && mask.stride(d) == 0) own = own.narrow(d, 0, 1);
    }
    TORCH_CHECK_VALUE(fits, "a mask of shape ", mask.sizes(), " does not broadcast to ", scores);
    if (type != at::kBool && type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) own = own.to(at::kFloat);
    shared_key_ = own.dim() == 0 || own.size(-1) == 1;
    if (!shared_key_ && own.stride(-1) != 1) own = own.contiguous();
    is_bool_ = own.scalar_type() == at::kBool;
    if (!is_bool_) type_ = type_of(own.scalar_type());
    bytes_ = own.element_size();
    kept_ = own.expand(scores);
    data_ = static_cast<const char*>(kept_.const_data_ptr());
    batch_ = kept_.stride(0) * bytes_, head_ = kept_.stride(1) * bytes_, row_ = kept_.stride(2) * bytes_;
    if (scores[2] == 1) row_ = 0;
  }

  bool there() const { return data_ != nullptr; }
  bool one_row() const { return row_ == 0; }
  const char* at(int64_t batch, int64_t head, int64_t query) const {
    return data_ + batch * batch_ + head * head_ + query * row_;
  }

  // Which of the 64 keys from `key` on, of which `n` exist, are not at -infinity; sets `adds` where one is added to.
  uint64_t seen(const char* row, int64_t key, int64_t n, bool& adds) const {
    if (is_bool_) {
      if (shared_key_) return *row ? ~uint64_t{0} : 0;
      const __m512i bytes = _mm512_maskz_loadu_epi8(lowest(n), row + key);
      return _mm512_test_epi8_mask(bytes, bytes);
    }
    uint64_t bits = 0;
    for (int64_t j = 0; j < 64 && j < n; j += 16) {
      const __m512 m = added(row, key + j, first(n - j));
      const __mmask16 visible = _mm512_cmp_ps_mask(m, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), _CMP_NEQ_UQ);
      adds = adds || _mm512_mask_cmp_ps_mask(visible, m, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
      bits |= static_cast<uint64_t>(visible) << j;
    }
    return bits;
  }

  // What is added to the scores of 16 keys.
  __m512 added(const char* row, int64_t key, __mmask16 mask) const {
    if (!shared_key_) return load(row + key * bytes_, type_, 0, mask);
    return _mm512_maskz_mov_ps(mask, _mm512_broadcastss_ps(_mm512_castps512_ps128(load(row, type_, 0, 1))));
  }
  bool adds() const { return there() && !is_bool_; }

 private:
  at::Tensor kept_;
  const char* data_ = nullptr;
  Type type_ = Type::F32;
  bool is_bool_ = false, shared_key_ = false;
  int64_t bytes_ = 0, batch_ = 0, head_ = 0, row_ = 0;
};

// What the queries of a tile see of a block of keys.
struct Seen {
  uint64_t bits[TILE][WORDS];
  int64_t begin, end;  // panels of the block outside are seen by none of them
  bool all;            // all of them see all keys between
  bool adds;           // a mask changes scores

  __mmask16 of(int row, int64_t key) const { return static_cast<__mmask16>(bits[row][key / 64] >> key % 64); }
};

struct Visible {
  Mask mask;
  bool causal;
  int64_t window, Lk, H;
  at::Tensor kept;
  const bool* blocks = nullptr;
  int64_t block_rows = 0, block_columns = 0;

  Visible(const std::optional<at::Tensor>& mask_, bool causal, const std::optional<at::Tensor>& blocks_, int64_t window,
          int64_t B, int64_t H, int64_t Lq, int64_t Lk)
      : causal(causal), window(window), Lk(Lk), H(H) {
    if (mask_.has_value()) mask = Mask(*mask_, {B, H, Lq, Lk});
    TORCH_CHECK_VALUE(window >= -1, "window = ", window, ": a number of positions is wanted, or -1 for all");
    TORCH_CHECK_VALUE(window < 0 || Lq == Lk, "a window needs as many queries as keys, got ", Lq, " and ", Lk);
    this->window = window < 0 ? std::max(Lq, Lk) : std::min(window, Lk);
    if (!blocks_.has_value()) return;
    block_rows = (Lq + SPARSE - 1) / SPARSE, block_columns = (Lk + SPARSE - 1) / SPARSE;
    const std::array<int64_t, 4> wanted{B, H, block_rows, block_columns};
    TORCH_CHECK_TYPE(blocks_->scalar_type() == at::kBool, "a block map is bool, got ", blocks_->scalar_type());
    TORCH_CHECK_VALUE(blocks_->sizes() == at::IntArrayRef(wanted), "a block map of shape ", at::IntArrayRef(wanted), " is wanted, got ", blocks_->sizes());
    kept = blocks_->contiguous();
    blocks = kept.const_data_ptr<bool>();
  }

  bool hides() const { return mask.there() || causal || blocks != nullptr || window < Lk - 1; }

  // The keys that a query may see by its position.
  int64_t from(int64_t query) const { return std::max<int64_t>(0, query - window); }
  int64_t to(int64_t query) const { return std::min({Lk, query + window + 1, causal ? query + 1 : Lk}); }

  // Whether `count` queries from `query` on see any of the block of keys that begins at `begin`, and what.
  bool look(int64_t bh, int64_t query, int count, int64_t begin, Seen& seen) const {
    const bool* map[2] = {nullptr, nullptr};  // a tile may have queries of two rows of a map
    if (blocks != nullptr) {
      for (int64_t r = 0; r < 2; ++r)
        map[r] = blocks + (bh * block_rows + (query + r * (count - 1)) / SPARSE) * block_columns + begin / SPARSE;
      if (!map[0][0] && !map[1][0] && (begin + SPARSE >= Lk || (!map[0][1] && !map[1][1]))) return false;
    }
    seen.adds = false;
    uint64_t any[WORDS] = {}, all[WORDS];
    std::fill(all, all + WORDS, ~uint64_t{0});
    uint64_t shared[WORDS];
    const char* row = mask.there() ? mask.at(bh / H, bh % H, query) : nullptr;
    if (row != nullptr && mask.one_row())
      for (int64_t w = 0; w < WORDS; ++w) shared[w] = mask.seen(row, begin + 64 * w, Lk - begin - 64 * w, seen.adds);
    const bool alike = !causal && window >= Lk - 1 && (row == nullptr || mask.one_row());
    for (int i = 0; i < count; ++i) {
      const int64_t at = query + i;
      if (alike && i > 0 && (blocks == nullptr || at % SPARSE != 0)) {
        std::copy_n(seen.bits[i - 1], WORDS, seen.bits[i]);
        continue;
      }
      for (int64_t w = 0; w < WORDS; ++w) {
        const int64_t key = begin + 64 * w;
        uint64_t bits = lowest(to(at) - key) & ~lowest(from(at) - key);
        if (blocks != nullptr && bits != 0 && !map[at / SPARSE != query / SPARSE][w]) bits = 0;
        if (row != nullptr && bits != 0)
          bits &= mask.one_row() ? shared[w] : mask.seen(mask.at(bh / H, bh % H, at), key, Lk - key, seen.adds);
        seen.bits[i][w] = bits;
        any[w] |= bits;
        all[w] &= bits;
      }
    }
    if (any[0] == 0 && any[1] == 0) return false;
    const int64_t low = any[0] != 0 ? std::countr_zero(any[0]) : 64 + std::countr_zero(any[1]);
    const int64_t high = any[1] != 0 ? 128 - std::countl_zero(any[1]) : 64 - std::countl_zero(any[0]);
    seen.begin = begin + low / PANEL * PANEL;
    seen.end = begin + (high + PANEL - 1) / PANEL * PANEL;
    seen.all = !seen.adds;
    for (int64_t w = 0; w < WORDS; ++w) {
      const int64_t key = begin + 64 * w;
      const uint64_t wanted = lowest(std::min(seen.end, Lk) - key) & ~lowest(seen.begin - key);
      seen.all = seen.all && (all[w] & wanted) == wanted;
    }
    return true;
  }
};

}  // namespace ditc
