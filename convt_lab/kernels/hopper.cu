// Hopper's tensor cores (warpgroups.cuh), with the accuracy of float32.
//
// Since tensor_core_split: operands stay in shared memory, where a tap is another address. So an
// input is converted once for all taps, and no warp loads a fragment. And three products do: a
// float32 is split in two halves, x s = x0 + x1 / 2048, with a power of two s that brings a chunk's
// largest input near 2^14. x0 w0 + (x0 w1 + x1 w0) / 2048 leaves out less than 2^-22 of x w. Tensor
// cores cut off what they sum; so every few taps the sum so far, divided by s, is added to
// registers with rounding. That errs to one side, so it adds up where all products have one sign.
//
// Cost: for a tap and 16 input channels a warpgroup multiplies 64 output channels by 152 pixels
// with three instructions of 155,648 FMAs each. A lane loads nothing, and adds 76 sums every four
// taps.
//
// Of eight channels, small ones keep fewer digits if the largest is more than 2^26 times as large.

#include "warpgroups.cuh"

namespace warpgroups {

// The warpgroups take turns: while the products of one are on their way, the other adds what it has
// to its sums. A task has one phase, or two, which are summed one after the other: so their partial
// sums take half of the registers.
template <bool LAST, int PAIR>
struct Halves : Method<float, LAST, 2, PAIR == 1 ? 152 : 192, PAIR, PAIR> {
#if HAS_WGMMA
  using Base = Method<float, LAST, 2, PAIR == 1 ? 152 : 192, PAIR, PAIR>;
  using Base::PIXELS;
  static constexpr int ROUNDED = 4;  // steps after which sums are rounded
  static constexpr int TURN = 2;  // barrier of the first warpgroup's turn; the next is the second's

  __device__ __forceinline__ static void begin(int warpgroup) {
    if (warpgroup == 1) let_go<128 * MULTIPLIERS>(TURN);
  }

  __device__ __forceinline__ static void multiply_task(Product<PIXELS>& sum, Multiplier& mine,
                                                       const Shared<Halves>& shared,
                                                       const Task& task, unsigned number,
                                                       const Plan& plan, bool is_last) {
    const Way way(task, plan);
    if constexpr (PAIR == 1) {
      multiply_stages(mine, shared, plan, is_last, [&](float inverse) {
        multiply_steps<PIXELS>(sum, inverse, mine, shared, task, way, plan);
      });
    } else {
      const Task second(number, plan, shared.barriers->phases, 1);
      const Way other_way(second, plan);
      multiply_stages(mine, shared, plan, is_last, [&](float inverse) {
        multiply_steps<PIXELS / 2>(half_of<PIXELS>(sum, 0), inverse, mine, shared, task, way, plan);
        multiply_steps<PIXELS / 2>(half_of<PIXELS>(sum, 1), inverse, mine, shared, second,
                                   other_way, plan);
      });
    }
  }

  // Calls multiply_stage(inverse of the inputs' scale) where a stage's inputs are there.
  template <class Multiply>
  __device__ __forceinline__ static void multiply_stages(Multiplier& mine,
                                                         const Shared<Halves>& shared,
                                                         const Plan& plan, bool is_last,
                                                         const Multiply& multiply_stage) {
    Barriers& barriers = *shared.barriers;
    for (int stage = 0; stage < plan.stages; ++stage) {
      wait(&barriers.inputs_full[mine.inputs_turn.index], mine.inputs_turn.parity);
      multiply_stage(barriers.inverses[mine.inputs_turn.index]);
      if (is_last) leave(&barriers.inputs_empty[mine.inputs_turn.index]);
      mine.inputs_turn.next(plan.buffers);
    }
  }

  // Adds the products of a stage's steps.
  template <int COLUMNS>
  __device__ __forceinline__ static void multiply_steps(Product<COLUMNS>& sum, float inverse,
                                                        Multiplier& mine,
                                                        const Shared<Halves>& shared,
                                                        const Task& task, const Way& way,
                                                        const Plan& plan) {
    Barriers& barriers = *shared.barriers;
    const int second_b = plan.octets() * plan.region, second_a = PART_BYTES / 16;
    const int next_a = plan.step_bytes / 16;
    Position b = {mine.inputs(shared, plan, task)};
    Product<COLUMNS> part;
    for (int step = 0; step < task.steps; step += plan.slot_steps) {
      wait(&barriers.weights_full[0][mine.weights_turn.index], mine.weights_turn.parity);
      const uint32_t a = mine.weights(shared, plan);
      const int count = min(plan.slot_steps, task.steps - step);
      // Sums up the products of steps from number `begin` of the slot on to number `end`.
      const auto sum_up = [&](int begin, int end, const auto& first, const auto& others) {
        wait_turn<128 * MULTIPLIERS>(TURN + mine.warpgroup);
        begin_products();
        first(a + begin * next_a, b.address);
        b.go_on(way);
#pragma unroll 1
        for (int i = begin + 1; i < end; ++i) {
          others(a + i * next_a, b.address);
          b.go_on(way);
        }
        send_products();
        let_go<128 * MULTIPLIERS>(TURN + 1 - mine.warpgroup);
        finish_products(part);
      };
      const auto add_to_sum = [&] {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) sum[i] = fmaf(part[i], inverse, sum[i]);
      };
      const auto multiply_large = [&](uint32_t w, uint32_t x) {
        multiply<__half>(part, descriptor(w, CO), descriptor(x, plan.region));
      };
      // First the small products. The large ones of the first steps go on from their sum.
      const Position here = b;
      sum_up(
          0, count,
          [&](uint32_t w, uint32_t x) {
            multiply_first<__half>(part, descriptor(w + second_a, CO), descriptor(x, plan.region));
            multiply<__half>(part, descriptor(w, CO), descriptor(x + second_b, plan.region));
          },
          [&](uint32_t w, uint32_t x) {
            multiply<__half>(part, descriptor(w + second_a, CO), descriptor(x, plan.region));
            multiply<__half>(part, descriptor(w, CO), descriptor(x + second_b, plan.region));
          });
      b = here;
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) part[i] *= 1.0f / SECOND_SCALE;
      int done = min(ROUNDED, count);
      sum_up(0, done, multiply_large, multiply_large);
      add_to_sum();
      for (; done < count; done += ROUNDED) {
        sum_up(
            done, min(done + ROUNDED, count),
            [&](uint32_t w, uint32_t x) {
              multiply_first<__half>(part, descriptor(w, CO), descriptor(x, plan.region));
            },
            multiply_large);
        add_to_sum();
      }
      leave(&barriers.weights_empty[0][mine.weights_turn.index]);
      mine.weights_turn.next(RING);
    }
  }
#endif
};

}  // namespace warpgroups

HOPPER_LAUNCHER(hopper, float, warpgroups::Halves<false, 1>, warpgroups::Halves<false, 2>)
HOPPER_LAUNCHER(hopper_channels_last, float, warpgroups::Halves<true, 1>)
