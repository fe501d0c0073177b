// Settings, the log of what the device was asked to do, and error messages.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

#include "standin.h"

namespace standin {

namespace {
thread_local std::string recent_error;

int open_log() {
  const char* path = getenv("MS_DIFFSYNTH_STANDIN_LOG");
  if (path == nullptr || *path == 0) return -1;
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) {
    fprintf(stderr, "ms_diffsynth.standin: cannot write the log %s\n", path);
    abort();
  }
  return file;
}

int log_file() {
  static int file = open_log();
  return file;
}
}  // namespace

bool recording() { return log_file() >= 0; }

bool shapes_only() {
  static const char* setting = getenv("MS_DIFFSYNTH_STANDIN_SHAPES_ONLY");
  static bool yes = setting != nullptr && *setting == '1';
  return yes;
}

double device_gib() {
  static const char* setting = getenv("MS_DIFFSYNTH_STANDIN_MEMORY");
  static double gib = setting != nullptr && *setting ? atof(setting) : 64.0;
  return gib;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += static_cast<char>(c);
    } else if (c < 32) {
      char code[8];
      snprintf(code, sizeof code, "\\u%04x", c);
      result += code;
    } else {
      result += static_cast<char>(c);
    }
  }
  return result + "\"";
}

// One write a line, in append mode: threads and processes may share a log, and nothing is lost when one is killed.
void record(const std::string& fields) {
  if (!recording()) return;
  std::string line = "{" + fields + "}\n";
  if (write(log_file(), line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    fprintf(stderr, "ms_diffsynth.standin: the log cannot be written any more\n");
    abort();
  }
}

int fail(int code, const std::string& message) {
  static std::mutex lock;
  static std::set<std::string> told;
  recent_error = message;
  record("\"event\":\"error\",\"text\":" + quoted(message));
  std::lock_guard<std::mutex> guard(lock);
  if (told.insert(message).second) fprintf(stderr, "ms_diffsynth.standin: %s\n", message.c_str());
  return code;
}

}  // namespace standin

EXPORT const char* aclGetRecentErrMsg() { return standin::recent_error.c_str(); }
EXPORT int aclrtGetLastError(int) { return standin::kOk; }

// For the Python side: a mark in the log, and the reason of a failure.
EXPORT void standin_mark(const char* text) {
  standin::record("\"event\":\"mark\",\"text\":" + standin::quoted(text));
}
EXPORT void standin_set_error(const char* message) { standin::fail(standin::kFailure, message); }

// A function that is not there in more than name: it does nothing and says that all is well, as most settings may.
EXPORT long standin_unimplemented(const char* name) {
  standin::record(std::string("\"event\":\"unimplemented\",\"name\":\"") + name + "\"");
  return 0;
}

// The same for a function that moves or computes data: doing nothing would be a wrong result.
EXPORT long standin_refused(const char* name) {
  return standin::fail(standin::kFailure, std::string(name) + " is not implemented by the stand-in: write it in "
                                          "ms_diffsynth/standin/native from its public description");
}
