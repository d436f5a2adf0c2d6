// Attention over the cache of keys and values; decode/cpu_cache.py has its layout, and the same in JAX.
//
// Sizes: B rows, T new tokens, N heads, H head dim, S slots of all heads together.

#include "wide.h"

namespace {

constexpr int64_t kKeys = 64;       // processed at a time
constexpr int64_t kQueries = 64;    // of a row with many, whose scores are products of matrices
constexpr int64_t kManyQueries = 16;
constexpr float kLowest = -1e30f;   // below every score

// e^v for v <= 0, to 2 units in the last place: 2^n times a polynomial (Cephes, expf.c).
inline f8 exp8(f8 v) {
  v = v < -87.0f ? f8{} - 87.0f : v;
  i8 n = __builtin_convertvector(v * 1.44269504f - 0.5f, i8);
  f8 n_float = __builtin_convertvector(n, f8);
  f8 r = v - n_float * 0.693359375f + n_float * 2.12194440e-4f;
  f8 p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
          1.6666665459e-1f) * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (f8)((u32x8)(n + 127) << 23);
}

inline float sum(f8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The sums of eight vectors as one.
inline f8 sums_of(const f8* v) {
  f8 pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {  // lanes a0+a1 b0+b1 a2+a3 b2+b3 ...
    f8 a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    f8 a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

inline void write(const float* from, float* to, float*, int64_t H) { std::memcpy(to, from, H * sizeof(float)); }
inline void write(const float* from, bf16* to, float*, int64_t H) {
  for (int64_t h = 0; h < H; ++h) to[h] = to_bf16(from[h]);
}
inline void write(const float* from, int8_t* to, float* scale, int64_t H) {
  float largest = 0, none = 0;
  for (int64_t h = 0; h < H; ++h) {
    largest = std::max(largest, std::abs(from[h]));
    none += from[h] - from[h];  // 0, or NaN if any is NaN or infinite
  }
  *scale = largest / 127 + none;
  float inverse = largest > 0 && none == 0 ? 127 / largest : 0;
  for (int64_t h = 0; h < H; ++h) to[h] = none != 0 ? 0 : static_cast<int8_t>(__builtin_rintf(from[h] * inverse));
}

template <typename C>
void widen(const C* from, const float* scales, float* to, int64_t count, int64_t H) {
  for (int64_t j = 0; j < count; ++j, from += H, to += H) {
    float scale = std::is_same_v<C, int8_t> ? scales[j] : 1.0f;
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) store(to + h, load(from + h) * scale);
    for (; h < H; ++h) to[h] = one(from[h]) * scale;
  }
}

inline float dot(const float* a, const float* b, int64_t H) {
  f8 sums = {};
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) sums += load(a + h) * load(b + h);
  float total = sum(sums);
  for (; h < H; ++h) total += a[h] * b[h];
  return total;
}

struct Head {  // one head of one row
  int64_t slots, window, start, count, H, ld;
  float slope, scale;
};

// Softmax over keys that come tile by tile: the largest score, the sum of weights and of weighted values so far.
struct RunningSoftmax {
  float largest = kLowest, total = 0;
  std::vector<float> values;
};

// out[j] = q . k[j] for eight rows of k
inline f8 eight_dots(const float* q, const float* k, int64_t H) {
  f8 sums[kLanes] = {};
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) {
    f8 own = load(q + h);
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; ++j) sums[j] += own * load(k + j * H + h);
  }
  f8 out = sums_of(sums);
  for (; h < H; ++h) {
    for (int j = 0; j < kLanes; ++j) out[j] += q[h] * k[j * H + h];
  }
  return out;
}

// values[0..8 CHUNKS) = values * keep_old + weights . rows
template <int CHUNKS>
inline void weigh(const float* rows, const float* weights, int64_t count, int64_t H, float keep_old, float* values) {
  f8 sums[CHUNKS];
  for (int c = 0; c < CHUNKS; ++c) sums[c] = load(values + c * kLanes) * keep_old;
  for (int64_t j = 0; j < count; ++j) {
    float weight = weights[j];
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; ++c) sums[c] += load(rows + j * H + c * kLanes) * weight;
  }
  for (int c = 0; c < CHUNKS; ++c) store(values + c * kLanes, sums[c]);
}

