// The chunk forms of simple_gla on a CPU, forward and backward, in float32.
//
// Inside a chunk of C steps the quadratic form is a masked C x C product; across chunks a state S of [K, V] is carried:
//
//     o_i = sum_{j <= i} D_ij (q_i . k_j) v_j + a_i S^T q_i        (q already scaled)
//     S'  = d S + sum_j b_j k_j v_j^T
//
// D_ij is the decay from step j to step i, a_i from the chunk's start to i, b_j from j to the chunk's end, d over the
// chunk: running products of the steps' decays, so that no sum of logarithms loses digits, and in double, so that a
// factor near one has no bias that grows with the number of steps. d enters a state as two floats for the same reason.
//
// Three passes: what each chunk adds to the state; the states before the chunks, by the recurrence; the outputs, or
// the gradients. The chunk form spreads each pass over the chunks of all heads and keeps their states; the fused form
// walks along each sequence and head and keeps those of a few chunks, in the core's cache. Backwards in time, the steps
// of a sequence and so its chunks are counted from its end.

#include "simple_gla/cpu/chunk.h"

namespace {

// One thread, with the matrices it works in.
struct Worker : Inputs {
    const Chunks& chunks;
    Matrix row, weighted, added, k_transposed, v_transposed, dstate_transposed;
    Matrix scores, weights, dq, dk, dv, dq_of_group, dk_of_group;
    Decay decay;
    double change[CHUNK]{};  // of dg, from step to step

    Worker(const Call& c, const Chunks& chunks, Space& space)
        : Inputs(c, space),
          chunks(chunks),
          row(space.matrix(1, std::max(K, V))),
          weighted(space.matrix(CHUNK, K)),
          added(space.matrix(K, V)),
          k_transposed(space.matrix(K, CHUNK)),
          v_transposed(space.matrix(V, CHUNK)),
          dstate_transposed(space.matrix(V, K)),
          scores(space.matrix(CHUNK, CHUNK)),
          weights(space.matrix(CHUNK, CHUNK)),
          dq(space.matrix(CHUNK, K)),
          dk(space.matrix(CHUNK, K)),
          dv(space.matrix(CHUNK, V)),
          dq_of_group(space.matrix(CHUNK, K)),
          dk_of_group(space.matrix(CHUNK, K)),
          decay(space) {}

    int64_t slot(const Window& w, int64_t chunk, int64_t head) const {
        return (chunk - w.first) * (w.last_head - w.first_head) * group + head - w.first_head * group;
    }
    Matrix state(const Window& w, int64_t chunk, int64_t head) const {  // [K, V]
        return {w.states + slot(w, chunk, head) * Matrix::numbers(K, V), V};
    }
    Matrix state_transposed(const Window& w, int64_t chunk, int64_t head) const {  // [V, K]
        return {w.states + slot(w, chunk, head) * Matrix::numbers(V, K), K};
    }
    Matrix dstate(const Window& w, int64_t chunk, int64_t head) const {  // [K, V]
        return {w.dstates + slot(w, chunk, head) * Matrix::numbers(K, V), V};
    }

    // body(chunk, key head) for all of a window, with what it wants loaded.
    template <class Body>
    void each_chunk(const Window& w, bool shared, int what, Body body) {
        int64_t together = heads_together(c), blocks = (w.last_head - w.first_head + together - 1) / together;
        spread(shared, (w.last - w.first) * blocks, [&](int64_t i) {
            int64_t first = w.first_head + i % blocks * together, last = std::min(first + together, w.last_head);
            load(chunks.all[w.first + i / blocks], first, last, what);
            for (int64_t head = first; head < last; head++) {
                select_key_head(head);
                body(w.first + i / blocks, head);
            }
        });
    }

    // body(value head) for those that a key head serves, with v, o and the decays of each.
    template <class Body>
    void each_head(const Chunk& chunk, int64_t key_head, Body body) {
        for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
            select_head(head);
            const double constant = c.g_gamma ? std::exp(double(c.g_gamma[head])) : 1;
            decay.read(c.g, c.time, c.heads, constant, chunk, head);
            body(head);
        }
    }

