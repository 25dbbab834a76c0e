// The gated delta rule on a CPU, step by step, in float32:
//
//     S' = exp(g_t) S_{t-1},   u_t = beta_t (v_t - S'^T k_t),   S_t = S' + k_t u_t^T,   o_t = scale S_t^T q_t
//
// Two passes over the state per step: what the key and the query read of it, then the update. The output follows from
// the first, o = scale (S'^T q + (k . q) u). The second finds the state in the core's cache, so a decode step moves it
// once in and once out of memory. exp(g) enters as two floats, so that a decay near one has no bias that grows with the
// number of steps.

#include "common/cpu/kernels.h"

namespace {

constexpr double EPSILON = 1e-6;  // beside the squared norm of a query or key
constexpr int ROWS = 4;   // of a state that are read or updated together
constexpr int AHEAD = 8;  // rows fetched before their turn: the processor's own prefetching ends at each page

// The arguments, as cpp_recurrent.py passes them. Pointers are null where there is nothing to pass.
struct Call : Walks {
    int64_t normalize;
    const float* g;     // [B, T, H]
    const float* beta;  // [B, T, H]
    Steps q, k, v, o;
    Steps state;        // [P, H, K, V]: its K rows are what steps are elsewhere
};

// One step's vectors: k and q [K]; S^T k, S^T q and u [V]. Rows of more than one number for each lane lie side by side.
struct Vectors {
    float *k, *q, *says, *reads, *u;
};

// says += S^T k and reads += S^T q, for some rows of S [K, V] with strides; `column` is a constant where S is dense.
// Every operation is spelled out, so that all numbers of rows give the same bits.
template <int ROWS, class T, class Stride>
void read_rows(const T* __restrict s, int64_t row, Stride column, const float* k, const float* q,
               float* __restrict says, float* __restrict reads, int V) {
#pragma GCC ivdep
    for (int j = 0; j < V; j++) {
        float by_key = says[j], by_query = reads[j];
        for (int i = 0; i < ROWS; i++) {
            const float x = float(s[i * row + j * column]);
            by_key = std::fma(k[i], x, by_key);
            by_query = std::fma(q[i], x, by_query);
        }
        says[j] = by_key;
        reads[j] = by_query;
    }
}

// S <- decay S + k u^T
template <int ROWS, class T, class Stride>
void update_rows(T* __restrict s, int64_t row, Stride column, const float* k, const float* __restrict u, Factor decay,
                 int V) {
#pragma GCC ivdep
    for (int j = 0; j < V; j++)
        for (int i = 0; i < ROWS; i++) {
            const float x = float(s[i * row + j * column]);
            s[i * row + j * column] = std::fma(decay.high, x, std::fma(decay.low, x, k[i] * u[j]));
        }
}

// u = beta (v - decay says), and o = decay reads + (k . q) u in place of `reads`.
inline void find_change(const Vectors& x, const float* v, float beta, Factor decay, float along, int V) {
    for (int j = 0; j < V; j++) {
        x.u[j] = beta * (v[j] - decay.times(x.says[j]));
        x.reads[j] = std::fma(along, x.u[j], decay.times(x.reads[j]));
    }
}

template <class T, class Stride>
void advance_rows(T* s, int64_t row, Stride column, const Vectors& x, const float* v, float beta, Factor decay,
                  float along, int K, int V) {
    std::fill(x.says, x.says + V, 0.f);
    std::fill(x.reads, x.reads + V, 0.f);
    int i = 0;
    for (; i + ROWS <= K; i += ROWS) {
        for (int ahead = AHEAD; ahead < AHEAD + ROWS; ahead++)
            for (int j = 0; j < V; j += 64 / int(sizeof(T)))
                __builtin_prefetch(s + (i + ahead) * row + j * column, 1);
        read_rows<ROWS>(s + i * row, row, column, x.k + i, x.q + i, x.says, x.reads, V);
    }
    for (; i < K; i++) read_rows<1>(s + i * row, row, column, x.k + i, x.q + i, x.says, x.reads, V);
    find_change(x, v, beta, decay, along, V);
    for (i = 0; i + ROWS <= K; i += ROWS) update_rows<ROWS>(s + i * row, row, column, x.k + i, x.u, decay, V);
    for (; i < K; i++) update_rows<1>(s + i * row, row, column, x.k + i, x.u, decay, V);
}

// The same where S lies in memory as [V, K]: one column after the other, each with sums over K in 16 parts, which are
// the same on every processor.
template <class T>
void advance_columns(T* __restrict s, int64_t column, const Vectors& x, const float* v, float beta, Factor decay,
                     float along, int K, int V) {
    constexpr int PARTS = 16;
    const float *k = x.k, *q = x.q;
    for (int j = 0; j < V; j++, s += column) {
        float says[PARTS] = {}, reads[PARTS] = {};
        for (int i = 0; i < K; i += 64 / int(sizeof(T))) __builtin_prefetch(s + AHEAD * column + i, 1);
        auto read = [&](int i, int parts) {
#pragma GCC ivdep
            for (int part = 0; part < parts; part++) {
                says[part] = std::fma(k[i + part], float(s[i + part]), says[part]);
                reads[part] = std::fma(q[i + part], float(s[i + part]), reads[part]);
            }
        };
        int i = 0;
        for (; i + PARTS <= K; i += PARTS) read(i, PARTS);
        read(i, K - i);
        for (int half = PARTS / 2; half; half /= 2)
            for (int part = 0; part < half; part++) {
                says[part] += says[part + half];
                reads[part] += reads[part + half];
            }
        x.says[j] = says[0];
        x.reads[j] = reads[0];
        find_change({x.k, x.q, x.says + j, x.reads + j, x.u + j}, v + j, beta, decay, along, 1);
        const float change = x.u[j];
#pragma GCC ivdep
        for (int i = 0; i < K; i++) {
            const float before = float(s[i]);
            s[i] = std::fma(decay.high, before, std::fma(decay.low, before, k[i] * change));
        }
    }
}

struct Worker {
    const Call& c;
    const int K, V;
    std::vector<float> space;
    Vectors x;
    float* v;

