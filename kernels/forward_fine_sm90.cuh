// The streaming kernel for sm_90a in blocks of fewer queries, two warpgroups' instead of three: where such blocks fill the last
// wave of multiprocessors better, all of them end sooner. The host knows how many there are, and chooses.
#pragma once
#include "forward_streaming_sm90.cuh"

template <class Element, int WIDTH, int BLOCK_KV, int CONSUMERS, int STAGES>
using FineConfig = WarpgroupStreamingConfig<Element, WIDTH, BLOCK_KV, CONSUMERS, STAGES, false>;
