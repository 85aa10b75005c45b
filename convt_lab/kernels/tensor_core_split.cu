// Tensor cores, with the accuracy of float32 (split_tile.cuh).
//
// Since tensor_core: a float32 is the sum of three bfloat16, and a product the six products of
// their parts that count, summed in bounded runs. That is three times the work of a product in
// TF32, so the rest is tighter: a phase (phase.cuh) is a matrix product for each tap: output
// channels times input channels, by input channels times pixels, which a tap shifts. A block of
// four warps computes a tile of pixels for all phases that meet the same inputs. A kernel of its
// own splits the weights and lays them out as the instruction wants them; from then on they come
// from the cache, a tap ahead.
//
// Cost: for a tap and 16 input channels a warp multiplies 32 output channels by 64 pixels with 96
// instructions of 2048 FMAs each, for 6 loads of 16 bytes a lane (weights), 24 of 8 (inputs) and 64
// additions. Fewer output channels leave rows empty: see tensor_core_narrow.cu.

#include "phase.cuh"
#include "split_tile.cuh"

namespace tensor {

constexpr int TILES_M = 2, TILES_N = 8;   // instructions of a warp, side by side
constexpr int TOGETHER = 4;               // of them, along N, that take turns
constexpr int WARP_CO = 16 * TILES_M;     // output channels of a warp
constexpr int WARP_PIXELS = 8 * TILES_N;  // and its pixels
constexpr int MAX_PERIOD = 16;            // phases of an axis
constexpr int PACKED_AT_ONCE = 4;         // shares of a thread that packs

struct Plan {
  Tile tile;
  // Phases of a class meet the same inputs: there is one for each residue modulo i_step. Those of
  // class c are `order` from begin[c] to begin[c + 1].
  int classes_h, classes_w;
  unsigned char order_h[MAX_PERIOD], order_w[MAX_PERIOD];
  unsigned char begin_h[MAX_PERIOD + 1], begin_w[MAX_PERIOD + 1];
  int phases_h, phases_w;  // all of them
  int max_taps;            // of a phase
  int count_co;            // warps' shares of a group's output channels
  int warps_m;             // warps of a block that have the same pixels
  int blocks_m;            // blocks that have the same pixels, of a class
  int chunks;              // of a group's input channels
  bool is_aligned;         // see Source
};

// Lanes' shares of the weights of one phase and 32 output channels, [chunk, tap, tile, lane]. They
// are packed as [group, phase_h, phase_w, co / 32, chunk, tap, part, tile, lane], 16 bytes each,
// the taps that a phase has without gaps.
__host__ __device__ __forceinline__ int64_t shares_of(const Plan& plan) {
  return static_cast<int64_t>(plan.chunks) * plan.max_taps * (TILES_M * 32);
}
inline int64_t owners_of(const ConvTransposeProblem& p, const Plan& plan) {
  return static_cast<int64_t>(p.groups) * plan.phases_h * plan.phases_w * plan.count_co;
}

// A thread packs a few of these, in all parts. An instruction's k = 2t, 2t + 1, 2t + 8 and 2t + 9
// are the chunk's channels 4t to 4t + 3, so that a lane finds its inputs side by side.
template <class T>
__global__ void __launch_bounds__(THREADS)
    tensor_core_split_pack_kernel(const T* __restrict__ weight, uint4* __restrict__ packed,
                                  ConvTransposeProblem p, Axis rows, Axis columns, Plan plan,
                                  int blocks) {
  constexpr int PARTS = Split<T>::PARTS;
  unsigned digits = blockIdx.x;
  const int block = take_digit(digits, blocks);
  const unsigned first = digits * static_cast<unsigned>(plan.chunks * plan.max_taps);
  const int part_co = take_digit(digits, plan.count_co);
  const Phase along_w = phase_of(columns, take_digit(digits, plan.phases_w));
  const Phase along_h = phase_of(rows, take_digit(digits, plan.phases_h));
  const int group = digits;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int filter_size = p.kernel_h * p.kernel_w;
  const int taps = along_h.taps * along_w.taps;
  const int lane = threadIdx.x % 32, tile = threadIdx.x / 32 % TILES_M;
  const int first_co = part_co * WARP_CO + tile * 16 + lane / 4;
  for (unsigned share = block * PACKED_AT_ONCE * THREADS + threadIdx.x,
                last = share + PACKED_AT_ONCE * THREADS;
       share < min(static_cast<int64_t>(last), shares_of(plan)); share += THREADS) {
    unsigned place = share / (32 * TILES_M);
    const int tap = take_digit(place, plan.max_taps);
    if (tap >= taps) continue;
    const unsigned to = first + place * taps + tap;
    const int kh = along_h.k + tap / along_w.taps * rows.k_step;
    const int kw = along_w.k + tap % along_w.taps * columns.k_step;
    const int first_ci = place * CHUNK_CI + lane % 4 * 4;
    const T* const from =
        weight +
        ((static_cast<int64_t>(group) * group_in + first_ci) * group_out + first_co) * filter_size +
        kh * p.kernel_w + kw;
    uint32_t registers[4][PARTS];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T values[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int co = i % 2 * 8, ci = i / 2 * 2 + j;
        values[j] = zero<T>();
        if (first_co + co < group_out && first_ci + ci < group_in) {
          values[j] = from[(static_cast<int64_t>(ci) * group_out + co) * filter_size];
        }
      }
      split_pair(values[0], values[1], registers[i]);
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      packed[(to * PARTS + part) * (TILES_M * 32) + share % (32 * TILES_M)] = make_uint4(
          registers[0][part], registers[1][part], registers[2][part], registers[3][part]);
    }
  }
}

