// Stage 4, register_blocked: each thread owns a block of outputs and keeps it in registers.
//
// Since stage 3: two shared loads per FMA keep the FMA units waiting. A thread now owns THREAD_W
// neighbouring pixels of THREAD_CO output channels. An input serves all its channels, a weight all
// its pixels, and along a row the inputs of one tap are those of the next, shifted by one: they
// slide through a window in registers. Shared memory is read 16 bytes at a time. A tile is a
// stretch of the image's flat axis (flat.cuh), and the next one is copied (asynchronously from
// sm_80 on) a vector at a time between the FMAs of this one.
//
// Cost, 3x7: for one row of taps a thread reads a window of 18 inputs and 7 x 8 weights, 19 loads
// of up to 16 bytes, and does 7 * 12 * 8 = 672 FMAs: 35 per load where stage 3 had one half.
//
// This is for 3x7 kernels with stride and dilation 1, where all sizes are constants; phases.cuh has
// the same idea for any other problem.

#include "flat.cuh"
#include "phases.cuh"

// How a block of four warps is made up: WARPS_CO of them side by side in the output channels, the
// others in the pixels. Few channels need few.
template <int WARPS_CO_>
struct Sizes {
  static constexpr int KH = 3, KW = 7, TAPS = KH * KW;
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int WARPS_CO = WARPS_CO_, WARPS_W = WARPS / WARPS_CO;
  static constexpr int THREAD_W = 12;           // neighbouring pixels of a thread
  static constexpr int THREAD_CO = 8;           // its output channels
  static constexpr int WARP_W = 32 * THREAD_W;  // pixels of a warp, one stretch
  static constexpr int BLOCK_W = WARP_W * WARPS_W;
  static constexpr int BLOCK_CO = THREAD_CO * WARPS_CO;
  static constexpr int WINDOW = THREAD_W + KW - 1;  // inputs for a row of taps
  static constexpr int WEIGHTS = TAPS * BLOCK_CO;   // of one input channel
  static constexpr int CHUNK_CI = 4;
  static constexpr int SHARED_BYTES = 48 * 1024;
  static constexpr int BLOCKS_PER_SM = 3;
  // What a thread copies along with a row of taps: vectors of inputs, and weights.
  static constexpr int VECTOR_COPIES = WARPS_W == 1 ? 1 : WARPS_W == 2 ? 2 : 3;
  static constexpr int WEIGHT_COPIES = (WEIGHTS + KH * THREADS - 1) / (KH * THREADS);
  static constexpr int COPIED_VECTORS = KH * VECTOR_COPIES * THREADS;  // of a channel, so
  static constexpr int COPIED_TAPS = THREADS / BLOCK_CO;               // by all threads together
  static_assert(VECTOR_COPIES + WEIGHT_COPIES <= KW, "at most one copy behind each tap");
  static_assert(WINDOW % 4 == 2, "vectors, and a pair at the end");
  // 8 lanes read 16 bytes each, THREAD_W words apart: all banks once.
  static_assert(THREAD_W % 8 == 4, "an odd number of 16-byte words from lane to lane");
};

