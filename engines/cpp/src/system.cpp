#include "system.h"

#include <dlfcn.h>
#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <optional>

#include "error.h"

namespace fuselage {
namespace {

// The number in a line like "VmHWM:   1234 kB", in bytes.
std::optional<std::int64_t> kilobytes_line(const char* file, const std::string& key) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(key + ":", 0) == 0) return std::stoll(line.substr(key.size() + 1)) * 1024;
  }
  return std::nullopt;
}

double gib(std::optional<std::int64_t> bytes) { return static_cast<double>(bytes.value_or(0)) / (1 << 30); }

}  // namespace

void check_memory(std::int64_t bytes, const std::string& what) {
  const auto available = kilobytes_line("/proc/meminfo", "MemAvailable");
  if (available && bytes > *available) {
    throw Error("not enough memory for " + what + ": expected " + std::to_string(bytes) + " bytes, found " +
                std::to_string(*available) + ". Run fewer sequences, or shorter ones");
  }
}

double total_memory_gib() { return gib(kilobytes_line("/proc/meminfo", "MemTotal")); }

// Not getrusage: its maximum survives exec, so that a small child of a large parent would report the parent's.
double peak_memory_gib() { return gib(kilobytes_line("/proc/self/status", "VmHWM")); }

std::string cpu_name() {
  std::ifstream lines("/proc/cpuinfo");
  for (std::string line; std::getline(lines, line);) {
    const auto colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  utsname system{};
  uname(&system);
  return system.machine;
}

std::string os_name() {
  utsname system{};
  uname(&system);
  return std::string(system.sysname) + "-" + system.release + "-" + system.machine;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

std::int64_t online_cpus() { return sysconf(_SC_NPROCESSORS_ONLN); }

void pin(const std::vector<std::int64_t>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const std::int64_t cpu : cpus) {
    if (cpu >= CPU_SETSIZE) throw Error("no such CPU: " + std::to_string(cpu));
    CPU_SET(static_cast<std::size_t>(cpu), &set);
  }
  if (sched_setaffinity(0, sizeof set, &set) != 0) {
    throw Error(std::string("cannot pin the process to these CPUs: ") + std::strerror(errno));
  }
}

std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return text;
}

int take_stdout() {
  const int ours = dup(STDOUT_FILENO);
  if (ours < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) throw Error("stdout is closed");
  return ours;
}

void write_line(int descriptor, const std::string& line) {
  const std::string text = line + "\n";
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t written = write(descriptor, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) throw Error(std::string("stdout cannot be written: ") + std::strerror(errno));
    done += static_cast<std::size_t>(written);
  }
}

Library::Library(const std::string& name) : name_(name), handle_(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) throw Error(std::string("library cannot be opened: ") + dlerror());
}

void* Library::address(const char* symbol) const {
  void* found = dlsym(handle_, symbol);
  if (found == nullptr) throw Error(name_ + ": not the library that is needed: it has no " + symbol);
  return found;
}

}  // namespace fuselage
