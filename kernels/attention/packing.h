// What keys and values become once for all queries: bytes in the order in which the products read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "visible.h"

namespace ditc {

constexpr int64_t MAX_D = 256;

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// [B, H, L, D] with contiguous rows.
struct Heads {
  at::Tensor kept;
  const char* data;
  Type type;
  int64_t L, D, H, batch, head, row;

  explicit Heads(const at::Tensor& x) : kept(x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous()) {
    data = static_cast<const char*>(kept.const_data_ptr());
    type = type_of(kept.scalar_type());
    const int64_t bytes = kept.element_size();
    H = kept.size(1), L = kept.size(2), D = kept.size(3);
    batch = kept.stride(0) * bytes, head = kept.stride(1) * bytes, row = kept.stride(2) * bytes;
  }
  const char* of(int64_t bh) const { return data + bh / H * batch + bh % H * head; }
};

// Sizes of what the keys and values of one head become.
struct Layout {
  int64_t L, D, keys, K, channels;
  int64_t k_bytes, v_bytes;
  Layout(int64_t L, int64_t D)
      : L(L), D(D), keys(up(L, PANEL)), K(up(D, 8)), channels(up(D, 16)), k_bytes(keys * K), v_bytes(keys * channels) {}
  int64_t bytes() const { return up(k_bytes + v_bytes + keys * 8 + channels * 4 + 64, 64); }
};

struct Head {
  int8_t *k, *v;    // panels of 32 keys [K / 4][32][4]; blocks of values: panels of 32 or 16 channels [keys / 4][.][4]
  int32_t* start;   // of each key: -128 * the sum of its integers
  float* relative;  // its scale over the largest of the head, with the sign of the attention's scale
  float* v_scale;
  float* largest;
  Head(int8_t* at, const Layout& l)
      : k(at), v(at + l.k_bytes), start(reinterpret_cast<int32_t*>(v + l.v_bytes)),
        relative(reinterpret_cast<float*>(start + l.keys)), v_scale(relative + l.keys), largest(v_scale + l.channels) {}
};

inline void pack_keys(const char* k, const Heads& from, const Layout& l, bool negative, const Head& to) {
  alignas(64) float mean[MAX_D] = {};
  const __m512 share = _mm512_set1_ps(1.f / l.L);
  for (int64_t d = 0; d < l.D; d += 16) {
    const __mmask16 mask = first(l.D - d);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < l.L; ++j) sum = _mm512_fmadd_ps(load(k + j * from.row, from.type, d, mask), share, sum);
    _mm512_store_ps(mean + d, sum);
  }
  float largest = 0;
  bool finite = true;
  for (int64_t j = 0; j < l.keys; ++j) {
    int8_t* column = to.k + j / PANEL * PANEL * l.K + j % PANEL * 4;
    if (j >= l.L) {
      for (int64_t d = 0; d < l.K; d += 4) std::memset(column + d * PANEL, 0, 4);
      to.start[j] = 0;
      to.relative[j] = 0;
      continue;
    }
    alignas(64) float row[MAX_D];
    __m512i most = _mm512_setzero_si512(), total = most;
    for (int64_t d = 0; d < l.D; d += 16) {
      const __mmask16 mask = first(l.D - d);
      const __m512 v = _mm512_maskz_sub_ps(mask, load(k + j * from.row, from.type, d, mask), _mm512_load_ps(mean + d));
      most = magnitude(most, v);
      _mm512_store_ps(row + d, v);
    }
    const Quantiser quantise(most);
    alignas(64) int32_t bytes[MAX_D / 4];
    for (int64_t d = 0; d < l.D; d += 16) {
      const __m512i q = quantise(_mm512_load_ps(row + d));
      total = _mm512_add_epi32(total, q);
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes + d / 4), _mm512_cvtsepi32_epi8(q));
    }
    for (int64_t d = 0; d < l.K / 4; ++d) std::memcpy(column + d * PANEL * 4, bytes + d, 4);
    to.start[j] = -128 * _mm512_reduce_add_epi32(total);
    to.relative[j] = quantise.scale;
    finite = finite && !std::isnan(quantise.scale);
    largest = std::max(largest, quantise.scale);
  }
  for (int64_t j = 0; j < l.L; ++j) to.relative[j] /= negative ? -largest : largest;
  // one key that is no number spoils the sum of every row
  *to.largest = finite ? largest : std::numeric_limits<float>::quiet_NaN();
}

// Weights come out of their packing with the keys 0..3, 16..19, 4..7, 20..23, ... of each 32: so do values go in.
inline int64_t step_of(int64_t key) {
  const int64_t four = key % PANEL / 4;
  return key / PANEL * (PANEL / 4) + (four < 4 ? 2 * four : 2 * four - 7);
}

inline void pack_values(const char* v, const Heads& from, const Layout& l, const Head& to) {
  for (int64_t c = 0; c < l.channels; c += 16) {
    const __mmask16 mask = first(l.D - c);
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < l.L; ++j) most = magnitude(most, load(v + j * from.row, from.type, c, mask));
    const __m512 amax = _mm512_castsi512_ps(most);
    __m512 scale = _mm512_max_ps(_mm512_div_ps(amax, _mm512_set1_ps(127.f)), _mm512_set1_ps(std::numeric_limits<float>::min()));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.f), scale);
    const __mmask16 bad = _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(0x7F800000));
    scale = _mm512_mask_mov_ps(scale, bad, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
    _mm512_storeu_ps(to.v_scale + c, scale);
    const int64_t width = std::min(PANEL, l.channels - c / PANEL * PANEL);
    for (int64_t j = 0; j < l.keys; j += 4) {
      __m512i packed = _mm512_setzero_si512();
      for (int i = 0; i < 4 && j + i < l.L; ++i) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(v + (j + i) * from.row, from.type, c, mask), inverse));
        q = _mm512_and_si512(q, _mm512_set1_epi32(0xFF));
        packed = _mm512_or_si512(packed, _mm512_sllv_epi32(q, _mm512_set1_epi32(8 * i)));
      }
      const int64_t block = j / BLOCK * BLOCK, keys = std::min(BLOCK, l.keys - block);
      int8_t* panel = to.v + block * l.channels + c / PANEL * PANEL * keys;
      _mm512_storeu_si512(panel + (step_of(j - block) * width + c % PANEL) * 4, packed);
    }
  }
}

}  // namespace ditc
