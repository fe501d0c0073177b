// What is used of oneDNN, the library of MindSpore's own kernels: its C API as declared by the project's headers, which
// the wheel does not ship. Products, of every version (ONEDNN is 2 for the libdnnl.so.2 of MindSpore 2.7 and 2.8, 3 for
// the libdnnl.so.3 since 2.9); convolutions of version 3, as primitives kept by their shapes.
#pragma once
#ifndef ONEDNN
#define ONEDNN 3
#endif
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "pool.h"

extern "C" {
typedef struct dnnl_engine *dnnl_engine_t;
typedef struct dnnl_stream *dnnl_stream_t;
typedef struct dnnl_memory *dnnl_memory_t;
typedef struct dnnl_memory_desc *dnnl_memory_desc_t;
typedef struct dnnl_primitive_desc *dnnl_primitive_desc_t;
typedef struct dnnl_primitive *dnnl_primitive_t;
typedef struct dnnl_primitive_attr *dnnl_primitive_attr_t;
typedef const struct dnnl_memory_desc *const_dnnl_memory_desc_t;
typedef struct { int arg; dnnl_memory_t memory; } dnnl_exec_arg_t;
enum {
  dnnl_cpu = 1,
  dnnl_f32 = 3,
  dnnl_format_tag_any = 1,
  dnnl_forward_training = 64,
  dnnl_convolution_direct = 1,
  dnnl_scratchpad_mode_user = 1
};
enum dnnl_query_t {
  dnnl_query_src_md = 129,
  dnnl_query_diff_src_md,
  dnnl_query_weights_md,
  dnnl_query_diff_weights_md,
  dnnl_query_dst_md,
  dnnl_query_diff_dst_md,
  dnnl_query_scratchpad_md = 136
};
enum {
  DNNL_ARG_FROM = 1,
  DNNL_ARG_SRC = 1,
  DNNL_ARG_TO = 17,
  DNNL_ARG_DST = 17,
  DNNL_ARG_WEIGHTS = 33,
  DNNL_ARG_BIAS = 41,
  DNNL_ARG_SCRATCHPAD = 80,
  DNNL_ARG_DIFF_SRC = 129,
  DNNL_ARG_DIFF_DST = 145,
  DNNL_ARG_DIFF_WEIGHTS = 161,
  DNNL_ARG_DIFF_BIAS = 169
};
int dnnl_threadpool_interop_sgemm(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *,
                                  int64_t, float, float *, int64_t, void *);
int dnnl_threadpool_interop_get_max_concurrency(int *);
int dnnl_threadpool_interop_set_max_concurrency(int);
int dnnl_engine_create(dnnl_engine_t *, int kind, size_t index);
int dnnl_threadpool_interop_stream_create(dnnl_stream_t *, dnnl_engine_t, void *pool);
int dnnl_memory_desc_create_with_strides(dnnl_memory_desc_t *, int, const int64_t *, int type, const int64_t *);
int dnnl_memory_desc_create_with_tag(dnnl_memory_desc_t *, int, const int64_t *, int type, int tag);
int dnnl_memory_desc_equal(const_dnnl_memory_desc_t, const_dnnl_memory_desc_t);
size_t dnnl_memory_desc_get_size(const_dnnl_memory_desc_t);
int dnnl_memory_create(dnnl_memory_t *, const_dnnl_memory_desc_t, dnnl_engine_t, void *);
int dnnl_memory_destroy(dnnl_memory_t);
int dnnl_primitive_attr_create(dnnl_primitive_attr_t *);
int dnnl_primitive_attr_set_scratchpad_mode(dnnl_primitive_attr_t, int);
const_dnnl_memory_desc_t dnnl_primitive_desc_query_md(dnnl_primitive_desc_t, int what, int index);
int dnnl_primitive_create(dnnl_primitive_t *, dnnl_primitive_desc_t);
int dnnl_primitive_execute(dnnl_primitive_t, dnnl_stream_t, int, const dnnl_exec_arg_t *);
int dnnl_reorder_primitive_desc_create(dnnl_primitive_desc_t *, const_dnnl_memory_desc_t, dnnl_engine_t,
                                       const_dnnl_memory_desc_t, dnnl_engine_t, dnnl_primitive_attr_t);
// the four of int64_t: strides, dilations, padding before and after
int dnnl_convolution_forward_primitive_desc_create(
    dnnl_primitive_desc_t *, dnnl_engine_t, int, int, const_dnnl_memory_desc_t, const_dnnl_memory_desc_t,
    const_dnnl_memory_desc_t, const_dnnl_memory_desc_t, const int64_t *, const int64_t *, const int64_t *,
    const int64_t *, dnnl_primitive_attr_t);
int dnnl_convolution_backward_data_primitive_desc_create(
    dnnl_primitive_desc_t *, dnnl_engine_t, int, const_dnnl_memory_desc_t, const_dnnl_memory_desc_t,
    const_dnnl_memory_desc_t, const int64_t *, const int64_t *, const int64_t *, const int64_t *,
    dnnl_primitive_desc_t, dnnl_primitive_attr_t);
int dnnl_convolution_backward_weights_primitive_desc_create(
    dnnl_primitive_desc_t *, dnnl_engine_t, int, const_dnnl_memory_desc_t, const_dnnl_memory_desc_t,
    const_dnnl_memory_desc_t, const_dnnl_memory_desc_t, const int64_t *, const int64_t *, const int64_t *,
    const int64_t *, dnnl_primitive_desc_t, dnnl_primitive_attr_t);
}

