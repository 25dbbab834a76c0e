// The chunk form of the gated delta rule on a CPU, forward and backward, in float32.
//
// Inside a chunk of C steps, what the state got wrong at each step solves a triangular system; across chunks a state S
// of [K, V] is carried:
//
//     (I + A) E = v - a K S                              A_ij = D_ij (k_i . k_j) beta_j for j < i
//     o_i = a_i S^T q_i + sum_{j <= i} D_ij (q_i . k_j) u_j,         u_j = beta_j e_j
//     S'  = d S + sum_j b_j k_j u_j^T
//
// D, a, b and d are the decays between two steps, from the chunk's start, to its end, and over it. The system is solved
// in blocks of 16 steps: the triangle of a block is inverted by forward substitution, the rest are products.
//
// A thread walks along a sequence and head with S in the core's cache. The gradient walks once more along time, keeps S
// and E of each chunk, and walks back with the gradient of S.

#include "common/cpu/chunks.h"

namespace {

constexpr int BLOCK = 16;  // steps whose triangle is inverted
constexpr double EPSILON = 1e-6;  // beside the squared norm of a query or key

// The arguments of both operators, as cpp.py passes them. Pointers are null where there is nothing to pass.
struct Call : Walks {
    int64_t chunk_size, normalize;
    const float* g;                // [B, T, H]
    const float* beta;             // [B, T, H]
    Steps q, k, v, o, dq, dk, dv;  // backward, o is its gradient; dq and dk for every value head
    float *dg, *dbeta;             // [B, T, H]
    float* state;                  // [N, H, K, V]: initial, then final
    float* dstate;                 // [N, H, K, V]: gradient of the final state, then of the initial one
};

struct Memory {
    std::vector<float> numbers;
    Space space;
    explicit Memory(int64_t count) : numbers(count + 16) {
        const auto address = reinterpret_cast<uintptr_t>(numbers.data());
        space.base = numbers.data() + (64 - address % 64) % 64 / 4;
    }
};

// What a thread works in: one chunk of one head.
struct Tiles {
    Matrix q, k, v, o, errors, changes, state, added, weighted, k_transposed;
    Matrix scores, weights, keys, lower, inverse, solved;
    Matrix dstate, dq, dk, reads, of_scores, of_keys, changes_transposed, state_transposed, dstate_transposed;
    Decay decay;
    float *beta, *q_factor, *k_factor;

    Tiles(Space& space, int K, int V)
        : q(space.matrix(CHUNK, K)),
          k(space.matrix(CHUNK, K)),
          v(space.matrix(CHUNK, V)),
          o(space.matrix(CHUNK, V)),
          errors(space.matrix(CHUNK, V)),
          changes(space.matrix(CHUNK, V)),
          state(space.matrix(K, V)),
          added(space.matrix(K, V)),
          weighted(space.matrix(CHUNK, K)),
          k_transposed(space.matrix(K, CHUNK)),
          scores(space.matrix(CHUNK, CHUNK)),
          weights(space.matrix(CHUNK, CHUNK)),
          keys(space.matrix(CHUNK, CHUNK)),
          lower(space.matrix(CHUNK, CHUNK)),
          inverse(space.matrix(CHUNK, BLOCK)),
          solved(space.matrix(BLOCK, V)),
          dstate(space.matrix(K, V)),
          dq(space.matrix(CHUNK, K)),
          dk(space.matrix(CHUNK, K)),
          reads(space.matrix(CHUNK, K)),
          of_scores(space.matrix(CHUNK, CHUNK)),
          of_keys(space.matrix(CHUNK, CHUNK)),
          changes_transposed(space.matrix(V, CHUNK)),
          state_transposed(space.matrix(V, K)),
          dstate_transposed(space.matrix(V, K)),
          decay(space),
          beta(space.take(CHUNK)),
          q_factor(space.take(CHUNK)),
          k_factor(space.take(CHUNK)) {}

    static int64_t numbers(int K, int V) {
        Space counted;
        Tiles(counted, K, V);
        return counted.used;
    }
};

struct Worker : Memory, Tiles {
    const Call& c;
    const int K, V;
    Chunk chunk{};
    int steps = 0;  // of the chunk, padded
    std::vector<float> kept;  // S before each chunk, and its E
    double change[CHUNK]{};  // of dg, from step to step

    Worker(const Call& c, bool)
        : Memory(Tiles::numbers(int(c.K), int(c.V))), Tiles(space, int(c.K), int(c.V)), c(c), K(int(c.K)), V(int(c.V)) {}

