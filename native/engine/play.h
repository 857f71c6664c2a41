// Plays a program as the text of cosim/engine/program.py says, to the picosecond as cosim/engine/simpy_engine.py does.
#pragma once

#include "engine/program.h"

namespace cosim::engine {

enum class Outcome { ended, deadlocked, interrupted };

// Asks `interrupted` now and then whether to give up. Throws std::overflow_error for a program of more than 2^63 ps.
Outcome play(const Program& program, const Timeline& timeline, bool (*interrupted)());

}  // namespace cosim::engine
