// The forward pass of causal attention; see causal.h.

#include "causal.h"

namespace {

// Turns products, [keys, 64], into weights without the softmax's denominator, which lie where the products did or
// elsewhere; updates the largest score and the sum.
template <typename E>
void weigh(const Shape& shape, float slope, float* scores, E* weights, int64_t first, int64_t keys, int64_t first_query,
           const Starts& starts, float* largest, float* total, float* kept) {
  constexpr int64_t P = kFactors<E>;
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide query = load_wide(kRamp.values + c) + float(first_query), old = load_wide(largest + c), high = old, sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      float key = first + j, *at = scores + j * kTile + c;
      wide score = load_wide(at) * shape.scale + slope * (key - query);
      if (first + j > first_query) score = query < key ? wide{} + kLowest : score;
      // Of a query whose keys are all hidden so far, what is summed is dropped with its first score that is not.
      if (first + j < starts.last) score = wide{} + key < load_wide(starts.of_query + c) ? wide{} + kLowest : score;
      high = score > high ? score : high;
      store_wide(at, score);
    }
    for (int64_t j = 0; j < keys; j += P) {
      wide own[P] = {};
      for (int64_t p = 0; p < P && j + p < keys; ++p) {
        float key = first + j + p;
        own[p] = exp_wide(load_wide(scores + (j + p) * kTile + c) - high);
        if (first + j + p > first_query) own[p] = query < key ? wide{} : own[p];
        sum += own[p];
      }
      store_row_pairs(weights + j / P * kTile + c, own);
    }
    wide keep = exp_wide(old - high);
    store_wide(largest + c, high);
    store_wide(kept + c, keep);
    store_wide(total + c, load_wide(total + c) * keep + sum);
  }
}

void scale_columns(const Shape& shape, const float* factors, float* columns) {
  for (int64_t i = 0; i < shape.H * kTile; i += kWide) {
    store_wide(columns + i, load_wide(columns + i) * load_wide(factors + i % kTile));
  }
}

template <typename C, typename E>
void attend_queries(const Shape& shape, int64_t g, int64_t tile, const C* q, const E* k_rows, const E* v_pairs, C* o,
                    float* lse) {
  constexpr int64_t P = kFactors<E>;
  int64_t W = shape.width(), H = shape.H, first_query = tile * kTile, end = first_query + shape.count(tile);
  Aligned<E> rows(kTile * W / P), q_columns(W / P * kTile);
  Floats scores(kTile * kTile), sums(H * kTile);
  InPlaceOfFloats<E> weights(scores.data, kTile / P * kTile);
  alignas(64) float largest[kTile], total[kTile] = {}, kept[kTile];
  Starts starts(shape, g, tile);
  std::fill_n(largest, kTile, kLowest);
  to_rows(shape, q, g, first_query, shape.count(tile), rows.data);
  to_columns(shape, rows.data, shape.count(tile), q_columns.data);
  for (int64_t first = shape.first_key(g, tile), next; first < end; first = next) {
    next = std::min((first / kTile + 1) * kTile, end);
    Left<Stored::kByRows, E> k_left{k_rows + first * W / P, W / P};
    product<Into::kNew>(k_left, q_columns.data, kTile, scores.data, kTile, shape.depth(P), next - first, kTile);
    weigh(shape, shape.slope(g), scores.data, weights.data, first, next - first, first_query, starts, largest, total, kept);
    scale_columns(shape, kept, sums.data);
    Left<Stored::kByColumns, E> v_left{v_pairs + first / P * W, W};
    product<Into::kSum>(v_left, weights.data, kTile, sums.data, kTile, (next - first + P - 1) / P, H, kTile);
  }
  for (int64_t j = 0; j < shape.count(tile); ++j) {
    lse[g * shape.T + first_query + j] = largest[j] + std::log(total[j]);
    total[j] = 1 / total[j];
  }
  from_columns(shape, sums.data, total, g, tile, o);
}

template <typename C>
void forward(ffi::ThreadPool pool, const Shape& shape, const C* q, const C* k, const C* v, C* o, float* lse,
             float* scratch) {
  typedef typename FactorOf<C>::type E;
  constexpr int64_t P = kFactors<E>;
  int64_t W = shape.width(), G = shape.heads(), tiles = shape.tiles(), size = shape.T * W;
  E *k_rows = reinterpret_cast<E*>(scratch), *v_pairs = k_rows + G * size;
  parallel(pool, G * tiles, kTile * W * 2, [&](int64_t task) {
    int64_t g = task / tiles, tile = task % tiles, first = tile * kTile, count = shape.count(tile);
    to_rows(shape, k, g, first, count, k_rows + g * size + first * W / P);
    to_row_pairs(shape, v, g, first, count, v_pairs + g * size + first / P * W);
  });
  parallel(pool, G * tiles, shape.T * kTile * W, [&](int64_t task) {  // the longest first
    int64_t g = task % G, tile = tiles - 1 - task / G;
    attend_queries(shape, g, tile, q, k_rows + g * size, v_pairs + g * size, o, lse);
  });
}

ffi::Error causal_forward(ffi::ThreadPool pool, ffi::AnyBuffer q_BTNH, ffi::AnyBuffer k_BTNH, ffi::AnyBuffer v_BTNH,
                          ffi::Buffer<ffi::F32> slopes_N, ffi::Buffer<ffi::S32> windows_BN,
                          ffi::RemainingArgs documents, float scale,
                          ffi::Result<ffi::AnyBuffer> o_BTNH, ffi::ResultBuffer<ffi::F32> lse_BNT,
                          ffi::ResultBuffer<ffi::F32> scratch) {
  auto run = [&](auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    auto data = [](auto& buffer) { return static_cast<C*>(buffer.untyped_data()); };
    forward(pool, shape_of(q_BTNH, slopes_N, windows_BN, documents, scale), data(q_BTNH), data(k_BTNH), data(v_BTNH),
            data(*o_BTNH), lse_BNT->typed_data(), scratch->typed_data());
  };
  return of_type(q_BTNH, run);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_causal_forward, causal_forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ANY_IN.ANY_IN.ANY_IN.F32_IN.S32_IN
                                  .RemainingArgs().Attr<float>("scale").ANY_OUT.F32_OUT.F32_OUT);
