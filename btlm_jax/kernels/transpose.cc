// Matrices of float32 or bfloat16, transposed: for products that sum over rows.

#include "simd.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 64, kPiece = 8;  // rows of a task; sides of what is transposed in registers

// to[column][row] of 8 x 8 elements.
inline void transpose_piece(const float* from, int64_t from_row, float* to, int64_t to_row) {
#ifdef __SSE2__
  for (int r = 0; r < 8; r += 4) {
    for (int c = 0; c < 8; c += 4) {
      __m128 rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from + (r + i) * from_row + c);
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (c + i) * to_row + r, rows[i]);
    }
  }
#else
  for (int c = 0; c < 8; ++c) {
    for (int r = 0; r < 8; ++r) to[c * to_row + r] = from[r * from_row + c];
  }
#endif
}

inline void transpose_piece(const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row) {
#ifdef __SSE2__
  __m128i in[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) in[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_row));
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm_unpacklo_epi16(in[2 * i], in[2 * i + 1]);
    pairs[2 * i + 1] = _mm_unpackhi_epi16(in[2 * i], in[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {  // rows 0 to 3, and 4 to 7
    for (int part = 0; part < 2; ++part) {
      __m128i a = pairs[4 * half + part], b = pairs[4 * half + 2 + part];
      fours[4 * half + 2 * part] = _mm_unpacklo_epi32(a, b);
      fours[4 * half + 2 * part + 1] = _mm_unpackhi_epi32(a, b);
    }
  }
  for (int i = 0; i < 4; ++i) {
    __m128i low = _mm_unpacklo_epi64(fours[i], fours[4 + i]), high = _mm_unpackhi_epi64(fours[i], fours[4 + i]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i * to_row), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i + 1) * to_row), high);
  }
#else
  for (int c = 0; c < 8; ++c) {
    for (int r = 0; r < 8; ++r) to[c * to_row + r] = from[r * from_row + c];
  }
#endif
}

template <typename T>
void transpose_rows(const T* from, T* to, int64_t rows, int64_t columns, int64_t first, int64_t end) {
  int64_t whole_end = first + (end - first) / kPiece * kPiece, c = 0;
  for (; c + kPiece <= columns; c += kPiece) {
    for (int64_t r = first; r < whole_end; r += kPiece) {
      transpose_piece(from + r * columns + c, columns, to + c * rows + r, rows);
    }
    for (int64_t r = whole_end; r < end; ++r) {
      for (int64_t i = c; i < c + kPiece; ++i) to[i * rows + r] = from[r * columns + i];
    }
  }
  for (; c < columns; ++c) {
    for (int64_t r = first; r < end; ++r) to[c * rows + r] = from[r * columns + c];
  }
}

ffi::Error transpose(ffi::ThreadPool pool, ffi::AnyBuffer x_RK, ffi::Result<ffi::AnyBuffer> y_KR) {
  int64_t rows = x_RK.dimensions()[0], columns = x_RK.dimensions()[1];
  return of_type(x_RK, [&](auto* typed) {
    using Bits = std::conditional_t<sizeof(*typed) == 2, uint16_t, float>;
    auto *from = static_cast<const Bits*>(x_RK.untyped_data());
    auto *to = static_cast<Bits*>(y_KR->untyped_data());
    parallel(pool, (rows + kBlock - 1) / kBlock, kBlock * columns, [&](int64_t task) {
      transpose_rows(from, to, rows, columns, task * kBlock, std::min(rows, (task + 1) * kBlock));
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_transpose, transpose,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
