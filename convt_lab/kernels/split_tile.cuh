// What the tensor cores' kernels have in common: float32 in parts, and a tile of inputs.
//
// Tensor cores take 16-bit values. A float32 is the sum of three bfloat16, x = x0 + x1 + x2, with 8
// bits each and the exponents of float32, so
//
//     x w = x0 w0 + (x0 w1 + x1 w0) + (x0 w2 + x1 w1 + x2 w0) + ...
//
// and what is left out is less than 2^-24 of the whole. Tensor cores cut off what they sum (see
// mma.cuh): so they sum 16 products at a time in each of these terms, small terms first, and an
// ordinary addition, which rounds, adds that to the rest. Values of 16 bits are their own only
// part, and are summed by the tensor cores all the way.
//
// A block brings 16 channels of a tile's inputs into shared memory at a time, in parts already. A
// tap is a shift, so all taps, phases and output channels read the same tile.

#pragma once

#include <cfloat>
#include <type_traits>

#include "blocking.cuh"
#include "mma.cuh"

namespace tensor {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK_CI = 16;  // input channels of an instruction, and of a chunk
constexpr int COPIED_CI = 8;  // channels of a pixel that a thread copies at once
constexpr int BLOCKS_PER_SM = 3;
constexpr int MAX_SHARED_BYTES = 96 * 1024;   // every architecture with these instructions has them
constexpr int GOOD_SHARED_BYTES = 72 * 1024;  // three blocks fit on a multiprocessor

// Of which parts a value consists, and which products of them are summed, the smallest first.
template <class T>
struct Split {
  using Part = T;
  static constexpr int PARTS = 1;
  static constexpr int PRODUCTS = 1;
  static constexpr bool IS_STAGED = false;
};
template <>
struct Split<float> {
  using Part = __nv_bfloat16;
  static constexpr int PARTS = 3;
  static constexpr int PRODUCTS = 6;
  static constexpr bool IS_STAGED = true;
};

// The parts of product number i.
__device__ __forceinline__ constexpr int part_of_weight(int product) {
  return product == 0 ? 2 : product == 1 || product == 3 ? 1 : 0;
}
__device__ __forceinline__ constexpr int part_of_input(int product) {
  return product == 2 ? 2 : product == 1 || product == 4 ? 1 : 0;
}

// Of one input and chunk, without padding.
template <class T>
constexpr int INPUT_BYTES = Split<T>::PARTS * CHUNK_CI * 2;

// Splits two neighbours. Three times 8 bits are all that a float32 has, unless it is so small
// (below 2^-110) that its last part would lie below bfloat16's numbers. What is not the sum of its
// parts becomes NaN, so that outputs it is in are summed again, by the definition.
template <class T>
__device__ __forceinline__ void split_pair(T first, T second, uint32_t (&parts)[Split<T>::PARTS]) {
  if constexpr (Split<T>::PARTS == 1) {
    parts[0] = pair_of(first, second);
  } else {
#pragma unroll
    for (int i = 0; i < Split<T>::PARTS; ++i) {
      parts[i] = pair_of(__float2bfloat16_rn(first), __float2bfloat16_rn(second));
      first -= __uint_as_float(parts[i] << 16);
      second -= __uint_as_float(parts[i] & 0xFFFF0000u);
    }
    if (fabsf(first) + fabsf(second) > 0.0f) parts[0] = 0x7FFF7FFFu;
  }
}

template <class T>
__device__ __forceinline__ T zero() {
  if constexpr (std::is_same_v<T, float>) return 0.0f;
  T value;
  set_rounded(value, 0.0f);
  return value;
}

// A tile of outputs, or of cells of outputs, and the inputs that it meets.
struct Tile {
  int shift_h, shift_w;           // rows and columns are powers of two
  int images;                     // side by side
  int tiles_n, tiles_h, tiles_w;  // that cover all images, rows and columns
  int lead_h, lead_w;             // its first input is so many before its first output,
  int rows, pitch;                // and so many rows and columns are in shared memory

