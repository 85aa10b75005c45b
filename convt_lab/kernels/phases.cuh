// Register blocking for any problem: what the stages from register_blocked on do where they have
// nothing better.
//
// Along each axis the outputs are sorted into phases: those whose positions are alike modulo
// stride / g * dilation, g being their greatest common divisor. A phase is a problem of its own
// with stride and dilation 1, on every i_step-th input with every k_step-th tap (see problem.cuh),
// and a block computes a tile of one phase. Rows of all images are laid end to end on one flat axis
// (flat.cuh), with rows of zeros from image to image, so that small images fill tiles as well.
//
// A thread owns THREAD_W neighbouring pixels of THREAD_CO output channels. How many taps a row of
// the phase has is not known to the compiler, so they are taken SEGMENT at a time, behind the one
// shorter segment that may be left over.
//
// Cost: a segment of 4 taps takes a window of 16 inputs and 4 x 8 weights, 12 loads of 16 bytes,
// and is 4 * 12 * 8 = 384 FMAs: 32 a load.

#pragma once

#include <cfloat>

#include "flat.cuh"
#include "phase.cuh"

namespace phases {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int THREAD_CO = 8;             // output channels of a thread
constexpr int SEGMENT = 4;               // taps of a row at a time: their inputs are whole vectors
constexpr int CHUNK_TAPS = 84;           // of all channels in shared memory, if they fit
constexpr int CHUNK_CI = 32;             // channels in shared memory, at most
constexpr int SHARED_BYTES = 48 * 1024;  // a block's share if three are to run on an SM
constexpr int MAX_PERIOD = 512;          // phases of an axis
constexpr int NOWHERE = INT32_MIN;       // no offset
constexpr int MAX_STRIPES = 16;
// For choosing among ways to cut a problem, in instructions of a thread: a copy of a vector and
// what surrounds it, and the wait for a chunk.
constexpr double COST_OF_COPY = 14.0, COST_OF_CHUNK = 200.0;

// How a block of four warps is made up: WARPS_CO of them side by side in the output channels, the
// others in the pixels. Few channels need few.
template <int WARPS_CO_, int THREAD_W_>
struct Sizes {
  static constexpr int WARPS_CO = WARPS_CO_;
  static constexpr int THREAD_W = THREAD_W_;    // neighbouring pixels of a thread
  static constexpr int WARP_W = 32 * THREAD_W;  // pixels of a warp, one stretch
  static constexpr int BLOCK_W = WARP_W * (WARPS / WARPS_CO);
  static constexpr int BLOCK_CO = THREAD_CO * WARPS_CO;
  static constexpr int COPIED_TAPS = THREADS / BLOCK_CO;  // by all threads together
  static_assert(COPIED_TAPS >= SEGMENT, "one copy for each segment is enough");
  static constexpr int BLOCKS_PER_SM = 3;
  static constexpr int COST_OF_TAP = THREAD_W * THREAD_CO + 24;
  // 8 lanes read 16 bytes each, THREAD_W words apart: all banks once.
  static_assert(THREAD_W % 8 == 4, "an odd number of 16-byte words from lane to lane");
};

// What all phases fit into.
struct Tiling {
  int phases_h, phases_w;
  int images;           // on one flat axis: all, or one
  int stripes, stripe;  // of an image, side by side, and how many pixels of a row each has
  int rows, pitch;      // of a stripe on the flat axis
  int halo;             // columns at a row's end that are inputs left of the next row
  int count, count_co;  // tiles of the axis, and along a group's output channels
  int chunk_ci;         // channels that a tile brings into shared memory at once
  int vector;           // inputs that are copied at once
};

// A place in a stripe's rows.
struct Place {
  int stripe;  // of all images
  int row, column;
};

// The place `offset` >= 0 behind `from`, whose row and column are inside.
__device__ __forceinline__ Place place_behind(const Place& from, int offset, const Tiling& tiles) {
  const unsigned column = from.column + offset;
  const unsigned row = from.row + column / tiles.pitch;
  return {from.stripe + static_cast<int>(row / tiles.rows), static_cast<int>(row % tiles.rows),
          static_cast<int>(column % tiles.pitch)};
}

__device__ __forceinline__ Place place_at(int64_t position, const Tiling& tiles) {
  const Pixel pixel = flat_pixel(position, tiles.pitch);
  const Pixel row = flat_pixel(pixel.row, tiles.rows);
  return {row.row, row.column, pixel.column};
}

// A place of an image; there is none before the first image or behind the last.
struct Position {
  int image, row, column;
};

__device__ __forceinline__ Position position_of(const Place& at, const Tiling& tiles) {
  int image = at.stripe >= 0 ? at.stripe : -1;
  if (tiles.stripes > 1 && image > 0) image /= tiles.stripes;
  return {image, at.row, at.column + (at.stripe - image * tiles.stripes) * tiles.stripe};
}

// What a block computes, in shared memory: registers are for sums.
struct Tile {
  Phase along_h, along_w;
  int first_co, group;  // the first output channel, within the group
  int n;                // the flat axis's first image
  int64_t first;        // the first pixel, on the flat axis
  int channels, taps;   // of the input, and of the phase
  int pitch;            // from row to row
  int span, vectors;    // inputs of one channel, and in how many pieces of `vector` they are copied
  int vector;
  int weights_at;        // behind the inputs of a chunk
  int buffer_floats;     // of a chunk
  int64_t plane_size;    // from one input channel to the next,
  int64_t filters_size;  // and from its weights to those of the next
};

__device__ __forceinline__ void copy_input(float* to, const float* plane, int place, bool is_wanted,
                                           int vector) {
  const float* const from = plane + place;
  if (is_wanted && place != NOWHERE && vector == 4) copy_inputs<4>(to, from);
  if (is_wanted && place != NOWHERE && vector != 4) copy_inputs<1>(to, from);
}

// Copies the next chunk into shared memory, a little at a time, between the FMAs of this one. Lanes
// copy neighbouring inputs and neighbouring output channels.
template <class S>
struct Copier {
  const float *from_x, *from_w;  // the next channel's inputs; the chunk's first weights
  float *to_x, *to_w;
  const int* places;      // where this thread's vectors of inputs lie
  const int* tap_places;  // and its next weight
  const Tile& tile;
  int channels_left, taps_left;

