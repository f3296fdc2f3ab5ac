// In place of csrc/cuda/launch.cuh: a launch runs the grid on the host and returns when it has ended.
#pragma once
#include "ops/device.hpp"
#include <stdexcept>
#include <string>

using cudaStream_t = void *;

namespace tokcredit::cuda {

// The emulated primitives of CUB have nothing to report.
inline void check(int, const char *) {}

inline cudaStream_t stream_of(const Queue &) { return nullptr; }

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <class... Parameters, class... Arguments>
void launch(const char *op, Queue &, void (*kernel)(Parameters...), int64_t blocks, int threads,
            Arguments... arguments) {
  if (blocks <= 0)
    return;
  using Call = std::tuple<void (*)(Parameters...), Parameters...>;
  const Call call{kernel, Parameters(arguments)...};
  const auto body = [](const void *context) {
    std::apply([](auto run, const auto &...parameters) { run(parameters...); },
               *static_cast<const Call *>(context));
  };
  ::emulation::run_grid(op, body, &call, sizeof call, unsigned(blocks), unsigned(threads));
}

inline void clear(const char *, Queue &, void *memory, int64_t bytes) {
  ::emulation::host_clears(memory, size_t(bytes));
}

} // namespace tokcredit::cuda