    // sum_j b_j k_j v_j^T for each value head of a key head, as [K, V] or [V, K].
    void add_states(const Window& w, int64_t at, int64_t key_head, bool transposed) {
        const Chunk& chunk = chunks.all[at];
        int steps = padded(chunk.steps);
        each_head(chunk, key_head, [&](int64_t head) {
            w.totals[slot(w, at, head)] = Factor(decay.total);
            scale_rows(k, decay.to_end, weighted, steps, padded(K));
            if (transposed)
                product(Left::transposed(v), weighted, state_transposed(w, at, head), padded(V), steps, padded(K));
            else
                product(Left::transposed(weighted), v, state(w, at, head), padded(K), chunk.steps, padded(V));
        });
    }

    // sum_i a_i q_i do_i^T for each value head of a key head.
    void add_dstates(const Window& w, int64_t at, int64_t key_head) {
        const Chunk& chunk = chunks.all[at];
        int steps = padded(chunk.steps);
        each_head(chunk, key_head, [&](int64_t head) {
            w.totals[slot(w, at, head)] = Factor(decay.total);
            scale_rows(q, decay.from_start, weighted, steps, padded(K));
            product(Left::transposed(weighted), o, dstate(w, at, head), padded(K), steps, padded(V));
        });
    }

    // S <- d S + what a chunk adds, along the chunks of each sequence: `carried` holds S before the first of them, then
    // after the last; what a chunk adds is replaced by the S that it meets, with zeros past its edges.
    void carry(const Window& w, bool shared, float* added, const States& carried, int rows, int width, bool backwards) {
        int64_t heads = (w.last_head - w.first_head) * group, sequences = w.last_sequence - w.first_sequence;
        const int64_t all = padded(rows);
        spread(shared, sequences * heads * all, [&](int64_t i) {
            int64_t at = i % all, head = w.first_head * group + i / all % heads;
            int64_t n = w.first_sequence + i / all / heads;
            int64_t first = std::max(w.first, chunks.first[n]), last = std::min(w.last, chunks.first[n + 1]);
            float* s = row.at;
            const int inside = at < rows ? width : 0;
            if (inside) carried.load(n, head, at, width, s);
            for (int64_t step = 0; step < last - first; step++) {
                const int64_t chunk = backwards ? last - 1 - step : first + step, which = slot(w, chunk, head);
                float* x = Matrix(added + which * Matrix::numbers(rows, width), width)[at];
                const Factor total = w.totals[which];
                for (int j = 0; j < inside; j++) {
                    float next = total.times_plus(s[j], x[j]);
                    x[j] = s[j];
                    s[j] = next;
                }
                std::fill(x + inside, x + padded(width), 0.f);
                const int64_t kept = chunks.all[chunk].kept;
                if (inside && kept >= 0) c.kept.store_row(kept, at, head, width, s);
            }
            if (inside) carried.store(n, head, at, width, s);
        });
    }

    void fill_scores(const Chunk& chunk) {
        int steps = padded(chunk.steps);
        transpose(k, k_transposed, steps, padded(K));
        product(q, k_transposed, scores, steps, padded(K), steps, false, LOWER);
    }

    // After fill_scores; `o` is written, not read.
    void write_output(const Chunk& chunk, int64_t head, Matrix before) {
        int steps = padded(chunk.steps);
        decay.fill_within(chunk.steps);
        product(q, before, o, chunk.steps, padded(K), padded(V));  // a row past the last is not stored
        scale_rows(o, decay.from_start, o, steps, padded(V));
        times_lower(scores, decay.within, weights, steps);
        product(weights, v, o, chunk.steps, steps, padded(V), true, UP_TO_ROW);
        store(c.o, chunk, head, V, o);
    }

    void write_outputs(const Window& w, int64_t at, int64_t key_head) {
        const Chunk& chunk = chunks.all[at];
        fill_scores(chunk);
        each_head(chunk, key_head, [&](int64_t head) { write_output(chunk, head, state(w, at, head)); });
    }