  __device__ __forceinline__ void begin(int channels, float* x, float* w, const int* first_tap,
                                        int taps) {
    to_x = x;
    to_w = w;
    tap_places = first_tap;
    channels_left = channels;
    taps_left = taps;
  }
  // Inputs of one channel: a thread's first two vectors, which most tiles have no more of.
  __device__ __forceinline__ void copy_channel() {
    const bool is_wanted = channels_left > 0;
    copy_input(to_x, from_x, places[0], is_wanted, tile.vector);
    copy_input(to_x + THREADS * tile.vector, from_x, places[THREADS], is_wanted, tile.vector);
    from_x += tile.plane_size;
    to_x += tile.span;
    --channels_left;
  }
  // Of SEGMENT taps for BLOCK_CO channels each thread copies one weight at most.
  __device__ __forceinline__ int next_tap() const { return taps_left > 0 ? *tap_places : NOWHERE; }
  __device__ __forceinline__ void copy_weight(int place) {
    if (place != NOWHERE) copy_inputs<1>(to_w, from_w + place);
    to_w += THREADS;
    tap_places += S::COPIED_TAPS;
    taps_left -= S::COPIED_TAPS;
  }
};

// FMAs of TAPS neighbouring taps of a row, the first of which meets the last of the inputs.
template <class S, int TAPS>
__device__ __forceinline__ void add_taps(float (&sum)[THREAD_CO][S::THREAD_W], const float* x,
                                         const float* w) {
  constexpr int WINDOW = TAPS == 1 ? S::THREAD_W : S::THREAD_W + SEGMENT;
  float window[WINDOW];
#pragma unroll
  for (int j = 0; j < WINDOW; j += 4) load_vector(window + j, x + j);
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    float weights[THREAD_CO];
#pragma unroll
    for (int q = 0; q < THREAD_CO; q += 4) load_vector(weights + q, w + t * S::BLOCK_CO + q);
#pragma unroll
    for (int q = 0; q < THREAD_CO; ++q) {
#pragma unroll
      for (int j = 0; j < S::THREAD_W; ++j) {
        sum[q][j] = fmaf(window[j + TAPS - 1 - t], weights[q], sum[q][j]);
      }
    }
  }
}

// All rows of taps of some channels, TAPS in each.
template <class S, int TAPS>
__device__ __forceinline__ void add_rows(float (&sum)[THREAD_CO][S::THREAD_W], const float* x,
                                         const float* w, int channels, int taps_h,
                                         Copier<S>& copier) {
#pragma unroll 1
  for (int c = 0; c < channels; ++c) {
    copier.copy_channel();
    const float* from = x;
#pragma unroll 1
    for (int row = 0; row < taps_h; ++row) {
      const int place = copier.next_tap();
      add_taps<S, TAPS>(sum, from, w);
      copier.copy_weight(place);
      from -= copier.tile.pitch;
      w += TAPS * S::BLOCK_CO;
    }
    x += copier.tile.span;
  }
}

