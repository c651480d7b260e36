// softmax(q k^T * scale) v on 8-bit integers for x86 with AVX512-VNNI.
//
// Keys lose their mean over tokens, which shifts all scores of a row alike; queries and keys have a scale for each
// token, values one for each channel. Keys are taken BLOCK at a time with a running maximum. The weights of a block are
// unsigned bytes, 255 for the row's largest of that block, and the normaliser adds up those bytes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../linear/vnni/kernel.h"

namespace ditc {
namespace {

using at::Tensor;

constexpr int64_t BLOCK = 128;   // keys of a block: what is below 1/510 of the largest of its block is lost
constexpr int64_t STRIDE = 256;  // bytes between the rows of a tile, of queries and of weights
constexpr int64_t MAX_D = 256;
constexpr int64_t PANEL = 32;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Type::F32;
    case at::kBFloat16: return Type::BF16;
    case at::kHalf: return Type::F16;
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", type);
  }
}

// [B, H, L, D] with contiguous rows.
struct Heads {
  Tensor kept;
  const char* data;
  Type type;
  int64_t L, D, H, batch, head, row;

  explicit Heads(const Tensor& x) : kept(x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous()) {
    data = static_cast<const char*>(kept.const_data_ptr());
    type = type_of(kept.scalar_type());
    const int64_t bytes = kept.element_size();
    H = kept.size(1), L = kept.size(2), D = kept.size(3);
    batch = kept.stride(0) * bytes, head = kept.stride(1) * bytes, row = kept.stride(2) * bytes;
  }
  const char* of(int64_t bh) const { return data + bh / H * batch + bh % H * head; }
};

// What the keys and values of one head become.
struct Layout {
  int64_t L, D, keys, K, channels;
  int64_t k_bytes, v_bytes;
  Layout(int64_t L, int64_t D)
      : L(L), D(D), keys(up(L, PANEL)), K(up(D, 4)), channels(up(D, 16)), k_bytes(keys * K), v_bytes(keys * channels) {}
  int64_t bytes() const { return up(k_bytes + v_bytes + keys * 8 + channels * 4 + 64, 64); }
};

struct Head {
  int8_t *k, *v;        // panels of 32 keys [K / 4][32][4]; blocks of values: panels of 32 or 16 channels [keys / 4][.][4]
  int32_t* start;       // of each key: -128 * the sum of its integers
  float *relative;      // its scale over the largest of the head
  float* v_scale;
  float* largest;
  Head(int8_t* at, const Layout& l)
      : k(at), v(at + l.k_bytes), start(reinterpret_cast<int32_t*>(v + l.v_bytes)),
        relative(reinterpret_cast<float*>(start + l.keys)), v_scale(relative + l.keys), largest(v_scale + l.channels) {}
};

void pack_keys(const char* k, const Heads& from, const Layout& l, const Head& to) {
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
      most = ditc::magnitude(most, v);
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
  for (int64_t j = 0; j < l.L; ++j) to.relative[j] /= largest;
  // one key that is no number spoils the sum of every row
  *to.largest = finite ? largest : std::numeric_limits<float>::quiet_NaN();
}

void pack_values(const char* v, const Heads& from, const Layout& l, const Head& to) {
  for (int64_t c = 0; c < l.channels; c += 16) {
    const __mmask16 mask = first(l.D - c);
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < l.L; ++j) most = ditc::magnitude(most, load(v + j * from.row, from.type, c, mask));
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
      _mm512_storeu_si512(panel + (j - block) * width + c % PANEL * 4, packed);
    }
  }
}

// sums[row][vector] = start + rows x panel, over `steps` groups of four
template <int VECTORS>
inline __attribute__((always_inline)) void multiply(const uint8_t* rows, const int8_t* panel, int64_t steps,
                                                    __m512i (&sums)[TILE][VECTORS]) {
  for (int64_t s = 0; s < steps; ++s) {
    __m512i w[VECTORS];
#pragma GCC unroll 2
    for (int n = 0; n < VECTORS; ++n) w[n] = _mm512_loadu_si512(panel + (s * VECTORS + n) * 64);
#pragma GCC unroll 12
    for (int i = 0; i < TILE; ++i) {
      int32_t four;
      std::memcpy(&four, rows + i * STRIDE + s * 4, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int n = 0; n < VECTORS; ++n) sums[i][n] = _mm512_dpbusd_epi32(sums[i][n], x, w[n]);
    }
  }
}

