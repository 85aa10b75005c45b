// No rung of the ladder: for problems with one output channel in a group, as in depthwise
// upsampling, fixed bilinear filters, or brightness from many features.
//
// The ladder's fast kernels keep inputs in registers for many output channels. With one there is
// nothing to share but neighbourhood: a thread takes two rows of 4 cells (cells.cuh) with all their
// phases, and slides over the inputs.
//
// Cost: depthwise 3x7 with stride 1 has 21 FMAs for 8 bytes of float32, depthwise 4x4 with stride 2
// has 4 for 5 bytes: memory could be the limit, were it not for all the instructions that copy
// inputs, find places and write outputs. So outputs are written up to four at a time.

#include "cells.cuh"

namespace {

template <class T>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  if (!cells::covers(p) || p.out_channels != p.groups) return cudaErrorInvalidValue;
  const auto launch_it = cells::phases_of(p) == 1   ? cells::launch<T, 1, 1>
                         : cells::phases_of(p) == 2 ? cells::launch<T, 2, 1>
                         : cells::phases_of(p) == 3 ? cells::launch<T, 3, 1>
                                                    : cells::launch<T, 4, 1>;
  return launch_it(input, weight, bias, output, p, stream);
}

}  // namespace

extern "C" cudaError_t one_channel(const float* input, const float* weight, const float* bias,
                                   float* output, ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t one_channel_float16(const __half* input, const __half* weight,
                                           const __half* bias, __half* output,
                                           ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t one_channel_bfloat16(const __nv_bfloat16* input, const __nv_bfloat16* weight,
                                            const __nv_bfloat16* bias, __nv_bfloat16* output,
                                            ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}
