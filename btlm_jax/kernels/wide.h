// Vectors as wide as the processor's, e^x of them, and products of small matrices in registers; for causal.h and matmul.cc.

#pragma once

#include "simd.h"

#if defined(__AVX512F__)
constexpr int kWide = 16, kVectors = 4;  // 6 rows of 4 vectors are summed in 24 of 32 registers
#elif defined(__AVX__)
constexpr int kWide = 8, kVectors = 2;   // 6 rows of 2 in 12 of 16
#else
constexpr int kWide = 4, kVectors = 4;
#endif

typedef float wide __attribute__((vector_size(4 * kWide), aligned(4)));
typedef uint32_t wide_bits __attribute__((vector_size(4 * kWide), aligned(4)));

inline wide load_wide(const float* p) { return *reinterpret_cast<const wide*>(p); }
inline void store_wide(float* p, wide v) { *reinterpret_cast<wide*>(p) = v; }

// e^v to 2 units in the last place for v <= 80: 2^n times a polynomial in the rest; below -87 next to nothing or 0.
inline wide exp_wide(wide v) {
#ifdef __AVX512F__
  v = (wide)_mm512_max_ps((__m512)(wide{} - 110.0f), (__m512)v);  // the second if it is NaN
  wide n = (wide)_mm512_roundscale_ps((__m512)(v * 1.44269504f), 0);
#else
  v = v < -87.0f ? wide{} - 87.0f : v;
  wide shifted = v * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;  // the last bits of `shifted` are n
#endif
  wide r = v - n * 0.693359375f + n * 2.12194440e-4f;
  wide p = (((((1.38145848e-3f * r + 8.36872309e-3f) * r + 4.1668389e-2f) * r + 0.166665211f) * r + 0.49999994f) * r +
            1.0f) * r + 1.0f;
#ifdef __AVX512F__
  return (wide)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (wide)((((wide_bits)shifted) << 23) + 0x3f800000u);  // unsigned: its overflow is defined
#endif
}

// Two bfloat16 that are multiplied by two others and summed at once, the first in the low bits.
struct bf16x2 {
  uint32_t bits;
};

// What operands of products of a type consist of: pairs of bfloat16 where the processor multiplies them, else floats.
template <typename C>
struct FactorOf {
  typedef float type;
};
inline wide add_product(wide sum, wide b, float a) { return sum + b * a; }
inline wide add_product(wide sum, wide b, wide a) { return sum + b * a; }
#ifdef __AVX512BF16__
template <>
struct FactorOf<bf16> {
  typedef bf16x2 type;
};
inline __m512bh load_wide(const bf16x2* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline wide add_product(wide sum, __m512bh b, __m512bh a) { return (wide)_mm512_dpbf16_ps((__m512)sum, b, a); }
inline wide add_product(wide sum, __m512bh b, bf16x2 a) {
  return add_product(sum, b, (__m512bh)_mm512_set1_epi32(a.bits));
}
#endif

// A matrix to be multiplied by: element (i, k) at data[i * row + k * step], one of the two strides being 1.
enum class Stored { kByRows, kByColumns };
template <Stored STORED, typename E = float>
struct Left {
  const E* data;
  int64_t ld;
  const E* at(int64_t i, int64_t k) const { return STORED == Stored::kByRows ? data + i * ld + k : data + k * ld + i; }
};

enum class Into { kNew, kSum };

// c[RB][NV vectors] = or += a[RB][depth] . b[depth][NV vectors]
template <Into INTO, int RB, int NV, Stored STORED, typename E>
inline void product_block(Left<STORED, E> a, const E* b, int64_t ld_b, float* c, int64_t ld_c, int64_t depth) {
  wide sums[RB][NV];
#pragma GCC unroll 8
  for (int r = 0; r < RB; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[r][v] = INTO == Into::kSum ? load_wide(c + r * ld_c + v * kWide) : wide{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_wide(b)) own[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) own[v] = load_wide(b + k * ld_b + v * kWide);
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) {
      E factor = *a.at(r, k);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[r][v] = add_product(sums[r][v], own[v], factor);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < RB; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store_wide(c + r * ld_c + v * kWide, sums[r][v]);
  }
}

template <Into INTO, int RB, int NV, Stored STORED, typename E>
inline void product_rows(Left<STORED, E> a, const E* b, int64_t ld_b, float* c, int64_t ld_c, int64_t depth,
                         int64_t rows) {
  int64_t i = 0;
  auto blocks = [&](auto size) {
    for (; i + size <= rows; i += size) {
      product_block<INTO, size, NV>(Left<STORED, E>{a.at(i, 0), a.ld}, b, ld_b, c + i * ld_c, ld_c, depth);
    }
  };
  blocks(std::integral_constant<int, RB>());
  if constexpr (RB > 4) blocks(std::integral_constant<int, 4>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// c[rows][columns] = or += a[rows][depth] . b[depth][columns]; columns is a multiple of kWide.
template <Into INTO, Stored STORED, typename E>
void product(Left<STORED, E> a, const E* b, int64_t ld_b, float* c, int64_t ld_c, int64_t depth, int64_t rows,
             int64_t columns) {
  for (int64_t j = 0; j < columns;) {
    int64_t vectors = (columns - j) / kWide;
    auto group = [&](auto block, auto width) {
      product_rows<INTO, block, width>(a, b + j, ld_b, c + j, ld_c, depth, rows);
      j += width * kWide;
    };
    using std::integral_constant;
    if (kVectors == 4 && (vectors == 5 || vectors == 3)) {
      group(integral_constant<int, 8>(), integral_constant<int, 3>());
    } else if (vectors >= kVectors) {
      group(integral_constant<int, 6>(), integral_constant<int, kVectors>());
    } else if (kVectors == 4 && vectors == 2) {
      group(integral_constant<int, 8>(), integral_constant<int, 2>());
    } else {
      group(integral_constant<int, 8>(), integral_constant<int, 1>());
    }
  }
}