template <int WARPS_CO, int VECTOR>
__global__ void __launch_bounds__(Sizes<WARPS_CO>::THREADS, Sizes<WARPS_CO>::BLOCKS_PER_SM)
    register_blocked_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                            const float* __restrict__ bias, float* __restrict__ output,
                            ConvTransposeProblem p, FlatTiles tiles) {
  using S = Sizes<WARPS_CO>;
  constexpr int KH = S::KH, KW = S::KW, TAPS = S::TAPS, THREADS = S::THREADS;
  constexpr int THREAD_W = S::THREAD_W, THREAD_CO = S::THREAD_CO, BLOCK_CO = S::BLOCK_CO;

  // A block is one tile of one image, for BLOCK_CO channels of one group. Blocks that share inputs
  // are neighbours.
  unsigned digits = blockIdx.x;
  const int first_co = take_digit(digits, tiles.count_co) * BLOCK_CO;  // within the group
  const int group = take_digit(digits, p.groups);
  const int64_t first =
      static_cast<int64_t>(take_digit(digits, tiles.count)) * S::BLOCK_W - flat_lead(p);
  const int n = digits;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_w = warp / S::WARPS_CO, warp_co = warp % S::WARPS_CO;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const float* const planes =
      input + (static_cast<int64_t>(n) * p.in_channels + group * group_in) * plane_size;
  const int64_t filters_size = static_cast<int64_t>(group_out) * TAPS;  // of one input channel
  const float* const filters = weight + group * group_in * filters_size + first_co * TAPS;

  // Two buffers of [chunk_ci, span] inputs and [chunk_ci, KH, KW, BLOCK_CO] weights; then where in
  // its plane each vector of inputs lies, or -1 for zeros.
  extern __shared__ __align__(16) float shared[];
  const int pitch = tiles.pitch, span = tiles.span, vectors = span / VECTOR;
  const int weights_at = tiles.chunk_ci * span;
  const int buffer_floats = weights_at + tiles.chunk_ci * S::WEIGHTS;
  int* const places = reinterpret_cast<int*>(shared + 2 * buffer_floats);

  // The first input belongs to the first pixel's last tap.
  const Pixel corner = flat_pixel(
      first + p.padding_w - (KW - 1) + static_cast<int64_t>(p.padding_h - (KH - 1)) * pitch, pitch);
  const float* const corner_row = planes + static_cast<int64_t>(corner.row) * p.width;
  for (int v = threadIdx.x; v < max(vectors, S::COPIED_VECTORS); v += THREADS) {
    const Pixel at = flat_pixel(corner, v * VECTOR, pitch);
    const bool exists = v < vectors;
    const bool inside = exists && at.row >= 0 && at.row < p.height && at.column < p.width;
    places[v] = inside ? (at.row - corner.row) * p.width + at.column : -1;
    if (!exists || inside) continue;
    for (int c = 0; c < 2 * tiles.chunk_ci; ++c) {
      const int buffer = c / tiles.chunk_ci;
      const int channel = c - buffer * tiles.chunk_ci;
      clear_inputs<VECTOR>(shared + buffer * buffer_floats + channel * span + v * VECTOR);
    }
  }
  // Channels that the group does not have.
  for (int i = threadIdx.x; i < 2 * tiles.chunk_ci * S::WEIGHTS; i += THREADS) {
    if (first_co + i % BLOCK_CO < group_out) continue;
    const int buffer = i / (tiles.chunk_ci * S::WEIGHTS);
    shared[buffer * weights_at + weights_at + i] = 0.0f;
  }

  // A thread finds only its own entries in `places`: no barrier is needed.
  const auto copy_vector = [](float* to, const float* from, int place, bool is_wanted) {
    if (is_wanted && place >= 0) copy_inputs<VECTOR>(to, from + place);
  };
  const auto copy_weight = [](float* to, const float* from, bool exists) {
    if (exists) __pipeline_memcpy_async(to, from, sizeof(float));
  };
  // Each thread copies weights of one channel.
  const int copied_co = threadIdx.x % BLOCK_CO, copied_tap = threadIdx.x / BLOCK_CO;
  const int taps_to_copy = first_co + copied_co < group_out ? TAPS - copied_tap : 0;
  const float* from_x = corner_row;  // what is copied next
  const float* from_w = filters + copied_co * TAPS + copied_tap;

  float sum[THREAD_CO][THREAD_W] = {};

  for (int c = 0; c < min(tiles.chunk_ci, group_in); ++c) {
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
      copy_vector(shared + c * span + v * VECTOR, from_x, places[v], true);
    }
    float* const to_w = shared + weights_at + c * S::WEIGHTS + threadIdx.x;
    for (int tap = 0; tap < taps_to_copy; tap += S::COPIED_TAPS) {
      copy_weight(to_w + tap * BLOCK_CO, from_w + tap, true);
    }
    from_x += plane_size;
    from_w += filters_size;
  }
  __pipeline_commit();

  // Two buffers: while one chunk of channels is used, the next is copied. Each row of taps takes a
  // share of the copies along.
  float *current = shared, *next = shared + buffer_floats;
  for (int ci = 0; ci < group_in; ci += tiles.chunk_ci) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this chunk has arrived, and nobody uses the other buffer any more
    const int count = min(tiles.chunk_ci, group_in - ci);
    const int next_count = min(tiles.chunk_ci, group_in - ci - tiles.chunk_ci);
    if (vectors > S::COPIED_VECTORS) {  // very wide images: what the rows of taps do not take
      for (int c = 0; c < next_count; ++c) {
        for (int v = S::COPIED_VECTORS + threadIdx.x; v < vectors; v += THREADS) {
          copy_vector(next + c * span + v * VECTOR, from_x + c * plane_size, places[v], true);
        }
      }
    }
    const float* x = current + (KH - 1) * pitch + warp_w * S::WARP_W + lane * THREAD_W;
    const float* w = current + weights_at + warp_co * THREAD_CO;
    float *to_x = next + threadIdx.x * VECTOR, *to_w = next + weights_at + threadIdx.x;
    const int* place_of_vector = places + threadIdx.x;
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      const bool copies = c < next_count;
      int taps_left = copies ? taps_to_copy : 0;
