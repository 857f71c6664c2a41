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
        const float *__restrict__ from_b = b + first, *__restrict__ from_c = c + first;
        float* __restrict__ to = out + first;
        for (std::size_t i = 0; i < count; ++i) to[i] = from_b[i] + scalar * from_c[i];
    });
}

}  // namespace cosim
