// Threads for one call.
#pragma once

namespace tokcredit::cpu {

// Calls work(data) on the caller and on up to `helpers` other threads, and returns when all of them have.
// `work` does not throw.
//
// Where torch computes with several threads of GCC's OpenMP library they are those: they go on watching for
// work for milliseconds after an operation of torch, and would hold the cores that other threads need. Else
// they are started for this call, as in a forked process, which has none of the threads that its parent's
// library remembers.
void run_together(int helpers, void (*work)(void *), void *data);

} // namespace tokcredit::cpu