// A lane's share of the weights of a tap.
template <int PARTS>
using Weights = uint32_t[PARTS][TILES_M][4];

template <int PARTS>
__device__ __forceinline__ void load_weights(Weights<PARTS>& a, const uint4* from) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
      const uint4 vector = from[(part * TILES_M + m) * 32];
      a[part][m][0] = vector.x;
      a[part][m][1] = vector.y;
      a[part][m][2] = vector.z;
      a[part][m][3] = vector.w;
    }
  }
}

// Multiplies a warp's share of a tap; a lane's inputs lie at `x` + places[j].
template <class T>
__device__ __forceinline__ void add_tap(float (&sum)[TILES_M][TILES_N][4],
                                        const Weights<Split<T>::PARTS>& a, const char* x,
                                        const int (&places)[TILES_N]) {
  using Part = typename Split<T>::Part;
  constexpr int PARTS = Split<T>::PARTS;
#pragma unroll
  for (int j = 0; j < TILES_N; j += TOGETHER) {
    uint32_t b[TOGETHER][PARTS][2];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const uint2 vector =
            *reinterpret_cast<const uint2*>(x + places[j + k] + part * (CHUNK_CI * 2));
        b[k][part][0] = vector.x;
        b[k][part][1] = vector.y;
      }
    }
    float of_tap[TOGETHER][TILES_M][4] = {};
#pragma unroll
    for (int i = 0; i < Split<T>::PRODUCTS; ++i) {
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) {
          if constexpr (PARTS == 1) {
            mma<Part>(sum[m][j + k], a[0][m], b[k][0]);
          } else {
            mma<Part>(of_tap[k][m], a[part_of_weight(i)][m], b[k][part_of_input(i)]);
          }
        }
      }
    }
    if constexpr (PARTS > 1) {
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][j + k][i] += of_tap[k][m][i];
        }
      }
    }
  }
}

// What a warp computes: 32 output channels of one phase, for 64 of a tile's pixels.
struct Share {
  Corner corner;  // of the tile
  int class_h, class_w, group;
  int warp_n;            // which of the tile's pixels
  int part_co;           // which of the group's output channels
  int phase_h, phase_w;  // -1, 0 if there are none left
};

__device__ __forceinline__ Share find_share(unsigned block, const Plan& plan) {
  Share share;
  unsigned digits = block;
  share.corner = take_tile(digits, plan.tile);
  share.class_w = take_digit(digits, plan.classes_w);
  share.class_h = take_digit(digits, plan.classes_h);
  const int block_m = take_digit(digits, plan.blocks_m);
  share.group = digits;
  // The warps' roles change from block to block: phases have different numbers of taps, and a warp
  // stays with its quarter of the multiprocessor.
  const int role = (threadIdx.x / 32 + block) % WARPS;
  share.warp_n = role / plan.warps_m;
  const int begin_h = plan.begin_h[share.class_h], begin_w = plan.begin_w[share.class_w];
  const int phases_h = plan.begin_h[share.class_h + 1] - begin_h;
  const int phases_w = plan.begin_w[share.class_w + 1] - begin_w;
  unsigned task = block_m * plan.warps_m + role % plan.warps_m;
  share.part_co = take_digit(task, plan.count_co);
  const int number_w = take_digit(task, max(phases_w, 1)), number_h = task;
  const bool exists = number_h < phases_h && phases_w > 0;
  share.phase_h = exists ? plan.order_h[begin_h + number_h] : -1;
  share.phase_w = exists ? plan.order_w[begin_w + number_w] : 0;
  return share;
}

