// The gradient of gsa's chunk form on a CPU, in float32; the README of gsa has the formulas. A thread walks along time
// for the states before some chunks, a window, and then back from the last window on, with the gradients of both
// states. The states of the values and their gradients are transposed, [V, M]: all decays are then by column.

#include "gsa/cpu/walks.h"

namespace {

constexpr int WINDOW = 8;  // chunks whose states are at hand at once

// One thread, with the states of a window and the gradients of the states after a chunk.
struct Backward : Worker {
    const bool slots, keys, values;  // whose gradients are wanted, or what they follow from
    const int64_t numbers_k, numbers_v;
    Matrix state_k, state_v, before_k, before_v, dstate_k, dstate_v, added_k, added_v;  // [K, M] and [V, M]
    Matrix state_k_transposed, dstate_k_transposed, dense;                              // [M, K], [M, K], [M, V]
    Matrix v_transposed, dscores, gated_x, p, dp, dx, later_p, later_x;
    Matrix dq, dk, dv, ds, own, read_inside, across, dg;

    Backward(const Call& c, Space& space)
        : Worker(c, space),
          slots(c.ds.data || c.dg.data),
          keys(c.dq.data || c.dk.data || slots || c.dstate_k),
          values(c.dv.data || slots || c.dstate_v),
          numbers_k(Matrix::numbers(K, M)),
          numbers_v(Matrix::numbers(V, M)),
          state_k(space.matrix(K, M)),
          state_v(space.matrix(V, M)),
          before_k(space.matrices(WINDOW, K, M)),
          before_v(space.matrices(WINDOW, V, M)),
          dstate_k(space.matrix(K, M)),
          dstate_v(space.matrix(V, M)),
          added_k(space.matrix(K, M)),
          added_v(space.matrix(V, M)),
          state_k_transposed(space.matrix(M, K)),
          dstate_k_transposed(space.matrix(M, K)),
          dense(space.matrix(M, V)),
          v_transposed(space.matrix(V, CHUNK)),
          dscores(space.matrix(CHUNK, CHUNK)),
          gated_x(space.matrix(CHUNK, CHUNK)),
          p(space.matrix(CHUNK, M)),
          dp(space.matrix(CHUNK, M)),
          dx(space.matrix(CHUNK, M)),
          later_p(space.matrix(CHUNK, M)),
          later_x(space.matrix(CHUNK, M)),
          dq(space.matrix(CHUNK, K)),
          dk(space.matrix(CHUNK, K)),
          dv(space.matrix(CHUNK, V)),
          ds(space.matrix(CHUNK, M)),
          own(space.matrix(CHUNK, M)),
          read_inside(space.matrix(CHUNK, M)),
          across(space.matrix(CHUNK, M)),
          dg(space.matrix(CHUNK, M)) {}

    Matrix before(Matrix x, int64_t i, int64_t numbers) const { return {x.at + i % WINDOW * numbers, M}; }

    void load_transposed(const float* from, Matrix to) {  // [M, V] to [V, M]
        load_state(from, dense, M, V);
        transpose(dense, to, padded(M), padded(V));
    }

    void advance_states(const Walk& w, int64_t i) {
        const Chunk chunk = chunk_of(w, i);
        load_writes(w, chunk);
        advance(state_k, k, carried, K, M, chunk);
        advance(state_v, v, carried, V, M, chunk);
    }

