#include "cpu/team.hpp"
#include <atomic>
#include <cstdio>
#include <cstring>
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
// What torch calls for its own parallel loops, found where it finds it.
struct Torch {
  // As compilers call a parallel region: its function and argument, threads with the caller, flags.
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*num_threads)() = nullptr; // at::get_num_threads

  Torch() {
    void *library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    for (void *scope : {RTLD_DEFAULT, library})
      if (!parallel && library)
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(scope, "GOMP_parallel"));
    if (library)
      num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(library, "_ZN2at15get_num_threadsEv"));
  }
};

// Whether this process is a copy of another that has run no program since (Linux: PF_FORKNOEXEC).
bool is_copy() {
  unsigned flags = 0;
  if (FILE *file = std::fopen("/proc/self/stat", "r")) {
    char text[512] = {};
    const size_t length = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    if (const char *end = length ? std::strrchr(text, ')') : nullptr)
      std::sscanf(end, ") %*c %*d %*d %*d %*d %*d %u", &flags);
  }
  return flags & 0x40;
}

std::atomic<bool> forked{is_copy()};
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
  static const Torch torch;
  const int threads = torch.parallel && torch.num_threads ? torch.num_threads() : 1;
  if (threads == 1)
    return false;
  Part part{work, data, {helpers + 1}};
  torch.parallel(
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
