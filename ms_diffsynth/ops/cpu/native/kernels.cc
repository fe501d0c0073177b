// The CPU kernels of ms_diffsynth: products and convolutions by MindSpore's oneDNN, everything else in plain loops that
// the compiler makes vectors of (`#pragma omp simd`, so no -ffast-math). Tensors are float32 and contiguous. An output
// does not depend on the number of threads: work is cut into fixed pieces, and their sums are added in order.
//
// A kernel is called by MindSpore's ops.Custom with pointers to its inputs and then its outputs; its comment says which
// ones. Built by ../build.py beside this folder.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "onednn.h"

using namespace msd;

#define SIMD _Pragma("omp simd")
#define SIMD_SUM(...) _Pragma(SIMD_TEXT(omp simd reduction(+ : __VA_ARGS__)))
#define SIMD_MAX(x) _Pragma(SIMD_TEXT(omp simd reduction(max : x)))
#define SIMD_TEXT(...) #__VA_ARGS__
#define KERNEL(name)                                                                                                 \
  static void name##_body(const Arguments &a);                                                                       \
  extern "C" __attribute__((visibility("default"))) int name(int count, void **params, int *ndims, int64_t **shapes, \
                                                             const char **dtypes, void *, void *) {                  \
    return guarded([&] {                                                                                             \
      check_dtypes(count, dtypes);                                                                                   \
      name##_body({count, params, ndims, shapes});                                                                   \
    });                                                                                                              \
  }                                                                                                                  \
  static void name##_body(const Arguments &a)

namespace {

struct Arguments {
  int count;
  void **params;
  int *ndims;
  int64_t **shapes;
  float *operator[](int i) const { return static_cast<float *>(params[i]); }
  int64_t dim(int i, int axis) const { return shapes[i][axis < 0 ? ndims[i] + axis : axis]; }
  Dims dims(int i) const { return Dims(shapes[i], shapes[i] + ndims[i]); }
  int64_t size(int i) const {
    int64_t n = 1;
    for (int a = 0; a < ndims[i]; a++) n *= shapes[i][a];
    return n;
  }
};

void check_dtypes(int count, const char **dtypes) {
  for (int i = 0; i < count; i++)
    if (std::strcmp(dtypes[i], "float32")) throw std::runtime_error(std::string(dtypes[i]) + ": expected float32");
}

// e^x to 2 units in the last place: 0 below -87.3, e^88 above 88, NaN stays NaN
inline float fast_exp(float x) {
  float c = x < -87.33654f ? -87.33654f : x;
  c = c > 88.0f ? 88.0f : c;
  const float shifted = c * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // rounds; n is in the low bits
  const float r = (c - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.33654f ? 0.0f : p * power;
}
// A float as an integer of the same order, and back: clang makes vectors of the largest of integers, of floats none.
inline int32_t to_ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 & INT32_MAX);
}
inline float from_ordered(int32_t bits) {
  bits ^= bits >> 31 & INT32_MAX;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
// The share of a normal distribution below x, (1 + erf(x / sqrt 2)) / 2, to 2e-7; erf by the rational function of Eigen
// and XLA, which is 1 from 4 on. NaN stays NaN.
inline float normal_share(float x) {
  float z = x * 0.707106781f;
  z = z < -4.0f ? -4.0f : z;
  z = z > 4.0f ? 4.0f : z;
  const float q = z * z;
  float above = -2.72614225801306e-10f;
  above = above * q + 2.77068142495902e-8f;
  above = above * q - 2.10102402082508e-6f;
  above = above * q - 5.69250639462346e-5f;
  above = above * q - 7.34990630326855e-4f;
  above = above * q - 2.95459980854025e-3f;
  above = above * q - 1.60960333262415e-2f;
  float below = -1.45660718464996e-5f;
  below = below * q - 2.13374055278905e-4f;
  below = below * q - 1.68282697438203e-3f;
  below = below * q - 7.37332916720468e-3f;
  below = below * q - 1.42647390514189e-2f;
  return 0.5f + 0.5f * z * above / below;
}

constexpr int64_t ROWS = 32;       // rows of a task: fixed, because partial sums are added in their order
constexpr int64_t CHUNK = 1 << 14;  // elements of a task that is element by element

template <typename F>
void chunks(int64_t n, int64_t chunk, F &&function) {
  parallel((n + chunk - 1) / chunk, [&](int64_t task, int) {
    function(task * chunk, std::min(n, (task + 1) * chunk));
  });
}

inline float dot(const float *x, const float *y, int64_t n) {
  float s = 0;
  SIMD_SUM(s) for (int64_t i = 0; i < n; i++) s += x[i] * y[i];
  return s;
}

// partial sums [parts][outs][n] -> each out [n], in order of the parts
inline void add_partial(const float *partial, int64_t parts, int64_t n, std::initializer_list<float *> outs) {
  int64_t from = 0;
  for (float *out : outs) {
    for (int64_t c = 0; c < n; c++) out[c] = 0;
    for (int64_t i = 0; i < parts; i++)
      SIMD for (int64_t c = 0; c < n; c++) out[c] += partial[i * n * outs.size() + from + c];
    from += n;
  }
}

}  // namespace