  __host__ __device__ __forceinline__ int inputs() const { return images * rows * pitch; }

  // Of an output of the tile; and where the input above it lies.
  __device__ __forceinline__ int image_of(int i) const { return i >> (shift_w + shift_h); }
  __device__ __forceinline__ int row_of(int i) const { return i >> shift_w & ((1 << shift_h) - 1); }
  __device__ __forceinline__ int column_of(int i) const { return i & ((1 << shift_w) - 1); }
  __device__ __forceinline__ int input_of(int i) const {
    return (image_of(i) * rows + row_of(i)) * pitch + column_of(i);
  }
};

// One of the tiles: its first image, row and column.
struct Corner {
  int n, h, w;
};

__device__ __forceinline__ Corner take_tile(unsigned& digits, const Tile& tile) {
  const int w = take_digit(digits, tile.tiles_w), h = take_digit(digits, tile.tiles_h);
  return {take_digit(digits, tile.tiles_n) * tile.images, h << tile.shift_h, w << tile.shift_w};
}

// Notes where each of a tile's inputs lies, or -1 for zeros: in values from the first image on, or
// in pixels if channels come last. Of an axis it sees every step-th input, from `first` on.
template <bool LAST>
__device__ __forceinline__ void find_inputs(int* places, const Tile& tile, const Corner& corner,
                                            const ConvTransposeProblem& p, int step_h, int step_w,
                                            int first_h, int first_w) {
  // That fits, if there are several images.
  const int image_size = (LAST ? 1 : p.in_channels) * p.height * p.width;
  for (int i = threadIdx.x; i < tile.inputs(); i += THREADS) {
    const int column = i % tile.pitch, row = i / tile.pitch % tile.rows;
    const int n = i / tile.pitch / tile.rows;
    const int number_h = corner.h + row - tile.lead_h, number_w = corner.w + column - tile.lead_w;
    const int h = number_h * step_h + first_h, w = number_w * step_w + first_w;
    const bool inside =
        corner.n + n < p.batch && number_h >= 0 && h < p.height && number_w >= 0 && w < p.width;
    places[i] = inside ? n * image_size + h * p.width + w : -1;
  }
}

// Where inputs come from: the first channel of a group in a tile's first image, and how far it is
// to the next channel and to the next pixel. If channels come last, `is_aligned` says whether 16
// bytes of them can be read at once.
template <class T, bool LAST>
struct Source {
  const T* planes;
  int64_t channel_step;
  int pixel_step;
  bool is_aligned;

  __device__ __forceinline__ Source(const T* input, const ConvTransposeProblem& p, int n, int group,
                                    bool aligned)
      : channel_step(LAST ? 1 : static_cast<int64_t>(p.height) * p.width),
        pixel_step(LAST ? p.in_channels : 1),
        is_aligned(aligned) {
    const int64_t image_size = static_cast<int64_t>(p.in_channels) * p.height * p.width;
    planes = input + n * image_size + group * (p.in_channels / p.groups) * channel_step;
  }

