// Runs a list of recorded calls: what the Python model definition did once for so many rows (replay.py).
//
// Calls whose function has a team body (cpu.c) share one parallel region, in which threads meet at the bodies' barriers
// only; the others run between regions and make their own.
#include "cpu_vector.h"

#ifdef _OPENMP
#include <omp.h>
static int team_size(void) { return omp_get_num_threads(); }
#else
static int team_size(void) { return 1; }
#endif

#define WORDS 24  // integers and pointers of a call
#define REALS 2   // its floats and doubles

struct call {  // mirrored in replay.py
    void (*function)(void);
    int64_t team;         // whether it is a team body
    int64_t word[WORDS];  // in order, unused ones 0
    double real[REALS];   // in order; the bits of a float in the lower half
};

// A function finds its integers and its floats each where they are passed, whatever lies between or behind them: so do the
// calling conventions of System V x86-64 and of AArch64 on Linux. Elsewhere nothing is replayed.
#if (defined(__x86_64__) && !defined(_WIN32)) || (defined(__aarch64__) && defined(__linux__))
#define REPLAYABLE 1
#else
#define REPLAYABLE 0
#endif

typedef void (*any_function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, double, double);

static void make(const struct call *call) {
    const int64_t *w = call->word;
    ((any_function)call->function)(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12],
                                   w[13], w[14], w[15], w[16], w[17], w[18], w[19], w[20], w[21], w[22], w[23],
                                   call->real[0], call->real[1]);
}

__thread struct meeting *team_meeting;

EXPORT int lapis_replayable(void) { return REPLAYABLE; }

EXPORT void lapis_replay(const struct call *calls, int64_t count) {
    for (int64_t first = 0, end; first < count; first = end) {
        for (end = first; end < count && calls[end].team; end++) {}
        if (end == first) {
            make(&calls[end++]);
            continue;
        }
        struct meeting meeting = {0};
#pragma omp parallel
        {
#pragma omp single
            meeting.threads = team_size();
            const uint64_t mode = flush_subnormals();
            team_meeting = &meeting;
            for (int64_t i = first; i < end; i++) make(&calls[i]);
            team_meeting = NULL;
            restore_mode(mode);
        }
    }
}
