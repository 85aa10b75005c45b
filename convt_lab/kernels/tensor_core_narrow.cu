// No rung of the ladder: tensor cores (split_tile.cuh) for few output channels.
//
// tensor_core_split.cu makes output channels the rows of its products, 32 at a time, and leaves
// most of them empty where there are three. Here pixels are the rows, and a column is one output
// channel in one phase. As in cells.cuh, a cell is a stretch of `stride` outputs, o = stride * c +
// r with a phase r for each; an output meets input i = c + e through the tap k where k * dilation =
// r + padding - stride * e. So all columns read the same inputs for the same e, and those that have
// no tap there multiply by zero.
//
// Cost: 64 cells times 8 columns, for one e along either axis and 16 input channels, are 24
// instructions for 48 loads of 4 bytes a lane (inputs) and 3 of 8 (weights).

#include "split_tile.cuh"

namespace tensor {

constexpr int TILES_M = 4;                // instructions of a warp along its cells
constexpr int WARP_CELLS = 16 * TILES_M;  // and its cells
constexpr int MAX_DISTANCES = 32;         // along an axis
constexpr int MAX_STRIDE = 16;

// From one input to the next: 16 bytes more than it takes, so that lanes find theirs in all banks.
template <class T>
constexpr int STRIDE_BYTES = INPUT_BYTES<T> + 16;

struct Plan {
  Tile tile;                                   // of cells
  int distances_h, distances_w;                // that have a tap,
  int e_h[MAX_DISTANCES], e_w[MAX_DISTANCES];  // in descending order
  int columns;                                 // stride_h * stride_w * a group's output channels
  int parts_n;                                 // blocks that have the same cells
  int chunks;                                  // of a group's input channels
  bool is_aligned;                             // see Source
};

// Lanes' shares of a group's weights: [part, chunk, e_h, e_w, tile, lane]. Packed are they with the
// parts of float32 between e_w and tile, 8 bytes each.
__host__ __device__ __forceinline__ int64_t shares_of(const Plan& plan, int tiles_n) {
  return static_cast<int64_t>(plan.parts_n) * plan.chunks * plan.distances_h * plan.distances_w *
         (tiles_n * 32);
}

// What a column stands for: neighbours in a row of outputs are neighbours.
struct Column {
  int co, phase_h, phase_w;  // the output channel, within the group
};

__device__ __forceinline__ Column column_of(unsigned number, const ConvTransposeProblem& p) {
  const int phase_w = take_digit(number, p.stride_w), phase_h = take_digit(number, p.stride_h);
  return {static_cast<int>(number), phase_h, phase_w};
}

// The tap through which outputs of a phase meet inputs at distance e, or -1.
__host__ __device__ __forceinline__ int tap_of(const Axis& axis, int phase, int e) {
  const int shifted = phase + axis.padding - axis.stride * e;
  const int k = shifted / axis.dilation;
  return shifted >= 0 && shifted % axis.dilation == 0 && k < axis.kernel ? k : -1;
}

// A thread packs a lane's share: the chunk's channels 2t, 2t + 1, 2t + 8 and 2t + 9.
template <class T, int TILES_N>
__global__ void __launch_bounds__(THREADS)
    tensor_core_narrow_pack_kernel(const T* __restrict__ weight, uint2* __restrict__ packed,
                                   ConvTransposeProblem p, Axis rows, Axis columns, Plan plan) {
  constexpr int PARTS = Split<T>::PARTS;
  const unsigned blocks = ceil_div(shares_of(plan, TILES_N), THREADS);  // of a group
  const int group = blockIdx.x / blocks;
  unsigned digits = blockIdx.x % blocks * THREADS + threadIdx.x;
  if (digits >= shares_of(plan, TILES_N)) return;
  const int lane = take_digit(digits, 32), tile = take_digit(digits, TILES_N);
  const int64_t place = group * (shares_of(plan, TILES_N) / (32 * TILES_N)) + digits;
  const int number_w = take_digit(digits, plan.distances_w);
  const int number_h = take_digit(digits, plan.distances_h);
  const int chunk = take_digit(digits, plan.chunks);
  const int number = (digits * TILES_N + tile) * 8 + lane / 4;
  const Column column = column_of(number, p);
  const int kh = tap_of(rows, column.phase_h, plan.e_h[number_h]);
  const int kw = tap_of(columns, column.phase_w, plan.e_w[number_w]);
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  uint32_t registers[2][PARTS];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T values[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int ci = chunk * CHUNK_CI + lane % 4 * 2 + i * 8 + j;
      values[j] = zero<T>();
      if (kh >= 0 && kw >= 0 && number < plan.columns && ci < group_in) {
        const int64_t filter =
            (static_cast<int64_t>(group) * group_in + ci) * group_out + column.co;
        values[j] = weight[(filter * p.kernel_h + kh) * p.kernel_w + kw];
      }
    }
    split_pair(values[0], values[1], registers[i]);
  }
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    packed[((place * PARTS + part) * TILES_N + tile) * 32 + lane] =
        make_uint2(registers[0][part], registers[1][part]);
  }
}

