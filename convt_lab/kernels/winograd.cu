// Stage 5, winograd: two rows of outputs from four products in place of six.
//
// Since stage 4: nothing is left to win but FMAs themselves. Winograd's F(2, 3) computes two
// outputs y of a three-tap filter g from four inputs d with four products:
//
//     m0 = (d0 - d2) g0                 y0 = m0 + m1 + m2
//     m1 = (d1 + d2) (g0 + g1 + g2)/2   y1 = m1 - m2 - m3
//     m2 = (d2 - d1) (g0 - g1 + g2)/2
//     m3 = (d1 - d3) g2
//
// Here the three taps are the kernel's rows, in the order in which they meet the input (g0 = row
// 2). Sums over channels and columns of the kernel are formed of m, and y once at the end. So a
// thread sums one of the four products, for pairs of output rows; everything else is stage 4's.
//
// Cost, 3x7: 4/6 of stage 4's FMAs; for one channel a thread reads two windows of 26 inputs, adds
// them (26 FMAs), reads 7 x 8 weights, and does 1120 FMAs: 40 per load.
//
// What it costs otherwise: a term like d2 g0 is in m0 and cancels again. Where a row of inputs is
// much larger than the others, and the kernel's row that it meets much smaller, this is seen.
//
// Left to stage 4: few input channels, where what cancels is seen; few output channels, which would
// fill half a block; an odd number of rows without padding, see below; and every problem that is
// not 3x7 with stride and dilation 1.

#include <cfloat>

#include "register_blocked.cu"

