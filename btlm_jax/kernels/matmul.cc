// Products of few rows with large matrices, which read every weight once; tiles.py has the same in JAX.
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

// y[rows][32] += x[rows][0..depth) . w[depth][32]
void accumulate_rows(const float* w, const float* x, int64_t ld_x, float* y, int64_t ld_y, int64_t depth, int64_t rows) {
  product<Into::kSum>(Left<Stored::kByRows>{x, ld_x}, w, kTile, y, ld_y, depth, rows, kTile);
}

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

// Rows are computed in the tile's own [rows, 32] buffer, then copied to y[rows, M].
template <typename Fill>
void into_columns(int64_t tile, int64_t rows, int64_t M, float* y, const Fill& fill) {
  std::vector<float> own(rows * kTile, 0.0f);
  fill(own.data());
  int64_t width = std::min(kTile, M - tile * kTile);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(y + r * M + tile * kTile, own.data() + r * kTile, width * sizeof(float));
  }
}

template <typename W>
void product_ungrouped(ffi::ThreadPool pool, const float* x, const W* w, float* y, int64_t R, int64_t K, int64_t M) {
  constexpr int64_t kDepth = 128, kInputs = std::is_same_v<W, float> ? 1 : 2;
#ifdef __AVX512BF16__
  if constexpr (kInputs == 2) {
    if (R > 1) {
      std::vector<uint32_t> rounded = pairs_of(x, R * K);
      parallel(pool, (M + kTile - 1) / kTile, R * K * kTile, [=, pairs = rounded.data()](int64_t tile) {
        into_columns(tile, R, M, y, [=](float* own) {
          for (int64_t k = 0; k < K / 2; k += kDepth) {
            int64_t depth = std::min(kDepth, K / 2 - k);
            accumulate_pair_rows(w + (tile * K / 2 + k) * kTile, pairs + k, K / 2, own, depth, R);
          }
        });
      });
      return;
    }
  }
#endif
  parallel(pool, (M + kTile - 1) / kTile, R * K * kTile, [=](int64_t tile) {
    const W* stream = w + tile * K / kInputs * kTile;
    into_columns(tile, R, M, y, [=](float* own) {
      if (R == 1) return one_row(stream, x, own, K);
      for (int64_t k = 0; k < K; k += kDepth) {
        int64_t depth = std::min(kDepth, K - k);
        if constexpr (kInputs == 1) {
          accumulate_rows(stream + k * kTile, x + k, K, own, kTile, depth, R);
        } else {
          float wide[kDepth * kTile];
          for (int64_t i = 0; i < depth / 2 * kTile; i += kLanes) {
            u32x8 pair = words(stream + k / 2 * kTile + i);
            float* to = wide + i / kTile * 2 * kTile + i % kTile;
            store(to, low_half(pair));
            store(to + kTile, high_half(pair));
          }
          accumulate_rows(wide, x + k, K, own, kTile, depth, R);
        }
      }
    });
  });
}

// w = codes * scale + offset; a sum of x * (1 + code / 16) becomes one of x * code.
struct Int4 {
  static constexpr int64_t kWords = kGroup / 8 * kTile;  // of a group

  static void one_row(const uint32_t* codes, const f16* scale, const f16* offset, const float* x, float x_sum,
                      f8* sums) {
    f8 own[4] = {};
    for (int64_t word = 0; word < kGroup / 8; ++word, codes += kTile, x += 8) {
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
void product_grouped(ffi::ThreadPool pool, const float* x, const uint32_t* codes, const f16* scale, const f16* offset,
                     float* y, int64_t R, int64_t groups, int64_t M) {
  int64_t K = groups * kGroup;
  std::vector<float> x_sums(R == 1 ? groups : 0);
  for (size_t i = 0; i < x_sums.size() * kGroup; ++i) x_sums[i / kGroup] += x[i];
  parallel(pool, (M + kTile - 1) / kTile, R * K * kTile, [=, &x_sums](int64_t tile) {
    const uint32_t* own_codes = codes + tile * groups * Codes::kWords;
    const f16 *own_scale = scale + tile * groups * kTile, *own_offset = offset + tile * groups * kTile;
    into_columns(tile, R, M, y, [=, &x_sums](float* own) {
      f8 sums[4] = {};
      float wide[kGroup * kTile];
      for (int64_t g = 0; g < groups; ++g) {
        const uint32_t* group = own_codes + g * Codes::kWords;
        if (R == 1) {
          Codes::one_row(group, own_scale + g * kTile, own_offset + g * kTile, x + g * kGroup, x_sums[g], sums);
        } else {
          Codes::widen(group, own_scale + g * kTile, own_offset + g * kTile, wide);
          accumulate_rows(wide, x + g * kGroup, K, own, kTile, kGroup, R);
        }
      }
      for (int c = 0; R == 1 && c < 4; ++c) store(own + c * kLanes, sums[c]);
    });
  });
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RK, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                  ffi::ResultBuffer<ffi::F32> y_RM) {
  int64_t R = x_RK.dimensions()[0], K = x_RK.dimensions()[1], M = y_RM->dimensions()[1];
  int64_t at = layer.typed_data()[0] * w.dimensions()[1] * w.dimensions()[2] * kTile;
  const float* x = x_RK.typed_data();
  if (w.element_type() == ffi::F32) {
    product_ungrouped(pool, x, static_cast<const float*>(w.untyped_data()) + at, y_RM->typed_data(), R, K, M);
  } else {
    product_ungrouped(pool, x, static_cast<const uint32_t*>(w.untyped_data()) + at, y_RM->typed_data(), R, K, M);
  }
  return ffi::Error::Success();
}

template <typename Codes>
ffi::Error matmul_grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RK, ffi::Buffer<ffi::U32> codes,
                          ffi::Buffer<ffi::F16> scale, ffi::Buffer<ffi::F16> offset, ffi::Buffer<ffi::S32> layer,
                          ffi::ResultBuffer<ffi::F32> y_RM) {
  int64_t R = x_RK.dimensions()[0], M = y_RM->dimensions()[1];
  int64_t tiles = codes.dimensions()[1], groups = codes.dimensions()[2], at = layer.typed_data()[0] * tiles * groups;
  product_grouped<Codes>(pool, x_RK.typed_data(), codes.typed_data() + at * Codes::kWords,
                         reinterpret_cast<const f16*>(scale.untyped_data()) + at * kTile,
                         reinterpret_cast<const f16*>(offset.untyped_data()) + at * kTile, y_RM->typed_data(), R,
                         groups, M);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

#define GROUPED_BINDING              \
  ffi::Ffi::Bind()                   \
      .Ctx<ffi::ThreadPool>()        \
      .Arg<ffi::Buffer<ffi::F32>>()  \
      .Arg<ffi::Buffer<ffi::U32>>()  \
      .Arg<ffi::Buffer<ffi::F16>>()  \
      .Arg<ffi::Buffer<ffi::F16>>()  \
      .Arg<ffi::Buffer<ffi::S32>>()  \
      .Ret<ffi::Buffer<ffi::F32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_matmul_int4, matmul_grouped<Int4>, GROUPED_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_matmul_int8, matmul_grouped<Int8>, GROUPED_BINDING);
