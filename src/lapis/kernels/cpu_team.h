// Where the threads of a team meet. A replayed step has hundreds of meetings, and libgomp's barrier sends threads to
// sleep at once as soon as the process has more threads than cores (an engine beside whatever else used OpenMP): then
// a step took 10 ms instead of 6. So a replay brings its own meeting point; all other regions use the library's.
#ifndef LAPIS_CPU_TEAM_H
#define LAPIS_CPU_TEAM_H

#include <sched.h>
#include <stdatomic.h>

#define PATIENCE 4000  // looks before a waiting thread lets others run: some tens of microseconds

struct meeting {
    int threads;
    _Atomic int arrived;
    _Atomic unsigned round;
};

extern __thread struct meeting *team_meeting;  // of the replay that this thread works for, else NULL

static inline void team_barrier(void) {
    struct meeting *meeting = team_meeting;
    if (!meeting) {
#pragma omp barrier
        return;
    }
    const unsigned round = atomic_load_explicit(&meeting->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&meeting->arrived, 1, memory_order_acq_rel) + 1 == meeting->threads) {
        atomic_store_explicit(&meeting->arrived, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&meeting->round, 1, memory_order_release);
        return;
    }
    for (int looks = 0; atomic_load_explicit(&meeting->round, memory_order_acquire) == round; looks++) {
        if (looks >= PATIENCE) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#elif defined(__aarch64__)
        else __asm__ volatile("yield");
#endif
    }
}

#endif
