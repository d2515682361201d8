#include "worker.h"

#include <nlohmann/json.hpp>

#include "contract.h"
#include "error.h"
#include "json.h"
#include "request.h"

namespace fuselage {
namespace {

std::uint64_t seed_field(const Json& order) {
  const Json& seed = field(order, "seed", "order");
  if (!seed.is_number_unsigned()) throw Error("order: seed: expected an integer of 64 bits without sign");
  return seed.get<std::uint64_t>();
}

Json sample_message(const Sample& sample, bool with_tokens) {
  Json message{{"event", "sample"},
               {"ttft_ms", sample.ttft_ms},
               {"step_ms", sample.step_ms},
               {"request_ms", sample.request_ms},
               {"run_ms", sample.run_ms}};
  if (!sample.device_ms.empty()) message["device_ms"] = sample.device_ms;
  if (with_tokens) message["tokens"] = sample.tokens;
  return message;
}

}  // namespace

void serve(const std::string& folder, const RunnerOptions& options, std::istream& lines,
           const std::function<void(const std::string&)>& send) {
  const auto began = Clock::now();
  const Engine engine = read_engine_folder(folder);
  const auto runner = open_engine(engine, options);
  const double load_time_s = std::chrono::duration<double>(Clock::now() - began).count();
  send(dump_json({{"event", "ready"},
                  {"protocol", kProtocol},
                  {"load_time_s", load_time_s},
                  {"runtime", runner->versions()},
                  {"device", runner->device()},
                  {"clock", kClock},
                  {"program", "cpp"}}));
  for (std::string line; std::getline(lines, line);) {
    const Json order = parse_json(line, "order");
    const std::string op = text_field(order, "op", "order");
    if (op == "close") {
      send(dump_json({{"event", "closed"}, {"peak_memory_gib", peak_memory_gib()}}));
      return;
    }
    if (op != "run") throw Error("order: op: expected run or close, found " + op);
    const RequestShape shape{integer_field(order, "batch", "order"), integer_field(order, "input_len", "order"),
                             integer_field(order, "output_len", "order")};
    const bool with_tokens = order.contains("with_tokens") && bool_field(order, "with_tokens", "order");
    send(dump_json(sample_message(time_request(*runner, engine, shape, seed_field(order)), with_tokens)));
  }
}

std::string failure_line(const std::string& problem) { return dump_json({{"event", "error"}, {"problem", problem}}); }

}  // namespace fuselage
