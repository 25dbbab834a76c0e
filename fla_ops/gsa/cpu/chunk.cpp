// The chunk form of gsa on a CPU, in float32. A thread walks along a sequence and head, with the states of the keys,
// A [K, M], and of the values, C [M, V], in its cache:
//
//     x_i = sum_{j <= i} (q_i . k_j) W_ij s_j + a_i A^T q_i           (q already scaled; products with W and a by slot)
//     p_i = softmax(x_i)
//     o_i = sum_{j <= i} <p_i, W_ij s_j> v_j + C^T (a_i p_i)
//     A'  = A diag(d) + sum_j k_j (b_j s_j)^T,   C' = diag(d) C + sum_j (b_j s_j) v_j^T
//
// W_ij is the decay from step j to step i, a_i from the chunk's start to i, b_j from j to the chunk's end, d over the
// chunk.

#include "gsa/cpu/walks.h"

namespace {

// One thread, with both states.
struct Forward : Worker {
    Matrix state_k, state_v;

    Forward(const Call& c, Space& space)
        : Worker(c, space), state_k(space.matrix(K, M)), state_v(space.matrix(M, V)) {}

    void write_output(const Chunk& chunk, int64_t head, Matrix state_k, Matrix state_v) {
        look(chunk, head, state_k);
        for (int block = 0; block < chunk.blocks(); block++) {
            add_earlier(scores, x, block);
            if (c.earlier.data) keep(chunk, head, block);
            add_own(scores, x, block);
            for (int i = block * BLOCK; i < (block + 1) * BLOCK; i++) softmax(x[i], M);
            gate(x, gated, block);
            see_block(block);
        }
        product(Left::transposed(gated), v, o, chunk.rows(), chunk.rows(), padded(V), false, UP_TO_ROW);
        times(x, decay.from_start, x, chunk.rows(), padded(M));
        product(x, state_v, o, chunk.rows(), padded(M), padded(V), true);
        store(c.o, chunk, head, V, o);
    }

    void keep(const Chunk& chunk, int64_t head, int block) const {
        for (int i = block * BLOCK; i < std::min(chunk.steps, (block + 1) * BLOCK); i++) {
            c.earlier.store_row(chunk.batch, chunk.start + i * chunk.ahead, head, M, x[i]);
            c.own.store_row(chunk.batch, chunk.start + i * chunk.ahead, head, 1, scores[i] + i);
        }
    }

    void walk(const Walk& w, int64_t chunks_before) {
        const int64_t at = w.sequence * c.heads + w.head, numbers_k = K * M, numbers_v = M * V;
        load_state(c.state_k + at * numbers_k, state_k, K, M);
        load_state(c.state_v + at * numbers_v, state_v, M, V);
        for (int64_t i = 0; i < chunks_of(w); i++) {
            const Chunk chunk = chunk_of(w, i);
            load_writes(w, chunk);
            transpose(k, k_transposed, chunk.rows(), padded(K));
            if (c.states_k) {
                const int64_t kept = (chunks_before + i) * c.heads + w.head;
                store_state(state_k, c.states_k + kept * numbers_k, K, M);
                store_state(state_v, c.states_v + kept * numbers_v, M, V);
            }
            for (int n = 0; n < group; n++) write_output(chunk, w.head * group + n, state_k, state_v);
            advance(state_k, k, carried, K, M, chunk);
            product(Left::transposed(carried), v, added, padded(M), chunk.rows(), padded(V));
            for (int m = 0; m < M; m++)
                for (int j = 0; j < padded(V); j += LANES)
                    write(state_v[m] + j, decay.total.at[m] * read(state_v[m] + j) + read(added[m] + j));
        }
        store_state(state_k, c.state_k + at * numbers_k, K, M);
        store_state(state_v, c.state_v + at * numbers_v, M, V);
    }
};

}  // namespace

extern "C" void chunk_forward(const Call* call) { walk_each<Forward>(*call); }
