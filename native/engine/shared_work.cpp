#include "engine/shared_work.h"

#include <algorithm>

namespace cosim::engine {
namespace {

constexpr double LONGEST_PS = 4611686018427387904.0;  // 2^62, as in cosim/engine/check.py

}  // namespace

SharedWork::SharedWork(const Program& program)
    : program_(program), sharing_(program), flows_(program.streams), holders_(program.resources),
      place_(program.streams), resource_reached_(program.resources, 0), stream_reached_(program.streams, 0) {}

// The order in which tasks claim resources.
bool SharedWork::before(std::int32_t task, std::int32_t other) const {
    const int urgency = program_.priority[task], its = program_.priority[other];
    return urgency != its ? urgency > its : task < other;
}

void SharedWork::begin(std::int32_t task, std::int64_t now_ps) {
    const Rows& demands = program_.demands;
    for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j) {
        const std::int32_t resource = demands.index[j];
        std::vector<std::int32_t>& holders = holders_[resource];
        auto place = holders.end();
        while (place != holders.begin() && before(task, *(place - 1))) --place;
        holders.insert(place, task);
        reach(resource);
    }
    const std::int32_t stream = program_.stream[task];
    flows_[stream] = {task, static_cast<double>(program_.work_ps[task]), 0.0, now_ps, NEVER};
    heap_.push_back(stream);
    put(heap_.size() - 1, stream);
}

std::int32_t SharedWork::finish_first() {
    const std::int32_t task = flows_[heap_[0]].task;
    const std::int32_t last = heap_.back();
    heap_.pop_back();
    if (!heap_.empty()) {
        put(0, last);
        sink(0);
    }
    const Rows& demands = program_.demands;
    for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j) {
        const std::int32_t resource = demands.index[j];
        std::vector<std::int32_t>& holders = holders_[resource];
        holders.erase(std::find(holders.begin(), holders.end(), task));
        reach(resource);
    }
    return task;
}

std::size_t SharedWork::settle(std::int64_t now_ps) {
    reach_all_from_changed();
    const auto ordered = [this](std::int32_t task, std::int32_t other) { return before(task, other); };
    if (!std::is_sorted(tasks_.begin(), tasks_.end(), ordered)) std::stable_sort(tasks_.begin(), tasks_.end(), ordered);
    sharing_.speeds(tasks_, speeds_);
    for (std::size_t i = 0; i < tasks_.size(); ++i) {
        const std::int32_t stream = program_.stream[tasks_[i]];
        stream_reached_[stream] = 0;
        if (speeds_[i] != flows_[stream].speed) set_speed(stream, speeds_[i], now_ps);
    }
    for (const std::int32_t resource : reached_) resource_reached_[resource] = 0;
    reached_.clear();
    return tasks_.size();
}

void SharedWork::reach(std::int32_t resource) {
    if (resource_reached_[resource]) return;
    resource_reached_[resource] = 1;
    reached_.push_back(resource);
}

// Into tasks_: all that run on a resource that changed, all on a resource that one of those demands, and so on.
void SharedWork::reach_all_from_changed() {
    const Rows& demands = program_.demands;
    tasks_.clear();
    for (std::size_t i = 0; i < reached_.size(); ++i) {
        for (const std::int32_t task : holders_[reached_[i]]) {
            std::uint8_t& known = stream_reached_[program_.stream[task]];
            if (known) continue;
            known = 1;
            tasks_.push_back(task);
            for (std::int32_t j = demands.indptr[task]; j < demands.indptr[task + 1]; ++j) reach(demands.index[j]);
        }
    }
}

void SharedWork::set_speed(std::int32_t stream, double speed, std::int64_t now_ps) {
    Flow& flow = flows_[stream];
    const double moved_ps = flow.speed * static_cast<double>(now_ps - flow.since_ps);
    flow.remaining_ps = std::max(0.0, flow.remaining_ps - moved_ps);
    flow.since_ps = now_ps;
    flow.speed = speed;
    flow.done_ps = NEVER;
    if (speed > 0.0) {
        const double needs_ps = flow.remaining_ps / speed;
        if (needs_ps < LONGEST_PS) {
            const auto whole_ps = static_cast<std::int64_t>(needs_ps);
            const std::int64_t rounded_up_ps = whole_ps + (static_cast<double>(whole_ps) < needs_ps);
            flow.done_ps = now_ps + std::min(std::max<std::int64_t>(1, rounded_up_ps), NEVER - now_ps);
        }
    }
    const std::size_t place = static_cast<std::size_t>(place_[stream]);
    rise(place);
    sink(static_cast<std::size_t>(place_[stream]));
}

void SharedWork::put(std::size_t place, std::int32_t stream) {
    heap_[place] = stream;
    place_[stream] = static_cast<std::int32_t>(place);
}

void SharedWork::rise(std::size_t place) {
    const std::int32_t stream = heap_[place];
    const std::int64_t done_ps = flows_[stream].done_ps;
    while (place > 0) {
        const std::size_t above = (place - 1) / 2;
        if (flows_[heap_[above]].done_ps <= done_ps) break;
        put(place, heap_[above]);
        place = above;
    }
    put(place, stream);
}

void SharedWork::sink(std::size_t place) {
    const std::int32_t stream = heap_[place];
    const std::int64_t done_ps = flows_[stream].done_ps;
    for (std::size_t below = 2 * place + 1; below < heap_.size(); below = 2 * place + 1) {
        if (below + 1 < heap_.size() && flows_[heap_[below + 1]].done_ps < flows_[heap_[below]].done_ps) ++below;
        if (flows_[heap_[below]].done_ps >= done_ps) break;
        put(place, heap_[below]);
        place = below;
    }
    put(place, stream);
}

}  // namespace cosim::engine
