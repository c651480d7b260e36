// softmax(q k^T * scale) v on 8-bit integers for x86 with AVX512-VNNI.
//
// Keys lose their mean over tokens, which shifts all scores of a row alike; queries and keys have a scale for each
// token, values one for each channel. Keys are taken BLOCK at a time with a running maximum. The weights of a block are
// unsigned bytes, 255 for the row's largest of that block, and the normaliser adds up those bytes.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

#include "packing.h"

namespace ditc {
namespace {

using at::Tensor;

constexpr int64_t STRIDE = 256;  // bytes between the rows of a tile, of queries and of weights
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr auto ROWS = std::make_index_sequence<TILE>();

#define DITC_INLINE inline __attribute__((always_inline))
#define DITC_LAMBDA __attribute__((always_inline))

// As an instruction of its own: the compiler would copy accumulators about, and has no register to spare for that.
DITC_INLINE void multiply_add(__m512i& sum, __m512i bytes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

// Rows x panel over `steps` groups of four, an even number, on top of `start`; `finish` has the sums of each row.
// The rows are a pack, not a loop: accumulators indexed by a loop that is unrolled late are kept in memory.
template <typename Finish, size_t... I>
DITC_INLINE void two_vectors(const uint8_t* rows, const int8_t* panel, int64_t steps, __m512i start0, __m512i start1,
                             const Finish& finish, std::index_sequence<I...>) {
  __m512i left[] = {((void)I, start0)...}, right[] = {((void)I, start1)...};
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
    const auto add = [&](__m512i& l, __m512i& r, const uint8_t* row) DITC_LAMBDA {
      int32_t four;
      std::memcpy(&four, row, 4);
      const __m512i x = _mm512_set1_epi32(four);
      multiply_add(l, x, b0);
      multiply_add(r, x, b1);
    };
    (add(left[I], right[I], rows + I * STRIDE), ...);
    rows += 4;
    panel += 128;
  }
  (finish(I, left[I], right[I]), ...);
}

template <typename Finish, size_t... I>
DITC_INLINE void one_vector(const uint8_t* rows, const int8_t* panel, int64_t steps, const Finish& finish,
                            std::index_sequence<I...>) {
  __m512i sums[] = {((void)I, _mm512_setzero_si512())...};
  for (int64_t s = 0; s < steps; ++s) {
    const __m512i b = _mm512_loadu_si512(panel + s * 64);
    const auto add = [&](__m512i& sum, const uint8_t* row) DITC_LAMBDA {
      int32_t four;
      std::memcpy(&four, row, 4);
      multiply_add(sum, _mm512_set1_epi32(four), b);
    };
    (add(sums[I], rows + I * STRIDE + s * 4), ...);
  }
  (finish(I, sums[I]), ...);
}

// 255 * 2^x for x <= 0, relative error below 8e-5: a fiftieth of a step of the largest byte. Least squares of the
// relative error on [-1/2, 1/2], weighted until its extremes are level. NaN becomes nothing.
DITC_INLINE __m512 byte_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-30.f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(255 * 0.0551716649f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255 * 0.2426111219f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255 * 0.6932609862f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255 * 0.9999280736f));
  return _mm512_scalef_ps(p, n);
}

struct Tile {
  alignas(64) uint8_t q[TILE * STRIDE];
  alignas(64) uint8_t p[TILE * STRIDE];
  alignas(64) float scores[TILE * BLOCK];
  alignas(64) float most[TILE][16];
  alignas(64) float out[TILE * MAX_D];
  // of each row: what its scores are to be multiplied by for exponents of two, and what they still are
  alignas(64) float factor[16], slope[16];
  alignas(64) float maximum[16], total[16], now[16], before[16];
  bool fresh;  // nothing is in `out` yet

  Tile() {
    std::memset(q, 0, sizeof(q));
    std::memset(p, 0, sizeof(p));
  }

  void queries(const char* at, const Heads& from, int64_t D, int count, float largest, double scale) {
    fresh = true;
    for (float* rows : {factor, slope, total, now, before}) _mm512_store_ps(rows, _mm512_setzero_ps());
    _mm512_store_ps(maximum, _mm512_set1_ps(-INFINITE));
    for (int i = 0; i < count; ++i) {
      __m512i bits = _mm512_setzero_si512();
      const char* row = at + i * from.row;
      for (int64_t d = 0; d < D; d += 16) bits = magnitude(bits, load(row, from.type, d, first(D - d)));
      const Quantiser quantise(bits);
      for (int64_t d = 0; d < D; d += 16) {
        const __m512i code = _mm512_add_epi32(quantise(load(row, from.type, d, first(D - d))), _mm512_set1_epi32(128));
        _mm_store_si128(reinterpret_cast<__m128i*>(q + i * STRIDE + d), _mm512_cvtusepi32_epi8(code));
      }
      factor[i] = static_cast<float>(static_cast<double>(quantise.scale) * largest * std::abs(scale) * M_LOG2E);
    }
  }