// Adds the keys at positions first .. first + keys - 1 to one query's softmax; k has space for eight rows more.
void attend_tile(const Head& head, const float* q, const float* k, const float* v, int64_t first, int64_t keys,
                 int64_t position, RunningSoftmax& run) {
  int64_t low = std::max(first, position - head.window + 1), high = std::min(first + keys - 1, position);
  if (low > high) return;
  alignas(32) float weights[kKeys + kLanes];
  const float lanes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
  int64_t count = high - low + 1;
  f8 highest = f8{} + run.largest;
  for (int64_t j = 0; j < count; j += kLanes) {
    f8 distance = float(position - low - j) - load(lanes);
    f8 score = eight_dots(q, k + (low - first + j) * head.H, head.H) * head.scale - head.slope * distance;
    score = distance < float(position - high) ? f8{} + kLowest : score;
    store(weights + j, score);
    highest = score > highest ? score : highest;
  }
  float largest = run.largest;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, highest[i]);
  f8 sums = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    f8 score = load(weights + j), e = exp8(score - largest);
    e = score <= kLowest ? f8{} : e;  // not so for NaN, which must be seen
    store(weights + j, e);
    sums += e;
  }
  float keep_old = run.total > 0 ? exp8(f8{} + (run.largest - largest))[0] : 0.0f;
  run.total = run.total * keep_old + sum(sums);
  run.largest = largest;
  const float* rows = v + (low - first) * head.H;
  float* values = run.values.data();
  int64_t h = 0;
  for (; h + 4 * kLanes <= head.H; h += 4 * kLanes) weigh<4>(rows + h, weights, count, head.H, keep_old, values + h);
  for (; h + kLanes <= head.H; h += kLanes) weigh<1>(rows + h, weights, count, head.H, keep_old, values + h);
  for (; h < head.H; ++h) {
    float acc = values[h] * keep_old;
    for (int64_t j = 0; j < count; ++j) acc += rows[j * head.H + h] * weights[j];
    values[h] = acc;
  }
}

// Up to 64 queries that attend together, scores and values transposed: a query is a column, its softmax in one lane.
class QueryTile {
 public:
  QueryTile(const Head& head, const float* q, int64_t first, int64_t count)
      : head_(head), position_(head.start + first), count_(count), columns_((count + kWide - 1) / kWide * kWide),
        q_(head.H * kQueries), values_(head.H * kQueries) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t h = 0; h < head.H; ++h) q_[h * kQueries + j] = q[(first + j) * head.ld + h];
    }
    std::fill_n(largest_, kQueries, kLowest);
  }

  // As attend_tile, for all queries. A value that is no number is seen by all of them, whether they see its key or not.
  void add(const float* k, const float* v, int64_t first, int64_t keys) {
    if (first >= position_ + count_ || first + keys <= position_ - head_.window + 1) return;
    alignas(64) float scores[kKeys * kQueries], kept[kQueries];
    product<Into::kNew>(Left<Stored::kByRows>{k, head_.H}, q_.data(), kQueries, scores, kQueries, head_.H, keys,
                        columns_);
    for (int64_t c = 0; c < columns_; c += kWide) {
      wide old = load_wide(largest_ + c), high = old, sum = {}, distance = {};
      for (int i = 0; i < kWide; ++i) distance[i] = position_ + c + i - first;
      float window = head_.window;
      for (int64_t j = 0; j < keys; ++j, distance -= 1.0f) {
        float* at = scores + j * kQueries + c;
        wide score = load_wide(at) * head_.scale - head_.slope * distance;
        score = distance < 0.0f ? wide{} + kLowest : score;
        score = distance >= window ? wide{} + kLowest : score;
        high = score > high ? score : high;
        store_wide(at, score);
      }
      for (int64_t j = 0; j < keys; ++j) {
        float* at = scores + j * kQueries + c;
        wide score = load_wide(at), weight = exp_wide(score - high);
        weight = score <= kLowest ? wide{} : weight;  // not so for NaN, which must be seen
        sum += weight;
        store_wide(at, weight);
      }
      wide keep = exp_wide(old - high);
      store_wide(largest_ + c, high);
      store_wide(total_ + c, load_wide(total_ + c) * keep + sum);
      store_wide(kept + c, keep);
    }
    for (int64_t h = 0; h < head_.H; ++h) {
      for (int64_t c = 0; c < columns_; c += kWide) {
        float* at = values_.data() + h * kQueries + c;
        store_wide(at, load_wide(at) * load_wide(kept + c));
      }
    }
    product<Into::kSum>(Left<Stored::kByColumns>{v, head_.H}, scores, kQueries, values_.data(), kQueries, keys, head_.H,
                        columns_);
  }

  // Writes the result of query j of the tile; returns its largest score.
  float finish(int64_t j, float* out) const {
    for (int64_t h = 0; h < head_.H; ++h) out[h] = values_[h * kQueries + j] / total_[j];
    return largest_[j];
  }

 private:
  Head head_;
  int64_t position_, count_, columns_;
  std::vector<float> q_, values_;  // [H][64]
  alignas(64) float largest_[kQueries], total_[kQueries] = {};
};

