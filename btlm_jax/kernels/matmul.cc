// Products of rows with large matrices, and losses of what such a product reads out; tiles.py has the products in JAX.
//
// Sizes: R rows, K inputs, M outputs. A matrix is in tiles of 32 outputs, so that a task reads one stream of memory:
// float32 as [layers, M/32, K, 32]; bfloat16 as 32-bit words of two inputs, [layers, M/32, K/2, 32], the first in the low
// half; 4-bit codes as words of eight inputs, the first in the lowest bits, in groups of 64 inputs that share a scale and
// an offset, [layers, M/32, K/64, 8, 32]; signed 8-bit codes as words of four in groups that share a scale.

#include "wide.h"

namespace {

constexpr int64_t kTile = BTLM_TILE_OUTPUTS, kGroup = BTLM_GROUP_INPUTS;

inline u32x8 words(const uint32_t* p) { return *reinterpret_cast<const u32x8*>(p); }
inline f8 low_half(u32x8 pair) { return (f8)(pair << 16); }
inline f8 high_half(u32x8 pair) { return (f8)(pair & 0xffff0000u); }
// Code i of a word as the float 1 + code / 16: its bits below the leading one's, which costs no conversion.
inline f8 code(u32x8 word, int i) {
  u32x8 bits = i < 5 ? word << (19 - 4 * i) : word >> (4 * i - 19);
  return (f8)((bits & 0x00780000u) | 0x3f800000u);
}
// Signed byte i of a word.
inline f8 byte(u32x8 word, int i) { return __builtin_convertvector((i8)(word << (24 - 8 * i)) >> 24, f8); }

// One row, whose sums stay in registers.
void one_row(const float* w, const float* x, float* y, int64_t depth) {
  f8 sums[4] = {};
  for (int64_t k = 0; k < depth; ++k, w += kTile) {
    for (int c = 0; c < 4; ++c) sums[c] += load(w + c * kLanes) * x[k];
  }
  for (int c = 0; c < 4; ++c) store(y + c * kLanes, sums[c]);
}

void one_row(const uint32_t* w, const float* x, float* y, int64_t depth) {
  f8 sums[4] = {};
  for (int64_t k = 0; k < depth; k += 2, w += kTile) {
    for (int c = 0; c < 4; ++c) {
      u32x8 pair = words(w + c * kLanes);
      sums[c] += low_half(pair) * x[k];
      sums[c] += high_half(pair) * x[k + 1];
    }
  }
  for (int c = 0; c < 4; ++c) store(y + c * kLanes, sums[c]);
}

#ifdef __AVX512BF16__
// The processor's own products of bfloat16, twice as fast; x is rounded too, as it is where such a model is trained.
constexpr int64_t kPairRows = 12;

// y[RB][32] += x[RB][0..pairs) . w[pairs][32]
template <int RB>
inline void accumulate_pairs(const uint32_t* w, const uint32_t* x, int64_t ld_x, float* y, int64_t pairs) {
  __m512 sums[RB][2];
  for (int r = 0; r < RB; ++r) {
    for (int c = 0; c < 2; ++c) sums[r][c] = _mm512_loadu_ps(y + r * kTile + c * 16);
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + k * kTile), w1 = (__m512bh)_mm512_loadu_si512(w + k * kTile + 16);
#pragma GCC unroll 12
    for (int r = 0; r < RB; ++r) {
      __m512bh x_rk = (__m512bh)_mm512_set1_epi32(x[r * ld_x + k]);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], w0, x_rk);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], w1, x_rk);
    }
  }
  for (int r = 0; r < RB; ++r) {
    for (int c = 0; c < 2; ++c) _mm512_storeu_ps(y + r * kTile + c * 16, sums[r][c]);
  }
}

