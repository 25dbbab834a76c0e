// What the C++ kernels of a CPU share: small float32 matrices in a core's cache, their products and transposes, and rows
// in and out of tensors of any dtype.
//
// A matrix has its rows and columns rounded up to 16, with zeros past the edge, so that no loop has a remainder. The
// distance between rows is an odd number of cache lines: a column of a wide matrix does not fall on a few cache sets.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/cpu/threads.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8;  // of 32 registers, 16 hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 4;  // of 16 registers, 8 hold sums
#else
constexpr int LANES = 4, TILE_ROWS = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double Wide __attribute__((vector_size(8 * LANES)));
typedef double UnalignedWide __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

inline Vector read(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void write(float* x, Vector y) { *reinterpret_cast<Unaligned*>(x) = y; }
inline Wide read(const double* x) { return *reinterpret_cast<const UnalignedWide*>(x); }
inline void write(double* x, Wide y) { *reinterpret_cast<UnalignedWide*>(x) = y; }
inline Wide wide(Vector x) { return __builtin_convertvector(x, Wide); }
inline double wide(float x) { return x; }
inline Vector narrow(Wide x) { return __builtin_convertvector(x, Vector); }
inline float narrow(double x) { return float(x); }

inline int padded(int64_t n) { return int((n + 15) / 16 * 16); }

// Below float32's normal range, results become zero and operands count as zero, while this lives: denormals slow
// x86's arithmetic down a hundredfold.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// A factor as the sum of two floats. A decay near one that is rounded to float32 and met at every step is a bias, which
// grows with the steps; both parts together are exact to 48 bits.
struct Factor {
    float high, low;
    explicit Factor(double x) : high(float(x)), low(std::isfinite(high) ? float(x - high) : 0) {}
    template <class T>
    T times(T x) const {
        return high * x + low * x;
    }
    // Rounded once. Without fused products high * x would be rounded on its own, just below one always downwards.
    template <class T>
    T times_plus(T x, T y) const {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
        return high * x + (low * x + y);
#else
        return narrow(wide(x) * (double(high) + low) + wide(y));
#endif
    }
};

struct Matrix {
    float* at;
    int distance;  // between rows

    static int distance_for(int64_t width) { return padded(width) | 16; }
    static int64_t numbers(int64_t rows, int64_t width) { return int64_t(padded(rows)) * distance_for(width); }
    Matrix(float* at, int64_t width) : at(at), distance(distance_for(width)) {}
    float* operator[](int64_t row) const { return at + row * distance; }
};

// The left side of a product: element [i, k] lies at at[i * row + k * column].
struct Left {
    const float* at;
    int64_t row, column;
    Left(Matrix x) : at(x.at), row(x.distance), column(1) {}
    static Left transposed(Matrix x) {
        Left t(x);
        std::swap(t.row, t.column);
        return t;
    }
};

// Which part of a product is needed: all of it; k <= i, or k >= i, because the left side is a triangle; or the
// result's own lower triangle, in whole blocks of 16 columns.
enum Part { ALL, UP_TO_ROW, FROM_ROW, LOWER };

template <int N>
inline void product_tile(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int first, int last, bool add) {
    Vector sums[TILE_ROWS][N];
    for (int i = 0; i < TILE_ROWS; i++)
        for (int n = 0; n < N; n++) sums[i][n] = add ? read(c + i * c_row + n * LANES) : Vector{};
    for (int k = first; k < last; k++) {
        Vector right[N];
        for (int n = 0; n < N; n++) right[n] = read(b + k * b_row + n * LANES);
        for (int i = 0; i < TILE_ROWS; i++) {
            float left = a.at[i * a.row + k * a.column];
            for (int n = 0; n < N; n++) sums[i][n] += left * right[n];
        }
    }
    for (int i = 0; i < TILE_ROWS; i++)
        for (int n = 0; n < N; n++) write(c + i * c_row + n * LANES, sums[i][n]);
}

// c = a b, or with `add` c += a b: [rows, inner] times [inner, columns], all of them padded counts.
inline void product(Left a, Matrix b, Matrix c, int rows, int inner, int columns, bool add = false, Part part = ALL) {
    for (int j = 0; j < columns; j += 2 * LANES)
        for (int i = part == LOWER ? j / 16 * 16 : 0; i < rows; i += TILE_ROWS) {
            int first = part == FROM_ROW ? i : 0, last = part == UP_TO_ROW ? std::min(inner, i + TILE_ROWS) : inner;
            Left rows_of_a = a;
            rows_of_a.at += i * a.row;
            auto tile = j + LANES < columns ? product_tile<2> : product_tile<1>;
            tile(rows_of_a, b.at + j, b.distance, c[i] + j, c.distance, first, last, add);
        }
}

template <int... LANE>
struct Lanes {
    static Vector zip_low(Vector a, Vector b) {
        return __builtin_shufflevector(a, b, (LANE / 2 + LANE % 2 * LANES)...);
    }
    static Vector zip_high(Vector a, Vector b) {
        return __builtin_shufflevector(a, b, (LANE / 2 + LANES / 2 + LANE % 2 * LANES)...);
    }
};
template <int N, int... LANE>
struct UpTo : UpTo<N - 1, N - 1, LANE...> {};
template <int... LANE>
struct UpTo<0, LANE...> : Lanes<LANE...> {};

// y = x^T for x [rows, columns]. Zipping row r with row r + LANES / 2, for all r, transposes in log2(LANES) rounds.
inline void transpose(Matrix x, Matrix y, int rows, int columns) {
    using Zip = UpTo<LANES>;
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES) {
            Vector from[LANES], to[LANES];
            for (int r = 0; r < LANES; r++) from[r] = read(x[i + r] + j);
            for (int round = 1; round < LANES; round *= 2) {
                for (int r = 0; r < LANES / 2; r++) {
                    to[2 * r] = Zip::zip_low(from[r], from[r + LANES / 2]);
                    to[2 * r + 1] = Zip::zip_high(from[r], from[r + LANES / 2]);
                }
                std::copy(to, to + LANES, from);
            }
            for (int r = 0; r < LANES; r++) write(y[j + r] + i, from[r]);
        }
}

