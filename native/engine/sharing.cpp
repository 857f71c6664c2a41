#include "engine/sharing.h"

#include <algorithm>

namespace cosim::engine {
namespace {

constexpr double USED_UP = 1e-9;  // as in cosim/engine/sharing.py

}  // namespace

Sharing::Sharing(const Program& program)
    : program_(program), left_(program.resources), load_(program.resources, 0.0), reach_(program.resources) {}

void Sharing::speeds(const std::vector<std::int32_t>& tasks, std::vector<double>& speed) {
    const Rows& demands = program_.demands;
    for (const std::int32_t task : tasks)
        for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j)
            left_[demands.index[j]] = program_.capacity[demands.index[j]];
    speed.resize(tasks.size());
    for (std::size_t first = 0; first < tasks.size();) {
        const std::int8_t urgency = program_.priority[tasks[first]];
        rising_.clear();
        for (; first < tasks.size() && program_.priority[tasks[first]] == urgency; ++first)
            rising_.push_back(static_cast<std::int32_t>(first));
        raise(tasks, speed);
    }
}

void Sharing::raise(const std::vector<std::int32_t>& tasks, std::vector<double>& speed) {
    double level = 0.0;
    while (!rising_.empty()) {
        level = std::min(1.0, std::max(level, least_reach(tasks)));
        std::size_t kept = 0;
        for (const std::int32_t place : rising_) {
            if (stops(tasks[place], level)) {
                speed[place] = level;
                take(tasks[place], level);
            } else {
                rising_[kept++] = place;
            }
        }
        rising_.resize(kept);
    }
}

// The least level at which a resource that rising tasks demand is used up; each one's own is left in reach_.
double Sharing::least_reach(const std::vector<std::int32_t>& tasks) {
    const Rows& demands = program_.demands;
    loaded_.clear();
    for (const std::int32_t place : rising_) {
        const std::int32_t task = tasks[place];
        for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j) {
            const std::int32_t resource = demands.index[j];
            if (load_[resource] == 0.0) loaded_.push_back(resource);
            load_[resource] += program_.amount[j];
        }
    }
    double least = 1.0;
    for (const std::int32_t resource : loaded_) {
        reach_[resource] = left_[resource] / load_[resource];
        least = std::min(least, reach_[resource]);
        load_[resource] = 0.0;
    }
    return least;
}

bool Sharing::stops(std::int32_t task, double level) const {
    if (level == 1.0) return true;
    const Rows& demands = program_.demands;
    for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j)
        if (reach_[demands.index[j]] <= level) return true;
    return false;
}

void Sharing::take(std::int32_t task, double level) {
    const Rows& demands = program_.demands;
    for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j) {
        double& left = left_[demands.index[j]];
        left -= program_.amount[j] * level;
        if (left <= USED_UP * program_.capacity[demands.index[j]]) left = 0.0;
    }
}

}  // namespace cosim::engine
