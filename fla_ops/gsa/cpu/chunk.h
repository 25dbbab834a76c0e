// What the chunk form of gsa works on: the arguments, the decays of a chunk, and the pairs of steps inside it.
//
// A chunk is cut into blocks of 16 steps. A step i of a later block meets a step j of an earlier one at the boundary
// before the later block: the decay from j to the boundary is on the one operand of a product, the decay from the
// boundary to i on the other. Both are products of the decays of steps, so nothing is subtracted or divided, and a
// factor is never above one where no decay is. Inside a block the weights of all pairs follow from step to step.

#include "gsa/cpu/softmax.h"

namespace {

constexpr int CHUNK = 64, BLOCK = 16;   // steps, at most
constexpr float RESET = 9.36e-14f;      // exp(-30): a step that decays as strongly has no gate gradient

// The arguments of both operators, as cpp.py passes them; `heads` are those of the states. Pointers may be null.
struct Call : Walks {
    int64_t M, group, chunk_size;
    Steps q, k, v, s, g, o;            // backward, o is its gradient
    Steps earlier, own;                // what the softmax's argument consists of, kept for the gradient
    Steps dq, dk, dv, ds, dg;
    float *state_k, *state_v;          // [N, H, K, M] and [N, H, M, V]: initial, then final
    float *dstate_k, *dstate_v;        // gradients of the final states, then of the initial ones
    float *states_k, *states_v;        // [chunks, H, K, M] and [chunks, H, M, V]: those before each chunk
};

// Some steps in the order that they are walked: `ahead` is 1, or -1 backwards in time.
struct Chunk {
    int64_t batch, start;
    int steps, ahead;
    int blocks() const { return padded(steps) / BLOCK; }
    int rows() const { return padded(steps); }
};

inline Matrix part(Matrix x, int row, int column = 0) {
    x.at = x[row] + column;
    return x;
}

// body(offset of a vector) for every vector of some rows of matrices that have one width.
template <class Body>
inline void each_vector(int rows, int columns, Body body) {
    for (int i = 0; i < rows; i++)
        for (int m = 0; m < columns; m += LANES) body(i, m);
}

// z = x * y, element by element; z may be either.
inline void times(Matrix x, Matrix y, Matrix z, int rows, int columns) {
    each_vector(rows, columns, [&](int i, int m) { write(z[i] + m, read(x[i] + m) * read(y[i] + m)); });
}

// z += x * y.
inline void add_times(Matrix x, Matrix y, Matrix z, int rows, int columns) {
    each_vector(rows, columns, [&](int i, int m) {
        write(z[i] + m, read(z[i] + m) + read(x[i] + m) * read(y[i] + m));
    });
}

// x[i] *= factor, the same for all rows.
inline void times_row(Matrix x, const float* factor, int rows, int columns) {
    each_vector(rows, columns, [&](int i, int m) { write(x[i] + m, read(x[i] + m) * read(factor + m)); });
}

// The decays of each memory slot in a chunk, [C, M].
struct Decay {
    Matrix step, after, before;   // of a step; from its block's start to it; from it to its block's end
    Matrix from_start, to_end;    // from the chunk's start to a step, from it to the chunk's end
    Matrix total;                 // [1, M], over the chunk: exp of a sum in double, since a state meets many of them

    Decay(Space& space, int64_t M)
        : step(space.matrix(CHUNK, M)),
          after(space.matrix(CHUNK, M)),
          before(space.matrix(CHUNK, M)),
          from_start(space.matrix(CHUNK, M)),
          to_end(space.matrix(CHUNK, M)),
          total(space.matrix(1, M)) {}

