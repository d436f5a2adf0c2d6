// Causal attention with ALiBi over whole sequences, and its gradients; see attention/blockwise.py for the same in JAX.
//
// A task is 64 queries of one head (forward), or kBlock keys of one (backward, which computes the scores again, as
// FlashAttention does: Dao et al. 2022, arXiv:2205.14135, appendix B.4). Scores lie transposed, [keys, 64 queries]: the
// softmax of a query then stays in one lane, and keys and values are read as they lie. Every sum is taken in an order
// that depends on the shape alone, so results do not depend on the number of threads.
//
// Sizes: B sequences, T positions, N heads, H head dim, W the head dim filled up with zeros; G = B * N.

#include "wide.h"

namespace {

constexpr int64_t kTile = 64, kBlock = 128;
constexpr float kLowest = -1e30f;      // below every score, and finite: no inf - inf
constexpr float kNegligible = 37.0f;   // as in blockwise.py

struct Shape {
  int64_t B, T, N, H;
  float scale;
  const float* slopes;
  int64_t heads() const { return B * N; }
  int64_t tiles() const { return (T + kTile - 1) / kTile; }
  int64_t width() const { return (H + 15) / 16 * 16; }
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

// Turns products into weights less the softmax's denominator, [keys, 64], and keeps the largest score and the sum.
void weigh(const Shape& shape, float slope, float* scores, int64_t first, int64_t keys, int64_t first_query,
           float* largest, float* total, float* kept) {
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide query = load_wide(kRamp.values + c) + float(first_query), old = load_wide(largest + c), high = old, sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      float key = first + j, *at = scores + j * kTile + c;
      wide score = load_wide(at) * shape.scale + slope * (key - query);
      if (first + j > first_query) score = query < key ? wide{} + kLowest : score;
      high = score > high ? score : high;
      store_wide(at, score);
    }
    for (int64_t j = 0; j < keys; ++j) {
      float key = first + j, *at = scores + j * kTile + c;
      wide weight = exp_wide(load_wide(at) - high);
      if (first + j > first_query) weight = query < key ? wide{} : weight;
      sum += weight;
      store_wide(at, weight);
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

template <typename C>
void attend_queries(const Shape& shape, int64_t g, int64_t tile, int64_t reach, const C* q, const float* k,
                    const float* v, C* o, float* lse) {
  int64_t W = shape.width(), H = shape.H, first_query = tile * kTile, end = first_query + shape.count(tile);
  Floats rows(kTile * W), q_columns(H * kTile), scores(kTile * kTile), sums(H * kTile);
  alignas(64) float largest[kTile], total[kTile] = {}, kept[kTile];
  std::fill_n(largest, kTile, kLowest);
  widen(shape, q, g, first_query, shape.count(tile), rows.data);
  to_columns(shape, rows.data, shape.count(tile), q_columns.data);
  for (int64_t first = std::max<int64_t>(0, first_query - reach), next; first < end; first = next) {
    next = std::min((first / kTile + 1) * kTile, end);
    product<Into::kNew>(Left<Stored::kByRows>{k + first * W, W}, q_columns.data, kTile, scores.data, kTile, H,
                        next - first, kTile);
    weigh(shape, shape.slope(g), scores.data, first, next - first, first_query, largest, total, kept);
    scale_columns(shape, kept, sums.data);
    product<Into::kSum>(Left<Stored::kByColumns>{v + first * W, W}, scores.data, kTile, sums.data, kTile,
                        next - first, H, kTile);
  }
  for (int64_t j = 0; j < shape.count(tile); ++j) {
    lse[g * shape.T + first_query + j] = largest[j] + std::log(total[j]);
    total[j] = 1 / total[j];
  }
  from_columns(shape, sums.data, total, g, tile, o);
}

template <typename C>
void forward(ffi::ThreadPool pool, const Shape& shape, const C* q, const C* k, const C* v, C* o, float* lse,
             float* room) {
  int64_t W = shape.width(), G = shape.heads(), tiles = shape.tiles(), size = shape.T * W;
  Reach reach(shape);
  parallel(pool, G * tiles, kTile * W * 4, [&](int64_t task) {
    int64_t g = task / tiles, tile = task % tiles, first = tile * kTile, count = shape.count(tile);
    float *k_rows = room + g * size + first * W, *v_rows = k_rows + G * size;
    widen(shape, q, g, first, count, v_rows);
    reach.queries[task] = reach.longest(v_rows, count);
    widen(shape, v, g, first, count, v_rows);
    widen(shape, k, g, first, count, k_rows);
    reach.keys[task] = reach.longest(k_rows, count);
  });
  parallel(pool, G * tiles, shape.T * kTile * W, [&](int64_t task) {  // the longest first
    int64_t g = task % G, tile = tiles - 1 - task / G;
    attend_queries(shape, g, tile, reach.of(g), q, room + g * size, room + (G + g) * size, o, lse);
  });
}

// Sums over rows, in the order of `product`: where o is one row of v, the gradient of its score is then exactly 0.
void sum_products(const float* a, const float* b, int64_t rows, float* sums) {
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide own = {};
    for (int64_t i = 0; i < rows; ++i) own += load_wide(a + i * kTile + c) * load_wide(b + i * kTile + c);
    store_wide(sums + c, own);
  }
}

// What the tasks of the backward pass share: q and do transposed, dq as far as it is summed, all [G, tiles, H, 64].
struct Shared {
  float *q, *d_o, *dq;
  std::vector<float> delta, lse;             // [G, tiles, 64]
  std::vector<std::atomic<int64_t>> turns;   // of every tile: the block of keys that may add to its dq now
};

// Turns products of q and k, and of do and v, into the weights and the gradients of the scores, all [keys, 64].
void differentiate(const Shape& shape, float slope, float* scores, float* dweights, int64_t first, int64_t keys,
                   int64_t first_query, const float* lse, const float* delta) {
  for (int64_t c = 0; c < kTile; c += kWide) {
    wide query = load_wide(kRamp.values + c) + float(first_query);
    wide own_lse = load_wide(lse + c), own_delta = load_wide(delta + c);
    for (int64_t j = 0; j < keys; ++j) {
      float key = first + j, *at = scores + j * kTile + c, *d_at = dweights + j * kTile + c;
      wide weight = exp_wide(load_wide(at) * shape.scale + slope * (key - query) - own_lse);
      if (first + j > first_query) weight = query < key ? wide{} : weight;
      store_wide(at, weight);
      store_wide(d_at, weight * (load_wide(d_at) - own_delta));
    }
  }
}

template <typename C>
void differentiate_keys(const Shape& shape, int64_t g, int64_t block, int64_t reach, const C* q, const C* k, const C* v,
                        const C* d_o, Shared& shared, C* dq, C* dk, C* dv) {
  int64_t W = shape.width(), H = shape.H, start = block * kBlock, stop = std::min(start + kBlock, shape.T);
  Floats k_rows(kBlock * W), v_rows(kBlock * W), dk_rows(kBlock * W), dv_rows(kBlock * W), q_rows(kTile * W),
      do_rows(kTile * W), scores(kTile * kTile), dscores(kTile * kTile);
  widen(shape, k, g, start, stop - start, k_rows.data);
  widen(shape, v, g, start, stop - start, v_rows.data);
  for (int64_t tile = start / kTile; tile * kTile < std::min(shape.T, stop + reach); ++tile) {
    int64_t first_query = tile * kTile, count = shape.count(tile), at = g * shape.tiles() + tile;
    int64_t low = std::max<int64_t>(0, first_query - reach), end = std::min(stop, first_query + count);
    const float *q_columns = shared.q + at * H * kTile, *do_columns = shared.d_o + at * H * kTile;
    float* dq_columns = shared.dq + at * H * kTile;
    widen(shape, q, g, first_query, count, q_rows.data);
    widen(shape, d_o, g, first_query, count, do_rows.data);
    // Tasks start in order and the first of a tile waits for none, so what is waited for has started, and will end.
    while (shared.turns[at].load(std::memory_order_acquire) != block) std::this_thread::yield();
    for (int64_t first = std::max(start, low), next; first < end; first = next) {
      next = std::min((first / kTile + 1) * kTile, end);
      int64_t keys = next - first, place = (first - start) * W;
      Left<Stored::kByRows> k_left{k_rows.data + place, W}, v_left{v_rows.data + place, W};
      product<Into::kNew>(k_left, q_columns, kTile, scores.data, kTile, H, keys, kTile);
      product<Into::kNew>(v_left, do_columns, kTile, dscores.data, kTile, H, keys, kTile);
      differentiate(shape, shape.slope(g), scores.data, dscores.data, first, keys, first_query,
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
              const float* lse, const C* d_o, C* dq, C* dk, C* dv, float* room) {
  int64_t W = shape.width(), G = shape.heads(), tiles = shape.tiles(), columns = shape.H * kTile;
  Reach reach(shape);
  Shared shared{room, room + G * tiles * columns, room + 2 * G * tiles * columns,
                std::vector<float>(G * tiles * kTile), std::vector<float>(G * tiles * kTile, -kLowest),
                std::vector<std::atomic<int64_t>>(G * tiles)};
  parallel(pool, G * tiles, kTile * W * 8, [&](int64_t task) {
    int64_t g = task / tiles, tile = task % tiles, first = tile * kTile, count = shape.count(tile);
    Floats rows(kTile * W), o_rows(kTile * W), o_columns(columns);
    widen(shape, k, g, first, count, rows.data);
    reach.keys[task] = reach.longest(rows.data, count);
    widen(shape, q, g, first, count, rows.data);
    reach.queries[task] = reach.longest(rows.data, count);
    to_columns(shape, rows.data, count, shared.q + task * columns);
    widen(shape, d_o, g, first, count, rows.data);
    widen(shape, o, g, first, count, o_rows.data);
    to_columns(shape, rows.data, count, shared.d_o + task * columns);
    to_columns(shape, o_rows.data, count, o_columns.data);
    sum_products(shared.d_o + task * columns, o_columns.data, shape.H, shared.delta.data() + task * kTile);
    std::copy_n(lse + g * shape.T + first, count, shared.lse.data() + task * kTile);
  });
  for (int64_t i = 0; i < G * tiles; ++i) {
    shared.turns[i] = std::max<int64_t>(0, i % tiles * kTile - reach.of(i / tiles)) / kBlock;
  }
  parallel(pool, (shape.T + kBlock - 1) / kBlock * G, shape.T * kBlock * W, [&](int64_t task) {
    int64_t g = task % G, block = task / G;  // the one with most queries first
    differentiate_keys(shape, g, block, reach.of(g), q, k, v, d_o, shared, dq, dk, dv);
  });
}

Shape shape_of(const ffi::AnyBuffer& q, const ffi::Buffer<ffi::F32>& slopes_N, float scale) {
  auto dims = q.dimensions();
  return {dims[0], dims[1], dims[2], dims[3], scale, slopes_N.typed_data()};
}

ffi::Error causal_forward(ffi::ThreadPool pool, ffi::AnyBuffer q_BTNH, ffi::AnyBuffer k_BTNH, ffi::AnyBuffer v_BTNH,
                          ffi::Buffer<ffi::F32> slopes_N, float scale, ffi::Result<ffi::AnyBuffer> o_BTNH,
                          ffi::ResultBuffer<ffi::F32> lse_BNT, ffi::ResultBuffer<ffi::F32> room) {
  auto run = [&](auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    auto data = [](auto& buffer) { return static_cast<C*>(buffer.untyped_data()); };
    forward(pool, shape_of(q_BTNH, slopes_N, scale), data(q_BTNH), data(k_BTNH), data(v_BTNH), data(*o_BTNH),
            lse_BNT->typed_data(), room->typed_data());
  };
  q_BTNH.element_type() == ffi::BF16 ? run(static_cast<bf16*>(nullptr)) : run(static_cast<float*>(nullptr));
  return ffi::Error::Success();
}

ffi::Error causal_backward(ffi::ThreadPool pool, ffi::AnyBuffer q_BTNH, ffi::AnyBuffer k_BTNH, ffi::AnyBuffer v_BTNH,
                           ffi::Buffer<ffi::F32> slopes_N, ffi::AnyBuffer o_BTNH, ffi::Buffer<ffi::F32> lse_BNT,
                           ffi::AnyBuffer do_BTNH, float scale, ffi::Result<ffi::AnyBuffer> dq_BTNH,
                           ffi::Result<ffi::AnyBuffer> dk_BTNH, ffi::Result<ffi::AnyBuffer> dv_BTNH,
                           ffi::ResultBuffer<ffi::F32> room) {
  auto run = [&](auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    auto data = [](auto& buffer) { return static_cast<C*>(buffer.untyped_data()); };
    backward(pool, shape_of(q_BTNH, slopes_N, scale), data(q_BTNH), data(k_BTNH), data(v_BTNH), data(o_BTNH),
             lse_BNT.typed_data(), data(do_BTNH), data(*dq_BTNH), data(*dk_BTNH), data(*dv_BTNH), room->typed_data());
  };
  q_BTNH.element_type() == ffi::BF16 ? run(static_cast<bf16*>(nullptr)) : run(static_cast<float*>(nullptr));
  return ffi::Error::Success();
}

}  // namespace

#define ANY_IN Arg<ffi::AnyBuffer>()
#define ANY_OUT Ret<ffi::AnyBuffer>()
#define F32_IN Arg<ffi::Buffer<ffi::F32>>()
#define F32_OUT Ret<ffi::Buffer<ffi::F32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_causal_forward, causal_forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ANY_IN.ANY_IN.ANY_IN.F32_IN
                                  .Attr<float>("scale").ANY_OUT.F32_OUT.F32_OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_causal_backward, causal_backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ANY_IN.ANY_IN.ANY_IN.F32_IN.ANY_IN.F32_IN
                                  .ANY_IN.Attr<float>("scale").ANY_OUT.ANY_OUT.ANY_OUT.F32_OUT);