// The same for rows of any number of taps.
template <class S>
__device__ __forceinline__ void add_long_rows(float (&sum)[THREAD_CO][S::THREAD_W], const float* x,
                                              const float* w, int channels, int taps_h, int taps_w,
                                              Copier<S>& copier) {
  const int segments = taps_w / SEGMENT, left_over = taps_w % SEGMENT;
#pragma unroll 1
  for (int c = 0; c < channels; ++c) {
    copier.copy_channel();
    const float* first = x + segments * SEGMENT;
#pragma unroll 1
    for (int row = 0; row < taps_h; ++row) {
      if (left_over > 0) {
        const int place = copier.next_tap();
        if (left_over == 1) add_taps<S, 1>(sum, first, w);
        if (left_over == 2) add_taps<S, 2>(sum, first, w);
        if (left_over == 3) add_taps<S, 3>(sum, first, w);
        copier.copy_weight(place);
        w += left_over * S::BLOCK_CO;
      }
      const float* from = first;
#pragma unroll 1
      for (int segment = 0; segment < segments; ++segment) {
        const int place = copier.next_tap();
        from -= SEGMENT;
        add_taps<S, SEGMENT>(sum, from, w);
        copier.copy_weight(place);
        w += SEGMENT * S::BLOCK_CO;
      }
      first -= copier.tile.pitch;
    }
    x += copier.tile.span;
  }
}

// And for very few taps, ROWS x TAPS: SEGMENT of them at a time, of several channels.
template <class S, int ROWS, int TAPS>
__device__ __forceinline__ void add_channels(float (&sum)[THREAD_CO][S::THREAD_W], const float* x,
                                             const float* w, int channels, Copier<S>& copier) {
  constexpr int CHANNELS = SEGMENT / (ROWS * TAPS);
  int c = 0;
#pragma unroll 1
  for (; c + CHANNELS <= channels; c += CHANNELS) {
    const int place = copier.next_tap();
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      copier.copy_channel();
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        add_taps<S, TAPS>(sum, x - row * copier.tile.pitch, w);
        w += TAPS * S::BLOCK_CO;
      }
      x += copier.tile.span;
    }
    copier.copy_weight(place);
  }
  add_rows<S, TAPS>(sum, x, w, channels - c, ROWS, copier);
}

template <class S>
__device__ __forceinline__ Tile tile_of_block(unsigned digits, const ConvTransposeProblem& p,
                                              const Axis& rows, const Axis& columns,
                                              const Tiling& tiles) {
  Tile tile;
  tile.first_co = take_digit(digits, tiles.count_co) * S::BLOCK_CO;
  tile.along_w = phase_of(columns, take_digit(digits, tiles.phases_w));
  tile.along_h = phase_of(rows, take_digit(digits, tiles.phases_h));
  tile.group = take_digit(digits, p.groups);
  // So many pixels early that the first input is aligned.
  const int lead = (tile.along_w.start - (tile.along_w.taps - 1)) & 3;
  tile.first = static_cast<int64_t>(take_digit(digits, tiles.count)) * S::BLOCK_W - lead;
  tile.n = digits;
  tile.taps = tile.along_h.taps * tile.along_w.taps;
  tile.channels = tile.taps > 0 ? p.in_channels / p.groups : 0;
  tile.pitch = tiles.pitch;
  tile.span =
      S::BLOCK_W + (tile.along_w.taps + 3) / 4 * 4 + max(tile.along_h.taps - 1, 0) * tiles.pitch;
  tile.vector = tiles.vector;
  tile.vectors = tile.span / tiles.vector;
  tile.weights_at = tiles.chunk_ci * tile.span;
  tile.buffer_floats = tile.weights_at + tiles.chunk_ci * tile.taps * S::BLOCK_CO;
  tile.plane_size = static_cast<int64_t>(p.height) * p.width;
  tile.filters_size = static_cast<int64_t>(p.out_channels / p.groups) * p.kernel_h * p.kernel_w;
  return tile;
}

