// The backward pass of causal attention; see causal.h.

#include "causal.h"

namespace {

// Sums over rows, in the order of `product`: where o is one row of v, the gradient of its score is then exactly 0.
template <typename E>
void sum_products(const E* a, const E* b, int64_t rows, float* sums) {
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide own = {};
    for (int64_t i = 0; i < rows; ++i) {
      own = add_product(own, load_wide(a + i * kTile + c), load_wide(b + i * kTile + c));
    }
    store_wide(sums + c, own);
  }
}

// What the tasks of the backward pass share: q and do transposed, [G, tiles, W / P, 64], and dq as summed so far,
// [G, tiles, H, 64].
template <typename E>
struct Shared {
  E *q, *d_o;
  float* dq;
  std::vector<float> delta, lse;             // [G, tiles, 64]
  std::vector<std::atomic<int64_t>> turns;   // of every tile: the block of keys that may add to its dq now
};

// Products of a tile of keys and one of queries, [keys, 64], and what they are turned into: the weights and the
// gradients of the scores by rows, and the latter by pairs of rows too. Floats are where the products were.
template <typename E>
struct Scores {
  static constexpr int64_t kSize = kTile * kTile / kFactors<E>;
  Floats products{kTile * kTile}, d_products{kTile * kTile};
  InPlaceOfFloats<E> weights{products.data, kSize}, d_rows{d_products.data, kSize}, d_pairs{d_products.data, kSize};
};

// Turns products of q and k, and of do and v, into the weights and the gradients of the scores.
template <typename E>
void differentiate(const Shape& shape, float slope, Scores<E>& scores, int64_t first, int64_t keys, int64_t first_query,
                   const Starts& starts, const float* lse, const float* delta) {
  constexpr int64_t P = kFactors<E>;
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide query = load_wide(kRamp.values + c) + float(first_query);
    wide own_lse = load_wide(lse + c), own_delta = load_wide(delta + c);
    for (int64_t j = 0; j < keys; j += P) {
      wide weights[P] = {}, gradients[P] = {};
      for (int64_t p = 0; p < P && j + p < keys; ++p) {
        float key = first + j + p;
        int64_t at = (j + p) * kTile + c;
        wide weight = exp_wide(load_wide(scores.products.data + at) * shape.scale + slope * (key - query) - own_lse);
        if (first + j + p > first_query) weight = query < key ? wide{} : weight;
        if (first + j + p < starts.last) weight = wide{} + key < load_wide(starts.of_query + c) ? wide{} : weight;
        weights[p] = weight;
        gradients[p] = weight * (load_wide(scores.d_products.data + at) - own_delta);
      }
      store_rows(scores.weights.data + j * kTile / P, c, weights);
      store_rows(scores.d_rows.data + j * kTile / P, c, gradients);
      if constexpr (P > 1) store_row_pairs(scores.d_pairs.data + j / P * kTile + c, gradients);
    }
  }
}

// Tasks start in order and the first of a tile waits for none, so what is waited for has started, and will end.
void wait_for_turn(const std::atomic<int64_t>& turn, int64_t block) {
  for (int tries = 0; turn.load(std::memory_order_acquire) != block; ++tries) {
    if (tries < 100) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(20));  // more threads than processors: let others run
  }
}

template <typename C, typename E>
void differentiate_keys(const Shape& shape, int64_t g, int64_t block, const C* q, const C* k, const C* v,
                        const C* d_o, Shared<E>& shared, C* dq, C* dk, C* dv) {
  constexpr int64_t P = kFactors<E>;
  int64_t W = shape.width(), H = shape.H, start = block * kBlock, stop = std::min(start + kBlock, shape.T);
  Aligned<E> k_rows(kBlock * W / P), v_rows(kBlock * W / P), q_pairs(kTile * W / P), do_pairs(kTile * W / P);
  InPlaceOfFloats<E> k_pairs(k_rows.data, kBlock * W / P);
  Floats dk_rows(kBlock * W), dv_rows(kBlock * W);
  Scores<E> scores;
  to_rows(shape, k, g, start, stop - start, k_rows.data);
  to_rows(shape, v, g, start, stop - start, v_rows.data);
  if constexpr (P > 1) to_row_pairs(shape, k, g, start, stop - start, k_pairs.data);
  for (int64_t tile = start / kTile; tile < shape.tiles() && shape.first_key(g, tile) < stop; ++tile) {
    int64_t first_query = tile * kTile, count = shape.count(tile), at = g * shape.tiles() + tile;
    int64_t low = shape.first_key(g, tile), end = std::min(stop, first_query + count), pairs = (count + P - 1) / P;
    const E *q_columns = shared.q + at * W / P * kTile, *do_columns = shared.d_o + at * W / P * kTile;
    float* dq_columns = shared.dq + at * H * kTile;
    Starts starts(shape, g, tile);
    to_row_pairs(shape, q, g, first_query, count, q_pairs.data);
    to_row_pairs(shape, d_o, g, first_query, count, do_pairs.data);
    wait_for_turn(shared.turns[at], block);
    for (int64_t first = std::max(start, low), next; first < end; first = next) {
      next = std::min((first / kTile + 1) * kTile, end);
      int64_t keys = next - first, place = (first - start) * W;
      Left<Stored::kByRows, E> k_left{k_rows.data + place / P, W / P}, v_left{v_rows.data + place / P, W / P};
      product<Into::kNew>(k_left, q_columns, kTile, scores.products.data, kTile, shape.depth(P), keys, kTile);
      product<Into::kNew>(v_left, do_columns, kTile, scores.d_products.data, kTile, shape.depth(P), keys, kTile);
      differentiate(shape, shape.slope(g), scores, first, keys, first_query, starts, shared.lse.data() + at * kTile,
                    shared.delta.data() + at * kTile);
      Left<Stored::kByRows, E> weights{scores.weights.data, kTile / P}, d_left{scores.d_rows.data, kTile / P};
      product<Into::kSum>(weights, do_pairs.data, W, dv_rows.data + place, W, pairs, keys, W);
      product<Into::kSum>(d_left, q_pairs.data, W, dk_rows.data + place, W, pairs, keys, W);
      Left<Stored::kByColumns, E> k_across{k_pairs.data + place / P, W};
      if (first == low) std::fill_n(dq_columns, H * kTile, 0.0f);
      product<Into::kSum>(k_across, scores.d_pairs.data, kTile, dq_columns, kTile, (keys + P - 1) / P, H, kTile);
    }
    if (end == first_query + count) {
      float factors[kTile];
      std::fill_n(factors, kTile, shape.scale);
      from_columns(shape, dq_columns, factors, g, tile, dq);
    }
    shared.turns[at].store(block + 1, std::memory_order_release);
  }
  for (int64_t t = start; t < stop; ++t) {
    C *dk_row = dk + shape.start(g, t), *dv_row = dv + shape.start(g, t);
    const float *dk_sums = dk_rows.data + (t - start) * W, *dv_sums = dv_rows.data + (t - start) * W;
    for (int64_t h = 0; h < H; ++h) {
      dk_row[h] = from_float(dk_sums[h] * shape.scale, C());
      dv_row[h] = from_float(dv_sums[h], C());
    }
  }
}

