// Runs the CUDA kernel of native/kernels/gemm_tile.cuh on a CPU: one std::thread per CUDA thread, blocks in turn.
// Prints the largest error against a double-precision sum, relative to the sum of magnitudes, per shape; slow and exact
// in meaning, it checks indices, edges and barriers, not speed.

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct Index {
    unsigned x, y;
};
thread_local Index threadIdx;
Index blockIdx;
std::barrier<> all_threads(256);

#define __global__
#define __shared__ static
void __syncthreads() { all_threads.arrive_and_wait(); }

#include "kernels/gemm_tile.cuh"

int main(int count, char** arguments) {
    const std::size_t m = std::atoi(arguments[1]), n = std::atoi(arguments[2]), k = std::atoi(arguments[3]);
    if (count != 4 || cosim::threads_x * cosim::threads_y != 256) return 2;
    std::vector<float> a(m * k), b(k * n), c(m * n, NAN);
    unsigned state = 1;
    for (auto* matrix : {&a, &b})
        for (float& value : *matrix) value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;

    const unsigned blocks = ((m + cosim::tile - 1) / cosim::tile) * ((n + cosim::tile - 1) / cosim::tile);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 256; ++t)
        threads.emplace_back([&, t] {
            threadIdx = {t % cosim::threads_x, t / cosim::threads_x};
            for (unsigned block = 0; block < blocks; ++block) {
                if (t == 0) blockIdx = {block, 0};
                __syncthreads();
                cosim::gemm_tile(a.data(), b.data(), c.data(), m, n, k);
                __syncthreads();
            }
        });
    for (std::thread& thread : threads) thread.join();

    double worst = 0;
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < n; ++j) {
            double exact = 0, magnitude = 1e-30;
            for (std::size_t p = 0; p < k; ++p) {
                const double product = static_cast<double>(a[i * k + p]) * b[p * n + j];
                exact += product;
                magnitude += std::abs(product);
            }
            const double error = std::abs(c[i * n + j] - exact) / magnitude;
            worst = error <= worst ? worst : error;  // a NaN stays
        }
    std::printf("%g\n", worst);
}
