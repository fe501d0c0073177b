// Calls native kernels for a process on another kind of processor. A call is read from standard input: a line
// "name dtype count", with the number of dimensions and the sizes of each of the `count` arrays, then their float32
// values. Written to standard output: a line with the status, then the values of all arrays.
#include <dlfcn.h>

#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

// In place of oneDNN's, with the same arguments
extern "C" int dnnl_threadpool_interop_sgemm(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha,
                                             const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                                             float *c, int64_t ldc, void *) {
  std::vector<double> row(n);
  for (int64_t i = 0; i < m; i++) {
    row.assign(n, 0.0);
    for (int64_t p = 0; p < k; p++) {
      const double x = ta == 'T' ? a[p * lda + i] : a[i * lda + p];
      for (int64_t j = 0; j < n; j++) row[j] += x * (tb == 'T' ? b[j * ldb + p] : b[p * ldb + j]);
    }
    for (int64_t j = 0; j < n; j++) c[i * ldc + j] = alpha * row[j] + (beta == 0 ? 0 : beta * c[i * ldc + j]);
  }
  return 0;
}

int main() {
  using Kernel = int (*)(int, void **, int *, int64_t **, const char **, void *, void *);
  std::string name, dtype;
  for (size_t count; std::cin >> name >> dtype >> count;) {
    std::vector<std::vector<int64_t>> shapes(count);
    std::vector<std::vector<float>> arrays(count);
    std::vector<void *> params;
    std::vector<int> ndims;
    std::vector<int64_t *> sizes;
    for (size_t i = 0; i < count; i++) {
      int64_t n = 1;
      std::cin >> ndims.emplace_back();
      shapes[i].resize(ndims[i]);
      for (int64_t &size : shapes[i]) std::cin >> size, n *= size;
      arrays[i].resize(n);
      params.push_back(arrays[i].data());
      sizes.push_back(shapes[i].data());
    }
    std::cin.get();  // the end of the line
    for (auto &x : arrays) std::cin.read(reinterpret_cast<char *>(x.data()), x.size() * sizeof(float));
    const auto kernel = reinterpret_cast<Kernel>(dlsym(RTLD_DEFAULT, name.c_str()));
    const std::vector<const char *> dtypes(count, dtype.c_str());
    std::cout << (kernel ? kernel(count, params.data(), ndims.data(), sizes.data(),
                                  const_cast<const char **>(dtypes.data()), nullptr, nullptr) : -1) << '\n';
    for (auto &x : arrays) std::cout.write(reinterpret_cast<char *>(x.data()), x.size() * sizeof(float));
    std::cout.flush();
  }
}
