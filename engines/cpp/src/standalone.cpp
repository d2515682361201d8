#include "standalone.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "contract.h"
#include "error.h"
#include "json.h"
#include "statistics.h"

namespace fuselage {
namespace {

struct Cell {
  RequestShape shape;
  std::vector<Sample> samples;
};

std::vector<RequestShape> request_grid(const BenchSettings& settings) {
  std::vector<RequestShape> grid;
  for (const auto batch : settings.batch) {
    for (const auto input_len : settings.input_len) {
      for (const auto output_len : settings.output_len) grid.push_back({batch, input_len, output_len});
    }
  }
  return grid;
}

template <typename Value>
Json column(const std::vector<Sample>& samples, Value Sample::* member) {
  Json values = Json::array();
  for (const Sample& sample : samples) values.push_back(sample.*member);
  return values;
}

Json cell_json(const Engine& engine, const Cell& cell) {
  const auto& samples = cell.samples;
  Json json{{"engine", engine.label},
            {"batch", cell.shape.batch},
            {"input_len", cell.shape.input_len},
            {"output_len", cell.shape.output_len},
            {"ttft_ms", column(samples, &Sample::ttft_ms)},
            {"step_ms", column(samples, &Sample::step_ms)},
            {"request_ms", column(samples, &Sample::request_ms)},
            {"run_ms", column(samples, &Sample::run_ms)}};
  if (!samples.front().device_ms.empty()) json["device_ms"] = column(samples, &Sample::device_ms);
  return json;
}

std::uintmax_t folder_bytes(const std::filesystem::path& folder) {
  std::uintmax_t bytes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) bytes += entry.file_size();
  }
  return bytes;
}

Json engine_json(const Engine& engine, const Runner& runner, double load_time_s) {
  const std::string where = engine.manifest();
  const Json& options = engine.options();
  const bool emulated = options.contains("emulated") && bool_field(options, "emulated", where);
  const Json& document = *engine.document;
  return {{"label", engine.label},
          {"kind", emulated ? "emulated" : "measured"},
          {"backend", engine.backend},
          {"device", runner.device()},
          {"runtime", runner.versions()},
          {"program", "cpp"},
          {"dtype", engine.dtype},
          {"number_format", field(document, "number_format", where)},
          {"plugins", document.value("plugins", Json::array())},
          {"network_sha256", field(document, "network_sha256", where)},
          {"engine_bytes", folder_bytes(engine.folder)},
          {"weight_bytes", integer_field(document, "weight_bytes", where, 0)},
          {"kv_bytes_per_token", integer_field(document, "kv_bytes_per_token", where, 0)},
          {"load_time_s", load_time_s},
          {"peak_memory_gib", peak_memory_gib()},
          {"structure", field(document, "structure", where)}};
}

// One line of the table.
std::string row(const char* phase, const char* metric, const std::vector<double>& samples) {
  const Statistics found = statistics(samples);
  char line[200];
  std::snprintf(line, sizeof line, "  %-8s%-8s%7zu%11.4f%11.4f%11.4f%11.4f%11.4f%11.4f%11.4f%8.2f\n", phase, metric,
                samples.size(), found.min, found.mean, found.median, found.p90, found.p95, found.p99, found.max,
                found.variation_percent);
  return line;
}

std::string table(const Engine& engine, const std::vector<Cell>& cells) {
  std::string text =
      "ms; latency: on the host, choice of the token included; run: in the runtime's own call (on a GPU: enqueue);\n"
      "device: on the GPU; percentiles as trtexec's\n";
  for (const auto& [shape, samples] : cells) {
    text += one_line(engine.label) + ", batch " + std::to_string(shape.batch) + ", input " +
            std::to_string(shape.input_len) + ", output " + std::to_string(shape.output_len) + "\n";
    char head[200];
    std::snprintf(head, sizeof head, "  %-8s%-8s%7s%11s%11s%11s%11s%11s%11s%11s%8s\n", "", "", "samples", "min", "mean",
                  "median", "p90", "p95", "p99", "max", "cv %");
    text += head;
    std::vector<double> prefill, prefill_run, prefill_device, decode, decode_run, decode_device;
    for (const Sample& sample : samples) {
      prefill.push_back(sample.ttft_ms);
      prefill_run.push_back(sample.run_ms.front());
      decode.insert(decode.end(), sample.step_ms.begin(), sample.step_ms.end());
      decode_run.insert(decode_run.end(), sample.run_ms.begin() + 1, sample.run_ms.end());
      if (sample.device_ms.empty()) continue;
      prefill_device.push_back(sample.device_ms.front());
      decode_device.insert(decode_device.end(), sample.device_ms.begin() + 1, sample.device_ms.end());
    }
    text += row("prefill", "latency", prefill) + row("prefill", "run", prefill_run);
    if (!prefill_device.empty()) text += row("prefill", "device", prefill_device);
    if (decode.empty()) continue;
    text += row("decode", "latency", decode) + row("decode", "run", decode_run);
    if (!decode_device.empty()) text += row("decode", "device", decode_device);
  }
  return text;
}

}  // namespace

BenchReport bench(const std::string& folder, const BenchSettings& settings, const RunnerOptions& options,
                  const std::optional<std::vector<std::int64_t>>& cpus, const std::vector<std::string>& command) {
  const std::string utc = utc_now();
  const auto began = Clock::now();
  const Engine engine = read_engine_folder(folder);
  const auto grid = request_grid(settings);
  for (const RequestShape& shape : grid) check_request(engine, shape);
  const auto runner = open_engine(engine, options);
  const double load_time_s = std::chrono::duration<double>(Clock::now() - began).count();

  std::vector<Cell> cells;
  for (const RequestShape& shape : grid) {
    Cell cell{shape, {}};
    for (std::int64_t round = 0; round < settings.warmup + settings.rounds; ++round) {
      Sample sample = time_request(*runner, engine, shape, settings.seed);
      if (round >= settings.warmup) cell.samples.push_back(std::move(sample));
    }
    cells.push_back(std::move(cell));
  }

  Json results{{"results_schema", kResultsSchema},
               {"environment",
                {{"cpu", cpu_name()},
                 {"cores", online_cpus()},
                 {"memory_gib", total_memory_gib()},
                 {"os", os_name()},
                 {"python", "none"},
                 {"clock", kClock},
                 {"threads", options.threads ? Json(*options.threads) : Json()},
                 {"pinned_cpus", cpus ? Json(*cpus) : Json()},
                 {"warmup_rounds", settings.warmup},
                 {"seed", settings.seed},
                 {"utc", utc},
                 {"command", command}}},
               {"engines", Json::array({engine_json(engine, *runner, load_time_s)})},
               {"cells", Json::array()}};
  for (const Cell& cell : cells) results["cells"].push_back(cell_json(engine, cell));
  return {dump_json(results), table(engine, cells)};
}

}  // namespace fuselage
