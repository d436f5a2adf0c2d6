// What is between a training step's products, in one pass over memory each: SwiGLU, and the readout's loss.
//
// All is computed in float32; what is read and written is float32 or bfloat16. Results do not depend on the number of
// threads: every sum is of one row, by one thread.

#include "wide.h"

namespace {

constexpr int64_t kPiece = 1 << 13;  // elements of a task
constexpr float kLargestExponent = 88.5f;  // e to this is 2.7e38 or infinite, and the inverse 0 in XLA's threads

typedef uint16_t narrow __attribute__((vector_size(2 * kWide), aligned(2)));

inline wide read(const float* p) { return load_wide(p); }
inline wide read(const bf16* p) {
  return (wide)(__builtin_convertvector(*reinterpret_cast<const narrow*>(p), wide_bits) << 16);
}
inline void write(float* p, wide v) { store_wide(p, v); }
inline void write(bf16* p, wide v) {  // to nearest, ties to even
  wide_bits bits = (wide_bits)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  rounded = v == v ? rounded : wide_bits{} + 0x7fc00000u;
  *reinterpret_cast<narrow*>(p) = __builtin_convertvector(rounded >> 16, narrow);
}

// Calls run(reads at i) for all whole vectors, and once more for what is left, which is copied to and from `rest`.
template <typename T, int INPUTS, int OUTPUTS, typename F>
void for_each(const T* const (&inputs)[INPUTS], T* const (&outputs)[OUTPUTS], int64_t first, int64_t end, const F& run) {
  wide in[INPUTS], out[OUTPUTS];
  int64_t i = first;
  for (; i + kWide <= end; i += kWide) {
    for (int j = 0; j < INPUTS; ++j) in[j] = read(inputs[j] + i);
    run(in, out);
    for (int j = 0; j < OUTPUTS; ++j) write(outputs[j] + i, out[j]);
  }
  if (i == end) return;
  T rest[kWide] = {};
  for (int j = 0; j < INPUTS; ++j) {
    std::copy(inputs[j] + i, inputs[j] + end, rest);
    in[j] = read(rest);
  }
  run(in, out);
  for (int j = 0; j < OUTPUTS; ++j) {
    write(rest, out[j]);
    std::copy(rest, rest + (end - i), outputs[j] + i);
  }
}

inline wide sigmoid(wide v) {
  wide negative = -v;
  negative = negative > kLargestExponent ? wide{} + kLargestExponent : negative;
  return 1.0f / (1.0f + exp_wide(negative));
}

template <typename T>
T* data(ffi::AnyBuffer buffer) { return static_cast<T*>(buffer.untyped_data()); }

template <typename F>
void in_pieces(ffi::ThreadPool pool, int64_t size, const F& run) {
  parallel(pool, (size + kPiece - 1) / kPiece, 8 * kPiece, [&](int64_t task) {
    run(task * kPiece, std::min(size, (task + 1) * kPiece));
  });
}

// up * gate * sigmoid(gate)
ffi::Error swiglu_forward(ffi::ThreadPool pool, ffi::AnyBuffer up, ffi::AnyBuffer gate, ffi::Result<ffi::AnyBuffer> y) {
  return of_type(up, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const T* inputs[2] = {data<T>(up), data<T>(gate)};
    T* outputs[1] = {data<T>(*y)};
    in_pieces(pool, up.element_count(), [&](int64_t first, int64_t end) {
      for_each(inputs, outputs, first, end, [](const wide* in, wide* out) { out[0] = in[0] * in[1] * sigmoid(in[1]); });
    });
  });
}

ffi::Error swiglu_backward(ffi::ThreadPool pool, ffi::AnyBuffer up, ffi::AnyBuffer gate, ffi::AnyBuffer dy,
                           ffi::Result<ffi::AnyBuffer> dup, ffi::Result<ffi::AnyBuffer> dgate) {
  return of_type(up, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const T* inputs[3] = {data<T>(up), data<T>(gate), data<T>(dy)};
    T* outputs[2] = {data<T>(*dup), data<T>(*dgate)};
    in_pieces(pool, up.element_count(), [&](int64_t first, int64_t end) {
      for_each(inputs, outputs, first, end, [](const wide* in, wide* out) {
        wide open = sigmoid(in[1]), scaled = in[2] * open;
        out[0] = scaled * in[1];
        out[1] = scaled * in[0] * (1.0f + in[1] * (1.0f - open));
      });
    });
  });
}

inline float largest_of(wide v) {
  float most = v[0];
  for (int i = 1; i < kWide; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

inline float sum_of(wide v) {
  float sum = 0;
  for (int i = 0; i < kWide; ++i) sum += v[i];
  return sum;
}

struct Loss {
  float scale, z_loss;
  int64_t V;

  // One row: its loss in nats, and the gradients of weight * (loss + z_loss * log(Z)^2) for the products in `row`.
  template <typename T>
  float operator()(const float* row, int32_t target, float weight, float* exponentials, T* delta) const {
    int64_t whole = V / kWide * kWide;
    wide high = wide{} + row[0] * scale;
    for (int64_t i = 0; i < whole; i += kWide) {
      wide logit = load_wide(row + i) * scale;
      high = logit > high ? logit : high;
    }
    float most = largest_of(high);
    for (int64_t i = whole; i < V; ++i) most = std::max(most, row[i] * scale);
    wide sums = {};
    for (int64_t i = 0; i < whole; i += kWide) {
      wide part = exp_wide(load_wide(row + i) * scale - most);
      store_wide(exponentials + i, part);
      sums += part;
    }
    float total = sum_of(sums);
    for (int64_t i = whole; i < V; ++i) total += exponentials[i] = exp_wide(wide{} + (row[i] * scale - most))[0];
    bool has_target = target >= 0 && target < V;
    float log_total = most + std::log(total), factor = weight * scale / total * (1 + 2 * z_loss * log_total);
    for (int64_t i = 0; i < whole; i += kWide) write(delta + i, load_wide(exponentials + i) * factor);
    for (int64_t i = whole; i < V; ++i) delta[i] = from_float(exponentials[i] * factor, T());
    if (has_target) delta[target] = from_float(exponentials[target] * factor - weight * scale, T());
    return log_total - (has_target ? row[target] * scale : 0.0f);
  }
};

ffi::Error cross_entropy(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> products_RV, ffi::Buffer<ffi::S32> targets_R,
                         ffi::Buffer<ffi::F32> weights_R, float scale, float z_loss,
                         ffi::ResultBuffer<ffi::F32> losses_R, ffi::Result<ffi::AnyBuffer> delta_RV) {
  int64_t R = products_RV.dimensions()[0], V = products_RV.dimensions()[1];
  Loss loss{scale, z_loss, V};
  return of_type(*delta_RV, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    T* delta = data<T>(*delta_RV);
    int64_t rows = std::max<int64_t>(1, kPiece / V), tasks = (R + rows - 1) / rows;
    parallel(pool, tasks, 8 * rows * V, [&](int64_t task) {
      static thread_local std::vector<float> exponentials;
      exponentials.resize(std::max<size_t>(exponentials.size(), V));
      for (int64_t r = task * rows; r < std::min(R, (task + 1) * rows); ++r) {
        losses_R->typed_data()[r] = loss(products_RV.typed_data() + r * V, targets_R.typed_data()[r],
                                         weights_R.typed_data()[r], exponentials.data(), delta + r * V);
      }
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_swiglu_forward, swiglu_forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_swiglu_backward, swiglu_backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(btlm_cross_entropy, cross_entropy,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>().Attr<float>("scale")
                                  .Attr<float>("z_loss").Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::AnyBuffer>());
