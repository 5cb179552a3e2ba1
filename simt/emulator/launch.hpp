// Runs a grid: blocks in an order chosen by the seed, on as many OS threads as asked for.
#pragma once
#include "state.hpp"

namespace simt {

struct Outcome {
  Fault fault;
  SimtStats stats{};
  std::vector<SimtBufferStats> buffers;  // one per buffer of the request
  std::vector<SyncSite> sites;
};

Outcome run(const SimtLaunch& request);

}  // namespace simt
