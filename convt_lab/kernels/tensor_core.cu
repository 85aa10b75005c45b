// Tensor cores: an FMA loop becomes an instruction that multiplies tiles.
//
// Since winograd: the sums of a phase (phase.cuh) are a matrix product. Row co of the left matrix
// are the weights of an output channel, column q of the right one is what the phase's output pixel
// q meets, and both go along k, the pairs of an input channel and a tap:
//
//     y[co, q] = sum over k of w[co, k] * x[k, q].
//
// Tensor cores multiply 16 rows by 8 columns at once (mma.cuh). The right matrix is never written
// anywhere: it would hold each input once for each tap. A block gathers the part that it is about
// to multiply, straight from the image; this is called implicit GEMM.
//
// Float32 is rounded to TF32, which has 11 digits in place of 24: products are exact, sums are not
// better than their terms. Float16 and bfloat16 are multiplied as they are.
//
// Cost: for 8 channels of one tap a warp multiplies 32 channels by 64 pixels with 16 instructions
// of 1024 multiply-adds each, for 12 loads of 8 bytes a lane.
//
// Left to winograd, or to a loop over taps in the types that it does not have: few channels or few
// pixels, which would leave most of an instruction empty, and GPUs without the instruction.

#include <cfloat>

#include "mma.cuh"
#include "phase.cuh"
#include "winograd.cu"

namespace implicit_gemm {

constexpr int TILES_M = 2, TILES_N = 8;  // instructions of a warp, side by side
constexpr int WARPS_M = 2, WARPS_N = 2;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_CO = 16 * TILES_M, WARP_PIXELS = 8 * TILES_N;
constexpr int BLOCK_CO = WARP_CO * WARPS_M, BLOCK_PIXELS = WARP_PIXELS * WARPS_N;
constexpr int CHUNK_CI = 16;  // input channels between two barriers, of one tap
constexpr int BLOCKS_PER_SM = 3;
// Of a group and of a phase: with fewer, an instruction is less than half full.
constexpr int FEWEST_CO = 8, FEWEST_PIXELS = 4;
template <class T>
constexpr int FEWEST_CI = 16 / sizeof(T);
static_assert(BLOCK_PIXELS == THREADS, "a thread gathers the inputs of one pixel");
static_assert(2 * BLOCK_CO == THREADS, "a thread gathers half of a channel's weights");

// What values are multiplied as. An instruction takes 32 bytes of each row: two vectors of 16.
template <class T>
struct Operand {
  using Type = T;
};
template <>
struct Operand<float> {
  using Type = Tf32;
};
template <class T>
constexpr int VECTOR = 16 / sizeof(T);  // channels
template <class T>
constexpr int STEPS = CHUNK_CI / (2 * VECTOR<T>);  // instructions along k, between two barriers

template <class T>
struct alignas(16) Values {
  T value[VECTOR<T>];
};

template <class T>
__device__ __forceinline__ uint4 operands_of(const Values<T>& values) {
  uint4 vector;
  if constexpr (std::is_same_v<T, float>) {
    vector = make_uint4(to_tf32(values.value[0]).bits, to_tf32(values.value[1]).bits,
                        to_tf32(values.value[2]).bits, to_tf32(values.value[3]).bits);
  } else {
    memcpy(&vector, &values, sizeof vector);
  }
  return vector;
}

// Reads one channel after the other, `step` apart; those that do not exist are zeros.
template <class T>
__device__ __forceinline__ void gather(Values<T>& values, const T* from, int64_t step, int count) {
#pragma unroll
  for (int c = 0; c < VECTOR<T>; ++c) {
    set_rounded(values.value[c], 0.0f);
    if (c < count) values.value[c] = from[c * step];
  }
}

// How the work is cut: into phases, tiles of a phase's pixels and of a group's output channels.
struct Tiles {
  int phases_h, phases_w;
  int count, count_co;
};

// What a block has in shared memory. Rows of operands, for each instruction along k, are [buffer,
// step, row, half], 16 bytes each.
template <class T>
struct Shared {
  uint4 w[2][STEPS<T>][BLOCK_CO][2];
  uint4 x[2][STEPS<T>][BLOCK_PIXELS][2];
  int64_t places[BLOCK_PIXELS];  // of outputs, in the group's first channel; -1: there is none
};

// A place along k.
struct Place {
  int ci, tap_h, tap_w;
};

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    tensor_core_kernel(const T* __restrict__ input, const T* __restrict__ weight,
                       const T* __restrict__ bias, T* __restrict__ output, ConvTransposeProblem p,
                       Axis rows, Axis columns, Tiles tiles) {
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);

