// What the kernels for Hopper's tensor cores (sm_90a) have in common.
//
// One instruction, wgmma, multiplies 64 output channels by some hundred pixels for 16 input
// channels, both from shared memory. It takes inputs as [pixel][8 channels] of 16 bits: a pixel is
// 16 bytes, so a tap, which is a shift on the flat axis of warpgroup_plan.cuh, is the same matrix
// from another address on. What was converted once serves all taps.
//
// Warps have roles: seven bring inputs (warpgroup_inputs.cuh), one brings weights, two groups of
// four multiply. They hand on buffers, and never meet at a barrier of the block.
//
// What is not finite, or has eight neighbouring channels too small for their stage's scale, is
// summed by the definition in a kernel of its own.

#pragma once

#include "warpgroup_inputs.cuh"

namespace warpgroups {

// ---- Weights -----------------------------------------------------------------------------------

// Finds the inverse of the scale of each output channel's weights.
__global__ void __launch_bounds__(SCALERS)
    hopper_scale_kernel(const float* __restrict__ weight, float* inverses, ConvTransposeProblem p) {
  __shared__ unsigned largest;
  let_next_kernel_begin();
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  const int group_out = p.out_channels / p.groups, group_in = p.in_channels / p.groups;
  const int filter_size = p.kernel_h * p.kernel_w;
  const int group = blockIdx.x / group_out, co = blockIdx.x % group_out;
  const float* const from =
      weight + (static_cast<int64_t>(group) * group_in * group_out + co) * filter_size;
  unsigned mine = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < group_in * filter_size; i += SCALERS) {
    const int64_t ci = i / filter_size;
    const float value = fabsf(from[ci * group_out * filter_size + i % filter_size]);
    if (value <= FLT_MAX) mine = max(mine, __float_as_uint(value));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mine = max(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, lanes));
  }
  if (threadIdx.x % 32 == 0) atomicMax(&largest, mine);
  __syncthreads();
  if (threadIdx.x == 0) inverses[blockIdx.x] = 1.0f / scale_of(__uint_as_float(largest));
}

// Which of 64 output channels a row of products is. Of 16 rows a lane has numbers g and g + 8:
// these are neighbours in memory if channels come last.
template <class M>
__host__ __device__ __forceinline__ int channel_of_row(int row) {
  return M::IS_LAST ? row / 16 * 16 + row % 8 * 2 + row / 8 % 2 : row;
}

// Which of a phase's taps the kernel's tap k is, or -1.
__device__ __forceinline__ int tap_of(const Phase& phase, int k, int k_step) {
  const int tap = (k - phase.k) / k_step;
  return k >= phase.k && phase.k + tap * k_step == k && tap < phase.taps ? tap : -1;
}

