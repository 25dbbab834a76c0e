// Teams of PyTorch's own threads: the functions of the OpenMP runtime that it has loaded, which the library is handed
// when it is opened. A kernel compiled with -fopenmp would bring the compiler's own runtime wherever that is another one, or has
// another name: two pools of threads, each spinning on the cores that the other one needs.

#include <atomic>
#include <cstdint>

namespace {

// GOMP_parallel, GOMP_barrier, omp_get_thread_num and omp_get_num_threads: GCC's interface, which Clang's and Intel's
// runtimes have too. Null where PyTorch has no such runtime; a call then says that it has one thread.
struct Runtime {
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
    void (*barrier)();
    int (*thread)();
    int (*threads)();
} runtime;

// The team that runs a kernel on this thread, and the thread's place in it.
struct Team {
    int64_t thread = 0, threads = 1;
};
thread_local Team team;

// body() on as many threads at once, or fewer where the runtime has no more.
template <class Body>
void with_team(int64_t threads, const Body& body) {
    if (threads <= 1) {
        body();
        return;
    }
    auto member = [](void* data) {
        team = {runtime.thread(), runtime.threads()};
        (*static_cast<const Body*>(data))();
        team = {};
    };
    runtime.parallel(member, const_cast<Body*>(&body), unsigned(threads), 0);
}

// body(i) for all i: in equal parts by the threads of a team.
template <class Body>
void share(int64_t count, Body body) {
    for (int64_t i = count * team.thread / team.threads; i < count * (team.thread + 1) / team.threads; i++) body(i);
}

// Until all threads of the team are here.
inline void meet() {
    if (team.threads > 1) runtime.barrier();
}

// body(i) for the i that no thread of the team has taken from `next`.
template <class Body>
void share_as_they_come(std::atomic<int64_t>& next, int64_t count, Body body) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
}

}  // namespace

extern "C" void use_threads(const Runtime* given) { runtime = *given; }