namespace f23 {

constexpr int KH = 3, KW = 7, TAPS = KH * KW;
constexpr int PRODUCTS = 4;   // m0 to m3, for two rows of outputs
constexpr int THREAD_W = 20;  // neighbouring pixels of a thread, in a pair of rows
constexpr int THREAD_CO = 8;  // output channels of a thread
constexpr int WARPS_W = 2, WARPS_CO = 4;
constexpr int THREADS = 32 * WARPS_W * WARPS_CO;
constexpr int LANES_W = 32 / PRODUCTS;  // a warp's lanes are 8 stretches of pixels times 4 products
constexpr int WARP_W = LANES_W * THREAD_W;
constexpr int BLOCK_W = WARP_W * WARPS_W;
constexpr int BLOCK_CO = THREAD_CO * WARPS_CO;
constexpr int WINDOW = THREAD_W + KW - 1;  // inputs for a row of taps
constexpr int FEWEST_CO = 17;              // of a group; with fewer, stage 4 has smaller blocks
constexpr int FEWEST_CI = 8;               // of a group; with fewer, stage 4 is the more exact
constexpr int CHUNK_CI = 4;
constexpr int SHARED_BYTES = 96 * 1024;
// The weights of one product, and 8 words that put the products of two lanes into different banks.
constexpr int PRODUCT_WEIGHTS = KW * BLOCK_CO + 8;
constexpr int WEIGHTS = PRODUCTS * PRODUCT_WEIGHTS;  // of one input channel
static_assert(KW * BLOCK_CO <= THREADS, "a thread transforms the weights of one column");
static_assert(THREAD_W % 8 == 4, "an odd number of 16-byte words from lane to lane");
static_assert(WINDOW % 4 == 2, "vectors, and a pair at the end");
static_assert(WARP_W % 32 == 0, "the lanes write rows of the warp's tile");

template <int VECTOR>
__global__ void __launch_bounds__(THREADS, 1)
    winograd_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                    const float* __restrict__ bias, float* __restrict__ output,
                    ConvTransposeProblem p, FlatTiles tiles) {
  // A block is one tile of one image, for BLOCK_CO channels of one group. Rows of the flat axis are
  // pairs of output rows.
  unsigned digits = blockIdx.x;
  const int first_co = take_digit(digits, tiles.count_co) * BLOCK_CO;  // within the group
  const int group = take_digit(digits, p.groups);
  const int64_t first =
      static_cast<int64_t>(take_digit(digits, tiles.count)) * BLOCK_W - flat_lead(p);
  const int n = digits;  // the axis's first image

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_w = warp / WARPS_CO, warp_co = warp % WARPS_CO;
  const int product = lane / LANES_W, lane_w = lane % LANES_W;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const int64_t image_size = p.in_channels * plane_size;
  const float* const planes = input + n * image_size + group * group_in * plane_size;
  const int64_t filters_size = static_cast<int64_t>(group_out) * TAPS;  // of one input channel
  const float* const filters = weight + group * group_in * filters_size + first_co * TAPS;

  // Two buffers of [chunk_ci, 2, span] inputs (first the upper rows of the pairs, then the lower
  // ones) and [chunk_ci, PRODUCTS, KW, BLOCK_CO] transformed weights; then where in its plane each
  // vector of inputs lies, or -1 for zeros.
  extern __shared__ __align__(16) float shared[];
  const int pitch = tiles.pitch, span = tiles.span, vectors = 2 * span / VECTOR;
  const int weights_at = tiles.chunk_ci * 2 * span;
  const int buffer_floats = weights_at + tiles.chunk_ci * WEIGHTS;
  int* const places = reinterpret_cast<int*>(shared + 2 * buffer_floats);

  // Each thread transforms one column of one filter.
  const int column_co = threadIdx.x % BLOCK_CO, column_kw = threadIdx.x / BLOCK_CO;
  const bool has_column = column_kw < KW && first_co + column_co < group_out;
  const auto load_column = [](float (&g)[KH], const float* from, bool is_wanted) {
#pragma unroll
    for (int i = 0; i < KH; ++i) g[i] = is_wanted ? from[(KH - 1 - i) * KW] : 0.0f;
  };
  const auto store_column = [](float* to, const float (&g)[KH]) {
    const float even = 0.5f * (g[0] + g[2]);
    to[0 * PRODUCT_WEIGHTS] = g[0];
    to[1 * PRODUCT_WEIGHTS] = fmaf(0.5f, g[1], even);
    to[2 * PRODUCT_WEIGHTS] = fmaf(-0.5f, g[1], even);
    to[3 * PRODUCT_WEIGHTS] = g[2];
  };
  const float* from_w = filters + column_co * TAPS + column_kw;  // what is loaded next

  // Pair r is the output rows 2 r - 1 and 2 r: the first and the last row of outputs, which may
  // have but one row of taps, are then exact products of d3 or d0. Inputs d2 and d3 of the pair are
  // rows 2 r - 1 + padding and the next, d0 and d1 those of the pair before.
  const Pixel corner = flat_pixel(first + p.padding_w - (KW - 1) - pitch, pitch);
  const auto row_of_pair = [&](int pair) { return 2 * pair - 1 + p.padding_h; };
  // A row's image and pair: one behind an image's last pair is the one before the next's first.
  const int pairs = p.out_height / 2 + 1;
  const auto with_next_image = [&](Pixel pair) {
    return pair.column < pairs ? pair : Pixel{pair.row + 1, -1};
  };
  const Pixel first_row = flat_pixel(corner.row, tiles.rows);
  const Pixel from = with_next_image(first_row);
  const float* const corner_row =
      planes + from.row * image_size + static_cast<int64_t>(row_of_pair(from.column)) * p.width;
  for (int v = threadIdx.x; v < max(vectors, 2 * THREADS); v += THREADS) {
    const int is_lower = v * VECTOR >= span;
    const Pixel at = flat_pixel(corner, v * VECTOR - is_lower * span, pitch);
    const Pixel pair = with_next_image(flat_pixel(first_row, at.row - corner.row, tiles.rows));
    const int h = row_of_pair(pair.column) + is_lower;
    const bool exists = v < vectors;
    const bool inside = exists && pair.row >= 0 && pair.row < tiles.images && h >= 0 &&
                        h < p.height && at.column < p.width;
    places[v] = inside ? static_cast<int>((pair.row - from.row) * image_size) +
                             (h - row_of_pair(from.column)) * p.width + at.column
                       : -1;
    if (!exists || inside) continue;
    for (int c = 0; c < 2 * tiles.chunk_ci; ++c) {
      const int buffer = c / tiles.chunk_ci, channel = c % tiles.chunk_ci;
      clear_inputs<VECTOR>(shared + buffer * buffer_floats + channel * 2 * span + v * VECTOR);
    }
  }

  // A thread finds only its own entries in `places`: no barrier is needed.
  const int* const places_of_thread = places + threadIdx.x;
  const auto copy_vector = [](float* to, const float* from, int place, bool is_wanted) {
    if (is_wanted && place >= 0) copy_inputs<VECTOR>(to, from + place);
  };
  const float* from_x = corner_row;  // what is copied next
  for (int c = 0; c < min(tiles.chunk_ci, group_in); ++c) {
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
      copy_vector(shared + c * 2 * span + v * VECTOR, from_x, places[v], true);
    }
    from_x += plane_size;
  }
  float first_columns[CHUNK_CI][KH];
