#pragma once

#include <stdexcept>
#include <string>

namespace fuselage {

// Bad input, a refused request, or something that this machine lacks: one line for people, exit code 2.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace fuselage