// Packs weights as [group, phase_h, phase_w, part_co, stage, step, 64 of 128 channels, part, half
// of 16 input channels, output channel, input channel]; the 64 channels come before the stage if
// each warpgroup is brought its own. Steps go over sub-chunks, and then over taps in the order of
// the inputs that they meet. A thread packs eight input channels of a tap: neighbouring taps are
// neighbours in memory, so one block has several. Clears the flags of tasks.
template <class M>
__global__ void __launch_bounds__(PACKERS)
    hopper_pack_kernel(const typename M::Value* __restrict__ weight, float* inverses,
                       char* __restrict__ packed, char* __restrict__ flags, ConvTransposeProblem p,
                       Axis rows, Axis columns, Plan plan, int64_t octets) {
  using T = typename M::Value;
  extern __shared__ __align__(128) char memory[];
  Phases& phases = *reinterpret_cast<Phases*>(memory);
  phases.find(plan, rows, columns);
  let_next_kernel_begin();
  if constexpr (M::IS_SCALED) wait_for_last_kernel();  // it finds the inverses
  for (unsigned i = blockIdx.x * PACKERS + threadIdx.x; i < plan.tasks; i += gridDim.x * PACKERS) {
    flags[i] = NONE;
  }
  __syncthreads();
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int filter_size = p.kernel_h * p.kernel_w;
  const int64_t threads = int64_t{gridDim.x} * PACKERS;
  for (int64_t i = int64_t{blockIdx.x} * PACKERS + threadIdx.x; i < octets; i += threads) {
    const int row = i % CO, half = i / CO % 2;
    auto number = static_cast<unsigned>(i / (2 * CO));
    const int kw = take_digit(number, p.kernel_w), kh = take_digit(number, p.kernel_h);
    const int part = take_digit(number, plan.tile_parts());
    const int subchunk = take_digit(number, plan.subchunks);
    const int stage = take_digit(number, plan.stages);
    const int part_co = take_digit(number, plan.parts_co), group = number;
    const int co = (part_co * plan.tile_parts() + part) * CO + channel_of_row<M>(row);
    const int first_ci = (stage * plan.subchunks + subchunk) * CI + half * OCTET;
    const T* const from =
        weight +
        ((static_cast<int64_t>(group) * group_in + first_ci) * group_out + co) * filter_size +
        kh * p.kernel_w + kw;
    T values[OCTET];
#pragma unroll
    for (int c = 0; c < OCTET; ++c) {
      const bool exists = co < group_out && first_ci + c < group_in;
      values[c] =
          exists ? from[static_cast<int64_t>(c) * group_out * filter_size] : tensor::zero<T>();
    }
    uint4 parts[M::PARTS];
    if constexpr (M::IS_SCALED) {
      const float inverse = co < group_out ? inverses[group * group_out + co] : 1.0f;
      const Parts<M::PARTS> split =
          warpgroups::split<M::PARTS>(values, inverse == inverse ? 1.0f / inverse : 1.0f);
      // All that the channel's weights make is summed again then.
      if (is_lossy<M>(split)) inverses[group * group_out + co] = not_a_number();
#pragma unroll
      for (int k = 0; k < M::PARTS; ++k) parts[k] = split.parts[k];
    } else {
      parts[0] = pack(values);
    }
    // For every phase that has the tap.
    for (int phase_h = 0; phase_h < plan.phases_h; ++phase_h) {
      const Phase along_h = phases.along_h(phase_h);
      const int tap_h = tap_of(along_h, kh, rows.k_step);
      if (tap_h < 0) continue;
      for (int phase_w = 0; phase_w < plan.phases_w; ++phase_w) {
        const Phase along_w = phases.along_w(phase_w);
        const int tap_w = tap_of(along_w, kw, columns.k_step);
        if (tap_w < 0) continue;
        const int64_t owner = owner_of(plan, group, phase_h, phase_w, part_co);
        const int64_t supply = M::SHARES_WEIGHTS ? owner : owner * plan.tile_parts() + part;
        const int step = (subchunk * along_h.taps + along_h.taps - 1 - tap_h) * along_w.taps +
                         along_w.taps - 1 - tap_w;
        char* const to = packed + supply * plan.supply_bytes() +
                         (static_cast<int64_t>(stage) * plan.max_steps + step) * plan.step_bytes +
                         (M::SHARES_WEIGHTS ? part : 0) * M::STEP_BYTES + (half * CO + row) * 16;
#pragma unroll
        for (int k = 0; k < M::PARTS; ++k) {
          *reinterpret_cast<uint4*>(to + k * PART_BYTES) = parts[k];
        }
      }
    }
  }
}

#if HAS_WGMMA

// ---- Roles -------------------------------------------------------------------------------------

// What one supply brings: the weights of all tasks, slot after slot. Of a stage, those of both
// phases of a task.
struct Supply {
  unsigned bundle;
  const char* from;  // a task's, from the stage on
  int task, stage, phase, step;
  int steps[2];  // of the phases
  Turn turn;
};

