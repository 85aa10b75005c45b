// No rung of the ladder: Hopper's tensor cores (warpgroups.cuh), each value multiplied once.
//
// Float16 and bfloat16 as they are; float32 rounded to float16's 11 significant bits, which are
// TF32's, at twice TF32's rate. TF32 also has float32's range: a scale for each tile and chunk
// stands in for that, and sums are in units of the last one. All of a tile's products are summed by
// the tensor cores, which cut off: long sums of one sign err by that most.

#include "warpgroups.cuh"

namespace warpgroups {

template <class T, bool LAST>
struct Single : Method<T, LAST, 1, 192, 1, 2> {
#if HAS_WGMMA
  using Base = Method<T, LAST, 1, 192, 1, 2>;
  using Base::PIXELS;

  __device__ __forceinline__ static void begin(int) {}

  __device__ __forceinline__ static void multiply_task(Product<PIXELS>& sum, Multiplier& mine,
                                                       const Shared<Single>& shared,
                                                       const Task& task, unsigned number,
                                                       const Plan& plan, bool is_last) {
    using Part = typename Base::Part;
    if (plan.pair == 1) {
      const Way way(task, plan);
      multiply_stages(sum, mine, shared, plan, is_last, [&] {
        multiply_steps(sum, mine, shared, task, way, plan,
                       [&](uint64_t a, uint64_t b) { multiply<Part>(sum, a, b); });
      });
    } else {
      // Two phases have half of the columns each.
      const Task second(number, plan, shared.barriers->phases, 1);
      const Way way(task, plan), other_way(second, plan);
      multiply_stages(sum, mine, shared, plan, is_last, [&] {
        multiply_steps(sum, mine, shared, task, way, plan, [&](uint64_t a, uint64_t b) {
          multiply<Part>(half_of<PIXELS>(sum, 0), a, b);
        });
        multiply_steps(sum, mine, shared, second, other_way, plan, [&](uint64_t a, uint64_t b) {
          multiply<Part>(half_of<PIXELS>(sum, 1), a, b);
        });
      });
    }
  }

  // Calls multiply_stage() where a stage's inputs are there.
  template <class Multiply>
  __device__ __forceinline__ static void multiply_stages(Product<PIXELS>& sum, Multiplier& mine,
                                                         const Shared<Single>& shared,
                                                         const Plan& plan, bool is_last,
                                                         const Multiply& multiply_stage) {
    Barriers& barriers = *shared.barriers;
    const bool stays_behind = !LAST && plan.bundle == 1 && plan.buffers > 2;
    float unit, least_unit;
    for (int stage = 0; stage < plan.stages; ++stage) {
      wait(&barriers.inputs_full[mine.inputs_turn.index], mine.inputs_turn.parity);
      // The second warpgroup stays behind: it multiplies while the first stores its outputs. Where
      // channels come last, storing takes too little for that.
      uint64_t* const multiplied = &barriers.multiplied[mine.inputs_turn.index];
      if (stays_behind && mine.warpgroup == 1) wait(multiplied, mine.inputs_turn.parity);
      // Sums go over to the stage's unit. Where those of an earlier stage might lose digits, all is
      // summed again. Without scales this changes nothing, but for what the compiler makes of it.
      const float inverse = barriers.inverses[mine.inputs_turn.index];
      least_unit = stage == 0 ? inverse : fminf(least_unit, inverse);
      const float ratio = stage == 0 ? 1.0f : unit / inverse;
      const float factor = least_unit / inverse >= 0x1p-100f ? ratio : not_a_number();
#pragma unroll
      for (int i = 0; i < PIXELS / 2; ++i) sum[i] *= factor;
      unit = inverse;
      begin_products();
      multiply_stage();
      if (stays_behind && mine.warpgroup == 0) leave(multiplied);
      if (is_last) leave(&barriers.inputs_empty[mine.inputs_turn.index]);
      mine.inputs_turn.next(plan.buffers);
    }
#pragma unroll
    for (int i = 0; i < PIXELS / 2; ++i) sum[i] *= unit;
  }

  // Adds the products of a stage's steps.
  template <class Multiply>
  __device__ __forceinline__ static void multiply_steps(Product<PIXELS>& sum, Multiplier& mine,
                                                        const Shared<Single>& shared,
                                                        const Task& task, const Way& way,
                                                        const Plan& plan,
                                                        const Multiply& multiply_step) {
    if (task.steps == 0) return;
    Barriers& barriers = *shared.barriers;
    const int next_a = plan.step_bytes / 16;
    Position b = {mine.inputs(shared, plan, task)};
    uint64_t* last = nullptr;
    for (int step = 0; step < task.steps; step += plan.slot_steps) {
      wait(&barriers.weights_full[mine.warpgroup][mine.weights_turn.index],
           mine.weights_turn.parity);
      const uint32_t a = mine.weights(shared, plan);
      const int count = min(plan.slot_steps, task.steps - step);
      const auto go_on = [&](int i) {
        multiply_step(descriptor(a + i * next_a, CO), descriptor(b.address, plan.region));
        b.go_on(way);
      };
      // In pairs, which take turns with the other warpgroup's.
      if (count % 2 != 0) go_on(0);
#pragma unroll 1
      for (int i = count % 2; i < count; i += 2) {
        go_on(i);
        go_on(i + 1);
      }
      send_products();
      // The products before these are finished then.
      finish_products<1>(sum);
      if (last != nullptr) leave(last);
      last = &barriers.weights_empty[mine.warpgroup][mine.weights_turn.index];
      mine.weights_turn.next(RING);
    }
    finish_products(sum);
    leave(last);
  }
#endif
};

}  // namespace warpgroups

HOPPER_LAUNCHER(hopper_single, float, warpgroups::Single<float, false>)
HOPPER_LAUNCHER(hopper_single_channels_last, float, warpgroups::Single<float, true>)
HOPPER_LAUNCHER(hopper_single_float16, __half, warpgroups::Single<__half, false>)
HOPPER_LAUNCHER(hopper_single_float16_channels_last, __half, warpgroups::Single<__half, true>)
HOPPER_LAUNCHER(hopper_single_bfloat16, __nv_bfloat16, warpgroups::Single<__nv_bfloat16, false>)
HOPPER_LAUNCHER(hopper_single_bfloat16_channels_last, __nv_bfloat16,
                warpgroups::Single<__nv_bfloat16, true>)