template <class T, bool LAST>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    tensor_core_split_kernel(const T* __restrict__ input, const T* __restrict__ weight,
                             const T* __restrict__ bias, T* __restrict__ output,
                             const uint4* __restrict__ packed, ConvTransposeProblem p, Axis rows,
                             Axis columns, Plan plan) {
  constexpr int PARTS = Split<T>::PARTS;
  constexpr int OF_TAP = PARTS * TILES_M * 32;  // vectors of weights
  extern __shared__ __align__(16) char memory[];
  float sum[TILES_M][TILES_N][4] = {};
  {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group_in = p.in_channels / p.groups;
    const Share share = find_share(blockIdx.x, plan);
    const Shared<T, INPUT_BYTES<T>> shared(memory, plan.tile);
    find_inputs<LAST>(shared.places, plan.tile, share.corner, p, rows.i_step, columns.i_step,
                      share.class_h, share.class_w);
    const Phase along_h = phase_of(rows, max(share.phase_h, 0));
    const Phase along_w = phase_of(columns, share.phase_w);
    const int taps = share.phase_h < 0 ? 0 : along_h.taps * along_w.taps;

    // Where the lane's inputs lie for the first tap.
    const int shift =
        (along_h.start + plan.tile.lead_h) * plan.tile.pitch + along_w.start + plan.tile.lead_w;
    int places[TILES_N];
#pragma unroll
    for (int j = 0; j < TILES_N; ++j) {
      const int pixel = share.warp_n * WARP_PIXELS + j * 8 + g;
      places[j] = (plan.tile.input_of(pixel) + shift) * INPUT_BYTES<T> + t * 8;
    }
    // As an offset of 32 bits, in 16 bytes.
    const unsigned first =
        (share.group * plan.phases_h + max(share.phase_h, 0)) * plan.phases_w + share.phase_w;
    unsigned a_of_tap =
        (first * plan.count_co + share.part_co) * plan.chunks * plan.max_taps * OF_TAP + lane;
    Weights<PARTS> a;
    if (taps > 0) load_weights<PARTS>(a, packed + a_of_tap);

    const Source<T, LAST> source(input, p, share.corner.n, share.group, plan.is_aligned);
    for_each_chunk(shared, source, plan.tile.inputs(), group_in, [&](bool has_next) {
      const char* x = shared.inputs;
      int in_row = along_w.taps;  // taps that are left of a row of taps
      const int next_row = (plan.tile.pitch - along_w.taps) * INPUT_BYTES<T>;
#pragma unroll 1
      for (int left = taps; left > 0; --left) {
        // While a tap is multiplied, the next one's weights are on their way.
        Weights<PARTS> next;
        a_of_tap += OF_TAP;
        if (left > 1 || has_next) load_weights<PARTS>(next, packed + a_of_tap);
        add_tap<T>(sum, a, x, places);
        memcpy(a, next, sizeof a);
        x -= INPUT_BYTES<T>;
        if (--in_row == 0) {
          in_row = along_w.taps;
          x -= next_row;
        }
      }
    });
  }

  // All of this anew: there is one y, which the compiler does not know, and registers are for sums.
  const Share share = find_share(blockIdx.x + blockIdx.y, plan);
  if (share.phase_h < 0) return;
  const int lane = (threadIdx.x + blockIdx.y) % 32, g = lane / 4, t = lane % 4;
  const int group_out = p.out_channels / p.groups;
  const Phase along_h = phase_of(rows, share.phase_h), along_w = phase_of(columns, share.phase_w);
  const int period_h = period_of(rows), period_w = period_of(columns);
  const int warp_co = share.part_co * WARP_CO;
  // Calls visit(n, oh, ow) for the first of the lane's two pixels in a tile, if it exists.
  const auto visit_pixels = [&](int j, const auto& visit) {
    const int pixel = share.warp_n * WARP_PIXELS + j * 8 + 2 * t;
    const int n = share.corner.n + plan.tile.image_of(pixel);
    const int row = share.corner.h + plan.tile.row_of(pixel);
    const int column = share.corner.w + plan.tile.column_of(pixel);
    if (n >= p.batch || row >= along_h.count || column >= along_w.count) return;
    visit(n, along_h.first + row * period_h, along_w.first + column * period_w);
  };
  float shifts[2 * TILES_M];
#pragma unroll
  for (int i = 0; i < 2 * TILES_M; ++i) {
    const int co = warp_co + i * 8 + g;  // within the group
    const bool has_shift = bias != nullptr && co < group_out;
    shifts[i] = has_shift ? to_float(bias[share.group * group_out + co]) : -0.0f;
  }
  // Two neighbours are written at once where that is possible for all.
  const bool has_pairs = !LAST && period_w == 1 && is_paired<T>(output, p.out_width);
  const int64_t next_channels = 8 * (LAST ? 1 : static_cast<int64_t>(p.out_height) * p.out_width);
  const int next_pixel = period_w * (LAST ? p.out_channels : 1);
  bool is_not_finite = false;
#pragma unroll
  for (int j = 0; j < TILES_N; ++j) {
    visit_pixels(j, [&](int n, int oh, int ow) {
      T* y = output + place_of_output<LAST>(p, n, share.group * group_out + warp_co + g, oh, ow);
      const bool has_second = ow + period_w < p.out_width;
#pragma unroll
      for (int i = 0; i < 2 * TILES_M; ++i, y += next_channels) {
        if (warp_co + i * 8 + g >= group_out) break;
        const float first = sum[i / 2][j][i % 2 * 2], second = sum[i / 2][j][i % 2 * 2 + 1];
        is_not_finite |= !(fabsf(first) <= FLT_MAX && fabsf(second) <= FLT_MAX);
        store_pair(y, first + shifts[i], second + shifts[i], next_pixel, has_second, has_pairs);
      }
    });
  }
  if (!is_not_finite) return;
#pragma unroll 1
  for (int i = 0; i < TILES_N * 2 * TILES_M; ++i) {
    const int co = warp_co + i % (2 * TILES_M) * 8 + g;
    if (co >= group_out) continue;
    visit_pixels(i / (2 * TILES_M), [&](int n, int oh, int first_ow) {
      const int channel = share.group * group_out + co;
#pragma unroll 1
      for (int ow = first_ow; ow < min(first_ow + 2 * period_w, p.out_width); ow += period_w) {
        sum_again<LAST>(output, input, weight, bias, p, rows, columns, n, channel, oh, ow);
      }
    });
  }
}

