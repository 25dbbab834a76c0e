// One decode step of attn on a CPU, in float32, with sums of gates in float64.
//
// Each cache is cut into parts of PART keys, counted from its newest key, so that the parts depend on its own length
// only. A part's scores hold the gates after each key up to the part's end; the join adds those of newer parts, from
// the newest part to the oldest. All query heads of a group share one read of k and v.

#include "common/cpu/kernels.h"

namespace {

// The arguments, as cpp.py passes them. Pointers are null where there is nothing to pass.
struct Call : Walks {
    int64_t window;     // -1: every key is seen
    double gate_scale;
    Steps q, k, v, o;
    const float* g;     // [T, HQ]
    const float* sink;  // [HQ]
};

constexpr int PART = 256;

// What a part's softmax is for one query head: o = out / sum, with weights relative to exp(largest).
struct Summary {
    double gates;
    float largest, sum;
};

// One thread, with the rows of LANES keys or values.
struct Worker {
    const Call& c;
    const int K, V, group;
    std::vector<float> space, scores;
    Matrix rows, q;

    explicit Worker(const Call& c)
        : c(c),
          K(int(c.K)),
          V(int(c.V)),
          group(int(c.heads / c.key_heads)),
          space(Matrix::numbers(LANES, std::max(c.K, c.V)) + Matrix::numbers(c.heads, c.K)),
          scores(c.heads * PART),
          rows(space.data(), std::max(c.K, c.V)),
          q(rows[padded(LANES)], c.K) {}

    void load(const Steps& x, int64_t first, int count, int64_t head, int width) {
        for (int i = 0; i < LANES; i++) {
            if (i < count)
                x.load_row(0, first + i, head, width, rows[i]);
            else
                std::fill(rows[i], rows[i] + padded(width), 0.f);
        }
    }

    // The dot products of a query with LANES keys; each round of zips adds halves and puts sums side by side.
    Vector dots(const float* query) const {
        Vector sums[LANES]{};
        for (int j = 0; j < padded(K); j += LANES) {
            const Vector x = read(query + j);
            for (int i = 0; i < LANES; i++) sums[i] += x * read(rows[i] + j);
        }
        using Zip = UpTo<LANES>;
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++)
                sums[i] = Zip::zip_low(sums[i], sums[i + half]) + Zip::zip_high(sums[i], sums[i + half]);
        return sums[0];
    }

    // Keys [first, last) of sequence n: out [HQ, V], and a summary for each query head.
    void part(int64_t n, int64_t first, int64_t last, float* out, Summary* summaries) {
        const int count = int(last - first);
        for (int h = 0; h < c.heads; h++) c.q.load_row(0, n, h, K, q[h], float(c.scale));
        for (int i = 0; i < count; i += LANES)
            for (int h = 0; h < c.key_heads; h++) {
                load(c.k, first + i, std::min(LANES, count - i), h, K);
                for (int m = h * group; m < (h + 1) * group; m++) write(&scores[m * PART + i], dots(q[m]));
            }
        for (int m = 0; m < c.heads; m++) summaries[m] = weigh(m, first, count);
        std::fill(out, out + c.heads * padded(V), 0.f);
        for (int i = 0; i < count; i += LANES)
            for (int h = 0; h < c.key_heads; h++) {
                load(c.v, first + i, std::min(LANES, count - i), h, V);
                for (int m = h * group; m < (h + 1) * group; m++) {
                    const float* weights = &scores[m * PART + i];
                    for (int j = 0; j < padded(V); j += LANES) {
                        Vector sum = read(out + m * padded(V) + j);
                        for (int r = 0; r < LANES; r++) sum += weights[r] * read(rows[r] + j);
                        write(out + m * padded(V) + j, sum);
                    }
                }
            }
    }

    // Scores of one query head become weights, zeros past the last key.
    Summary weigh(int head, int64_t first, int count) {
        float* x = &scores[head * PART];
        double gates = 0;
        float largest = -INFINITY, sum = 0;
        if (c.g)
            for (int i = count - 1; i >= 0; i--) {
                x[i] += float(gates);
                gates += c.gate_scale * c.g[(first + i) * c.heads + head];
            }
        for (int i = 0; i < count; i++) largest = std::max(largest, x[i]);
        const float reference = largest == -INFINITY ? 0 : largest;
        for (int i = 0; i < count; i++) sum += x[i] = std::exp(x[i] - reference);
        std::fill(x + count, x + padded(count), 0.f);
        return {gates, largest, sum};
    }

    // o of sequence n and one head from its parts, the newest first.
    void join(int64_t n, int64_t parts, int head, const float* out, const Summary* summaries) {
        float* o = rows[0];
        std::fill(o, o + padded(V), 0.f);
        double largest = c.sink ? c.sink[head] : -INFINITY, gates = 0;
        for (int64_t p = 0; p < parts; p++) {
            const Summary& s = summaries[p * c.heads + head];
            largest = std::max(largest, s.largest + gates);
            gates += s.gates;
        }
        double sum = c.sink && parts ? std::exp(c.sink[head] - largest) : 0;
        gates = 0;
        for (int64_t p = 0; p < parts; p++) {
            const Summary& s = summaries[p * c.heads + head];
            const float weight = float(std::exp(s.largest + gates - largest));
            gates += s.gates;
            sum += double(weight) * s.sum;
            const float* from = out + (p * c.heads + head) * padded(V);
            for (int j = 0; j < padded(V); j += LANES) write(o + j, read(o + j) + weight * read(from + j));
        }
        c.o.store_row(0, n, head, V, o, parts ? float(1 / sum) : 1);
    }
};

}  // namespace

extern "C" {
void decode(const Call* call) {
    const Call& c = *call;
    auto oldest = [&](int64_t n) {
        return c.window < 0 ? c.offsets[n] : std::max(c.offsets[n], c.offsets[n + 1] - c.window);
    };
    std::vector<int64_t> before{0}, sequences;  // the parts before each sequence; the sequence of each part
    for (int64_t n = 0; n < c.sequences; n++) {
        before.push_back(before[n] + (c.offsets[n + 1] - oldest(n) + PART - 1) / PART);
        sequences.resize(before[n + 1], n);
    }
    const int64_t parts = before[c.sequences];
    std::vector<float> out(parts * c.heads * padded(c.V));
    std::vector<Summary> summaries(parts * c.heads);
    with_team(c.threads, [&] {
        FlushDenormals flush;
        Worker worker(c);
        share(parts, [&](int64_t i) {
            const int64_t n = sequences[i], last = c.offsets[n + 1] - (i - before[n]) * PART;
            worker.part(n, std::max(oldest(n), last - PART), last, &out[i * c.heads * padded(c.V)],
                        &summaries[i * c.heads]);
        });
        meet();
        share(c.sequences * c.heads, [&](int64_t i) {
            const int64_t n = i / c.heads, at = before[n] * c.heads;
            worker.join(n, before[n + 1] - before[n], int(i % c.heads), out.data() + at * padded(c.V),
                        summaries.data() + at);
        });
    });
}
}