// A lane's share of the weights for one distance.
template <int PARTS, int TILES_N>
using Weights = uint32_t[PARTS][TILES_N][2];

template <int PARTS, int TILES_N>
__device__ __forceinline__ void load_weights(Weights<PARTS, TILES_N>& b, const uint2* from) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int j = 0; j < TILES_N; ++j) {
      const uint2 vector = from[(part * TILES_N + j) * 32];
      b[part][j][0] = vector.x;
      b[part][j][1] = vector.y;
    }
  }
}

// Multiplies a warp's share for one distance. The lane's inputs lie at `x` + places[m], those of
// row g + 8 of a product `next_rows` further on.
template <class T, int TILES_N>
__device__ __forceinline__ void add_distance(float (&sum)[TILES_M][TILES_N][4],
                                             const Weights<Split<T>::PARTS, TILES_N>& b,
                                             const char* x, const int (&places)[TILES_M][2]) {
  using Part = typename Split<T>::Part;
  constexpr int PARTS = Split<T>::PARTS;
  constexpr int TOGETHER = TILES_N == 1 ? 4 : 2;  // tiles of cells that take turns
#pragma unroll
  for (int m = 0; m < TILES_M; m += TOGETHER) {
    uint32_t a[TOGETHER][PARTS][4];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const char* const from = x + places[m + k][row] + part * (CHUNK_CI * 2);
          a[k][part][row] = *reinterpret_cast<const uint32_t*>(from);
          a[k][part][row + 2] = *reinterpret_cast<const uint32_t*>(from + CHUNK_CI);
        }
      }
    }
    float of_distance[TOGETHER][TILES_N][4] = {};
#pragma unroll
    for (int i = 0; i < Split<T>::PRODUCTS; ++i) {
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
        for (int j = 0; j < TILES_N; ++j) {
          if constexpr (PARTS == 1) {
            mma<Part>(sum[m + k][j], a[k][0], b[0][j]);
          } else {
            mma<Part>(of_distance[k][j], a[k][part_of_input(i)], b[part_of_weight(i)][j]);
          }
        }
      }
    }
    if constexpr (PARTS > 1) {
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
        for (int j = 0; j < TILES_N; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m + k][j][i] += of_distance[k][j][i];
        }
      }
    }
  }
}

template <class T, int TILES_N, bool LAST>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    tensor_core_narrow_kernel(const T* __restrict__ input, const T* __restrict__ weight,
                              const T* __restrict__ bias, T* __restrict__ output,
                              const uint2* __restrict__ packed, ConvTransposeProblem p, Axis rows,
                              Axis columns, Plan plan) {
  constexpr int PARTS = Split<T>::PARTS;
  constexpr int OF_DISTANCE = PARTS * TILES_N * 32;  // vectors of weights
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  unsigned digits = blockIdx.x;
  const Corner corner = take_tile(digits, plan.tile);
  const int part_n = take_digit(digits, plan.parts_n), group = digits;
  const Shared<T, STRIDE_BYTES<T>> shared(memory, plan.tile);
  find_inputs<LAST>(shared.places, plan.tile, corner, p, 1, 1, 0, 0);

  // Where the lane's inputs lie at distance 0.
  int places[TILES_M][2];
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = plan.tile.input_of(warp * WARP_CELLS + m * 16 + row * 8 + g);
      const int shift = plan.tile.lead_h * plan.tile.pitch + plan.tile.lead_w;
      places[m][row] = (at + shift) * STRIDE_BYTES<T> + t * 4;
    }
  }
  const int distances = plan.distances_h * plan.distances_w;
  unsigned b_next = (group * plan.parts_n + part_n) * plan.chunks * distances * OF_DISTANCE + lane;
  Weights<PARTS, TILES_N> b;
  load_weights<PARTS, TILES_N>(b, packed + b_next);

  float sum[TILES_M][TILES_N][4] = {};
  const Source<T, LAST> source(input, p, corner.n, group, plan.is_aligned);
  for_each_chunk(shared, source, plan.tile.inputs(), group_in, [&](bool has_next) {
    int number_h = 0, number_w = 0;
#pragma unroll 1
    for (int i = 0; i < distances; ++i) {
      const int at = plan.e_h[number_h] * plan.tile.pitch + plan.e_w[number_w];
      Weights<PARTS, TILES_N> next;
      if (has_next || i + 1 < distances) b_next += OF_DISTANCE;
      load_weights<PARTS, TILES_N>(next, packed + b_next);
      add_distance<T, TILES_N>(sum, b, shared.inputs + at * STRIDE_BYTES<T>, places);
      memcpy(b, next, sizeof b);
      if (++number_w == plan.distances_w) {
        number_w = 0;
        ++number_h;
      }
    }
  });

  // Calls visit(n, oh, ow) for one of the lane's cells, if it exists, with its first output.
  const auto visit_cell = [&](int m, int half, const auto& visit) {
    const int cell = warp * WARP_CELLS + m * 16 + half * 8 + g;
    const int n = corner.n + plan.tile.image_of(cell);
    const int oh = (corner.h + plan.tile.row_of(cell)) * p.stride_h;
    const int ow = (corner.w + plan.tile.column_of(cell)) * p.stride_w;
    if (n < p.batch && oh < p.out_height && ow < p.out_width) visit(n, oh, ow);
  };
  const bool has_pairs = !LAST && p.stride_w % 2 == 0 && is_paired<T>(output, p.out_width);
  bool is_not_finite = false;