// The same for any number of queries, one by one.
class SingleQueries {
 public:
  SingleQueries(const Head& head, const float* q) : head_(head), q_(q), runs_(head.count) {
    for (RunningSoftmax& run : runs_) run.values.assign(head.H, 0.0f);
  }
  void add(const float* k, const float* v, int64_t first, int64_t keys) {
    for (int64_t t = 0; t < head_.count; ++t) {
      attend_tile(head_, q_ + t * head_.ld, k, v, first, keys, head_.start + t, runs_[t]);
    }
  }
  float finish(int64_t t, float* out) const {
    for (int64_t h = 0; h < head_.H; ++h) out[h] = runs_[t].values[h] / runs_[t].total;
    return runs_[t].largest;
  }

 private:
  Head head_;
  const float* q_;
  std::vector<RunningSoftmax> runs_;
};

class ManyQueries {
 public:
  ManyQueries(const Head& head, const float* q) {
    for (int64_t t = 0; t < head.count; t += kQueries) {
      tiles_.emplace_back(head, q, t, std::min(kQueries, head.count - t));
    }
  }
  void add(const float* k, const float* v, int64_t first, int64_t keys) {
    for (QueryTile& tile : tiles_) tile.add(k, v, first, keys);
  }
  float finish(int64_t t, float* out) const { return tiles_[t / kQueries].finish(t % kQueries, out); }

 private:
  std::vector<QueryTile> tiles_;
};

// Attends to the cache; returns a bound on the share of weight outside the window.
template <typename Queries, typename C>
float attend_cached(const Head& head, Queries queries, const float* q, const C* k, const C* v, const float* k_scale,
                    const float* v_scale, float largest_key, float* out) {
  int64_t H = head.H;
  std::vector<float> wide((2 * kKeys + kLanes) * H);  // keys, then values
  int64_t end = head.start + head.count, first = std::max<int64_t>(0, head.start - head.window + 1);
  while (first < end) {
    int64_t slot = first % head.slots, keys = std::min({kKeys, head.slots - slot, end - first});
    widen(k + slot * H, k_scale + slot, wide.data(), keys, H);
    widen(v + slot * H, v_scale + slot, wide.data() + kKeys * H, keys, H);
    queries.add(wide.data(), wide.data() + kKeys * H, first, keys);
    first += keys;
  }
  float dropped = 0;
  for (int64_t t = 0; t < head.count; ++t) {
    const float* row = q + t * head.ld;
    float largest = queries.finish(t, out + t * head.ld);
    if (head.start + t < head.window) continue;
    float highest = __builtin_sqrtf(dot(row, row, H)) * largest_key * head.scale - head.slope * float(head.window);
    float share = __builtin_expf(std::min(highest - largest, 80.0f)) / (1 - __builtin_expf(-head.slope));
    dropped = std::max(dropped, share);
  }
  return dropped;
}