    void forward(const Walk& w) {
        enter(c.state, w, state);
        for (int64_t first = 0; first < w.steps; first += c.chunk_size) {
            select(w, first);
            load(c.q, w.key_head, K, q, q_factor);
            find_errors(w);
            write_output(w);
            advance_state();
        }
        leave(c.state, w, state);
    }

    void backward(const Walk& w) {
        const int64_t size = Matrix::numbers(K, V) + Matrix::numbers(CHUNK, V);
        const int64_t chunks = (w.steps + c.chunk_size - 1) / c.chunk_size;
        if (int64_t(kept.size()) < chunks * size) kept.resize(chunks * size);
        enter(c.state, w, state);
        for (int64_t i = 0; i < chunks; i++) {
            float* at = kept.data() + i * size;
            std::copy_n(state.at, Matrix::numbers(K, V), at);
            select(w, i * c.chunk_size);
            find_errors(w);
            std::copy_n(errors.at, Matrix::numbers(padded(chunk.steps), V), at + Matrix::numbers(K, V));
            if (i + 1 < chunks) advance_state();
        }
        enter(c.dstate, w, dstate);
        for (int64_t i = chunks - 1; i >= 0; i--) {
            float* at = kept.data() + i * size;
            std::copy_n(at, Matrix::numbers(K, V), state.at);
            select(w, i * c.chunk_size);
            std::copy_n(at + Matrix::numbers(K, V), Matrix::numbers(padded(chunk.steps), V), errors.at);
            write_gradients(w);
        }
        leave(c.dstate, w, dstate);
    }

    void enter(const float* from, const Walk& w, Matrix s) const {
        from += (w.sequence * c.heads + w.head) * K * V;
        std::fill_n(s.at, Matrix::numbers(K, V), 0.f);
        for (int i = 0; i < K; i++) std::copy_n(from + i * V, V, s[i]);
    }
    void leave(float* to, const Walk& w, Matrix s) const {
        to += (w.sequence * c.heads + w.head) * K * V;
        for (int i = 0; i < K; i++) std::copy_n(s[i], V, to + i * V);
    }

    int64_t gate(const Walk& w, int i) const { return (w.batch * c.time + chunk.at(i)) * c.heads + w.head; }

    void select(const Walk& w, int64_t first) {
        chunk = {w.batch, w.at(first), int(std::min(c.chunk_size, w.steps - first)), 1};
        steps = padded(chunk.steps);
    }

    // Queries or keys, and what they were multiplied by.
    void load(const Steps& x, int64_t head, int width, Matrix to, float* factor) const {
        x.load(chunk.batch, chunk.start, 1, head, chunk.steps, 1, width, to, 0);
        if (!c.normalize) return;
        for (int i = 0; i < chunk.steps; i++)
            factor[i] = float(1 / std::sqrt(double(dot(to[i], to[i], padded(width))) + EPSILON));
        scale_rows(to, factor, to, chunk.steps, padded(width));
    }

    // dx of what was loaded, and with that of what was given.
    void store(const Steps& x, const Walk& w, Matrix from, Matrix used, const float* factor) const {
        for (int i = 0; c.normalize && i < chunk.steps; i++) {
            const float along = dot(used[i], from[i], padded(K));
            for (int j = 0; j < K; j += LANES)
                write(from[i] + j, factor[i] * (read(from[i] + j) - along * read(used[i] + j)));
        }
        x.store(chunk.batch, chunk.start, 1, w.head, chunk.steps, K, from);
    }

    // k, beta and the decays, and with those D_ij (k_i . k_j) below the diagonal.
    void load_keys(const Walk& w) {
        load(c.k, w.key_head, K, k, k_factor);
        for (int i = 0; i < steps; i++) beta[i] = i < chunk.steps ? c.beta[gate(w, i)] : 0;
        decay.read(c.g, c.time, c.heads, 1, chunk, w.head);
        decay.fill_within(chunk.steps);
        transpose(k, k_transposed, steps, padded(K));
        product(k, k_transposed, keys, steps, padded(K), steps, false, LOWER);
        times_lower(keys, decay.within, keys, steps);
        clear_diagonal(keys);
    }

    void clear_diagonal(Matrix x) const {
        for (int i = 0; i < steps; i++) std::fill(x[i] + i, x[i] + padded(i + 1), 0.f);
    }

