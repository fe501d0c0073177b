// The way from a kernel to NumPy. A call is one line of JSON with the addresses of its tensors; the functions that
// compute are in ms_diffsynth/standin/compute. The process is a Python that has loaded this library, so the few
// functions of Python's C interface that are needed are found in it, and no header of Python's is.
#include <dlfcn.h>

#include <atomic>

#include "standin.h"

namespace standin {

namespace {
using Compute = int (*)(const char* call);
std::atomic<Compute> installed{nullptr};

template <typename Function>
Function of_python(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// Any thread of MindSpore's may come here, with or without Python's lock.
class PythonLock {
 public:
  PythonLock() : state_(of_python<int (*)()>("PyGILState_Ensure")()) {}
  ~PythonLock() { of_python<void (*)(int)>("PyGILState_Release")(state_); }

 private:
  int state_;
};
}  // namespace

int compute(const std::string& call) {
  if (shapes_only()) return kOk;
  auto alive = of_python<int (*)()>("Py_IsInitialized");
  if (alive == nullptr) return fail(kFailure, "there is no Python in this process to compute with");
  if (alive() == 0) return kOk;  // the interpreter has ended, and so has everybody who could read a result
  if (installed == nullptr) {
    PythonLock lock;
    auto run = of_python<int (*)(const char*, void*)>("PyRun_SimpleStringFlags");
    if (run("import ms_diffsynth.standin.compute as _c; _c.install(); del _c", nullptr) != 0 || installed == nullptr) {
      return fail(kFailure, "ms_diffsynth.standin.compute cannot be imported by this Python (see above): is "
                            "ms_diffsynth installed, or on PYTHONPATH?");
    }
  }
  return installed.load()(call.c_str()) == 0 ? kOk : kFailure;  // ctypes takes Python's lock; it has set the error
}

}  // namespace standin

EXPORT void standin_install(int (*compute)(const char*)) { standin::installed = compute; }