// 2^x for x <= 8: relative error below 5e-5, a fiftieth of a step of the largest byte.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-100.f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(M_LN2 * M_LN2 * M_LN2 * M_LN2 / 24);
  for (double c : {M_LN2 * M_LN2 * M_LN2 / 6, M_LN2 * M_LN2 / 2, M_LN2, 1.}) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

struct Tile {
  alignas(64) uint8_t q[TILE * STRIDE];
  alignas(64) uint8_t p[TILE * STRIDE];
  alignas(64) float scores[TILE * BLOCK];
  alignas(64) float most[TILE][16];
  alignas(64) float out[TILE * MAX_D];
  float factor[TILE], maximum[TILE], total[TILE], now[TILE], before[TILE];

  void queries(const char* at, const Heads& from, int64_t D, int count, float largest, double scale) {
    for (int i = 0; i < TILE; ++i) {
      factor[i] = 0;
      maximum[i] = -std::numeric_limits<float>::infinity();
      total[i] = 0;
      if (i >= count) continue;
      __m512i bits = _mm512_setzero_si512();
      const char* row = at + i * from.row;
      for (int64_t d = 0; d < D; d += 16) bits = magnitude(bits, load(row, from.type, d, first(D - d)));
      const Quantiser quantise(bits);
      for (int64_t d = 0; d < D; d += 16) {
        const __m512i code = _mm512_add_epi32(quantise(load(row, from.type, d, first(D - d))), _mm512_set1_epi32(128));
        _mm_store_si128(reinterpret_cast<__m128i*>(q + i * STRIDE + d), _mm512_cvtusepi32_epi8(code));
      }
      factor[i] = static_cast<float>(static_cast<double>(quantise.scale) * largest * scale * M_LOG2E);
    }
  }

