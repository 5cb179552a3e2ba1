// Registers of a thread in kernels where one warpgroup copies and CONSUMERS others multiply, given the registers of a
// multiprocessor: those the launch starts from are taken from the one and given to the others.
#pragma once
#include "device.cuh"

template <int CONSUMERS>
struct RegisterShare;
template <>
struct RegisterShare<2> {
  static constexpr int PRODUCER = 40, CONSUMER = 232;
};
template <>
struct RegisterShare<3> {
  static constexpr int PRODUCER = 32, CONSUMER = 160;
};