    // The inverse of I - lower in each block on the diagonal.
    void invert_blocks() const {
        for (int i = 0; i < steps; i++) {
            float* row = inverse[i];
            for (int j = 0; j < BLOCK; j++) row[j] = j == i % BLOCK;
            for (int j = i / BLOCK * BLOCK; j < i; j++)
                for (int n = 0; n < BLOCK; n += LANES)
                    write(row + n, read(row + n) + lower[i][j] * read(inverse[j] + n));
        }
    }

    void solve_block(Left inverse_of_block, Matrix x, int first) const {
        product(inverse_of_block, Matrix(x[first], V), solved, BLOCK, BLOCK, padded(V));
        std::copy_n(solved.at, Matrix::numbers(BLOCK, V), x[first]);
    }

    // x <- (I - lower)^-1 x
    void solve(Matrix x) const {
        for (int first = 0; first < steps; first += BLOCK) {
            Left before(lower);
            before.at = lower[first];
            product(before, x, Matrix(x[first], V), BLOCK, first, padded(V), true);
            solve_block(Matrix(inverse[first], BLOCK), x, first);
        }
    }

    // x <- (I - lower)^-T x
    void solve_transposed(Matrix x) const {
        for (int first = steps - BLOCK; first >= 0; first -= BLOCK) {
            const int after = first + BLOCK;
            if (after < steps) {
                Left below = Left::transposed(lower);
                below.at = lower[after] + first;
                product(below, Matrix(x[after], V), Matrix(x[first], V), BLOCK, steps - after, padded(V), true);
            }
            solve_block(Left::transposed(Matrix(inverse[first], BLOCK)), x, first);
        }
    }

    void find_errors(const Walk& w) {
        load_keys(w);
        c.v.load(chunk.batch, chunk.start, 1, w.head, chunk.steps, 1, V, v, 0);
        for (int i = 0; i < steps; i++)
            for (int j = 0; j < padded(i + 1); j += LANES) write(lower[i] + j, -read(keys[i] + j) * read(beta + j));
        invert_blocks();
        product(k, state, errors, steps, padded(K), padded(V));
        for (int i = 0; i < steps; i++)
            for (int j = 0; j < padded(V); j += LANES)
                write(errors[i] + j, read(v[i] + j) - decay.from_start[i] * read(errors[i] + j));
        solve(errors);
        scale_rows(errors, beta, changes, steps, padded(V));
    }

    void write_output(const Walk& w) {
        product(q, k_transposed, scores, steps, padded(K), steps, false, LOWER);
        times_lower(scores, decay.within, weights, steps);
        product(q, state, o, steps, padded(K), padded(V));
        scale_rows(o, decay.from_start, o, steps, padded(V));
        product(weights, changes, o, steps, steps, padded(V), true, UP_TO_ROW);
        c.o.store(chunk.batch, chunk.start, 1, w.head, chunk.steps, V, o, float(c.scale));
    }

    // S <- d S + what the chunk adds, which is summed on its own first: S is rounded once, not at each step.
    void advance(Matrix s) const {
        const Factor total(decay.total);
        for (int i = 0; i < K; i++)
            for (int j = 0; j < padded(V); j += LANES)
                write(s[i] + j, total.times_plus(read(s[i] + j), read(added[i] + j)));
    }

    void advance_state() {
        scale_rows(k, decay.to_end, weighted, steps, padded(K));
        product(Left::transposed(weighted), changes, added, padded(K), steps, padded(V));
        advance(state);
    }

    // The gradients of one chunk, from S before it, its E, and the gradient of S after it. `v` holds that of v.
    void write_gradients(const Walk& w) {
        load(c.q, w.key_head, K, q, q_factor);
        load_keys(w);
        c.o.load(chunk.batch, chunk.start, 1, w.head, chunk.steps, 1, V, o, 0, float(c.scale));
        product(q, k_transposed, scores, steps, padded(K), steps, false, LOWER);
        times_lower(scores, decay.within, weights, steps);
        scale_rows(errors, beta, changes, steps, padded(V));
        for (int i = 0; i < steps; i++)
            for (int j = 0; j < padded(i + 1); j += LANES) write(lower[i] + j, -beta[i] * read(keys[i] + j));
        invert_blocks();
        product(k, dstate, v, steps, padded(K), padded(V));
        scale_rows(v, decay.to_end, v, steps, padded(V));
        product(Left::transposed(weights), o, v, steps, steps, padded(V), true, FROM_ROW);
        solve_transposed(v);
        if (c.dbeta)
            for (int i = 0; i < chunk.steps; i++) c.dbeta[gate(w, i)] = dot(errors[i], v[i], padded(V));
        scale_rows(v, beta, v, steps, padded(V));
        if (c.dv.data) c.dv.store(chunk.batch, chunk.start, 1, w.head, chunk.steps, V, v);
        if (c.dq.data || c.dk.data || c.dg) write_inner_gradients(w);
        scale_rows(q, decay.from_start, weighted, steps, padded(K));
        product(Left::transposed(weighted), o, added, padded(K), steps, padded(V));
        for (int i = 0; i < steps; i++)
            for (int j = 0; j < padded(K); j += LANES) write(weighted[i] + j, -decay.from_start[i] * read(k[i] + j));
        product(Left::transposed(weighted), v, added, padded(K), steps, padded(V), true);
        advance(dstate);
    }