    Worker(const Call& c, bool) : c(c), K(int(c.K)), V(int(c.V)), space(2 * padded(K) + 4 * padded(V)) {
        float* at = space.data();
        x.k = at;
        x.q = x.k + padded(K);
        x.says = x.q + padded(K);
        x.reads = x.says + padded(V);
        x.u = x.reads + padded(V);
        v = x.u + padded(V);
    }

    void load(const Steps& from, const Walk& w, int64_t t, float* to, double factor) const {
        from.load_row(w.batch, t, w.key_head, K, to);
        if (c.normalize) factor /= std::sqrt(double(dot(to, to, padded(K))) + EPSILON);
        for (int i = 0; i < K; i++) to[i] *= float(factor);
    }

    void forward(const Walk& w) {
        const int64_t slot = c.slots ? c.slots[w.sequence] : w.sequence;
        for (int64_t i = 0; i < w.steps; i++) {
            const int64_t t = w.at(i), gate = (w.batch * c.time + t) * c.heads + w.head;
            std::fill(x.reads, x.reads + V, 0.f);
            if (slot >= 0) {
                load(c.k, w, t, x.k, 1);
                load(c.q, w, t, x.q, c.scale);
                c.v.load_row(w.batch, t, w.head, V, v);
                const Factor decay(std::exp(double(c.g ? c.g[gate] : 0)));
                const float along = dot(x.k, x.q, padded(K)), beta = c.beta[gate];
                c.state.row(slot, 0, w.head, [&](auto* s, auto column) {
                    if constexpr (std::is_same_v<decltype(column), int64_t>)
                        if (c.state.step == 1) return advance_columns(s, column, x, v, beta, decay, along, K, V);
                    advance_rows(s, c.state.step, column, x, v, beta, decay, along, K, V);
                });
            }
            c.o.store_row(w.batch, t, w.head, V, x.reads);
        }
    }

    void backward(const Walk&) {}
};

}  // namespace

extern "C" void recurrent_forward(const Call* call) { walk_all<Worker>(*call, false); }
