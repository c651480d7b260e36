// The ops of kernel.h for torch: operands checked and brought to the form that the kernel reads, work shared out.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernel.h"

namespace ditc {
namespace {

using at::Tensor;
using Maybe = const std::optional<Tensor>&;

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Type::F32;
    case at::kBFloat16: return Type::BF16;
    case at::kHalf: return Type::F16;
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", type);
  }
}

Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::NONE;
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  if (name == "silu") return Activation::SILU;
  TORCH_CHECK_VALUE(name == "relu", "activation is one of none, gelu, gelu_tanh, silu, relu; got ", name);
  return Activation::RELU;
}

Norm norm_of(std::string_view name) {
  if (name == "layer") return Norm::LAYER;
  TORCH_CHECK_VALUE(name == "rms", "norm is one of layer, rms; got ", name);
  return Norm::RMS;
}

// A matrix view or copy [M, K] whose rows are contiguous.
Tensor matrix(const Tensor& x) {
  const Tensor rows = x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

int64_t row_stride(const Tensor& rows) { return rows.size(0) > 1 ? rows.stride(0) : rows.size(1); }

// Holds what the kernel points to.
struct Operands {
  std::vector<Tensor> kept;

  const float* vector(Maybe t, int64_t length, const char* name) {
    if (!t.has_value()) return nullptr;
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == length, name, " has shape ", t->sizes(), ", expected [", length, "]");
    kept.push_back(t->to(at::kFloat).contiguous());
    return kept.back().const_data_ptr<float>();
  }

  // `t` against rows of shape [lead..., length]: one for all, one for each of the first dimensions, or one for each row.
  Broadcast broadcast(Maybe t, at::IntArrayRef lead, int64_t length) {
    if (!t.has_value()) return {};
    std::vector<int64_t> full(lead.begin(), lead.end());
    full.push_back(length);
    Tensor wide = t->to(at::kFloat);
    TORCH_CHECK_VALUE(wide.dim() <= static_cast<int64_t>(full.size()), "shape ", t->sizes(), " widens ", full);
    while (wide.dim() < static_cast<int64_t>(full.size())) wide = wide.unsqueeze(0);
    int64_t groups = 1, rows = 1;
    bool prefix = wide.size(-1) == length;
    for (size_t d = 0; d < lead.size(); ++d) {
      if (wide.size(d) == lead[d] && (rows == 1 || lead[d] == 1)) {
        groups *= lead[d];
      } else {
        prefix = prefix && wide.size(d) == 1;
        rows *= lead[d];
      }
    }
    wide = prefix ? matrix(wide.reshape({groups, length})) : wide.expand(full).reshape({groups * rows, length}).contiguous();
    kept.push_back(wide);
    return {wide.const_data_ptr<float>(), groups == 1 && prefix ? 0 : row_stride(wide), prefix ? rows : 1};
  }
};

// Row blocks of nearly equal size, none above TILE.
struct Tiles {
  int64_t M, count;
  explicit Tiles(int64_t M) : M(M), count((M + TILE - 1) / TILE) {}
  int64_t begin(int64_t t) const { return t * (M / count) + std::min(t, M % count); }
  int rows(int64_t t) const { return static_cast<int>(begin(t + 1) - begin(t)); }
};

// A batch of quantised rows in tiles.
struct Rows {
  int64_t M, K;
  Tiles tiles;
  Tensor codes, scale;

  Rows(int64_t M, int64_t K)
      : M(M), K(K), tiles(M), codes(at::empty({M * padded(K)}, at::kByte)), scale(at::empty({M}, at::kFloat)) {}

  // put(row, tile's bytes, rows in the tile, index in it) -> scale
  template <typename Put>
  void fill(const Put& put) {
    uint8_t* bytes = codes.mutable_data_ptr<uint8_t>();
    float* scales = scale.mutable_data_ptr<float>();
    at::parallel_for(0, tiles.count, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const int64_t begin = tiles.begin(t);
        for (int i = 0; i < tiles.rows(t); ++i)
          scales[begin + i] = put(begin + i, bytes + begin * padded(K), tiles.rows(t), i);
      }
    });
  }
};

