#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fuselage {
namespace {

// In whole numbers: of 10 samples one is above the 90th percentile, whatever (1 - 90 / 100) * 10 rounds to.
double percentile(const std::vector<double>& sorted, std::size_t percent) {
  const std::size_t above = (100 - percent) * sorted.size() / 100;
  return sorted[sorted.size() - 1 - above];
}

}  // namespace

Statistics statistics(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto count = static_cast<double>(samples.size());
  const double mean = std::accumulate(samples.begin(), samples.end(), 0.0) / count;
  double squares = 0;
  for (const double sample : samples) squares += (sample - mean) * (sample - mean);
  const std::size_t half = samples.size() / 2;
  const double median = samples.size() % 2 ? samples[half] : (samples[half - 1] + samples[half]) / 2;
  return {samples.front(),
          samples.back(),
          mean,
          median,
          percentile(samples, 90),
          percentile(samples, 95),
          percentile(samples, 99),
          mean > 0 ? 100 * std::sqrt(squares / count) / mean : 0};
}

}  // namespace fuselage