void accumulate_pair_rows(const uint32_t* w, const uint32_t* x, int64_t ld_x, float* y, int64_t pairs, int64_t rows) {
  for (; rows >= kPairRows; rows -= kPairRows, x += kPairRows * ld_x, y += kPairRows * kTile) {
    accumulate_pairs<kPairRows>(w, x, ld_x, y, pairs);
  }
  for (; rows >= 3; rows -= 3, x += 3 * ld_x, y += 3 * kTile) accumulate_pairs<3>(w, x, ld_x, y, pairs);
  for (; rows > 0; --rows, x += ld_x, y += kTile) accumulate_pairs<1>(w, x, ld_x, y, pairs);
}

// Rounds to bfloat16, two a word; count is even.
std::vector<uint32_t> pairs_of(const float* x, int64_t count) {
  std::vector<uint32_t> pairs(count / 2);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm256_storeu_si256((__m256i*)(pairs.data() + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  }
  for (; i < count; i += 2) {
    __m128i two = (__m128i)_mm_cvtneps_pbh(_mm_setr_ps(x[i], x[i + 1], 0, 0));
    pairs[i / 2] = _mm_cvtsi128_si32(two);
  }
  return pairs;
}
#endif

// The product of one row: fill(tile, own) makes the sums of a tile, which are copied to y[M]. A task has some tiles in a
// row where that leaves every thread some tasks: their weights are one stream of memory.
template <typename Fill>
void one_row_product(ffi::ThreadPool pool, int64_t K, int64_t M, float* y, const Fill& fill) {
  int64_t tiles = (M + kTile - 1) / kTile, group = std::clamp<int64_t>(tiles / (8 * pool.num_threads()), 1, 4);
  parallel(pool, (tiles + group - 1) / group, K * kTile * group, [&](int64_t task) {
    float own[kTile];
    for (int64_t tile = task * group; tile < std::min(tiles, (task + 1) * group); ++tile) {
      fill(tile, own);
      std::memcpy(y + tile * kTile, own, std::min(kTile, M - tile * kTile) * sizeof(float));
    }
  });
}

// Products of several rows in blocks of rows and of tiles, whose inputs and sums stay in the processor's cache. A
// `Product` has add(tile, k, first, end, sums), which adds inputs k .. k + kDepth of rows first .. end to
// sums[end - first][32]. Every sum is over rising k, so it depends on no size of a block. finish(first, end, first_tile,
// end_tile, sums) gets the sums [tiles][end - first][32] of a task, and may change them. A task has `group` tiles.
constexpr int64_t kBlockRows = 96, kBlockTiles = 4, kManyRows = 48;

template <typename Product, typename Finish>
void in_blocks(ffi::ThreadPool pool, const Product& product, int64_t R, int64_t K, int64_t M, int64_t group,
               const Finish& finish) {
  int64_t tiles = (M + kTile - 1) / kTile, groups = (tiles + group - 1) / group;
  int64_t blocks = std::max<int64_t>(1, R / kBlockRows);  // the last has what is left
  parallel(pool, groups * blocks, R / blocks * K * kTile * group, [&](int64_t task) {
    int64_t first_tile = task % groups * group, end_tile = std::min(first_tile + group, tiles), block = task / groups;
    int64_t first = block * kBlockRows, end = block == blocks - 1 ? R : first + kBlockRows;
    std::vector<float> sums((end_tile - first_tile) * (end - first) * kTile, 0.0f);
    for (int64_t k = 0; k < K; k += Product::kDepth) {
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        product.add(tile, k, first, end, sums.data() + (tile - first_tile) * (end - first) * kTile);
      }
    }
    finish(first, end, first_tile, end_tile, sums.data());
  });
}

// A product as y[R, M].
template <typename Product>
void write_product(ffi::ThreadPool pool, const Product& product, int64_t R, int64_t K, int64_t M, float* y) {
  auto copy = [=](int64_t first, int64_t end, int64_t first_tile, int64_t end_tile, const float* sums) {
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      int64_t width = std::min(kTile, M - tile * kTile);
      for (int64_t row = first; row < end; ++row, sums += kTile) {
        std::memcpy(y + row * M + tile * kTile, sums, width * sizeof(float));
      }
    }
  };
  in_blocks(pool, product, R, K, M, R < kManyRows ? 1 : kBlockTiles, copy);
}

