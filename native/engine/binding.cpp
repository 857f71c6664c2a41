// The engine as a Python function: columns are used where they lie, the interpreter lock is released while it plays.

#include "engine/binding.h"

#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

#include "engine/play.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cosim::engine {
namespace {

template <typename Number>
using Column = nb::ndarray<const Number, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Times = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Ctrl-C was pressed, or another signal's handler raised.
bool interrupted() {
    nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

template <typename Array>
void check_length(const Array& column, const char* name, std::size_t length) {
    if (column.size() == length) return;
    throw nb::value_error((std::string(name) + " has " + std::to_string(column.size()) + " rows, not " +
                           std::to_string(length)).c_str());
}

bool play_columns(std::int32_t streams, std::int32_t meetings, const Column<double>& capacity,
                  const Column<std::int32_t>& stream, const Column<std::int64_t>& work_ps,
                  const Column<std::int32_t>& host, const Column<std::int64_t>& launch_ps,
                  const Column<std::int64_t>& span_ps, const Column<bool>& synchronises,
                  const Column<std::int8_t>& priority, const Column<std::int32_t>& rendezvous,
                  const Column<std::int32_t>& depends_indptr, const Column<std::int32_t>& depends,
                  const Column<std::int32_t>& demands_indptr, const Column<std::int32_t>& demands,
                  const Column<double>& amount, const Times& issue_ps, const Times& start_ps, const Times& end_ps) {
    const std::size_t tasks = stream.size();
    check_length(work_ps, "work_ps", tasks);
    check_length(host, "host", tasks);
    check_length(launch_ps, "launch_ps", tasks);
    check_length(span_ps, "span_ps", tasks);
    check_length(synchronises, "synchronises", tasks);
    check_length(priority, "priority", tasks);
    check_length(rendezvous, "rendezvous", tasks);
    check_length(depends_indptr, "depends_indptr", tasks + 1);
    check_length(demands_indptr, "demands_indptr", tasks + 1);
    check_length(amount, "amount", demands.size());
    for (const Times* times : {&issue_ps, &start_ps, &end_ps}) check_length(*times, "a column of times", tasks);
    Program program{};
    program.tasks = static_cast<std::int32_t>(tasks);
    program.streams = streams;
    program.resources = static_cast<std::int32_t>(capacity.size());
    program.meetings = meetings;
    program.stream = stream.data();
    program.host = host.data();
    program.rendezvous = rendezvous.data();
    program.work_ps = work_ps.data();
    program.launch_ps = launch_ps.data();
    program.span_ps = span_ps.data();
    program.synchronises = synchronises.data();
    program.priority = priority.data();
    program.depends = {depends_indptr.data(), depends.data()};
    program.demands = {demands_indptr.data(), demands.data()};
    program.amount = amount.data();
    program.capacity = capacity.data();
    const Timeline timeline{issue_ps.data(), start_ps.data(), end_ps.data()};
    Outcome outcome;
    {
        nb::gil_scoped_release release;
        outcome = play(program, timeline, interrupted);
    }
    if (outcome == Outcome::interrupted) throw nb::python_error();
    return outcome == Outcome::ended;
}

}  // namespace

void bind(nb::module_& module) {
    module.def("play_columns", &play_columns, "streams"_a, "meetings"_a, "capacity"_a, "stream"_a, "work_ps"_a,
               "host"_a, "launch_ps"_a, "span_ps"_a, "synchronises"_a, "priority"_a, "rendezvous"_a,
               "depends_indptr"_a, "depends"_a, "demands_indptr"_a, "demands"_a, "amount"_a,
               "issue_ps"_a.noconvert(), "start_ps"_a.noconvert(), "end_ps"_a.noconvert());
}

}  // namespace cosim::engine
