"""The mutants: what each one changes, and the tests of the suite that must fail for it.

The tests are those that exist for their own sake. A mutant of a kernel names tests that build that
kernel alone, because a change of any kernel's file builds all that are used anew.
"""

from __future__ import annotations

from mutants.mutant import Edit, Mutant

EACH_KERNEL = "test_conformance.py::test_each_kernel_in_each_dtype_and_memory_format"
STAGE = "test_stages.py::TestCalls"
RANDOM = "test_stages.py::test_float64_agrees_on_300_random_problems"
EDGES = "test_stages.py::test_the_stars_kernel_at_its_edges"
TOO_LARGE = "test_stages.py::test_kernels_too_large_for_shared_memory"
NO_HAZARDS = "test_hazards.py::test_the_stages_have_none_on_the_random_problems"


def mutant(
    name: str,
    wrong: str,
    file: str,
    old: str,
    new: str,
    *tests: str,
    errors: tuple[str, ...] = (),
    gpus: int = 0,
) -> Mutant:
    """Make a mutant with one change."""
    return Mutant(name, wrong, f"convt_lab/{file}", (Edit(old, new),), tests, errors, gpus)


# ---- Kernels -----------------------------------------------------------------------------------

NAIVE = "kernels/naive_gather.cu"
COALESCED = "kernels/coalesced.cu"
SHARED = "kernels/shared_tiled.cu"
CELLS = "kernels/cells.cuh"
PHASES = "kernels/phases.cuh"
TENSOR_CORE = "kernels/tensor_core.cu"
WARPGROUPS = "kernels/warpgroups.cuh"
HOPPERS_GEOMETRY = "test_kernels.py::TestHoppersGeometry::test_in_both_formats_aligned_or_not"
HOPPERS_WEIGHTS = "test_kernels.py::TestHoppersWeights"