Rows rows_of(const Tensor& x, Maybe scale) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x needs at least one dimension");
  const Tensor flat = matrix(x);
  Rows rows(flat.size(0), flat.size(1));
  const int64_t stride = row_stride(flat), K = rows.K;
  if (x.scalar_type() == at::kChar) {
    TORCH_CHECK_VALUE(scale.has_value(), "int8 rows need their scales");
    TORCH_CHECK_TYPE(scale->scalar_type() == at::kFloat, "scales are float32, got ", scale->scalar_type());
    TORCH_CHECK_VALUE(scale->numel() == rows.M, "scale has shape ", scale->sizes(), " for ", rows.M, " rows");
    const Tensor scales = scale->contiguous();
    const int8_t* data = flat.const_data_ptr<int8_t>();
    const float* given = scales.const_data_ptr<float>();
    rows.fill([=](int64_t m, uint8_t* tile, int count, int i) {
      place_integers(data + m * stride, K, tile, count, i);
      return given[m];
    });
    return rows;
  }
  TORCH_CHECK_VALUE(!scale.has_value(), "rows of float are quantised here and bring no scales");
  const Type type = type_of(x.scalar_type());
  const char* data = static_cast<const char*>(flat.const_data_ptr());
  rows.fill([=](int64_t m, uint8_t* tile, int count, int i) {
    return place_floats(data + m * stride * size_of(type), type, K, tile, count, i);
  });
  return rows;
}

Rows normalised_rows(const Tensor& x, const Normalisation& how) {
  const Tensor flat = matrix(x);
  Rows rows(flat.size(0), flat.size(1));
  const int64_t stride = row_stride(flat), K = rows.K;
  const Type type = type_of(x.scalar_type());
  const char* data = static_cast<const char*>(flat.const_data_ptr());
  const Tensor rooms = at::empty({at::get_num_threads(), padded(K)}, at::kFloat);
  float* room = rooms.mutable_data_ptr<float>();
  rows.fill([=](int64_t m, uint8_t* tile, int count, int i) {
    float* y = room + at::get_thread_num() * padded(K);
    normalise(data + m * stride * size_of(type), type, K, how, m, y);
    return place_floats(y, Type::F32, K, tile, count, i);
  });
  return rows;
}

inline int64_t up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Every panel times every tile. A task is a panel, or a part of its tiles where there are few panels; tasks are taken
// as they come, since cores are seldom equally free.
void product(const Rows& rows, const Tensor& weight, int64_t N, const Epilogue& epilogue) {
  const int64_t K = rows.K, bytes = panel_bytes(K), panels = (N + COLUMNS - 1) / COLUMNS;
  if (rows.M == 0 || N == 0) return;
  const int64_t threads = at::get_num_threads(), enough = threads == 1 ? 1 : 8 * threads;
  const int64_t parts = std::clamp<int64_t>(enough / panels, 1, rows.tiles.count), tasks = panels * parts;
  const int8_t* packed = weight.const_data_ptr<int8_t>();
  const uint8_t* codes = rows.codes.const_data_ptr<uint8_t>();
  const float* scale = rows.scale.const_data_ptr<float>();
  const Finish finish = finish_for<true>(epilogue), finish_last = finish_for<false>(epilogue);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    alignas(64) int32_t sums[TILE * COLUMNS];
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t p = task / parts, part = task % parts;
      const int8_t* panel = packed + p * bytes;
      const int8_t* trailer = panel + padded(K) * COLUMNS;
      const int32_t* start = reinterpret_cast<const int32_t*>(trailer);
      const float* weight_scale = reinterpret_cast<const float*>(trailer) + COLUMNS;
      const int64_t from = part * rows.tiles.count / parts, to = (part + 1) * rows.tiles.count / parts;
      // weights come from memory: the lines of the panel that this thread probably takes next are asked for on the way
      const int8_t* following = packed + std::min((task + threads) / parts, panels - 1) * bytes;
      const int64_t slice = up_to_line(bytes / (to - from) + 1);
      for (int64_t t = from; t < to; ++t) {
        const int64_t m = rows.tiles.begin(t);
        const int count = rows.tiles.rows(t);
        const int64_t line = (t - from) * slice, end = std::min(line + slice, bytes);
        for (int64_t b = line; b < end; b += 64) _mm_prefetch(reinterpret_cast<const char*>(following) + b, _MM_HINT_T1);
        prefetch(epilogue, count, m, p * COLUMNS, N);
        MULTIPLY[count](codes + m * padded(K), panel, start, padded(K) / STEP, sums);
        ((p + 1) * COLUMNS <= N ? finish : finish_last)(epilogue, sums, count, m, p * COLUMNS, N, scale + m, weight_scale);
      }
    }
  };
  at::parallel_for(0, std::min(threads, tasks), 1, work);
}

