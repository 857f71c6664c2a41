// Time is looked up, not waited for: a stream works through its tasks as long as it knows when each of them starts and
// ends, even if that lies ahead, and only stops where something is not known yet. What a task without demands does
// depends on nothing else, so such tasks need no events. Work on shared resources begins and finishes in the order of
// time, in `run`, which lets the streams go on after each instant.

#include "engine/play.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "engine/clock.h"
#include "engine/shared_work.h"

namespace cosim::engine {
namespace {

constexpr std::size_t STEPS_BETWEEN_QUESTIONS = 1 << 18;  // a few milliseconds

struct Interrupted {};

// A stream and its current task; what is known of it: its row of `depends` up to `depend`, and that it can start at
// `ready_ps` or later; if it has `met` the others of its rendezvous, it starts just then.
struct Stream {
    std::int32_t task = NONE;
    std::int32_t depend = 0;
    std::int64_t ready_ps = 0;
    bool met = false, waits_for_issue = false;
};

// A host thread, the task that it issues next or waits for, and its time after all that it has issued.
struct Host {
    std::int32_t task = NONE;
    std::int64_t clock_ps = 0;
};

struct Meeting {
    std::int32_t absent = 0;
    std::int32_t waiting = NONE;  // the last stream that came; `next_waiting_` has the others
    std::int64_t ready_ps = 0;
};

class Play {
  public:
    Play(const Program& program, const Timeline& timeline, bool (*interrupted)());
    Outcome run();

  private:
    void go_on();
    void go_on_with_host(std::int32_t host);
    void go_on_with_stream(std::int32_t stream);
    bool dependencies_known(std::int32_t stream);
    bool meets(std::int32_t stream);
    void end(std::int32_t task, std::int64_t done_ps);
    void wait_for_end(std::int32_t task, std::int32_t who);
    void count(std::size_t steps);