// A `Product` of float32: Weights::widen(tile, k, depth, space) returns inputs k .. k + depth of a tile as floats
// [depth][32], in `space` or where they are kept.
template <typename Weights>
class FloatProduct {
 public:
  static constexpr int64_t kDepth = Weights::kDepth;

  FloatProduct(ffi::ThreadPool pool, const float* x, int64_t R, int64_t K, Weights weights)
      : x_(x), K_(K), panels_(R < kManyRows ? 0 : R / kPanel), copied_(panels_ * kPanel * K), weights_(weights) {
    parallel(pool, panels_, kPanel * K, [this](int64_t panel) {
      for (int64_t k = 0; k < K_; k += kDepth) {
        int64_t depth = std::min(kDepth, K_ - k);
        float* own = copied_.data() + (k * panels_ + panel * depth) * kPanel;
        for (int r = 0; r < kPanel; ++r) {
          for (int64_t i = 0; i < depth; ++i) own[i * kPanel + r] = x_[(panel * kPanel + r) * K_ + k + i];
        }
      }
    });
  }

  void add(int64_t tile, int64_t k, int64_t first, int64_t end, float* sums) const {
    alignas(64) float space[kDepth * kTile];
    int64_t depth = std::min(kDepth, K_ - k), row = first, last_panel = std::min(end / kPanel, panels_) * kPanel;
    const float* w = weights_.widen(tile, k, depth, space);
    // Weights that are used where they are: those of the next tile are fetched meanwhile.
    const float* next = w + K_ * kTile;
    int64_t step = w == space ? 0 : depth * kTile * kPanel / (end - first) + 1;
    for (; row < last_panel; row += kPanel, sums += kPanel * kTile, next += step) {
      for (int64_t i = 0; i < step; i += 64 / sizeof(float)) __builtin_prefetch(next + i, 0, 2);
      const float* panel = copied_.data() + k * panels_ * kPanel + row * depth;
      product<Into::kSum>(Left<Stored::kByColumns>{panel, kPanel}, w, kTile, sums, kTile, depth, kPanel, kTile);
    }
    product<Into::kSum>(Left<Stored::kByRows>{x_ + row * K_ + k, K_}, w, kTile, sums, kTile, depth, end - row, kTile);
  }

 private:
  static constexpr int kPanel = kWide == 16 ? 8 : 6;  // rows that `product` sums in registers at a time
  const float* x_;
  int64_t K_, panels_;
  std::vector<float> copied_;  // whole panels of many rows, side by side: [depth block][panel][k][kPanel]
  Weights weights_;
};

struct FloatWeights {
  static constexpr int64_t kDepth = 128;
  const float* data;
  int64_t K;
  const float* of_tile(int64_t tile) const { return data + tile * K * kTile; }
  const float* widen(int64_t tile, int64_t k, int64_t, float*) const { return of_tile(tile) + k * kTile; }
};

struct PairWeights {
  static constexpr int64_t kDepth = 128;
  const uint32_t* data;
  int64_t K;
  const uint32_t* of_tile(int64_t tile) const { return data + tile * K / 2 * kTile; }
  const float* widen(int64_t tile, int64_t k, int64_t depth, float* to) const {
    for (int64_t i = 0; i < depth / 2 * kTile; i += kLanes) {
      u32x8 pair = words(of_tile(tile) + k / 2 * kTile + i);
      float* both = to + i / kTile * 2 * kTile + i % kTile;
      store(both, low_half(pair));
      store(both + kTile, high_half(pair));
    }
    return to;
  }
};

#ifdef __AVX512BF16__
// A `Product` by the processor's own of bfloat16.
class PairProduct {
 public:
  static constexpr int64_t kDepth = 256;