    void walk(const Walk& w, int64_t chunks_before) {
        const int64_t at = w.sequence * c.heads + w.head, chunks = chunks_of(w);
        const int64_t windows = (chunks + WINDOW - 1) / WINDOW, numbers = numbers_k + numbers_v;
        std::vector<float> starts(c.states_k ? 0 : windows * numbers);
        load_state(c.state_k + at * K * M, state_k, K, M);
        load_transposed(c.state_v + at * M * V, state_v);
        for (int64_t i = 0; !c.states_k && i < chunks; i++) {
            if (i % WINDOW == 0) {
                std::copy_n(state_k.at, numbers_k, &starts[i / WINDOW * numbers]);
                std::copy_n(state_v.at, numbers_v, &starts[i / WINDOW * numbers] + numbers_k);
            }
            if (i / WINDOW + 1 < windows) advance_states(w, i);
        }
        for (Matrix x : {dstate_k, dstate_v}) std::fill_n(x.at, padded(x.at == dstate_k.at ? K : V) * x.distance, 0.f);
        if (c.dstate_k) load_state(c.dstate_k + at * K * M, dstate_k, K, M);
        if (c.dstate_v) load_transposed(c.dstate_v + at * M * V, dstate_v);
        for (int64_t window = windows - 1; window >= 0; window--) {
            const int64_t first = window * WINDOW, last = std::min(first + WINDOW, chunks);
            if (!c.states_k) {
                std::copy_n(&starts[window * numbers], numbers_k, state_k.at);
                std::copy_n(&starts[window * numbers] + numbers_k, numbers_v, state_v.at);
            }
            for (int64_t i = first; i < last; i++) {
                if (c.states_k) {
                    const int64_t kept = (chunks_before + i) * c.heads + w.head;
                    load_state(c.states_k + kept * K * M, before(before_k, i, numbers_k), K, M);
                    load_transposed(c.states_v + kept * M * V, before(before_v, i, numbers_v));
                } else {
                    std::copy_n(state_k.at, numbers_k, before(before_k, i, numbers_k).at);
                    std::copy_n(state_v.at, numbers_v, before(before_v, i, numbers_v).at);
                    if (i + 1 < last) advance_states(w, i);
                }
            }
            for (int64_t i = last - 1; i >= first; i--) {
                const Chunk chunk = chunk_of(w, i);
                load_writes(w, chunk);
                write_gradients(w, chunk, before(before_k, i, numbers_k), before(before_v, i, numbers_v));
            }
        }
        if (c.dstate_k) store_state(dstate_k, c.dstate_k + at * K * M, K, M);
        if (c.dstate_v) {
            transpose(dstate_v, dense, padded(V), padded(M));
            store_state(dense, c.dstate_v + at * M * V, M, V);
        }
    }

    void write_gradients(const Walk& w, const Chunk& chunk, Matrix state_k, Matrix state_v) {
        transpose(k, k_transposed, chunk.rows(), padded(K));
        transpose(v, v_transposed, chunk.rows(), padded(V));
        transpose(state_k, state_k_transposed, padded(K), padded(M));
        for (Matrix x : {ds, own, read_inside}) std::fill_n(x.at, chunk.rows() * x.distance, 0.f);
        for (int n = 0; n < group; n++) {
            look_and_weigh(chunk, w.head * group + n, state_k, state_v);
            add_gradients(chunk, w.head * group + n, n > 0);
        }
        if (c.dv.data) {
            transpose(dstate_v, dense, padded(V), padded(M));
            product(carried, dense, dv, chunk.rows(), padded(M), padded(V), true);
            store(c.dv, chunk, w.head, V, dv);
        }
        if (c.dk.data) {
            transpose(dstate_k, dstate_k_transposed, padded(K), padded(M));
            product(carried, dstate_k_transposed, dk, chunk.rows(), padded(M), padded(K), true);
            store(c.dk, chunk, w.head, K, dk);
        }
        if (slots) write_slot_gradients(w, chunk, state_k, state_v);
        if (c.dstate_k) carry(dstate_k, added_k, K);
        if (c.dstate_v) carry(dstate_v, added_v, V);
    }

    void carry(Matrix dstate, Matrix added, int rows) {
        each_vector(rows, padded(M), [&](int i, int m) {
            write(dstate[i] + m, read(decay.total.at + m) * read(dstate[i] + m) + read(added[i] + m));
        });
    }

    // p, dp without its diagonal, dx, and the key-gated scores of p and dx, for one query head.
    void look_and_weigh(const Chunk& chunk, int64_t head, Matrix state_k, Matrix state_v) {
        look(chunk, head, state_k);
        if (c.earlier.data) load(c.earlier, chunk, head, M, x);
        load(c.o, chunk, head, V, o);
        if (keys) {
            product(o, v_transposed, dscores, chunk.rows(), padded(V), chunk.rows(), false, LOWER);
            product(o, state_v, dp, chunk.rows(), padded(V), padded(M));
            times(dp, decay.from_start, dp, chunk.rows(), padded(M));
        }
        for (int block = 0; block < chunk.blocks(); block++) {
            const int first = block * BLOCK;
            if (!c.earlier.data) add_earlier(scores, x, block);
            for (int i = first; i < first + BLOCK; i++) {
                for (int m = 0; m < padded(M); m += LANES)
                    write(p[i] + m, read(x[i] + m) + scores[i][i] * read(s[i] + m));
                softmax(p[i], M);
            }
            if (c.dv.data) gate(p, gated, block);
            if (keys) {
                add_earlier(dscores, dp, block);
                for (int i = first; i < first + BLOCK; i++) differentiate_softmax(i);
                if (c.dq.data || c.dk.data) gate(dx, gated_x, block);
            }
            see_block(block);
        }
    }