// One thread asks for them, whichever is wanted first.
template <class M>
__device__ __forceinline__ void bring_weights(const Shared<M>& shared, const char* packed,
                                              const Plan& plan) {
  Barriers& barriers = *shared.barriers;
  const int parts = M::SUPPLIES > 1 ? plan.tile_parts() : 1;
  wait_for_last_kernel();
  const auto begin_task = [&](Supply& supply, int number) {
    supply.stage = supply.step = 0;
    for (; supply.bundle < plan.bundles; supply.bundle += gridDim.x, supply.task = 0) {
      for (; supply.task < plan.bundle; ++supply.task) {
        const unsigned number_of_task = supply.bundle * plan.bundle + supply.task;
        const Task task(number_of_task, plan, barriers.phases);
        supply.steps[0] = task.steps;
        supply.steps[1] = 0;
        if (M::MAX_PAIR > 1 && plan.pair > 1) {
          supply.steps[1] = Task(number_of_task, plan, barriers.phases, 1).steps;
        }
        if (supply.steps[0] + supply.steps[1] == 0) continue;
        supply.phase = supply.steps[0] == 0;
        const int part = M::SUPPLIES > 1 && plan.shares_pixels ? number : 0;
        supply.from =
            packed + (static_cast<int64_t>(task.owner) * parts + part) * plan.supply_bytes();
        return;
      }
    }
  };
  // Brings a slot, if there is one and it is empty; returns whether all are brought.
  const auto bring = [&](Supply& supply, int number) {
    if (supply.bundle >= plan.bundles) return true;
    if (!is_over(&barriers.weights_empty[number][supply.turn.index], supply.turn.parity ^ 1)) {
      return false;
    }
    // The next phase's owner comes after all parts of this one's.
    const int64_t next_phase = static_cast<int64_t>(plan.parts_co) * parts * plan.supply_bytes();
    const int steps = supply.phase == 0 ? supply.steps[0] : supply.steps[1];
    copy_bulk(shared.weights + (number * RING + supply.turn.index) * Shared<M>::slot_bytes(plan),
              supply.from + supply.phase * next_phase + supply.step * plan.step_bytes,
              min(plan.slot_steps, steps - supply.step) * plan.step_bytes,
              &barriers.weights_full[number][supply.turn.index]);
    supply.turn.next(RING);
    supply.step += plan.slot_steps;
    if (supply.step < steps) return false;
    supply.step = 0;
    if (supply.phase == 0 && supply.steps[1] > 0) {
      supply.phase = 1;
      return false;
    }
    supply.phase = supply.steps[0] == 0;
    supply.from += static_cast<int64_t>(plan.max_steps) * plan.step_bytes;
    if (++supply.stage == plan.stages) {
      ++supply.task;
      begin_task(supply, number);
    }
    return false;
  };
  Supply first = {blockIdx.x};
  begin_task(first, 0);
  if constexpr (M::SUPPLIES == 1) {
    while (!bring(first, 0)) continue;
  } else {
    Supply second = {blockIdx.x};
    begin_task(second, 1);
    // Both are asked in each round.
    while (!(static_cast<int>(bring(first, 0)) & static_cast<int>(bring(second, 1)))) continue;
  }
}

// What a warpgroup multiplies: its pixels and output channels of a tile; and the buffers that it
// reads next.
struct Multiplier {
  int warpgroup, first_pixel, first_part;
  Turn inputs_turn, weights_turn;

  template <class M>
  __device__ __forceinline__ int supply() const {
    return M::SHARES_WEIGHTS ? 0 : warpgroup;
  }

  template <class M>
  __device__ __forceinline__ uint32_t inputs(const Shared<M>& shared, const Plan& plan,
                                             const Task& task) const {
    return address_of(shared.inputs) / 16 +
           inputs_turn.index * M::PARTS * plan.octets() * plan.region + task.offset + first_pixel;
  }
  template <class M>
  __device__ __forceinline__ uint32_t weights(const Shared<M>& shared, const Plan& plan) const {
    const int slot = supply<M>() * RING + weights_turn.index;
    return (address_of(shared.weights) + slot * Shared<M>::slot_bytes(plan) +
            (M::SHARES_WEIGHTS ? first_part : 0) * M::STEP_BYTES) /
           16;
  }
};

__device__ __forceinline__ void leave(uint64_t* barrier) {
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// Writes two neighbours at once.
template <class T>
__device__ __forceinline__ void store_both(T* to, float first, float second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  } pair;
  set_rounded(pair.first, first);
  set_rounded(pair.second, second);
  *reinterpret_cast<Pair*>(to) = pair;
}