  __device__ __forceinline__ const T* at(int channel, int place) const {
    return planes + channel * channel_step + static_cast<int64_t>(place) * pixel_step;
  }
};

// Whether a launch may say that a source is aligned.
template <class T>
bool is_aligned_last(const T* input, const ConvTransposeProblem& p) {
  constexpr int VECTOR = 16 / sizeof(T);
  return p.in_channels % VECTOR == 0 && p.in_channels / p.groups % VECTOR == 0 &&
         reinterpret_cast<uintptr_t>(input) % 16 == 0;
}

// Inputs of a chunk: a thread has COPIED_CI channels of every 64th input, all along. Float32 it
// copies asynchronously, a chunk ahead, to places of its own: it need wait for nobody. They are
// [round, channel, thread], or [round, thread, channel] if channels come last. Inputs that do not
// exist stay as they are.
template <bool LAST>
constexpr int STAGED_CHANNEL = LAST ? 1 : THREADS;  // from one channel to the next
template <bool LAST>
constexpr int STAGED_THREAD = LAST ? COPIED_CI : 1;

template <bool LAST>
__device__ __forceinline__ void copy_ahead(float* staged, const Source<float, LAST>& source,
                                           const int* places, int inputs, int channels) {
  staged += threadIdx.x * STAGED_THREAD<LAST>;
  for (int i = threadIdx.x; i < inputs * (CHUNK_CI / COPIED_CI); i += THREADS) {
    const int half = i >= inputs, place = places[i - half * inputs];
    const float* x = source.at(half * COPIED_CI, place);
    const int count = place < 0 ? 0 : channels - half * COPIED_CI;
    if (LAST && count >= COPIED_CI && source.is_aligned) {
#pragma unroll
      for (int c = 0; c < COPIED_CI; c += 4) __pipeline_memcpy_async(staged + c, x + c, 16);
    } else if (count >= COPIED_CI) {
#pragma unroll
      for (int c = 0; c < COPIED_CI; ++c, x += source.channel_step) {
        __pipeline_memcpy_async(staged + c * STAGED_CHANNEL<LAST>, x, sizeof(float));
      }
    } else {
#pragma unroll 1
      for (int c = 0; c < count; ++c, x += source.channel_step) {
        __pipeline_memcpy_async(staged + c * STAGED_CHANNEL<LAST>, x, sizeof(float));
      }
    }
    staged += COPIED_CI * THREADS;
  }
}

// What they are at first. Channels that a group does not have keep the values of the chunk before,
// and are multiplied by weights of zero.
__device__ __forceinline__ void clear_staged(float* staged, int inputs) {
  constexpr int ROUND = COPIED_CI * THREADS;
  const int rounds = (inputs * (CHUNK_CI / COPIED_CI) + THREADS - 1) / THREADS;
  for (int i = threadIdx.x; i < rounds * ROUND; i += THREADS) staged[i] = 0.0f;
}

// 16 bytes of values.
template <class T>
struct alignas(16) Vector {
  T values[16 / sizeof(T)];
};

// Reads COPIED_CI channels of one input; those that do not exist are zeros.
template <class T, bool LAST>
__device__ __forceinline__ void load_channels(T (&values)[COPIED_CI], const Source<T, LAST>& source,
                                              int first, int place, int channels) {
  constexpr int VECTOR = 16 / sizeof(T);
  const T* const x = source.at(first, place);
  if (LAST && source.is_aligned && place >= 0 && first + COPIED_CI <= channels) {
#pragma unroll
    for (int c = 0; c < COPIED_CI; c += VECTOR) {
      const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(x + c);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) values[c + i] = vector.values[i];
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < COPIED_CI; ++c) {
    values[c] = zero<T>();
    if (place >= 0 && first + c < channels) values[c] = x[c * source.channel_step];
  }
}

// Brings them where all threads find them, split, as [input, part, channel]. Other types than
// float32 are not staged.
template <class T, int BYTES, bool LAST>
__device__ __forceinline__ void split_chunk(char* tile, const T* staged,
                                            const Source<T, LAST>& source, const int* places,
                                            int inputs, int channels) {
  constexpr int PARTS = Split<T>::PARTS;
  staged += threadIdx.x * STAGED_THREAD<LAST>;
#pragma unroll(Split<T>::IS_STAGED ? 1 : 2)
  for (int i = threadIdx.x; i < inputs * (CHUNK_CI / COPIED_CI); i += THREADS) {
    const int half = i >= inputs, number = i - half * inputs;
    T values[COPIED_CI];
    if constexpr (!Split<T>::IS_STAGED) {
      load_channels(values, source, half * COPIED_CI, places[number], channels);
    } else if constexpr (LAST) {
#pragma unroll
      for (int c = 0; c < COPIED_CI; c += 4) load_vector(values + c, staged + c);
    } else {
#pragma unroll
      for (int c = 0; c < COPIED_CI; ++c) values[c] = staged[c * THREADS];
    }
    staged += COPIED_CI * THREADS;
    uint32_t parts[COPIED_CI / 2][PARTS];
#pragma unroll
    for (int c = 0; c < COPIED_CI; c += 2) split_pair(values[c], values[c + 1], parts[c / 2]);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      *reinterpret_cast<uint4*>(tile + number * BYTES + part * (CHUNK_CI * 2) + half * 16) =
          make_uint4(parts[0][part], parts[1][part], parts[2][part], parts[3][part]);
    }
  }
}

