// Integer linear layers for x86 with AVX512-VNNI: prologue (quantise rows), micro-kernel, epilogue.
//
// y[m, n] = act(sum_k (q[m, k] * w[n, k]) * (scale[m] * weight_scale[n]) + bias[n]) * gate + residual
//
// vpdpbusd multiplies unsigned by signed bytes, so rows are stored as q + 128 and every accumulator starts at
// -128 * sum_k w[n, k]; int32 arithmetic wraps, so the sum is exact whenever the true sum fits.
//
// Weights: panels of 32 columns, each [K / 4][32][4] bytes, then 32 int32 starts, then 32 float scales.
// Rows: tiles of at most 12, each [K / 4][rows][4] bytes. K is padded to 16 with weights of zero.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace ditc {

constexpr int TILE = 12;        // 12 rows x 2 vectors = 24 accumulators of the 32 registers
constexpr int COLUMNS = 32;     // of a panel: two vectors of int32
constexpr int UNROLL = 4;       // steps of four k
constexpr int64_t STEP = 16;    // K is padded to UNROLL * 4
constexpr int64_t TRAILER = COLUMNS * 8;

enum class Type { F32, BF16, F16 };
enum class Activation { NONE, GELU, GELU_TANH, SILU, RELU };
enum class Norm { NONE, LAYER, RMS };

inline int64_t padded(int64_t K) { return (K + STEP - 1) / STEP * STEP; }
inline int64_t panel_bytes(int64_t K) { return padded(K) * COLUMNS + TRAILER; }
inline __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

inline __m512 load(const void* at, Type type, int64_t i, __mmask16 mask) {
  if (type == Type::F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(at) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(at) + i);
  if (type == Type::F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

template <bool FULL>
void store(void* at, Type type, int64_t i, __mmask16 mask, __m512 v) {
  if (type == Type::F32) {
    if (FULL) return _mm512_storeu_ps(static_cast<float*>(at) + i, v);
    return _mm512_mask_storeu_ps(static_cast<float*>(at) + i, mask, v);
  }
  const __m256i half = type == Type::F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bf16(v);
  uint16_t* to = static_cast<uint16_t*>(at) + i;
  if (FULL) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  _mm256_mask_storeu_epi16(to, mask, half);
}

// A factor or summand that belongs to groups of `rows` rows: row m has it at data + (m / rows) * stride.
struct Broadcast {
  const float* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 1;
  const float* row(int64_t m) const { return data == nullptr ? nullptr : data + m / rows * stride; }
};

// ---- activations -------------------------------------------------------------------------------------------------

// x * P(x) = max(x, 0) - |x| * P(-|x|), where P(-t) falls from 1/2 to nothing. P(-t) is a polynomial of degree 5 on each of 16
// intervals, whose coefficients a permutation picks from one register each: the error is below 1e-7 * |x|.
struct Curve {
  static constexpr int DEGREE = 5;
  static constexpr double LIMIT = 6.0;
  alignas(64) float coefficients[DEGREE + 1][16];

  template <typename Tail>
  explicit Curve(const Tail& tail) {
    for (int piece = 0; piece < 16; ++piece) {
      // Newton's divided differences on Chebyshev nodes of [0, 1], expanded to powers
      std::array<double, DEGREE + 1> node{}, value{}, power{};
      for (int i = 0; i <= DEGREE; ++i) {
        node[i] = 0.5 - 0.5 * std::cos(M_PI * (2 * i + 1) / (2 * (DEGREE + 1)));
        value[i] = tail((piece + node[i]) * LIMIT / 16);
      }
      for (int order = 1; order <= DEGREE; ++order)
        for (int i = DEGREE; i >= order; --i) value[i] = (value[i] - value[i - 1]) / (node[i] - node[i - order]);
      for (int i = DEGREE; i >= 0; --i) {
        for (int j = DEGREE; j > 0; --j) power[j] = power[j - 1] - node[i] * power[j];
        power[0] = value[i] - node[i] * power[0];
      }
      for (int j = 0; j <= DEGREE; ++j) coefficients[j][piece] = static_cast<float>(power[j]);
    }
  }

  __m512 operator()(__m512 x) const {
    const __m512 t = _mm512_abs_ps(x);
    // below the limit by a little, so that the last piece is 15; NaN passes: the second operand wins
    const __m512 z = _mm512_min_ps(_mm512_set1_ps(15.99999f), _mm512_mul_ps(t, _mm512_set1_ps(16 / LIMIT)));
    const __m512i piece = _mm512_cvttps_epi32(z);
    const __m512 u = _mm512_sub_ps(z, _mm512_cvtepi32_ps(piece));
    __m512 p = _mm512_permutexvar_ps(piece, _mm512_load_ps(coefficients[DEGREE]));
    for (int j = DEGREE - 1; j >= 0; --j)
      p = _mm512_fmadd_ps(p, u, _mm512_permutexvar_ps(piece, _mm512_load_ps(coefficients[j])));
    // beyond the limit nothing is left of the tail
    p = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(LIMIT), _CMP_NGE_UQ), p);
    const __m512 rest = _mm512_mul_ps(_mm512_min_ps(_mm512_set1_ps(LIMIT), t), p);
    return _mm512_sub_ps(_mm512_max_ps(x, _mm512_setzero_ps()), rest);
  }
};