  void score(const Head& head, const Layout& l, int64_t begin, int64_t end) {
    for (int i = 0; i < TILE; ++i) _mm512_store_ps(most[i], _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
    for (int64_t j = begin; j < end; j += PANEL) {
      __m512i sums[TILE][2];
#pragma GCC unroll 12
      for (int i = 0; i < TILE; ++i)
        for (int n = 0; n < 2; ++n) sums[i][n] = _mm512_loadu_si512(head.start + j + 16 * n);
      multiply<2>(q, head.k + j * l.K, l.K / 4, sums);
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int64_t key = j + 16 * n;
        const __mmask16 mask = first(l.L - key);
        const __m512 relative = _mm512_loadu_ps(head.relative + key);
#pragma GCC unroll 12
        for (int i = 0; i < TILE; ++i) {
          __m512 s = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][n]), relative), _mm512_set1_ps(factor[i]));
          s = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), mask, s);
          _mm512_store_ps(scores + i * BLOCK + key - begin, s);
          _mm512_store_ps(most[i], _mm512_max_ps(_mm512_load_ps(most[i]), s));
        }
      }
    }
  }

  // Bytes of the block's weights; how much what came before counts, and how much this block.
  void weigh(int64_t keys, int count) {
    for (int i = 0; i < count; ++i) {
      const float peak = _mm512_reduce_max_ps(_mm512_load_ps(most[i])), top = std::max(maximum[i], peak);
      const __m512 shift = _mm512_set1_ps(peak - 7.994353436858858f);  // log2(255)
      __m512i sum = _mm512_setzero_si512();
      for (int64_t j = 0; j < keys; j += 16) {
        const __m512i w = _mm512_cvtps_epi32(exp2(_mm512_sub_ps(_mm512_load_ps(scores + i * BLOCK + j), shift)));
        sum = _mm512_add_epi32(sum, w);
        _mm_store_si128(reinterpret_cast<__m128i*>(p + i * STRIDE + j), _mm512_cvtusepi32_epi8(w));
      }
      before[i] = total[i] == 0 ? 0 : std::exp2(maximum[i] - top);
      // a row whose scores are no numbers, or beyond them, stays NaN
      now[i] = std::isfinite(peak) && std::isfinite(factor[i]) ? std::exp2(peak - top) : std::numeric_limits<float>::quiet_NaN();
      total[i] = total[i] * before[i] + static_cast<float>(_mm512_reduce_add_epi32(sum)) * now[i];
      maximum[i] = top;
    }
  }

  template <int VECTORS>
  void gather(const int8_t* panel, int64_t keys, int64_t c, bool fresh, int count) {
    __m512i sums[TILE][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < TILE; ++i)
      for (int n = 0; n < VECTORS; ++n) sums[i][n] = _mm512_setzero_si512();
    multiply<VECTORS>(p, panel, keys / 4, sums);
#pragma GCC unroll 12
    for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < VECTORS; ++n) {
        float* at = out + i * MAX_D + c + 16 * n;
        __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][n]), _mm512_set1_ps(now[i]));
        if (!fresh) y = _mm512_fmadd_ps(_mm512_load_ps(at), _mm512_set1_ps(before[i]), y);
        _mm512_store_ps(at, y);
      }
  }

  void attend(const Head& head, const Layout& l, int count) {
    for (int64_t begin = 0; begin < l.L; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, l.keys), keys = end - begin;
      score(head, l, begin, end);
      weigh(keys, count);
      const int8_t* values = head.v + begin * l.channels;
      int64_t c = 0;
      for (; c + PANEL <= l.channels; c += PANEL) gather<2>(values + c * keys, keys, c, begin == 0, count);
      if (c < l.channels) gather<1>(values + c * keys, keys, c, begin == 0, count);
    }
  }
};

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v have four dimensions [B, H, L, D]");
  TORCH_CHECK_VALUE(k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
                    "q [B, H, Lq, D] and k, v [B, H, Lk, D] expected, got ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK_VALUE(k.size(2) > 0, "there are no keys");
  TORCH_CHECK_VALUE(q.size(3) > 0 && q.size(3) <= MAX_D, "heads of 1 to ", MAX_D, " features expected, got ", q.size(3));
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type() && k.scalar_type() == v.scalar_type(), "q, k and v differ in dtype");
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  check(q, k, v);
  const Heads queries(q), keys(k), values(v);
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), D = q.size(3);
  const Tensor out = at::empty({B, L, H, D}, q.options());
  const Layout layout(k.size(2), D);
  const int64_t tiles = (L + TILE - 1) / TILE;
  const Tensor room = at::empty({B * H * layout.bytes() + 64}, at::kChar);
  int8_t* packed = reinterpret_cast<int8_t*>(up(reinterpret_cast<int64_t>(room.mutable_data_ptr<int8_t>()), 64));
  at::parallel_for(0, B * H, 1, [&](int64_t from, int64_t to) {
    for (int64_t bh = from; bh < to; ++bh) {
      const Head head(packed + bh * layout.bytes(), layout);
      pack_keys(keys.of(bh), keys, layout, head);
      pack_values(values.of(bh), values, layout, head);
    }
  });
  char* y = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = out.element_size();
  at::parallel_for(0, B * H * tiles, 1, [&](int64_t from, int64_t to) {
    Tile tile;
    std::memset(tile.q, 0, sizeof(tile.q));
    std::memset(tile.p, 0, sizeof(tile.p));
    std::fill(tile.now, tile.now + TILE, 0.f);
    std::fill(tile.before, tile.before + TILE, 0.f);
    for (int64_t task = from; task < to; ++task) {
      const int64_t bh = task / tiles, l = task % tiles * TILE;
      const int count = static_cast<int>(std::min<int64_t>(TILE, L - l));
      const Head head(packed + bh * layout.bytes(), layout);
      tile.queries(queries.of(bh) + l * queries.row, queries, D, count, *head.largest, scale);
      tile.attend(head, layout, count);
      for (int i = 0; i < count; ++i) {
        char* row = y + (((bh / H) * L + l + i) * H + bh % H) * D * bytes;
        const __m512 norm = _mm512_set1_ps(1.f / tile.total[i]);
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
