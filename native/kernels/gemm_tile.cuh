// The kernel that gemm.cu launches; described there. Apart, so that it can also be read by a C++ compiler that is given
// meanings for CUDA's words (tests/native/cuda_on_cpu.cpp does, to check it where there is no GPU).
#pragma once

#include <cstddef>

namespace cosim {

constexpr int tile = 64;      // rows and columns of C per block
constexpr int tile_k = 16;    // depth per step
constexpr int threads_x = 16, threads_y = 16;
constexpr int per_thread = tile / threads_x;  // rows and columns of C per thread

__global__ void gemm_tile(const float* a, const float* b, float* c, std::size_t m, std::size_t n, std::size_t k) {
    __shared__ float tile_a[tile_k][tile + 1];  // transposed; one more column keeps its writes on different banks
    __shared__ float tile_b[tile_k][tile];
    const std::size_t tiles_n = (n + tile - 1) / tile;
    const std::size_t i0 = blockIdx.x / tiles_n * tile, j0 = blockIdx.x % tiles_n * tile;
    const int thread = threadIdx.y * threads_x + threadIdx.x;
    float sum[per_thread][per_thread] = {};

    for (std::size_t p0 = 0; p0 < k; p0 += tile_k) {
        for (int e = thread; e < tile * tile_k; e += threads_x * threads_y) {
            const int i = e / tile_k, p = e % tile_k;
            tile_a[p][i] = i0 + i < m && p0 + p < k ? a[(i0 + i) * k + p0 + p] : 0.0f;
        }
        for (int e = thread; e < tile * tile_k; e += threads_x * threads_y) {
            const int p = e / tile, j = e % tile;
            tile_b[p][j] = p0 + p < k && j0 + j < n ? b[(p0 + p) * n + j0 + j] : 0.0f;
        }
        __syncthreads();
        for (int p = 0; p < tile_k; ++p)
            for (int i = 0; i < per_thread; ++i)
                for (int j = 0; j < per_thread; ++j)
                    sum[i][j] += tile_a[p][threadIdx.y + i * threads_y] * tile_b[p][threadIdx.x + j * threads_x];
        __syncthreads();
    }
    for (int i = 0; i < per_thread; ++i)
        for (int j = 0; j < per_thread; ++j) {
            const std::size_t row = i0 + threadIdx.y + i * threads_y, column = j0 + threadIdx.x + j * threads_x;
            if (row < m && column < n) c[row * n + column] = sum[i][j];
        }
}

}  // namespace cosim
