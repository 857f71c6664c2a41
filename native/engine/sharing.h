// How fast tasks run that share resources: the arithmetic that cosim/engine/sharing.py fixes, operation by operation.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/program.h"

namespace cosim::engine {

class Sharing {
  public:
    explicit Sharing(const Program& program);

    // The speed of each of `tasks`, which come by falling priority and then by row; with them come all that run on a
    // resource that one of them demands. Tasks that no resource connects do not change each other's bits: while others
    // stop, a group's reach stays as it is, and the level at which its first tasks stop is its own least reach.
    void speeds(const std::vector<std::int32_t>& tasks, std::vector<double>& speed);

  private:
    void raise(const std::vector<std::int32_t>& tasks, std::vector<double>& speed);
    double least_reach(const std::vector<std::int32_t>& tasks);
    bool stops(std::int32_t task, double level) const;
    void take(std::int32_t task, double level);

    const Program& program_;
    std::vector<double> left_, load_, reach_;
    std::vector<std::int32_t> loaded_;  // resources that rising tasks demand
    std::vector<std::int32_t> rising_;  // places in `tasks`, all of one priority
};

}  // namespace cosim::engine