  unsigned digits = blockIdx.x;
  const int first_co = take_digit(digits, tiles.count_co) * BLOCK_CO;  // within the group
  const int first_pixel = take_digit(digits, tiles.count) * BLOCK_PIXELS;
  const Phase along_w = phase_of(columns, take_digit(digits, tiles.phases_w));
  const Phase along_h = phase_of(rows, take_digit(digits, tiles.phases_h));
  const int group = digits;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t in_plane = static_cast<int64_t>(p.height) * p.width;
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t filter = static_cast<int64_t>(p.kernel_h) * p.kernel_w;

  // The thread's pixel, and its first input; the pixels of all images are one axis.
  unsigned number = first_pixel + threadIdx.x;
  const int column = take_digit(number, along_w.count), row = take_digit(number, along_h.count);
  const int n = number;
  const bool is_pixel = n < p.batch;
  const int64_t image_and_group = static_cast<int64_t>(n) * p.groups + group;
  const T* const planes = input + image_and_group * group_in * in_plane;
  shared.places[threadIdx.x] =
      is_pixel ? image_and_group * group_out * out_plane +
                     static_cast<int64_t>(along_h.first + row * period_of(rows)) * p.out_width +
                     along_w.first + column * period_of(columns)
               : -1;
  // The thread's output channel, and which half of its weights.
  const int co = threadIdx.x % BLOCK_CO, half = threadIdx.x / BLOCK_CO;
  const bool is_channel = first_co + co < group_out;
  const T* const filters =
      weight + (static_cast<int64_t>(group) * group_in * group_out + first_co + co) * filter;

  Values<T> x[2 * STEPS<T>], w[STEPS<T>];  // on their way from global to shared memory
  const auto load = [&](const Place& k) {
    const int h = along_h.start + row - k.tap_h, v = along_w.start + column - k.tap_w;
    const bool is_inside = is_pixel && h >= 0 && h < along_h.size && v >= 0 && v < along_w.size;
    const T* const pixel = planes + k.ci * in_plane +
                           static_cast<int64_t>(along_h.residue + h * rows.i_step) * p.width +
                           along_w.residue + v * columns.i_step;
#pragma unroll
    for (int i = 0; i < 2 * STEPS<T>; ++i) {
      const int c = i * VECTOR<T>;
      gather(x[i], pixel + c * in_plane, in_plane, is_inside ? group_in - k.ci - c : 0);
    }
    const int kh = along_h.k + k.tap_h * rows.k_step, kw = along_w.k + k.tap_w * columns.k_step;
    const int64_t next_ci = group_out * filter;
    const T* const tap = filters + k.ci * next_ci + kh * p.kernel_w + kw;
#pragma unroll
    for (int step = 0; step < STEPS<T>; ++step) {
      const int c = (2 * step + half) * VECTOR<T>;
      gather(w[step], tap + c * next_ci, next_ci, is_channel ? group_in - k.ci - c : 0);
    }
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_co = warp / WARPS_N * WARP_CO, warp_pixel = warp % WARPS_N * WARP_PIXELS;
  const bool is_busy =
      first_co + warp_co < group_out &&
      first_pixel + warp_pixel < static_cast<int64_t>(p.batch) * along_h.count * along_w.count;
  float sum[TILES_M][TILES_N][4] = {};
  const int taps = along_h.taps * along_w.taps;
  Place k = {0, 0, 0};
  if (taps > 0) load(k);
  for (int buffer = 0; taps > 0 && k.ci < group_in; buffer ^= 1) {
#pragma unroll
    for (int i = 0; i < 2 * STEPS<T>; ++i) {
      shared.x[buffer][i / 2][threadIdx.x][i % 2] = operands_of(x[i]);
    }
#pragma unroll
    for (int i = 0; i < STEPS<T>; ++i) shared.w[buffer][i][co][half] = operands_of(w[i]);
    // Whoever writes this buffer again has passed the next barrier, and all have used it by then.
    __syncthreads();
    const int steps = min(STEPS<T>, static_cast<int>(ceil_div(group_in - k.ci, 2 * VECTOR<T>)));
    if (++k.tap_w == along_w.taps) {
      k.tap_w = 0;
      if (++k.tap_h == along_h.taps) {
        k.tap_h = 0;
        k.ci += CHUNK_CI;
      }
    }
    if (k.ci < group_in) load(k);  // they arrive while the others are multiplied
    if (!is_busy) continue;
#pragma unroll
    for (int step = 0; step < STEPS<T>; ++step) {
      if (step >= steps) break;
      // A lane's 8 bytes of a row: which k they are does not matter, as long as both sides agree.
      const auto registers = [t](const uint4(&row)[2]) {
        return reinterpret_cast<const uint2*>(row)[t];
      };
      uint32_t a[TILES_M][4];
#pragma unroll
      for (int m = 0; m < TILES_M; ++m) {
        const auto& from = shared.w[buffer][step];
        const uint2 upper = registers(from[warp_co + m * 16 + g]);
        const uint2 lower = registers(from[warp_co + m * 16 + 8 + g]);
        a[m][0] = upper.x;
        a[m][1] = lower.x;
        a[m][2] = upper.y;
        a[m][3] = lower.y;
      }
#pragma unroll
      for (int j = 0; j < TILES_N; ++j) {
        const uint2 both = registers(shared.x[buffer][step][warp_pixel + j * 8 + g]);
        const uint32_t b[2] = {both.x, both.y};
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) mma<typename Operand<T>::Type>(sum[m][j], a[m], b);
      }
    }
  }
  __syncthreads();  // the places are known, even if there is no tap