KERNELS = (
    mutant(
        "kernel-flipped",
        "the kernel is turned by 180 degrees, as a convolution has it",
        NAIVE,
        "weight[(filter * p.kernel_h + kh) * p.kernel_w + kw]",
        "weight[(filter * p.kernel_h + p.kernel_h - 1 - kh) * p.kernel_w + p.kernel_w - 1 - kw]",
        f"{STAGE}::test_unbatched[cpu-naive_gather]",
        f"{EACH_KERNEL}[naive_gather-simulator]",
    ),
    mutant(
        "kernel-rows-and-columns-swapped",
        "the kernel is read as [KW, KH]",
        NAIVE,
        "weight[(filter * p.kernel_h + kh) * p.kernel_w + kw]",
        "weight[(filter * p.kernel_w + kw) * p.kernel_h + kh]",
        f"{STAGE}::test_numpy_arrays_give_a_numpy_array[naive_gather]",
    ),
    mutant(
        "channels-of-the-weight-swapped",
        "the weight is read as [C_out, C_in/groups, KH, KW], as a convolution's",
        NAIVE,
        "static_cast<int64_t>(ci) * group_out + co % group_out;",
        "static_cast<int64_t>(co) * group_in + (ci - first_ci);",
        f"{STAGE}::test_positional_arguments_in_pytorchs_order[naive_gather]",
    ),
    mutant(
        "dilation-ignored",
        "the kernel's columns are taken as neighbours, whatever the dilation",
        NAIVE,
        "ow + p.padding_w - kw * p.dilation_w;",
        "ow + p.padding_w - kw;",
        f"{EACH_KERNEL}[naive_gather-simulator]",
        f"{TOO_LARGE}[cpu-(3, 4), stride (1, 1), dilation (300, 300)-naive_gather]",
    ),
    mutant(
        "padding-with-the-wrong-sign",
        "padding moves the output's rows the other way",
        NAIVE,
        "oh + p.padding_h - kh * p.dilation_h;",
        "oh - p.padding_h - kh * p.dilation_h;",
        f"{STAGE}::test_views[cpu-naive_gather]",
    ),
    mutant(
        "bias-of-the-input-channel",
        "the bias is taken as one value for each input channel",
        NAIVE,
        "sum += bias[co];",
        "sum += bias[co % p.in_channels];",
        f"{STAGE}::test_unbatched[cpu-naive_gather]",
    ),
    mutant(
        "right-edge-off-by-one",
        "the last column of the input is taken to lie outside the image",
        NAIVE,
        "w >= p.width) continue;",
        "w >= p.width - 1) continue;",
        f"{STAGE}::test_unbatched[cpu-naive_gather]",
    ),
    mutant(
        "int32-number-of-outputs",
        "the outputs are counted with 32 bits, and more than 2^31 are forgotten",
        NAIVE,
        "const int64_t count = static_cast<int64_t>(p.batch) * p.out_channels * p.out_height * "
        "p.out_width;\n  const auto blocks",
        "const auto count = static_cast<int>(static_cast<int64_t>(p.batch) * p.out_channels * "
        "p.out_height * p.out_width);\n  const auto blocks",
        "test_planning.py::test_as_many_blocks_as_the_images_need[naive_gather]",
    ),
    mutant(
        "int32-offset-of-an-output",
        "an output's place is computed with 32 bits",
        COALESCED,
        "output[(static_cast<int64_t>(plane_out) * p.out_height + oh) * p.out_width + ow]",
        "output[(static_cast<int>(plane_out) * p.out_height + oh) * p.out_width + ow]",
        "test_operator.py::TestOnAGPU::test_an_output_of_more_than_2_to_31_elements[coalesced]",
        errors=("RuntimeError",),
        gpus=1,
    ),
    mutant(
        "groups-ignored",
        "every output channel is computed from the first group's input channels",
        COALESCED,
        "const int first_ci = co / group_out * group_in;",
        "const int first_ci = 0;",
        f"{STAGE}::test_unbatched[cpu-coalesced]",
    ),
    mutant(
        "groups-interleaved",
        "an output channel belongs to group co % groups, not to co / (C_out/groups)",
        COALESCED,
        "const int first_ci = co / group_out * group_in;",
        "const int first_ci = co % p.groups * group_in;",
        f"{EACH_KERNEL}[coalesced-simulator]",
    ),
    mutant(
        "first-image-for-all",
        "every image of the batch is computed from the first",
        COALESCED,
        "(static_cast<int64_t>(n) * p.in_channels + first_ci) * plane_size",
        "static_cast<int64_t>(first_ci) * plane_size",
        f"{STAGE}::test_numpy_arrays_give_a_numpy_array[coalesced]",
    ),
    mutant(
        "output-not-written-where-no-tap-reaches",
        "an output that no tap reaches keeps what was in memory, where zero or the bias belongs",
        COALESCED,
        "  float sum = 0.0f;\n",
        "  if (vertical.count == 0 || horizontal.count == 0) return;\n  float sum = 0.0f;\n",
        f"{TOO_LARGE}[cpu-(2, 2), stride (100, 300), dilation (1, 1)-coalesced]",
    ),
    mutant(
        "bias-dropped",
        "the bias is not added",
        COALESCED,
        "  if (bias != nullptr) sum += bias[co];\n",
        "",
        f"{STAGE}::test_views[cpu-coalesced]",
    ),
    mutant(
        "default-stream-in-a-kernels-launcher",
        "a kernel is started on the default stream, not on the one that its launcher is given",
        COALESCED,
        "dim3(TILE_W, TILE_H), 0, stream>>>(",
        "dim3(TILE_W, TILE_H), 0>>>(",
        "test_kernels.py::test_every_launch_is_on_the_launchers_stream[coalesced.cu]",
    ),
    mutant(
        "last-tap-dropped",
        "the kernel's last row and column are not among the taps of their residue class",
        "kernels/problem.cuh",
        "(axis.kernel - 1 - k) / axis.k_step + 1};",
        "(axis.kernel - 2 - k) / axis.k_step + 1};",
        f"{EACH_KERNEL}[coalesced-simulator]",
    ),
    mutant(
        "wrong-residue-class",
        "the dilation's inverse modulo the stride is taken for 1, as it is for a dilation of 1",
        "kernels/problem.cuh",
        "const int inverse = static_cast<int>((factor % k_step + k_step) % k_step);",
        "const int inverse = 1 % k_step;",
        f"{EACH_KERNEL}[coalesced-simulator]",
    ),
    mutant(
        "barrier-missing-after-the-copies",
        "a block reads its tile before all threads have copied their part",
        SHARED,
        "        __syncthreads();\n\n        const int th_begin",
        "\n        const int th_begin",
        f"{NO_HAZARDS}[shared_tiled-0]",
    ),
    mutant(
        "barrier-missing-before-the-next-copies",
        "a block copies its next tile while some threads still read this one",
        SHARED,
        "        __syncthreads();\n      }\n    }\n  }\n",
        "      }\n    }\n  }\n",
        f"{NO_HAZARDS}[shared_tiled-0]",
    ),
    mutant(
        "last-input-channels-dropped",
        "input channels behind the last whole chunk are left out",
        SHARED,
        "for (int ci0 = 0; ci0 < group_in; ci0 += chunk.ci) {",
        "for (int ci0 = 0; ci0 + chunk.ci <= group_in; ci0 += chunk.ci) {",
        f"{RANDOM}[cpu-0]",
    ),
    mutant(
        "bias-added-for-every-chunk",
        "the bias is added once for each chunk of input channels and taps",
        SHARED,
        "        __syncthreads();\n      }\n    }\n  }\n  if (!inside) return;\n"
        "  if (bias != nullptr) sum += bias[co];\n",
        "        __syncthreads();\n        if (bias != nullptr) sum += bias[co];\n      }\n    }\n"
        "  }\n  if (!inside) return;\n",
        f"{RANDOM}[cpu-0]",
    ),
    mutant(
        "barrier-missing-between-the-buffers",
        "a warp copies into a buffer that others still read, and reads what others still copy",
        "kernels/register_blocked.cu",
        "    __syncthreads();  // this chunk has arrived, and nobody uses the other buffer any "
        "more\n",
        "",
        f"{NO_HAZARDS}[register_blocked-0]",
    ),
    mutant(
        "no-zeros-behind-a-row",
        "on the flat axis a row of inputs ends where the next begins, whose values it reads",
        "kernels/flat.cuh",
        "static_cast<int64_t>(p.width) + p.kernel_w - 1 - p.padding_w;",
        "static_cast<int64_t>(p.width);",
        f"{EDGES}[cpu-(1, 17, 7, 64) (17, 33, 3, 7)]",
    ),
    Mutant(
        "no-zeros-behind-an-image",
        "on the flat axis rows and images lie end to end, and read each other's inputs",
        f"convt_lab/{PHASES}",
        (
            Edit("static_cast<int64_t>(phase.size) + halo", "static_cast<int64_t>(phase.size)"),
            Edit("static_cast<int64_t>(phase.count) + reach", "static_cast<int64_t>(phase.count)"),
        ),
        (f"{RANDOM}[cpu-0]",),
    ),
    mutant(
        "int32-rows-of-all-images",
        "rows of all images are laid on one axis even where 32 bits can't count them",
        "kernels/flat.cuh",
        "max(images_of_tile * max(in_image, out_image), p.batch * rows);",
        "images_of_tile * max(in_image, out_image);",
        "test_planning.py::test_rows_of_all_images_that_32_bits_cannot_count_are_not_one_axis"
        "[kernel_size0-register_blocked]",
    ),
    mutant(
        "weights-of-the-first-chunk-for-all",
        "every chunk of input channels is multiplied by the first one's weights",
        PHASES,
        "    copier.from_w += count * tile.filters_size;\n",
        "",
        f"{RANDOM}[cpu-0]",
    ),
    mutant(
        "products-with-zeros-beyond-the-edge",
        "an infinite weight is multiplied by zeros beyond the image's edge, which gives NaN",
        PHASES,
        "  if (!not_a_number) return;\n",
        "  return;\n",
        "test_stages.py::TestNonFiniteValues::test_in_the_weight"
        "[cpu-settings3-inf-register_blocked]",
    ),
    mutant(
        "the-last-tile-is-nobodys",
        "tiles of the flat axis are counted without the last, which is not full",
        "kernels/warpgroup_plan.cuh",
        "plan.tiles_f = static_cast<int>(ceil_div(flat, plan.tile_pixels));",
        "plan.tiles_f = static_cast<int>(max(flat / plan.tile_pixels, int64_t{1}));",
        "test_kernels.py::TestValues::test_float64_agrees[cpu-hopper]",
    ),
    mutant(
        "channels-of-rows-in-order",
        "with channels last the rows of packed weights are channels in order, but a lane writes "
        "its rows' outputs as those of two neighbours",
        WARPGROUPS,
        "return M::IS_LAST ? row / 16 * 16 + row % 8 * 2 + row / 8 % 2 : row;",
        "return row;",
        f"{HOPPERS_WEIGHTS}::test_each_has_its_place[hopper-torch.float32-last-36]",
        f"{HOPPERS_WEIGHTS}::test_each_has_its_place[hopper-torch.float32-last-132]",
    ),
    mutant(
        "packed-taps-turned",
        "weights are packed in the order of the taps' rows, and multiplied in that of the inputs",
        WARPGROUPS,
        "(subchunk * along_h.taps + along_h.taps - 1 - tap_h) * along_w.taps",
        "(subchunk * along_h.taps + tap_h) * along_w.taps",
        f"{HOPPERS_WEIGHTS}::test_each_has_its_place[hopper_single-torch.bfloat16-contiguous-72]",
    ),
    mutant(
        "weights-without-their-digits",
        "weights too small for their channel's scale are multiplied with the digits that are left",
        WARPGROUPS,
        "    if (is_lossy<M>(split)) inverses[group * group_out + co] = not_a_number();\n",
        "",
        f"{HOPPERS_WEIGHTS}::test_channels_with_weights_too_far_apart_are_noted[hopper-contiguous]",
    ),
    mutant(
        "repaired-in-the-first-group",
        "outputs that are summed again by the definition are the first group's",
        WARPGROUPS,
        "const int channel = task.group * group_out + co;",
        "const int channel = co;",
        f"{HOPPERS_GEOMETRY}[cpu-hopper-torch.float32-groups of octets]",
    ),
    mutant(
        "rows-that-see-each-other",
        "on the flat axis a row follows the one before at once, so that taps reach into it",
        "kernels/warpgroup_plan.cuh",
        "const int positions = plan.stripes > 1 ? plan.stripe + more_w",
        "const int positions = plan.stripes > 1 ? plan.stripe",
        "test_hopper_geometry.py::test_each_output_is_its_sum_and_stored_once[False-hopper]",
        "test_hopper_geometry.py::test_each_output_is_its_sum_and_stored_once[True-hopper]",
    ),
    mutant(
        "second-phases-of-the-first-ones-inputs",
        "both phases of a pair begin at the first one's inputs",
        "kernels/warpgroup_plan.cuh",
        " + first_of(along_w) - first_w;",
        ";",
        "test_hopper_geometry.py::test_each_output_is_its_sum_and_stored_once[False-hopper_pairs]",
        "test_hopper_geometry.py::test_each_output_is_its_sum_and_stored_once[False-hopper_single]",
    ),
    mutant(
        "the-bounds-of-another-kernel",
        "a kernel says that it covers what its launcher refuses",
        "stages.py",
        "covers=_fits_tensor_core_narrow,",
        "covers=_fits_tensor_core_split,",
        "test_kernels.py::TestWhatIsCovered::test_the_launcher_agrees[tensor_core_narrow]",
        errors=("KernelError",),
    ),
    mutant(
        "small-problems-as-quick-as-large-ones",
        "of a small problem a kernel is expected to gain what it gains on a large one",
        "dispatch.py",
        "min(_predicted(name, near), _ceiling(name, near, plain, known))",
        "_predicted(name, near)",
        "test_dispatch.py::TestTable::test_no_time_is_expected_that_a_kernel_never_reached",
    ),
    mutant(
        "hoppers-instructions-on-every-gpu",
        "a kernel is chosen on GPUs that don't have its instructions",
        "stages.py",
        "has_own_instructions(capability, self.architecture)\n",
        "True\n",
        "test_dispatch.py::TestWithoutAKernel::test_hoppers_own_are_for_hopper_alone",
    ),
    mutant(
        "winograd-with-a-wrong-sign",
        "the third of the transformed weights has the second's sign",
        "kernels/winograd.cu",
        "fmaf(-0.5f, g[1], even)",
        "fmaf(0.5f, g[1], even)",
        f"{EDGES}[cpu-(1, 17, 7, 64) (17, 33, 3, 7)]",
    ),
    mutant(
        "winograd-overflow-kept",
        "a sum of inputs that overflows on the way stays infinite in the output",
        "kernels/winograd.cu",
        "is_not_finite |= !(fabsf(y0) <= FLT_MAX && fabsf(y1) <= FLT_MAX);",
        "is_not_finite |= y0 != y0 || y1 != y1;",
        "test_stages.py::TestNonFiniteValues::test_on_the_way[cpu-inf-settings2-inf-winograd]",
    ),
    mutant(
        "sums-in-the-storage-type",
        "sums of float16 are rounded to float16 behind every row of taps",
        CELLS,
        "            x -= rows.i_step * plan.pitch;\n",
        "            for (auto& row : sum) {\n"
        "              for (auto& channel : row) {\n"
        "                for (float& s : channel) {\n"
        "                  T rounded;\n"
        "                  set_rounded(rounded, s);\n"
        "                  s = to_float(rounded);\n"
        "                }\n"
        "              }\n"
        "            }\n"
        "            x -= rows.i_step * plan.pitch;\n",
        "test_kernels.py::TestValues::test_in_half_the_bits_only_storing_rounds"
        "[cpu-torch.float16-one_channel]",
    ),
    mutant(
        "packed-weights-kept-too-long",
        "weights in shared memory are not packed anew for the next input channels",
        CELLS,
        "if (!keeps_weights || (t == 0 && pass == 0 && ci0 == 0)) {",
        "if (t == 0 && pass == 0 && ci0 == 0) {",
        "test_kernels.py::TestValues::test_float64_agrees[cpu-one_channel]",
    ),
    mutant(
        "barrier-missing-before-new-inputs",
        "a block overwrites inputs that some of its warps still read",
        CELLS,
        "        if (pass == 0 || plan.chunk_ci < group_in) {\n          __syncthreads();\n",
        "        if (pass == 0 || plan.chunk_ci < group_in) {\n",
        "test_kernels.py::test_there_are_no_hazards[torch.float32-one_channel]",
    ),
    mutant(
        "smallest-products-left-out",
        "float32 is multiplied as two bfloat16 parts, not three",
        "kernels/tensor_core_narrow.cu",
        "for (int i = 0; i < Split<T>::PRODUCTS; ++i) {",
        "for (int i = PARTS == 1 ? 0 : 3; i < Split<T>::PRODUCTS; ++i) {",
        "test_kernels.py::TestValues::test_float64_agrees[cpu-tensor_core_narrow]",
    ),
    mutant(
        "inputs-not-cleared",
        "channels that a group does not have are whatever was in shared memory",
        "kernels/split_tile.cuh",
        "staged[i] = 0.0f;",
        "staged[i] = staged[i];",
        "test_kernels.py::test_there_are_no_hazards[torch.float32-tensor_core_narrow]",
    ),
    mutant(
        "smallest-numbers-lose-digits",
        "numbers whose last part bfloat16 does not have are multiplied without it",
        "kernels/split_tile.cuh",
        "    if (fabsf(first) + fabsf(second) > 0.0f) parts[0] = 0x7FFF7FFFu;\n",
        "",
        "test_kernels.py::test_values_near_the_smallest_keep_their_digits"
        "[cpu--115-x-tensor_core_narrow]",
        "test_kernels.py::test_values_near_the_smallest_keep_their_digits"
        "[cpu--115-weight-tensor_core_narrow]",
    ),
    mutant(
        "operands-cut-off",
        "float32 is cut off to TF32, not rounded",
        "kernels/mma.cuh",
        "return {(bits + 0x1000u) & 0xFFFFE000u};",
        "return {bits & 0xFFFFE000u};",
        "test_kernels.py::TestTensorCore::test_operands_are_rounded_not_cut_off",
        "test_kernels.py::TestValues::test_float64_agrees[cpu-tensor_core]",
        "test_split.py::TestMatrixProduct::test_it_is_what_the_simulator_computes[tf32]",
    ),
    mutant(
        "inputs-left-of-the-image",
        "a tap left of the image reads the end of the row before",
        TENSOR_CORE,
        "h < along_h.size && v >= 0 && v < along_w.size",
        "h < along_h.size && v < along_w.size",
        "test_kernels.py::TestValues::test_float64_agrees[cpu-tensor_core]",
    ),
    mutant(
        "an-instruction-too-few",
        "the channels of a chunk's second instruction are left out",
        TENSOR_CORE,
        "ceil_div(group_in - k.ci, 2 * VECTOR<T>)",
        "(group_in - k.ci) / (2 * VECTOR<T>)",
        "test_kernels.py::TestTensorCore::test_many_channels[cpu-torch.float32-"
        "(2, 17, 9, 11) (17, 67, 3, 7)]",
    ),
    mutant(
        "one-buffer-for-two",
        "a block overwrites operands that some of its warps still multiply",
        TENSOR_CORE,
        "k.ci < group_in; buffer ^= 1) {",
        "k.ci < group_in; buffer ^= 0) {",
        "test_kernels.py::TestTensorCore::test_many_channels[cpu-torch.float32-"
        "(2, 17, 9, 11) (17, 67, 3, 7)]",
    ),
    mutant(
        "largest-numbers-become-infinite",
        "outputs that are not finite are left as the tensor cores have them",
        TENSOR_CORE,
        "  if (!is_not_finite) return;",
        "  return;",
        "test_kernels.py::TestTensorCore::test_the_largest_numbers[cpu]",
        "test_kernels.py::test_values_that_are_not_finite_stay_in_their_windows"
        "[cpu-torch.float32-inf-tensor_core]",
    ),
    mutant(
        "tf32-unasked",
        "float32 goes to a kernel that rounds it to TF32, whatever PyTorch's setting",
        "dispatch.py",
        '        and (tf32 or dtype != torch.float32 or kernel.precision == "float32")\n',
        "",
        "test_dispatch.py::TestPrecision::test_the_candidates",
        "test_dispatch.py::TestPrecision::test_measured_before_by_whoever",
        "test_dispatch.py::TestPrecision::test_by_a_table[same]",
    ),
    mutant(
        "a-launcher-that-refuses-nothing",
        "a launcher starts its kernel for problems that the kernel does not cover",
        "kernels/one_channel.cu",
        "if (!cells::covers(p) || p.out_channels != p.groups) return cudaErrorInvalidValue;",
        "if (!cells::covers(p)) return cudaErrorInvalidValue;",
        "test_kernels.py::TestWhatIsCovered::test_the_launcher_agrees[one_channel]",
    ),
    mutant(
        "shared-memory-asked-for-late",
        "what a kernel declares is forgotten: it asks for more only where 48 KiB are not enough",
        "kernels/shared_memory.cuh",
        "allowed[place] = attributes.maxDynamicSharedSizeBytes;",
        "allowed[place] = 48 * 1024;",
        "test_stages.py::test_a_block_takes_almost_all_that_it_may_unasked[cpu]",
        errors=("KernelError",),
    ),
)