    // S <- d S + what the chunk adds, which is summed on its own first: S is rounded once, not at each step.
    void advance(Matrix s) const {
        const Factor total(decay.total);
        for (int i = 0; i < K; i++)
            for (int j = 0; j < padded(V); j += LANES)
                write(s[i] + j, total.times_plus(read(s[i] + j), read(added[i] + j)));
    }

    // The fused form: each chunk's outputs, then the state after it, which never leaves the cache.
    void walk_forward(const Window& w) {
        const int64_t first = w.first_head * group, heads = (w.last_head - w.first_head) * group;
        for (int64_t i = first; i < first + heads; i++) load_state(w.first_sequence, i, state(w, w.first, i));
        for (int64_t at = chunks.first[w.first_sequence]; at < chunks.first[w.last_sequence]; at++) {
            const Chunk& chunk = chunks.all[at];
            int steps = padded(chunk.steps);
            load(chunk, w.first_head, w.last_head, (c.o.data ? LOAD_Q : 0) | LOAD_K | LOAD_V);
            for (int64_t key_head = w.first_head; key_head < w.last_head; key_head++) {
                select_key_head(key_head);
                if (c.o.data) fill_scores(chunk);
                each_head(chunk, key_head, [&](int64_t head) {
                    Matrix s = state(w, w.first, head);
                    if (c.o.data) write_output(chunk, head, s);
                    scale_rows(k, decay.to_end, weighted, steps, padded(K));
                    product(Left::transposed(weighted), v, added, padded(K), chunk.steps, padded(V));
                    advance(s);
                    if (chunk.kept >= 0)
                        for (int i = 0; i < K; i++) c.kept.store_row(chunk.kept, i, head, V, s[i]);
                });
            }
        }
        for (int64_t i = first; i < first + heads; i++) store_state(w.first_sequence, i, state(w, w.first, i));
    }

    void write_gradients(const Window& w, int64_t at, int64_t key_head) {
        const Chunk& chunk = chunks.all[at];
        int steps = padded(chunk.steps);
        fill_scores(chunk);
        each_head(chunk, key_head, [&](int64_t head) {
            decay.fill_within(chunk.steps);
            if (c.dv.data) write_dv(w, at, head);
            if (!(c.dq.data || c.dk.data || c.dg)) return;
            transpose(v, v_transposed, steps, padded(V));
            product(o, v_transposed, weights, steps, padded(V), steps, false, LOWER);
            times_lower(weights, decay.within, weights, steps);
            add_dq_and_dk(w, at, head);
            if (head == key_head * group) {
                std::swap(dq, dq_of_group);
                std::swap(dk, dk_of_group);
            } else {
                add(dq, dq_of_group, steps, padded(K));
                add(dk, dk_of_group, steps, padded(K));
            }
        });
        if (c.dq.data) store(c.dq, chunk, key_head, K, dq_of_group, c.scale);
        if (c.dk.data) store(c.dk, chunk, key_head, K, dk_of_group);
    }

    void write_dv(const Window& w, int64_t at, int64_t head) {
        const Chunk& chunk = chunks.all[at];
        int steps = padded(chunk.steps);
        product(k, dstate(w, at, head), dv, steps, padded(K), padded(V));
        scale_rows(dv, decay.to_end, dv, steps, padded(V));
        times_lower(scores, decay.within, weights, steps);
        product(Left::transposed(weights), o, dv, steps, steps, padded(V), true, FROM_ROW);
        store(c.dv, chunk, head, V, dv);
    }

