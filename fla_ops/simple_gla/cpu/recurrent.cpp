// simple_gla on a CPU, step by step, in float32: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.
//
// One pass over the state per step, so a decode step moves the state once in and once out. The gradient walks twice:
// along time with S for dq, then against it with the gradient of S for dk and dv. The gradient of the gates needs S
// before the last of every WINDOW steps; no other state is kept.
//
// exp(g) enters as two floats, so that a decay near one has no bias that grows with the number of steps. S itself is
// rounded to float32 at every step, where the chunk forms round once a chunk: that error grows with the root of the
// number of steps that S remembers, and a recurrence that stores S in float32 can do no better.

#include "common/cpu/kernels.h"

namespace {

// The arguments of all operators, as cpp_recurrent.py passes them. Pointers are null where there is nothing to pass.
struct Call : Walks {
    const float* g;          // [B, T, H]
    const float* g_gamma;    // [H]
    const int64_t* accepted; // [N]: of the steps, how many an advance takes
    Steps q, k, v, o;        // backward, o is its gradient
    Steps state;             // [P, H, K, V]: its K rows are what steps are elsewhere
    Steps dq, dk, dv;        // dq and dk for every value head
    float* dg;               // [B, T, H]
    float* dstate;           // [N, H, K, V]: gradient of the final state, then of the initial one; dq needs none
};

constexpr int WINDOW = 256;  // steps over which the gates' gradient is a running sum
constexpr int ROWS = 4;  // of a state that advance together, with one sum of outputs
constexpr int AHEAD = 8;  // rows fetched before their turn: the processor's own prefetching ends at each page

// S <- decay S + k v^T and o += S^T q, for some rows of S [K, V] with strides; `column` is a constant where S is dense.
// Every operation is spelled out, so that all numbers of rows give the same bits.
template <int ROWS, class T, class Stride>
void advance_rows(T* __restrict s, int64_t row, Stride column, const float* k, const float* q,
                  const float* __restrict v, float* __restrict o, Factor decay, int V) {
#pragma GCC ivdep
    for (int j = 0; j < V; j++) {
        float sum = o[j];
        for (int i = 0; i < ROWS; i++) {
            const float before = float(s[i * row + j * column]);
            const float next = std::fma(decay.high, before, std::fma(decay.low, before, k[i] * v[j]));
            s[i * row + j * column] = next;
            sum = std::fma(q[i], next, sum);
        }
        o[j] = sum;
    }
}

// The same where S lies in memory as [V, K]: one column after the other, each with a sum over K. S gets the same bits;
// the sum has 16 parts on every processor.
template <class T>
void advance_columns(T* __restrict s, int64_t column, const float* k, const float* q, const float* v,
                     float* __restrict o, Factor decay, int K, int V) {
    constexpr int PARTS = 16;
    for (int j = 0; j < V; j++, s += column) {
        float sums[PARTS] = {};
        auto advance = [&](int i, int parts) {
#pragma GCC ivdep
            for (int part = 0; part < parts; part++) {
                const float before = float(s[i + part]);
                const float next = std::fma(decay.high, before, std::fma(decay.low, before, k[i + part] * v[j]));
                s[i + part] = next;
                sums[part] = std::fma(q[i + part], next, sums[part]);
            }
        };
        for (int i = 0; i < K; i += 64 / int(sizeof(T))) __builtin_prefetch(s + AHEAD * column + i, 1);
        int i = 0;
        for (; i + PARTS <= K; i += PARTS) advance(i, PARTS);
        advance(i, K - i);
        for (int half = PARTS / 2; half; half /= 2)
            for (int part = 0; part < half; part++) sums[part] += sums[part + half];
        o[j] += sums[0];
    }
}

// All rows: one after the other where S comes from memory, for one step; several at once where it is in the cache.
template <class T, class Stride>
void advance(bool cached, T* s, int64_t row, Stride column, const float* k, const float* q, const float* v, float* o,
             Factor decay, int K, int V) {
    if constexpr (std::is_same_v<Stride, int64_t>)
        if (row == 1) return advance_columns(s, column, k, q, v, o, decay, K, V);
    int i = 0;
    for (; cached && i + ROWS <= K; i += ROWS)
        advance_rows<ROWS>(s + i * row, row, column, k + i, q + i, v, o, decay, V);
    for (; i < K; i++) {
        for (int j = 0; j < V; j += 64 / int(sizeof(T))) __builtin_prefetch(s + (i + AHEAD) * row + j * column, 1);
        advance_rows<1>(s + i * row, row, column, k + i, q + i, v, o, decay, V);
    }
}

inline int64_t gate(const Call& c, const Walk& w, int64_t t) { return (w.batch * c.time + t) * c.heads + w.head; }
inline double decay_of(const Call& c, const Walk& w, int64_t t) {
    return std::exp(double(c.g ? c.g[gate(c, w, t)] : c.g_gamma ? c.g_gamma[w.head] : 0));
}

// One thread that takes steps into rows of a pool without outputs: all steps for one row of S after the other, along
// memory. Every number meets the operations of advance_rows, and so has the same bits.
struct Taker {
    const Call& c;
    const int K, V;
    std::vector<float> space;
    std::vector<Factor> decays;
    Matrix k, v, row;

