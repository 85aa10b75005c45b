// What Hopper's kernels do with addresses, in plain loops: each output that a task stores is summed
// from the inputs that its steps' addresses lead to, with the taps in their packed order.

#include <vector>

#include "hopper.cu"
#include "hopper_single.cu"

namespace warpgroups {

enum Result { RIGHT, NOT_COVERED, OUT_OF_REGION, WRONG_CHANNEL, STORED_TWICE };

// Changes the plan so that all owners of a tile share its inputs, if they can.
template <class M>
bool make_bundles(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                  Plan& plan) {
  const Reach along_h(rows, plan.phases_h), along_w(columns, plan.phases_w);
  plan.bundle = plan.phases_h * plan.tasks_w * plan.parts_co;
  plan.has_origin = 1;
  return plan.bundle > 1 && rows.i_step == 1 && columns.i_step == 1 && plan.stages <= MAX_BUFFERS &&
         cut<M>(p, rows, columns, plan.stripes, along_h, along_w, along_h.more, along_w.more,
                lead_of(along_w.first, plan.unit), plan);
}

template <class M>
Result emulate(const double* input, const double* weight, double* output, ConvTransposeProblem p,
               bool in_bundles, int* about) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  if (!make_plan<M>(p, rows, columns, plan)) return NOT_COVERED;
  if (in_bundles && !make_bundles<M>(p, rows, columns, plan)) return NOT_COVERED;
  about[0] = plan.pair;
  about[1] = plan.bundle;
  about[2] = plan.stripes;
  about[3] = plan.unit;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int plane = p.height * p.width, pixels = M::PIXELS / plan.pair;
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  std::vector<int> places(plan.region);
  for (unsigned number = 0; number < plan.tasks; ++number) {
    const Task leader(number / plan.bundle * plan.bundle, plan, AxisPhases{rows, columns});
    for (int i = 0; i < plan.region; i += plan.unit) {
      const Place at(leader.first - leader.lead + i + plan.unit - 1, plan);
      const int h = leader.first_h + at.row;
      const int w = leader.first_w + leader.first_column + at.column - (plan.unit - 1);
      const bool exists =
          at.n < p.batch && h >= 0 && h < leader.along_h.size && w >= 0 && w < leader.along_w.size;
      for (int j = 0; j < plan.unit; ++j) {
        places[i + j] = !exists ? -1
                                : at.n * p.in_channels * plane +
                                      (h * rows.i_step + leader.along_h.residue) * p.width +
                                      w * columns.i_step + leader.along_w.residue + j;
      }
    }
    for (int second = 0; second < plan.pair; ++second) {
      const Task task(number, plan, AxisPhases{rows, columns}, second);
      const Way way(task, plan);
      const int taps = task.along_h.taps * task.along_w.taps;
      for (int warpgroup = 0; warpgroup < MULTIPLIERS; ++warpgroup) {
        const int first_pixel = plan.shares_pixels ? 0 : warpgroup * (plan.tile_pixels / 2);
        const int part = plan.shares_pixels ? warpgroup : 0;
        for (int pixel = first_pixel; pixel < first_pixel + pixels; ++pixel) {
          const Place at(task.first + pixel, plan);
          const int last_column = min(plan.stripe, task.along_w.count - task.first_column);
          if (at.n >= p.batch || at.row >= task.along_h.count || at.column >= last_column) continue;
          const int oh = task.along_h.first + at.row * period_of(rows);
          const int ow = task.along_w.first + (task.first_column + at.column) * period_of(columns);
          for (int row = 0; row < CO; ++row) {
            const int co = (task.part_co * plan.tile_parts() + part) * CO + row;
            if (co >= group_out) break;
            double sum = 0;
            for (int stage = 0; stage < plan.stages; ++stage) {
              Position b = {static_cast<uint32_t>(task.offset + pixel)};
              for (int step = 0; step < task.steps; ++step, b.go_on(way)) {
                const int tap_h = task.along_h.taps - 1 - step % taps / task.along_w.taps;
                const int tap_w = task.along_w.taps - 1 - step % taps % task.along_w.taps;
                const int tap = (task.along_h.k + tap_h * rows.k_step) * p.kernel_w +
                                task.along_w.k + tap_w * columns.k_step;
                for (int k = 0; k < CI; ++k) {
                  const int ci = (stage * plan.subchunks + step / taps) * CI + k;
                  const int address = b.address + k / OCTET * plan.region;
                  if (address >= plan.octets() * plan.region) return OUT_OF_REGION;
                  // The plane of octets that the address leads to has to be the channel's.
                  if (address / plan.region != step / taps * 2 + k / OCTET) return WRONG_CHANNEL;
                  const int place = places[address % plan.region];
                  if (ci >= group_in || place < 0) continue;
                  sum +=
                      input[place + static_cast<int64_t>(task.group * group_in + ci) * plane] *
                      weight[(static_cast<int64_t>(task.group * group_in + ci) * group_out + co) *
                                 p.kernel_h * p.kernel_w +
                             tap];
                }
              }
            }
            double& y =
                output[(static_cast<int64_t>(at.n) * p.out_channels + task.group * group_out + co) *
                           out_plane +
                       static_cast<int64_t>(oh) * p.out_width + ow];
            if (y == y) return STORED_TWICE;
            y = sum;
          }
        }
      }
    }
  }
  return RIGHT;
}

}  // namespace warpgroups

// For each kernel; outputs are NaN before. `about` gets what the plan is like: phases of a task,
// tasks of a bundle, stripes, neighbours that are read at once.
#define EMULATE(NAME, ...)                                                                \
  extern "C" int NAME(const double* input, const double* weight, double* output,          \
                      ConvTransposeProblem p, bool in_bundles, int* about) {              \
    return warpgroups::emulate<__VA_ARGS__>(input, weight, output, p, in_bundles, about); \
  }
EMULATE(emulate_hopper, warpgroups::Halves<false, 1>)
EMULATE(emulate_hopper_pairs, warpgroups::Halves<false, 2>)
EMULATE(emulate_hopper_single, warpgroups::Single<float, false>)