// Stores a lane's outputs of a tile: its sums times the inverses of the weights' scales. Returns
// whether all are finite.
template <class M>
__device__ __forceinline__ bool store_tile(const Product<M::PIXELS>& sum, const Multiplier& mine,
                                           const typename M::Value* __restrict__ bias,
                                           const float* inverses,
                                           typename M::Value* __restrict__ output, const Task& task,
                                           const ConvTransposeProblem& p, const Plan& plan,
                                           const Axis& rows, const Axis& columns) {
  using T = typename M::Value;
  constexpr bool LAST = M::IS_LAST;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group_out = p.out_channels / p.groups;
  const int first_co = (task.part_co * plan.tile_parts() + mine.first_part) * CO +
                       threadIdx.x % 128 / 32 * 16 + channel_of_row<M>(g);
  const int second_co = first_co + channel_of_row<M>(8);
  const bool has_first = first_co < group_out, has_second = second_co < group_out;
  const int period_h = period_of(rows), period_w = period_of(columns);
  const int64_t plane = static_cast<int64_t>(p.out_height) * p.out_width;
  // From one channel, column of the output, and output of the phase to the next.
  const int64_t channel_step = LAST ? 1 : plane;
  const int column_step = LAST ? p.out_channels : 1, next_column = period_w * column_step;
  const int64_t next_channel = LAST ? 1 : 8 * plane;
  const int last_column = min(plan.stripe, task.along_w.count - task.first_column);
  float factors[2], shifts[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool exists = i == 0 ? has_first : has_second;
    const int co = task.group * group_out + (i == 0 ? first_co : second_co);
    factors[i] = M::IS_SCALED && exists ? inverses[co] : 1.0f;
    shifts[i] = exists && bias != nullptr ? to_float(bias[co]) : -0.0f;
  }
  float zeros[4] = {factors[0] * 0.0f, factors[1] * 0.0f};  // or NaN
#pragma unroll
  for (int i = 0; i < M::PIXELS / 2; ++i) zeros[i % 4] = fmaf(sum[i], 0.0f, zeros[i % 4]);

  Place at(task.first + mine.first_pixel + 2 * t, plan);
  T* y;  // where column 0 of the row would lie
  int columns_left;
  const auto begin_row = [&] {
    const int64_t image = static_cast<int64_t>(at.n) * p.out_channels * plane;
    const int64_t pixel =
        static_cast<int64_t>(task.along_h.first + at.row * period_h) * p.out_width +
        task.along_w.first + task.first_column * period_w;
    y = output + image + (task.group * group_out + first_co) * channel_step + pixel * column_step;
    columns_left = at.n < p.batch && at.row < task.along_h.count ? last_column : 0;
  };
  begin_row();
  // Calls store(j, exists, exists) for the columns 8 j and 8 j + 1 from the lane's first on.
  const auto for_all = [&](auto count, const auto& store) {
#pragma unroll
    for (int j = 0; j < decltype(count)::value; ++j) {
      store(j, at.column < columns_left, at.column + 1 < columns_left);
      at.column += 8;
      if (at.column >= plan.pitch) {
        do {
          at.move(1, -plan.pitch, plan);
        } while (at.column >= plan.pitch);
        begin_row();
      }
    }
  };
  const auto output_of = [&](int i, int channel) {
    return fmaf(sum[i], factors[channel], shifts[channel]);
  };
  // Stores outputs of the lane's two channels (a and b of the first, c and d of the second) at a
  // place and `step` behind it.
  const auto store_four = [&](auto in_pairs, T* to, int step, bool is_left, bool is_right, float a,
                              float b, float c, float d) {
    if constexpr (decltype(in_pairs)::value && LAST) {
      if (is_left && has_first) store_both(to, a, c);
      if (is_right && has_first) store_both(to + step, b, d);
    } else if constexpr (decltype(in_pairs)::value) {
      if (is_left && has_first) store_both(to, a, b);
      if (is_left && has_second) store_both(to + next_channel, c, d);
    } else {
      if (is_left && has_first) set_rounded(to[0], a);
      if (is_right && has_first) set_rounded(to[step], b);
      if (is_left && has_second) set_rounded(to[next_channel], c);
      if (is_right && has_second) set_rounded(to[next_channel + step], d);
    }
  };
  const auto store_all = [&](auto in_pairs) {
    for_all(std::integral_constant<int, M::PIXELS / 8>{}, [&](int j, bool is_left, bool is_right) {
      store_four(in_pairs, y + static_cast<int64_t>(at.column) * next_column, next_column, is_left,
                 is_right, output_of(4 * j, 0), output_of(4 * j + 1, 0), output_of(4 * j + 2, 1),
                 output_of(4 * j + 3, 1));
    });
  };
  // The same for two phases, whose outputs are neighbours.
  const auto store_phases = [&](auto in_pairs) {
    constexpr int SECOND = M::PIXELS / 4;
    for_all(std::integral_constant<int, M::PIXELS / 16>{}, [&](int j, bool is_left, bool is_right) {
      T* const to = y + static_cast<int64_t>(at.column) * next_column;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool exists = i == 0 ? is_left : is_right;
        store_four(in_pairs, to + i * next_column, column_step, exists, exists,
                   output_of(4 * j + i, 0), output_of(SECOND + 4 * j + i, 0),
                   output_of(4 * j + i + 2, 1), output_of(SECOND + 4 * j + i + 2, 1));
      }
    });
  };
  // Of a pair, both exist: rows, or a group's channels, have no single one at their end.
  const bool is_aligned = reinterpret_cast<uintptr_t>(output) % (2 * sizeof(T)) == 0;
  const bool has_pairs = LAST ? group_out % 2 == 0 : p.out_width % 2 == 0;
  if (M::MAX_PAIR > 1 && plan.pair > 1) {
    if (is_aligned && has_pairs) {
      store_phases(std::true_type{});
    } else {
      store_phases(std::false_type{});
    }
  } else if (is_aligned && has_pairs && (LAST || period_w == 1)) {
    store_all(std::true_type{});
  } else {
    store_all(std::false_type{});
  }
  return zeros[0] + zeros[1] + zeros[2] + zeros[3] == 0.0f;
}