// ---- linear maps ----

// x [m, k], w [n, k], maybe bias [n] -> y [m, n]
KERNEL(linear_forward) {
  const int64_t k = a.dim(0, -1), n = a.dim(1, 0), m = a.size(0) / k;
  const bool has_bias = a.count == 4;
  float *y = a[a.count - 1];
  if (has_bias)
    chunks(m, ROWS, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) std::memcpy(y + i * n, a[2], n * sizeof(float));
    });
  gemm('N', 'T', m, n, k, a[0], k, a[1], k, y, n, has_bias);
}
// dy [m, n], w [n, k] -> dx [m, k]
KERNEL(linear_backward_x) {
  const int64_t n = a.dim(1, 0), k = a.dim(1, 1);
  gemm('N', 'N', a.size(0) / n, k, n, a[0], n, a[1], k, a[2], k, false);
}
// dy [m, n], x [m, k] -> dw [n, k]
KERNEL(linear_backward_w) {
  const int64_t n = a.dim(0, -1), k = a.dim(1, -1), m = a.size(0) / n;
  gemm('T', 'N', n, k, m, a[0], n, a[1], k, a[2], k, false);
}
// dy [m, n] -> dbias [n]
KERNEL(linear_backward_b) {
  const int64_t n = a.dim(0, -1), m = a.size(0) / n;
  chunks(n, 128, [&](int64_t first, int64_t last) {
    std::memset(a[1] + first, 0, (last - first) * sizeof(float));
    for (int64_t i = 0; i < m; i++)
      SIMD for (int64_t j = first; j < last; j++) a[1][j] += a[0][i * n + j];
  });
}
// y [m, n], x [m, k], down [k, r], up [r, n] -> y + x down up [m, n], x down [m, r]
KERNEL(low_rank_forward) {
  const int64_t k = a.dim(2, 0), r = a.dim(2, 1), n = a.dim(3, 1), m = a.size(1) / k;
  gemm('N', 'N', m, r, k, a[1], k, a[2], r, a[5], r, false);
  chunks(m * n, CHUNK, [&](int64_t first, int64_t last) {
    std::memcpy(a[4] + first, a[0] + first, (last - first) * sizeof(float));
  });
  gemm('N', 'N', m, n, r, a[5], r, a[3], n, a[4], n, true);
}
// dy [m, n], x [m, k], x down [m, r], down [k, r], up [r, n] -> dx, ddown, dup
KERNEL(low_rank_backward) {
  const int64_t k = a.dim(3, 0), r = a.dim(3, 1), n = a.dim(4, 1), m = a.size(1) / k;
  std::vector<float> through(m * r);
  gemm('N', 'T', m, r, n, a[0], n, a[4], n, through.data(), r, false);
  gemm('N', 'T', m, k, r, through.data(), r, a[3], r, a[5], k, false);
  gemm('T', 'N', k, r, m, a[1], k, through.data(), r, a[6], r, false);
  gemm('T', 'N', r, n, m, a[2], r, a[0], n, a[7], n, false);
}

// ---- element by element ----

constexpr float GELU_LINEAR = 1.5957691216057308f, GELU_CUBIC = 0.044715f * 1.5957691216057308f;

