// No rung of the ladder yet: Hopper's tensor cores (warpgroups.cuh), with the accuracy of float32.
//
// Float32 is split in two halves: x s = x0 + x1 / 2048, with a power of two s that brings a chunk's
// largest input near 2^14. x0 w0 + (x0 w1 + x1 w0) / 2048 leaves out less than 2^-22 of x w. Tensor
// cores cut off what they sum; so every few taps the sum so far, divided by s, is added to
// registers with rounding. That errs to one side, so it adds up where all products have one sign.
//
// Of eight channels, small ones keep fewer digits if the largest is more than 2^26 times as large.

#include "warpgroups.cuh"

namespace warpgroups {

// The warpgroups take turns: while the products of one are on their way, the other adds what it has
// to its sums.
template <bool LAST>
struct Halves : Method<float, LAST, 2, 152> {
#if HAS_WGMMA
  using Method<float, LAST, 2, 152>::PIXELS;
  static constexpr int ROUNDED = 4;  // steps after which sums are rounded
  static constexpr int TURN = 2;  // barrier of the first warpgroup's turn; the next is the second's

  __device__ __forceinline__ static void begin(int warpgroup) {
    if (warpgroup == 1) let_go<128 * MULTIPLIERS>(TURN);
  }

  __device__ __forceinline__ static void multiply_task(Product<PIXELS>& sum, Multiplier& mine,
                                                       const Shared<Halves>& shared,
                                                       unsigned number, const Plan& plan,
                                                       const Axis& rows, const Axis& columns,
                                                       bool is_last) {
    const Task task(number, plan, rows, columns);
    Barriers& barriers = *shared.barriers;
    const Way way(task, plan);
    const int second_b = plan.octets() * plan.region, second_a = PART_BYTES / 16;
    const int next_a = plan.step_bytes / 16;
    for (int stage = 0; stage < plan.stages; ++stage) {
      wait(&barriers.inputs_full[mine.inputs_turn.index], mine.inputs_turn.parity);
      const float inverse = barriers.inverses[mine.inputs_turn.index];
      Position b = {mine.inputs(shared, plan, task)};
      Product<PIXELS> part;
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
          for (int i = 0; i < PIXELS / 2; ++i) sum[i] = fmaf(part[i], inverse, sum[i]);
        };
        const auto multiply_large = [&](uint32_t w, uint32_t x) {
          multiply<__half>(part, descriptor(w, CO), descriptor(x, plan.region));
        };
        // First the small products. The large ones of the first steps go on from their sum.
        const Position here = b;
        sum_up(
            0, count,
            [&](uint32_t w, uint32_t x) {
              multiply_first<__half>(part, descriptor(w + second_a, CO),
                                     descriptor(x, plan.region));
              multiply<__half>(part, descriptor(w, CO), descriptor(x + second_b, plan.region));
            },
            [&](uint32_t w, uint32_t x) {
              multiply<__half>(part, descriptor(w + second_a, CO), descriptor(x, plan.region));
              multiply<__half>(part, descriptor(w, CO), descriptor(x + second_b, plan.region));
            });
        b = here;
#pragma unroll
        for (int i = 0; i < PIXELS / 2; ++i) part[i] *= 1.0f / SECOND_SCALE;
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
      if (is_last) leave(&barriers.inputs_empty[mine.inputs_turn.index]);
      mine.inputs_turn.next(plan.buffers);
    }
  }
#endif
};

}  // namespace warpgroups

HOPPER_LAUNCHER(hopper, float, warpgroups::Halves<false>)
HOPPER_LAUNCHER(hopper_channels_last, float, warpgroups::Halves<true>)