    void differentiate_softmax(int i) {
        const float diagonal = dscores[i][i];
        Vector total{};
        for (int m = 0; m < padded(M); m += LANES) {
            const Vector all = read(dp[i] + m) + diagonal * read(s[i] + m);
            write(dx[i] + m, all);
            total += read(p[i] + m) * all;
        }
        const float mean = sum(total);
        for (int m = 0; m < padded(M); m += LANES) {
            const Vector weight = read(p[i] + m), change = weight * (read(dx[i] + m) - mean);
            write(dx[i] + m, change);
            const Vector inside = weight * read(dp[i] + m) + change * read(x[i] + m);
            write(read_inside[i] + m, read(read_inside[i] + m) + inside);
        }
    }

    // After look_and_weigh: what one query head adds to the gradients, all of dq.
    void add_gradients(const Chunk& chunk, int64_t head, bool add) {
        const int rows = chunk.rows();
        if (c.dv.data) product(gated, o, dv, rows, rows, padded(V), add, FROM_ROW);
        if (c.dk.data) product(gated_x, q, dk, rows, rows, padded(K), add, FROM_ROW);
        if (values) {
            read_later(chunk, p, later_p, dscores);
            product(Left::transposed(o), later_p, added_v, padded(V), rows, padded(M), add);
        }
        if (!keys) return;
        read_later(chunk, dx, later_x, scores);
        product(Left::transposed(q), later_x, added_k, padded(K), rows, padded(M), add);
        if (slots)
            each_vector(rows, padded(M), [&](int i, int m) {
                const Vector pairs = dscores[i][i] * read(p[i] + m) + scores[i][i] * read(dx[i] + m);
                write(own[i] + m, read(own[i] + m) + pairs);
            });
        if (!c.dq.data) return;
        product(Left::transposed(gated_x), k, dq, rows, rows, padded(K), false, UP_TO_ROW);
        product(later_x, state_k_transposed, dq, rows, padded(M), padded(K), true);
        store(c.dq, chunk, head, K, dq, c.scale);
    }

    // Decays what steps look back with to the chunk's start, block by block from the last one; on the way, adds to ds
    // what the steps of a block give to later ones of the chunk, value-gated.
    void read_later(const Chunk& chunk, Matrix looking, Matrix later, Matrix weights) {
        for (int block = chunk.blocks() - 1; block >= 0; block--) {
            const int row = block * BLOCK, next = row + BLOCK, rest = chunk.rows() - next;
            if (slots) {
                if (rest) {
                    product(Left::transposed(part(weights, next, row)), part(later, next), arriving, BLOCK, rest,
                            padded(M));
                    add_times(arriving, part(decay.before, row), part(ds, row), BLOCK, padded(M));
                }
                add_pairs_transposed(part(weights, row, row), part(looking, row), part(decay.step, row), part(ds, row),
                                     padded(M));
            }
            times_row(part(later, next), decay.over_block(block), rest, padded(M));
            times(part(looking, row), part(decay.after, row), part(later, row), BLOCK, padded(M));
        }
    }

    // dg_t is the sum of all that passes from before step t to it or past it: of what steps from t on read from earlier
    // ones, less what they give to later ones, of what steps before t write to the states after the chunk, and of what
    // the states before it leave there. Without the pairs of a step with itself, which would cancel.
    void write_slot_gradients(const Walk& w, const Chunk& chunk, Matrix state_k, Matrix state_v) {
        const int rows = chunk.rows();
        product(k, dstate_k, across, rows, padded(K), padded(M));
        product(v, dstate_v, across, rows, padded(V), padded(M), true);
        times(across, decay.to_end, across, rows, padded(M));
        for (int m = 0; m < padded(M); m += LANES) {
            Vector passing{};
            for (int i = 0; i < K; i++) passing += read(state_k[i] + m) * read(dstate_k[i] + m);
            for (int i = 0; i < V; i++) passing += read(state_v[i] + m) * read(dstate_v[i] + m);
            passing *= read(decay.total.at + m);
            for (int t = 0; t < rows; t++) {
                write(dg[t] + m, passing);
                passing += read(s[t] + m) * read(across[t] + m);
            }
            Vector since{};
            for (int t = rows - 1; t >= 0; t--) {
                since += read(read_inside[t] + m) - read(s[t] + m) * read(ds[t] + m);
                write(dg[t] + m, read(decay.step[t] + m) <= RESET ? Vector{} : read(dg[t] + m) + since);
                write(ds[t] + m, read(ds[t] + m) + read(own[t] + m) + read(across[t] + m));
            }
        }
        store(c.ds, chunk, w.head, M, ds);
        store(c.dg, chunk, w.head, M, dg);
    }
};

}  // namespace

extern "C" void chunk_backward(const Call* call) { walk_each<Backward>(*call); }