    // `weights` holds (do_i . v_j) D_ij.
    void add_dq_and_dk(const Window& w, int64_t at, int64_t head) {
        const Chunk& chunk = chunks.all[at];
        int steps = padded(chunk.steps);
        if (c.dq.data || c.dg) {
            product(o, state_transposed(w, at, head), dq, steps, padded(V), padded(K));
            scale_rows(dq, decay.from_start, dq, steps, padded(K));
            if (c.dg)
                for (int i = 0; i < chunk.steps; i++) change[i] = dot(q[i], dq[i], padded(K));
            product(weights, k, dq, steps, steps, padded(K), true, UP_TO_ROW);
        }
        if (c.dk.data || c.dg) {
            transpose(dstate(w, at, head), dstate_transposed, padded(K), padded(V));
            product(v, dstate_transposed, dk, steps, padded(V), padded(K));
            scale_rows(dk, decay.to_end, dk, steps, padded(K));
            if (c.dg) write_dg(w, at, head);
            product(Left::transposed(weights), q, dk, steps, steps, padded(K), true, FROM_ROW);
        }
    }

    // dg_i is the sum of all that passes the gate of step i: of D_lj (do_l . v_j) (q_l . k_j) over j < i <= l, of what
    // steps from i on read from the state before the chunk, of what earlier ones write to the state after it, and of
    // d <S, dS'>. From i + 1 to i the sum over pairs grows by row i and shrinks by column i. A pair on one side of the
    // gate is in both, and may be far larger than dg_i: double holds it exactly, so it leaves no rounding behind.
    //
    // `weights` holds (do_i . v_j) D_ij; `change` holds q_i . dq_i and `dk` dk without the pairs of the chunk.
    void write_dg(const Window& w, int64_t at, int64_t head) {
        const Chunk& chunk = chunks.all[at];
        double since = 0;
        Matrix before = state_transposed(w, at, head);
        for (int i = 0; i < V; i++) since += dot(before[i], dstate_transposed[i], padded(K));
        since *= decay.total;
        for (int j = 0; j < chunk.steps; j++) {
            const double crossing = dot(k[j], dk[j], padded(K));
            since += crossing;
            change[j] -= crossing;
        }
        for (int i = 0; i < chunk.steps; i++) {
            Wide row{};
            for (int j = 0; j < padded(i + 1); j += LANES) {
                Wide pairs = wide(read(weights[i] + j)) * wide(read(scores[i] + j));
                row += pairs;
                write(change + j, read(change + j) - pairs);
            }
            change[i] += sum(row);
        }
        for (int i = chunk.steps - 1; i >= 0; i--) {
            since += change[i];
            c.dg[(chunk.batch * c.time + chunk.at(i)) * c.heads + head] = decay.step[i] <= RESET ? 0 : float(since);
        }
    }

    void forward(const Window& w, bool shared) {
        each_chunk(w, shared, LOAD_K | LOAD_V, [&](int64_t chunk, int64_t head) { add_states(w, chunk, head, false); });
        carry(w, shared, w.states, c.state, K, V, false);
        if (!c.o.data) return;
        each_chunk(w, shared, LOAD_Q | LOAD_K | LOAD_V,
                   [&](int64_t chunk, int64_t head) { write_outputs(w, chunk, head); });
    }

    void states_forward(const Window& w, bool shared) {
        each_chunk(w, shared, LOAD_K | LOAD_V, [&](int64_t chunk, int64_t head) { add_states(w, chunk, head, true); });
        carry(w, shared, w.states, c.state, V, K, false);
    }

    void backward(const Window& w, bool shared) {
        if (c.dq.data || c.dg) states_forward(w, shared);
        if (c.dstate.pool.data) {
            each_chunk(w, shared, LOAD_Q | LOAD_O, [&](int64_t chunk, int64_t head) { add_dstates(w, chunk, head); });
            carry(w, shared, w.dstates, c.dstate, K, V, true);
        }
        int what = LOAD_Q | LOAD_K | LOAD_V | LOAD_O;
        each_chunk(w, shared, what, [&](int64_t chunk, int64_t head) { write_gradients(w, chunk, head); });
    }

