// What the chunk forms of simple_gla work on: the arguments, the chunks, and who holds which states.

#include "common/cpu/chunks.h"

namespace {

constexpr int TOGETHER = 256;  // numbers of a row of v that are read together, where that many heads can be
constexpr int WINDOW = 8;  // chunks whose states the fused form's backward pass has at once

// A matrix for each sequence and head, in a pool of any dtype: what a walk starts from, and where it leaves its end.
struct States {
    Steps pool;            // [P, H, rows, width]: the rows of a state are what steps are elsewhere
    const int64_t* slots;  // the pool's row of each sequence, -1 for padding; null: its number
    const bool* fresh;     // sequences that start from zeros, whatever the pool holds

    int64_t slot(int64_t n) const { return slots ? slots[n] : n; }
    void load(int64_t n, int64_t head, int64_t row, int width, float* x) const {
        if (slot(n) < 0 || (fresh && fresh[n]))
            std::fill(x, x + padded(width), 0.f);
        else
            pool.load_row(slot(n), row, head, width, x);
    }
    void store(int64_t n, int64_t head, int64_t row, int width, const float* x) const {
        if (slot(n) >= 0) pool.store_row(slot(n), row, head, width, x);
    }

    // Of a state whose rows are columns in memory, the transposed one; its rows are dense.
    bool lies_transposed() const { return pool.step == 1; }
    States transposed() const {
        States t = *this;
        std::swap(t.pool.step, t.pool.column);
        return t;
    }
};

// The arguments of all operators, as cpp.py passes them. Pointers are null where there is nothing to pass.
struct Call {
    int64_t batch, time, sequences, key_heads, heads, K, V, chunk_size, every, fused, reverse, threads;
    double scale;
    const int64_t* offsets;        // of packed sequences, [sequences + 1]
    const float* g;                // [B, T, H]
    const float* g_gamma;          // [H]
    Steps q, k, v, o, dq, dk, dv;  // backward, o is its gradient
    Steps kept;                    // [C, H, K, V]: the states after every `every` steps of each sequence
    States state;                  // [K, V] forward, [V, K] in float32 backward: initial, then final
    States dstate;                 // [K, V]: gradient of the final state, then of the initial one; dq needs none
    float* dg;                     // [B, T, H]
    float* space;                  // as many numbers as chunk_space says
};

// The chunks of all sequences in the order of a walk; those of sequence n are first[n] to first[n + 1].
struct Chunks {
    std::vector<Chunk> all;
    std::vector<int64_t> first{0};

    explicit Chunks(const Call& c) {
        int64_t kept = 0;
        for (int64_t n = 0; n < c.sequences; n++) {
            int64_t start = c.offsets ? c.offsets[n] : 0, end = c.offsets ? c.offsets[n + 1] : c.time;
            if (c.state.slot(n) < 0) end = start;
            for (int64_t i = 0; i < end - start; i += c.chunk_size) {
                const int64_t after = i + c.chunk_size;
                const bool keeps = c.every && after % c.every == 0 && after <= end - start;
                all.push_back({c.offsets ? 0 : n, c.reverse ? end - 1 - i : start + i,
                               int(std::min(c.chunk_size, end - start - i)), c.reverse ? -1 : 1, keeps ? kept++ : -1});
            }
            first.push_back(int64_t(all.size()));
        }
    }
};

// How many key heads are read together: a row of v of a kilobyte, but all threads at work.
inline int64_t heads_together(const Call& c) {
    int64_t enough = TOGETHER / (c.heads / c.key_heads * c.V), most = c.key_heads;
    if (c.fused) most = c.sequences * c.key_heads / c.threads;
    return std::max<int64_t>(1, std::min({enough, most, c.key_heads}));
}

enum Load { LOAD_Q = 1, LOAD_K = 2, LOAD_V = 4, LOAD_O = 8 };

// A chunk's steps of the heads that are read together, and among them those of the head at work.
struct Inputs {
    const Call& c;
    const int group, K, V;
    int64_t first_head = 0;  // key head
    Matrix all_q, all_k, all_v, all_o;
    Matrix q, k, v, o;
    Matrix state_in_memory;  // [V, K], where it lies so

    Inputs(const Call& c, Space& space)
        : c(c),
          group(int(c.heads / c.key_heads)),
          K(int(c.K)),
          V(int(c.V)),
          all_q(space.matrices(heads_together(c), CHUNK, K)),
          all_k(space.matrices(heads_together(c), CHUNK, K)),
          all_v(space.matrices(heads_together(c) * group, CHUNK, V)),
          all_o(space.matrices(heads_together(c) * group, CHUNK, V)),
          q(all_q),
          k(all_k),
          v(all_v),
          o(all_o),
          state_in_memory(space.matrix(V, K)) {}

    // The state of one sequence and head, from the pool into a matrix [K, V] and back.
    void load_state(int64_t n, int64_t head, Matrix s) const {
        if (c.state.lies_transposed()) {
            const States lying = c.state.transposed();
            for (int j = 0; j < V; j++) lying.load(n, head, j, K, state_in_memory[j]);
            for (int j = V; j < padded(V); j++) std::fill_n(state_in_memory[j], padded(K), 0.f);
            transpose(state_in_memory, s, padded(V), padded(K));
        } else {
            for (int i = 0; i < K; i++) c.state.load(n, head, i, V, s[i]);
            for (int i = K; i < padded(K); i++) std::fill_n(s[i], padded(V), 0.f);
        }
    }
    void store_state(int64_t n, int64_t head, Matrix s) const {
        if (c.state.lies_transposed()) {
            const States lying = c.state.transposed();
            transpose(s, state_in_memory, padded(K), padded(V));
            for (int j = 0; j < V; j++) lying.store(n, head, j, K, state_in_memory[j]);
        } else {
            for (int i = 0; i < K; i++) c.state.store(n, head, i, V, s[i]);
        }
    }

    // For some key heads and the value heads that they serve.
    void load(const Chunk& chunk, int64_t first, int64_t last, int what) {
        auto heads = [&](const Steps& x, int per_key_head, int width, Matrix to, double factor) {
            x.load(chunk.batch, chunk.start, chunk.ahead, first * per_key_head, chunk.steps,
                   int(last - first) * per_key_head, width, to, Matrix::numbers(CHUNK, width), float(factor));
        };
        first_head = first;
        if (what & LOAD_Q) heads(c.q, 1, K, all_q, c.scale);
        if (what & LOAD_K) heads(c.k, 1, K, all_k, 1);
        if (what & LOAD_V) heads(c.v, group, V, all_v, 1);
        if (what & LOAD_O) heads(c.o, group, V, all_o, 1);
    }
    void select_key_head(int64_t head) {
        q.at = all_q.at + (head - first_head) * Matrix::numbers(CHUNK, K);
        k.at = all_k.at + (head - first_head) * Matrix::numbers(CHUNK, K);
    }
    void select_head(int64_t head) {
        v.at = all_v.at + (head - first_head * group) * Matrix::numbers(CHUNK, V);
        o.at = all_o.at + (head - first_head * group) * Matrix::numbers(CHUNK, V);
    }
    void store(const Steps& x, const Chunk& chunk, int64_t head, int width, Matrix from, double factor = 1) const {
        x.store(chunk.batch, chunk.start, chunk.ahead, head, chunk.steps, width, from, float(factor));
    }
};

// Chunks and key heads whose states are in memory at once: all, or some of one sequence and one head.
struct Window {
    int64_t first, last, first_sequence, last_sequence, first_head, last_head;
    float *states, *dstates;  // before each chunk, after it
    Factor* totals;           // its d
};

}  // namespace