  bool is_not_finite = false;
#pragma unroll
  for (int j = 0; j < TILES_N; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t place = shared.places[warp_pixel + j * 8 + 2 * t + i];
      if (place < 0) continue;
#pragma unroll
      for (int m = 0; m < 2 * TILES_M; ++m) {
        const int channel = first_co + warp_co + m * 8 + g;  // within the group
        if (channel >= group_out) continue;
        const float shift = bias == nullptr ? -0.0f : to_float(bias[group * group_out + channel]);
        const float y = sum[m / 2][j][m % 2 * 2 + i];
        is_not_finite |= !(fabsf(y) <= FLT_MAX);
        set_rounded(output[place + channel * out_plane], y + shift);
      }
    }
  }
  if (!is_not_finite) return;

  // Zeros in place of inputs beyond the edge make NaN with what is infinite, and the largest
  // numbers round to infinity: such outputs are summed again, tap by tap.
#pragma unroll 1
  for (int i = 0; i < 2 * TILES_N * 2 * TILES_M; ++i) {
    const int64_t place = shared.places[warp_pixel + i / (4 * TILES_M) * 8 + 2 * t + i % 2];
    const int channel = first_co + warp_co + i / 2 % (2 * TILES_M) * 8 + g;
    if (place < 0 || channel >= group_out) continue;
    T& y = output[place + channel * out_plane];
    if (fabsf(to_float(y)) <= FLT_MAX) continue;
    const float shift = bias == nullptr ? -0.0f : to_float(bias[group * group_out + channel]);
    const int64_t image = place / (p.out_channels * out_plane), pixel = place % out_plane;
    const int oh = static_cast<int>(pixel / p.out_width);
    const int ow = static_cast<int>(pixel % p.out_width);
    const T* const image_planes = input + (image * p.groups + group) * (group_in * in_plane);
    const T* const taps_of_channel =
        weight + (static_cast<int64_t>(group) * group_in * group_out + channel) * filter;
    set_rounded(y, sum_of_taps(image_planes, taps_of_channel, p, rows, columns, oh, ow) + shift);
  }
}

// One thread for each output, for what the tensor cores are not for.
template <class T>
__global__ void __launch_bounds__(THREADS)
    tensor_core_any_kernel(const T* __restrict__ input, const T* __restrict__ weight,
                           const T* __restrict__ bias, T* __restrict__ output,
                           ConvTransposeProblem p, Axis rows, Axis columns) {
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (place >= p.batch * p.out_channels * out_plane) return;
  const int64_t image_and_channel = place / out_plane, pixel = place % out_plane;
  const int channel = static_cast<int>(image_and_channel % p.out_channels);
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int group = channel / group_out;
  const int64_t in_plane = static_cast<int64_t>(p.height) * p.width;
  const T* const planes =
      input + (image_and_channel / p.out_channels * p.groups + group) * (group_in * in_plane);
  const T* const filters =
      weight + (static_cast<int64_t>(group) * group_in * group_out + channel % group_out) *
                   (static_cast<int64_t>(p.kernel_h) * p.kernel_w);
  const float shift = bias == nullptr ? -0.0f : to_float(bias[channel]);
  set_rounded(output[place],
              sum_of_taps(planes, filters, p, rows, columns, static_cast<int>(pixel / p.out_width),
                          static_cast<int>(pixel % p.out_width)) +
                  shift);
}

