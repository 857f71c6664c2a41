// C = A B in fp32 on a CPU, row-major: A is (m, k), B is (k, n), C is (m, n).
//
//     c[i, j] = sum over p of a[i, p] * b[p, j]                       2 m n k floating-point operations
//
// Blocked as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 34(3), 2008):
//
//     a tile of C (tile_m x tile_n)  is one unit of work, taken by whichever thread is free
//     a panel of depth block_k       of A and of B is copied so that the inner loop reads both with stride one;
//                                    the copy of A (tile_m x block_k) stays in L2, slivers of B pass through L1
//     a register tile (rows x cols)  of C is held in vector registers over the whole panel: per step of p it reads
//                                    rows + cols numbers and does 2 * rows * cols operations
//
// Within a panel products are summed in order of p with fused multiply-adds where the processor has them; panels are
// summed in order too. The result does not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/threads.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define COSIM_X86 1
#define COSIM_INLINE inline __attribute__((always_inline))
#else
#define COSIM_X86 0
#define COSIM_INLINE inline
#endif

namespace cosim {
namespace {

constexpr std::size_t block_k = 256;

// One vector of `width` floats, which the compiler maps on what the target has.
template <int width>
struct Vector {
    typedef float type __attribute__((vector_size(width * sizeof(float)), aligned(sizeof(float)), may_alias));
};

// c (rows x vectors * width, at most `m_left` x `n_left` of it kept) += panel of A times panel of B, both packed.
template <int rows, int vectors, int width>
COSIM_INLINE void register_tile(const float* a, const float* b, float* c, std::size_t stride_c, std::size_t depth,
                                std::size_t m_left, std::size_t n_left) {
    using V = typename Vector<width>::type;
    constexpr int cols = vectors * width;
    V sum[rows][vectors] = {};
    for (std::size_t p = 0; p < depth; ++p) {
        V from_b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) from_b[v] = *reinterpret_cast<const V*>(b + p * cols + v * width);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
            const float from_a = a[p * rows + i];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sum[i][v] += from_a * from_b[v];
        }
    }
    if (m_left >= rows && n_left >= cols) {
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(c + i * stride_c + v * width) += sum[i][v];
        return;
    }
    float kept[rows][cols];
    std::memcpy(kept, sum, sizeof(kept));
    for (std::size_t i = 0; i < std::min<std::size_t>(rows, m_left); ++i)
        for (std::size_t j = 0; j < std::min<std::size_t>(cols, n_left); ++j) c[i * stride_c + j] += kept[i][j];
}

// The register tile for one instruction set: a size, and a function that computes it.
struct Kernel {
    std::size_t rows, cols;
    void (*run)(const float*, const float*, float*, std::size_t, std::size_t, std::size_t, std::size_t);
    const char* instructions;
};

// 4 x 8: eight 128-bit sums, which SSE2 and NEON hold.
void tile_portable(const float* a, const float* b, float* c, std::size_t stride_c, std::size_t depth, std::size_t m_left,
                   std::size_t n_left) {
    register_tile<4, 2, 4>(a, b, c, stride_c, depth, m_left, n_left);
}

#if COSIM_X86
// 6 x 16: twelve of sixteen 256-bit registers.
__attribute__((target("avx2,fma"))) void tile_avx2(const float* a, const float* b, float* c, std::size_t stride_c,
                                                   std::size_t depth, std::size_t m_left, std::size_t n_left) {
    register_tile<6, 2, 8>(a, b, c, stride_c, depth, m_left, n_left);
}

// 12 x 32: twenty-four of thirty-two 512-bit registers.
__attribute__((target("avx512f,fma"))) void tile_avx512(const float* a, const float* b, float* c, std::size_t stride_c,
                                                        std::size_t depth, std::size_t m_left, std::size_t n_left) {
    register_tile<12, 2, 16>(a, b, c, stride_c, depth, m_left, n_left);
}
#endif