inline double erf_tail(double t) { return 0.5 * std::erfc(t * M_SQRT1_2); }
inline double tanh_tail(double t) { return 1 / (1 + std::exp(2 * std::sqrt(2 / M_PI) * (t + 0.044715 * t * t * t))); }

// exp(x) as 2^n * 2^f, |f| <= 1/2, with the Taylor series of 2^f: its next term is 2e-8.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(89.f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(M_LOG2E)), _MM_FROUND_TO_NEAREST_INT);
  // ln 2 in two parts: what the first, exact in few bits, leaves
  constexpr double LN2 = 0.693359375;
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(M_LN2 - LN2), r);
  __m512 p = _mm512_set1_ps(1 / 5040.);
  for (double c : {1 / 720., 1 / 120., 1 / 24., 1 / 6., 1 / 2., 1., 1.}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline const Curve GELU_CURVE(erf_tail), GELU_TANH_CURVE(tanh_tail);

template <Activation ACTIVATION>
__m512 activate(__m512 v) {
  switch (ACTIVATION) {
    case Activation::GELU: return GELU_CURVE(v);
    case Activation::GELU_TANH: return GELU_TANH_CURVE(v);
    case Activation::SILU: return silu(v);
    case Activation::RELU: return _mm512_max_ps(_mm512_setzero_ps(), v);  // the second operand wins where it is NaN
    case Activation::NONE: break;
  }
  return v;
}

// ---- prologue ----------------------------------------------------------------------------------------------------

struct Quantiser {
  __m512 inverse;
  float scale;

  // From the largest magnitude's bits: those of an infinity or NaN are larger than those of every number.
  explicit Quantiser(__m512i magnitude_bits) {
    const uint32_t bits = _mm512_reduce_max_epu32(magnitude_bits);
    float amax;
    std::memcpy(&amax, &bits, 4);
    scale = std::max(amax / 127.f, std::numeric_limits<float>::min());
    inverse = _mm512_set1_ps(1.f / scale);
    if (bits >= 0x7F800000u) scale = std::numeric_limits<float>::quiet_NaN();
  }
  __m512i operator()(__m512 v) const { return _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)); }
};

inline __m512i magnitude(__m512i most, __m512 v) { return _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(v))); }

// Puts 16 bytes of row i of a tile, four at a time, where the micro-kernel wants them.
inline void place(uint8_t* tile, int rows, int i, int64_t k, __m128i bytes) {
  int32_t* at = reinterpret_cast<int32_t*>(tile) + k / 4 * rows + i;
  at[0] = _mm_extract_epi32(bytes, 0);
  at[rows] = _mm_extract_epi32(bytes, 1);
  at[2 * rows] = _mm_extract_epi32(bytes, 2);
  at[3 * rows] = _mm_extract_epi32(bytes, 3);
}