// Multiplies and stores.
template <class M>
__device__ __forceinline__ void multiply_tiles(const Shared<M>& shared, int warpgroup,
                                               const typename M::Value* __restrict__ bias,
                                               const float* inverses,
                                               typename M::Value* __restrict__ output, char* flags,
                                               const ConvTransposeProblem& p, const Plan& plan,
                                               const Axis& rows, const Axis& columns) {
  Multiplier mine = {warpgroup, plan.shares_pixels ? 0 : warpgroup * (plan.tile_pixels / 2),
                     plan.shares_pixels ? warpgroup : 0};
  M::begin(warpgroup);
  wait_for_last_kernel();  // it clears the flags, too
  for (unsigned bundle = blockIdx.x; bundle < plan.bundles; bundle += gridDim.x) {
    const Turn first_turn = mine.inputs_turn;
    for (int task_of_bundle = 0; task_of_bundle < plan.bundle; ++task_of_bundle) {
      const unsigned number = bundle * plan.bundle + task_of_bundle;
      const bool is_last = task_of_bundle + 1 == plan.bundle;  // others read the inputs again
      Product<M::PIXELS> sum;
#pragma unroll
      for (int i = 0; i < M::PIXELS / 2; ++i) sum[i] = 0.0f;
      {  // registers are short: storing finds the task anew
        const Task task(number, plan, shared.barriers->phases);
        if (!task.is_empty<M>(number, plan, shared.barriers->phases)) {
          mine.inputs_turn = first_turn;
          M::multiply_task(sum, mine, shared, task, number, plan, is_last);
        } else if (is_last && plan.bundle > 1) {
          mine.inputs_turn = first_turn;
          for (int stage = 0; stage < plan.stages; ++stage) {
            leave(&shared.barriers->inputs_empty[mine.inputs_turn.index]);
            mine.inputs_turn.next(plan.buffers);
          }
        }
      }
      const Task task(number, plan, shared.barriers->phases);
      // Infinities, or numbers too far apart: another kernel looks at them.
      if (!store_tile<M>(sum, mine, bias, inverses, output, task, p, plan, rows, columns)) {
        flags[number] = SOME;
      }
    }
  }
}

#endif  // HAS_WGMMA