// Sorts the phases of an axis by the class of inputs that they meet; returns how many a class has
// at most.
inline int sort_phases(const Axis& axis, int phases, unsigned char* order, unsigned char* begin) {
  int count = 0, most = 0;
  for (int residue = 0; residue < axis.i_step; ++residue) {
    begin[residue] = static_cast<unsigned char>(count);
    for (int first = 0; first < phases; ++first) {
      if (phase_of(axis, first).residue != residue) continue;
      order[count++] = static_cast<unsigned char>(first);
    }
    most = max(most, count - begin[residue]);
  }
  begin[axis.i_step] = static_cast<unsigned char>(count);
  return most;
}

inline Reach reach_of_phases(const Axis& axis, int phases) {
  Reach reach = {0, INT32_MIN, 0};
  int last = INT32_MIN;
  for (int first = 0; first < phases; ++first) {
    const Phase phase = phase_of(axis, first);
    reach.count = max(reach.count, phase.count);
    if (phase.taps == 0) continue;
    reach.lead = max(reach.lead, phase.taps - 1 - phase.start);
    last = max(last, phase.start);
  }
  if (last == INT32_MIN) return {reach.count, 0, 0};  // no output has a tap
  reach.halo = last + reach.lead;
  return reach;
}

// Bounded are what a plan has room for and what must fit into shared memory; convt_lab/stages.py
// says the same.
inline bool covers(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns) {
  // Phases' first inputs are up to two apart.
  const int64_t reach_h = most_taps(rows) + 1, reach_w = most_taps(columns) + 1;
  return !has_more_phases(rows, MAX_PERIOD) && !has_more_phases(columns, MAX_PERIOD) &&
         (8 + reach_h) * (8 + reach_w) <= 560 &&
         static_cast<int64_t>(p.height) * p.width <= INT32_MAX;
}

