// Causal attention with ALiBi over whole sequences, and its gradients; attention/blockwise.py has the same in JAX.
//
// A task is 64 queries of one head (forward), or kBlock keys of one (backward, which computes the scores again, as
// FlashAttention does: Dao et al. 2022, arXiv:2205.14135, appendix B.4). Scores are transposed, [keys, 64 queries]: the
// softmax of a query then stays in one vector lane, and keys and values are read as they are stored. The order of every
// sum depends on the shape alone, so results do not depend on the number of threads.
//
// In bfloat16, where the processor multiplies pairs of them, weights and gradients of scores are rounded to bfloat16 for
// their products, as FlashAttention does; everything else is float32.
//
// A head sees no key at a distance above its window (attention/alibi.py has the rule, and computes it). Where documents
// are given, a query sees no key before the start of its own.
//
// Sizes: B sequences, T positions, N heads, H head dim, W the head dim padded with zeros; G = B * N; P factors are in one
// element of an operand, which is a float or a pair: kFactors.

#pragma once

#include <chrono>

#include "wide.h"

namespace {

constexpr int64_t kTile = BTLM_QUERY_TILE, kBlock = 128;
constexpr float kLowest = -1e30f;  // below every score, and finite: no inf - inf

struct Shape {
  int64_t B, T, N, H;
  float scale;
  const float* slopes;     // [N]
  const int32_t* windows;  // [B, N]
  const int32_t* starts;   // [B, T]: where the document of each position begins, rising; or null
  int64_t heads() const { return B * N; }
  int64_t tiles() const { return (T + kTile - 1) / kTile; }
  int64_t width() const { return (H + BTLM_HEAD_DIM_MULTIPLE - 1) / BTLM_HEAD_DIM_MULTIPLE * BTLM_HEAD_DIM_MULTIPLE; }
  int64_t row() const { return N * H; }
  int64_t depth(int64_t factors) const { return (H + factors - 1) / factors; }  // of a sum over a head
  int64_t start(int64_t g, int64_t t) const { return ((g / N * T + t) * N + g % N) * H; }  // in [B, T, N, H]
  int64_t count(int64_t tile) const { return std::min(kTile, T - tile * kTile); }
  float slope(int64_t g) const { return slopes[g % N]; }
  const int32_t* starts_of(int64_t g, int64_t t) const { return starts ? starts + g / N * T + t : nullptr; }
  // An even key, from which on a tile's queries see all that they see; it does not fall from one tile to the next.
  int64_t first_key(int64_t g, int64_t tile) const {
    int64_t key = std::max<int64_t>(0, tile * kTile - windows[g]);
    return (starts ? std::max<int64_t>(key, *starts_of(g, tile * kTile)) : key) / 2 * 2;
  }
};

template <typename E>
constexpr int64_t kFactors = std::is_same_v<E, float> ? 1 : 2;

template <typename E>
struct Aligned {  // to a cache line; zeros
  std::vector<E> own;
  E* data;
  explicit Aligned(int64_t size) : own(size + 16) {
    data = own.data() + (64 - reinterpret_cast<uintptr_t>(own.data()) % 64) % 64 / sizeof(E);
  }
};
typedef Aligned<float> Floats;

template <typename E>
struct InPlaceOfFloats : Aligned<E> {  // an operand of its own, which if it consists of floats is those that are given
  template <typename F>
  InPlaceOfFloats(F* floats, int64_t size) : Aligned<E>(kFactors<E> == 1 ? 0 : size) {
    if constexpr (kFactors<E> == 1) this->data = floats;
  }
};

// Rows of one head as an operand that is summed over a row: [count, W / P], padded with zeros.
template <typename C>
void to_rows(const Shape& shape, const C* from, int64_t g, int64_t first, int64_t count, float* to) {
  const C* row = from + shape.start(g, first);
  for (int64_t j = 0; j < count; ++j, row += shape.row(), to += shape.width()) {
    int64_t h = 0;
    for (; h + kLanes <= shape.H; h += kLanes) store(to + h, load(row + h));
    for (; h < shape.H; ++h) to[h] = one(row[h]);
    for (; h < shape.width(); ++h) to[h] = 0;
  }
}

inline void to_rows(const Shape& shape, const bf16* from, int64_t g, int64_t first, int64_t count, bf16x2* to) {
  int64_t W = shape.width();
  for (int64_t j = 0; j < count; ++j, to += W / 2) {
    std::memset(to, 0, W * sizeof(bf16));
    std::memcpy(to, from + shape.start(g, first + j), shape.H * sizeof(bf16));
  }
}

// Rows of one head as an operand that is summed over rows: [count / P rounded up, W], padded with zeros.
template <typename C>
void to_row_pairs(const Shape& shape, const C* from, int64_t g, int64_t first, int64_t count, float* to) {
  to_rows(shape, from, g, first, count, to);
}

inline void to_row_pairs(const Shape& shape, const bf16* from, int64_t g, int64_t first, int64_t count, bf16x2* to) {
  for (int64_t j = 0; j < count; j += 2, to += shape.width()) {
    const bf16* row = from + shape.start(g, first + j);
    for (int64_t h = 0; h < shape.H; ++h) {
      to[h].bits = row[h].bits | (j + 1 < count ? uint32_t{row[shape.row() + h].bits} << 16 : 0);
    }
    std::fill(to + shape.H, to + shape.width(), bf16x2{});
  }
}

// [count, W / P] -> [W / P, 64], padded with zeros.
template <typename E>
void to_columns(const Shape& shape, const E* rows, int64_t count, E* columns) {
  int64_t size = shape.width() / kFactors<E>;
  for (int64_t i = 0; i < size; ++i, columns += kTile) {
    for (int64_t j = 0; j < count; ++j) columns[j] = rows[j * size + i];
    std::fill(columns + count, columns + kTile, E{});
  }
}

// Stores numbers of 64 queries, of P keys: as a row a key, or the keys of each query together.
inline void store_rows(float* to, int64_t c, const wide (&numbers)[1]) { store_wide(to + c, numbers[0]); }
inline void store_row_pairs(float* to, const wide (&numbers)[1]) { store_wide(to, numbers[0]); }
#ifdef __AVX512BF16__
inline void store_rows(bf16x2* to, int64_t c, const wide (&numbers)[2]) {
  for (int64_t p = 0; p < 2; ++p) {
    _mm256_storeu_si256((__m256i*)(to + (p * kTile + c) / 2), (__m256i)_mm512_cvtneps_pbh((__m512)numbers[p]));
  }
}
inline void store_row_pairs(bf16x2* to, const wide (&numbers)[2]) {
  const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(alternate, both));
}
#endif

