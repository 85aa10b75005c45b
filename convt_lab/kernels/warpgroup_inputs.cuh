// How the kernels for Hopper's tensor cores bring inputs: seven warps load them, convert them to 16
// bits and store them in shared memory, a pixel's eight channels side by side.
//
// Values of 16 bits stay as they are. Float32 is brought to float16 by a power of two, a scale for
// each tile and stage, which is found on the way: mostly the one before is right.

#pragma once

#include "split_tile.cuh"
#include "warpgroup_plan.cuh"
#include "wgmma.cuh"

namespace warpgroups {

// ---- Splitting ---------------------------------------------------------------------------------

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }

// The power of two that brings `largest` below 2^(LARGEST_EXPONENT + 1); NaN where it, or its
// inverse, would leave float32, so that outputs are NaN and are summed again by the definition.
__device__ __forceinline__ float scale_of(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  if (largest == 0.0f) return 1.0f;
  return exponent < -110 ? not_a_number()
                         : __uint_as_float((127 + LARGEST_EXPONENT - exponent) << 23);
}

__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// An octet's values in 16 bits, in parts.
template <int PARTS>
struct Parts {
  uint4 parts[PARTS];
  float largest;  // of the magnitudes, rounded
  bool is_zero;   // all of them
};

template <int PARTS>
__device__ __forceinline__ Parts<PARTS> split(const float (&values)[OCTET], float scale) {
  uint32_t first[OCTET / 2], second[OCTET / 2], bits = 0;
  __half2 largest = __float2half2_rn(0.0f);
#pragma unroll
  for (int i = 0; i < OCTET / 2; ++i) {
    const float a = values[2 * i] * scale, b = values[2 * i + 1] * scale;
    const __half2 pair = __floats2half2_rn(a, b);
    first[i] = bits_of(pair);
    if constexpr (PARTS == 2) {
      const float2 rounded = __half22float2(pair);
      second[i] = bits_of(
          __floats2half2_rn((a - rounded.x) * SECOND_SCALE, (b - rounded.y) * SECOND_SCALE));
    }
    largest = __hmax2(largest, __habs2(pair));
    bits |= __float_as_uint(a) | __float_as_uint(b);
  }
  Parts<PARTS> split;
  split.parts[0] = make_uint4(first[0], first[1], first[2], first[3]);
  if constexpr (PARTS == 2) {
    split.parts[1] = make_uint4(second[0], second[1], second[2], second[3]);
  }
  split.largest = __half2float(__hmax(__low2half(largest), __high2half(largest)));
  split.is_zero = bits << 1 == 0;
  return split;
}

// Whether bits of the values may be lost.
template <class M>
__device__ __forceinline__ bool is_lossy(const Parts<M::PARTS>& split) {
  return !split.is_zero && split.largest < M::TOO_SMALL_TO_SPLIT;
}

template <class T>
__device__ __forceinline__ uint4 pack(const T (&values)[OCTET]) {
  return make_uint4(pair_of(values[0], values[1]), pair_of(values[2], values[3]),
                    pair_of(values[4], values[5]), pair_of(values[6], values[7]));
}

// ---- Loading -----------------------------------------------------------------------------------

#if HAS_WGMMA

// How a tile's inputs are read: value by value; octets of a few neighbours in a row; or, if
// channels come last, octets as they lie there.
enum class Reading { VALUES, ROWS, CHANNELS };

// Loads that stay where they are: the compiler would move them to where their values are used.
template <int WORDS>
__device__ __forceinline__ void load_words(uint32_t (&words)[WORDS], const void* from) {
  if constexpr (WORDS == 4) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
  } else if constexpr (WORDS == 2) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(from));
  } else {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  }
}
__device__ __forceinline__ void load_value(float& value, const float* from) {
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
}
template <class T>
__device__ __forceinline__ void load_value(T& value, const T* from) {
  uint16_t bits;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(from));
  memcpy(&value, &bits, sizeof value);
}

// The octets that a thread reads at once, of so many neighbours on the flat axis.
template <class M, Reading READING>
struct Unit {
  using T = typename M::Value;
  static constexpr int SIZE = READING == Reading::ROWS ? M::UNIT : 1;
  static constexpr int WORDS = READING == Reading::ROWS ? SIZE * sizeof(T) / 4 : 4;

  // [channel][neighbour], or the channels of an octet.
  T values[OCTET * SIZE];
  bool exists;