#pragma unroll
  for (int c = 0; c < CHUNK_CI; ++c) {
    load_column(first_columns[c], from_w + c * filters_size,
                has_column && c < min(tiles.chunk_ci, group_in));
  }
  from_w += tiles.chunk_ci * filters_size;
#pragma unroll
  for (int c = 0; c < CHUNK_CI; ++c) {
    float* const to = shared + weights_at + c * WEIGHTS + threadIdx.x;
    if (column_kw >= KW || c >= tiles.chunk_ci) continue;
    store_column(to, first_columns[c]);
    // Channels that the group does not have stay zero in the other buffer too.
    if (!has_column) store_column(to + buffer_floats, first_columns[c]);
  }
  __pipeline_commit();

  // This lane's product needs d_a + sign * d_b.
  const int upper = 0, lower = span;  // of the pair before; the pair's own are a pitch further
  const int a = product == 0 ? upper : product == 2 ? upper + pitch : lower;
  const int b = product == 3 ? lower + pitch : product == 2 ? lower : upper + pitch;
  const float sign = product == 1 ? 1.0f : -1.0f;

  float sum[THREAD_CO][THREAD_W] = {};

  // Two buffers: while one chunk of channels is used, the next is copied and transformed.
  float *current = shared, *next = shared + buffer_floats;
  for (int ci = 0; ci < group_in; ci += tiles.chunk_ci) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this chunk has arrived, and nobody uses the other buffer any more
    const int count = min(tiles.chunk_ci, group_in - ci);
    const int next_count = min(tiles.chunk_ci, group_in - ci - tiles.chunk_ci);
    if (vectors > 2 * THREADS) {  // wide images: what does not go with the taps below
      for (int c = 0; c < next_count; ++c) {
        for (int v = 2 * THREADS + threadIdx.x; v < vectors; v += THREADS) {
          copy_vector(next + c * 2 * span + v * VECTOR, from_x + c * plane_size, places[v], true);
        }
      }
    }
    const float* x_a = current + warp_w * WARP_W + lane_w * THREAD_W + a;
    const float* x_b = x_a - a + b;
    const float* w = current + weights_at + product * PRODUCT_WEIGHTS + warp_co * THREAD_CO;
    float *to_x = next + threadIdx.x * VECTOR, *to_w = next + weights_at + threadIdx.x;
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      const bool copies = c < next_count, transforms = copies && has_column;
      float window[WINDOW];