// Writes a tile's sums. A thread holds THREAD_W neighbouring pixels; written directly, the lanes of
// a warp would touch 32 places far apart. Each warp turns its stretch around in shared memory, a
// channel at a time, and writes neighbouring pixels.
template <class S>
__device__ __forceinline__ void finish_tile(
    const float (&sum)[THREAD_CO][S::THREAD_W], float* shared, const Tile& tile,
    const float* __restrict__ input, const float* __restrict__ weight,
    const float* __restrict__ bias, float* __restrict__ output, const ConvTransposeProblem& p,
    const Axis& rows, const Axis& columns, const Tiling& tiles) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_w = warp / S::WARPS_CO, warp_co = warp % S::WARPS_CO;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const Phase &along_h = tile.along_h, &along_w = tile.along_w;
  float* const stage = shared + warp * S::WARP_W;
  const int thread_co = tile.first_co + warp_co * THREAD_CO;  // within the group
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t out_image = p.out_channels * out_plane;
  const int out_row = period_of(rows) * p.out_width;
  const Place start = place_at(tile.first + warp_w * S::WARP_W, tiles);
  const Position first = position_of(start, tiles);
  float* const image = output + (tile.n + first.image) * out_image +
                       (tile.group * group_out + thread_co) * out_plane +
                       static_cast<int64_t>(first.row) * out_row +
                       static_cast<int64_t>(along_h.first) * p.out_width + along_w.first;
  const auto is_inside = [&](const Place& place, const Position& at) {
    return at.image >= 0 && at.image < tiles.images && at.row < along_h.count &&
           place.column < tiles.stripe && at.column < along_w.count;
  };
  const auto offset_of = [&](const Position& at) {
    return static_cast<int>((at.image - first.image) * out_image) + (at.row - first.row) * out_row +
           at.column * period_of(columns);
  };
  Place place = place_behind(start, lane, tiles);
  int to[S::THREAD_W];  // where this lane writes, from `image`
#pragma unroll
  for (int i = 0; i < S::THREAD_W; ++i) {
    const Position at = position_of(place, tiles);
    to[i] = is_inside(place, at) ? offset_of(at) : NOWHERE;
    for (place.column += 32; place.column >= tiles.pitch; place.column -= tiles.pitch) {
      if (++place.row < tiles.rows) continue;
      place.row = 0;
      ++place.stripe;
    }
  }
  bool not_a_number = false;
#pragma unroll
  for (int q = 0; q < THREAD_CO; ++q) {
    if (thread_co + q >= group_out) break;
    const float shift = bias == nullptr ? -0.0f : bias[tile.group * group_out + thread_co + q];
#pragma unroll
    for (int j = 0; j < S::THREAD_W; j += 4)
      store_vector(stage + lane * S::THREAD_W + j, sum[q] + j);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S::THREAD_W; ++i) {
      if (to[i] == NOWHERE) continue;
      const float value = stage[i * 32 + lane] + shift;
      not_a_number |= value != value;
      image[q * out_plane + to[i]] = value;
    }
    __syncwarp();
  }
  if (!not_a_number) return;

  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const int64_t filter_size = static_cast<int64_t>(p.kernel_h) * p.kernel_w;
  const int64_t first_ci = static_cast<int64_t>(tile.group) * group_in;
  const float* const planes =
      input + (static_cast<int64_t>(tile.n) * p.in_channels + first_ci) * plane_size;
  const float* const filters = weight + (first_ci * group_out + thread_co) * filter_size;
  // Beyond the image's edge the tile holds zeros, and zero times an infinite or NaN weight is NaN,
  // where the definition has no product at all. Such outputs are summed again, without the zeros.
  for (int q = 0; q < THREAD_CO && thread_co + q < group_out; ++q) {
    const float shift = bias == nullptr ? -0.0f : bias[tile.group * group_out + thread_co + q];
    for (int i = 0; i < S::THREAD_W; ++i) {
      const Place place = place_behind(start, i * 32 + lane, tiles);
      const Position at = position_of(place, tiles);
      if (!is_inside(place, at)) continue;
      float& y = image[q * out_plane + offset_of(at)];
      const int oh = along_h.first + at.row * period_of(rows);
      const int ow = along_w.first + at.column * period_of(columns);
      const bool whole = taps_reaching(rows, oh).count == along_h.taps &&
                         taps_reaching(columns, ow).count == along_w.taps;
      if (whole || y == y) continue;
      const float* const filter = filters + q * filter_size;
      y = sum_of_taps(planes + at.image * p.in_channels * plane_size, filter, p, rows, columns, oh,
                      ow) +
          shift;
    }
  }
}