// [H, 64] times a factor for each column -> rows of one head.
template <typename C>
void from_columns(const Shape& shape, const float* columns, const float* factors, int64_t g, int64_t tile, C* to) {
  C* row = to + shape.start(g, tile * kTile);
  for (int64_t j = 0; j < shape.count(tile); ++j, row += shape.row()) {
    for (int64_t h = 0; h < shape.H; ++h) row[h] = from_float(columns[h * kTile + j] * factors[j], C());
  }
}

// Where the documents of a tile's queries begin, by query: keys before are not seen. Without documents it is unused.
struct Starts {
  float of_query[kTile];
  int64_t last = 0;  // from here on all queries of the tile see the keys, as far as documents go
  Starts(const Shape& shape, int64_t g, int64_t tile) {
    if (!shape.starts) return;
    const int32_t* from = shape.starts_of(g, tile * kTile);
    int64_t count = shape.count(tile);
    last = from[count - 1];
    for (int64_t j = 0; j < kTile; ++j) of_query[j] = from[std::min(j, count - 1)];
  }
};

struct Ramp {
  float values[kTile];
  Ramp() { for (int i = 0; i < kTile; ++i) values[i] = i; }
};
const Ramp kRamp;

Shape shape_of(const ffi::AnyBuffer& q, const ffi::Buffer<ffi::F32>& slopes_N,
               const ffi::Buffer<ffi::S32>& windows_BN, const ffi::RemainingArgs& documents, float scale) {
  auto dims = q.dimensions();
  const int32_t* starts = documents.size() ? documents.get<ffi::Buffer<ffi::S32>>(0)->typed_data() : nullptr;
  return {dims[0], dims[1], dims[2], dims[3], scale, slopes_N.typed_data(), windows_BN.typed_data(), starts};
}

}  // namespace

#define ANY_IN Arg<ffi::AnyBuffer>()
#define ANY_OUT Ret<ffi::AnyBuffer>()
#define F32_IN Arg<ffi::Buffer<ffi::F32>>()
#define S32_IN Arg<ffi::Buffer<ffi::S32>>()
#define F32_OUT Ret<ffi::Buffer<ffi::F32>>()