template <class M>
__global__ void __launch_bounds__(THREADS, 1)
    hopper_kernel(const typename M::Value* __restrict__ input,
                  const typename M::Value* __restrict__ bias, const float* inverses,
                  const char* __restrict__ packed, typename M::Value* __restrict__ output,
                  char* flags, ConvTransposeProblem p, Axis rows, Axis columns, Plan plan) {
#if HAS_WGMMA
  extern __shared__ __align__(128) char memory[];
  const Shared<M> shared(memory, plan);
  shared.barriers->phases.find(plan, rows, columns);
  let_next_kernel_begin();  // converting needs nothing of the last one
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.buffers; ++i) {
      initialise(&shared.barriers->inputs_full[i], copies_inputs<M>(plan) ? CONVERTERS : 1);
      initialise(&shared.barriers->inputs_empty[i], 4 * MULTIPLIERS);
      initialise(&shared.barriers->multiplied[i], 4);
      shared.barriers->inverses[i] = 1.0f;  // for inputs without a scale
    }
    for (int supply = 0; supply < M::SUPPLIES; ++supply) {
      for (int i = 0; i < RING; ++i) {
        initialise(&shared.barriers->weights_full[supply][i], 1);
        initialise(&shared.barriers->weights_empty[supply][i], 4 * MULTIPLIERS / M::SUPPLIES);
      }
    }
    show_tensor_cores();
  }
  __syncthreads();
  // The same in all lanes, and the compiler is to know it.
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (warpgroup < PRODUCERS / 128) {
    keep_registers<256 - M::MULTIPLIER_REGISTERS>();  // of 65536 in all
    if (threadIdx.x < CONVERTERS) {
      constexpr Reading OCTETS = M::IS_LAST ? Reading::CHANNELS : Reading::ROWS;
      if (copies_inputs<M>(plan)) {
        if constexpr (M::IS_LAST && !M::IS_SCALED) {
          copy_inputs<M>(shared, input, p, plan, rows, columns, threadIdx.x);
        }
      } else if (plan.reads_octets) {
        bring_inputs<M, OCTETS>(shared, input, p, plan, rows, columns, threadIdx.x);
      } else {
        bring_inputs<M, Reading::VALUES>(shared, input, p, plan, rows, columns, threadIdx.x);
      }
    } else if (threadIdx.x == CONVERTERS) {
      bring_weights<M>(shared, packed, plan);
    }
  } else {
    take_registers<M::MULTIPLIER_REGISTERS>();
    multiply_tiles<M>(shared, warpgroup - PRODUCERS / 128, bias, inverses, output, flags, p, plan,
                      rows, columns);
  }
#else
  // Not compiled for Hopper: the definition has to do.
  if (threadIdx.x > 0) return;
  for (unsigned i = blockIdx.x; i < plan.tasks; i += gridDim.x) flags[i] = ALL;
#endif
}

// Sums outputs again, by the definition: those of tiles that have a flag.
template <class M>
__global__ void __launch_bounds__(REPAIRERS, 2)
    hopper_repair_kernel(const typename M::Value* __restrict__ input,
                         const typename M::Value* __restrict__ weight,
                         const typename M::Value* __restrict__ bias, typename M::Value* output,
                         const char* flags, ConvTransposeProblem p, Axis rows, Axis columns,
                         Plan plan) {
  const int group_out = p.out_channels / p.groups;
  const int pixels = plan.tile_pixels, count_co = CO * plan.tile_parts();
  wait_for_last_kernel();
  const auto repair = [&](unsigned number, char flag) {
    for (int second = 0; second < (M::MAX_PAIR > 1 ? plan.pair : 1); ++second) {
      const Task task(number, plan, AxisPhases{rows, columns}, second);
      for (int i = threadIdx.x; i < count_co * pixels; i += REPAIRERS) {
        const Place at(task.first + i % pixels, plan);
        const int co = task.part_co * count_co + i / pixels;
        const int column = task.first_column + at.column;
        if (co >= group_out || at.n >= p.batch || at.row >= task.along_h.count ||
            at.column >= plan.stripe || column >= task.along_w.count) {
          continue;
        }
        const int oh = task.along_h.first + at.row * period_of(rows);
        const int ow = task.along_w.first + column * period_of(columns);
        const int channel = task.group * group_out + co;
        if (flag == ALL) {
          set_rounded(output[tensor::place_of_output<M::IS_LAST>(p, at.n, channel, oh, ow)],
                      not_a_number());
        }
        tensor::sum_again<M::IS_LAST>(output, input, weight, bias, p, rows, columns, at.n, channel,
                                      oh, ow);
      }
    }
  };
  for (unsigned first = blockIdx.x; first < plan.tasks; first += gridDim.x * REPAIRERS) {
    // Mostly there is none, so all threads look at once.
    const unsigned mine = first + threadIdx.x * gridDim.x;
    if (!__syncthreads_or(mine < plan.tasks && flags[mine] != NONE)) continue;
    for (unsigned i = 0, number = first; i < REPAIRERS && number < plan.tasks;
         ++i, number += gridDim.x) {
      if (flags[number] != NONE) repair(number, flags[number]);
    }
  }
}