  __device__ __forceinline__ void load(const T* planes, int place, int channel_step, int channels) {
    if constexpr (READING == Reading::VALUES) {
#pragma unroll
      for (int c = 0; c < OCTET; ++c) {
        load_value(values[c], planes + (place + min(c, channels - 1) * channel_step));
      }
    } else {
      constexpr int VECTOR = WORDS * 4 / sizeof(T);
#pragma unroll
      for (int i = 0; i < OCTET * SIZE / VECTOR; ++i) {
        uint32_t words[WORDS];
        load_words(words, planes + place);
        memcpy(values + i * VECTOR, words, sizeof words);
        place += READING == Reading::ROWS ? channel_step : VECTOR;
        // Or multiples of the step would be kept in registers.
        if constexpr (READING == Reading::ROWS) asm volatile("" : "+r"(place));
      }
    }
  }

  __device__ __forceinline__ void get_octet(T (&octet)[OCTET], int neighbour) const {
#pragma unroll
    for (int c = 0; c < OCTET; ++c) octet[c] = values[c * SIZE + neighbour];
  }
};

// The units of a tile's inputs that one thread brings, stage after stage: every CONVERTERS-th of a
// stage, which are [octet, position], or [position, octet] if channels come last, so that lanes
// read neighbours in memory.
template <class M, Reading READING>
struct Stream {
  using T = typename M::Value;
  using Octets = Unit<M, READING>;

  const T* planes;  // of the stage
  int channels;     // that are left from there on
  int position, channel;

  __device__ __forceinline__ void begin(int thread, const Plan& plan) {
    position = M::IS_LAST ? min(thread / plan.octets(), plan.region - 1)
                          : thread * Octets::SIZE % plan.region;
    channel = (M::IS_LAST ? thread % plan.octets() : thread * Octets::SIZE / plan.region) * OCTET;
  }

  __device__ __forceinline__ void skip(int stages, const Plan& plan, int plane) {
    const int count = stages * plan.subchunks * CI;
    planes += static_cast<int64_t>(count) * (M::IS_LAST ? 1 : plane);
    channels -= count;
  }

  // Goes on to the next unit. Past the last one, others are read again.
  __device__ __forceinline__ void go_on(const Plan& plan) {
    if constexpr (M::IS_LAST) {
      position += CONVERTERS / plan.octets();
      position -= position >= plan.region ? CONVERTERS / plan.octets() : 0;
    } else {
      position += plan.step_positions;
      const bool is_over = position >= plan.region;
      position -= is_over ? plan.region : 0;
      channel += plan.step_octets * OCTET + (is_over ? OCTET : 0);
    }
  }

  // Begins to load it. In place of inputs that do not exist others are read; channels that do not
  // are copies of the last that does, or octets of the last octet, and meet weights of zero.
  __device__ __forceinline__ void load(Octets& unit, const int* places, const Plan& plan,
                                       int plane) const {
    const int channel_step = M::IS_LAST ? 1 : plane;
    const int place = places[position / Octets::SIZE];
    unit.exists = place >= 0;
    const int left = min(channels, plan.subchunks * CI);
    const int last = READING == Reading::VALUES ? (left - 1) / OCTET * OCTET : left - OCTET;
    const int first = min(channel, last);
    unit.load(planes, max(place, 0) + first * channel_step, channel_step, left - first);
  }
};

// Notes where a tile's units lie in its images, or -1 for zeros.
template <class M, int SIZE>
__device__ __forceinline__ void find_places(int* places, const Task& task, int first_n, int thread,
                                            const ConvTransposeProblem& p, const Plan& plan,
                                            const Axis& rows, const Axis& columns) {
  const int plane = p.height * p.width;
  // A unit that begins before a row belongs to it.
  Place at(task.first - task.lead + thread * SIZE + SIZE - 1, plan);
#pragma unroll 1
  for (int i = thread; i < plan.region / SIZE; i += CONVERTERS) {
    const int h = task.first_h + at.row;
    const int w = task.first_w + task.first_column + at.column - (SIZE - 1);
    const bool exists =
        at.n < p.batch && h >= 0 && h < task.along_h.size && w >= 0 && w < task.along_w.size;
    const int pixel = (h * rows.i_step + task.along_h.residue) * p.width + w * columns.i_step +
                      task.along_w.residue;
    const int n = at.n - first_n;
    const int place =
        M::IS_LAST ? (n * plane + pixel) * p.in_channels : n * p.in_channels * plane + pixel;
    places[i] = exists ? place : -1;
    at.move(plan.step_rows, plan.step_columns, plan);
  }
}

constexpr int MEETING = 1;  // barrier of the converters

// Of a stage's largest input: then its scale is found anew.
constexpr float TOO_LARGE = 0x1p15f, TOO_SMALL = 0x1p8f;

