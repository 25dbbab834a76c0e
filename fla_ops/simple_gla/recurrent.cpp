// simple_gla on a CPU, step by step, in float32: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.
//
// One pass over the state per step, so a decode step moves the state once in and once out.

#include "common/matrices.h"

// The arguments, as host.py passes them. Pointers are null where there is nothing to pass.
struct Call {
    int64_t time, sequences, key_heads, heads, K, V, reverse, threads;
    double scale;
    const int64_t* offsets;  // of packed sequences, [sequences + 1]
    const int64_t* slots;    // the row of `state` for each sequence, -1 for padding
    const float* g;          // [B, T, H]
    const float* g_gamma;    // [H]
    Steps q, k, v, o;
    Steps state;  // [P, H, K, V]: its K rows are what steps are elsewhere
    int64_t state_column;
};

namespace {

constexpr int AHEAD = 8;  // rows fetched before their turn: the processor's own prefetching ends at each page

// S <- decay S + k v^T and o += S^T q, for S [K, V] with strides; `column` is a constant where S is dense. Every
// operation is spelled out, so that both give the same bits.
template <class T, class Stride>
void advance(T* state, int64_t row, Stride column, const float* k, const float* q, const float* v, float* o,
             float decay, int K, int V) {
    for (int i = 0; i < K; i++) {
        for (int j = 0; j < V; j += 64 / int(sizeof(T))) __builtin_prefetch(state + (i + AHEAD) * row + j * column, 1);
        T* __restrict s = state + i * row;
        const float key = k[i], query = q[i];
#pragma GCC ivdep
        for (int j = 0; j < V; j++) {
            const float next = std::fma(decay, float(s[j * column]), key * v[j]);
            s[j * column] = next;
            o[j] = std::fma(query, next, o[j]);
        }
    }
}

// One thread, with a step's vectors.
struct Worker {
    const Call& c;
    const int K, V;
    std::vector<float> k, q, v, o;

    explicit Worker(const Call& c) : c(c), K(int(c.K)), V(int(c.V)), k(K), q(K), v(V), o(V) {}

    void walk(int64_t n, int64_t head) {
        const int64_t batch = c.offsets ? 0 : n, slot = c.slots ? c.slots[n] : n;
        const int64_t first = c.offsets ? c.offsets[n] : 0, steps = (c.offsets ? c.offsets[n + 1] : c.time) - first;
        const int64_t key_head = head / (c.heads / c.key_heads);
        for (int64_t i = 0; i < steps; i++) {
            const int64_t t = first + (c.reverse ? steps - 1 - i : i);
            std::fill(o.begin(), o.end(), 0.f);
            if (slot >= 0) {
                c.k.load_row(batch, t, key_head, K, k.data());
                c.q.load_row(batch, t, key_head, K, q.data(), float(c.scale));
                c.v.load_row(batch, t, head, V, v.data());
                const float g = c.g ? c.g[(batch * c.time + t) * c.heads + head] : c.g_gamma ? c.g_gamma[head] : 0.f;
                typed(c.state.dtype, c.state.data, [&](auto* states) {
                    auto advance_by = [&](auto column) {
                        advance(states + c.state.offset(slot, 0, head), c.state.step, column, k.data(), q.data(),
                                v.data(), o.data(), std::exp(g), K, V);
                    };
                    if (c.state_column == 1)
                        advance_by(std::integral_constant<int64_t, 1>());
                    else
                        advance_by(c.state_column);
                });
            }
            c.o.store_row(batch, t, head, V, o.data());
        }
    }
};

}  // namespace

extern "C" void recurrent_forward(const Call* call) {
    const Call& c = *call;
#pragma omp parallel num_threads(int(c.threads)) if (c.threads > 1)
    {
        FlushDenormals flush;
        Worker worker(c);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.sequences * c.heads; i++) worker.walk(i / c.heads, i % c.heads);
    }
}
