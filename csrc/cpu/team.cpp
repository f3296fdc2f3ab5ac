#include "cpu/team.hpp"
#include <system_error>
#include <thread>
#include <vector>
#ifdef __linux__
#include <atomic>
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#endif

namespace tokcredit::cpu {
namespace {

#ifdef __linux__
// The library that torch brought into this process.
struct OpenMp {
  // How GCC calls a parallel region: its function and argument, threads with the caller, flags.
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
};

template <class F> void look_up(void *library, const char *name, F &function) {
  function = reinterpret_cast<F>(dlsym(library, name));
}

int is_torchs(dl_phdr_info *library, size_t, void *out) {
  const char *path = library->dlpi_name, *file = std::strrchr(path, '/');
  if (!file || !std::strstr(file, "libgomp") || !std::strstr(path, "/torch"))
    return 0;
  if (void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) {
    auto *found = static_cast<OpenMp *>(out);
    look_up(handle, "GOMP_parallel", found->parallel);
    look_up(handle, "omp_get_max_threads", found->max_threads);
  }
  return 1;
}

std::atomic<bool> forked{false};
const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

const OpenMp *openmp() {
  static const OpenMp torchs = [] {
    OpenMp found;
    dl_iterate_phdr(is_torchs, &found);
    return found;
  }();
  const bool usable = watches_forks == 0 && !forked && torchs.parallel && torchs.max_threads;
  return usable && torchs.max_threads() > 1 ? &torchs : nullptr;
}
#endif

} // namespace

void run_together(int helpers, void (*work)(void *), void *data) {
#ifdef __linux__
  if (const OpenMp *torchs = openmp())
    return torchs->parallel(work, data, unsigned(helpers) + 1, 0);
#endif
  std::vector<std::thread> threads;
  threads.reserve(helpers);
  try {
    for (int t = 0; t < helpers; ++t)
      threads.emplace_back(work, data);
  } catch (const std::system_error &) {
    // The process may not have more threads: the ones there are do all the work.
  }
  work(data);
  for (auto &thread : threads)
    thread.join();
}

} // namespace tokcredit::cpu