inline void place_integers(const int8_t* row, int64_t K, uint8_t* tile, int rows, int i) {
  for (int64_t k = 0; k < K; k += STEP)
    place(tile, rows, i, k, _mm_xor_si128(_mm_maskz_loadu_epi8(first(K - k), row + k), _mm_set1_epi8(-128)));
}

// Quantises a row into a tile; its scale.
inline float place_floats(const void* row, Type type, int64_t K, uint8_t* tile, int rows, int i) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += STEP) most = magnitude(most, load(row, type, k, first(K - k)));
  const Quantiser quantise(most);
  for (int64_t k = 0; k < K; k += STEP) {
    const __m512i q = quantise(load(row, type, k, first(K - k)));
    place(tile, rows, i, k, _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
  }
  return quantise.scale;
}

// Quantises a row into int8 of its own; its scale.
inline float quantise_row(const float* row, int64_t K, int8_t* q) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += STEP) most = magnitude(most, load(row, Type::F32, k, first(K - k)));
  const Quantiser quantise(most);
  for (int64_t k = 0; k < K; k += STEP)
    _mm_mask_storeu_epi8(q + k, first(K - k), _mm512_cvtepi32_epi8(quantise(load(row, Type::F32, k, first(K - k)))));
  return quantise.scale;
}

struct Normalisation {
  Norm norm = Norm::NONE;
  float eps = 0;
  const float* weight = nullptr;  // [K]
  const float* bias = nullptr;    // [K]
  Broadcast multiplier, shift;    // [rows, K]
};

// y = norm(x) * weight + bias, * multiplier + shift, into `y` [K]. Two passes over a row that lies in L1.
inline void normalise(const void* row, Type type, int64_t K, const Normalisation& how, int64_t m, float* y) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += STEP) {
    const __mmask16 mask = first(K - k);
    const __m512 v = load(row, type, k, mask);
    _mm512_mask_storeu_ps(y + k, mask, v);
    sum = _mm512_add_ps(sum, v);
  }
  const __m512 mean = _mm512_set1_ps(how.norm == Norm::LAYER ? _mm512_reduce_add_ps(sum) / K : 0.f);
  for (int64_t k = 0; k < K; k += STEP) {
    const __mmask16 mask = first(K - k);
    const __m512 v = _mm512_maskz_sub_ps(mask, load(y, Type::F32, k, mask), mean);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 factor = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / K + how.eps));
  const float *multiplier = how.multiplier.row(m), *shift = how.shift.row(m);
  for (int64_t k = 0; k < K; k += STEP) {
    const __mmask16 mask = first(K - k);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(y, Type::F32, k, mask), mean), factor);
    if (how.weight != nullptr) v = _mm512_mul_ps(v, load(how.weight, Type::F32, k, mask));
    if (how.bias != nullptr) v = _mm512_add_ps(v, load(how.bias, Type::F32, k, mask));
    if (multiplier != nullptr) v = _mm512_mul_ps(v, load(multiplier, Type::F32, k, mask));
    if (shift != nullptr) v = _mm512_add_ps(v, load(shift, Type::F32, k, mask));
    _mm512_mask_storeu_ps(y + k, mask, v);
  }
}

// ---- micro-kernel ------------------------------------------------------------------------------------------------

// ROWS x 32 sums over `steps` groups of 4 UNROLL, from a tile and a panel, into sums [ROWS][32].
inline __m512i four_of_row(const uint8_t* tile, size_t i) {
  int32_t word;
  std::memcpy(&word, tile + i * 4, 4);
  return _mm512_set1_epi32(word);
}

// The rows are a pack, not a loop: accumulators indexed by a loop that is unrolled late are kept in memory.
template <size_t... I>
void multiply_rows(const uint8_t* tile, const int8_t* panel, const int32_t* start, int64_t steps, int32_t* sums,
                   std::index_sequence<I...> rows) {
  __m512i c0[] = {((void)I, _mm512_loadu_si512(start))...};
  __m512i c1[] = {((void)I, _mm512_loadu_si512(start + 16))...};
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) {
      const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
      const auto add = [&](__m512i& left, __m512i& right, __m512i a) {
        left = _mm512_dpbusd_epi32(left, a, b0);
        right = _mm512_dpbusd_epi32(right, a, b1);
      };
      (add(c0[I], c1[I], four_of_row(tile, I)), ...);
      tile += rows.size() * 4;
      panel += COLUMNS * 4;
    }
  }
  (_mm512_storeu_si512(sums + I * COLUMNS, c0[I]), ...);
  (_mm512_storeu_si512(sums + I * COLUMNS + 16, c1[I]), ...);
}