#pragma unroll
      for (int j = 0; j < WINDOW; j += 4) {
        float other[4];
        load_part(window + j, x_a, j, WINDOW);
        load_part(other, x_b, j, WINDOW);
#pragma unroll
        for (int i = 0; i < 4 && j + i < WINDOW; ++i) {
          window[j + i] = fmaf(sign, other[i], window[j + i]);
        }
      }
      int place = places_of_thread[0];
      float g[KH];
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
        // Copies go between the taps, where nothing waits for them. The weights are loaded behind
        // the first: where ptxas gives them the barrier of a window's load, a wait for one is for
        // both.
        if (kw < 2) copy_vector(to_x + kw * THREADS * VECTOR, from_x, place, copies);
        if (kw == 0) {
          place = places_of_thread[THREADS];
          load_column(g, from_w, transforms);
        }
        if (kw == KW - 1 && transforms) store_column(to_w, g);
      }
      x_a += 2 * span;
      x_b += 2 * span;
      w += WEIGHTS;
      to_x += 2 * span;
      to_w += WEIGHTS;
      from_x += plane_size;
      from_w += filters_size;
    }
    __pipeline_commit();
    float* const used = current;
    current = next;
    next = used;
  }
  __syncthreads();

  // Each warp brings its four products together in shared memory, a channel at a time, and writes
  // rows of neighbouring pixels.
  float* const stage = shared + warp * PRODUCTS * WARP_W;
  const int thread_co = first_co + warp_co * THREAD_CO;  // within the group
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t out_image = p.out_channels * out_plane;
  const Pixel start = flat_pixel(first + warp_w * WARP_W, pitch);
  const Pixel start_pair = flat_pixel(start.row, tiles.rows);  // its image and pair
  float* const image = output + (n + start_pair.row) * out_image +
                       (group * group_out + thread_co) * out_plane +
                       2 * static_cast<int64_t>(start_pair.column) * p.out_width;
  int to[WARP_W / 32];  // where this lane writes a pair's lower row, from `image`
  bool has_upper[WARP_W / 32], has_lower[WARP_W / 32];
#pragma unroll
  for (int i = 0; i < WARP_W / 32; ++i) {
    const Pixel at = flat_pixel(start, i * 32 + lane, pitch);
    const Pixel pair = flat_pixel(start_pair, at.row - start.row, tiles.rows);
    to[i] = static_cast<int>((pair.row - start_pair.row) * out_image) +
            2 * (pair.column - start_pair.column) * p.out_width + at.column;
    const bool inside = pair.row >= 0 && pair.row < tiles.images && at.column < p.out_width;
    has_upper[i] = inside && pair.column > 0 && 2 * pair.column - 1 < p.out_height;
    has_lower[i] = inside && 2 * pair.column < p.out_height;
  }
  bool is_not_finite = false;
#pragma unroll
  for (int q = 0; q < THREAD_CO; ++q) {
    if (thread_co + q >= group_out) break;
    const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + q];
#pragma unroll
    for (int j = 0; j < THREAD_W; j += 4) {
      store_vector(stage + product * WARP_W + lane_w * THREAD_W + j, sum[q] + j);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WARP_W / 32; ++i) {
      if (!has_upper[i] && !has_lower[i]) continue;
      const float* const m = stage + i * 32 + lane;
      const float m0 = m[0], m1 = m[WARP_W], m2 = m[2 * WARP_W], m3 = m[3 * WARP_W];
      const float y0 = m0 + m1 + m2 + shift, y1 = m1 - m2 - m3 + shift;
      float* const y = image + q * out_plane + to[i];
      if (has_upper[i]) y[-p.out_width] = y0;
      if (has_lower[i]) y[0] = y1;
      is_not_finite |= !(fabsf(y0) <= FLT_MAX && fabsf(y1) <= FLT_MAX);
    }
    __syncwarp();
  }
  if (!is_not_finite) return;

  // Products of sums: infinities may cancel to NaN, and a sum of inputs may overflow, where the
  // definition gives a number. Such outputs are summed again, tap by tap.
  const Axis rows = unit_axis(p.height, p.out_height, KH, p.padding_h);
  const Axis columns = unit_axis(p.width, p.out_width, KW, p.padding_w);
  for (int q = 0; q < THREAD_CO && thread_co + q < group_out; ++q) {
    const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + q];
    const float* const filter = filters + (warp_co * THREAD_CO + q) * TAPS;
    for (int i = lane; i < WARP_W; i += 32) {
      const Pixel at = flat_pixel(start, i, pitch);
      const Pixel pair = flat_pixel(start_pair, at.row - start.row, tiles.rows);
      if (pair.row < 0 || pair.row >= tiles.images || at.column >= p.out_width) continue;
      float* const y_image = image + (pair.row - start_pair.row) * out_image + q * out_plane;
      const float* const x_image = planes + pair.row * image_size;
      for (int oh = max(2 * pair.column - 1, 0); oh < min(2 * pair.column + 1, p.out_height);
           ++oh) {
        float& y = y_image[(oh - 2 * start_pair.column) * p.out_width + at.column];
        if (fabsf(y) <= FLT_MAX) continue;
        y = sum_of_taps(x_image, filter, p, rows, columns, oh, at.column) + shift;
      }
    }
  }
}