template <int WARPS_CO, int THREAD_W>
__global__ void __launch_bounds__(THREADS, Sizes<WARPS_CO, THREAD_W>::BLOCKS_PER_SM)
    register_blocked_phases_kernel(const float* __restrict__ input,
                                   const float* __restrict__ weight, const float* __restrict__ bias,
                                   float* __restrict__ output, ConvTransposeProblem p, Axis rows,
                                   Axis columns, Tiling tiles) {
  using S = Sizes<WARPS_CO, THREAD_W>;
  constexpr int BLOCK_CO = S::BLOCK_CO, WARP_W = S::WARP_W;

  // A block is one tile of one phase, for BLOCK_CO channels of one group. Blocks that share inputs
  // are neighbours. What is only needed again at the end waits in shared memory, not in registers.
  __shared__ Tile tile;
  if (threadIdx.x == 0) tile = tile_of_block<S>(blockIdx.x, p, rows, columns, tiles);
  __syncthreads();
  const int first_co = tile.first_co, group = tile.group;
  const Phase along_h = tile.along_h, along_w = tile.along_w;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_w = warp / WARPS_CO, warp_co = warp % WARPS_CO;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const int64_t image_size = p.in_channels * plane_size;
  const float* const planes = input + tile.n * image_size + group * group_in * plane_size;
  const int64_t filter_size = static_cast<int64_t>(p.kernel_h) * p.kernel_w;
  const int64_t filters_size = group_out * filter_size;  // of one input channel
  const float* const filters = weight + group * group_in * filters_size + first_co * filter_size;

  // Two buffers of [chunk_ci, span] inputs and [chunk_ci, taps, BLOCK_CO] weights; then where each
  // tap of a chunk lies, from the chunk's first filter; then where each vector of inputs lies in
  // its plane, or NOWHERE, for the same number of vectors for each thread.
  extern __shared__ __align__(16) float shared[];
  const int pitch = tile.pitch, taps = tile.taps;
  const int span = tile.span;
  const int vectors = tile.vectors;
  const int weights_at = tile.weights_at;
  const int buffer_floats = tile.buffer_floats;
  int* const tap_places = reinterpret_cast<int*>(shared + 2 * buffer_floats);
  int* const places = tap_places + tiles.chunk_ci * taps;

  // The first input belongs to the first pixel's last tap.
  const Place corner =
      place_at(tile.first + along_w.start - (along_w.taps - 1) +
                   static_cast<int64_t>(along_h.start - (along_h.taps - 1)) * pitch + tiles.halo,
               tiles);
  const Position from = position_of(corner, tiles);
  const int row_step = rows.i_step * p.width;
  const float* const corner_row = planes + from.image * image_size +
                                  static_cast<int64_t>(from.row) * row_step +
                                  static_cast<int64_t>(along_h.residue) * p.width + along_w.residue;
  for (int v = threadIdx.x; v < max(vectors, 2 * THREADS); v += THREADS) {
    const Position at = position_of(place_behind(corner, v * tiles.vector, tiles), tiles);
    const int column = at.column - tiles.halo;
    const bool inside = v < vectors && at.image >= 0 && at.image < tiles.images &&
                        at.row < along_h.size && column >= 0 && column < along_w.size;
    places[v] = inside ? static_cast<int>((at.image - from.image) * image_size) +
                             (at.row - from.row) * row_step + column * columns.i_step
                       : NOWHERE;
    if (inside || v >= vectors) continue;
    for (int c = 0; c < 2 * tiles.chunk_ci; ++c) {
      const int buffer = c / tiles.chunk_ci;
      float* const to = shared + buffer * buffer_floats + (c - buffer * tiles.chunk_ci) * span;
      for (int j = 0; j < tiles.vector; ++j) to[v * tiles.vector + j] = 0.0f;
    }
  }
  for (int i = threadIdx.x; i < tiles.chunk_ci * taps; i += THREADS) {
    const int c = i / taps, tap = i - c * taps;
    const int th = tap / along_w.taps, tw = tap - th * along_w.taps;
    const int kh = along_h.k + th * rows.k_step, kw = along_w.k + tw * columns.k_step;
    tap_places[i] = c * static_cast<int>(filters_size) + kh * p.kernel_w + kw;
  }
  // Channels that the group does not have.
  for (int i = threadIdx.x; i < 2 * tiles.chunk_ci * taps * BLOCK_CO; i += THREADS) {
    if (first_co + i % BLOCK_CO < group_out) continue;
    const int buffer = i / (tiles.chunk_ci * taps * BLOCK_CO);
    shared[buffer * weights_at + weights_at + i] = 0.0f;
  }
  __syncthreads();

  const int copied_co = threadIdx.x % BLOCK_CO, copied_tap = threadIdx.x / BLOCK_CO;
  Copier<S> copier = {corner_row,
                      filters + copied_co * filter_size,
                      nullptr,
                      nullptr,
                      places + threadIdx.x,
                      nullptr,
                      tile,
                      0,
                      0};
  const bool copies_weights = first_co + copied_co < group_out;
  const auto begin_copies = [&](int channels, float* buffer) {
    copier.begin(channels, buffer + threadIdx.x * tile.vector,
                 buffer + tile.weights_at + threadIdx.x, tap_places + copied_tap,
                 copies_weights ? channels * tile.taps - copied_tap : 0);
    // Very wide tiles, and inputs that are not aligned.
    if (tile.vectors <= 2 * THREADS) return;
    for (int c = 0; c < channels; ++c) {
      const float* const from = copier.from_x + c * tile.plane_size;
      for (int v = 2 * THREADS; v + threadIdx.x < tile.vectors; v += THREADS) {
        copy_input(buffer + c * tile.span + (v + threadIdx.x) * tile.vector, from, copier.places[v],
                   true, tile.vector);
      }
    }
  };

  float sum[THREAD_CO][THREAD_W] = {};

  // Two buffers: while one chunk of channels is used, the next is copied.
  float* current = shared;
  begin_copies(min(tiles.chunk_ci, tile.channels), current);
  while (copier.channels_left > 0) copier.copy_channel();
#pragma unroll 1
  while (copier.taps_left > 0) copier.copy_weight(copier.next_tap());
  __pipeline_commit();
#pragma unroll 1
  for (int left = tile.channels; left > 0; left -= tiles.chunk_ci) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this chunk has arrived, and nobody uses the other buffer any more
    float* const next = shared + (current == shared ? tile.buffer_floats : 0);
    const int count = min(tiles.chunk_ci, left);
    copier.from_w += count * tile.filters_size;
    begin_copies(min(tiles.chunk_ci, left - count), next);
    const int taps_h = tile.along_h.taps, taps_w = tile.along_w.taps;
    const float* const x = current + (taps_h - 1) * tile.pitch + warp_w * WARP_W + lane * THREAD_W;
    const float* const w = current + tile.weights_at + warp_co * THREAD_CO;
    if (taps_h == 1 && taps_w == 1) {
      add_channels<S, 1, 1>(sum, x, w, count, copier);
    } else if (taps_h == 1 && taps_w == 2) {
      add_channels<S, 1, 2>(sum, x, w, count, copier);
    } else if (taps_h == 2 && taps_w == 1) {
      add_channels<S, 2, 1>(sum, x, w, count, copier);
    } else if (taps_h == 2 && taps_w == 2) {
      add_channels<S, 2, 2>(sum, x, w, count, copier);
    } else if (taps_w == 3) {
      add_rows<S, 3>(sum, x, w, count, taps_h, copier);
    } else {
      add_long_rows<S>(sum, x, w, count, taps_h, taps_w, copier);
    }
    __pipeline_commit();
    current = shared + (current == shared ? tile.buffer_floats : 0);
  }
  __syncthreads();
  finish_tile<S>(sum, shared, tile, input, weight, bias, output, p, rows, columns, tiles);
}

