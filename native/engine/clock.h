// Sums of picoseconds that say so when an int64 cannot hold them.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace cosim::engine {

inline std::int64_t later(std::int64_t time_ps, std::int64_t by_ps) {
    if (by_ps > INT64_MAX - time_ps) throw std::overflow_error("the program takes longer than 2**63 picoseconds");
    return time_ps + by_ps;
}

}  // namespace cosim::engine