// ---- Launch ------------------------------------------------------------------------------------

// The packed weights: inverses of scales, weights, flags of tiles.
template <class M>
struct Packed {
  int64_t owners, inverses_bytes, weights_bytes, bytes;

  Packed(const ConvTransposeProblem& p, const Plan& plan)
      : owners(static_cast<int64_t>(p.groups) * plan.phases_h * plan.phases_w * plan.parts_co),
        inverses_bytes(M::IS_SCALED ? ceil_div(p.out_channels, 64) * 256 : 0),
        weights_bytes(owners * (M::SHARES_WEIGHTS ? 1 : plan.tile_parts()) * plan.supply_bytes()),
        bytes(inverses_bytes + weights_bytes + plan.tasks) {}
};

#ifdef __CUDA_ARCH_LIST__
namespace {

// Whether kernels can begin early, also where they are captured in a graph: it takes a driver of
// CUDA 12.3 or later, which has edges of that kind.
bool can_begin_early() {
  static const bool can = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  return can;
}

}  // namespace
#endif

// Starts a kernel when all blocks of the one before have said that it may begin. What it needs of
// that one, it waits for (wgmma.cuh), if it is compiled for nothing but GPUs where it can.
template <class... P, class... A>
void start_early(void (*kernel)(P...), unsigned blocks, int threads, std::size_t shared_bytes,
                 cudaStream_t stream, const A&... arguments) {
#ifdef __CUDA_ARCH_LIST__
  constexpr int ARCHITECTURES[] = {__CUDA_ARCH_LIST__};  // the oldest comes first
  if (ARCHITECTURES[0] >= 900 && can_begin_early()) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, P(arguments)...);  // cudaGetLastError() tells
    return;
  }
#endif
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
}

template <class M, class T = typename M::Value>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output, void* memory,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  if (!make_plan<M>(p, rows, columns, plan)) return cudaErrorInvalidValue;
  const std::size_t aligned = M::IS_LAST ? 16 : M::UNIT * sizeof(T);
  choose_units<M>(p, columns, reinterpret_cast<uintptr_t>(input) % aligned == 0, plan);
  choose_steps(plan);
  const Packed<M> packed(p, plan);
  const int64_t octets = static_cast<int64_t>(p.groups) * plan.parts_co * plan.tile_parts() * CO *
                         2 * plan.stages * plan.subchunks * p.kernel_h * p.kernel_w;
  const auto shared_bytes = static_cast<std::size_t>(Shared<M>::bytes(plan));
  const cudaError_t error = allow_shared_bytes(hopper_kernel<M>, shared_bytes);
  if (error != cudaSuccess) return error;

  float* const inverses = static_cast<float*>(memory);
  char* const weights = static_cast<char*>(memory) + packed.inverses_bytes;
  char* const flags = weights + packed.weights_bytes;
  const unsigned sms = multiprocessors();
  const auto packers = static_cast<unsigned>(min(ceil_div(octets, PACKERS), int64_t{8} * sms));
  if constexpr (M::IS_SCALED) {
    hopper_scale_kernel<<<static_cast<unsigned>(p.out_channels), SCALERS, 0, stream>>>(weight,
                                                                                       inverses, p);
    start_early(hopper_pack_kernel<M>, packers, PACKERS, sizeof(Phases), stream, weight, inverses,
                weights, flags, p, rows, columns, plan, octets);
  } else {
    hopper_pack_kernel<M><<<packers, PACKERS, sizeof(Phases), stream>>>(
        weight, inverses, weights, flags, p, rows, columns, plan, octets);
  }
  // Blocks stay, and take one tile after the other.
  const unsigned blocks = min(plan.bundles, sms);
  start_early(hopper_kernel<M>, blocks, THREADS, shared_bytes, stream, input, bias, inverses,
              weights, output, flags, p, rows, columns, plan);
  start_early(hopper_repair_kernel<M>, blocks, REPAIRERS, 0, stream, input, weight, bias, output,
              flags, p, rows, columns, plan);
  return cudaGetLastError();
}

