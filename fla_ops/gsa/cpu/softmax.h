// exp of whole vectors, softmax over the memory slots, and a thread's memory.

#include "common/cpu/kernels.h"

namespace {

// Zeros that start on a cache line.
struct Memory {
    std::vector<float> numbers;
    float* at;
    explicit Memory(int64_t count) : numbers(count + 16), at(numbers.data()) {
        while (reinterpret_cast<uintptr_t>(at) % 64) at++;
    }
};

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

// To about one unit in the last place; NaN stays NaN. 2^n goes in as two factors, so that what overflows is infinite
// and what underflows is zero or denormal.
inline Vector exp(Vector x) {
    const Vector lowest = Vector{} - 126.f, highest = Vector{} + 90.f;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Vector shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the last bits are the nearest integer
    const Integers n = (Integers)shifted - 0x4b400000;
    const Vector whole = shifted - 12582912.f, rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vector y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.f;
    const Integers half = n >> 1;
    return y * (Vector)((half + 127) << 23) * (Vector)((n - half + 127) << 23);
}

// x <- softmax(x), with zeros past the slots.
inline void softmax(float* x, int slots) {
    float largest = x[0], sum = 0;
    for (int m = 1; m < slots; m++) largest = std::max(largest, x[m]);
    for (int m = 0; m < padded(slots); m += LANES) write(x + m, exp(read(x + m) - largest));
    std::fill(x + slots, x + padded(slots), 0.f);
    for (int m = 0; m < slots; m++) sum += x[m];
    for (int m = 0; m < padded(slots); m += LANES) write(x + m, read(x + m) / sum);
}

}  // namespace
