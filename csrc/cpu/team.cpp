#include "cpu/team.hpp"
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace tokcredit::cpu {
namespace {

#ifdef __linux__
// The OpenMP library of the torch in this process.
struct OpenMp {
  // How compilers call a parallel region: its function and argument, threads with the caller, flags.
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;

  OpenMp() {
    if (void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
      parallel = reinterpret_cast<decltype(parallel)>(dlsym(torch, "GOMP_parallel"));
      max_threads = reinterpret_cast<decltype(max_threads)>(dlsym(torch, "omp_get_max_threads"));
    }
  }
};

std::atomic<bool> forked{false};
const bool watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;

struct Part {
  void (*work)(void *);
  void *data;
  std::atomic<int> wanted;
};

// In all threads that torch computes with, because a smaller team would end the others: those not wanted
// return.
bool run_in_threads_of_torch(int helpers, void (*work)(void *), void *data) {
  if (forked || !watches_forks)
    return false;
  static const OpenMp openmp;
  const int threads = openmp.parallel && openmp.max_threads ? openmp.max_threads() : 1;
  if (threads <= helpers)
    return false;
  Part part{work, data, {helpers + 1}};
  openmp.parallel(
      [](void *shared) {
        Part &p = *static_cast<Part *>(shared);
        if (p.wanted.fetch_sub(1) > 0)
          p.work(p.data);
      },
      &part, unsigned(threads), 0);
  return true;
}
#endif

} // namespace

void run_together(int helpers, void (*work)(void *), void *data) {
#ifdef __linux__
  if (run_in_threads_of_torch(helpers, work, data))
    return;
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