#pragma unroll 1
      for (int kh = 0; kh < KH; ++kh) {
        float window[S::WINDOW];
#pragma unroll
        for (int j = 0; j < S::WINDOW; j += 4) load_part(window + j, x, j, S::WINDOW);
        int place[S::VECTOR_COPIES];
#pragma unroll
        for (int i = 0; i < S::VECTOR_COPIES; ++i) place[i] = place_of_vector[i * THREADS];
#pragma unroll
        for (int kw = 0; kw < KW; ++kw) {
          float weights[THREAD_CO];
#pragma unroll
          for (int q = 0; q < THREAD_CO; q += 4) load_vector(weights + q, w + kw * BLOCK_CO + q);
#pragma unroll
          for (int q = 0; q < THREAD_CO; ++q) {
#pragma unroll
            for (int j = 0; j < THREAD_W; ++j) {
              sum[q][j] = fmaf(window[j + KW - 1 - kw], weights[q], sum[q][j]);
            }
          }
          // Copies go between the taps, where nothing waits for them.
          if (kw < S::VECTOR_COPIES) {
            copy_vector(to_x + kw * THREADS * VECTOR, from_x, place[kw], copies);
          } else if (kw < S::VECTOR_COPIES + S::WEIGHT_COPIES) {
            const int i = kw - S::VECTOR_COPIES;
            copy_weight(to_w + i * THREADS, from_w + i * S::COPIED_TAPS,
                        i * S::COPIED_TAPS < taps_left);
          }
        }
        x -= pitch;
        w += KW * BLOCK_CO;
        to_x += S::VECTOR_COPIES * THREADS * VECTOR;
        place_of_vector += S::VECTOR_COPIES * THREADS;
        to_w += S::WEIGHT_COPIES * THREADS;
        from_w += S::WEIGHT_COPIES * S::COPIED_TAPS;
        taps_left -= S::WEIGHT_COPIES * S::COPIED_TAPS;
      }
      x += span + KH * pitch;
      to_x += span - KH * S::VECTOR_COPIES * THREADS * VECTOR;
      place_of_vector -= KH * S::VECTOR_COPIES * THREADS;
      to_w += S::WEIGHTS - KH * S::WEIGHT_COPIES * THREADS;
      from_x += plane_size;
      from_w += filters_size - KH * S::WEIGHT_COPIES * S::COPIED_TAPS;
    }
    __pipeline_commit();
    float* const used = current;
    current = next;
    next = used;
  }
  __syncthreads();

  // A thread holds THREAD_W neighbouring pixels; written directly, the lanes of a warp would touch
  // 32 places far apart. Each warp turns its stretch around in shared memory, a channel at a time,
  // and writes neighbouring pixels.
  float* const stage = shared + warp * S::WARP_W;
  const int thread_co = first_co + warp_co * THREAD_CO;  // within the group
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const Pixel start = flat_pixel(first + warp_w * S::WARP_W, pitch);
  float* const image =
      output +
      (static_cast<int64_t>(n) * p.out_channels + group * group_out + thread_co) * out_plane +
      static_cast<int64_t>(start.row) * p.out_width;
  const auto pixel_of = [&](int i) { return flat_pixel(start, i * 32 + lane, pitch); };
  const auto is_inside = [&](const Pixel& at) {
    return at.row >= 0 && at.row < p.out_height && at.column < p.out_width;
  };
  int to[THREAD_W];  // where this lane writes, from `image`, or -1
#pragma unroll
  for (int i = 0; i < THREAD_W; ++i) {
    const Pixel at = pixel_of(i);
    to[i] = is_inside(at) ? (at.row - start.row) * p.out_width + at.column : -1;
  }
  bool not_a_number = false;
#pragma unroll
  for (int q = 0; q < THREAD_CO; ++q) {
    if (thread_co + q >= group_out) break;
    const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + q];
#pragma unroll
    for (int j = 0; j < THREAD_W; j += 4) store_vector(stage + lane * THREAD_W + j, sum[q] + j);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < THREAD_W; ++i) {
      if (to[i] < 0) continue;
      const float value = stage[i * 32 + lane] + shift;
      not_a_number |= value != value;
      image[q * out_plane + to[i]] = value;
    }
    __syncwarp();
  }
  if (!not_a_number) return;

  // Beyond the image's edge the tile holds zeros, and zero times an infinite or NaN weight is NaN,
  // where the definition has no product at all. Such outputs are summed again, without the zeros.
  const Axis rows = unit_axis(p.height, p.out_height, KH, p.padding_h);
  const Axis columns = unit_axis(p.width, p.out_width, KW, p.padding_w);
  for (int q = 0; q < THREAD_CO && thread_co + q < group_out; ++q) {
    const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + q];
    for (int i = 0; i < THREAD_W; ++i) {
      const Pixel at = pixel_of(i);
      if (!is_inside(at)) continue;
      float& y = image[q * out_plane + (at.row - start.row) * p.out_width + at.column];
      const bool whole =
          taps_reaching(rows, at.row).count == KH && taps_reaching(columns, at.column).count == KW;
      if (whole || y == y) continue;
      const float* const filter = filters + (warp_co * THREAD_CO + q) * TAPS;
      y = sum_of_taps(planes, filter, p, rows, columns, at.row, at.column) + shift;
    }
  }
}

