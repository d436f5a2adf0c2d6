// The backward pass of causal attention; see causal.h.

#include "causal.h"

namespace {

// Sums over rows, in the order of `product`: where o is one row of v, the gradient of its score is then exactly 0.
void sum_products(const float* a, const float* b, int64_t rows, float* sums) {
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide own = {};
    for (int64_t i = 0; i < rows; ++i) own += load_wide(a + i * kTile + c) * load_wide(b + i * kTile + c);
    store_wide(sums + c, own);
  }
}

// What the tasks of the backward pass share: q and do transposed, dq as summed so far, all [G, tiles, H, 64].
struct Shared {
  float *q, *d_o, *dq;
  std::vector<float> delta, lse;             // [G, tiles, 64]
  std::vector<std::atomic<int64_t>> turns;   // of every tile: the block of keys that may add to its dq now
};

// Turns products of q and k, and of do and v, into the weights and the gradients of the scores, all [keys, 64].
void differentiate(const Shape& shape, float slope, float* scores, float* dweights, int64_t first, int64_t keys,
                   int64_t first_query, const Starts& starts, const float* lse, const float* delta) {
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide query = load_wide(kRamp.values + c) + float(first_query);
    wide own_lse = load_wide(lse + c), own_delta = load_wide(delta + c);
    for (int64_t j = 0; j < keys; ++j) {
      float key = first + j, *at = scores + j * kTile + c, *d_at = dweights + j * kTile + c;
      wide weight = exp_wide(load_wide(at) * shape.scale + slope * (key - query) - own_lse);
      if (first + j > first_query) weight = query < key ? wide{} : weight;
      if (first + j < starts.last) weight = wide{} + key < load_wide(starts.of_query + c) ? wide{} : weight;
      store_wide(at, weight);
      store_wide(d_at, weight * (load_wide(d_at) - own_delta));
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

template <typename C>
void differentiate_keys(const Shape& shape, int64_t g, int64_t block, const C* q, const C* k, const C* v,
                        const C* d_o, Shared& shared, C* dq, C* dk, C* dv) {
  int64_t W = shape.width(), H = shape.H, start = block * kBlock, stop = std::min(start + kBlock, shape.T);
  Floats k_rows(kBlock * W), v_rows(kBlock * W), dk_rows(kBlock * W), dv_rows(kBlock * W), q_rows(kTile * W),
      do_rows(kTile * W), scores(kTile * kTile), dscores(kTile * kTile);
  widen(shape, k, g, start, stop - start, k_rows.data);
  widen(shape, v, g, start, stop - start, v_rows.data);
  for (int64_t tile = start / kTile; tile < shape.tiles() && shape.first_key(g, tile) < stop; ++tile) {
    int64_t first_query = tile * kTile, count = shape.count(tile), at = g * shape.tiles() + tile;
    int64_t low = shape.first_key(g, tile), end = std::min(stop, first_query + count);
    const float *q_columns = shared.q + at * H * kTile, *do_columns = shared.d_o + at * H * kTile;
    float* dq_columns = shared.dq + at * H * kTile;
    Starts starts(shape, g, tile);
    widen(shape, q, g, first_query, count, q_rows.data);
    widen(shape, d_o, g, first_query, count, do_rows.data);
    wait_for_turn(shared.turns[at], block);
    for (int64_t first = std::max(start, low), next; first < end; first = next) {
      next = std::min((first / kTile + 1) * kTile, end);
      int64_t keys = next - first, place = (first - start) * W;
      Left<Stored::kByRows> k_left{k_rows.data + place, W}, v_left{v_rows.data + place, W};
      product<Into::kNew>(k_left, q_columns, kTile, scores.data, kTile, H, keys, kTile);
      product<Into::kNew>(v_left, do_columns, kTile, dscores.data, kTile, H, keys, kTile);
      differentiate(shape, shape.slope(g), scores.data, dscores.data, first, keys, first_query, starts,
                    shared.lse.data() + at * kTile, shared.delta.data() + at * kTile);
      Left<Stored::kByRows> weights{scores.data, kTile}, d_left{dscores.data, kTile};
      product<Into::kSum>(weights, do_rows.data, W, dv_rows.data + place, W, count, keys, W);
      product<Into::kSum>(d_left, q_rows.data, W, dk_rows.data + place, W, count, keys, W);
      Left<Stored::kByColumns> k_across{k_rows.data + place, W};
      if (first == low) std::fill_n(dq_columns, H * kTile, 0.0f);
      product<Into::kSum>(k_across, dscores.data, kTile, dq_columns, kTile, keys, H, kTile);
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
  int64_t W = shape.width(), G = shape.heads(), tiles = shape.tiles(), columns = shape.H * kTile;
  Shared shared{scratch, scratch + G * tiles * columns, scratch + 2 * G * tiles * columns,
                std::vector<float>(G * tiles * kTile), std::vector<float>(G * tiles * kTile, -kLowest),
                std::vector<std::atomic<int64_t>>(G * tiles)};
  parallel(pool, G * tiles, kTile * W * 6, [&](int64_t task) {
    int64_t g = task / tiles, tile = task % tiles, first = tile * kTile, count = shape.count(tile);
    Floats rows(kTile * W), o_rows(kTile * W), o_columns(columns);
    widen(shape, q, g, first, count, rows.data);
    to_columns(shape, rows.data, count, shared.q + task * columns);
    widen(shape, d_o, g, first, count, rows.data);
    widen(shape, o, g, first, count, o_rows.data);
    to_columns(shape, rows.data, count, shared.d_o + task * columns);
    to_columns(shape, o_rows.data, count, o_columns.data);
    sum_products(shared.d_o + task * columns, o_columns.data, shape.H, shared.delta.data() + task * kTile);
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