// Converts inputs, stage after stage. A thread has DEPTH loads of units under way: as soon as it
// has one, it asks for the next but DEPTH, which may be of the next stage.
template <class M, Reading READING>
__device__ __forceinline__ void bring_inputs(const Shared<M>& shared,
                                             const typename M::Value* __restrict__ input,
                                             const ConvTransposeProblem& p, const Plan& plan,
                                             const Axis& rows, const Axis& columns, int thread) {
  using T = typename M::Value;
  using Octets = Unit<M, READING>;
  constexpr int SIZE = Octets::SIZE;
  // As many as there are registers for, of which a single value takes one.
  constexpr int DEPTH = (M::PARTS == 2 ? 16 : 32) / (SIZE * OCTET) *
                        (READING == Reading::VALUES ? 1 : 4 / static_cast<int>(sizeof(T)));
  Barriers& barriers = *shared.barriers;
  const int group_in = p.in_channels / p.groups;
  const int plane = p.height * p.width;  // it and all offsets in a tile's images fit
  const int count = plan.octets() * plan.region / SIZE;
  const int rounds = (count + DEPTH * CONVERTERS - 1) / (DEPTH * CONVERTERS);
  float scale = 1.0f;
  Turn turn;
  for (unsigned bundle = blockIdx.x; bundle < plan.bundles; bundle += gridDim.x) {
    Stream<M, READING> stream;
    {
      const Task task(bundle * plan.bundle, plan, barriers.phases);
      if (plan.bundle == 1 && task.is_empty<M>(bundle, plan, barriers.phases)) continue;
      const int first_n = Place(task.first, plan).n;
      any_of<MEETING, CONVERTERS>(false);  // nobody needs the places of the tile before any more
      find_places<M, SIZE>(shared.places, task, first_n, thread, p, plan, rows, columns);
      stream.planes = input + static_cast<int64_t>(first_n) * p.in_channels * plane +
                      static_cast<int64_t>(task.group) * group_in * (M::IS_LAST ? 1 : plane);
    }
    any_of<MEETING, CONVERTERS>(false);
    stream.channels = group_in;
    stream.begin(thread, plan);
    Octets units[DEPTH];
    const auto load_first = [&] {
#pragma unroll
      for (int k = 0; k < DEPTH; ++k) {
        stream.load(units[k], shared.places, plan, plane);
        stream.go_on(plan);
      }
    };
    load_first();
    for (int stage = 0; stage < plan.stages; ++stage) {
      wait(&barriers.inputs_empty[turn.index], turn.parity ^ 1);
      char* const to = shared.inputs + turn.index * M::PARTS * Shared<M>::part_bytes(plan);
      // Where the first octet of a unit is brought to.
      const auto place_of = [&](int i) {
        return M::IS_LAST ? i % plan.octets() * plan.region + i / plan.octets() : i * SIZE;
      };
      const auto for_all = [&](const auto& visit) {
#pragma unroll 1
        for (int left = rounds - 1, first = thread; left >= 0; --left) {
          // After the last stage its first units are read again, for nobody.
          if (left == 0) {
            if (stage + 1 < plan.stages) stream.skip(1, plan, plane);
            stream.begin(thread, plan);
          }
#pragma unroll
          for (int k = 0; k < DEPTH; ++k, first += CONVERTERS) {
#pragma unroll
            for (int j = 0; j < SIZE; ++j) {
              T octet[OCTET];
              units[k].get_octet(octet, j);
              visit(octet, place_of(first) + j, units[k].exists, first < count);
            }
            stream.load(units[k], shared.places, plan, plane);
            stream.go_on(plan);
          }
        }
      };
      if constexpr (M::IS_SCALED) {
        float largest = 0.0f;
        bool is_bad = false;
        const auto convert = [&](const T(&octet)[OCTET], int place, bool exists, bool is_new) {
          // Should zero times what was read be NaN, outputs are only summed again.
          const Parts<M::PARTS> split = warpgroups::split<M::PARTS>(octet, exists ? scale : 0.0f);
          largest = fmaxf(largest, split.largest);
          is_bad |= is_lossy<M>(split);
#pragma unroll
          for (int part = 0; part < M::PARTS; ++part) {
            if (is_new) {
              *reinterpret_cast<uint4*>(to + part * Shared<M>::part_bytes(plan) + place * 16) =
                  split.parts[part];
            }
          }
        };
        // With the scale of the stage before, which is right most of the time.
        for_all(convert);
        show_tensor_cores();
        const bool any_bad = any_of<MEETING, CONVERTERS>(largest >= TOO_LARGE || is_bad);
        if (!any_of<MEETING, CONVERTERS>(largest >= TOO_SMALL) || any_bad) {
          const auto read_again = [&](const auto& visit) {
            Stream<M, READING> same = stream;
            if (stage + 1 < plan.stages) same.skip(-1, plan, plane);
            same.begin(thread, plan);
#pragma unroll 1
            for (int i = thread; i < count; i += CONVERTERS) {
              Octets unit;
              same.load(unit, shared.places, plan, plane);
              same.go_on(plan);
#pragma unroll
              for (int j = 0; j < SIZE; ++j) {
                T octet[OCTET];
                unit.get_octet(octet, j);
                visit(octet, place_of(i) + j, unit.exists, true);
              }
            }
          };
          if (thread == 0) barriers.largest = 0;
          any_of<MEETING, CONVERTERS>(false);
          unsigned finite = 0;  // infinities do not count
          read_again([&](const T(&octet)[OCTET], int, bool exists, bool) {
#pragma unroll
            for (int c = 0; c < OCTET; ++c) {
              const float value = fabsf(octet[c]);
              if (exists && value <= FLT_MAX) finite = max(finite, __float_as_uint(value));
            }
          });
          atomicMax(&barriers.largest, __reduce_max_sync(0xFFFFFFFFu, finite));
          any_of<MEETING, CONVERTERS>(false);
          // Zeros may have any scale.
          if (barriers.largest > 0) scale = scale_of(__uint_as_float(barriers.largest));
          is_bad = false;
          read_again(convert);
          show_tensor_cores();
          if (any_of<MEETING, CONVERTERS>(is_bad)) scale = not_a_number();
          stream.begin(thread, plan);  // what was loaded of the next stage is not kept
          load_first();
        }
      } else {
        for_all([&](const T(&octet)[OCTET], int place, bool exists, bool is_new) {
          const uint4 values = exists ? pack(octet) : make_uint4(0, 0, 0, 0);
          if (is_new) *reinterpret_cast<uint4*>(to + place * 16) = values;
        });
        show_tensor_cores();
        any_of<MEETING, CONVERTERS>(false);
      }
      if (thread == 0) {
        barriers.inverses[turn.index] = 1.0f / scale;
        arrive(&barriers.inputs_full[turn.index]);
      }
      if (!(scale == scale)) scale = 1.0f;  // that was for this stage alone
      turn.next(plan.buffers);
    }
  }
}