KERNEL(gelu_forward) {
  const float *x = a[0];
  float *y = a[1];
  chunks(a.size(0), CHUNK, [&](int64_t first, int64_t last) {
    SIMD for (int64_t i = first; i < last; i++)
      y[i] = x[i] * sigmoid(x[i] * (GELU_LINEAR + GELU_CUBIC * x[i] * x[i]));
  });
}
// dy, x -> dx
KERNEL(gelu_backward) {
  const float *dy = a[0], *in = a[1];
  float *dx = a[2];
  chunks(a.size(0), CHUNK, [&](int64_t first, int64_t last) {
    SIMD for (int64_t i = first; i < last; i++) {
      const float x = in[i], gate = sigmoid(x * (GELU_LINEAR + GELU_CUBIC * x * x));
      dx[i] = dy[i] * gate * (1.0f + x * (GELU_LINEAR + 3 * GELU_CUBIC * x * x) * (1.0f - gate));
    }
  });
}
KERNEL(silu_forward) {
  const float *x = a[0];
  float *y = a[1];
  chunks(a.size(0), CHUNK, [&](int64_t first, int64_t last) {
    SIMD for (int64_t i = first; i < last; i++) y[i] = x[i] * sigmoid(x[i]);
  });
}
// dy, x -> dx
KERNEL(silu_backward) {
  const float *dy = a[0], *x = a[1];
  float *dx = a[2];
  chunks(a.size(0), CHUNK, [&](int64_t first, int64_t last) {
    SIMD for (int64_t i = first; i < last; i++) {
      const float gate = sigmoid(x[i]);
      dx[i] = dy[i] * gate * (1.0f + x[i] * (1.0f - gate));
    }
  });
}
// x [..., 2 d] -> silu(first half) second half [..., d]
KERNEL(swiglu_forward) {
  const int64_t d = a.dim(1, -1);
  chunks(a.size(1) / d, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *gate = a[0] + row * 2 * d, *x = gate + d;
      float *y = a[1] + row * d;
      SIMD for (int64_t c = 0; c < d; c++) y[c] = gate[c] * sigmoid(gate[c]) * x[c];
    }
  });
}
// dy [..., d], x [..., 2 d] -> dx [..., 2 d]
KERNEL(swiglu_backward) {
  const int64_t d = a.dim(0, -1);
  chunks(a.size(0) / d, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *dy = a[0] + row * d, *gate = a[1] + row * 2 * d, *x = gate + d;
      float *dgate = a[2] + row * 2 * d, *dx = dgate + d;
      SIMD for (int64_t c = 0; c < d; c++) {
        const float s = sigmoid(gate[c]);
        dx[c] = dy[c] * gate[c] * s;
        dgate[c] = dy[c] * x[c] * s * (1.0f + gate[c] * (1.0f - s));
      }
    }
  });
}
// x [..., 2 d] -> first half gelu(second half) [..., d], with the exact GELU
KERNEL(geglu_forward) {
  const int64_t d = a.dim(1, -1);
  chunks(a.size(1) / d, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *x = a[0] + row * 2 * d, *gate = x + d;
      float *y = a[1] + row * d;
      SIMD for (int64_t c = 0; c < d; c++) y[c] = x[c] * gate[c] * normal_share(gate[c]);
    }
  });
}
// dy [..., d], x [..., 2 d] -> dx [..., 2 d]
KERNEL(geglu_backward) {
  const int64_t d = a.dim(0, -1);
  chunks(a.size(0) / d, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *dy = a[0] + row * d, *x = a[1] + row * 2 * d, *gate = x + d;
      float *dx = a[2] + row * 2 * d, *dgate = dx + d;
      SIMD for (int64_t c = 0; c < d; c++) {
        const float share = normal_share(gate[c]), density = 0.398942280f * fast_exp(-0.5f * gate[c] * gate[c]);
        dx[c] = dy[c] * gate[c] * share;
        dgate[c] = dy[c] * x[c] * (share + gate[c] * density);
      }
    }
  });
}
// gate, x -> silu(gate) x
KERNEL(gated_silu_forward) {
  const float *gate = a[0], *x = a[1];
  float *y = a[2];
  chunks(a.size(0), CHUNK, [&](int64_t first, int64_t last) {
    SIMD for (int64_t i = first; i < last; i++) y[i] = gate[i] * sigmoid(gate[i]) * x[i];
  });
}
// dy, gate, x -> dgate, dx
KERNEL(gated_silu_backward) {
  const float *dy = a[0], *gate = a[1], *x = a[2];
  float *dgate = a[3], *dx = a[4];
  chunks(a.size(0), CHUNK, [&](int64_t first, int64_t last) {
    SIMD for (int64_t i = first; i < last; i++) {
      const float s = sigmoid(gate[i]);
      dx[i] = dy[i] * gate[i] * s;
      dgate[i] = dy[i] * x[i] * s * (1.0f + gate[i] * (1.0f - s));
    }
  });
}

