// Names of this program's own functions and variables, those too that only one source can see: from its symbol table.
// A static one is named as nvcc does, without the L that marks it.
#pragma once

#include <string>

namespace pddm::ptx {

// Empty: no function starts there.
std::string function_name(const void* at);
// Of the source file `source`; null: it has none of that name.
void* find_variable(const std::string& source, const std::string& name);

}  // namespace pddm::ptx