  PairProduct(const float* x, int64_t R, int64_t K, PairWeights weights)
      : K_(K), rounded_(pairs_of(x, R * K)), weights_(weights) {}

  void add(int64_t tile, int64_t k, int64_t first, int64_t end, float* sums) const {
    int64_t pairs = std::min(kDepth, K_ - k) / 2;
    accumulate_pair_rows(weights_.of_tile(tile) + k / 2 * kTile, rounded_.data() + (first * K_ + k) / 2, K_ / 2, sums,
                         pairs, end - first);
  }

 private:
  int64_t K_;
  std::vector<uint32_t> rounded_;
  PairWeights weights_;
};
#endif

// Calls use(product) with the product of several rows with weights.
template <typename Use>
void with_product(ffi::ThreadPool pool, const float* x, int64_t R, int64_t K, FloatWeights weights, const Use& use) {
  use(FloatProduct<FloatWeights>(pool, x, R, K, weights));
}
template <typename Use>
void with_product(ffi::ThreadPool pool, const float* x, int64_t R, int64_t K, PairWeights weights, const Use& use) {
#ifdef __AVX512BF16__
  use(PairProduct(x, R, K, weights));
#else
  use(FloatProduct<PairWeights>(pool, x, R, K, weights));
#endif
}

template <typename Weights>
void product_ungrouped(ffi::ThreadPool pool, const float* x, Weights weights, float* y, int64_t R, int64_t K,
                       int64_t M) {
  if (R > 1) {
    return with_product(pool, x, R, K, weights, [&](const auto& product) { write_product(pool, product, R, K, M, y); });
  }
  one_row_product(pool, K, M, y, [=](int64_t tile, float* own) { one_row(weights.of_tile(tile), x, own, K); });
}

// Fetches two lines of codes ahead of one row's products: a processor does not fetch beyond a page of memory by itself.
inline void fetch_ahead(const uint32_t* codes) {
  constexpr int64_t kAhead = 1024;
  __builtin_prefetch(codes + kAhead, 0, 2);
  __builtin_prefetch(codes + kAhead + 16, 0, 2);
}

// w = codes * scale + offset; a sum of x * (1 + code / 16) becomes one of x * code.
struct Int4 {
  static constexpr int64_t kWords = kGroup / 8 * kTile;  // of a group

  static void one_row(const uint32_t* codes, const f16* scale, const f16* offset, const float* x, float x_sum,
                      f8* sums) {
    f8 own[4] = {};
    for (int64_t word = 0; word < kGroup / 8; ++word, codes += kTile, x += 8) {
      fetch_ahead(codes);
      for (int c = 0; c < 4; ++c) {
        u32x8 eight = words(codes + c * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) own[c] += code(eight, i) * x[i];
      }
    }
    for (int c = 0; c < 4; ++c) {
      f8 of_codes = (own[c] - x_sum) * 16.0f;
      sums[c] += of_codes * load(scale + c * kLanes) + load(offset + c * kLanes) * x_sum;
    }
  }

  static void widen(const uint32_t* codes, const f16* scale, const f16* offset, float* wide) {
    for (int c = 0; c < 4; ++c) {
      f8 s = load(scale + c * kLanes) * 16.0f, o = load(offset + c * kLanes) - s;
      for (int64_t word = 0; word < kGroup / 8; ++word) {
        u32x8 eight = words(codes + word * kTile + c * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) store(wide + (word * 8 + i) * kTile + c * kLanes, code(eight, i) * s + o);
      }
    }
  }
};

// w = codes * scale
struct Int8 {
  static constexpr int64_t kWords = kGroup / 4 * kTile;  // of a group

  static void one_row(const uint32_t* codes, const f16* scale, const f16*, const float* x, float, f8* sums) {
    f8 own[4] = {};
    for (int64_t word = 0; word < kGroup / 4; ++word, codes += kTile, x += 4) {
      fetch_ahead(codes);
      for (int c = 0; c < 4; ++c) {
        u32x8 four = words(codes + c * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) own[c] += byte(four, i) * x[i];
      }
    }
    for (int c = 0; c < 4; ++c) sums[c] += own[c] * load(scale + c * kLanes);
  }

