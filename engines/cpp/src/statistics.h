#pragma once

#include <vector>

namespace fuselage {

// What trtexec says of a metric, by its definitions (samples/common/sampleReporting.cpp of NVIDIA/TensorRT).
struct Statistics {
  double min, max, mean;
  double median;             // the mean of the two in the middle where there is none
  double p90, p95, p99;      // the smallest sample that so many percent are not above
  double variation_percent;  // population standard deviation over the mean
};

// `samples` is not empty.
Statistics statistics(std::vector<double> samples);

}  // namespace fuselage
