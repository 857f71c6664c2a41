// The kernels that the bindings call. Matrices are row-major and dense; sizes are in elements, and may be zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cosim {

// The vector instructions that gemm_cpu can use on this processor, best first: of "avx512", "avx2", "portable".
std::vector<std::string> gemm_cpu_instructions();

// c (m, n) = a (m, k) b (k, n), fp32. `threads` >= 1; `instructions` is one of those above, or empty for the best.
// Throws std::invalid_argument for instructions that this processor lacks.
void gemm_cpu(const float* a, const float* b, float* c, std::size_t m, std::size_t n, std::size_t k, unsigned threads,
              const std::string& instructions);

// out = a, and out = b + scalar * c, over n elements: the bandwidth kernels of McCalpin's STREAM.
void stream_copy_cpu(const float* a, float* out, std::size_t n, unsigned threads);
void stream_triad_cpu(const float* b, const float* c, float scalar, float* out, std::size_t n, unsigned threads);

#if COSIM_WITH_CUDA
// As gemm_cpu, queued on `stream` of CUDA device `device`; returns before it has run. Empty string, or what failed.
std::string gemm_cuda(const float* a, const float* b, float* c, std::size_t m, std::size_t n, std::size_t k, int device,
                      std::uintptr_t stream);

// Number of CUDA devices, and why there are none (empty where there are).
int cuda_devices(std::string& why_none);
#endif

}  // namespace cosim