// Writes the new keys and values to the cache, then attends. Returns a bound on the share of weight outside the window.
template <typename C>
float attend_head(const Head& head, const float* q, const float* k_new, const float* v_new, C* k, C* v, float* k_scale,
                  float* v_scale, float* largest_key, float* out) {
  int64_t H = head.H;
  for (int64_t t = 0; t < head.count; ++t) {
    int64_t slot = (head.start + t) % head.slots;
    write(k_new + t * head.ld, k + slot * H, k_scale + slot, H);
    write(v_new + t * head.ld, v + slot * H, v_scale + slot, H);
    *largest_key = std::max(*largest_key, __builtin_sqrtf(dot(k_new + t * head.ld, k_new + t * head.ld, H)));
  }
  if (head.count < kManyQueries) {
    return attend_cached(head, SingleQueries(head, q), q, k, v, k_scale, v_scale, *largest_key, out);
  }
  return attend_cached(head, ManyQueries(head, q), q, k, v, k_scale, v_scale, *largest_key, out);
}

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q_BTNH, ffi::Buffer<ffi::F32> k_BTNH,
                  ffi::Buffer<ffi::F32> v_BTNH, ffi::AnyBuffer k_LBSH, ffi::AnyBuffer, ffi::Buffer<ffi::F32>,
                  ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::S32> starts_B,
                  ffi::Buffer<ffi::S32> counts_B, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::F32> slopes_BN,
                  ffi::Buffer<ffi::S32> windows_N, ffi::Buffer<ffi::S32> firsts_N, float scale,
                  ffi::ResultBuffer<ffi::F32> o_BTNH, ffi::Result<ffi::AnyBuffer> k_cache,
                  ffi::Result<ffi::AnyBuffer> v_cache, ffi::ResultBuffer<ffi::F32> k_scales,
                  ffi::ResultBuffer<ffi::F32> v_scales, ffi::ResultBuffer<ffi::F32> largest_keys_LBN,
                  ffi::ResultBuffer<ffi::F32> dropped_BN) {
  auto dims = q_BTNH.dimensions();
  int64_t B = dims[0], T = dims[1], N = dims[2], H = dims[3], S = k_LBSH.dimensions()[2];
  int64_t at_layer = layer.typed_data()[0];
  bool scaled = k_LBSH.element_type() == ffi::S8;
  auto run = [&](int64_t task, auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    int64_t b = task / N, n = N - 1 - task % N;  // the flattest slopes have the widest windows: they start first
    int64_t first = firsts_N.typed_data()[n], next = n + 1 < N ? firsts_N.typed_data()[n + 1] : S;
    Head head{next - first, windows_N.typed_data()[n], starts_B.typed_data()[b], counts_B.typed_data()[b],
              H, N * H, slopes_BN.typed_data()[b * N + n], scale};
    int64_t from = b * T * N * H + n * H, slot = (at_layer * B + b) * S + first;
    int64_t scale_slot = scaled ? slot : 0;
    for (int64_t t = head.count; t < T; ++t) std::fill_n(o_BTNH->typed_data() + from + t * N * H, H, 0.0f);
    dropped_BN->typed_data()[b * N + n] = attend_head(
        head, q_BTNH.typed_data() + from, k_BTNH.typed_data() + from, v_BTNH.typed_data() + from,
        static_cast<C*>(k_cache->untyped_data()) + slot * H, static_cast<C*>(v_cache->untyped_data()) + slot * H,
        k_scales->typed_data() + scale_slot, v_scales->typed_data() + scale_slot,
        largest_keys_LBN->typed_data() + (at_layer * B + b) * N + n, o_BTNH->typed_data() + from);
  };
  int64_t longest = *std::max_element(starts_B.typed_data(), starts_B.typed_data() + B) + T;
  parallel(pool, B * N, T * longest * H, [&](int64_t task) {
    switch (k_LBSH.element_type()) {
      case ffi::S8: return run(task, static_cast<int8_t*>(nullptr));
      case ffi::BF16: return run(task, static_cast<bf16*>(nullptr));
      default: return run(task, static_cast<float*>(nullptr));
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define F32_IN Arg<ffi::Buffer<ffi::F32>>()
#define S32_IN Arg<ffi::Buffer<ffi::S32>>()
#define F32_OUT Ret<ffi::Buffer<ffi::F32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_attend, attend,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().F32_IN.F32_IN.F32_IN
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().F32_IN.F32_IN.F32_IN
                                  .S32_IN.S32_IN.S32_IN.F32_IN.S32_IN.S32_IN.Attr<float>("scale")
                                  .F32_OUT.Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().F32_OUT.F32_OUT.F32_OUT.F32_OUT);