# ---- The operator and what it stands on --------------------------------------------------------

GRADIENTS = "test_operator.py::TestGradients"
OUR_AUTOCAST = "test_operator.py::TestDtypes::test_autocast_where_a_kernel_of_ours_takes_the_type"
PLANS = "test_operator.py::TestPlans"
OWN_PLAN = f"{PLANS}::test_a_call_that_differs_in_one_thing_has_a_plan_of_its_own"

OPERATOR = (
    mutant(
        "output_padding-moves-the-index",
        "output_padding is added to the padding that the kernels index with",
        "stages.py",
        "pairs = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)",
        "padding = tuple(map(sum, zip(problem.padding, problem.output_padding)))\n"
        "        pairs = (problem.kernel_size, problem.stride, padding, problem.dilation)",
        f"{STAGE}::test_unbatched[cpu-naive_gather]",
        f"{EACH_KERNEL}[shared_tiled-simulator]",
    ),
    mutant(
        "strides-of-the-axes-swapped",
        "the kernels are told the stride of the columns for that of the rows",
        "stages.py",
        "problem.kernel_size, problem.stride, problem.padding",
        "problem.kernel_size, problem.stride[::-1], problem.padding",
        f"{STAGE}::test_unbatched[cpu-coalesced]",
    ),
    mutant(
        "output_padding-leaves-the-size",
        "output_padding does not make the output larger",
        "problem.py",
        "                + output_padding\n                + 1,",
        "                + 1,",
        "test_problem.py::test_the_example_in_the_docstring",
        "test_problem.py::test_output_shape_is_that_of_torch",
    ),
    mutant(
        "last-tap-dropped-in-the-reference",
        "the kernel's last tap reaches no output",
        "problem.py",
        "while k < self.kernel and i >= 0:",
        "while k < self.kernel - 1 and i >= 0:",
        "test_problem.py::test_taps_are_the_pairs_that_meet",
        "test_reference.py::test_scatter_gather_and_torch_agree_on_every_problem",
    ),
    Mutant(
        "a-judge-that-passes-NaN",
        "the measure of errors leaves out what is not finite",
        "convt_lab/reference.py",
        (
            Edit("(actual != expected)\n", "(actual != expected) & np.isfinite(actual)\n"),
            Edit("~(np.isfinite(actual) & np.isfinite(expected))", "~np.isfinite(expected)"),
        ),
        ("test_reference.py::test_what_is_not_finite_never_passes",),
    ),
    mutant(
        "default-stream",
        "a call runs on the default stream, not on the current one",
        "launcher.py",
        "None if self._index is None else _current_stream(self._index),",
        "None,",
        "test_operator.py::TestOnAGPU::test_the_current_stream_with_a_producer_that_sleeps",
        gpus=1,
    ),
    mutant(
        "no-device-guard",
        "a call runs on the current GPU, not on that of its tensors",
        "launcher.py",
        "if index is None or index == torch.cuda.current_device():",
        "if True:",
        "test_operator.py::TestOnAGPU::test_a_second_gpu",
        errors=("RuntimeError",),
        gpus=2,
    ),
    mutant(
        "bias-not-handed-on",
        "the operator starts the kernel without the bias",
        "launcher.py",
        "None if bias is None else bias.data_ptr(),",
        "None,",
        f"{PLANS}::test_a_kernel_of_ours_runs_once_for_each_call",
    ),
    mutant(
        "strides-of-the-input-ignored",
        "an input that is not dense is read as if it were",
        "plan.py",
        "plan._input_format = None if is_dense else memory_format",
        "plan._input_format = None",
        f"{OWN_PLAN}[input]",
    ),
    mutant(
        "strides-of-the-weight-ignored",
        "a weight that is not contiguous is read as if it were",
        "plan.py",
        "plan._copied_weight = not weight.is_contiguous()",
        "plan._copied_weight = False",
        f"{OWN_PLAN}[weight]",
    ),
    mutant(
        "strides-of-the-bias-ignored",
        "a bias with gaps is read as if it had none",
        "plan.py",
        "plan._copied_bias = bias is not None and not bias.is_contiguous()",
        "plan._copied_bias = False",
        f"{OWN_PLAN}[bias]",
    ),
    mutant(
        "channels-last-lost",
        "the output is contiguous even where PyTorch's is channels last",
        "plan.py",
        "return torch._C._conv_determine_backend_memory_format(input, weight, library)",
        "return torch.contiguous_format",
        f"{OWN_PLAN}[channels last]",
    ),
    mutant(
        "a-plan-for-other-strides",
        "a call takes the plan that was made for a weight with other strides",
        "plan.py",
        "        weight.stride(),\n",
        "",
        f"{OWN_PLAN}[weight]",
    ),
    mutant(
        "a-plan-for-another-dtype",
        "a call takes the plan that was made for an input of another dtype, and reads it as such",
        "plan.py",
        "        input.dtype,\n",
        "",
        f"{PLANS}::test_dtypes_that_differ_after_a_call_whose_dtypes_agree",
    ),
    mutant(
        "a-plan-for-another-precision",
        "a call takes the plan that was made when TF32 was not allowed",
        "plan.py",
        "        tf32,\n        crop,",
        "        crop,",
        "test_operator.py::TestDtypes::test_tf32_is_asked_for_as_pytorch_does",
    ),
    mutant(
        "plans-that-are-never-made-anew",
        "a plan stays when the dispatch has learnt better",
        "plan.py",
        "        dispatch.generation,\n",
        "",
        f"{PLANS}::test_a_choice_is_made_once",
    ),
    mutant(
        "a-kernel-that-does-not-support-the-call",
        "a plan takes the chosen kernel without asking whether it supports the problem",
        "plan.py",
        'if kernel == "pytorch" or not kernels[kernel].supports(problem, dtype, channels_last):',
        'if kernel == "pytorch":',
        f"{PLANS}::test_a_kernel_is_not_given_what_it_does_not_take",
        errors=("ValueError",),
    ),
    mutant(
        "unsupported-kernels-are-candidates",
        "the dispatch considers kernels that do not support the problem",
        "dispatch.py",
        "kernel.supports(problem, dtype, channels_last)",
        "True",
        "test_dispatch.py::TestWithoutAKernel::test_a_problem_that_no_kernel_covers",
        "test_dispatch.py::TestWithoutAKernel::test_another_memory_format",
    ),
    mutant(
        "gradient-of-the-weight-in-a-wrong-order",
        "the weight's gradient has its kernel's rows and columns swapped",
        "library.py",
        "            ctx.needs_input_grad[:3],\n        )\n        return *gradients, None\n",
        "            ctx.needs_input_grad[:3],\n        )\n"
        "        of_input, of_weight, of_bias = gradients\n"
        "        if of_weight is not None:\n"
        "            of_weight = of_weight.mT.reshape(weight.shape)\n"
        "        return of_input, of_weight, of_bias, None\n",
        f"{GRADIENTS}::test_any_subset[simulator-needed1]",
        "test_conformance.py::test_gradients_of_random_problems[simulator]",
    ),
    mutant(
        "gradient-of-the-bias-of-the-first-image",
        "the bias's gradient is summed over the pixels, not over the images",
        "library.py",
        "            ctx.needs_input_grad[:3],\n        )\n        return *gradients, None\n",
        "            ctx.needs_input_grad[:3],\n        )\n"
        "        of_input, of_weight, of_bias = gradients\n"
        "        if of_bias is not None:\n"
        "            of_bias = grad_output[0].sum((1, 2))\n"
        "        return of_input, of_weight, of_bias, None\n",
        f"{GRADIENTS}::test_any_subset[simulator-needed2]",
    ),
    mutant(
        "second-derivative-incomplete",
        "the gradients are taken for independent of the weight when they are differentiated",
        "library.py",
        "        input, weight = ctx.saved_tensors\n        problem = ctx.problem\n",
        "        input, weight = ctx.saved_tensors\n        weight = weight.detach()\n"
        "        problem = ctx.problem\n",
        f"{GRADIENTS}::test_second_derivatives[simulator]",
    ),
    mutant(
        "second-derivative-missing",
        "the gradients can't be differentiated",
        "library.py",
        "    @staticmethod\n    def backward(ctx, grad_output: Tensor):\n"
        '        """Return the gradients of input, weight and bias."""\n'
        "        input, weight",
        "    @staticmethod\n    @torch.autograd.function.once_differentiable\n"
        "    def backward(ctx, grad_output: Tensor):\n"
        '        """Return the gradients of input, weight and bias."""\n'
        "        input, weight",
        f"{GRADIENTS}::test_second_derivatives[simulator]",
        errors=("RuntimeError",),
    ),
    mutant(
        "gradient-of-the-bias-alone-forgotten",
        "a call of which only the bias needs a gradient is not recorded",
        "operator.py",
        "input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)",
        "input.requires_grad or weight.requires_grad",
        f"{GRADIENTS}::test_any_subset[simulator-needed2]",
        errors=("RuntimeError",),
    ),
    mutant(
        "tangent-of-the-weight-forgotten",
        "in forward mode the output's tangent lacks the weight's part",
        "library.py",
        "        if weight_tangent is not None:\n"
        "            terms.append(_apply(input, weight_tangent, None, *ctx.arguments))\n",
        "",
        "test_operator.py::TestTransforms::test_as_pytorchs[simulator-jvp]",
    ),
    mutant(
        "vmap-mixes-the-examples",
        "under vmap the examples' input channels are taken in turns, not one example's together",
        "library.py",
        "        input.flatten(1, 2),\n",
        "        input.transpose(1, 2).flatten(1, 2),\n",
        "test_operator.py::TestTransforms::test_vmap[simulator-None-0-0]",
    ),
    mutant(
        "strides-of-channels-last-ignored",
        "a channels-last input is handed to kernels that take contiguous ones only",
        "plan.py",
        "channels_last = memory_format == torch.channels_last",
        "channels_last = False",
        f"{OWN_PLAN}[channels last]",
    ),
    mutant(
        "fake-kernel-with-a-wrong-shape",
        "a traced call is told an output without output_padding",
        "library.py",
        'torch.library.register_fake("convt_lab::conv_transpose2d", _pytorchs, lib=_library)',
        "def _fake(x, weight, bias=None, stride=1, padding=0, output_padding=0, *rest):\n"
        "    return _pytorchs(x, weight, bias, stride, padding, (0, 0), *rest)\n\n\n"
        'torch.library.register_fake("convt_lab::conv_transpose2d", _fake, lib=_library)',
        "test_compile.py::TestOpcheck::test_whole[torch.float32-memory_format0-False-simulator]",
        errors=("OpCheckError",),
    ),
    mutant(
        "autocast-ignored",
        "autocast is honoured on a GPU only",
        "operator.py",
        'if torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu"):',
        'if torch.is_autocast_enabled("cuda"):',
        "test_operator.py::TestDtypes::test_autocast[simulator-False-torch.float16]",
        f"{OUR_AUTOCAST}[torch.float16-simulator]",
    ),
    mutant(
        "autocast-of-float64",
        "autocast takes float64 for float32",
        "library.py",
        "        and tensor.dtype is not torch.float64\n",
        "",
        f"{OUR_AUTOCAST}[torch.bfloat16-simulator]",
    ),
    mutant(
        "one-image-with-a-batch-axis",
        "the output of an input without a batch axis has one",
        "operator.py",
        "conv_transpose2d(input.unsqueeze(0), weight, bias, *arguments).squeeze(0)",
        "conv_transpose2d(input.unsqueeze(0), weight, bias, *arguments)",
        "test_operator.py::TestArguments::test_positional_arguments_unbatched_and_empty[simulator]",
    ),
    mutant(
        "negatives-taken-as-they-lie",
        "a tensor whose memory holds its negatives is read as if it did not",
        "operator.py",
        "return tensor.layout is torch.strided and not tensor.is_neg() and not tensor",
        "return tensor.layout is torch.strided and not tensor",
        "test_conformance.py::test_random_problems[simulator]",
    ),
    mutant(
        "output_size-ignored",
        "the layer takes no notice of output_size",
        "module.py",
        "            input, output_size, self.stride,",
        "            input, None, self.stride,",
        "test_module.py::TestTheLayer::test_forward_and_output_size",
        "test_module.py::TestTheLayer::test_output_sizes_that_cannot_be",
    ),
    mutant(
        "from_torch-copies",
        "the layer made of PyTorch's has copies of its parameters",
        "module.py",
        "name: value.copy() if isinstance(value, dict | set) else value",
        "name: __import__('copy').deepcopy(value)",
        "test_module.py::TestFromTorch::test_parameters_are_shared",
    ),
    mutant(
        "a-shared-layer-replaced-twice",
        "a layer that is used in two places becomes two layers",
        "module.py",
        "    for module in model.modules():\n"
        "        if _why_not(module) is None:\n"
        "            module.__class__ = ConvTranspose2d\n",
        "    for module in list(model.modules()):\n"
        "        for name, child in module._modules.items():\n"
        "            if _why_not(child) is None:\n"
        "                module._modules[name] = ConvTranspose2d.from_torch(child)\n",
        "test_module.py::TestReplace::test_a_model",
    ),
    mutant(
        "subclasses-replaced-too",
        "a layer with a forward of its own is replaced, and loses it",
        "module.py",
        'if type(module) is not torch.nn.ConvTranspose2d or "forward" in module.__dict__:',
        "if type(module) is ConvTranspose2d:",
        "test_module.py::TestReplace::test_what_is_more_than_the_class_is_left_alone",
    ),
    mutant(
        "forks-with-their-parents-plans",
        "a forked process runs plans of its parent, and CUDA says no more than that it can't",
        "plan.py",
        "    os.register_at_fork(after_in_child=lambda: _plans.clear())\n",
        "    pass\n",
        "test_memory.py::test_a_fork_forgets_its_parents_plans",
    ),
)

