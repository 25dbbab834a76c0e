// causal_conv on a CPU, in float32: o_t = act(bias + sum_i weight_i x_{t - W + 1 + i}), channel by channel.
//
// A walk goes along one sequence with a tile of its channels. The rows that a step sees are in the cache as float32, in
// a ring: row p of the W - 1 steps of the state and the T of x lies at p % W. The gradient is one walk along time too: a
// step adds to the gradients of the W rows that it sees, and the oldest of them is then complete.

#include "common/cpu/kernels.h"

namespace {

// The arguments of all operators, as cpp.py passes them. Pointers are null where there is nothing to pass.
struct Call {
    int64_t time, sequences, channels, taps, held, silu, threads;
    const int64_t* offsets;     // of packed sequences, [N + 1]
    const int64_t* slots;       // the row of a state pool for each sequence, -1 for padding
    const float* bias;          // [D]
    Steps weight;               // [1, W, 1, D]
    Steps x, o;                 // [B, T, 1, D]; backward, o is its gradient
    Steps initial, last;        // [N, W - 1, 1, D]; backward, last is the gradient of the final state
    Steps dx, dinitial;
    float *dweight, *dbias;     // [N, W, D], [N, D]
};

constexpr int TILE = 256;    // channels of a walk
constexpr int BLOCK = 16;    // steps that are read together where they, and not the channels, lie side by side
constexpr int WINDOW = 64;   // steps whose shares of the weights' gradient are summed on their own

typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

inline Whole bits(Vector x) {
    Whole y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// 2^n times a polynomial, for x from -88 to 88; what is outside counts as the nearest of these. NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector low = Vector{} - 88.f, high = Vector{} + 88.f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    constexpr float SHIFT = 12582912;  // 1.5 * 2^23: a sum with it has no fraction
    const Vector shifted = x * 1.44269504f + SHIFT, n = shifted - SHIFT;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const Whole power = (bits(shifted) - bits(Vector{} + SHIFT) + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

inline Vector sigmoid(Vector x) { return 1.f / (1.f + exponential(-x)); }

// Rows of a tile, a cache line more than it apart.
struct Rows {
    float* at;
    float* operator[](int64_t row) const { return at + row * (TILE + 16); }
};

// One thread, with the rows of a tile.
template <int W>
struct Worker {
    const Call& c;
    const int held;  // steps in a row of the pool, at least W - 1
    std::vector<float> space;
    Rows row, bias, weight, ring, blocks[2], gradients, parts, totals;

    Worker(const Call& c, bool backward)
        : c(c),
          held(int(c.held)),
          space((2 + W + held + 1 + 2 * BLOCK + backward * (W + 2 * (W + 1))) * (TILE + 16)),
          row{space.data()},
          bias{row[1]},
          weight{bias[1]},
          ring{weight[W]},
          blocks{{ring[held + 1]}, {ring[held + 1 + BLOCK]}},
          gradients{blocks[1][BLOCK]},
          parts{gradients[W]},
          totals{parts[W + 1]} {}

    // The part of a walk that all its steps share.
    int64_t sequence, first, batch, start, steps;
    int count;  // channels
    int wide;   // the same, in whole vectors

    void begin(int64_t i) {
        const int64_t tiles = (c.channels + TILE - 1) / TILE;
        sequence = i / tiles;
        first = i % tiles * TILE;
        count = int(std::min<int64_t>(TILE, c.channels - first));
        wide = padded(count);
        batch = c.offsets ? 0 : sequence;
        start = c.offsets ? c.offsets[sequence] : 0;
        steps = (c.offsets ? c.offsets[sequence + 1] : c.time) - start;
        for (int tap = 0; tap < W; tap++) load(c.weight, 0, tap, weight[tap]);
        clear(bias[0]);
        if (c.bias) std::copy_n(c.bias + first, count, bias[0]);
    }

    void clear(float* to) const { std::fill(to, to + wide, 0.f); }

    void load(const Steps& x, int64_t b, int64_t t, float* to) const {
        x.row(b, t, 0, [&](auto* from, auto apart) {
            from += first * apart;
            for (int j = 0; j < count; j++) to[j] = float(from[j * apart]);
        });
        std::fill(to + count, to + wide, 0.f);
    }
    // Step t of this walk.
    void load_step(const Steps& x, int64_t t, Rows block, float* to) const {
        if (x.column == 1) return load(x, batch, start + t, to);
        if (t % BLOCK == 0) {
            const int ahead = int(std::min<int64_t>(BLOCK, steps - t));
            typed(x.dtype, x.data, [&](auto* from) {
                from += x.offset(batch, start + t, 0) + first * x.column;
                for (int j = 0; j < count; j++)
                    for (int i = 0; i < ahead; i++) block[i][j] = float(from[j * x.column + i * x.step]);
            });
        }
        std::copy_n(block[t % BLOCK], count, to);
        std::fill(to + count, to + wide, 0.f);
    }
    void store(const Steps& x, int64_t b, int64_t t, const float* from) const {
        x.row(b, t, 0, [&](auto* to, auto apart) {
            to += first * apart;
            for (int j = 0; j < count; j++) to[j * apart] = from[j];
        });
    }

    // The sums before the activation, of rows p ... p + W - 1 of a ring.
    template <class Body>
    void filter(int64_t p, int64_t length, Body body) const {
        const float* rows[W];
        for (int i = 0; i < W; i++) rows[i] = ring[(p + i) % length];
        for (int j = 0; j < wide; j += LANES) {
            Vector sum = read(bias[0] + j);
            for (int i = 0; i < W; i++) sum += read(weight[i] + j) * read(rows[i] + j);
            body(j, sum);
        }
    }

    Vector activated(Vector sum) const { return c.silu ? sum * sigmoid(sum) : sum; }

    void enter(const Steps& state) const {
        for (int i = 0; i < W - 1; i++) state.data ? load(state, sequence, i, ring[i]) : clear(ring[i]);
    }

    void forward(int64_t i) {
        begin(i);
        enter(c.initial);
        for (int64_t t = 0; t < steps; t++) {
            load_step(c.x, t, blocks[0], ring[(t + W - 1) % W]);
            filter(t, W, [&](int j, Vector sum) { write(row[0] + j, activated(sum)); });
            store(c.o, batch, start + t, row[0]);
        }
        if (c.last.data)
            for (int i = 0; i < W - 1; i++) store(c.last, sequence, i, ring[(steps + i) % W]);
    }

    // One step: its rows in the pool move on by one, and the newest is x.
    void step(int64_t i) {
        begin(i);
        const int64_t slot = c.slots ? c.slots[sequence] : sequence;
        clear(row[0]);
        if (slot >= 0) {
            for (int t = 0; t < held; t++) load(c.initial, slot, t, ring[t]);
            load(c.x, sequence, 0, ring[held]);
            filter(held - (W - 1), held + 1, [&](int j, Vector sum) { write(row[0] + j, activated(sum)); });
            for (int t = 0; t < held; t++) store(c.initial, slot, t, ring[t + 1]);
        }
        store(c.o, sequence, 0, row[0]);
    }

    // The gradient of row p is complete.
    void pass_on(int64_t p, const float* d) const {
        if (p >= W - 1) {
            if (c.dx.data) store(c.dx, batch, start + p - (W - 1), d);
        } else if (c.dinitial.data) {
            store(c.dinitial, sequence, p, d);
        }
    }

    void backward(int64_t i) {
        begin(i);
        enter(c.initial);
        for (int tap = 0; tap < W; tap++) clear(gradients[tap]);
        for (int sum = 0; sum <= W; sum++) {
            clear(parts[sum]);
            clear(totals[sum]);
        }
        for (int64_t t = 0; t < steps; t++) {
            load_step(c.x, t, blocks[0], ring[(t + W - 1) % W]);
            load_step(c.o, t, blocks[1], row[0]);
            clear(gradients[(t + W - 1) % W]);
            filter(t, W, [&](int j, Vector sum) {
                Vector d = read(row[0] + j);
                if (c.silu) {
                    const Vector share = sigmoid(sum);
                    d *= share * (1.f + sum * (1.f - share));
                }
                for (int tap = 0; tap < W; tap++) {
                    float* of_row = gradients[(t + tap) % W] + j;
                    write(of_row, read(of_row) + read(weight[tap] + j) * d);
                    write(parts[tap] + j, read(parts[tap] + j) + read(ring[(t + tap) % W] + j) * d);
                }
                write(parts[W] + j, read(parts[W] + j) + d);
            });
            pass_on(t, gradients[t % W]);
            if (t % WINDOW == WINDOW - 1) collect();
        }
        for (int tap = 0; tap < W - 1; tap++) {
            float* d = gradients[(steps + tap) % W];
            if (c.last.data) {
                load(c.last, sequence, tap, row[0]);
                accumulate(row[0], d);
            }
            pass_on(steps + tap, d);
        }
        collect();
        for (int tap = 0; tap < W && c.dweight; tap++)
            std::copy_n(totals[tap], count, c.dweight + (sequence * W + tap) * c.channels + first);
        if (c.dbias) std::copy_n(totals[W], count, c.dbias + sequence * c.channels + first);
    }

    void accumulate(const float* x, float* y) const {
        for (int j = 0; j < wide; j += LANES) write(y + j, read(y + j) + read(x + j));
    }
    void collect() const {
        for (int sum = 0; sum <= W; sum++) {
            accumulate(parts[sum], totals[sum]);
            clear(parts[sum]);
        }
    }
};

enum Pass { FORWARD, BACKWARD, STEP };

template <int W>
void run(const Call& c, Pass pass) {
    if (W != c.taps) return run<W % 8 + 1>(c, pass);
    with_team(c.threads, [&] {
        FlushDenormals flush;
        Worker<W> worker(c, pass == BACKWARD);
        share(c.sequences * ((c.channels + TILE - 1) / TILE), [&](int64_t i) {
            pass == FORWARD ? worker.forward(i) : pass == BACKWARD ? worker.backward(i) : worker.step(i);
        });
    });
}

}  // namespace

extern "C" {
void convolve_forward(const Call* call) { run<1>(*call, FORWARD); }
void convolve_backward(const Call* call) { run<1>(*call, BACKWARD); }
void convolve_step(const Call* call) { run<1>(*call, STEP); }
}