// Fills `tiles`; false if the problem is for stage 4.
static bool plan(const ConvTransposeProblem& p, int vector, FlatTiles& tiles,
                 std::size_t& shared_bytes) {
  const int64_t pitch = flat_pitch(p), group_in = p.in_channels / p.groups;
  if (!is_3x7(p) || group_in < FEWEST_CI || p.out_channels / p.groups < FEWEST_CO) return false;
  if (p.padding_h == 0 && p.out_height % 2 != 0) return false;  // the last row is not exact
  const int64_t span = BLOCK_W + ceil_div(KW - 1, 4) * 4 + pitch;
  const int64_t places = max(2 * span / vector, static_cast<int64_t>(2) * THREADS);
  const int64_t room = shared_floats(SHARED_BYTES) - places;
  const int64_t chunk_ci =
      min(min(room / 2 / (2 * span + WEIGHTS), static_cast<int64_t>(CHUNK_CI)), group_in);
  if (chunk_ci < 1) return false;
  // The pair before an image's first may be the last of the image before, if both are zeros.
  const int pairs = p.out_height / 2 + 1;
  const bool is_shared = p.padding_h <= 1 && 2 * (pairs - 1) - 1 + p.padding_h >= p.height;
  const int pair_rows = pairs + !is_shared;
  const int images = images_of_axis(p, span, pair_rows, pitch);
  const int64_t count = ceil_div(images * pair_rows * pitch + flat_lead(p), BLOCK_W);
  const int64_t count_co = ceil_div(p.out_channels / p.groups, BLOCK_CO);
  const int64_t blocks = count * count_co * p.groups * (p.batch / images);
  if (blocks > INT32_MAX) return false;
  tiles = {static_cast<int>(pitch),
           images,
           pair_rows,
           static_cast<int>(count),
           static_cast<int>(count_co),
           static_cast<int>(span),
           static_cast<int>(chunk_ci)};
  const int64_t floats = 2 * chunk_ci * (2 * span + WEIGHTS) + places;
  shared_bytes = max(floats, static_cast<int64_t>(THREADS) * THREAD_W) * sizeof(float);
  return true;
}

template <int VECTOR>
static cudaError_t launch(const float* input, const float* weight, const float* bias, float* output,
                          const ConvTransposeProblem& p, const FlatTiles& tiles,
                          std::size_t shared_bytes, cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes(winograd_kernel<VECTOR>, shared_bytes);
  if (error != cudaSuccess) return error;
  const int blocks = p.batch / tiles.images * p.groups * tiles.count * tiles.count_co;
  winograd_kernel<VECTOR>
      <<<blocks, THREADS, shared_bytes, stream>>>(input, weight, bias, output, p, tiles);
  return cudaGetLastError();
}

}  // namespace f23

extern "C" cudaError_t winograd(const float* input, const float* weight, const float* bias,
                                float* output, ConvTransposeProblem p, cudaStream_t stream) {
  FlatTiles tiles;
  std::size_t shared_bytes;
  const bool aligned = has_aligned_rows(input, p);
  if (!f23::plan(p, aligned ? 4 : 1, tiles, shared_bytes)) {
    return register_blocked(input, weight, bias, output, p, stream);
  }
  const auto launch = aligned ? f23::launch<4> : f23::launch<1>;
  return launch(input, weight, bias, output, p, tiles, shared_bytes, stream);
}

// Which of the kernels runs for a problem whose input is aligned.
extern "C" const char* winograd_variant(ConvTransposeProblem p) {
  FlatTiles tiles;
  std::size_t shared_bytes;
  const bool is_f23 = f23::plan(p, p.width % 4 == 0 ? 4 : 1, tiles, shared_bytes);
  return is_f23 ? "F(2, 3)" : register_blocked_variant(p);
}
