// The short kernel for sm_90a where a branch has as many keys as an image prompt of 257 tokens: S of one branch takes 136
// registers, which two warpgroups that multiply leave.
#pragma once
#include "forward_short_sm90.cuh"

template <class Element, int WIDTH, int ROW_KEYS, int CONSUMERS, int STAGES>
using MediumConfig = WarpgroupShortConfig<Element, WIDTH, ROW_KEYS, CONSUMERS, STAGES>;