// What a block has in shared memory: where the tile's inputs lie, the inputs in parts, and those of
// the next chunk as they are. From one input to the next it is BYTES.
template <class T, int BYTES>
struct Shared {
  int* places;
  char* inputs;
  T* staged;

  __device__ __forceinline__ Shared(char* shared, const Tile& tile)
      : places(reinterpret_cast<int*>(shared)),
        inputs(shared + (tile.inputs() + 3) / 4 * 16),
        staged(reinterpret_cast<T*>(inputs + tile.inputs() * BYTES)) {}
};

// Brings all chunks of a group's `channels` into shared memory, one after the other, and calls
// `multiply` for each; `count` are the tile's inputs, whose places were found just now.
template <class T, int BYTES, bool LAST, class Multiply>
__device__ __forceinline__ void for_each_chunk(const Shared<T, BYTES>& shared,
                                               Source<T, LAST> source, int count, int channels,
                                               const Multiply& multiply) {
  const auto copy_next = [&] {
    if constexpr (Split<T>::IS_STAGED) {
      copy_ahead(shared.staged, source, shared.places, count, channels);
      __pipeline_commit();
    }
  };
  if constexpr (Split<T>::IS_STAGED) clear_staged(shared.staged, count);
  __syncthreads();  // the places are known
  copy_next();
  while (channels > 0) {
    __pipeline_wait_prior(0);
    __syncthreads();  // nobody uses the inputs of the chunk before any more
    split_chunk<T, BYTES>(shared.inputs, shared.staged, source, shared.places, count, channels);
    source.planes += CHUNK_CI * source.channel_step;
    channels -= CHUNK_CI;
    if (channels > 0) copy_next();
    __syncthreads();
    multiply(channels > 0);
  }
}

// Where an output lies, from the first on.
template <bool LAST>
__device__ __forceinline__ int64_t place_of_output(const ConvTransposeProblem& p, int n,
                                                   int channel, int oh, int ow) {
  const int64_t first = LAST ? n : static_cast<int64_t>(n) * p.out_channels + channel;
  const int64_t pixel = (first * p.out_height + oh) * p.out_width + ow;
  return LAST ? pixel * p.out_channels + channel : pixel;
}

// Whether two neighbours in a row of outputs can be written at once, if the first has an even
// place.
template <class T>
__device__ __forceinline__ bool is_paired(const T* output, int out_width) {
  return out_width % 2 == 0 && reinterpret_cast<uintptr_t>(output) % (2 * sizeof(T)) == 0;
}

// Writes an output and, if it exists, the one `step` behind it; at once, if they are a pair.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, int step,
                                           bool has_second, bool is_pair) {
  T values[2];
  set_rounded(values[0], first);
  set_rounded(values[1], second);
  if (is_pair) {  // rows have no single output at their end
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    };
    *reinterpret_cast<Pair*>(to) = {values[0], values[1]};
  } else {
    to[0] = values[0];
    if (has_second) to[step] = values[1];
  }
}

// Sums an output again, tap by tap, if it is not finite: an infinity, a value too large for
// bfloat16 or one too small has parts that are NaN; zeros in place of inputs or taps make NaN with
// what is infinite.
template <bool LAST, class T>
__device__ __forceinline__ void sum_again(T* __restrict__ output, const T* __restrict__ input,
                                          const T* __restrict__ weight, const T* __restrict__ bias,
                                          const ConvTransposeProblem& p, const Axis& rows,
                                          const Axis& columns, int n, int channel, int oh, int ow) {
  T& y = output[place_of_output<LAST>(p, n, channel, oh, ow)];
  if (fabsf(to_float(y)) <= FLT_MAX) return;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int group = channel / group_out;
  const Source<T, LAST> source(input, p, n, group, false);
  const T* const filters =
      weight + (static_cast<int64_t>(group) * group_in * group_out + channel % group_out) *
                   (static_cast<int64_t>(p.kernel_h) * p.kernel_w);
  const float shift = bias == nullptr ? -0.0f : to_float(bias[channel]);
  set_rounded(y, sum_of_taps(source.planes, filters, p, rows, columns, oh, ow, source.channel_step,
                             source.pixel_step) +
                     shift);
}