// Calls use(method) with the method whose plan costs least.
template <class M, class Use>
auto with_cheapest(const ConvTransposeProblem&, const Use& use) {
  return use(M{});
}
template <class M, class Other, class Use>
auto with_cheapest(const ConvTransposeProblem& p, const Use& use) {
  Plan plan = {}, other = {};
  const Axis rows = rows_of(p), columns = columns_of(p);
  const bool is_covered = make_plan<M>(p, rows, columns, plan);
  const bool has_other = make_plan<Other>(p, rows, columns, other);
  return has_other && (!is_covered || other.cost < plan.cost) ? use(Other{}) : use(M{});
}

// Calls use(problem, image) for the images that are computed at once, from `image` on: mostly all
// of them, or as many as are few enough (fits_a_launch). Ends where it returns false.
template <class M, class... Others, class Use>
void for_launches(const ConvTransposeProblem& p, const Use& use) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  int images = p.batch;
  while (images > 1 && !fits_a_launch<M>(p, rows, columns, images)) images = (images + 1) / 2;
  ConvTransposeProblem part = p;
  for (int image = 0; image < p.batch; image += images) {
    part.batch = min(images, p.batch - image);
    if (!use(part, image)) return;
  }
}

template <class... Methods>
int64_t packed_bytes(const ConvTransposeProblem& p) {
  int64_t most = -1;
  for_launches<Methods...>(p, [&](const ConvTransposeProblem& part, int) {
    const int64_t bytes = with_cheapest<Methods...>(part, [&](auto method) -> int64_t {
      using M = decltype(method);
      Plan plan = {};
      return make_plan<M>(part, rows_of(part), columns_of(part), plan) ? Packed<M>(part, plan).bytes
                                                                       : -1;
    });
    most = bytes < 0 ? -1 : max(most, bytes);
    return bytes >= 0;
  });
  return most;
}

// Launches that follow one another use the same memory for packed weights.
template <class... Methods, class T>
cudaError_t launch_cheapest(const T* input, const T* weight, const T* bias, T* output, void* packed,
                            const ConvTransposeProblem& p, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  for_launches<Methods...>(p, [&](const ConvTransposeProblem& part, int image) {
    const int64_t inputs = static_cast<int64_t>(p.in_channels) * p.height * p.width;
    const int64_t outputs = static_cast<int64_t>(p.out_channels) * p.out_height * p.out_width;
    error = with_cheapest<Methods...>(part, [&](auto method) {
      return launch<decltype(method)>(input + image * inputs, weight, bias,
                                      output + image * outputs, packed, part, stream);
    });
    return error == cudaSuccess;
  });
  return error;
}

}  // namespace warpgroups

// A launcher for a method or two, and how much memory its packed weights take, in bytes (-1 if it
// is not for the problem).
#define HOPPER_LAUNCHER(NAME, T, ...)                                                       \
  extern "C" int64_t NAME##_packed_bytes(ConvTransposeProblem p) {                          \
    return warpgroups::packed_bytes<__VA_ARGS__>(p);                                        \
  }                                                                                         \
  extern "C" cudaError_t NAME(const T* input, const T* weight, const T* bias, T* output,    \
                              void* packed, ConvTransposeProblem p, cudaStream_t stream) {  \
    return warpgroups::launch_cheapest<__VA_ARGS__>(input, weight, bias, output, packed, p, \
                                                    stream);                                \
  }