namespace dnnl { namespace threadpool_interop {
struct threadpool_iface {  // dnnl_threadpool_iface.hpp: the order of the functions is the interface
  virtual int get_num_threads() const = 0;
  virtual bool get_in_parallel() const = 0;
  virtual void parallel_for(int n, const std::function<void(int, int)> &f) = 0;
  virtual uint64_t get_flags() const = 0;
  virtual ~threadpool_iface() = default;
};
} }

namespace msd {

using Dims = std::vector<int64_t>;
using Desc = dnnl_memory_desc_t;

// Into how many pieces oneDNN may divide its work, whatever the number of threads: sums are added piece by piece.
constexpr int PIECES = 8;

// Our threads, for oneDNN.
struct Threads final : dnnl::threadpool_interop::threadpool_iface {
  static bool &inside() { static thread_local bool in = false; return in; }
  static Threads *get() { static Threads *threads = new Threads(); return threads; }
  int get_num_threads() const override { return PIECES; }
  bool get_in_parallel() const override { return inside(); }
  uint64_t get_flags() const override { return 0; }
  void parallel_for(int n, const std::function<void(int, int)> &f) override {
    parallel(n, [&](int64_t i, int) {
      const bool was = inside();
      inside() = true;
      f(static_cast<int>(i), n);
      inside() = was;
    });
  }
};

inline void check(int status, const char *what) {
  if (status) throw std::runtime_error(std::string(what) + ": status " + std::to_string(status));
}
#define DNN(call) check(call, #call)
template <typename F>
int guarded(F &&kernel) {
  const Flushing flushing;
  try {
    kernel();
    return 0;
  } catch (const std::exception &e) {
    std::fprintf(stderr, "ms_diffsynth: a native CPU kernel: %s\n", e.what());
    return 1;
  }
}

// C [m, n] = A B, plus C if `add`; the leading dimensions are the strides of rows. By all threads, or by this one.
inline void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float *c, int64_t ldc, bool add) {
  DNN(dnnl_threadpool_interop_sgemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, add, c, ldc, Threads::get()));
}
inline void gemm_here(char ta, char tb, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b,
                      int64_t ldb, float *c, int64_t ldc, bool add) {
  DNN(dnnl_threadpool_interop_sgemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, add, c, ldc, nullptr));
}