    explicit Taker(const Call& c)
        : c(c),
          K(int(c.K)),
          V(int(c.V)),
          space(Matrix::numbers(c.time, K) + Matrix::numbers(c.time, V) + padded(std::max(K, V))),
          k(space.data(), K),
          v(k[padded(c.time)], V),
          row(v[padded(c.time)], std::max(K, V)) {}

    void take(const Walk& w) {
        const int64_t slot = c.slots ? c.slots[w.sequence] : w.sequence, steps = c.accepted[w.sequence];
        if (slot < 0 || steps == 0) return;
        decays.clear();
        for (int64_t t = 0; t < steps; t++) {
            c.k.load_row(w.batch, t, w.key_head, K, k[t]);
            c.v.load_row(w.batch, t, w.head, V, v[t]);
            decays.emplace_back(decay_of(c, w, t));
        }
        const bool value_first = c.state.step == 1;
        const Matrix along = value_first ? k : v, across = value_first ? v : k;
        const int rows = value_first ? V : K, width = value_first ? K : V;
        Steps s = c.state;
        if (value_first) std::swap(s.step, s.column);
        for (int i = 0; i < rows; i++) {
            s.load_row(slot, i, w.head, width, row.at);
            for (int64_t t = 0; t < steps; t++) {
                const Factor decay = decays[t];
                const float x = across[t][i], *y = along[t];
                for (int j = 0; j < width; j++)
                    row.at[j] = std::fma(decay.high, row.at[j], std::fma(decay.low, row.at[j], x * y[j]));
            }
            s.store_row(slot, i, w.head, width, row.at);
        }
    }
};

// One thread, with a step's vectors and, for gradients, a state and its gradient.
struct Worker {
    const Call& c;
    const int K, V;
    std::vector<float> space;
    Matrix q, k, row, v, o, state, dstate;

    Worker(const Call& c, bool backward)
        : c(c),
          K(int(c.K)),
          V(int(c.V)),
          space(3 * Matrix::numbers(1, K) + 2 * Matrix::numbers(1, V) + 2 * backward * Matrix::numbers(K, V)),
          q(space.data(), K),
          k(q[padded(1)], K),
          row(k[padded(1)], K),
          v(row[padded(1)], V),
          o(v[padded(1)], V),
          state(o[padded(1)], V),
          dstate(state[padded(K)], V) {}

    void load(const Walk& w, int64_t t) {
        c.k.load_row(w.batch, t, w.key_head, K, k.at);
        c.q.load_row(w.batch, t, w.key_head, K, q.at, float(c.scale));
        c.v.load_row(w.batch, t, w.head, V, v.at);
    }

    void forward(const Walk& w) {
        const int64_t slot = c.slots ? c.slots[w.sequence] : w.sequence;
        for (int64_t i = 0; i < w.steps; i++) {
            const int64_t t = w.at(i);
            std::fill(o.at, o.at + V, 0.f);
            if (slot >= 0) {
                load(w, t);
                c.state.row(slot, 0, w.head, [&](auto* s, auto column) {
                    advance(w.steps > 1, s, c.state.step, column, k.at, q.at, v.at, o.at, Factor(decay_of(c, w, t)), K, V);
                });
            }
            c.o.store_row(w.batch, t, w.head, V, o.at);
        }
    }

