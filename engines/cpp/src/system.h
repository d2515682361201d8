// This process and this machine, as far as timings depend on them. Linux.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace fuselage {

inline constexpr char kClock[] = "std::chrono::steady_clock";
using Clock = std::chrono::steady_clock;

inline double milliseconds(Clock::duration elapsed) {
  return std::chrono::duration<double, std::milli>(elapsed).count();
}

// Throws Error if `bytes` are not available; `what` says what they are for.
void check_memory(std::int64_t bytes, const std::string& what);
double total_memory_gib();
double peak_memory_gib();  // the most resident memory this process ever had
std::string cpu_name();
std::string os_name();
std::string utc_now();  // ISO 8601

std::int64_t online_cpus();  // of the machine, whatever this process may use

// Pins this process, and the threads it starts later, to `cpus`. Throws Error.
void pin(const std::vector<std::int64_t>& cpus);

// Names come from files and arguments: one line, and a terminal must not obey their control characters.
std::string one_line(std::string text);

// Keeps stdout for our own lines: returns a descriptor for them, and what anybody else prints goes to stderr.
int take_stdout();
void write_line(int descriptor, const std::string& line);

// A library that stays loaded until the process ends: its threads and thread-local objects may outlive any handle.
class Library {
 public:
  explicit Library(const std::string& name);  // path, or name on the loader's path; throws Error
  const std::string& name() const { return name_; }

  template <typename Function>
  Function* function(const char* symbol) const {
    return reinterpret_cast<Function*>(address(symbol));
  }

 private:
  void* address(const char* symbol) const;
  std::string name_;
  void* handle_;
};

}  // namespace fuselage
