// Two kernels of STREAM (J. D. McCalpin, "Memory Bandwidth and Machine Balance", 1995), fp32, which measure a memory.
//
//     copy    out[i] = a[i]                     8 bytes per element, as STREAM counts them (one read, one write;
//     triad   out[i] = b[i] + scalar * c[i]    12 bytes   a cache that fetches lines before writing them moves more)

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/kernels.h"
#include "kernels/threads.h"

namespace cosim {
namespace {

// The loop alone, so that the compiler builds it once per instruction set and the loader picks (GCC's target_clones).
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void triad(const float* __restrict__ b, const float* __restrict__ c, float scalar, float* __restrict__ out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] = b[i] + scalar * c[i];
}

constexpr std::size_t smallest_share = 16384;  // elements; below that a thread costs more than it brings

// Calls body(first, count) for one contiguous share of [0, n) per thread.
template <typename Body>
void for_each_share(std::size_t n, unsigned threads, const Body& body) {
    const std::size_t shares = std::clamp<std::size_t>(n / smallest_share, 1, threads);
    std::atomic<std::size_t> next{0};
    run_on_threads(static_cast<unsigned>(shares), [&] {
        for (std::size_t share; (share = next++) < shares;) {
            const std::size_t first = n / shares * share;
            body(first, share + 1 == shares ? n - first : n / shares);
        }
    });
}

}  // namespace

void stream_copy_cpu(const float* a, float* out, std::size_t n, unsigned threads) {
    for_each_share(n, threads, [=](std::size_t first, std::size_t count) {
        if (count > 0) std::memcpy(out + first, a + first, count * sizeof(float));
    });
}

void stream_triad_cpu(const float* b, const float* c, float scalar, float* out, std::size_t n, unsigned threads) {
    for_each_share(n, threads, [=](std::size_t first, std::size_t count) {
        triad(b + first, c + first, scalar, out + first, count);
    });
}

}  // namespace cosim