  // Scores of the keys from `begin` to `end`, still without the factor of their row, and the largest of each row.
  void score(const Head& head, const Layout& l, int64_t begin, int64_t end) {
    for (int i = 0; i < TILE; ++i) _mm512_store_ps(most[i], _mm512_set1_ps(-INFINITE));
    for (int64_t j = begin; j < end; j += PANEL) {
      const __m512 relative0 = _mm512_loadu_ps(head.relative + j), relative1 = _mm512_loadu_ps(head.relative + j + 16);
      float* at = scores + j - begin;
      const auto plain = [&](int i, __m512i left, __m512i right) DITC_LAMBDA {
        const __m512 s0 = _mm512_mul_ps(_mm512_cvtepi32_ps(left), relative0);
        const __m512 s1 = _mm512_mul_ps(_mm512_cvtepi32_ps(right), relative1);
        _mm512_store_ps(at + i * BLOCK, s0);
        _mm512_store_ps(at + i * BLOCK + 16, s1);
        _mm512_store_ps(most[i], _mm512_max_ps(_mm512_load_ps(most[i]), _mm512_max_ps(s0, s1)));
      };
      const __mmask16 mask0 = first(l.L - j), mask1 = first(l.L - j - 16);
      const auto last = [&](int i, __m512i left, __m512i right) DITC_LAMBDA {
        const __m512 none = _mm512_set1_ps(-INFINITE);
        const __m512 s0 = _mm512_mask_mul_ps(none, mask0, _mm512_cvtepi32_ps(left), relative0);
        const __m512 s1 = _mm512_mask_mul_ps(none, mask1, _mm512_cvtepi32_ps(right), relative1);
        _mm512_store_ps(at + i * BLOCK, s0);
        _mm512_store_ps(at + i * BLOCK + 16, s1);
        _mm512_store_ps(most[i], _mm512_max_ps(_mm512_load_ps(most[i]), _mm512_max_ps(s0, s1)));
      };
      const __m512i start0 = _mm512_loadu_si512(head.start + j), start1 = _mm512_loadu_si512(head.start + j + 16);
      if (j + PANEL <= l.L)
        two_vectors(q, head.k + j * l.K, l.K / 4, start0, start1, plain, ROWS);
      else
        two_vectors(q, head.k + j * l.K, l.K / 4, start0, start1, last, ROWS);
    }
    _mm512_store_ps(slope, _mm512_load_ps(factor));
  }

