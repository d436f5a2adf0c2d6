// Vectors of eight floats, and loops over the threads of XLA's pool; for matmul.cc, attend.cc and causal.h.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "the kernels tell NaN from other values and round by additions: compile them without fast-math"
#endif

namespace ffi = xla::ffi;

constexpr int64_t kLanes = 8;
constexpr int64_t kWorthAThread = 1 << 17;  // fewer multiply-adds take less time than starting other threads

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
typedef int8_t s8x8 __attribute__((vector_size(8), aligned(1)));
typedef uint16_t u16x8 __attribute__((vector_size(16), aligned(2)));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline f8 load(const float* p) { return *reinterpret_cast<const f8*>(p); }
#if defined(__AVX2__) && defined(__F16C__)  // GCC 12 compiles the portable form below lane by lane
inline f8 load(const bf16* p) {
  return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline f8 load(const int8_t* p) {
  return (f8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline f8 load(const f16* p) { return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
inline f8 load(const f16* p) {  // no intermediate float32 is subnormal: XLA's threads flush those to zero
  u32x8 wide = __builtin_convertvector(*reinterpret_cast<const u16x8*>(p), u32x8);
  u32x8 exponent = wide & 0x7c00, shifted = (wide & 0x7fff) << 13;
  u32x8 tiny = (u32x8)(__builtin_convertvector((i8)(wide & 0x3ff), f8) * 0x1p-24f);
  u32x8 usual = shifted + (112u << 23), none = shifted | 0x7f800000u;  // NaN and infinity
  u32x8 magnitude = exponent == 0 ? tiny : exponent == 0x7c00 ? none : usual;
  return (f8)(magnitude | (wide & 0x8000) << 16);
}
inline f8 load(const bf16* p) {
  return (f8)(__builtin_convertvector(*reinterpret_cast<const u16x8*>(p), u32x8) << 16);
}
inline f8 load(const int8_t* p) { return __builtin_convertvector(*reinterpret_cast<const s8x8*>(p), f8); }
#endif
inline void store(float* p, f8 v) { *reinterpret_cast<f8*>(p) = v; }

inline float one(float v) { return v; }
inline float one(int8_t v) { return v; }
inline float one(bf16 v) {
  uint32_t wide = uint32_t{v.bits} << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline bf16 to_bf16(float v) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

inline float from_float(float v, float) { return v; }
inline bf16 from_float(float v, bf16) { return to_bf16(v); }

// Calls run with a null pointer of the buffer's type.
template <typename F>
inline ffi::Error of_type(const ffi::AnyBuffer& x, const F& run) {
  if (x.element_type() == ffi::BF16) {
    run(static_cast<bf16*>(nullptr));
  } else if (x.element_type() == ffi::F32) {
    run(static_cast<float*>(nullptr));
  } else {
    return ffi::Error::InvalidArgument("the kernels of training take float32 and bfloat16");
  }
  return ffi::Error::Success();
}

// Calls run(0) ... run(count - 1), also on the pool's other threads; `work` is multiply-adds per call. Waits for calls
// that have started, never for a thread to become free.
template <typename F>
void parallel(ffi::ThreadPool pool, int64_t count, int64_t work, const F& run) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  int64_t helpers = work * count < kWorthAThread ? 0 : std::min<int64_t>(pool.num_threads(), count) - 1;
  auto state = std::make_shared<State>();
  auto work_off = [state, count, body = &run] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count; state->done.fetch_add(1)) (*body)(i);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work_off)(work_off));
  work_off();
  while (state->done.load() < count) std::this_thread::yield();
}