// Fills a plan; returns the bytes of shared memory, or 0 if the problem is none for this kernel.
template <class T>
std::size_t make_plan(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                      Plan& plan) {
  if (!covers(p, rows, columns)) return 0;
  plan.classes_h = rows.i_step;
  plan.classes_w = columns.i_step;
  plan.phases_h = min(period_of(rows), p.out_height);
  plan.phases_w = min(period_of(columns), p.out_width);
  const int most_h = sort_phases(rows, plan.phases_h, plan.order_h, plan.begin_h);
  const int most_w = sort_phases(columns, plan.phases_w, plan.order_w, plan.begin_w);
  plan.max_taps = most_taps(rows) * most_taps(columns);
  plan.count_co = static_cast<int>(ceil_div(p.out_channels / p.groups, WARP_CO));
  plan.chunks = static_cast<int>(ceil_div(p.in_channels / p.groups, CHUNK_CI));
  const int64_t tasks = static_cast<int64_t>(most_h) * most_w * plan.count_co;
  const double taps = static_cast<double>(p.kernel_h) * p.kernel_w / (rows.k_step * columns.k_step);
  const Reach along_h = reach_of_phases(rows, plan.phases_h);
  const Reach along_w = reach_of_phases(columns, plan.phases_w);
  // A block has as many of the tasks as there are, and pixels for the rest of its warps, or fewer
  // pixels if not all of their inputs fit.
  std::size_t shared_bytes = 0;
  for (plan.warps_m = tasks > 2 ? 4 : static_cast<int>(tasks);
       shared_bytes == 0 && plan.warps_m <= 4;) {
    plan.blocks_m = static_cast<int>(ceil_div(tasks, plan.warps_m));
    const double blocks =
        static_cast<double>(plan.blocks_m) * plan.classes_h * plan.classes_w * p.groups;
    shared_bytes =
        choose_tile<T, INPUT_BYTES<T>>(p, along_h, along_w, WARP_PIXELS * (WARPS / plan.warps_m),
                                       blocks, 100.0 * Split<T>::PRODUCTS * taps, plan.tile);
    if (shared_bytes == 0) plan.warps_m *= 2;
  }
  return shared_bytes;
}

template <class T>
int64_t packed_bytes(const ConvTransposeProblem& p) {
  Plan plan = {};
  if (make_plan<T>(p, rows_of(p), columns_of(p), plan) == 0) return -1;
  return owners_of(p, plan) * shares_of(plan) * Split<T>::PARTS *
         static_cast<int64_t>(sizeof(uint4));
}

template <class T, bool LAST>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output, void* packed,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  const std::size_t shared_bytes = make_plan<T>(p, rows, columns, plan);
  if (shared_bytes == 0) return cudaErrorInvalidValue;
  plan.is_aligned = LAST && is_aligned_last(input, p);
  const int64_t packers = ceil_div(shares_of(plan), PACKED_AT_ONCE * THREADS);
  const int64_t packing = packers * owners_of(p, plan);
  const int64_t vectors = owners_of(p, plan) * shares_of(plan) * Split<T>::PARTS;
  // 32 bits are used.
  if (packing > INT32_MAX / (4 * PACKED_AT_ONCE) || vectors > UINT32_MAX) {
    return cudaErrorInvalidValue;
  }
  tensor_core_split_pack_kernel<T><<<static_cast<unsigned>(packing), THREADS, 0, stream>>>(
      weight, static_cast<uint4*>(packed), p, rows, columns, plan, static_cast<int>(packers));
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  error = allow_shared_bytes(tensor_core_split_kernel<T, LAST>, shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(plan.tile.tiles_n) * plan.tile.tiles_h *
                         plan.tile.tiles_w * plan.blocks_m * plan.classes_h * plan.classes_w *
                         p.groups;
  tensor_core_split_kernel<T, LAST>
      <<<static_cast<unsigned>(blocks), THREADS, shared_bytes, stream>>>(
          input, weight, bias, output, static_cast<const uint4*>(packed), p, rows, columns, plan);
  return cudaGetLastError();
}

}  // namespace tensor

LAUNCHER(tensor_core_split, float, false)
LAUNCHER(tensor_core_split_channels_last, float, true)
LAUNCHER(tensor_core_split_float16, __half, false)
LAUNCHER(tensor_core_split_float16_channels_last, __half, true)
LAUNCHER(tensor_core_split_bfloat16, __nv_bfloat16, false)
LAUNCHER(tensor_core_split_bfloat16_channels_last, __nv_bfloat16, true)
