// Forward attention on sm_90a where logits are more than products times a positive scale: capped, biased or masked, or times
// any number. The streaming kernel, with passes over each tile for them; two warpgroups that multiply leave the
// registers that those take.
#pragma once
#include "forward_streaming_sm90.cuh"

template <class Element, int WIDTH, int BLOCK_KV, int CONSUMERS, int STAGES>
using BiasedConfig = WarpgroupStreamingConfig<Element, WIDTH, BLOCK_KV, CONSUMERS, STAGES, true>;
