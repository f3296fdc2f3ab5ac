// Threads for one call.
#pragma once

namespace tokcredit::cpu {

// Calls work(data) in up to helpers + 1 threads and returns when all have. `work`
// does all that there is to do even where it is called only once, and does not throw.
//
// Where torch computes with several threads of an OpenMP library they are those, and no more than torch has:
// after an operation of torch they go on watching for work for milliseconds, and would hold the cores that
// others need. As in torch, the process ends if the system has no such thread left. Else threads are started
// for this call, or fewer if there are no more; so in a forked process, which has none of the threads that
// its parent's library remembers.
void run_together(int helpers, void (*work)(void *), void *data);

} // namespace tokcredit::cpu
