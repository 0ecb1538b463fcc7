// torch's own thread pool, as the problem wants it.
#pragma once

#include "../problem.h"

namespace pddm {

Parallel torch_threads();

}  // namespace pddm