    // dg_t = <exp(g_t) S_{t-1}, dS_t>, where dS_t = exp(g_{t+1}) dS_{t+1} + q_t do_t^T. From t + 1 to t it changes by
    //
    //     exp(g_t) q_t^T S_{t-1} do_t - exp(g_{t+1}) k_t^T dS_{t+1} v_t
    //
    // neither of which holds what step t writes and reads itself: they are as small as dg. At the last step of every
    // window the sum begins afresh, with the product itself.
    void backward(const Walk& w) {
        std::vector<float> reads(w.steps);  // exp(g_t) q_t^T S_{t-1} do_t
        std::vector<float> kept(c.dg ? (w.steps + WINDOW - 1) / WINDOW * Matrix::numbers(K, V) : 0);
        auto ends = [&](int64_t i) { return c.dg && (i % WINDOW == WINDOW - 1 || i == w.steps - 1); };
        auto before = [&](int64_t i) { return Matrix(kept.data() + i / WINDOW * Matrix::numbers(K, V), V); };
        if (c.dq.data || c.dg) {
            for (int i = 0; i < K; i++) c.state.load_row(w.sequence, i, w.head, V, state[i]);
            for (int64_t i = 0; i < w.steps; i++) {
                if (ends(i)) std::copy_n(state[0], Matrix::numbers(K, V), before(i)[0]);
                reads[i] = dq_of(w, w.at(i));
            }
        }
        if (!c.dstate) return;
        for (int i = 0; i < K; i++) {
            std::copy_n(dstate_of(w) + i * V, V, dstate[i]);
            std::fill(dstate[i] + V, dstate[i] + padded(V), 0.f);
        }
        double since = 0, decay = 1;  // of the step after
        for (int64_t i = w.steps - 1; i >= 0; i--) {
            const int64_t t = w.at(i);
            since += double(reads[i]) - dk_and_dv_of(w, t, Factor(decay));
            decay = decay_of(c, w, t);
            if (ends(i)) {
                since = 0;
                for (int j = 0; j < K; j++) since += dot(before(i)[j], dstate[j], padded(V));
                since *= decay;
            }
            if (c.dg) c.dg[gate(c, w, t)] = decay == 0 ? 0 : float(since);
        }
        const Factor first(decay);
        for (int i = 0; i < K; i++)
            for (int j = 0; j < V; j++) dstate_of(w)[i * V + j] = first.times(dstate[i][j]);
    }

    float* dstate_of(const Walk& w) const { return c.dstate + (w.sequence * c.heads + w.head) * K * V; }

    // S <- decay S + k v^T, dq = S do. Returns decay q^T S do of the S before.
    float dq_of(const Walk& w, int64_t t) {
        load(w, t);
        c.o.load_row(w.batch, t, w.head, V, o.at);
        const Factor decay(decay_of(c, w, t));
        for (int i = 0; i < K; i++) {
            Vector sum{};
            for (int j = 0; j < V; j += LANES) {
                Vector before = read(state[i] + j);
                write(state[i] + j, decay.times_plus(before, k.at[i] * read(v.at + j)));
                sum += before * read(o.at + j);
            }
            row.at[i] = decay.high * ::sum(sum);
        }
        const float reads = dot(q.at, row.at, padded(K)), own = dot(v.at, o.at, padded(V));
        for (int i = 0; i < K; i++) row.at[i] += k.at[i] * own;
        if (c.dq.data) c.dq.store_row(w.batch, t, w.head, K, row.at, float(c.scale));
        return reads;
    }

    // dS <- decay dS + q do^T, dk = dS v, dv = dS^T k. Returns decay k^T dS v of the dS before.
    float dk_and_dv_of(const Walk& w, int64_t t, Factor decay) {
        load(w, t);
        c.o.load_row(w.batch, t, w.head, V, o.at);
        Matrix dv = state;  // of no more use
        std::fill(dv[0], dv[0] + padded(V), 0.f);
        for (int i = 0; i < K; i++) {
            Vector sum{};
            for (int j = 0; j < V; j += LANES) {
                Vector before = read(dstate[i] + j), now = decay.times_plus(before, q.at[i] * read(o.at + j));
                write(dstate[i] + j, now);
                sum += before * read(v.at + j);
                write(dv[0] + j, read(dv[0] + j) + k.at[i] * now);
            }
            row.at[i] = decay.high * ::sum(sum);
        }
        const float writes = dot(k.at, row.at, padded(K)), own = dot(v.at, o.at, padded(V));
        for (int i = 0; i < K; i++) row.at[i] += q.at[i] * own;
        if (c.dk.data) c.dk.store_row(w.batch, t, w.head, K, row.at);
        if (c.dv.data) c.dv.store_row(w.batch, t, w.head, V, dv[0]);
        return writes;
    }
};

}  // namespace

extern "C" {
void recurrent_forward(const Call* call) { walk_all<Worker>(*call, false); }
void recurrent_backward(const Call* call) { walk_all<Worker>(*call, true); }
void recurrent_advance(const Call* call) {
    with_team(call->threads, [&] {
        FlushDenormals flush;
        Taker taker(*call);
        share(call->sequences * call->heads, [&](int64_t i) { taker.take(Walk(*call, i)); });
    });
}
}