void check_weight(const Tensor& weight, int64_t N, int64_t K) {
  const int64_t panels = (N + COLUMNS - 1) / COLUMNS;
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kChar && weight.is_contiguous() && weight.dim() == 2 &&
                        weight.size(0) == panels && weight.size(1) == panel_bytes(K),
                    "weight is not packed for [", N, ", ", K, "]: it has shape ", weight.sizes());
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = last;
  return shape;
}

void set_epilogue(Epilogue& e, Operands& operands, const Tensor& x, int64_t N, Maybe bias, std::string_view activation,
                 Maybe gate, Maybe residual) {
  e.bias = operands.vector(bias, N, "bias");
  e.activation = activation_of(activation);
  e.gate = operands.broadcast(gate, x.sizes().slice(0, x.dim() - 1), N);
  if (!residual.has_value()) return;
  TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef(with_last(x, N)), "residual has shape ", residual->sizes());
  const Tensor flat = matrix(*residual);
  operands.kept.push_back(flat);
  e.residual = flat.const_data_ptr();
  e.residual_type = type_of(flat.scalar_type());
  e.residual_stride = row_stride(flat);
}

Tensor multiplied(const Rows& rows, const Tensor& x, const Tensor& weight, int64_t N, Maybe bias,
                  std::string_view activation, Maybe gate, Maybe residual, at::ScalarType out_dtype) {
  check_weight(weight, N, rows.K);
  Operands operands;
  Epilogue epilogue;
  set_epilogue(epilogue, operands, x, N, bias, activation, gate, residual);
  Tensor out = at::empty(with_last(x, N), out_dtype);
  epilogue.out = out.mutable_data_ptr();
  epilogue.out_type = type_of(out_dtype);
  product(rows, weight, N, epilogue);
  return out;
}

Tensor linear(const Tensor& x, Maybe scale, const Tensor& weight, int64_t N, Maybe bias, std::string_view activation,
              Maybe gate, Maybe residual, at::ScalarType out_dtype) {
  return multiplied(rows_of(x, scale), x, weight, N, bias, activation, gate, residual, out_dtype);
}

Tensor norm_linear(const Tensor& x, std::string_view norm, double eps, Maybe norm_weight, Maybe norm_bias,
                   Maybe multiplier, Maybe shift, const Tensor& weight, int64_t N, Maybe bias,
                   std::string_view activation, Maybe gate, Maybe residual, at::ScalarType out_dtype) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x needs at least one dimension");
  Operands operands;
  const int64_t K = x.size(-1);
  const at::IntArrayRef lead = x.sizes().slice(0, x.dim() - 1);
  Normalisation how;
  how.norm = norm_of(norm);
  how.eps = static_cast<float>(eps);
  how.weight = operands.vector(norm_weight, K, "the norm's weight");
  how.bias = operands.vector(norm_bias, K, "the norm's bias");
  how.multiplier = operands.broadcast(multiplier, lead, K);
  how.shift = operands.broadcast(shift, lead, K);
  return multiplied(normalised_rows(x, how), x, weight, N, bias, activation, gate, residual, out_dtype);
}

