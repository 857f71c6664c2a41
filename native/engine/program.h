// What is played and what comes out: the columns of cosim/engine/program.py, as views of memory that the caller keeps.
#pragma once

#include <cstdint>

namespace cosim::engine {

constexpr std::int32_t NONE = -1;
constexpr std::int64_t UNKNOWN = -1;

// Rows of different lengths: row i is indptr[i] to indptr[i + 1].
struct Rows {
    const std::int32_t *indptr, *index;
};

// Every index lies in its range and no time is negative: cosim/engine/check.py has looked. Meetings count from 0.
struct Program {
    std::int32_t tasks, streams, resources, meetings;
    const std::int32_t *stream, *host, *rendezvous;
    const std::int64_t *work_ps, *launch_ps, *span_ps;
    const bool* synchronises;
    const std::int8_t* priority;
    Rows depends, demands;   // tasks; resources
    const double* amount;    // of each demand, > 0
    const double* capacity;  // of each resource, > 0
};

// Written by the engine; UNKNOWN where tasks wait for each other.
struct Timeline {
    std::int64_t *issue_ps, *start_ps, *end_ps;
};

}  // namespace cosim::engine
