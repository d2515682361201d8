// The benchmark program: times prefill and decode of one engine, with no Python in the loop.
#include <getopt.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <iostream>
#include <new>

#include "error.h"
#include "standalone.h"
#include "worker.h"

namespace fuselage {
namespace {

constexpr char kUsage[] =
    "usage: fuselage-bench bench ENGINE [options]    time an engine; results (JSON) on stdout, a table on stderr\n"
    "       fuselage-bench serve ENGINE [options]    time requests that come as JSON lines on stdin\n"
    "\n"
    "  --threads N           threads of the runtime (one per CPU of --cpus, else its own choice, if not given)\n"
    "  --cpus LIST           pin the process to these CPUs, e.g. 0,1\n"
    "  --library FILE        the runtime: libonnxruntime.so.X, libnvinfer.so.X or libnvinfer_lean.so.X\n"
    "  --cuda-library FILE   libcudart.so.X, for TensorRT\n"
    "of bench:\n"
    "  --batch LIST          sequences side by side, e.g. 1,4 (default 1)\n"
    "  --input-len LIST      prompt tokens (default 64)\n"
    "  --output-len LIST     generated tokens (default 32)\n"
    "  --rounds N            kept requests per combination (default 8)\n"
    "  --warmup N            requests before those (default 1)\n"
    "  --seed N              of the input tokens (default 0)\n"
    "\n"
    "Files are held against the folder's manifest by size; `build.py bench` checks their hashes, too.\n";

constexpr char kNoMemory[] = "not enough memory";
constexpr std::int64_t kMaxListed = 1000;       // numbers in one list
constexpr std::int64_t kMaxRounds = 1'000'000;  // samples stay in memory
constexpr std::int64_t kMaxThreads = 1024;      // a runtime that starts more than the system can dies of it

struct CommandLine {
  std::string command, folder;
  RunnerOptions runner;
  BenchSettings settings;
  std::optional<std::vector<std::int64_t>> cpus;
};

template <typename Number>
Number number(const std::string& text, const std::string& option, Number least, Number most) {
  Number value{};
  const char* end = text.data() + text.size();
  const auto [stopped, code] = std::from_chars(text.data(), end, value);
  if (code != std::errc() || stopped != end || value < least || value > most) {
    throw Error("--" + option + ": expected a whole number from " + std::to_string(least) + " to " +
                std::to_string(most) + ", found " + text);
  }
  return value;
}

std::vector<std::int64_t> numbers(const std::string& text, const std::string& option, std::int64_t least) {
  std::vector<std::int64_t> values;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const auto value = number<std::int64_t>(text.substr(begin, end - begin), option, least, INT64_MAX);
    if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
    if (values.size() > kMaxListed) throw Error("--" + option + ": too many numbers");
    begin = end + 1;
  }
  return values;
}

CommandLine parse(int argc, char** argv) {
  static constexpr option kOptions[] = {{"threads", required_argument, nullptr, 0},
                                        {"cpus", required_argument, nullptr, 0},
                                        {"library", required_argument, nullptr, 0},
                                        {"cuda-library", required_argument, nullptr, 0},
                                        {"batch", required_argument, nullptr, 0},
                                        {"input-len", required_argument, nullptr, 0},
                                        {"output-len", required_argument, nullptr, 0},
                                        {"rounds", required_argument, nullptr, 0},
                                        {"warmup", required_argument, nullptr, 0},
                                        {"seed", required_argument, nullptr, 0},
                                        {nullptr, 0, nullptr, 0}};
  CommandLine line;
  opterr = 0;  // we say it ourselves, in one line
  for (int index = 0, found; (found = getopt_long(argc, argv, ":", kOptions, &index)) != -1;) {
    if (found == ':') throw Error(std::string(argv[optind - 1]) + ": a value is missing");
    if (found == '?') throw Error(std::string(argv[optind - 1]) + ": no such option. See --help");
    const std::string name = kOptions[index].name, value = optarg;
    BenchSettings& settings = line.settings;
    if (name == "threads") line.runner.threads = number<std::int64_t>(value, name, 1, kMaxThreads);
    if (name == "cpus") line.cpus = numbers(value, name, 0);
    if (name == "library") line.runner.library = value;
    if (name == "cuda-library") line.runner.cuda_library = value;
    if (name == "batch") settings.batch = numbers(value, name, 1);
    if (name == "input-len") settings.input_len = numbers(value, name, 1);
    if (name == "output-len") settings.output_len = numbers(value, name, 1);
    if (name == "rounds") settings.rounds = number<std::int64_t>(value, name, 1, kMaxRounds);
    if (name == "warmup") settings.warmup = number<std::int64_t>(value, name, 0, kMaxRounds);
    if (name == "seed") settings.seed = number<std::uint64_t>(value, name, 0, UINT64_MAX);
  }
  if (argc - optind != 2) throw Error("expected a command and an engine folder. See --help");
  line.command = argv[optind];
  line.folder = argv[optind + 1];
  if (line.command != "bench" && line.command != "serve") throw Error(line.command + ": no such command. See --help");
  return line;
}

int run(int argc, char** argv) {
  const std::vector<std::string> command(argv, argv + argc);
  if (std::find(command.begin(), command.end(), "--help") != command.end()) {
    std::cout << kUsage;
    return 0;
  }
  CommandLine line = parse(argc, argv);
  if (line.cpus) {
    // ONNX Runtime's own choice is a thread on every core of the machine, whatever the process is pinned to.
    const auto pinned = static_cast<std::int64_t>(line.cpus->size());
    if (!line.runner.threads && pinned < online_cpus()) line.runner.threads = pinned;
    pin(*line.cpus);  // before a runtime starts threads: they inherit it
  }
  const int ours = take_stdout();
  if (line.command == "bench") {
    const BenchReport report = bench(line.folder, line.settings, line.runner, line.cpus, command);
    write_line(ours, report.results);
    std::cerr << report.table;
    return 0;
  }
  const auto send = [ours](const std::string& text) { write_line(ours, text); };
  try {
    serve(line.folder, line.runner, std::cin, send);
  } catch (const Error& error) {
    send(failure_line(error.what()));
    throw;
  } catch (const std::bad_alloc&) {
    send(failure_line(kNoMemory));
    throw;
  }
  return 0;
}

}  // namespace
}  // namespace fuselage

int main(int argc, char** argv) {
  try {
    return fuselage::run(argc, argv);
  } catch (const fuselage::Error& error) {
    std::cerr << "error: " << fuselage::one_line(error.what()) << "\n";
  } catch (const std::bad_alloc&) {
    std::cerr << "error: " << fuselage::kNoMemory << "\n";
  } catch (const std::filesystem::filesystem_error& error) {
    std::cerr << "error: " << fuselage::one_line(error.what()) << "\n";
  }
  return 2;
}