static bool is_3x7(const ConvTransposeProblem& p) {
  return p.kernel_h == 3 && p.kernel_w == 7 && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_h == 1 && p.dilation_w == 1;
}

// Fills `tiles`; false if not even one channel of a tile fits into shared memory.
template <int WARPS_CO>
static bool plan(const ConvTransposeProblem& p, int vector, FlatTiles& tiles,
                 std::size_t& shared_bytes) {
  using S = Sizes<WARPS_CO>;
  const int64_t pitch = flat_pitch(p), group_in = p.in_channels / p.groups;
  const int64_t span = S::BLOCK_W + ceil_div(S::KW - 1, 4) * 4 + (S::KH - 1) * pitch;
  const int64_t places = max(span / vector, static_cast<int64_t>(S::COPIED_VECTORS));
  const int64_t room = shared_floats(S::SHARED_BYTES) - places;
  const int64_t chunk_ci =
      min(min(room / 2 / (span + S::WEIGHTS), static_cast<int64_t>(S::CHUNK_CI)), group_in);
  if (chunk_ci < 1) return false;
  const int64_t count = ceil_div(p.out_height * pitch + flat_lead(p), S::BLOCK_W);
  const int count_co = static_cast<int>(ceil_div(p.out_channels / p.groups, S::BLOCK_CO));
  const int64_t blocks = count * count_co * p.groups * p.batch;
  if (blocks > INT32_MAX) return false;
  tiles = {static_cast<int>(pitch),   1,        p.out_height,
           static_cast<int>(count),   count_co, static_cast<int>(span),
           static_cast<int>(chunk_ci)};
  const int64_t floats = 2 * chunk_ci * (span + S::WEIGHTS) + places;
  shared_bytes = max(floats, static_cast<int64_t>(S::WARP_W) * S::THREADS / 32) * sizeof(float);
  return true;
}

template <int WARPS_CO, int VECTOR>
static cudaError_t launch(const float* input, const float* weight, const float* bias, float* output,
                          const ConvTransposeProblem& p, const FlatTiles& tiles,
                          std::size_t shared_bytes, cudaStream_t stream) {
  const auto kernel = register_blocked_kernel<WARPS_CO, VECTOR>;
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const int blocks = p.batch * p.groups * tiles.count * tiles.count_co;
  kernel<<<blocks, Sizes<WARPS_CO>::THREADS, shared_bytes, stream>>>(input, weight, bias, output, p,
                                                                     tiles);
  return cudaGetLastError();
}

template <int WARPS_CO>
static bool launch_if_it_fits(const float* input, const float* weight, const float* bias,
                              float* output, const ConvTransposeProblem& p, cudaStream_t stream,
                              cudaError_t& error) {
  FlatTiles tiles;
  std::size_t shared_bytes;
  const bool aligned = has_aligned_rows(input, p);
  if (!plan<WARPS_CO>(p, aligned ? 4 : 1, tiles, shared_bytes)) return false;
  const auto launch_it = aligned ? launch<WARPS_CO, 4> : launch<WARPS_CO, 1>;
  error = launch_it(input, weight, bias, output, p, tiles, shared_bytes, stream);
  return true;
}

extern "C" cudaError_t register_blocked(const float* input, const float* weight, const float* bias,
                                        float* output, ConvTransposeProblem p,
                                        cudaStream_t stream) {
  if (is_3x7(p)) {
    const int channels = p.out_channels / p.groups;
    const auto launch_it = channels <= Sizes<1>::BLOCK_CO   ? launch_if_it_fits<1>
                           : channels <= Sizes<2>::BLOCK_CO ? launch_if_it_fits<2>
                                                            : launch_if_it_fits<4>;
    cudaError_t error;
    if (launch_it(input, weight, bias, output, p, stream, error)) return error;
  }
  return phases::launch(input, weight, bias, output, p, stream);
}

// Which of the kernels runs for a problem whose input is aligned.
extern "C" const char* register_blocked_variant(ConvTransposeProblem p) {
  if (!is_3x7(p)) return "general";
  FlatTiles tiles;
  std::size_t shared_bytes;
  const int vector = p.width % 4 == 0 ? 4 : 1;
  const int channels = p.out_channels / p.groups;
  const auto fits = channels <= Sizes<1>::BLOCK_CO   ? plan<1>
                    : channels <= Sizes<2>::BLOCK_CO ? plan<2>
                                                     : plan<4>;
  return fits(p, vector, tiles, shared_bytes) ? "3x7" : "general";
}