#if ONEDNN >= 3
inline dnnl_engine_t engine() {
  static dnnl_engine_t e = [] { dnnl_engine_t x; DNN(dnnl_engine_create(&x, dnnl_cpu, 0)); return x; }();
  return e;
}
inline dnnl_stream_t stream() {
  static dnnl_stream_t s = [] {
    dnnl_stream_t x;
    DNN(dnnl_threadpool_interop_stream_create(&x, engine(), Threads::get()));
    return x;
  }();
  return s;
}
inline Desc plain_desc(const Dims &dims) {
  Dims strides(dims.size(), 1);
  for (int i = static_cast<int>(dims.size()) - 2; i >= 0; i--) strides[i] = strides[i + 1] * dims[i + 1];
  Desc d;
  DNN(dnnl_memory_desc_create_with_strides(&d, static_cast<int>(dims.size()), dims.data(), dnnl_f32, strides.data()));
  return d;
}
inline Desc any_desc(const Dims &dims) {
  Desc d;
  DNN(dnnl_memory_desc_create_with_tag(&d, static_cast<int>(dims.size()), dims.data(), dnnl_f32, dnnl_format_tag_any));
  return d;
}
inline dnnl_primitive_attr_t attributes() {  // scratchpads are ours
  dnnl_primitive_attr_t attr;
  DNN(dnnl_primitive_attr_create(&attr));
  DNN(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user));
  return attr;
}
inline float *work(int slot, size_t floats) { static thread_local Scratch memory[4]; return memory[slot].need(floats); }

struct Argument { int what; const_dnnl_memory_desc_t desc; const float *data; };
struct Primitive {
  dnnl_primitive_t it = nullptr;
  dnnl_primitive_desc_t d = nullptr;
  void make(dnnl_primitive_desc_t desc) { d = desc; DNN(dnnl_primitive_create(&it, d)); }
  const_dnnl_memory_desc_t desc(int what) const { return dnnl_primitive_desc_query_md(d, what, 0); }
  void operator()(std::initializer_list<Argument> arguments) const {
    dnnl_exec_arg_t list[8];
    int n = 0;
    auto add = [&](int what, const_dnnl_memory_desc_t desc, const float *data) {
      list[n].arg = what;
      DNN(dnnl_memory_create(&list[n++].memory, desc, engine(), const_cast<float *>(data)));
    };
    for (auto &a : arguments) add(a.what, a.desc, a.data);
    const auto scratch = desc(dnnl_query_scratchpad_md);
    if (const size_t bytes = dnnl_memory_desc_get_size(scratch))
      add(DNNL_ARG_SCRATCHPAD, scratch, work(3, bytes / 4 + 1));
    DNN(dnnl_primitive_execute(it, stream(), n, list));
    while (n) dnnl_memory_destroy(list[--n].memory);
  }
};

// A tensor of ours, plain, and as a primitive wants it.
struct Side {
  const_dnnl_memory_desc_t wanted;
  Desc ours;
  bool same;
  Primitive reorder;
  void make(const Dims &dims, const_dnnl_memory_desc_t want, bool is_input) {
    ours = plain_desc(dims), wanted = want, same = dnnl_memory_desc_equal(ours, want);
    if (same) return;
    dnnl_primitive_desc_t d;
    DNN(dnnl_reorder_primitive_desc_create(&d, is_input ? ours : want, engine(), is_input ? want : ours, engine(),
                                           attributes()));
    reorder.make(d);
  }
  float *place(float *x, int slot) const { return same ? x : work(slot, dnnl_memory_desc_get_size(wanted) / 4); }
  const float *in(float *x, int slot) const {
    float *y = place(x, slot);
    if (!same) reorder({{DNNL_ARG_FROM, ours, x}, {DNNL_ARG_TO, wanted, y}});
    return y;
  }
  void out(float *x, const float *y) const { if (!same) reorder({{DNNL_ARG_FROM, wanted, y}, {DNNL_ARG_TO, ours, x}}); }
};

// One object per key, made at its first use and kept.
template <typename T, typename Make>
const T &cached(const std::vector<Dims> &key, Make &&make) {
  static std::mutex mutex;
  static std::map<std::vector<Dims>, std::unique_ptr<T>> all;
  std::lock_guard<std::mutex> lock(mutex);
  auto &slot = all[key];
  if (!slot) {
    std::unique_ptr<T> made(new T());
    int before;  // a primitive's pieces are those of its making
    DNN(dnnl_threadpool_interop_get_max_concurrency(&before));
    DNN(dnnl_threadpool_interop_set_max_concurrency(PIECES));
    make(*made);
    DNN(dnnl_threadpool_interop_set_max_concurrency(before));
    slot = std::move(made);
  }
  return *slot;
}
#endif

}  // namespace msd