std::tuple<Tensor, Tensor> linear_quantize(const Tensor& x, Maybe scale, const Tensor& weight, int64_t N, Maybe bias,
                                           std::string_view activation) {
  const Tensor y = linear(x, scale, weight, N, bias, activation, std::nullopt, std::nullopt, at::kFloat);
  Tensor q = at::empty(y.sizes(), at::kChar), scales = at::empty(with_last(x, 1), at::kFloat);
  const float* values = y.const_data_ptr<float>();
  int8_t* codes = q.mutable_data_ptr<int8_t>();
  float* out = scales.mutable_data_ptr<float>();
  at::parallel_for(0, scales.numel(), 8, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) out[m] = quantise_row(values + m * N, N, codes + m * N);
  });
  return {q, scales};
}

Tensor pack(const Tensor& weight_q, const Tensor& weight_scale) {
  TORCH_CHECK_TYPE(weight_q.scalar_type() == at::kChar && weight_scale.scalar_type() == at::kFloat,
                   "an int8 weight with float32 scales is wanted");
  TORCH_CHECK_VALUE(weight_q.dim() == 2 && weight_scale.numel() == weight_q.size(0), "a weight [N, K] with N scales");
  const int64_t N = weight_q.size(0), K = weight_q.size(1), bytes = panel_bytes(K);
  const Tensor q = weight_q.contiguous(), scale = weight_scale.contiguous();
  Tensor packed = at::empty({(N + COLUMNS - 1) / COLUMNS, bytes}, at::kChar);
  int8_t* to = packed.mutable_data_ptr<int8_t>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack_panel(q.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(), N, K, p * COLUMNS, to + p * bytes);
  });
  return packed;
}

Tensor weight_linear(const Tensor& x, const Tensor& weight_q, const Tensor& weight_scale, Maybe bias) {
  TORCH_CHECK_TYPE(weight_q.scalar_type() == at::kChar && weight_scale.scalar_type() == at::kFloat,
                   "an int8 weight with float32 scales is wanted");
  TORCH_CHECK_VALUE(x.dim() > 0 && weight_q.dim() == 2 && x.size(-1) == weight_q.size(1) &&
                        weight_scale.numel() == weight_q.size(0), "[..., K] x [N, K] with N scales expected");
  const int64_t N = weight_q.size(0), K = weight_q.size(1);
  Operands operands;
  const float* b = operands.vector(bias, N, "bias");
  const Tensor rows = matrix(x).to(at::kFloat).contiguous(), q = weight_q.contiguous(), scale = weight_scale.contiguous();
  const int64_t M = rows.size(0);
  Tensor out = at::empty(with_last(x, N), at::kFloat);
  const float *data = rows.const_data_ptr<float>(), *scales = scale.const_data_ptr<float>();
  const int8_t* weights = q.const_data_ptr<int8_t>();
  float* y = out.mutable_data_ptr<float>();
  at::parallel_for(0, N, 64, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      for (int64_t m = 0; m < M;) {
        float sums[4];
        const int64_t count = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        (count == 4 ? dot<4> : count == 2 ? dot<2> : dot<1>)(data + m * K, K, weights + n * K, sums);
        for (int64_t i = 0; i < count; ++i)
          y[(m + i) * N + n] = b == nullptr ? sums[i] * scales[n] : sums[i] * scales[n] + b[n];
        m += count;
      }
    }
  });
  return out.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(ditc, CPU, m) {
  m.impl("vnni_pack", pack);
  m.impl("vnni_linear", linear);
  m.impl("vnni_norm_linear", norm_linear);
  m.impl("vnni_linear_quantize", linear_quantize);
  m.impl("vnni_weight_linear", weight_linear);
}

}  // namespace ditc