    void read(const Call& c, const Chunk& chunk, int64_t head) {
        c.g.load(chunk.batch, chunk.start, chunk.ahead, head, chunk.steps, 1, int(c.M), step, 0);
        for (int m = 0; m < padded(c.M); m += LANES) {
            Wide sum{};
            for (int i = 0; i < chunk.rows(); i++) {
                const Vector g = ::read(step[i] + m);
                sum += wide(g);
                write(step[i] + m, exp(g));
            }
            write(total.at + m, exp_of(sum));
            Vector since_start = Vector{} + 1, until_end = since_start;
            for (int block = 0; block < chunk.rows(); block += BLOCK) {
                Vector since = Vector{} + 1;
                for (int i = block; i < block + BLOCK; i++) {
                    since *= ::read(step[i] + m);
                    write(after[i] + m, since);
                    write(from_start[i] + m, since_start * since);
                }
                since_start *= since;
            }
            for (int block = chunk.rows() - BLOCK; block >= 0; block -= BLOCK) {
                Vector until = Vector{} + 1;
                for (int j = block + BLOCK - 1; j >= block; j--) {
                    write(before[j] + m, until);
                    write(to_end[j] + m, until * until_end);
                    until *= ::read(step[j] + m);
                }
                until_end *= until;
            }
        }
    }

    const float* over_block(int block) const { return after[block * BLOCK + BLOCK - 1]; }

private:
    static Vector exp_of(Wide sum) {
        const Vector high = narrow(sum), low = narrow(sum - wide(high)), zero{};
        const Vector inside = high > -100.f ? (high < 100.f ? low : zero) : zero;
        return exp(high) * (inside + 1.f);
    }
};

// Pairs j < i inside a block, value-gated: x_i += sum_j scores_ij exp(P_i - P_j) s_j.
inline void add_pairs(Matrix scores, Matrix s, Matrix step, Matrix x, int columns) {
    for (int m = 0; m < columns; m += LANES) {
        Vector seen[BLOCK];
        seen[0] = read(s[0] + m);
#pragma GCC unroll 16
        for (int i = 1; i < BLOCK; i++) {
            const Vector decay = read(step[i] + m);
            Vector sum{};
#pragma GCC unroll 16
            for (int j = 0; j < i; j++) {
                seen[j] *= decay;
                sum += scores[i][j] * seen[j];
            }
            write(x[i] + m, read(x[i] + m) + sum);
            seen[i] = read(s[i] + m);
        }
    }
}

// The same for what is seen: y_j += sum_{i > j} scores_ij exp(P_i - P_j) x_i.
inline void add_pairs_transposed(Matrix scores, Matrix x, Matrix step, Matrix y, int columns) {
    for (int m = 0; m < columns; m += LANES) {
        Vector looking[BLOCK];
        looking[BLOCK - 1] = read(x[BLOCK - 1] + m);
#pragma GCC unroll 16
        for (int j = BLOCK - 2; j >= 0; j--) {
            const Vector decay = read(step[j + 1] + m);
            Vector sum{};
#pragma GCC unroll 16
            for (int i = BLOCK - 1; i > j; i--) {
                looking[i] *= decay;
                sum += scores[i][j] * looking[i];
            }
            write(y[j] + m, read(y[j] + m) + sum);
            looking[j] = read(x[j] + m);
        }
    }
}

// Pairs j <= i inside a block, key-gated: gated[j][i] = sum_m x_im exp(P_im - P_jm) s_jm, and zeros for j > i. A lane
// is a step i: what it holds before its own turn does not count, so a gate that is NaN does not reach earlier steps.
inline void gate_pairs(Matrix x, Matrix s, Matrix step, Matrix gated, int slots) {
    for (int first = 0; first < BLOCK; first += LANES) {
        Integers lane;
        for (int i = 0; i < LANES; i++) lane[i] = first + i;
        Vector sums[BLOCK]{};
        for (int m = 0; m < slots; m++) {
            Vector looking{};
#pragma GCC unroll 16
            for (int j = BLOCK - 1; j >= 0; j--) {
                if (j + 1 < BLOCK) looking *= step[j + 1][m];
                looking = lane == j ? Vector{} + x[j][m] : looking;
                sums[j] += s[j][m] * looking;
            }
        }
        for (int j = 0; j < BLOCK; j++) write(gated[j] + first, lane >= j ? sums[j] : Vector{});
    }
}

}  // namespace
