// A walk along a sequence and head, chunk by chunk: what the forward and the backward pass of gsa's chunk form share.

#include "gsa/cpu/chunk.h"

namespace {

// One thread, with the matrices it works in.
struct Worker {
    const Call& c;
    const int K, V, M, group;
    Decay decay;
    Matrix q, k, v, s, o, k_transposed, carried;
    Matrix scores, gated, x, seen, arriving, factor, factor_transposed, added;

    Worker(const Call& c, Space& space)
        : c(c),
          K(int(c.K)),
          V(int(c.V)),
          M(int(c.M)),
          group(int(c.group)),
          decay(space, c.M),
          q(space.matrix(CHUNK, K)),
          k(space.matrix(CHUNK, K)),
          v(space.matrix(CHUNK, V)),
          s(space.matrix(CHUNK, M)),
          o(space.matrix(CHUNK, V)),
          k_transposed(space.matrix(K, CHUNK)),
          carried(space.matrix(CHUNK, M)),
          scores(space.matrix(CHUNK, CHUNK)),
          gated(space.matrix(CHUNK, CHUNK)),
          x(space.matrix(CHUNK, M)),
          seen(space.matrix(CHUNK, M)),
          arriving(space.matrix(BLOCK, M)),
          factor(space.matrix(BLOCK, M)),
          factor_transposed(space.matrix(M, BLOCK)),
          added(space.matrix(std::max(K, std::max(V, M)), std::max(M, V))) {}

    int64_t chunks_of(const Walk& w) const { return (w.steps + c.chunk_size - 1) / c.chunk_size; }
    Chunk chunk_of(const Walk& w, int64_t i) const {
        const int64_t first = i * c.chunk_size;
        return {w.batch, w.at(first), int(std::min(c.chunk_size, w.steps - first)), w.reverse ? -1 : 1};
    }

    void load(const Steps& from, const Chunk& chunk, int64_t head, int width, Matrix to, double factor = 1) const {
        from.load(chunk.batch, chunk.start, chunk.ahead, head, chunk.steps, 1, width, to, 0, float(factor));
    }
    void store(const Steps& to, const Chunk& chunk, int64_t head, int width, Matrix from, double factor = 1) const {
        if (to.data) to.store(chunk.batch, chunk.start, chunk.ahead, head, chunk.steps, width, from, float(factor));
    }

    // What a chunk adds to the states, and its decays.
    void load_writes(const Walk& w, const Chunk& chunk) {
        load(c.k, chunk, w.head, K, k);
        load(c.v, chunk, w.head, V, v);
        load(c.s, chunk, w.head, M, s);
        decay.read(c, chunk, w.head);
        times(s, decay.to_end, carried, chunk.rows(), padded(M));
    }

    // state <- state diag(d) + left^T right, where the product is summed on its own first: the state is rounded once.
    void advance(Matrix state, Matrix left, Matrix right, int rows, int width, const Chunk& chunk) {
        product(Left::transposed(left), right, added, padded(rows), chunk.rows(), padded(width));
        each_vector(rows, padded(width), [&](int i, int m) {
            write(state[i] + m, read(decay.total.at + m) * read(state[i] + m) + read(added[i] + m));
        });
    }

    // The decayed slots that a block's steps see from the blocks before it: called once a block, after its use.
    void see_block(int block) {
        times_row(seen, decay.over_block(block), block * BLOCK, padded(M));
        times(part(s, block * BLOCK), part(decay.before, block * BLOCK), part(seen, block * BLOCK), BLOCK, padded(M));
    }

    // Adds to a block's rows of y what they read from earlier steps of the chunk, value-gated.
    void add_earlier(Matrix weights, Matrix y, int block) {
        const int row = block * BLOCK;
        if (block) {
            product(part(weights, row), seen, arriving, BLOCK, row, padded(M));
            add_times(arriving, part(decay.after, row), part(y, row), BLOCK, padded(M));
        }
        add_pairs(part(weights, row, row), part(s, row), part(decay.step, row), part(y, row), padded(M));
    }

    // The key-gated scores of a block's steps, transposed: columns of y.
    void gate(Matrix p, Matrix y, int block) {
        const int row = block * BLOCK;
        if (block) {
            times(part(p, row), part(decay.after, row), factor, BLOCK, padded(M));
            transpose(factor, factor_transposed, BLOCK, padded(M));
            product(seen, factor_transposed, part(y, 0, row), row, padded(M), BLOCK);
        }
        gate_pairs(part(p, row), part(s, row), part(decay.step, row), part(y, row, row), M);
    }

    // A block's rows of y <- y + weights_ii s_i.
    void add_own(Matrix weights, Matrix y, int block) {
        for (int i = block * BLOCK; i < (block + 1) * BLOCK; i++)
            for (int m = 0; m < padded(M); m += LANES)
                write(y[i] + m, read(y[i] + m) + weights[i][i] * read(s[i] + m));
    }

    // q of one query head, its scores, and in x what it reads from the state.
    void look(const Chunk& chunk, int64_t head, Matrix state_k) {
        load(c.q, chunk, head, K, q, c.scale);
        product(q, k_transposed, scores, chunk.rows(), padded(K), chunk.rows(), false, LOWER);
        product(q, state_k, x, chunk.rows(), padded(K), padded(M));
        times(x, decay.from_start, x, chunk.rows(), padded(M));
    }
};

// A dense matrix of a state in memory, [rows, width], and a matrix at work, with zeros past its edges.
inline void load_state(const float* from, Matrix to, int rows, int width) {
    for (int i = 0; i < padded(rows); i++) {
        std::fill(to[i], to[i] + padded(width), 0.f);
        if (i < rows) std::copy_n(from + int64_t(i) * width, width, to[i]);
    }
}
inline void store_state(Matrix from, float* to, int rows, int width) {
    for (int i = 0; i < rows; i++) std::copy_n(from[i], width, to + int64_t(i) * width);
}

// Each walk of a call by one of its threads, as they come.
template <class Worker>
void walk_each(const Call& c) {
    std::vector<int64_t> before{0};  // chunks before those of a sequence
    for (int64_t n = 0; n < c.sequences; n++) {
        const int64_t steps = c.offsets ? c.offsets[n + 1] - c.offsets[n] : c.time;
        before.push_back(before[n] + (steps + c.chunk_size - 1) / c.chunk_size);
    }
    Space counted;
    Worker(c, counted);
    std::atomic<int64_t> next{0};
    with_team(c.threads, [&] {
        FlushDenormals flush;
        Memory memory(counted.used);
        Space space{memory.at};
        Worker worker(c, space);
        share_as_they_come(next, c.sequences * c.heads, [&](int64_t i) {
            const Walk w(c, i);
            worker.walk(w, before[w.sequence]);
        });
    });
}

}  // namespace