// Those that this processor can run, best first.
std::vector<Kernel> kernels() {
    std::vector<Kernel> found;
#if COSIM_X86
    if (__builtin_cpu_supports("avx512f")) found.push_back({12, 32, tile_avx512, "avx512"});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({6, 16, tile_avx2, "avx2"});
#endif
    found.push_back({4, 8, tile_portable, "portable"});
    return found;
}

Kernel kernel_for(const std::string& instructions) {
    std::string named;
    for (const Kernel& kernel : kernels()) {
        if (instructions.empty() || instructions == kernel.instructions) return kernel;
        named += (named.empty() ? "" : ", ") + std::string(kernel.instructions);
    }
    throw std::invalid_argument("instructions is '" + instructions + "'; this processor has: " + named);
}

// Copies rows [0, m) x [0, depth) of A into slivers of `rows` rows, p outermost within each, the last filled with zeros.
void pack_a(const float* a, std::size_t stride_a, std::size_t m, std::size_t depth, std::size_t rows, float* to) {
    for (std::size_t i0 = 0; i0 < m; i0 += rows, to += rows * depth)
        for (std::size_t i = 0; i < rows; ++i)
            for (std::size_t p = 0; p < depth; ++p) to[p * rows + i] = i0 + i < m ? a[(i0 + i) * stride_a + p] : 0.0f;
}

// The same for B: slivers of `cols` columns.
void pack_b(const float* b, std::size_t stride_b, std::size_t n, std::size_t depth, std::size_t cols, float* to) {
    for (std::size_t j0 = 0; j0 < n; j0 += cols, to += cols * depth)
        for (std::size_t p = 0; p < depth; ++p) {
            const std::size_t kept = std::min(cols, n - j0);
            std::copy_n(b + p * stride_b + j0, kept, to + p * cols);
            std::fill_n(to + p * cols + kept, cols - kept, 0.0f);
        }
}

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

std::vector<std::string> gemm_cpu_instructions() {
    std::vector<std::string> names;
    for (const Kernel& kernel : kernels()) names.emplace_back(kernel.instructions);
    return names;
}

void gemm_cpu(const float* a, const float* b, float* c, std::size_t m, std::size_t n, std::size_t k, unsigned threads,
              const std::string& instructions) {
    const Kernel kernel = kernel_for(instructions);
    if (m == 0 || n == 0) return;
    const std::size_t tile_m = round_up(144, kernel.rows), tile_n = round_up(512, kernel.cols);
    const std::size_t tiles_m = (m + tile_m - 1) / tile_m, tiles_n = (n + tile_n - 1) / tile_n;
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        std::vector<float> packed_a(tile_m * block_k), packed_b(tile_n * block_k);
        for (std::size_t tile; (tile = next++) < tiles_m * tiles_n;) {
            const std::size_t i0 = tile % tiles_m * tile_m, j0 = tile / tiles_m * tile_n;
            const std::size_t tall = std::min(tile_m, m - i0), wide = std::min(tile_n, n - j0);
            for (std::size_t i = 0; i < tall; ++i) std::fill_n(c + (i0 + i) * n + j0, wide, 0.0f);
            for (std::size_t p0 = 0; p0 < k; p0 += block_k) {
                const std::size_t depth = std::min(block_k, k - p0);
                pack_a(a + i0 * k + p0, k, tall, depth, kernel.rows, packed_a.data());
                pack_b(b + p0 * n + j0, n, wide, depth, kernel.cols, packed_b.data());
                for (std::size_t j = 0; j < wide; j += kernel.cols)
                    for (std::size_t i = 0; i < tall; i += kernel.rows)
                        kernel.run(packed_a.data() + i * depth, packed_b.data() + j * depth, c + (i0 + i) * n + j0 + j, n,
                                   depth, tall - i, wide - j);
            }
        }
    };
    run_on_threads(static_cast<unsigned>(std::min<std::size_t>(threads, tiles_m * tiles_n)), work);
}

}  // namespace cosim