// Whether the current GPU has the instruction: sm_75 knows float16 alone.
template <class T>
static bool has_instruction() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8 || std::is_same_v<T, __half>;
}

// Returns the number of blocks, and fills `tiles`; 0 if the problem is none for tensor cores.
template <class T>
static unsigned plan(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                     Tiles& tiles) {
  const int group_out = p.out_channels / p.groups;
  if (!has_instruction<T>() || group_out < FEWEST_CO || p.in_channels / p.groups < FEWEST_CI<T>)
    return 0;
  // Along an axis it must be an int; it is none for strides and dilations that are both enormous.
  const auto has_period = [](const Axis& axis) {
    return static_cast<int64_t>(axis.stride) * axis.i_step <= INT32_MAX;
  };
  if (!has_period(rows) || !has_period(columns)) return 0;
  tiles.phases_h = min(period_of(rows), p.out_height);
  tiles.phases_w = min(period_of(columns), p.out_width);
  // Of the first phase, which has most.
  const int64_t pixels =
      ceil_div(p.out_height, period_of(rows)) * ceil_div(p.out_width, period_of(columns)) * p.batch;
  if (pixels < FEWEST_PIXELS || pixels > INT32_MAX - BLOCK_PIXELS) return 0;
  tiles.count = static_cast<int>(ceil_div(pixels, BLOCK_PIXELS));
  tiles.count_co = static_cast<int>(ceil_div(group_out, BLOCK_CO));
  // As a double, because there may be many phases along both axes.
  const double blocks = static_cast<double>(tiles.count) * tiles.count_co * p.groups *
                        tiles.phases_h * tiles.phases_w;
  return blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0;
}

template <class T>
static cudaError_t launch(const T* input, const T* weight, const T* bias, T* output,
                          const ConvTransposeProblem& p, cudaStream_t stream) {
  if (!can_sum_taps(p)) return cudaErrorInvalidConfiguration;
  const Axis rows = rows_of(p), columns = columns_of(p);
  Tiles tiles;
  if (const unsigned blocks = plan<T>(p, rows, columns, tiles)) {
    tensor_core_kernel<T><<<blocks, THREADS, sizeof(Shared<T>), stream>>>(
        input, weight, bias, output, p, rows, columns, tiles);
    return cudaGetLastError();
  }
  if constexpr (std::is_same_v<T, float>) {
    return winograd(input, weight, bias, output, p, stream);
  } else {
    const int64_t outputs =
        static_cast<int64_t>(p.batch) * p.out_channels * p.out_height * p.out_width;
    const int64_t blocks = ceil_div(outputs, THREADS);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    tensor_core_any_kernel<T><<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(
        input, weight, bias, output, p, rows, columns);
    return cudaGetLastError();
  }
}

}  // namespace implicit_gemm

extern "C" cudaError_t tensor_core(const float* input, const float* weight, const float* bias,
                                   float* output, ConvTransposeProblem p, cudaStream_t stream) {
  return implicit_gemm::launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t tensor_core_float16(const __half* input, const __half* weight,
                                           const __half* bias, __half* output,
                                           ConvTransposeProblem p, cudaStream_t stream) {
  return implicit_gemm::launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t tensor_core_bfloat16(const __nv_bfloat16* input, const __nv_bfloat16* weight,
                                            const __nv_bfloat16* bias, __nv_bfloat16* output,
                                            ConvTransposeProblem p, cudaStream_t stream) {
  return implicit_gemm::launch(input, weight, bias, output, p, stream);
}

// Which of the kernels runs for a problem in float32.
extern "C" const char* tensor_core_variant(ConvTransposeProblem p) {
  implicit_gemm::Tiles tiles;
  const bool is_for_tensor_cores =
      implicit_gemm::plan<float>(p, rows_of(p), columns_of(p), tiles) > 0;
  return is_for_tensor_cores ? "tensor cores" : winograd_variant(p);
}