    const Program& program_;
    const Timeline& timeline_;
    bool (*interrupted_)();
    std::size_t steps_ = 0;
    std::int32_t unfinished_;
    SharedWork shared_;
    std::vector<Stream> streams_;
    std::vector<Host> hosts_;
    std::vector<Meeting> meetings_;
    std::vector<std::int32_t> next_on_stream_, next_on_host_;  // of each task: the row after it
    // Who waits: streams by their number, host threads by theirs + number of streams. Each waits for one thing at most.
    std::vector<std::int32_t> waiting_;       // of each task: who came last to wait for its end
    std::vector<std::int32_t> next_waiting_;  // who came before
    std::vector<std::int32_t> awake_;
    using Start = std::pair<std::int64_t, std::int32_t>;  // time, task
    std::priority_queue<Start, std::vector<Start>, std::greater<>> starts_;
};

Play::Play(const Program& program, const Timeline& timeline, bool (*interrupted)())
    : program_(program), timeline_(timeline), interrupted_(interrupted), unfinished_(program.tasks), shared_(program),
      streams_(program.streams), hosts_(program.streams), meetings_(program.meetings), next_on_stream_(program.tasks),
      next_on_host_(program.tasks), waiting_(program.tasks, NONE),
      next_waiting_(2 * static_cast<std::size_t>(program.streams), NONE) {
    std::fill_n(timeline.start_ps, program.tasks, UNKNOWN);
    std::fill_n(timeline.end_ps, program.tasks, UNKNOWN);
    for (std::int32_t task = program.tasks; task-- > 0;) {
        Stream& stream = streams_[program.stream[task]];
        next_on_stream_[task] = std::exchange(stream.task, task);
        const std::int32_t host = program.host[task];
        timeline.issue_ps[task] = host == NONE ? 0 : UNKNOWN;
        next_on_host_[task] = host == NONE ? NONE : std::exchange(hosts_[host].task, task);
        if (program.rendezvous[task] != NONE) ++meetings_[program.rendezvous[task]].absent;
    }
    for (std::int32_t stream = program.streams; stream-- > 0;) {
        if (streams_[stream].task == NONE) continue;
        streams_[stream].depend = program.depends.indptr[streams_[stream].task];
        awake_.push_back(stream);
    }
    for (std::int32_t host = program.streams; host-- > 0;)
        if (hosts_[host].task != NONE) awake_.push_back(program.streams + host);
}

Outcome Play::run() {
    go_on();
    while (true) {
        const std::int64_t next_start_ps = starts_.empty() ? NEVER : starts_.top().first;
        const std::int64_t now_ps = std::min(next_start_ps, shared_.first_done_ps());
        if (now_ps == NEVER) break;
        while (shared_.first_done_ps() == now_ps) {
            const std::int32_t task = shared_.finish_first();
            end(task, now_ps);
            awake_.push_back(program_.stream[task]);
        }
        go_on();
        for (; !starts_.empty() && starts_.top().first == now_ps; starts_.pop())
            shared_.begin(starts_.top().second, now_ps);
        count(shared_.settle(now_ps));
    }
    return unfinished_ ? Outcome::deadlocked : Outcome::ended;
}

void Play::go_on() {
    while (!awake_.empty()) {
        const std::int32_t who = awake_.back();
        awake_.pop_back();
        if (who < program_.streams) go_on_with_stream(who);
        else go_on_with_host(who - program_.streams);
    }
}

void Play::go_on_with_host(std::int32_t number) {
    Host& host = hosts_[number];
    for (; host.task != NONE; host.task = next_on_host_[host.task]) {
        const std::int32_t task = host.task;
        if (timeline_.issue_ps[task] == UNKNOWN) {
            timeline_.issue_ps[task] = host.clock_ps;
            host.clock_ps = later(host.clock_ps, program_.launch_ps[task]);
            Stream& stream = streams_[program_.stream[task]];
            if (stream.waits_for_issue && stream.task == task) {
                stream.waits_for_issue = false;
                awake_.push_back(program_.stream[task]);
            }
        }
        if (program_.synchronises[task]) {
            if (timeline_.end_ps[task] == UNKNOWN) return wait_for_end(task, program_.streams + number);
            host.clock_ps = std::max(host.clock_ps, timeline_.end_ps[task]);
        }
    }
}

void Play::go_on_with_stream(std::int32_t number) {
    Stream& stream = streams_[number];
    while (stream.task != NONE) {
        const std::int32_t task = stream.task;
        if (!stream.met) {
            if (timeline_.issue_ps[task] == UNKNOWN) {
                stream.waits_for_issue = true;
                return;
            }
            if (!dependencies_known(number)) return;
            stream.ready_ps = std::max(stream.ready_ps, timeline_.issue_ps[task]);
            if (program_.rendezvous[task] != NONE && !meets(number)) return;
        }
        timeline_.start_ps[task] = stream.ready_ps;
        if (shared_.takes(task)) {
            starts_.emplace(stream.ready_ps, task);
            return;
        }
        end(task, later(stream.ready_ps, program_.work_ps[task]));
    }
}

bool Play::dependencies_known(std::int32_t number) {
    Stream& stream = streams_[number];
    for (const std::int32_t last = program_.depends.indptr[stream.task + 1]; stream.depend < last; ++stream.depend) {
        const std::int32_t before = program_.depends.index[stream.depend];
        if (timeline_.end_ps[before] == UNKNOWN) {
            wait_for_end(before, number);
            return false;
        }
        stream.ready_ps = std::max(stream.ready_ps, timeline_.end_ps[before]);
    }
    return true;
}

// The last one to come sets all off at the same instant.
bool Play::meets(std::int32_t number) {
    Stream& stream = streams_[number];
    Meeting& meeting = meetings_[program_.rendezvous[stream.task]];
    meeting.ready_ps = std::max(meeting.ready_ps, stream.ready_ps);
    if (--meeting.absent > 0) {
        next_waiting_[number] = std::exchange(meeting.waiting, number);
        return false;
    }
    for (std::int32_t other = meeting.waiting; other != NONE; other = next_waiting_[other]) {
        streams_[other].ready_ps = meeting.ready_ps;
        streams_[other].met = true;
        awake_.push_back(other);
    }
    stream.ready_ps = meeting.ready_ps;
    return true;
}

// The current task of its stream has done its work; the stream turns to the next one.
void Play::end(std::int32_t task, std::int64_t done_ps) {
    std::int64_t end_ps = done_ps;
    if (program_.host[task] != NONE) end_ps = std::max(end_ps, later(timeline_.issue_ps[task], program_.span_ps[task]));
    timeline_.end_ps[task] = end_ps;
    for (std::int32_t who = waiting_[task]; who != NONE; who = next_waiting_[who]) awake_.push_back(who);
    Stream& stream = streams_[program_.stream[task]];
    stream.task = next_on_stream_[task];
    stream.ready_ps = end_ps;
    stream.met = false;
    if (stream.task != NONE) stream.depend = program_.depends.indptr[stream.task];
    --unfinished_;
    count(1);
}

void Play::wait_for_end(std::int32_t task, std::int32_t who) {
    next_waiting_[who] = std::exchange(waiting_[task], who);
}

void Play::count(std::size_t steps) {
    steps_ += steps;
    if (steps_ < STEPS_BETWEEN_QUESTIONS) return;
    steps_ = 0;
    if (interrupted_()) throw Interrupted();
}

}  // namespace

Outcome play(const Program& program, const Timeline& timeline, bool (*interrupted)()) {
    try {
        return Play(program, timeline, interrupted).run();
    } catch (const Interrupted&) {
        return Outcome::interrupted;
    }
}

}  // namespace cosim::engine
