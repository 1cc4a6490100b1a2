// Threads are torch's: the OpenMP runtime that torch has loaded is handed in, and none is linked here. A second pool
// would spin against the first one on few cores.
#include "common.h"

namespace {
typedef void (*RunTeam)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*Number)();
RunTeam run_team;
Number max_threads, thread_number, team_size, is_inside;

struct Team {
    int parts;
    void (*task)(void*, int);
    void* context;
};

void member(void* opaque) {
    Team& team = *(Team*)opaque;
    for (int part = thread_number(); part < team.parts; part += team_size()) team.task(team.context, part);
}
}  // namespace

EXPORT void deltaw_use_threads(void* gomp_parallel, void* omp_get_max_threads, void* omp_get_thread_num,
                               void* omp_get_num_threads, void* omp_in_parallel) {
    run_team = (RunTeam)gomp_parallel;
    max_threads = (Number)omp_get_max_threads;
    thread_number = (Number)omp_get_thread_num;
    team_size = (Number)omp_get_num_threads;
    is_inside = (Number)omp_in_parallel;
}

int num_threads() { return run_team == nullptr || is_inside() ? 1 : max_threads(); }

void run_parallel(int parts, void (*task)(void*, int), void* context) {
    if (parts <= 1 || num_threads() == 1) {
        for (int part = 0; part < parts; part++) task(context, part);
        return;
    }
    Team team{parts, task, context};
    run_team(member, &team, (unsigned)parts, 0);
}
