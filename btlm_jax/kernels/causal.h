// Causal attention with ALiBi over whole sequences, and its gradients; see attention/blockwise.py for the same in JAX.
//
// A task is 64 queries of one head (forward), or kBlock keys of one (backward, which computes the scores again, as
// FlashAttention does: Dao et al. 2022, arXiv:2205.14135, appendix B.4). Scores lie transposed, [keys, 64 queries]: the
// softmax of a query then stays in one lane, and keys and values are read as they lie. Every sum is taken in an order
// that depends on the shape alone, so results do not depend on the number of threads.
//
// Sizes: B sequences, T positions, N heads, H head dim, W the head dim filled up with zeros; G = B * N.

#pragma once

#include <chrono>

#include "wide.h"

namespace {

constexpr int64_t kTile = BTLM_QUERY_TILE, kBlock = 128;
constexpr float kLowest = -1e30f;      // below every score, and finite: no inf - inf
constexpr float kNegligible = 37.0f;   // as in blockwise.py

struct Shape {
  int64_t B, T, N, H;
  float scale;
  const float* slopes;
  int64_t heads() const { return B * N; }
  int64_t tiles() const { return (T + kTile - 1) / kTile; }
  int64_t width() const { return (H + BTLM_HEAD_DIM_MULTIPLE - 1) / BTLM_HEAD_DIM_MULTIPLE * BTLM_HEAD_DIM_MULTIPLE; }
  int64_t row() const { return N * H; }
  int64_t start(int64_t g, int64_t t) const { return ((g / N * T + t) * N + g % N) * H; }  // in [B, T, N, H]
  int64_t count(int64_t tile) const { return std::min(kTile, T - tile * kTile); }
  float slope(int64_t g) const { return slopes[g % N]; }
};

struct Floats {  // on a cache line's border
  std::vector<float> own;
  float* data;
  explicit Floats(int64_t size) : own(size + 16) {
    data = own.data() + (64 - reinterpret_cast<uintptr_t>(own.data()) % 64) % 64 / sizeof(float);
  }
};

inline float from_float(float v, float) { return v; }
inline bf16 from_float(float v, bf16) { return to_bf16(v); }

// Rows of one head in float32, filled up with zeros.
template <typename C>
void widen(const Shape& shape, const C* from, int64_t g, int64_t first, int64_t count, float* to) {
  const C* row = from + shape.start(g, first);
  for (int64_t j = 0; j < count; ++j, row += shape.row(), to += shape.width()) {
    int64_t h = 0;
    for (; h + kLanes <= shape.H; h += kLanes) store(to + h, load(row + h));
    for (; h < shape.H; ++h) to[h] = one(row[h]);
    for (; h < shape.width(); ++h) to[h] = 0;
  }
}

// [count, W] -> [H, 64], filled up with zeros.
void to_columns(const Shape& shape, const float* rows, int64_t count, float* columns) {
  for (int64_t h = 0; h < shape.H; ++h, columns += kTile) {
    for (int64_t j = 0; j < count; ++j) columns[j] = rows[j * shape.width() + h];
    std::fill(columns + count, columns + kTile, 0.0f);
  }
}

// [H, 64] times a factor for each column -> rows of one head.
template <typename C>
void from_columns(const Shape& shape, const float* columns, const float* factors, int64_t g, int64_t tile, C* to) {
  C* row = to + shape.start(g, tile * kTile);
  for (int64_t j = 0; j < shape.count(tile); ++j, row += shape.row()) {
    for (int64_t h = 0; h < shape.H; ++h) row[h] = from_float(columns[h * kTile + j] * factors[j], C());
  }
}

inline float dot(const float* a, const float* b, int64_t width) {
  wide sums = {};
  for (int64_t h = 0; h < width; h += kWide) sums += load_wide(a + h) * load_wide(b + h);
  float total = 0;
  for (int i = 0; i < kWide; ++i) total += sums[i];
  return total;
}

inline float larger(float a, float b) { return a != a || b <= a ? a : b; }  // NaN if either is

// How many positions back a key can lie and still count; see _reach in blockwise.py.
struct Reach {
  const Shape& shape;
  std::vector<float> queries, keys;  // squares of the longest, of every head and tile
  explicit Reach(const Shape& shape)
      : shape(shape), queries(shape.heads() * shape.tiles()), keys(shape.heads() * shape.tiles()) {}

  float longest(const float* rows, int64_t count) const {
    float square = 0;
    for (int64_t j = 0; j < count; ++j) {
      const float* row = rows + j * shape.width();
      square = larger(square, dot(row, row, shape.width()));
    }
    return square;
  }
  int64_t of(int64_t g) const {
    float query = 0, key = 0;
    for (int64_t i = g * shape.tiles(); i < (g + 1) * shape.tiles(); ++i) {
      query = larger(query, queries[i]);
      key = larger(key, keys[i]);
    }
    float nats = 2 * std::abs(shape.scale) * std::sqrt(query) * std::sqrt(key) + kNegligible;
    // What is not finite, or has no slope, fails the comparison.
    return shape.slope(g) * shape.T > nats ? static_cast<int64_t>(std::ceil(nats / shape.slope(g))) : shape.T;
  }
};

struct Ramp {
  float values[kTile];
  Ramp() { for (int i = 0; i < kTile; ++i) values[i] = i; }
};
const Ramp kRamp;

Shape shape_of(const ffi::AnyBuffer& q, const ffi::Buffer<ffi::F32>& slopes_N, float scale) {
  auto dims = q.dimensions();
  return {dims[0], dims[1], dims[2], dims[3], scale, slopes_N.typed_data()};
}

}  // namespace

#define ANY_IN Arg<ffi::AnyBuffer>()
#define ANY_OUT Ret<ffi::AnyBuffer>()
#define F32_IN Arg<ffi::Buffer<ffi::F32>>()
#define F32_OUT Ret<ffi::Buffer<ffi::F32>>()