// What has no tiles, see plan(): very large kernels, strides and dilations, and very wide images
// under tall kernels.
__global__ void register_blocked_any_kernel(const float* __restrict__ input,
                                            const float* __restrict__ weight,
                                            const float* __restrict__ bias,
                                            float* __restrict__ output, ConvTransposeProblem p,
                                            Axis rows, Axis columns) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t planes = index / out_plane, pixel = index % out_plane;
  const int n = static_cast<int>(planes / p.out_channels);
  const int co = static_cast<int>(planes % p.out_channels);
  if (n >= p.batch) return;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int group = co / group_out;
  const int64_t first_ci = static_cast<int64_t>(group) * group_in;
  const float* const image =
      input + (static_cast<int64_t>(n) * p.in_channels + first_ci) * p.height * p.width;
  const float* const filter =
      weight + (first_ci * group_out + co % group_out) * p.kernel_h * p.kernel_w;
  const float shift = bias == nullptr ? -0.0f : bias[co];
  const int oh = static_cast<int>(pixel / p.out_width), ow = static_cast<int>(pixel % p.out_width);
  output[index] = sum_of_taps(image, filter, p, rows, columns, oh, ow) + shift;
}

// The largest of an axis's phases.
struct Largest {
  int count, taps;
  int reach;       // the last output's first tap lies so far behind it
  int halo;        // and the first output's last tap so far before it
  int64_t extent;  // inputs, the zeros behind them that halos need, and outputs
};

inline Largest largest_phase(const Axis& axis) {
  Largest largest = {1, (axis.kernel - 1) / axis.k_step + 1, 0, 0, 1};
  for (int first = 0; first < min(period_of(axis), axis.out_size); ++first) {
    const Phase phase = phase_of(axis, first);
    const int halo = max(phase.taps - 1 - phase.start, 0), reach = max(phase.start, 0);
    largest.count = max(largest.count, phase.count);
    largest.halo = max(largest.halo, halo);
    largest.reach = max(largest.reach, reach);
    largest.extent = max(largest.extent, max(static_cast<int64_t>(phase.size) + halo,
                                             static_cast<int64_t>(phase.count) + reach));
  }
  return largest;
}

inline int64_t blocks_of(const Tiling& tiles, const ConvTransposeProblem& p) {
  return static_cast<int64_t>(tiles.count) * tiles.count_co * p.groups * tiles.phases_h *
         tiles.phases_w * (p.batch / tiles.images);
}

