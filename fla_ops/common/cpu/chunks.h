// Chunks of a sequence's steps, and the decays inside one.

#include "common/cpu/kernels.h"

namespace {

constexpr int CHUNK = 64;  // steps in a chunk, at most
constexpr double RESET = 9.36e-14;  // exp(-30): a step that decays as strongly has no gate gradient

// Some steps in the order that they are walked: `ahead` is 1, or -1 backwards in time.
struct Chunk {
    int64_t batch, start;
    int steps, ahead;
    int64_t kept = -1;  // which row of the kept states is the one after it; -1: none
    int64_t at(int i) const { return start + i * ahead; }
};

// The decays in one chunk of one head: products in double of the steps' factors in double, rounded once.
struct Decay {
    Matrix within;                // D
    float *from_start, *to_end;   // a, b
    double step[CHUNK], total;    // exp(g), d

    explicit Decay(Space& space)
        : within(space.matrix(CHUNK, CHUNK)), from_start(space.take(CHUNK)), to_end(space.take(CHUNK)) {}

    // Of gates g [B, T, H] or, where those are null, of a constant factor.
    void read(const float* g, int64_t time, int64_t heads, double constant, const Chunk& chunk, int64_t head) {
        for (int i = 0; i < chunk.steps; i++)
            step[i] = g ? std::exp(double(g[(chunk.batch * time + chunk.at(i)) * heads + head])) : constant;
        total = 1;
        for (int i = 0; i < chunk.steps; i++) from_start[i] = float(total *= step[i]);
        double since = 1;
        for (int j = chunk.steps - 1; j >= 0; j--) {
            to_end[j] = float(since);
            since *= step[j];
        }
        for (int i = chunk.steps; i < padded(chunk.steps); i++) from_start[i] = to_end[i] = 0;
    }

    // Row i of D is row i - 1, one step older, and a one on the diagonal; of what is above it, only zeros up to the
    // next multiple of 16, which a gate that is NaN or infinite does not touch.
    void fill_within(int steps) {
        double row[CHUNK];
        for (int i = 0; i < steps; i++) {
            const int diagonal = i / 16 * 16;
            for (int block = 0; block < diagonal; block += 16)
                for (int j = block; j < block + 16; j++) within[i][j] = float(row[j] *= step[i]);
            for (int j = diagonal; j < diagonal + 16; j++) {
                row[j] = j < i ? row[j] * step[i] : j == i;
                within[i][j] = float(row[j]);
            }
        }
        for (int i = steps; i < padded(steps); i++) std::fill(within[i], within[i] + padded(steps), 0.f);
    }
};

}  // namespace
