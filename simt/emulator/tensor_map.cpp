#include "tensor_map.hpp"

namespace simt {

const char* encode(TensorLayout& layout, const void* base, const uint64_t (&dimensions)[4],
                   const uint64_t (&strides)[3], const uint32_t (&box)[4], uint32_t swizzle_bytes) {
  // "CUDA Driver API: cuTensorMapEncodeTiled", in the order of its parameters.
  if (reinterpret_cast<uintptr_t>(base) % 16) return "the global address is not aligned to 16 bytes";
  for (uint64_t dimension : dimensions)
    if (dimension == 0 || dimension > uint64_t(1) << 32) return "a global dimension is not within 1 to 2^32";
  for (uint64_t stride : strides)
    if (stride % 16 || stride >= uint64_t(1) << 40) return "a global stride is not a multiple of 16 below 2^40";
  for (uint32_t extent : box)
    if (extent == 0 || extent > 256) return "a box dimension is not within 1 to 256";
  if (box[0] * 2 % 16) return "the box's inner dimension is not a multiple of 16 bytes";
  if (swizzle_bytes != 0 && swizzle_bytes != 128) return "only swizzles of 0 and 128 bytes are modelled";
  if (swizzle_bytes && box[0] * 2 > swizzle_bytes) return "the box's inner dimension exceeds the swizzle span";

  layout = {};
  layout.base = static_cast<const char*>(base);
  for (int i = 0; i < 4; i++) layout.dimensions[i] = dimensions[i];
  for (int i = 0; i < 3; i++) layout.strides[i] = strides[i];
  for (int i = 0; i < 4; i++) layout.box[i] = uint16_t(box[i]);
  layout.swizzle = Swizzle(swizzle_bytes);
  layout.magic = TENSOR_MAP_MAGIC;
  return nullptr;
}

}  // namespace simt