  // Scores with their factor and what a mask adds, and -infinity where a key is not seen.
  void hide(const Visible& visible, const Seen& seen, int64_t bh, int64_t query, int64_t block, int count) {
    const __m512 limit = _mm512_set1_ps(std::numeric_limits<float>::max()), none = _mm512_set1_ps(-INFINITE);
    for (int i = 0; i < count; ++i) {
      const char* row = seen.adds ? visible.mask.at(bh / visible.H, bh % visible.H, query + i) : nullptr;
      __m512 largest = none;
      __mmask16 bad = 0;
      for (int64_t key = seen.begin; key < seen.end; key += 16) {
        const __mmask16 mask = seen.of(i, key - block);
        float* at = scores + i * BLOCK + key - seen.begin;
        __m512 s = _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(factor[i]));
        if (seen.adds) {
          const __m512 m = visible.mask.added(row, key, mask);
          // the most negative finite numbers are common in masks: they stay finite as exponents of two, too
          const __m512 exponent = _mm512_mul_ps(m, _mm512_set1_ps(M_LOG2E));
          const __m512 held = _mm512_max_ps(_mm512_min_ps(exponent, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
          const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(m), limit, _CMP_LE_OQ);
          s = _mm512_add_ps(s, _mm512_mask_mov_ps(m, finite, held));
          bad |= _mm512_mask_cmp_ps_mask(mask, s, s, _CMP_UNORD_Q);
        }
        s = _mm512_mask_mov_ps(none, mask, s);
        _mm512_store_ps(at, s);
        largest = _mm512_max_ps(largest, s);
      }
      _mm512_store_ps(most[i], bad ? _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()) : largest);
      slope[i] = 1;
    }
  }

  // Bytes of the weights of `keys` keys; how much what came before counts, and how much these.
  void weigh(int64_t keys, int count) {
    alignas(64) float highest[16] = {};
    alignas(64) int32_t sums[16] = {};
    for (int i = 0; i < count; ++i) highest[i] = _mm512_reduce_max_ps(_mm512_load_ps(most[i]));
    for (int i = 0; i < count; ++i) {
      const __m512 shift = _mm512_set1_ps(highest[i]), rise = _mm512_set1_ps(slope[i]);
      const auto weights = [&](int64_t j) DITC_LAMBDA {
        const __m512 below = _mm512_sub_ps(_mm512_load_ps(scores + i * BLOCK + j), shift);
        return _mm512_cvtps_epi32(byte_of(_mm512_mul_ps(below, rise)));
      };
      __m256i sum = _mm256_setzero_si256();
      for (int64_t j = 0; j < keys; j += PANEL) {
        // in the order of `step_of`
        const __m256i bytes = _mm512_cvtusepi16_epi8(_mm512_packs_epi32(weights(j), weights(j + 16)));
        sum = _mm256_dpbusd_epi32(sum, bytes, _mm256_set1_epi8(1));
        _mm256_store_si256(reinterpret_cast<__m256i*>(p + i * STRIDE + j), bytes);
      }
      const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
      const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
      sums[i] = _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xB1)));
    }
    rescale(_mm512_load_ps(highest), _mm512_cvtepi32_ps(_mm512_load_si512(sums)));
  }

  // All rows' `before`, `now`, `total` and `maximum` after keys of which `highest` scores highest, of weight `sum`.
  void rescale(__m512 highest, __m512 sum) {
    const __m512 old = _mm512_load_ps(maximum), all = _mm512_load_ps(total), infinite = _mm512_set1_ps(INFINITE);
    const __m512 peak = _mm512_mul_ps(highest, _mm512_load_ps(slope));
    // where the peak is no number the maximum stays
    const __m512 top = _mm512_max_ps(peak, old), ln2 = _mm512_set1_ps(M_LN2);
    const __mmask16 some = _mm512_cmp_ps_mask(all, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 fade = _mm512_maskz_mov_ps(some, exp(_mm512_mul_ps(_mm512_sub_ps(old, top), ln2)));
    // a row whose scores are no numbers, or beyond them, becomes NaN; one that sees none of these keys stays
    const __mmask16 seen = _mm512_cmp_ps_mask(peak, _mm512_sub_ps(_mm512_setzero_ps(), infinite), _CMP_NEQ_UQ);
    const __mmask16 bad = _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_load_ps(factor)), infinite, _CMP_NLT_UQ) |
                          (seen & _mm512_cmp_ps_mask(_mm512_abs_ps(peak), infinite, _CMP_NLT_UQ));
    __m512 share = _mm512_maskz_mov_ps(seen, exp(_mm512_mul_ps(_mm512_sub_ps(peak, top), ln2)));
    share = _mm512_mask_mov_ps(share, bad, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
    _mm512_store_ps(before, fade);
    _mm512_store_ps(now, share);
    _mm512_store_ps(total, _mm512_add_ps(_mm512_mul_ps(all, fade), _mm512_mul_ps(sum, share)));
    _mm512_store_ps(maximum, top);
  }

  DITC_INLINE void add(int i, int64_t c, __m512i sum) {
    float* at = out + i * MAX_D + c;
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(now[i]));
    if (!fresh) y = _mm512_fmadd_ps(_mm512_load_ps(at), _mm512_set1_ps(before[i]), y);
    _mm512_store_ps(at, y);
  }

  // Weights x values of the keys from `begin` to `end` of the block that begins at `block`.
  void gather(const Head& head, const Layout& l, int64_t block, int64_t begin, int64_t end) {
    const int64_t keys = std::min(BLOCK, l.keys - block), steps = (end - begin) / 4;
    const int8_t* values = head.v + block * l.channels;
    int64_t c = 0;
    for (; c + PANEL <= l.channels; c += PANEL) {
      const auto finish = [&](int i, __m512i left, __m512i right) DITC_LAMBDA {
        add(i, c, left);
        add(i, c + 16, right);
      };
      const __m512i zero = _mm512_setzero_si512();
      two_vectors(p, values + c * keys + (begin - block) * PANEL, steps, zero, zero, finish, ROWS);
    }
    if (c < l.channels) {
      const auto finish = [&](int i, __m512i sum) DITC_LAMBDA { add(i, c, sum); };
      one_vector(p, values + c * keys + (begin - block) * 16, steps, finish, ROWS);
    }
    fresh = false;
  }

  void attend(const Head& head, const Layout& l, int count) {
    for (int64_t begin = 0; begin < l.L; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, l.keys);
      score(head, l, begin, end);
      weigh(end - begin, count);
      gather(head, l, begin, begin, end);
    }
  }

  // The same where not all is seen: panels that no row of the tile sees at either end of a block are left out.
  void attend(const Head& head, const Layout& l, int count, const Visible& visible, int64_t bh, int64_t query) {
    const int64_t stop = visible.to(query + count - 1);
    Seen seen;
    for (int64_t block = visible.from(query) / BLOCK * BLOCK; block < stop; block += BLOCK) {
      if (!visible.look(bh, query, count, block, seen)) continue;
      score(head, l, seen.begin, seen.end);
      if (!seen.all) hide(visible, seen, bh, query, block, count);
      weigh(seen.end - seen.begin, count);
      gather(head, l, block, seen.begin, seen.end);
    }
  }

  // What each row is to be multiplied by: nothing is left of one that sees no key, but what is no number stays.
  float norm(int i) const {
    if (!std::isfinite(factor[i])) return std::numeric_limits<float>::quiet_NaN();
    return total[i] == 0 ? 0 : 1.f / total[i];
  }
};

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v have four dimensions [B, H, L, D]");
  TORCH_CHECK_VALUE(k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(3) == k.size(3),
                    "q [B, H, Lq, D] and k, v [B, G, Lk, D] expected, got ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, q.size(1), " heads of queries cannot share ", k.size(1),
                    " heads of keys");
  TORCH_CHECK_VALUE(k.size(2) > 0, "there are no keys");
  TORCH_CHECK_VALUE(q.size(3) > 0 && q.size(3) <= MAX_D, "heads of 1 to ", MAX_D, " features expected, got ", q.size(3));
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type() && k.scalar_type() == v.scalar_type(), "q, k and v differ in dtype");
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const std::optional<Tensor>& mask,
                 bool causal, const std::optional<Tensor>& blocks, int64_t window) {
  check(q, k, v);
  const Heads queries(q), keys(k), values(v);
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), D = q.size(3), G = k.size(1);
  const Visible visible(mask, causal, blocks, window, B, H, L, k.size(2));
  const bool hides = visible.hides();
  const Tensor out = at::empty({B, L, H, D}, q.options());
  const Layout layout(k.size(2), D);
  const int64_t tiles = (L + TILE - 1) / TILE, tasks = B * H * tiles;
  const Tensor room = at::empty({B * G * layout.bytes() + 64}, at::kChar);
  int8_t* packed = reinterpret_cast<int8_t*>(up(reinterpret_cast<int64_t>(room.mutable_data_ptr<int8_t>()), 64));
  at::parallel_for(0, B * G, 1, [&](int64_t from, int64_t to) {
    for (int64_t bg = from; bg < to; ++bg) {
      const Head head(packed + bg * layout.bytes(), layout);
      pack_keys(keys.of(bg), keys, layout, scale < 0, head);
      pack_values(values.of(bg), values, layout, head);
    }
  });
  char* y = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = out.element_size();
  // tiles differ in what they see: a thread that has done one takes the next
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    Tile tile;
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t bh = task / tiles, l = task % tiles * TILE;
      const int count = static_cast<int>(std::min<int64_t>(TILE, L - l));
      const Head head(packed + (bh / H * G + bh % H / (H / G)) * layout.bytes(), layout);
      tile.queries(queries.of(bh) + l * queries.row, queries, D, count, *head.largest, scale);
      if (hides)
        tile.attend(head, layout, count, visible, bh, l);
      else
        tile.attend(head, layout, count);
      if (tile.fresh) std::fill(tile.out, tile.out + TILE * MAX_D, 0.f);
      for (int i = 0; i < count; ++i) {
        char* row = y + (((bh / H) * L + l + i) * H + bh % H) * D * bytes;
        const __m512 norm = _mm512_set1_ps(tile.norm(i));
        for (int64_t d = 0; d < D; d += 16) {
          const __m512 value = _mm512_mul_ps(_mm512_load_ps(tile.out + i * MAX_D + d), norm);
          store<false>(row, queries.type, d, first(D - d), _mm512_mul_ps(value, _mm512_loadu_ps(head.v_scale + d)));
        }
      }
    }
  });
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_IMPL(ditc, CPU, m) { m.impl("attention_int8", attention); }

}  // namespace ditc