  static void widen(const uint32_t* codes, const f16* scale, const f16*, float* wide) {
    for (int c = 0; c < 4; ++c) {
      f8 s = load(scale + c * kLanes);
      for (int64_t word = 0; word < kGroup / 4; ++word) {
        u32x8 four = words(codes + word * kTile + c * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(wide + (word * 4 + i) * kTile + c * kLanes, byte(four, i) * s);
      }
    }
  }
};

// Codes in groups of 64 inputs. For Int8, offset is any pointer.
template <typename Codes>
struct GroupedWeights {
  static constexpr int64_t kDepth = kGroup;
  const uint32_t* codes;
  const f16 *scale, *offset;
  int64_t groups;
  const float* widen(int64_t tile, int64_t k, int64_t, float* to) const {
    int64_t at = tile * groups + k / kGroup;
    Codes::widen(codes + at * Codes::kWords, scale + at * kTile, offset + at * kTile, to);
    return to;
  }
  void one_row(int64_t tile, int64_t group, const float* x, float x_sum, f8* sums) const {
    int64_t at = tile * groups + group;
    x += group * kGroup;
    Codes::one_row(codes + at * Codes::kWords, scale + at * kTile, offset + at * kTile, x, x_sum, sums);
  }
};

template <typename Codes, typename Use>
void with_product(ffi::ThreadPool pool, const float* x, int64_t R, int64_t K, GroupedWeights<Codes> weights,
                  const Use& use) {
  use(FloatProduct<GroupedWeights<Codes>>(pool, x, R, K, weights));
}

template <typename Codes>
void product_grouped(ffi::ThreadPool pool, const float* x, GroupedWeights<Codes> weights, float* y, int64_t R,
                     int64_t M) {
  int64_t groups = weights.groups, K = groups * kGroup;
  if (R > 1) {
    return with_product(pool, x, R, K, weights, [&](const auto& product) { write_product(pool, product, R, K, M, y); });
  }
  std::vector<float> x_sums(groups);
  for (int64_t i = 0; i < K; ++i) x_sums[i / kGroup] += x[i];
  one_row_product(pool, K, M, y, [=, &x_sums](int64_t tile, float* own) {
    f8 sums[4] = {};
    for (int64_t g = 0; g < groups; ++g) weights.one_row(tile, g, x, x_sums[g], sums);
    for (int c = 0; c < 4; ++c) store(own + c * kLanes, sums[c]);
  });
}

// What a row's softmax needs of the outputs of one task.
struct Part {
  float largest, total;  // total: of e^(output - largest)
  int64_t at;            // the first output that is the largest
};

// Part of scaled outputs [tiles][ld][32], of which `columns` exist; the scaled outputs are left there.
Part part_of(float* outputs, int64_t ld, int64_t columns, int64_t first_column, float scale) {
  wide high = wide{} - INFINITY, total = {};
  for (int64_t c = 0; c < columns; c += kTile) {
    float* tile = outputs + c * ld;
    for (int64_t i = 0; i < kTile; i += kWide) store_wide(tile + i, load_wide(tile + i) * scale);
    for (int64_t i = columns - c; i < kTile; ++i) tile[i] = -INFINITY;
    for (int64_t i = 0; i < kTile; i += kWide) {
      wide v = load_wide(tile + i);
      high = v > high ? v : high;
    }
  }
  Part part{-INFINITY, 0, -1};
  for (int i = 0; i < kWide; ++i) part.largest = std::max(part.largest, high[i]);
  for (int64_t c = 0; c < columns; c += kTile) {
    const float* tile = outputs + c * ld;
    for (int64_t i = 0; i < kTile; i += kWide) total += exp_wide(load_wide(tile + i) - part.largest);  // NaN stays NaN
    for (int64_t i = 0; i < kTile && part.at < 0; ++i) {
      if (tile[i] == part.largest) part.at = first_column + c + i;
    }
  }
  for (int i = 0; i < kWide; ++i) part.total += total[i];
  return part;
}

// Losses of targets under a softmax over scale * product, and whether each is the likeliest, of equals the first: the
// outputs are never in memory together.
template <typename Product>
void score_targets(ffi::ThreadPool pool, const Product& product, int64_t R, int64_t K, int64_t M,
                   const int32_t* targets, float scale, float* losses, bool* is_greedy) {
  constexpr int64_t kTiles = 16;
  int64_t groups = (M + kTiles * kTile - 1) / (kTiles * kTile);
  std::vector<Part> parts(R * groups);
  std::vector<float> own(R);
  auto take = [&](int64_t first, int64_t end, int64_t first_tile, int64_t end_tile, float* sums) {
    int64_t first_column = first_tile * kTile, columns = std::min(M, end_tile * kTile) - first_column;
    for (int64_t row = first; row < end; ++row, sums += kTile) {
      parts[row * groups + first_tile / kTiles] = part_of(sums, end - first, columns, first_column, scale);
      int64_t at = targets[row] - first_column;
      if (at >= 0 && at < columns) own[row] = sums[at / kTile * (end - first) * kTile + at % kTile];
    }
  };
  in_blocks(pool, product, R, K, M, kTiles, take);
  for (int64_t row = 0; row < R; ++row) {
    const Part *from = parts.data() + row * groups, *best = from;
    for (int64_t i = 1; i < groups; ++i) best = from[i].largest > best->largest ? from + i : best;
    double total = 0;
    for (int64_t i = 0; i < groups; ++i) total += from[i].total * std::exp(double(from[i].largest) - best->largest);
    losses[row] = std::log(total) + best->largest - own[row];
    is_greedy[row] = best->at == targets[row] && losses[row] == losses[row];
  }
}

// Calls use(weights) with a layer's matrix of floats for K inputs.
template <typename Use>
void with_weights(const ffi::AnyBuffer& w, const ffi::Buffer<ffi::S32>& layer, int64_t K, const Use& use) {
  int64_t at = layer.typed_data()[0] * w.dimensions()[1] * w.dimensions()[2] * kTile;
  if (w.element_type() == ffi::F32) {
    use(FloatWeights{static_cast<const float*>(w.untyped_data()) + at, K});
  } else {
    use(PairWeights{static_cast<const uint32_t*>(w.untyped_data()) + at, K});
  }
}

template <typename Codes>
GroupedWeights<Codes> grouped_weights(const ffi::Buffer<ffi::U32>& codes, const ffi::Buffer<ffi::F16>& scale,
                                      const ffi::Buffer<ffi::F16>& offset, const ffi::Buffer<ffi::S32>& layer) {
  int64_t groups = codes.dimensions()[2], at = layer.typed_data()[0] * codes.dimensions()[1] * groups;
  return {codes.typed_data() + at * Codes::kWords, reinterpret_cast<const f16*>(scale.untyped_data()) + at * kTile,
          reinterpret_cast<const f16*>(offset.untyped_data()) + at * kTile, groups};
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RK, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                  ffi::ResultBuffer<ffi::F32> y_RM) {
  int64_t R = x_RK.dimensions()[0], K = x_RK.dimensions()[1], M = y_RM->dimensions()[1];
  with_weights(w, layer, K, [&](auto weights) {
    product_ungrouped(pool, x_RK.typed_data(), weights, y_RM->typed_data(), R, K, M);
  });
  return ffi::Error::Success();
}

template <typename Codes>
ffi::Error matmul_grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RK, ffi::Buffer<ffi::U32> codes,
                          ffi::Buffer<ffi::F16> scale, ffi::Buffer<ffi::F16> offset, ffi::Buffer<ffi::S32> layer,
                          ffi::ResultBuffer<ffi::F32> y_RM) {
  int64_t R = x_RK.dimensions()[0], M = y_RM->dimensions()[1];
  auto weights = grouped_weights<Codes>(codes, scale, offset, layer);
  product_grouped(pool, x_RK.typed_data(), weights, y_RM->typed_data(), R, M);
  return ffi::Error::Success();
}