// What the plans depend on.
struct Device {
  int64_t shared_floats;  // of a block, at most
  int multiprocessors;
};

static Device current_device() { return {shared_floats(INT32_MAX), multiprocessors()}; }

// A way to cut a problem, and the time that it would take, in FMAs of a thread.
struct Plan {
  Tiling tiles = {};
  std::size_t shared_bytes = 0;
  double cost = DBL_MAX;  // it is not possible
  cudaError_t (*launch)(const float*, const float*, const float*, float*,
                        const ConvTransposeProblem&, const Axis&, const Axis&, const Plan&,
                        cudaStream_t) = nullptr;
};

// Blocks' shared memory for tiles with rows `pitch` apart, in floats.
struct Memory {
  int64_t inputs, weights;  // of one channel
  int64_t taps;
  int64_t places;    // of a thread's vectors
  int64_t chunk_ci;  // channels at once, 0 if not even one fits

  int64_t floats() const { return chunk_ci * (2 * (inputs + weights) + taps) + places * THREADS; }
};

template <class S>
static Memory memory_of(int64_t taps_h, int64_t taps_w, int64_t pitch, int vector, int group_in,
                        const Device& device) {
  Memory memory;
  memory.taps = taps_h * taps_w;
  memory.inputs = S::BLOCK_W + ceil_div(taps_w, 4) * 4 + (taps_h - 1) * pitch;
  memory.weights = memory.taps * S::BLOCK_CO;
  memory.places = max(ceil_div(memory.inputs / vector, THREADS), int64_t{2});
  const auto channels_in = [&](int64_t floats) {
    return (floats - memory.places * THREADS) /
           (2 * (memory.inputs + memory.weights) + memory.taps);
  };
  // As many channels as a share of the SM's memory holds; one may take all that a block can have.
  const int64_t fitting = max(channels_in(SHARED_BYTES / static_cast<int>(sizeof(float))),
                              min(channels_in(device.shared_floats), int64_t{1}));
  const int64_t wanted = min(ceil_div(CHUNK_TAPS, memory.taps), static_cast<int64_t>(CHUNK_CI));
  memory.chunk_ci = max(min(min(fitting, wanted), static_cast<int64_t>(group_in)), int64_t{0});
  return memory;
}

// Tiles of this size. There are none if they do not fit into shared memory, or an offset within one
// not into 32 bits, or if there are very many phases.
template <int WARPS_CO, int THREAD_W>
static Plan plan(const float* input, const ConvTransposeProblem& p, const Axis& rows,
                 const Axis& columns, const Device& device) {
  using S = Sizes<WARPS_CO, THREAD_W>;
  Plan plan;
  Tiling& tiles = plan.tiles;
  if (has_more_phases(rows, MAX_PERIOD) || has_more_phases(columns, MAX_PERIOD)) return plan;
  const Largest along_h = largest_phase(rows), along_w = largest_phase(columns);
  const int vector = columns.i_step == 1 && has_aligned_rows(input, p) ? 4 : 1;
  const int group_in = p.in_channels / p.groups;
  // Halos of wide rows leave room for few channels, and are copied for each tile. Narrow stripes of
  // the image have less of them, but each stripe has its own columns left and right.
  const int64_t taps = static_cast<int64_t>(along_h.taps) * along_w.taps;
  double best = DBL_MAX;
  int64_t pitch = 0;
  for (int stripes = 1; stripes <= MAX_STRIPES; stripes += max(stripes / 2, 1)) {
    const int64_t stripe = ceil_div(ceil_div(along_w.count, stripes), 4) * 4;
    if (stripes > 1 && (stripe < 32 || stripe * (stripes - 1) >= along_w.count)) break;
    const int64_t halo = stripes > 1 ? ceil_div(along_w.halo, 4) * 4 : 0;
    const int64_t columns_needed = stripes > 1 ? stripe + along_w.reach + halo : along_w.extent;
    const int64_t wanted_pitch = ceil_div(columns_needed, 4) * 4;
    const Memory memory =
        memory_of<S>(along_h.taps, along_w.taps, wanted_pitch, vector, group_in, device);
    if (memory.chunk_ci == 0) continue;
    const double copies = COST_OF_COPY * static_cast<double>(memory.places);
    const double barrier = static_cast<double>(COST_OF_CHUNK) / memory.chunk_ci;
    const double fmas = static_cast<double>(taps) * S::COST_OF_TAP;
    const double this_cost =
        static_cast<double>(stripes) * wanted_pitch * (copies + barrier + fmas);
    if (this_cost >= best) continue;
    best = this_cost;
    pitch = wanted_pitch;
    tiles.stripes = stripes;
    tiles.stripe = stripes > 1 ? static_cast<int>(stripe) : along_w.count;
    tiles.halo = static_cast<int>(halo);
  }
  if (pitch == 0) return plan;
  const Memory memory = memory_of<S>(along_h.taps, along_w.taps, pitch, vector, group_in, device);
  const int64_t height = along_h.extent;
  const int64_t rows_of_tile = memory.inputs / pitch + 2;
  const int64_t in_rows = rows_of_tile * rows.i_step * p.width;
  const int64_t out_rows = rows_of_tile * period_of(rows) * p.out_width;
  const int64_t filters =
      CHUNK_CI * static_cast<int64_t>(p.out_channels / p.groups) * p.kernel_h * p.kernel_w;
  if (max(max(in_rows, out_rows), filters) > INT32_MAX / 2) return plan;
  tiles.images = images_of_axis(p, memory.inputs, tiles.stripes * height, pitch);
  const int64_t pixels = static_cast<int64_t>(tiles.images) * tiles.stripes * height * pitch;
  const int64_t count = ceil_div(pixels + 3, S::BLOCK_W);  // it begins up to 3 pixels early
  if (count > INT32_MAX) return plan;
  tiles.phases_h = min(period_of(rows), p.out_height);
  tiles.phases_w = min(period_of(columns), p.out_width);
  tiles.rows = static_cast<int>(height);
  tiles.pitch = static_cast<int>(pitch);
  tiles.count = static_cast<int>(count);
  tiles.count_co = static_cast<int>(ceil_div(p.out_channels / p.groups, S::BLOCK_CO));
  tiles.chunk_ci = static_cast<int>(memory.chunk_ci);
  tiles.vector = vector;
  plan.shared_bytes = max(memory.floats(), static_cast<int64_t>(S::WARP_W) * WARPS) * sizeof(float);
  const int64_t blocks = blocks_of(tiles, p);
  // The SM with the most blocks: BLOCKS_PER_SM at a time, and fewer of them do not keep it busy.
  const int64_t most = ceil_div(blocks, device.multiprocessors);
  constexpr double REST[] = {0.0, 1.6, 2.3};
  if (blocks > INT32_MAX) return plan;
  plan.cost =
      (most / S::BLOCKS_PER_SM * S::BLOCKS_PER_SM + REST[most % S::BLOCKS_PER_SM]) * best / pitch;
  return plan;
}