    // The fused form: the states before each window by a walk forwards, then the windows from the last one on.
    void walk_backward(Window w, float* before_windows) {
        const int64_t first = chunks.first[w.first_sequence], last = chunks.first[w.last_sequence];
        const int64_t windows = (last - first + WINDOW - 1) / WINDOW, numbers = (w.last_head - w.first_head) * group * V * K;
        float* state = static_cast<float*>(c.state.pool.data) + (w.first_sequence * c.heads + w.first_head * group) * V * K;
        auto select = [&](int64_t i) {
            w.first = first + i * WINDOW;
            w.last = std::min(last, w.first + WINDOW);
        };
        bool reads = c.dq.data || c.dg;
        for (int64_t i = 0; reads && i < windows; i++) {
            std::copy(state, state + numbers, before_windows + i * numbers);
            select(i);
            if (i + 1 < windows) states_forward(w, false);
        }
        for (int64_t i = windows - 1; i >= 0; i--) {
            if (reads) std::copy(before_windows + i * numbers, before_windows + (i + 1) * numbers, state);
            select(i);
            backward(w, false);
        }
    }
};

// A call: its space holds what the threads share, then each thread's own.
class Run {
    const Call& c;
    const bool backward;
    const Chunks chunks;
    Space shared, own;  // counted
    Window window{};
    float* before_windows;  // the fused form's backward pass: S before each window, [heads, V, K]

    Window take_window(Space& space) const {
        int64_t in_memory = c.fused ? (backward ? WINDOW : 1) : int64_t(chunks.all.size());
        int64_t states = in_memory * (c.fused ? heads_together(c) * (c.heads / c.key_heads) : c.heads);
        Window w{0, int64_t(chunks.all.size()), 0, c.sequences, 0, c.key_heads, nullptr, nullptr, nullptr};
        w.states = space.take(states * (backward ? Matrix::numbers(c.V, c.K) : Matrix::numbers(c.K, c.V)));
        if (backward) w.dstates = space.take(states * Matrix::numbers(c.K, c.V));
        w.totals = reinterpret_cast<Factor*>(space.take(2 * states));
        return w;
    }
    // How many windows come before a sequence, at most: one of each sequence need not be full.
    int64_t windows_before(int64_t sequence) const { return chunks.first[sequence] / WINDOW + sequence; }

    // Some key heads of a sequence.
    void walk(Worker& worker, Window w, int64_t n, int64_t head) const {
        w.first_sequence = n;
        w.last_sequence = n + 1;
        w.first_head = head;
        w.last_head = std::min(head + heads_together(c), c.key_heads);
        if (backward) {
            int64_t before = windows_before(n) * c.key_heads + head * (windows_before(n + 1) - windows_before(n));
            worker.walk_backward(w, before_windows + before * (c.heads / c.key_heads) * c.V * c.K);
        } else {
            worker.walk_forward(w);
        }
    }

public:
    Run(const Call& c, bool backward) : c(c), backward(backward), chunks(c), shared{c.space} {
        Worker counted(c, chunks, own);
        if (c.fused)
            take_window(own);
        else
            window = take_window(shared);
        before_windows = c.fused && backward ? shared.take(windows_before(c.sequences) * c.heads * c.V * c.K) : nullptr;
    }
    int64_t numbers() const { return shared.used + own.used * c.threads; }

    void operator()() const {
        std::atomic<int64_t> next{0};
        with_team(c.threads, [&] {
            FlushDenormals flush;
            Space mine{c.space + shared.used + own.used * team.thread};
            Worker worker(c, chunks, mine);
            if (c.fused) {
                const Window w = take_window(mine);
                const int64_t together = heads_together(c), blocks = (c.key_heads + together - 1) / together;
                share_as_they_come(next, c.sequences * blocks,
                                   [&](int64_t i) { walk(worker, w, i / blocks, i % blocks * together); });
            } else if (backward) {
                worker.backward(window, true);
            } else {
                worker.forward(window, true);
            }
        });
    }
};

}  // namespace

extern "C" {
int64_t chunk_space(const Call* call, int backward) { return Run(*call, backward).numbers(); }
void chunk_forward(const Call* call) { Run(*call, false)(); }
void chunk_backward(const Call* call) { Run(*call, true)(); }
}
