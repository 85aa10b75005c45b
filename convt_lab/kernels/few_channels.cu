// No rung of the ladder: for problems with few channels in a group, on one side or on both.
//
// The ladder's fast kernels block 16 output channels and more, which a group of 8 or an RGB image
// does not have. Here a thread takes 2 to 8 channels of 4 cells (cells.cuh) with all their phases,
// and warps that share their pixels take the other channels.
//
// Cost: grouped by 32 with 8 channels each way, 3x3, stride 2 has 18 FMAs for an output of 4 bytes,
// which float32 memory takes longer to store than the FMAs to run. 64 channels to RGB by 3x7 have
// 1344, and are bound by the FMA units.

#include "cells.cuh"

namespace {

template <class T, int PHASES>
cudaError_t launch_for_channels(const T* input, const T* weight, const T* bias, T* output,
                                const ConvTransposeProblem& p, cudaStream_t stream) {
  // More phases leave registers for fewer channels.
  constexpr int MANY = PHASES > 2 ? 4 : 8;
  const int group_out = p.out_channels / p.groups;
  const auto launch_it = group_out <= 2   ? cells::launch<T, PHASES, 2>
                         : group_out == 3 ? cells::launch<T, PHASES, 3>
                         : group_out == 4 ? cells::launch<T, PHASES, 4>
                                          : cells::launch<T, PHASES, MANY>;
  return launch_it(input, weight, bias, output, p, stream);
}

template <class T>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  if (!cells::covers(p)) return cudaErrorInvalidValue;
  const auto launch_it = cells::phases_of(p) == 1   ? launch_for_channels<T, 1>
                         : cells::phases_of(p) == 2 ? launch_for_channels<T, 2>
                         : cells::phases_of(p) == 3 ? launch_for_channels<T, 3>
                                                    : launch_for_channels<T, 4>;
  return launch_it(input, weight, bias, output, p, stream);
}

}  // namespace

extern "C" cudaError_t few_channels(const float* input, const float* weight, const float* bias,
                                    float* output, ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t few_channels_float16(const __half* input, const __half* weight,
                                            const __half* bias, __half* output,
                                            ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t few_channels_bfloat16(const __nv_bfloat16* input,
                                             const __nv_bfloat16* weight, const __nv_bfloat16* bias,
                                             __nv_bfloat16* output, ConvTransposeProblem p,
                                             cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}
