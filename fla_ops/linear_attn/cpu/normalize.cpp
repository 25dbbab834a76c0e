// The normalisation of linear_attn on a CPU, in float32: y_t = o_t / d_t, d_t = scale q_t . z_t + 1e-10, with z_t the
// running sum of k.
//
// With w_t = -scale (dy_t . y_t) / d_t the gradients are do_t = dy_t / d_t, dq_t = w_t z_t, dk_s = sum_{t >= s} w_t q_t:
// a walk along time for the first two, one against it for the last.

#include "common/cpu/kernels.h"

namespace {

// The arguments of all operators, as cpp.py passes them. Pointers are null where there is nothing to pass.
struct Call : Walks {
    Steps q, k, o, y;        // backward, o is the gradient of y
    Steps z;                 // [P, 1, H, K]: the sum before the first step, and forward then after the last
    Steps dq, dk, d_o;       // dq and dk for every value head
    float* dz;               // [N, H, K]: gradient of the last sum, then of the first
};

constexpr float EPSILON = 1e-10f;

// One thread, with a step's vectors.
struct Worker {
    const Call& c;
    const int K, V;
    std::vector<float> space;
    Matrix q, k, z, o, y;

    Worker(const Call& c, bool)
        : c(c),
          K(int(c.K)),
          V(int(c.V)),
          space(3 * Matrix::numbers(1, K) + 2 * Matrix::numbers(1, V)),
          q(space.data(), K),
          k(q[padded(1)], K),
          z(k[padded(1)], K),
          o(z[padded(1)], V),
          y(o[padded(1)], V) {}

    // z += k; d.
    float advance(const Walk& w, int64_t t) {
        c.q.load_row(w.batch, t, w.key_head, K, q.at, float(c.scale));
        c.k.load_row(w.batch, t, w.key_head, K, k.at);
        for (int j = 0; j < padded(K); j += LANES) write(z.at + j, read(z.at + j) + read(k.at + j));
        return dot(q.at, z.at, padded(K)) + EPSILON;
    }

    void divide(Matrix x, float d) const {
        for (int j = 0; j < padded(V); j += LANES) write(x.at + j, read(x.at + j) / d);
    }

    void forward(const Walk& w) {
        const int64_t slot = c.slots ? c.slots[w.sequence] : w.sequence;
        if (slot >= 0) c.z.load_row(slot, 0, w.head, K, z.at);
        for (int64_t i = 0; i < w.steps; i++) {
            const int64_t t = w.at(i);
            std::fill(o.at, o.at + V, 0.f);
            if (slot >= 0) {
                c.o.load_row(w.batch, t, w.head, V, o.at);
                divide(o, advance(w, t));
            }
            c.y.store_row(w.batch, t, w.head, V, o.at);
        }
        if (slot >= 0) c.z.store_row(slot, 0, w.head, K, z.at);
    }

    void backward(const Walk& w) {
        std::vector<float> weights(w.steps);  // w_t / scale
        c.z.load_row(w.sequence, 0, w.head, K, z.at);
        for (int64_t i = 0; i < w.steps; i++) {
            const int64_t t = w.at(i);
            const float d = advance(w, t);
            c.y.load_row(w.batch, t, w.head, V, y.at);
            c.o.load_row(w.batch, t, w.head, V, o.at);
            weights[i] = -dot(o.at, y.at, padded(V)) / d;
            if (c.dq.data) c.dq.store_row(w.batch, t, w.head, K, z.at, float(c.scale) * weights[i]);
            divide(o, d);
            if (c.d_o.data) c.d_o.store_row(w.batch, t, w.head, V, o.at);
        }
        if (!c.dz) return;
        float* dz = c.dz + (w.sequence * c.heads + w.head) * K;
        std::copy_n(dz, K, z.at);
        std::fill(z.at + K, z.at + padded(K), 0.f);
        for (int64_t i = w.steps - 1; i >= 0; i--) {
            const int64_t t = w.at(i);
            c.q.load_row(w.batch, t, w.key_head, K, q.at, float(c.scale));
            for (int j = 0; j < padded(K); j += LANES) write(z.at + j, read(z.at + j) + weights[i] * read(q.at + j));
            if (c.dk.data) c.dk.store_row(w.batch, t, w.head, K, z.at);
        }
        std::copy_n(z.at, K, dz);
    }
};

}  // namespace

extern "C" {
void normalize_forward(const Call* call) { walk_all<Worker>(*call, false); }
void normalize_backward(const Call* call) { walk_all<Worker>(*call, true); }
}