# ---- Exercises ---------------------------------------------------------------------------------

TOLD = "test_exercises.py::test_a_wrong_answer_is_told_what_is_wrong"

EXERCISES = (
    mutant(
        "exercises-let-nan-pass",
        "an output of NaN is taken for a right one",
        "exercises/exercise.py",
        "wrong = ~(np.abs(actual.astype(np.float64) - exact) <= allowed)",
        "wrong = np.abs(actual.astype(np.float64) - exact) > allowed",
        "test_exercises.py::test_nan_is_never_right",
    ),
    mutant(
        "exercises-forget-budgets",
        "an answer over its budget passes",
        "exercises/cuda.py",
        "                met = False\n",
        "                pass\n",
        f"{TOLD}[shared_tiled.2]",
    ),
    mutant(
        "exercises-forgive-hazards",
        "an answer that is right by luck passes",
        "exercises/cuda.py",
        'if not (h.kind == "uninitialised_read" and h.buffer in run.forgives)',
        "if False",
        f"{TOLD}[naive_gather.2]",
    ),
    mutant(
        "exercises-count-another-parameter",
        "a budget for a parameter that the answer calls otherwise counts nothing",
        "exercises/cuda.py",
        'buffer = names.get(self.buffer or "", self.buffer)',
        "buffer = self.buffer",
        "test_exercises.py::test_parameters_may_have_other_names",
    ),
    mutant(
        "exercises-lines-of-the-whole-file",
        "lines of a kernel that is handed in alone are those of the file it is put into",
        "exercises/cuda.py",
        '\\n#line 1 "kernel.cu"\\n{answer}',
        "\\n{answer}",
        "test_exercises.py::test_the_kernel_alone_is_enough_and_has_lines_of_its_own",
    ),
    mutant(
        "exercises-let-rows-lie-far-apart",
        "a flat axis with more zeros than it needs passes",
        "exercises/hopper.py",
        "if np.array_equal(_on_one_axis(x, w, padding, int(found) - 1), exact):",
        "if False:",
        "test_exercises.py::test_the_start_does_not_pass[hopper.1]",
    ),
    mutant(
        "exercises-forget-the-first-phase",
        "a buffer that nobody has used yet is taken for one that is still to be read",
        "exercises/hopper.py",
        "return (phases[barrier][buffer] - 1) % 2 == parity",
        "return phases[barrier][buffer] % 2 == parity",
        "test_exercises.py::test_the_solution_passes[hopper.3]",
    ),
    mutant(
        "exercises-let-a-swap-lose-hooks",
        "a swap after which a hook is no longer called passes",
        "exercises/decoder.py",
        'return None if seen else "a hook',
        'return None if True else "a hook',
        "test_exercises.py::test_another_wrong_answer_is_told_what_is_wrong[decoder.2-2]",
    ),
    mutant(
        "exercises-let-zeros-be-multiplied",
        "phases that multiply what no tap meets pass",
        "exercises/gather.py",
        "if sum(done) > whole:",
        "if False:",
        "test_exercises.py::test_another_wrong_answer_is_told_what_is_wrong[gather.4-3]",
    ),
    mutant(
        "exercises-let-a-large-test-pass",
        "a problem that finds every wrong operator may cost what it likes",
        "exercises/first_draft.py",
        "if multiply_adds > _MOST_MULTIPLY_ADDS:",
        "if False:",
        "test_exercises.py::test_another_wrong_answer_is_told_what_is_wrong[first_draft.3-4]",
    ),
    mutant(
        "exercises-a-pretended-gpu-without-a-cache",
        "a kernel's inputs are never found in the cache, so nobody has to flush it",
        "exercises/measuring.py",
        "self._in_cache = True",
        "self._in_cache = False",
        "test_exercises.py::test_another_wrong_answer_is_told_what_is_wrong[measuring.3-3]",
    ),
    mutant(
        "exercises-a-pretended-gpu-that-never-waits",
        "a GPU that is idle when an event comes does not wait for Python to launch the kernel",
        "exercises/measuring.py",
        "self._gpu = max(self._gpu, self._python) + gpu",
        "self._gpu = self._gpu + gpu",
        f"{TOLD}[measuring.3]",
    ),
)