template <int WARPS_CO, int THREAD_W>
static cudaError_t launch_tiles(const float* input, const float* weight, const float* bias,
                                float* output, const ConvTransposeProblem& p, const Axis& rows,
                                const Axis& columns, const Plan& plan, cudaStream_t stream) {
  const auto kernel = register_blocked_phases_kernel<WARPS_CO, THREAD_W>;
  const cudaError_t error = allow_shared_bytes(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks_of(plan.tiles, p)), THREADS, plan.shared_bytes, stream>>>(
      input, weight, bias, output, p, rows, columns, plan.tiles);
  return cudaGetLastError();
}

static cudaError_t launch(const float* input, const float* weight, const float* bias, float* output,
                          const ConvTransposeProblem& p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  const Device device = current_device();
  const int channels = p.out_channels / p.groups;
  Plan best;
  const auto consider = [&](auto plan, auto launch_tiles) {
    const Plan candidate = plan(input, p, rows, columns, device);
    if (candidate.cost >= best.cost) return;
    best = candidate;
    best.launch = launch_tiles;
  };
  // Blocks for as many channels as there are, or for fewer if the weights do not fit.
  if (channels > Sizes<2, 12>::BLOCK_CO) {
    consider(plan<4, 12>, launch_tiles<4, 12>);
    consider(plan<4, 4>, launch_tiles<4, 4>);
  }
  if (!best.launch && channels > Sizes<1, 12>::BLOCK_CO) {
    consider(plan<2, 12>, launch_tiles<2, 12>);
    consider(plan<2, 4>, launch_tiles<2, 4>);
  }
  if (!best.launch) {
    consider(plan<1, 12>, launch_tiles<1, 12>);
    consider(plan<1, 4>, launch_tiles<1, 4>);
  }
  if (best.launch) {
    return best.launch(input, weight, bias, output, p, rows, columns, best, stream);
  }
  const int64_t outputs =
      static_cast<int64_t>(p.batch) * p.out_channels * p.out_height * p.out_width;
  const int64_t blocks = ceil_div(outputs, THREADS);
  if (blocks > INT32_MAX || !can_sum_taps(p)) return cudaErrorInvalidConfiguration;
  register_blocked_any_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(
      input, weight, bias, output, p, rows, columns);
  return cudaGetLastError();
}

}  // namespace phases
