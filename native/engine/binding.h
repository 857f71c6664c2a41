#pragma once

#include <nanobind/nanobind.h>

namespace cosim::engine {

void bind(nanobind::module_& module);

}  // namespace cosim::engine