template <int ROWS>
void multiply(const uint8_t* tile, const int8_t* panel, const int32_t* start, int64_t steps, int32_t* sums) {
  multiply_rows(tile, panel, start, steps, sums, std::make_index_sequence<ROWS>());
}

using Multiply = void (*)(const uint8_t*, const int8_t*, const int32_t*, int64_t, int32_t*);
inline constexpr std::array<Multiply, TILE + 1> MULTIPLY = {
    nullptr,     multiply<1>, multiply<2>, multiply<3>, multiply<4>,  multiply<5>,  multiply<6>,
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

// ---- epilogue ----------------------------------------------------------------------------------------------------

struct Epilogue {
  const float* bias = nullptr;  // [N]
  Activation activation = Activation::NONE;
  Broadcast gate;                  // [rows, N]
  const void* residual = nullptr;  // [M, N]
  Type residual_type = Type::F32;
  int64_t residual_stride = 0;  // in elements
  void* out = nullptr;          // [M, N]
  Type out_type = Type::F32;
};

inline int size_of(Type type) { return type == Type::F32 ? 4 : 2; }

// Asks for the lines that `finish` will write and read, before the product that takes the time to bring them.
inline void prefetch(const Epilogue& e, int rows, int64_t m, int64_t n, int64_t N) {
  const int64_t size = size_of(e.out_type), other = size_of(e.residual_type);
  const int64_t columns = std::min<int64_t>(COLUMNS, N - n);
  for (int i = 0; i < rows; ++i) {
    const char* row = static_cast<const char*>(e.out) + ((m + i) * N + n) * size;
    for (int64_t b = 0; b < columns * size; b += 64) _mm_prefetch(row + b, _MM_HINT_T0);
    if (e.residual == nullptr) continue;
    row = static_cast<const char*>(e.residual) + ((m + i) * e.residual_stride + n) * other;
    for (int64_t b = 0; b < columns * other; b += 64) _mm_prefetch(row + b, _MM_HINT_T0);
  }
}

// Sums of `rows` rows from row m and columns from n, to the output. Products and sums are rounded one by one, as in the
// reference. FULL: all 32 columns are there, and no mask is needed.
template <Activation ACTIVATION, Type OUT, bool FULL>
void finish(const Epilogue& epilogue, const int32_t* sums, int rows, int64_t m, int64_t n, int64_t N,
            const float* scale, const float* weight_scale) {
  const Epilogue e = epilogue;  // a copy that the stores below cannot change
  const __mmask16 mask[2] = {FULL ? __mmask16(0xFFFF) : first(N - n), FULL ? __mmask16(0xFFFF) : first(N - n - 16)};
  const __m512 column[2] = {_mm512_loadu_ps(weight_scale), _mm512_loadu_ps(weight_scale + 16)};
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (e.bias != nullptr)
    for (int j : {0, 1}) bias[j] = load(e.bias, Type::F32, n + 16 * j, mask[j]);
  char* out = static_cast<char*>(e.out) + m * N * size_of(OUT);
  const char* residual = static_cast<const char*>(e.residual);
  if (residual != nullptr) residual += m * e.residual_stride * size_of(e.residual_type);
  const float* gate = e.gate.row(m);
  int64_t left = e.gate.rows - m % e.gate.rows;  // rows that share this gate
  for (int i = 0; i < rows; ++i) {
    const __m512 own = _mm512_set1_ps(scale[i]);
    const auto half = [&](int j) {
      const __m512i sum = _mm512_loadu_si512(sums + i * COLUMNS + 16 * j);
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(own, column[j]));
      v = activate<ACTIVATION>(_mm512_add_ps(v, bias[j]));
      if (gate != nullptr) v = _mm512_mul_ps(v, load(gate, Type::F32, n + 16 * j, mask[j]));
      if (residual != nullptr) v = _mm512_add_ps(v, load(residual, e.residual_type, n + 16 * j, mask[j]));
      store<FULL>(out, OUT, n + 16 * j, mask[j], v);
    };
    half(0);
    half(1);
    out += N * size_of(OUT);
    if (residual != nullptr) residual += e.residual_stride * size_of(e.residual_type);
    if (gate != nullptr && --left == 0) {
      gate += e.gate.stride;
      left = e.gate.rows;
    }
  }
}