template <typename C>
void backward(ffi::ThreadPool pool, const Shape& shape, const C* q, const C* k, const C* v, const C* o,
              const float* lse, const C* d_o, C* dq, C* dk, C* dv, float* scratch) {
  typedef typename FactorOf<C>::type E;
  constexpr int64_t P = kFactors<E>;
  int64_t W = shape.width(), G = shape.heads(), tiles = shape.tiles(), columns = W / P * kTile;
  E *q_columns = reinterpret_cast<E*>(scratch), *do_columns = q_columns + G * tiles * columns;
  Shared<E> shared{q_columns, do_columns, scratch + 2 * G * tiles * W * kTile, std::vector<float>(G * tiles * kTile),
                   std::vector<float>(G * tiles * kTile, -kLowest), std::vector<std::atomic<int64_t>>(G * tiles)};
  parallel(pool, G * tiles, kTile * W * 6, [&](int64_t task) {
    int64_t g = task / tiles, tile = task % tiles, first = tile * kTile, count = shape.count(tile);
    Aligned<E> rows(kTile * W / P), o_columns(columns);
    auto transpose = [&](const C* from, E* to) {
      to_rows(shape, from, g, first, count, rows.data);
      to_columns(shape, rows.data, count, to);
    };
    transpose(q, shared.q + task * columns);
    transpose(d_o, shared.d_o + task * columns);
    transpose(o, o_columns.data);
    sum_products(shared.d_o + task * columns, o_columns.data, shape.depth(P), shared.delta.data() + task * kTile);
    std::copy_n(lse + g * shape.T + first, count, shared.lse.data() + task * kTile);
  });
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      shared.turns[g * tiles + tile] = shape.first_key(g, tile) / kBlock;
    }
  }
  parallel(pool, (shape.T + kBlock - 1) / kBlock * G, shape.T * kBlock * W, [&](int64_t task) {
    int64_t g = task % G, block = task / G;  // the one with most queries first
    differentiate_keys(shape, g, block, q, k, v, d_o, shared, dq, dk, dv);
  });
}

ffi::Error causal_backward(ffi::ThreadPool pool, ffi::AnyBuffer q_BTNH, ffi::AnyBuffer k_BTNH, ffi::AnyBuffer v_BTNH,
                           ffi::Buffer<ffi::F32> slopes_N, ffi::Buffer<ffi::S32> windows_BN, ffi::AnyBuffer o_BTNH,
                           ffi::Buffer<ffi::F32> lse_BNT, ffi::AnyBuffer do_BTNH, ffi::RemainingArgs documents,
                           float scale, ffi::Result<ffi::AnyBuffer> dq_BTNH,
                           ffi::Result<ffi::AnyBuffer> dk_BTNH, ffi::Result<ffi::AnyBuffer> dv_BTNH,
                           ffi::ResultBuffer<ffi::F32> scratch) {
  auto run = [&](auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    auto data = [](auto& buffer) { return static_cast<C*>(buffer.untyped_data()); };
    backward(pool, shape_of(q_BTNH, slopes_N, windows_BN, documents, scale), data(q_BTNH), data(k_BTNH), data(v_BTNH),
             data(o_BTNH), lse_BNT.typed_data(), data(do_BTNH), data(*dq_BTNH), data(*dk_BTNH), data(*dv_BTNH),
             scratch->typed_data());
  };
  return of_type(q_BTNH, run);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_causal_backward, causal_backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ANY_IN.ANY_IN.ANY_IN.F32_IN.S32_IN.ANY_IN.F32_IN
                                  .ANY_IN.RemainingArgs().Attr<float>("scale").ANY_OUT.ANY_OUT.ANY_OUT.F32_OUT);