// y = diag(factor) x; y may be x.
inline void scale_rows(Matrix x, const float* factor, Matrix y, int rows, int columns) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j += LANES) write(y[i] + j, read(x[i] + j) * factor[i]);
}

// z = x * y, element by element, in the blocks of 16 columns that the lower triangle meets; z may be x.
inline void times_lower(Matrix x, Matrix y, Matrix z, int rows) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < padded(i + 1); j += LANES) write(z[i] + j, read(x[i] + j) * read(y[i] + j));
}

inline void add(Matrix x, Matrix y, int rows, int columns) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j += LANES) write(y[i] + j, read(y[i] + j) + read(x[i] + j));
}

template <class T>
inline auto sum(T x) {
    auto total = x[0];
    for (int i = 1; i < LANES; i++) total += x[i];
    return total;
}

inline float dot(const float* x, const float* y, int columns) {
    Vector total{};
    for (int j = 0; j < columns; j += LANES) total += read(x + j) * read(y + j);
    return sum(total);
}

struct BFloat16 {
    uint16_t bits;
    BFloat16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = x != x ? 0x7fc0 : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};

#if defined(__aarch64__)
typedef __fp16 Float16;  // GCC's C++ has _Float16 there from version 13 on
#else
typedef _Float16 Float16;
#endif

enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// Calls body(static_cast<T*>(data)) with the type that `dtype` names.
template <class Body>
inline void typed(Dtype dtype, void* data, Body body) {
    if (dtype == FLOAT32)
        body(static_cast<float*>(data));
    else if (dtype == BFLOAT16)
        body(static_cast<BFloat16*>(data));
    else
        body(static_cast<Float16*>(data));
}

// A tensor [B, T, heads, width]; strides are in numbers. Null where not given.
struct Steps {
    void* data;
    Dtype dtype;
    int64_t sequence, step, head, column;

    int64_t offset(int64_t b, int64_t t, int64_t h) const { return b * sequence + t * step + h * head; }

