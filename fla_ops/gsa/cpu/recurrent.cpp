// gsa on a CPU, step by step, in float32: both states of a head in place, each read and written once for all query
// heads of a group. A decode step is one step of it, with the pools' rows as states.
//
//     A <- A diag(exp g) + k s^T,  p = softmax(scale A^T q),  C <- diag(exp g) C + s v^T,  o = C^T p

#include "gsa/cpu/softmax.h"

namespace {

// The arguments, as cpp_recurrent.py passes them. `heads` are those of the states; pointers may be null.
struct Call : Walks {
    int64_t M, group;
    Steps q, k, v, s, g, o;
    Steps state_k, state_v;  // [P, H, K, M] and [P, H, M, V]: their rows are what steps are elsewhere
};

constexpr int ROWS = 4;   // of a state that advance together, with one sum of what is read
constexpr int AHEAD = 8;  // rows fetched before their turn: the processor's own prefetching ends at each page

// The decay of each number of a row of A, and of all numbers of a row of C.
struct Each {
    const float* of;
    float at(int, int j) const { return of[j]; }
};
struct Same {
    const float* of;
    float at(int i, int) const { return of[i]; }
};

// rows <- decay rows + weight given, for some rows of a state; the first query reads them: out += from^T rows. With
// KEEP the others will: the rows are left in `now`, not rounded to T. Every operation is spelled out, so that all
// numbers of rows give the same bits.
template <int ROWS, bool KEEP, class T, class Stride, class Decay>
void advance(T* __restrict state, int64_t row, Stride column, Decay decay, const float* weight,
             const float* __restrict given, const float* from, float* __restrict out, Matrix now, int width) {
    float* __restrict kept = now.at;
#pragma GCC ivdep
    for (int j = 0; j < width; j++) {
        float sum = out[j];
        for (int i = 0; i < ROWS; i++) {
            T& number = state[i * row + j * column];
            const float next = std::fma(decay.at(i, j), float(number), weight[i] * given[j]);
            number = next;
            sum = std::fma(from[i], next, sum);
            if (KEEP) kept[i * now.distance + j] = next;
        }
        out[j] = sum;
    }
}

// One thread, with a step's vectors.
struct Worker {
    const Call& c;
    const int K, V, M, group;
    Matrix q, k, v, s, decay, now, x, o;

    Worker(const Call& c, Space& space)
        : c(c),
          K(int(c.K)),
          V(int(c.V)),
          M(int(c.M)),
          group(int(c.group)),
          q(space.matrix(group, K)),
          k(space.matrix(1, K)),
          v(space.matrix(1, V)),
          s(space.matrix(1, M)),
          decay(space.matrix(1, M)),
          now(space.matrix(ROWS, std::max(M, V))),
          x(space.matrix(group, M)),
          o(space.matrix(group, V)) {}

    void load(const Walk& w, int64_t t) {
        for (int n = 0; n < group; n++)
            c.q.load_row(w.batch, t, w.head * group + n, K, q[n], float(c.scale));
        c.k.load_row(w.batch, t, w.head, K, k.at);
        c.v.load_row(w.batch, t, w.head, V, v.at);
        c.s.load_row(w.batch, t, w.head, M, s.at);
        c.g.load_row(w.batch, t, w.head, M, decay.at);
        for (int m = 0; m < padded(M); m += LANES) write(decay.at + m, exp(read(decay.at + m)));
    }

    // Advances all rows of a state, and reads them for each query head: out = from^T state.
    template <class Decay>
    void pass(const Steps& states, int64_t slot, const Walk& w, const float* weights, Matrix given, Matrix from,
              Matrix out, int rows, int width) {
        const bool cached = w.steps > 1;
        for (int n = 0; n < group; n++) std::fill(out[n], out[n] + padded(width), 0.f);
        states.row(slot, 0, w.head, [&](auto* state, auto column) {
            int i = 0;
            auto advance_some = [&](auto count) {
                constexpr int N = decltype(count)::value;
                auto* at = state + i * states.step;
                const Decay decays{std::is_same_v<Decay, Each> ? decay.at : decay.at + i};
                for (int r = AHEAD; !cached && r < AHEAD + N; r++)
                    for (int j = 0; j < width; j += 64 / int(sizeof(*at)))
                        __builtin_prefetch(at + r * states.step + j * column, 1);
                const float *weight = weights + i, *read = from[0] + i;
                if (group == 1)
                    advance<N, false>(at, states.step, column, decays, weight, given.at, read, out[0], now, width);
                else
                    advance<N, true>(at, states.step, column, decays, weight, given.at, read, out[0], now, width);
                for (int n = 1; n < group; n++) read_rows<N>(from[n] + i, out[n], width);
                i += N;
            };
            while (i + ROWS <= rows) advance_some(std::integral_constant<int, ROWS>());
            while (i < rows) advance_some(std::integral_constant<int, 1>());
        });
    }

    // out += from^T now, for rows that advance has left there.
    template <int N>
    void read_rows(const float* from, float* out, int width) const {
        for (int j = 0; j < padded(width); j += LANES) {
            Vector sum = read(out + j);
            for (int r = 0; r < N; r++) sum += from[r] * read(now[r] + j);
            write(out + j, sum);
        }
    }

    void step(const Walk& w, int64_t t, int64_t slot) {
        load(w, t);
        pass<Each>(c.state_k, slot, w, k.at, s, q, x, K, M);
        for (int n = 0; n < group; n++) softmax(x[n], M);
        pass<Same>(c.state_v, slot, w, s.at, v, x, o, M, V);
    }

    void walk(const Walk& w) {
        const int64_t slot = c.slots ? c.slots[w.sequence] : w.sequence;
        if (slot < 0) std::fill(o.at, o[group], 0.f);
        for (int64_t i = 0; i < w.steps; i++) {
            if (slot >= 0) step(w, w.at(i), slot);
            for (int n = 0; n < group; n++) c.o.store_row(w.batch, w.at(i), w.head * group + n, V, o[n]);
        }
    }
};

}  // namespace

extern "C" void recurrent_forward(const Call* call) {
    const Call& c = *call;
    Space counted;
    Worker(c, counted);
    with_team(c.threads, [&] {
        FlushDenormals flush;
        Memory memory(counted.used);
        Space space{memory.at};
        Worker worker(c, space);
        share(c.sequences * c.heads, [&](int64_t i) { worker.walk(Walk(c, i)); });
    });
}