#pragma unroll
  for (int j = 0; j < TILES_N; ++j) {
    const int number = (part_n * TILES_N + j) * 8 + 2 * t;  // of the first of two columns
    // With an even stride the second is the neighbour of the first.
    const Column first = column_of(number, p), second = column_of(number + 1, p);
    if (number >= plan.columns) continue;
    const bool has_both = number + 1 < plan.columns;
    const float shift = bias == nullptr ? -0.0f : to_float(bias[group * group_out + first.co]);
    const float second_shift =
        bias == nullptr || !has_both ? -0.0f : to_float(bias[group * group_out + second.co]);
#pragma unroll
    for (int i = 0; i < 2 * TILES_M; ++i) {
      const float a = sum[i / 2][j][i % 2 * 2], b = sum[i / 2][j][i % 2 * 2 + 1];
      is_not_finite |= !(fabsf(a) <= FLT_MAX && fabsf(b) <= FLT_MAX);
      visit_cell(i / 2, i % 2, [&](int n, int oh, int ow) {
        const auto place_of = [&](const Column& column) {
          return output + place_of_output<LAST>(p, n, group * group_out + column.co,
                                                oh + column.phase_h, ow + column.phase_w);
        };
        const auto exists = [&](const Column& column) {
          return oh + column.phase_h < p.out_height && ow + column.phase_w < p.out_width;
        };
        if (exists(first) && has_pairs) {
          store_pair(place_of(first), a + shift, b + second_shift, 1, true, true);
        }
        if (has_pairs) return;
        if (exists(first)) set_rounded(*place_of(first), a + shift);
        if (has_both && exists(second)) {
          set_rounded(*place_of(second), b + second_shift);
        }
      });
    }
  }
  if (!is_not_finite) return;
#pragma unroll 1
  for (int i = 0; i < 2 * TILES_N * 2 * TILES_M; ++i) {
    const int number = (part_n * TILES_N + i / (4 * TILES_M)) * 8 + 2 * t + i % 2;
    const Column column = column_of(number, p);
    if (number >= plan.columns) continue;
    visit_cell(i / 4 % TILES_M, i / 2 % 2, [&](int n, int first_oh, int first_ow) {
      const int oh = first_oh + column.phase_h, ow = first_ow + column.phase_w;
      if (oh >= p.out_height || ow >= p.out_width) return;
      const int channel = group * group_out + column.co;
      sum_again<LAST>(output, input, weight, bias, p, rows, columns, n, channel, oh, ow);
    });
  }
}

// Bounded are what must fit into shared memory; convt_lab/stages.py says the same.
inline bool covers(const ConvTransposeProblem& p) {
  const auto reach = [](int kernel, int stride, int dilation) {
    return (static_cast<int64_t>(kernel - 1) * dilation + stride - 1) / stride + 1;
  };
  const int64_t reach_h = reach(p.kernel_h, p.stride_h, p.dilation_h);
  const int64_t reach_w = reach(p.kernel_w, p.stride_w, p.dilation_w);
  return p.stride_h <= MAX_STRIDE && p.stride_w <= MAX_STRIDE && max(reach_h, reach_w) <= 64 &&
         (15 + reach_h) * (15 + reach_w) <= 512 &&
         static_cast<int64_t>(p.height) * p.width <= INT32_MAX;
}

