// C = A B in fp32 on a CUDA device, row-major: A is (m, k), B is (k, n), C is (m, n). The operator of gemm.cpp.
//
//     c[i, j] = sum over p of a[i, p] * b[p, j]                       2 m n k floating-point operations
//
// A block of 16 x 16 threads computes a 64 x 64 tile of C. Per step of 16 in p it brings a 64 x 16 tile of A and a
// 16 x 64 tile of B to shared memory, each element read from HBM once per block: 2 * 64 * 64 * 16 operations for
// 4 * 2 * 64 * 16 bytes, 16 operations per byte. Each thread keeps a 4 x 4 corner of the sum in registers, strided by 16
// so that neighbouring threads read neighbouring addresses. Tiles beyond the edge are read as zeros and not written.
// Plain fp32 multiply-adds, no tensor cores: this is the version to compare faster ones with.

#include <cuda_runtime.h>

#include "kernels/gemm_tile.cuh"
#include "kernels/kernels.h"

namespace cosim {
namespace {

std::string describe(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

}  // namespace

std::string gemm_cuda(const float* a, const float* b, float* c, std::size_t m, std::size_t n, std::size_t k, int device,
                      std::uintptr_t stream) {
    if (m == 0 || n == 0) return "";
    int previous = 0;
    if (const cudaError_t error = cudaGetDevice(&previous); error != cudaSuccess) return describe(error);
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return describe(error);
    const std::size_t blocks = ((m + tile - 1) / tile) * ((n + tile - 1) / tile);
    std::string failure = "the result has more than 2^31 - 1 tiles of 64 x 64";
    if (blocks <= 0x7fffffff) {
        gemm_tile<<<static_cast<unsigned>(blocks), dim3(threads_x, threads_y), 0, reinterpret_cast<cudaStream_t>(stream)>>>(
            a, b, c, m, n, k);
        failure = describe(cudaGetLastError());
    }
    cudaSetDevice(previous);
    return failure;
}

int cuda_devices(std::string& why_none) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    // With no driver at all the runtime says "driver version is insufficient", which misleads.
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
        int driver = 0;
        cudaDriverGetVersion(&driver);
        why_none = driver == 0 ? "no CUDA driver, so no device" : "no device that this driver and this build can use";
        return 0;
    }
    why_none = error != cudaSuccess ? describe(error) : count == 0 ? "no device found" : "";
    return error == cudaSuccess ? count : 0;
}

}  // namespace cosim
