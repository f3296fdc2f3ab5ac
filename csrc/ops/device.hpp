// What a CUDA operation runs on: a device, a stream, and scratch memory.
#pragma once
#include <cstdint>

namespace tokcredit::cuda {

// The tensor's device for the length of a call; the caller's is restored afterwards.
class DeviceGuard {
public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
  int previous_; // -1: it was current already
};

// The current stream of the tensor's device, and scratch memory on it. Scratch comes from torch's allocator:
// an operation makes no cudaMalloc and waits for nothing, so it can be captured in a graph. It may be used
// by kernels launched on the stream until the call returns.
class Queue {
public:
  explicit Queue(void *stream) : stream_(stream) {}
  virtual void *allocate(int64_t bytes) = 0;
  template <class T> T *allocate_array(int64_t count) {
    return static_cast<T *>(allocate(count * int64_t(sizeof(T))));
  }
  void *stream() const { return stream_; }

protected:
  ~Queue() = default;

private:
  void *stream_;
};

// An array of `count` for allocate_together to place.
template <class T> struct Wanted {
  T *&array;
  int64_t count;

  int64_t bytes() const { return (count * int64_t(sizeof(T)) + 255) / 256 * 256; }
  void place(char *&memory) const {
    array = reinterpret_cast<T *>(memory);
    memory += bytes();
  }
};
template <class T> Wanted(T *&, int64_t) -> Wanted<T>;

// Several arrays in one piece of scratch: an allocation costs the host about as much as a launch.
template <class... T> void allocate_together(Queue &queue, Wanted<T>... wanted) {
  char *memory = static_cast<char *>(queue.allocate((wanted.bytes() + ...)));
  (wanted.place(memory), ...);
}

} // namespace tokcredit::cuda