# ---- Several ranks -----------------------------------------------------------------------------

RANKS = "test_distributed.py::test_ranks_agree_with_one_process[2-ranks"
ROW_PLANS = "test_distributed.py::TestRowPlan"

DISTRIBUTED = (
    mutant(
        "overlap-without-dilation",
        "the rows that a rank adds to are counted as if the kernel's rows were neighbours",
        "distributed.py",
        "rows.padding + (rows.kernel - 1) * rows.dilation",
        "rows.padding + (rows.kernel - 1)",
        f"{ROW_PLANS}::test_the_overlap_is_as_derived[5-2-1]",
    ),
    mutant(
        "rows-after-the-last-lost",
        "nobody owns the output rows below the last input row's first",
        "distributed.py",
        "ends = [*starts[1:], rows.out_size]",
        "ends = [*starts[1:], min(rows.out_size, starts[-1] + 1)]",
        f"{ROW_PLANS}::test_rows_are_owned_once[0-heights1]",
    ),
    mutant(
        "bias-of-every-part-of-a-sum",
        "where input channels are split, each rank adds the bias to its part of the sum",
        "distributed.py",
        "if bias is not None and not _is_first(mesh",
        "if False and not _is_first(mesh",
        f"{RANKS}-dtensors_of_every_placement]",
    ),
    mutant(
        "rows-cropped-at-the-wrong-end",
        "a kernel that leaves out rows at the start leaves out as many at the end",
        "problem.py",
        "out_size=rows.out_size - self.cropped_rows",
        "out_size=rows.out_size",
        "test_cropped_rows.py::test_every_kernel[coalesced-cpu]",
    ),
    mutant(
        "strips-cost-nothing",
        "a prediction for several ranks leaves out the rows that are computed for others",
        "scaling.py",
        "return self.strip + max(self.interior, self.exchange)",
        "return max(self.interior, self.exchange)",
        "test_scaling.py::test_a_prediction_is_made_of_its_parts",
    ),
    mutant(
        "weak-scaling-taken-for-strong",
        "an efficiency is divided by the number of GPUs where the problem grew with them",
        "distributed_record.py",
        "(1 if CASES[row.case] else row.ranks)",
        "row.ranks",
        "test_distributed_record.py::test_efficiency_is_of_weak_or_of_strong_scaling",
    ),
)

MUTANTS = (*KERNELS, *OPERATOR, *EXERCISES, *DISTRIBUTED)