// ---- normalisation, modulation, gates ----

// x [b, s, d], scale [b, d], shift [b, d], eps [1] -> y [b, s, d], mean and 1 / deviation [b, s, 2]
KERNEL(layer_norm_modulate_forward) {
  const int64_t tokens = a.dim(0, 1), d = a.dim(0, 2);
  chunks(a.dim(0, 0) * tokens, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *x = a[0] + row * d, *scale = a[1] + row / tokens * d, *shift = a[2] + row / tokens * d;
      float *y = a[4] + row * d, s = 0, q = 0;
      SIMD_SUM(s) for (int64_t c = 0; c < d; c++) s += x[c];
      const float mean = s / d;
      SIMD_SUM(q) for (int64_t c = 0; c < d; c++) q += (x[c] - mean) * (x[c] - mean);
      const float rstd = 1.0f / std::sqrt(q / d + a[3][0]);
      SIMD for (int64_t c = 0; c < d; c++) y[c] = (x[c] - mean) * rstd * (1.0f + scale[c]) + shift[c];
      a[5][2 * row] = mean;
      a[5][2 * row + 1] = rstd;
    }
  });
}
// dy, x [b, s, d], scale [b, d], statistics [b, s, 2] -> dx [b, s, d], dscale [b, d], dshift [b, d]
KERNEL(layer_norm_modulate_backward) {
  const int64_t tokens = a.dim(0, 1), d = a.dim(0, 2), parts = (tokens + ROWS - 1) / ROWS;
  std::vector<float> partial(a.dim(0, 0) * parts * 2 * d);
  parallel(a.dim(0, 0) * parts, [&](int64_t task, int) {
    const int64_t sample = task / parts, first = task % parts * ROWS, last = std::min(tokens, first + ROWS);
    float *dscale = partial.data() + task * 2 * d, *dshift = dscale + d;
    const float *scale = a[2] + sample * d;
    for (int64_t row = sample * tokens + first; row < sample * tokens + last; row++) {
      const float *dy = a[0] + row * d, *x = a[1] + row * d, mean = a[3][2 * row], rstd = a[3][2 * row + 1];
      float *dx = a[4] + row * d, s = 0, q = 0;
      SIMD_SUM(s, q) for (int64_t c = 0; c < d; c++) {
        const float normal = (x[c] - mean) * rstd, g = dy[c] * (1.0f + scale[c]);
        s += g;
        q += g * normal;
        dscale[c] += dy[c] * normal;
        dshift[c] += dy[c];
      }
      s /= d, q /= d;
      SIMD for (int64_t c = 0; c < d; c++)
        dx[c] = (dy[c] * (1.0f + scale[c]) - s - (x[c] - mean) * rstd * q) * rstd;
    }
  });
  for (int64_t sample = 0; sample < a.dim(0, 0); sample++)
    add_partial(partial.data() + sample * parts * 2 * d, parts, d, {a[5] + sample * d, a[6] + sample * d});
}
// residual [b, s, d], gate [b, d], x [b, s, d] -> residual + gate x
KERNEL(gate_add_forward) {
  const int64_t tokens = a.dim(0, 1), d = a.dim(0, 2);
  chunks(a.dim(0, 0) * tokens, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *r = a[0] + row * d, *gate = a[1] + row / tokens * d, *x = a[2] + row * d;
      float *y = a[3] + row * d;
      SIMD for (int64_t c = 0; c < d; c++) y[c] = r[c] + gate[c] * x[c];
    }
  });
}
// dy [b, s, d], gate [b, d], x [b, s, d] -> dx [b, s, d], dgate [b, d]
KERNEL(gate_add_backward) {
  const int64_t tokens = a.dim(0, 1), d = a.dim(0, 2), parts = (tokens + ROWS - 1) / ROWS;
  std::vector<float> partial(a.dim(0, 0) * parts * d);
  parallel(a.dim(0, 0) * parts, [&](int64_t task, int) {
    const int64_t sample = task / parts, first = task % parts * ROWS, last = std::min(tokens, first + ROWS);
    const float *gate = a[1] + sample * d;
    float *total = partial.data() + task * d;
    for (int64_t row = sample * tokens + first; row < sample * tokens + last; row++) {
      const float *dy = a[0] + row * d, *x = a[2] + row * d;
      float *dx = a[3] + row * d;
      SIMD for (int64_t c = 0; c < d; c++) {
        dx[c] = dy[c] * gate[c];
        total[c] += dy[c] * x[c];
      }
    }
  });
  for (int64_t sample = 0; sample < a.dim(0, 0); sample++)
    add_partial(partial.data() + sample * parts * d, parts, d, {a[4] + sample * d});
}
// x [..., d], weight [d] or of each sample [b, d], eps [1] -> y [..., d]
KERNEL(rms_norm_forward) {
  const int64_t d = a.dim(1, -1), rows = a.size(0) / d, tokens = rows * d / a.size(1);
  const float eps = a[2][0];
  chunks(rows, 8 * ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *x = a[0] + row * d, *w = a[1] + row / tokens * d, rstd = 1.0f / std::sqrt(dot(x, x, d) / d + eps);
      float *y = a[3] + row * d;
      SIMD for (int64_t c = 0; c < d; c++) y[c] = x[c] * rstd * w[c];
    }
  });
}
// dy, x [..., d], weight [d] or [b, d], eps [1] -> dx [..., d], dweight as weight
KERNEL(rms_norm_backward) {
  const int64_t d = a.dim(2, -1), samples = a.size(2) / d, tokens = a.size(0) / a.size(2);
  const int64_t each = 8 * ROWS, parts = (tokens + each - 1) / each;
  const float eps = a[3][0];
  std::vector<float> partial(samples * parts * d);
  parallel(samples * parts, [&](int64_t task, int) {
    const int64_t sample = task / parts, first = task % parts * each, last = std::min(tokens, first + each);
    const float *w = a[2] + sample * d;
    float *dw = partial.data() + task * d;
    for (int64_t row = sample * tokens + first; row < sample * tokens + last; row++) {
      const float *dy = a[0] + row * d, *x = a[1] + row * d, rstd = 1.0f / std::sqrt(dot(x, x, d) / d + eps);
      float *dx = a[4] + row * d, slope = 0;
      SIMD_SUM(slope) for (int64_t c = 0; c < d; c++) {
        dw[c] += dy[c] * x[c] * rstd;
        slope += dy[c] * x[c] * w[c];
      }
      slope *= rstd * rstd * rstd / d;
      SIMD for (int64_t c = 0; c < d; c++) dx[c] = dy[c] * w[c] * rstd - x[c] * slope;
    }
  });
  for (int64_t sample = 0; sample < samples; sample++)
    add_partial(partial.data() + sample * parts * d, parts, d, {a[5] + sample * d});
}