    // Those of q, k and g.
    void write_inner_gradients(const Walk& w) {
        transpose(changes, changes_transposed, steps, padded(V));
        transpose(state, state_transposed, padded(K), padded(V));
        product(o, changes_transposed, of_scores, steps, padded(V), steps, false, LOWER);
        times_lower(of_scores, decay.within, of_scores, steps);
        product(o, state_transposed, dq, steps, padded(V), padded(K));
        scale_rows(dq, decay.from_start, dq, steps, padded(K));
        product(v, state_transposed, reads, steps, padded(V), padded(K));
        scale_rows(reads, decay.from_start, reads, steps, padded(K));
        product(v, changes_transposed, of_keys, steps, padded(V), steps, false, LOWER);
        transpose(dstate, dstate_transposed, padded(K), padded(V));
        product(changes, dstate_transposed, dk, steps, padded(V), padded(K));
        scale_rows(dk, decay.to_end, dk, steps, padded(K));
        if (c.dg) write_dg(w);
        if (c.dq.data) {
            product(of_scores, k, dq, steps, steps, padded(K), true, UP_TO_ROW);
            store(c.dq, w, dq, q, q_factor);
        }
        if (!c.dk.data) return;
        times_lower(of_keys, decay.within, of_keys, steps);
        clear_diagonal(of_keys);
        product(of_keys, k, reads, steps, steps, padded(K), true, UP_TO_ROW);
        product(Left::transposed(of_keys), k, reads, steps, steps, padded(K), true, FROM_ROW);
        product(Left::transposed(of_scores), q, dk, steps, steps, padded(K), true, FROM_ROW);
        for (int i = 0; i < steps; i++)
            for (int j = 0; j < padded(K); j += LANES) write(dk[i] + j, read(dk[i] + j) - read(reads[i] + j));
        store(c.dk, w, dk, k, k_factor);
    }

    // dg_i is the sum of all that passes the gate of step i: of pairs of steps j < i <= l, of what steps from i on read
    // from the state before the chunk, of what earlier ones write to the state after it, and of d <S, dS'>. From i + 1 to
    // i the sum over pairs grows by row i and shrinks by column i. A pair on one side of the gate is in both, and may be
    // far larger than dg_i: double holds it exactly, so it leaves no rounding behind.
    //
    // `dq`, `reads` and `dk` hold what comes from states, `of_scores` is times D, `of_keys` is not.
    void write_dg(const Walk& w) {
        double since = 0;
        for (int i = 0; i < V; i++) since += dot(state_transposed[i], dstate_transposed[i], padded(K));
        since *= decay.total;
        for (int i = 0; i < chunk.steps; i++) {
            const double crossing = dot(k[i], dk[i], padded(K));
            since += crossing;
            change[i] = double(dot(q[i], dq[i], padded(K))) - dot(k[i], reads[i], padded(K)) - crossing;
        }
        for (int i = 0; i < chunk.steps; i++) {
            Wide row{};
            for (int j = 0; j < padded(i + 1); j += LANES) {
                Wide pairs = wide(read(of_scores[i] + j)) * wide(read(scores[i] + j)) -
                             wide(read(of_keys[i] + j)) * wide(read(keys[i] + j));
                row += pairs;
                write(change + j, read(change + j) - pairs);
            }
            change[i] += sum(row);
        }
        for (int i = chunk.steps - 1; i >= 0; i--) {
            since += change[i];
            c.dg[gate(w, i)] = decay.step[i] <= RESET ? 0 : float(since);
        }
    }
};

}  // namespace

extern "C" {
void chunk_forward(const Call* call) { walk_all<Worker>(*call, false); }
void chunk_backward(const Call* call) { walk_all<Worker>(*call, true); }
}