// Finds the distances at which there is a tap, the largest first; returns their number.
inline int find_distances(const Axis& axis, int* e) {
  // e * stride = r + padding - k * dilation, for r below the stride and k below the kernel's size.
  int count = 0;
  for (int k = 0, last = INT32_MAX; k < axis.kernel; ++k) {
    // Of the tap's only phase: rounded up, and the larger k the smaller.
    const int shifted = axis.padding - k * axis.dilation;
    const int distance =
        shifted > 0 ? (shifted + axis.stride - 1) / axis.stride : shifted / axis.stride;
    if (distance != last) e[count++] = distance;
    last = distance;
  }
  return count;
}

inline Reach reach_of(const Axis& axis, const int* e, int count) {
  const int lead = -e[count - 1];
  return {static_cast<int>(ceil_div(axis.out_size, axis.stride)), lead, e[0] + lead};
}

// How many tiles of 8 columns a warp has: as many as it takes, up to 2.
inline int tiles_of(const ConvTransposeProblem& p) {
  const int64_t columns =
      static_cast<int64_t>(p.stride_h) * p.stride_w * (p.out_channels / p.groups);
  return columns <= 8 ? 1 : 2;
}

// Fills a plan; returns the bytes of shared memory, or 0 if the problem is none for this kernel.
template <class T>
std::size_t make_plan(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                      Plan& plan) {
  if (!covers(p)) return 0;
  plan.distances_h = find_distances(rows, plan.e_h);
  plan.distances_w = find_distances(columns, plan.e_w);
  plan.columns = p.stride_h * p.stride_w * (p.out_channels / p.groups);
  plan.parts_n = static_cast<int>(ceil_div(plan.columns, 8 * tiles_of(p)));
  plan.chunks = static_cast<int>(ceil_div(p.in_channels / p.groups, CHUNK_CI));
  return choose_tile<T, STRIDE_BYTES<T>>(
      p, reach_of(rows, plan.e_h, plan.distances_h), reach_of(columns, plan.e_w, plan.distances_w),
      WARP_CELLS * WARPS, static_cast<double>(plan.parts_n) * p.groups,
      25.0 * Split<T>::PRODUCTS * tiles_of(p) * plan.distances_h * plan.distances_w, plan.tile);
}

template <class T>
int64_t packed_bytes(const ConvTransposeProblem& p) {
  Plan plan = {};
  if (make_plan<T>(p, rows_of(p), columns_of(p), plan) == 0) return -1;
  return p.groups * shares_of(plan, tiles_of(p)) * Split<T>::PARTS *
         static_cast<int64_t>(sizeof(uint2));
}

template <class T, int TILES_N, bool LAST>
cudaError_t launch_tiles(const T* input, const T* weight, const T* bias, T* output, void* packed,
                         const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                         const Plan& plan, std::size_t shared_bytes, cudaStream_t stream) {
  const int64_t packing = p.groups * ceil_div(shares_of(plan, TILES_N), THREADS);
  const int64_t vectors = p.groups * shares_of(plan, TILES_N) * Split<T>::PARTS;
  if (packing > INT32_MAX / 4 || vectors > UINT32_MAX) return cudaErrorInvalidValue;
  tensor_core_narrow_pack_kernel<T, TILES_N>
      <<<static_cast<unsigned>(packing), THREADS, 0, stream>>>(weight, static_cast<uint2*>(packed),
                                                               p, rows, columns, plan);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const auto kernel = tensor_core_narrow_kernel<T, TILES_N, LAST>;
  error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(plan.tile.tiles_n) * plan.tile.tiles_h *
                         plan.tile.tiles_w * plan.parts_n * p.groups;
  kernel<<<static_cast<unsigned>(blocks), THREADS, shared_bytes, stream>>>(
      input, weight, bias, output, static_cast<const uint2*>(packed), p, rows, columns, plan);
  return cudaGetLastError();
}

template <class T, bool LAST>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output, void* packed,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  const std::size_t shared_bytes = make_plan<T>(p, rows, columns, plan);
  if (shared_bytes == 0) return cudaErrorInvalidValue;
  plan.is_aligned = LAST && is_aligned_last(input, p);
  const auto launch_it = tiles_of(p) == 1 ? launch_tiles<T, 1, LAST> : launch_tiles<T, 2, LAST>;
  return launch_it(input, weight, bias, output, packed, p, rows, columns, plan, shared_bytes,
                   stream);
}

}  // namespace tensor

LAUNCHER(tensor_core_narrow, float, false)
LAUNCHER(tensor_core_narrow_channels_last, float, true)
LAUNCHER(tensor_core_narrow_float16, __half, false)
LAUNCHER(tensor_core_narrow_float16_channels_last, __half, true)
LAUNCHER(tensor_core_narrow_bfloat16, __nv_bfloat16, false)
LAUNCHER(tensor_core_narrow_bfloat16_channels_last, __nv_bfloat16, true)