// Copies inputs of 16 bits, channels last, which lie in memory as they are to lie: without a way
// through registers. While a stage's copies are on their way, the next one's are asked for.
template <class M>
__device__ __forceinline__ void copy_inputs(const Shared<M>& shared,
                                            const typename M::Value* __restrict__ input,
                                            const ConvTransposeProblem& p, const Plan& plan,
                                            const Axis& rows, const Axis& columns, int thread) {
  using T = typename M::Value;
  Barriers& barriers = *shared.barriers;
  const int group_in = p.in_channels / p.groups;
  const int plane = p.height * p.width;
  const int octets = plan.octets();
  const int octet = thread % octets;
  const int step = CONVERTERS / octets;
  const uint32_t to = address_of(shared.inputs) + octet * plan.region * 16;
  Turn turn;
  int last = -1;  // buffer whose copies are on their way
  const auto hand_on = [&] {
    if (last < 0) return;
    show_tensor_cores();
    arrive(&barriers.inputs_full[last]);
    last = -1;
  };
  for (unsigned bundle = blockIdx.x; bundle < plan.bundles; bundle += gridDim.x) {
    const Task task(bundle * plan.bundle, plan, barriers.phases);
    if (plan.bundle == 1 && task.is_empty<M>(bundle, plan, barriers.phases)) continue;
    const int first_n = Place(task.first, plan).n;
    any_of<MEETING, CONVERTERS>(false);  // nobody needs the places of the tile before any more
    find_places<M, 1>(shared.places, task, first_n, thread, p, plan, rows, columns);
    any_of<MEETING, CONVERTERS>(false);
    const T* planes = input + static_cast<int64_t>(first_n) * p.in_channels * plane +
                      static_cast<int64_t>(task.group) * group_in + octet * OCTET;
    int left = group_in - octet * OCTET;
    for (int stage = 0; stage < plan.stages; ++stage) {
      if (!is_over(&barriers.inputs_empty[turn.index], turn.parity ^ 1)) {
        wait_for_copies<0>();  // whoever has the buffer may need what is on its way
        hand_on();
        wait(&barriers.inputs_empty[turn.index], turn.parity ^ 1);
      }
      const uint32_t buffer = to + turn.index * Shared<M>::part_bytes(plan);
      const bool has_channels = left > 0;
#pragma unroll 4
      for (int position = thread / octets; position < plan.region; position += step) {
        const int place = shared.places[position];
        const bool exists = place >= 0 && has_channels;
        copy_or_clear(buffer + position * 16, planes + (exists ? place : 0), exists);
      }
      commit_copies();
      wait_for_copies<1>();
      hand_on();
      last = turn.index;
      turn.next(plan.buffers);
      planes += plan.subchunks * CI;
      left -= plan.subchunks * CI;
    }
  }
  wait_for_copies<0>();
  hand_on();
}

#endif  // HAS_WGMMA

}  // namespace warpgroups