using Finish = void (*)(const Epilogue&, const int32_t*, int, int64_t, int64_t, int64_t, const float*, const float*);

template <bool FULL, Activation ACTIVATION>
Finish finish_into(Type out) {
  switch (out) {
    case Type::BF16: return finish<ACTIVATION, Type::BF16, FULL>;
    case Type::F16: return finish<ACTIVATION, Type::F16, FULL>;
    case Type::F32: break;
  }
  return finish<ACTIVATION, Type::F32, FULL>;
}

template <bool FULL>
Finish finish_for(const Epilogue& e) {
  switch (e.activation) {
    case Activation::GELU: return finish_into<FULL, Activation::GELU>(e.out_type);
    case Activation::GELU_TANH: return finish_into<FULL, Activation::GELU_TANH>(e.out_type);
    case Activation::SILU: return finish_into<FULL, Activation::SILU>(e.out_type);
    case Activation::RELU: return finish_into<FULL, Activation::RELU>(e.out_type);
    case Activation::NONE: break;
  }
  return finish_into<FULL, Activation::NONE>(e.out_type);
}

// ---- packing and the product of few rows -------------------------------------------------------------------------

// Columns n .. n + 32 of a weight [N, K] int8 with scales [N], as one panel.
inline void pack_panel(const int8_t* weight, const float* scale, int64_t N, int64_t K, int64_t n, int8_t* panel) {
  std::memset(panel, 0, panel_bytes(K));
  int8_t* trailer = panel + padded(K) * COLUMNS;
  for (int64_t j = 0; j < COLUMNS && n + j < N; ++j) {
    const int8_t* row = weight + (n + j) * K;
    uint32_t sum = 0;  // wraps as the accumulators do
    for (int64_t k = 0; k < K; ++k) {
      panel[(k / 4 * COLUMNS + j) * 4 + k % 4] = row[k];
      sum += static_cast<uint32_t>(static_cast<int32_t>(row[k]));
    }
    const uint32_t start = 0u - 128u * sum;
    std::memcpy(trailer + 4 * j, &start, 4);
    std::memcpy(trailer + 4 * COLUMNS + 4 * j, scale + n + j, 4);
  }
}

// Dot products of the float rows x [rows, K] with one int8 row: 64 bytes, a line of the weight, at a time.
template <size_t... I>
void dot_rows(const float* x, int64_t K, const int8_t* weight, float* y, std::index_sequence<I...>) {
  __m512 c0[] = {((void)I, _mm512_setzero_ps())...}, c1[] = {((void)I, _mm512_setzero_ps())...};
  const auto widen = [](__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); };
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(weight + k + 2048), _MM_HINT_T0);
    const auto half = [&](int64_t at) {
      const __m512 w0 = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + at)));
      const __m512 w1 = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + at + 16)));
      ((c0[I] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(x + I * K + at), c0[I])), ...);
      ((c1[I] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(x + I * K + at + 16), c1[I])), ...);
    };
    half(k);
    half(k + 32);
  }
  for (; k < K; k += 16) {
    const __mmask16 mask = first(K - k);
    const __m512 w = widen(_mm_maskz_loadu_epi8(mask, weight + k));
    ((c0[I] = _mm512_fmadd_ps(w, load(x + I * K, Type::F32, k, mask), c0[I])), ...);
  }
  ((y[I] = _mm512_reduce_add_ps(_mm512_add_ps(c0[I], c1[I]))), ...);
}

template <int ROWS>
void dot(const float* x, int64_t K, const int8_t* weight, float* y) {
  dot_rows(x, K, weight, y, std::make_index_sequence<ROWS>());
}

}  // namespace ditc
