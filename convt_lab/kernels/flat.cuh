// One image's pixels as one flat axis: how the kernels for stride 1 cut their work.
//
// Tiles of rows and columns waste what sticks out at the image's edges, a quarter of the work at
// 130 x 134 outputs. So the rows are laid end to end, `pitch` pixels apart, and a tile is a stretch
// of that axis. The pitch leaves at least KW - 1 - padding columns of zeros behind each row of
// inputs, and they are the left halo of the next row: a tap is one constant shift for all pixels,
//
//     input position = output position + padding - kw + (padding - kh) * pitch.
//
// The pitch and every tile's first input are multiples of 4, so that 16 bytes can be copied and
// read at a time.

#pragma once

#include "blocking.cuh"

struct FlatTiles {
  int pitch;
  int images, rows;     // on one axis: all images or one, and how many rows each has
  int count, count_co;  // tiles of an axis, and along a group's output channels
  int span;             // inputs of one channel that a tile brings into shared memory
  int chunk_ci;         // channels that it brings at once
};

// The fewest pixels from one row to the next.
inline int64_t flat_pitch(const ConvTransposeProblem& p) {
  const int64_t inputs = static_cast<int64_t>(p.width) + p.kernel_w - 1 - p.padding_w;
  return ceil_div(max(inputs, static_cast<int64_t>(p.out_width)), 4) * 4;
}

// A tile begins so many pixels before a multiple of its size that its first input is aligned.
__host__ __device__ __forceinline__ int flat_lead(const ConvTransposeProblem& p) {
  return (p.padding_w - (p.kernel_w - 1)) & 3;
}

// A place in the image; rows before the first and columns behind the last are outside it.
struct Pixel {
  int row, column;
};

// The place `offset` >= 0 pixels behind `from`, whose column is inside the pitch.
__device__ __forceinline__ Pixel flat_pixel(const Pixel& from, int offset, int pitch) {
  const unsigned column = from.column + offset;
  return {from.row + static_cast<int>(column / pitch), static_cast<int>(column % pitch)};
}

__device__ __forceinline__ Pixel flat_pixel(int64_t position, int pitch) {
  const int64_t row = position >= 0 ? position / pitch : -ceil_div(-position, pitch);
  return {static_cast<int>(row), static_cast<int>(position - row * pitch)};
}

// Copies VECTOR inputs, or sets them to zero.
template <int VECTOR>
__device__ __forceinline__ void copy_inputs(float* shared, const float* global) {
  __pipeline_memcpy_async(shared, global, VECTOR * sizeof(float));
}

template <int VECTOR>
__device__ __forceinline__ void clear_inputs(float* shared) {
  if constexpr (VECTOR == 4) {
    // In halves, as nvcc stores a vector of zeros.
    reinterpret_cast<float2*>(shared)[0] = make_float2(0.0f, 0.0f);
    reinterpret_cast<float2*>(shared)[1] = make_float2(0.0f, 0.0f);
  } else {
    *shared = 0.0f;
  }
}

// Whether rows of inputs can be copied 16 bytes at a time.
inline bool has_aligned_rows(const float* input, const ConvTransposeProblem& p) {
  return p.width % 4 == 0 && reinterpret_cast<std::uintptr_t>(input) % 16 == 0;
}

// Shared memory that a block may ask for at its launch, in floats: what was wanted, or what the
// device has beside what kernels declare.
inline int64_t shared_floats(int wanted_bytes) {
  constexpr int declared_bytes = 1024;  // at most
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return min(wanted_bytes, bytes - declared_bytes) / static_cast<int>(sizeof(float));
}

// How many SMs the device has.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

// Images on one axis, of so many rows each: all, unless the rows, or offsets between images in the
// `span` pixels of a tile, may need more than 32 bits.
inline int images_of_axis(const ConvTransposeProblem& p, int64_t span, int64_t rows,
                          int64_t pitch) {
  const int64_t in_image = static_cast<int64_t>(p.in_channels) * p.height * p.width;
  const int64_t out_image = static_cast<int64_t>(p.out_channels) * p.out_height * p.out_width;
  const int64_t images_of_tile = span / (rows * pitch) + 2;
  const int64_t largest = max(images_of_tile * max(in_image, out_image), p.batch * rows);
  return largest <= INT32_MAX / 2 ? p.batch : 1;
}
