// Work in progress on shared resources: what remains of it, at what speed, and when it will be done.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/program.h"
#include "engine/sharing.h"

namespace cosim::engine {

constexpr std::int64_t NEVER = INT64_MAX;

// Tasks that begin and finish at one instant are taken together: `settle` sets speeds once, after them, and only for
// tasks that share resources with one of them, directly or through others.
class SharedWork {
  public:
    explicit SharedWork(const Program& program);

    bool takes(std::int32_t task) const {
        return program_.demands.indptr[task] < program_.demands.indptr[task + 1] && program_.work_ps[task] > 0;
    }
    void begin(std::int32_t task, std::int64_t now_ps);
    std::int64_t first_done_ps() const { return heap_.empty() ? NEVER : flows_[heap_[0]].done_ps; }
    std::int32_t finish_first();            // gives back what it held, and says which task it was
    std::size_t settle(std::int64_t now_ps);  // how many tasks it looked at

  private:
    // Work in progress: `remaining_ps` of it at `since_ps`, and from then on `speed`.
    struct Flow {
        std::int32_t task = NONE;
        double remaining_ps, speed;
        std::int64_t since_ps, done_ps;
    };

    bool before(std::int32_t task, std::int32_t other) const;
    void reach(std::int32_t resource);
    void reach_all_from_changed();
    void set_speed(std::int32_t stream, double speed, std::int64_t now_ps);
    void rise(std::size_t place);
    void sink(std::size_t place);
    void put(std::size_t place, std::int32_t stream);

    const Program& program_;
    Sharing sharing_;
    std::vector<Flow> flows_;                        // of each stream, which runs one task at a time
    std::vector<std::vector<std::int32_t>> holders_;  // of each resource: tasks, by falling priority, then by row
    std::vector<std::int32_t> heap_, place_;          // streams, the first to be done on top; where each is
    std::vector<std::int32_t> reached_;               // resources that changed, then those that hang together with them
    std::vector<std::uint8_t> resource_reached_, stream_reached_;
    std::vector<std::int32_t> tasks_;
    std::vector<double> speeds_;
};

}  // namespace cosim::engine
