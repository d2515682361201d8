#pragma once

#include <functional>
#include <istream>
#include <string>

#include "runtime.h"

namespace fuselage {

// Opens an engine and answers the JSON lines of engines/worker.py on `lines` until a `close` or their end. `send` takes
// one line without its end. Throws Error.
void serve(const std::string& folder, const RunnerOptions& options, std::istream& lines,
           const std::function<void(const std::string&)>& send);

// The line that says that the process cannot go on.
std::string failure_line(const std::string& problem);

}  // namespace fuselage