namespace {

// What norm_rotate is called with from parameter `at` on: n tensors [b, s, h, d], whose tokens follow each other, a
// weight [d] for each, cos and sin [1 or b, all s, d], eps [1].
struct Normed {
  const Arguments &a;
  int at, n;
  int64_t heads() const { return a.dim(at, 2); }
  int64_t size() const { return a.dim(at, 3); }
  int64_t tokens() const { return a.dim(at + 2 * n, 1); }
  int64_t rows() const { return a.dim(at, 0) * tokens(); }
  const float *angles(int which, int64_t row) const {
    return a[at + 2 * n + which] + row % (a.dim(at + 2 * n, 0) * tokens()) * size();
  }
  const float *weight(int tensor) const { return a[at + n + tensor]; }
  float eps() const { return a[at + 2 * n + 2][0]; }
  // of a row of all: its tensor, and where its heads begin there
  int tensor(int64_t row) const { return n == 2 && row % tokens() >= a.dim(at, 1); }
  int64_t place(int64_t row) const {
    const int i = tensor(row);
    const int64_t token = row % tokens() - (i ? a.dim(at, 1) : 0);
    return (row / tokens() * a.dim(at + i, 1) + token) * heads() * size();
  }
};

}  // namespace

// Those parameters -> y [b, all s, h, d]: rotate(rms_norm(x) weight)
KERNEL(norm_rotate_forward) {
  const Normed it{a, 0, (a.count - 4) / 2};
  const int64_t d = it.size(), heads = it.heads();
  chunks(it.rows(), ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const int i = it.tensor(row);
      const float *x = a[i] + it.place(row), *w = it.weight(i), *cosine = it.angles(0, row), *sine = it.angles(1, row);
      float *y = a[a.count - 1] + row * heads * d;
      for (int64_t h = 0; h < heads; h++, x += d, y += d) {
        const float rstd = 1.0f / std::sqrt(dot(x, x, d) / d + it.eps());
        SIMD for (int64_t c = 0; c < d; c += 2) {
          const float even = x[c] * rstd * w[c], odd = x[c + 1] * rstd * w[c + 1];
          y[c] = even * cosine[c] - odd * sine[c];
          y[c + 1] = odd * cosine[c + 1] + even * sine[c + 1];
        }
      }
    }
  });
}
// dy, those parameters -> dx of each, dweight of each
KERNEL(norm_rotate_backward) {
  const Normed it{a, 1, (a.count - 4) / 4};
  const int n = it.n, dx0 = a.count - 2 * n;
  const int64_t d = it.size(), heads = it.heads(), parts = (it.rows() + ROWS - 1) / ROWS;
  std::vector<float> partial(parts * n * d);
  parallel(parts, [&](int64_t task, int) {
    static thread_local Scratch memory;
    float *turned = memory.need(d);
    for (int64_t row = task * ROWS; row < std::min(it.rows(), (task + 1) * ROWS); row++) {
      const int i = it.tensor(row);
      const int64_t place = it.place(row);
      const float *dy = a[0] + row * heads * d, *cosine = it.angles(0, row), *sine = it.angles(1, row);
      const float *x = a[1 + i] + place, *w = it.weight(i);
      float *dx = a[dx0 + i] + place, *dw = partial.data() + (task * n + i) * d;
      for (int64_t h = 0; h < heads; h++, dy += d, x += d, dx += d) {
        SIMD for (int64_t c = 0; c < d; c += 2) {
          turned[c] = dy[c] * cosine[c] + dy[c + 1] * sine[c + 1];
          turned[c + 1] = dy[c + 1] * cosine[c + 1] - dy[c] * sine[c];
        }
        const float rstd = 1.0f / std::sqrt(dot(x, x, d) / d + it.eps());
        float slope = 0;
        SIMD_SUM(slope) for (int64_t c = 0; c < d; c++) {
          dw[c] += turned[c] * x[c] * rstd;
          slope += turned[c] * x[c] * w[c];
        }
        slope *= rstd * rstd * rstd / d;
        SIMD for (int64_t c = 0; c < d; c++) dx[c] = turned[c] * w[c] * rstd - x[c] * slope;
      }
    }
  });
  if (n == 1)
    add_partial(partial.data(), parts, d, {a[dx0 + 1]});
  else
    add_partial(partial.data(), parts, d, {a[dx0 + 2], a[dx0 + 3]});
}
// Pairs of channels, turned. x [b, s, h, d], cos and sin [1 or b, s, d] -> y [b, s, h, d]
KERNEL(rotate_forward) {
  const int64_t tokens = a.dim(0, 1), heads = a.dim(0, 2), d = a.dim(0, 3), rows = a.dim(1, 0) * tokens;
  chunks(a.dim(0, 0) * tokens, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *cosine = a[1] + row % rows * d, *sine = a[2] + row % rows * d;
      for (int64_t h = row * heads; h < (row + 1) * heads; h++) {
        const float *x = a[0] + h * d;
        float *y = a[3] + h * d;
        SIMD for (int64_t c = 0; c < d; c += 2) {
          y[c] = x[c] * cosine[c] - x[c + 1] * sine[c];
          y[c + 1] = x[c + 1] * cosine[c + 1] + x[c] * sine[c + 1];
        }
      }
    }
  });
}
// dy, cos, sin -> dx
KERNEL(rotate_backward) {
  const int64_t tokens = a.dim(0, 1), heads = a.dim(0, 2), d = a.dim(0, 3), rows = a.dim(1, 0) * tokens;
  chunks(a.dim(0, 0) * tokens, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *cosine = a[1] + row % rows * d, *sine = a[2] + row % rows * d;
      for (int64_t h = row * heads; h < (row + 1) * heads; h++) {
        const float *dy = a[0] + h * d;
        float *dx = a[3] + h * d;
        SIMD for (int64_t c = 0; c < d; c += 2) {
          dx[c] = dy[c] * cosine[c] + dy[c + 1] * sine[c + 1];
          dx[c + 1] = dy[c + 1] * cosine[c + 1] - dy[c] * sine[c];
        }
      }
    }
  });
}

#include "attention.inc"
#include "optimizer.inc"
#include "spatial.inc"