// How far an axis's outputs reach: so many there are, a tile's inputs begin `lead` before them, and
// there are `halo` more of them.
struct Reach {
  int count, lead, halo;
};

// Chooses the tile of `outputs` that costs least, by the multiplications (`cost` for a chunk) and
// what it takes to bring the inputs and to begin; `blocks` share a tile. Returns the bytes that a
// block needs, 0 if no tile will do.
template <class T, int BYTES>
std::size_t choose_tile(const ConvTransposeProblem& p, const Reach& along_h, const Reach& along_w,
                        int outputs, double blocks, double cost, Tile& tile) {
  // In cycles of a multiprocessor, by rough counts of instructions.
  constexpr double COST_OF_INPUT = 1.5, COST_OF_CHUNK = 300.0, ENOUGH_BLOCKS = 396.0;
  double best = DBL_MAX;
  std::size_t shared_bytes = 0;
  for (int shift_w = 3; 1 << shift_w <= outputs; ++shift_w) {
    for (int shift_h = 0; 1 << (shift_w + shift_h) <= outputs; ++shift_h) {
      const int images = outputs >> (shift_w + shift_h);
      const int64_t image = static_cast<int64_t>(p.in_channels) * p.height * p.width;
      if (images > 1 && (images > p.batch || images * image > INT32_MAX)) continue;
      const int64_t rows = (1 << shift_h) + along_h.halo, pitch = (1 << shift_w) + along_w.halo;
      const int64_t inputs = images * rows * pitch;
      const int64_t rounds = ceil_div(inputs * (CHUNK_CI / COPIED_CI), THREADS);
      const int64_t bytes = ceil_div(inputs, 4) * 16 + inputs * BYTES +
                            (Split<T>::IS_STAGED ? rounds * COPIED_CI * THREADS * 4 : 0);
      if (bytes > MAX_SHARED_BYTES) continue;
      const int64_t tiles_n = ceil_div(p.batch, images);
      const int64_t tiles_h = ceil_div(along_h.count, 1 << shift_h);
      const int64_t tiles_w = ceil_div(along_w.count, 1 << shift_w);
      const double count = blocks * tiles_n * tiles_h * tiles_w;
      const double time = max(count, ENOUGH_BLOCKS) *
                          (cost + inputs * COST_OF_INPUT + COST_OF_CHUNK) *
                          (bytes > GOOD_SHARED_BYTES ? 1.5 : 1.0);
      if (time >= best || count > INT32_MAX) continue;
      best = time;
      shared_bytes = static_cast<std::size_t>(bytes);
      tile = {shift_h,
              shift_w,
              images,
              static_cast<int>(tiles_n),
              static_cast<int>(tiles_h),
              static_cast<int>(tiles_w),
              along_h.lead,
              along_w.lead,
              static_cast<int>(rows),
              static_cast<int>(pitch)};
    }
  }
  return shared_bytes;
}

}  // namespace tensor

// For each type and memory format: how much memory the packed weights take, in bytes (-1 if the
// kernel is not for the problem), and the launcher.
#define LAUNCHER(NAME, T, LAST)                                                            \
  extern "C" int64_t NAME##_packed_bytes(ConvTransposeProblem p) {                         \
    return tensor::packed_bytes<T>(p);                                                     \
  }                                                                                        \
  extern "C" cudaError_t NAME(const T* input, const T* weight, const T* bias, T* output,   \
                              void* packed, ConvTransposeProblem p, cudaStream_t stream) { \
    return tensor::launch<T, LAST>(input, weight, bias, output, packed, p, stream);        \
  }