    // One step's numbers, and its stride from number to number: a constant where they are dense.
    template <class Body>
    void row(int64_t b, int64_t t, int64_t h, Body body) const {
        typed(dtype, data, [&](auto* numbers) {
            if (column == 1)
                body(numbers + offset(b, t, h), std::integral_constant<int64_t, 1>());
            else
                body(numbers + offset(b, t, h), column);
        });
    }

    // Zeros past the width, in a row that held another sequence's numbers: a NaN times zero is a NaN.
    void load_row(int64_t b, int64_t t, int64_t h, int width, float* x, float factor = 1) const {
        row(b, t, h, [&](auto* from, auto apart) {
            for (int j = 0; j < width; j++) x[j] = factor * float(from[j * apart]);
        });
        std::fill(x + width, x + padded(width), 0.f);
    }

    void store_row(int64_t b, int64_t t, int64_t h, int width, const float* x, float factor = 1) const {
        row(b, t, h, [&](auto* to, auto apart) {
            for (int j = 0; j < width; j++) to[j * apart] = factor * x[j];
        });
    }

    // Some steps of some heads, times a factor, into as many matrices, `apart` numbers from each other; zeros past the
    // edges. In the order of memory: one head alone is read at a fraction of the speed. `ahead` is 1, or -1 backwards.
    void load(int64_t b, int64_t t, int ahead, int64_t h, int rows, int heads, int width, Matrix x, int64_t apart,
              float factor = 1) const {
        for (int i = 0; i < padded(rows); i++)
            for (int n = 0; n < heads; n++) {
                float* row = x[i] + n * apart;
                if (i < rows)
                    load_row(b, t + i * ahead, h + n, width, row, factor);
                else
                    std::fill(row, row + padded(width), 0.f);
            }
    }

    void store(int64_t b, int64_t t, int ahead, int64_t h, int rows, int width, Matrix x, float factor = 1) const {
        for (int i = 0; i < rows; i++) store_row(b, t + i * ahead, h, width, x[i], factor);
    }
};

// Hands out parts of an allocation that start on cache lines; without one, only counts.
struct Space {
    float* base = nullptr;
    int64_t used = 0;
    float* take(int64_t numbers) {
        int64_t at = used;
        used += padded(numbers);
        return base ? base + at : nullptr;
    }
    Matrix matrix(int64_t rows, int64_t width) { return matrices(1, rows, width); }
    // The first of some that lie side by side.
    Matrix matrices(int64_t count, int64_t rows, int64_t width) {
        return {take(count * Matrix::numbers(rows, width)), width};
    }
};

// body(i) for all i: shared by the threads of a team, which wait for each other, or all by this thread.
template <class Body>
void spread(bool shared, int64_t count, Body body) {
    if (shared) {
        share(count, body);
        meet();
        return;
    }
    for (int64_t i = 0; i < count; i++) body(i);
}

// The arguments that a kernel along sequences begins with, as compiled.Walks has them. Pointers may be null.
struct Walks {
    int64_t time, sequences, key_heads, heads, K, V, reverse, threads;
    double scale;
    const int64_t* offsets;  // of packed sequences, [sequences + 1]
    const int64_t* slots;    // the row of a state pool for each sequence, -1 for padding
};

// The steps of one sequence and head, in the order that a call walks them.
struct Walk {
    int64_t sequence, head, key_head, batch, first, steps;
    bool reverse;

    Walk(const Walks& c, int64_t i)
        : sequence(i / c.heads),
          head(i % c.heads),
          key_head(head / (c.heads / c.key_heads)),
          batch(c.offsets ? 0 : sequence),
          first(c.offsets ? c.offsets[sequence] : 0),
          steps((c.offsets ? c.offsets[sequence + 1] : c.time) - first),
          reverse(c.reverse) {}

    int64_t at(int64_t i) const { return first + (reverse ? steps - 1 - i : i); }
};

// Each walk of a call by one of its threads; Worker(call, backward) holds what a thread needs.
template <class Worker, class Call>
void walk_all(const Call& c, bool backward) {
    with_team(c.threads, [&] {
        FlushDenormals flush;
        Worker worker(c, backward);
        share(c.sequences * c.heads, [&](int64_t i) {
            backward ? worker.backward(Walk(c, i)) : worker.forward(Walk(c, i));
        });
    });
}

}  // namespace