template <typename Weights>
ffi::Error scores_with(ffi::ThreadPool pool, const ffi::Buffer<ffi::F32>& x_RK, const Weights& weights,
                       const ffi::Buffer<ffi::S32>& targets_R, float scale, int64_t num_outputs,
                       ffi::ResultBuffer<ffi::F32>& losses_R, ffi::ResultBuffer<ffi::PRED>& is_greedy_R) {
  int64_t R = x_RK.dimensions()[0], K = x_RK.dimensions()[1];
  with_product(pool, x_RK.typed_data(), R, K, weights, [&](const auto& product) {
    score_targets(pool, product, R, K, num_outputs, targets_R.typed_data(), scale, losses_R->typed_data(),
                  is_greedy_R->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error scores(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RK, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                  ffi::Buffer<ffi::S32> targets_R, float scale, int64_t num_outputs,
                  ffi::ResultBuffer<ffi::F32> losses_R, ffi::ResultBuffer<ffi::PRED> is_greedy_R) {
  with_weights(w, layer, x_RK.dimensions()[1], [&](auto weights) {
    scores_with(pool, x_RK, weights, targets_R, scale, num_outputs, losses_R, is_greedy_R);
  });
  return ffi::Error::Success();
}

template <typename Codes>
ffi::Error scores_grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RK, ffi::Buffer<ffi::U32> codes,
                          ffi::Buffer<ffi::F16> scales, ffi::Buffer<ffi::F16> offsets, ffi::Buffer<ffi::S32> layer,
                          ffi::Buffer<ffi::S32> targets_R, float scale, int64_t num_outputs,
                          ffi::ResultBuffer<ffi::F32> losses_R, ffi::ResultBuffer<ffi::PRED> is_greedy_R) {
  return scores_with(pool, x_RK, grouped_weights<Codes>(codes, scales, offsets, layer), targets_R, scale, num_outputs,
                     losses_R, is_greedy_R);
}

}  // namespace

#define FLOAT_INPUTS                \
  ffi::Ffi::Bind()                  \
      .Ctx<ffi::ThreadPool>()       \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::AnyBuffer>()        \
      .Arg<ffi::Buffer<ffi::S32>>()

#define GROUPED_INPUTS              \
  ffi::Ffi::Bind()                  \
      .Ctx<ffi::ThreadPool>()       \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::U32>>() \
      .Arg<ffi::Buffer<ffi::F16>>() \
      .Arg<ffi::Buffer<ffi::F16>>() \
      .Arg<ffi::Buffer<ffi::S32>>()

#define PRODUCT(INPUTS) INPUTS.Ret<ffi::Buffer<ffi::F32>>()
#define SCORES(INPUTS)               \
  INPUTS.Arg<ffi::Buffer<ffi::S32>>() \
      .Attr<float>("scale")          \
      .Attr<int64_t>("num_outputs")  \
      .Ret<ffi::Buffer<ffi::F32>>()  \
      .Ret<ffi::Buffer<ffi::PRED>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_matmul, matmul, PRODUCT(FLOAT_INPUTS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_matmul_int4, matmul_grouped<Int4>, PRODUCT(GROUPED_INPUTS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_matmul_int8, matmul_grouped<Int8>, PRODUCT(GROUPED_INPUTS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_scores, scores, SCORES(FLOAT_INPUTS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_scores_int4, scores_grouped<Int4>, SCORES(GROUPED_INPUTS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_scores_int8, scores_grouped<Int8>, SCORES(GROUPED_INPUTS));
