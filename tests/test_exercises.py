"""The exercises: solutions pass, wrong answers are told why, and the chapters have them all."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

import convt_lab as lab
from convt_lab import decoder_record, figures, reference
from convt_lab.decoder import SegmentationNet
from convt_lab.exercises import cuda, first_draft
from convt_lab.exercises.exercise import edited
from convt_lab.program import compile as compile_source

ROOT = Path(__file__).resolve().parent.parent
NAMES = lab.exercises.names

each_exercise = pytest.mark.parametrize("name", NAMES)
check, start, solution = lab.exercises.check, lab.exercises.start, lab.exercises.solution


def changed(name: str, old: str, new: str) -> str:
    return edited(solution(name).answer, {old: new})


# A wrong answer for each exercise, and what the message must contain: a regular expression.
WRONG = {
    "scatter_reference.1": (
        lambda size, kernel, stride, padding, dilation: size % stride,
        r"size 9, kernel 1, stride 2, .* makes 5 of 9, and an output_padding of 1 leads to 10",
    ),
    "scatter_reference.2": (
        changed("scatter_reference.2", "0 if common > 1 else kernel // step", "kernel // step"),
        r"stride 2, kernel 1, dilation 2: yours says \(1, 1\); stamping ones counts 0 to 1",
    ),
    "scatter_reference.3": (
        changed(
            "scatter_reference.3",
            "slice(h * stride, h * stride + span_h, dilation)",
            "slice(h * stride + output_padding, h * stride + span_h + output_padding, dilation)",
        ),
        r"output_padding=2, dilation=1: the result\[0, 0, 0\] is 0 and should be",
    ),
    "gather.1": (
        changed("gather.1", "[:, :, ::-1, ::-1]", "[:, :, ::-1]"),
        r"weight \[2, 3, 3, 3\], .* the convolution's output\[0, 0, 0, 0\] is .* and should be",
    ),
    "gather.2": (
        changed("gather.2", "range(size)", "range(-kernel * dilation, size)"),
        r"size 1, kernel 2, stride 1, .* dilation 2: no tap reaches output 1, and your list lacks",
    ),
    "gather.3": (
        changed("gather.3", "q - (size - 1)", "q - size"),
        r"size 1, kernel 2, stride 1, padding 0, output 1: yours are the taps 0, 1; .* are 1",
    ),
    "gather.4": (
        changed("gather.4", "a * rows.dilation, b * columns.dilation", "a, b"),
        r"stride 3, dilation 2: output\[0, 0, 0, 0\] is .* and should be",
    ),
    "first_draft.1": (
        changed("first_draft.1", "co / group_out", "co % groups"),
        r"C_in=4, C_out=6, groups=2, .*: y\[1, 0\] is .* and should be",
    ),
    "first_draft.2": (
        changed(
            "first_draft.2",
            "((static_cast<int64_t>(n) * c_out + co) * out_h + oh) * out_w",
            "((n * c_out + co) * out_h + oh) * static_cast<int64_t>(out_w)",
        ),
        r"With the last value of \[70000, 70000, 1, 1\]: at\[0\] is [^ ]+ and should be 4\.9e\+09",
    ),
    "first_draft.3": (
        changed("first_draft.3", "stride=(2, 3)", "stride=3"),
        "passes unseen: one that takes the rows' stride for the columns, too",
    ),
    "first_draft.4": (
        changed("first_draft.4", "(error <= 8 * 2**-24 * scale).all()", "error.max() <= 1e-4"),
        "a million times as large: yours says False .* zeros: yours says True .* batch: it raises",
    ),
    "naive_gather.1": (
        changed("naive_gather.1", "oh = index / p.out_width % p", "oh = index / p.out_height % p"),
        r"With input 5×3, .*: output\[0, 0, 9, 0\] is nan and .*NaN: .* write_conflict in line",
    ),
    "naive_gather.2": (
        start("naive_gather.2"),
        r"right values, but race in line 7: .* write_conflict in line 7: .* y\[i \* stride \+ k\]",
    ),
    "naive_gather.3": (
        changed("naive_gather.3", "k += stride, --i", "k += stride"),
        r"With 5 inputs, 3 taps, stride 1: y\[0\] is .* and should be .*; 7 of 7 values are wrong",
    ),
    "coalesced.1": ((1.25, 8), r"input: 1\.25 is right.*weight: 8 is wrong; .* counts fewer"),
    "coalesced.2": (
        {"dim3(TILE_H, TILE_W)": "dim3(TILE_W, TILE_H)"},
        r"output\[0, 0, 8, 0\] is nan",
    ),
    "coalesced.3": (
        changed("coalesced.3", "q >= stride || ", ""),
        r"write_conflict in line 16: .* y\[o\] = sum;",
    ),
    "shared_tiled.1": (
        {"  if (!inside) return;": "  __syncthreads();\n  if (!inside) return;"},
        r"in_channels=20.*race in line \d+: .* 'shared' with no barrier between them",
    ),
    "shared_tiled.2": (
        {"tile[TILE][TILE];": "tile[TILE][TILE + 2];"},
        r"right values .* at most 1 wavefronts per request; yours: 2, line 14 .*tile\[thread",
    ),
    "shared_tiled.3": (
        changed("shared_tiled.3", "  __syncthreads();\n", ""),
        r"race in line \d+: .* of 'tile' with no barrier",
    ),
    "register_blocked.1": (
        start("register_blocked.1"),
        r"at most 2\.5 wavefronts per request; yours: [45][.\d]*, line \d+ .*load_part\(window",
    ),
    "register_blocked.2": (
        changed("register_blocked.2", "window[j + TAPS - 1 - k]", "window[j + k]"),
        r"With 2 inputs, 7 taps: y\[0\] is",
    ),
    "register_blocked.3": (
        changed("register_blocked.3", "q < THREAD_CO && first_co + q < c_out", "q < THREAD_CO"),
        r"out_of_bounds in line \d+: .* of 'y', which is outside it y\[\(first_co \+ q\)",
    ),
    "winograd.1": (
        changed("winograd.1", "m1 - m2 + 2 * m3", "m1 + m2 + 2 * m3"),
        r"y\[1\] is .*d\d g\d.* and should be d1 g0 \+ d2 g1 \+ d3 g2",
    ),
    "winograd.2": (
        start("winograd.2"),
        r"at most 3\.1 wavefronts per request; yours: 3\.36, line \d+ .*load_vector\(weights",
    ),
    "winograd.3": (
        changed("winograd.3", "d[2] - d[1], even", "d[1] - d[2], even"),
        r"With 1 channels, 4 inputs: y\[0\] is .* and should be",
    ),
    "ladder.1": (
        changed(
            "ladder.1",
            "max(fmas, dram, first_level, issuing)",
            "fmas + dram + first_level + issuing",
        ),
        r"coalesced star: yours 13\d\.\d+ ms of 124\.983, more than it took",
    ),
    "ladder.2": (
        changed("ladder.2", "math.ceil(blocks / places)", "max(1, blocks / places)"),
        r"batch 8, 225 blocks for 132 places: yours 0\.099 ms, measured 0\.115; at most 10% off",
    ),
    "ladder.3": (
        changed("ladder.3", "i >= 0 and ", ""),
        r"width 32, 3 taps: \d+ sectors are wrong; the simulator counts fewer",
    ),
    "ladder.4": (
        changed(
            "ladder.4", "    __syncthreads();  // nobody reads the channel before any more\n", ""
        ),
        r"With 3 input channels, .* race in line \d+: .* of 'inputs' with no barrier between",
    ),
    "tensor_core.1": (
        lambda row, half: 8 * row + 4 * (half ^ row % 2),
        r"shared stores: at most 4 wavefronts per request; yours: 8",
    ),
    "tensor_core.2": (
        changed("tensor_core.2", "0x1000", "0x0FFF"),
        r"halfway between two, of both signs: for the value 1\.00048828, .* and should be",
    ),
    "tensor_core.3": (
        changed("tensor_core.3", "to_tf32(row[8 * depth]).bits", "to_tf32(row[4]).bits"),
        r"With depth 8: c\[8, 0\] is .* and should be",
    ),
    "tensor_core_split.1": (
        lambda values, round_tf32: (round_tf32(values), 0 * values),
        r"is split into .* units of a float32's rounding are missing, and 2 may be",
    ),
    "tensor_core_split.2": (
        changed("tensor_core_split.2", "-sum(pair)", "sum(pair)"),
        r"at most 6 products; yours: 6 condition error at most 8; yours: [\d.]{4,}",
    ),
    "tensor_core_split.3": (
        changed("tensor_core_split.3", "    mma<Tf32>(part, a_low, b_high);\n", ""),
        r"With depth 8: c\[0, 0\] is .* and should be",
    ),
    "hopper.1": (
        changed("hopper.1", "- padding", "- 2 * padding"),
        r"width 6, 7 taps, padding 3: rows are 6 positions apart, and y\[0, 3\] is .* and should",
    ),
    "hopper.2": (
        changed("hopper.2", "2 * subchunk * region", "subchunk * region"),
        r"step 4 of 2×2 taps, .* begins at position 152 of octet 1, and .* position 152 of octet 2",
    ),
    "hopper.3": (
        changed("hopper.3", "(round + 1) % 2", "1"),
        r"count 1: use 1 fills buffer 0 before use 0 is read",
    ),
    "hopper.4": (
        changed("hopper.4", "  __syncthreads();\n", ""),
        r"race in line \d+: .* of 'axis' with no barrier between them",
    ),
    "operator.1": (
        changed("operator.1", "2.0 ** (15 - exponent)", "float(np.float32(32768) / largest)"),
        r"normal values: scale=[\d.]+ is no power of two, so dividing rounds",
    ),
    "operator.2": (
        changed("operator.2", "stride) > max(", "stride) > 2 * max("),
        r"at most 1\.5 times; yours: 2\.79 kernelbench 81: hopper, 2\.79 times",
    ),
    "operator.3": (
        changed("operator.3", ">= 1.2", ">= 1"),
        r"slower than PyTorch: at most 5%; yours: [6-9]\.\d% .* at least 1\.7 .*; yours: 1\.7",
    ),
    "operator.4": (
        changed("operator.4", "make_float2(even, odd)", "make_float2(odd, even)"),
        r"With 1 channels of 1 inputs: y\[0, 0\] is .* and should be",
    ),
    "decoder.1": (
        changed("decoder.1", " if left > 0 else None", ""),
        r"a share of 0\.457, wanted 2: -\d+\.\d+, but with no time at all .* so it must be None",
    ),
    "decoder.2": (
        changed(
            "decoder.2",
            "type(module) is torch.nn.ConvTranspose2d",
            "isinstance(module, torch.nn.ConvTranspose2d)",
        ),
        r"not yet A layer of a subclass: it must be left .* A layer with weight_norm: it must be",
    ),
    "decoder.3": (
        changed("decoder.3", "error(after, name) <= max", "not error(after, name) > max"),
        r"a NaN among the scores: yours says True, but NaN is never right .* missing: yours says",
    ),
    "decoder.4": (
        changed("decoder.4", "(taps - 1) / 2", "taps // 2"),
        r"factor 2: the inner output\[0\] is .* and should be",
    ),
    "decoder.5": (
        changed("decoder.5", "(oh + 1) / 2 - kh, 0)", "(oh + 1) / 2 - kh, 1)"),
        r"With an image of 3×5: y\[0, 0\] is .* and should be",
    ),
    "distributed.1": (
        changed("distributed.1", "min(end, owned[other + 1])", "end"),
        r"heights \[3, 5, 4\], kernel 7, .*: yours says .*; sent is \{\(0, 1\): \d",
    ),
    "distributed.2": (
        changed("distributed.2", "output[start:] += bottom", "output[start:] = bottom"),
        r"height 5, cut 1, kernel 2, stride 1, dilation 1: the output\[1, 0\] is .* should be",
    ),
    "distributed.3": (
        changed("distributed.3", "max(0, len(taps) - stride)", "len(taps)"),
        r"input_rows 2, kernel 1, stride 1: 1 rows are asked for, and 0 are needed",
    ),
    "distributed.4": (
        changed("distributed.4", "strip + max(alone / ranks, exchange)", "strip + alone / ranks"),
        r"least 0\.5: yours says \d+; by the model it is \d+",
    ),
    "simulator.1": (
        (2, 4, 6, 8, 10, 12, 14, 16),
        r"stride 3: 6 is wrong; the simulator counts fewer",
    ),
    "simulator.2": (
        {
            "    __syncthreads();\n": "",
            "    sum +=": "    __syncthreads();\n    __syncthreads();\n    sum +=",
        },
        r"race in line 5: .* tile\[threadIdx.x\] = x",
    ),
    "simulator.3": (
        {"  if (threadIdx.x >= count) return;\n": ""},
        r"With 3 rows of 50.* out_of_bounds in line 4: .* of 'x'",
    ),
    "gpu_primer.1": (
        changed("gpu_primer.1", "first + j * blockDim.x", "first + j * (blockDim.x + 1)"),
        r"With 1,535 values: y\[64\] is nan and should be .* write_conflict in line 7",
    ),
    "gpu_primer.2": (  # a single thread adds them all
        edited(
            changed("gpu_primer.2", "step > 0; step /= 2", "step == THREADS / 2; step /= 2"),
            {
                "if (t < step) words[t] += words[t + step];": (
                    "for (int j = 1; t == 0 && j < THREADS; ++j) words[0] += words[j];"
                )
            },
        ),
        r"at most 1 wavefronts per request; yours: 1, .* at most 100 requests; yours: 2,044",
    ),
    "gpu_primer.3": (
        changed(
            "gpu_primer.3", "rounded_up(registers * 32, sm.register_granularity)", "registers * 32"
        ),
        r"96 threads, 73 registers, 0 bytes on sm_75: yours is 9, and 8 fit; the limit is reg",
    ),
    "measuring.1": (
        lambda samples: float(np.median(samples)),
        r"1\d runs, 5 of them warm-ups, \d interrupted.*: yours .* ms, and an undisturbed run tak",
    ),
    "measuring.2": (
        lambda ours, theirs: "ours" if sum(ours) < sum(theirs) else "theirs",
        r"winner is named in at most 20 of 200; yours: 200 .* interrupted: 'theirs' in at least "
        r"180 of 200; yours: \d\d? *$",
    ),
    "measuring.3": (
        changed("measuring.3", "        machine.busy(1e-3)\n", ""),
        r"yours 1[23]\d\.\d µs; a cold run takes 58\.0, .* Python takes 120 to enqueue the kernel",
    ),
}


# More of them, each wrong in another way.
ALSO_WRONG = [
    ("measuring.1", lambda samples: None, "it returns None, which is no time"),
    ("measuring.1", lambda samples: min(samples), r"one refused: yours 0\.0\d\d ms, and"),
    (
        "measuring.1",
        lambda samples: sum(samples[5:]) / len(samples[5:]),
        r"more than 1% off in 1\d\d of 200 series",
    ),
    ("measuring.2", lambda ours, theirs: 0, "it returns 0, and should return 'ours', 'theirs' or"),
    ("measuring.2", lambda ours, theirs: None, "longer: 'ours' in at least 180 of 200; yours: 0"),
    (
        "measuring.2",  # the drift is taken for noise
        """
def faster(ours, theirs):
    def interval(samples):
        samples = np.sort(samples)
        return samples[5], samples[14]
    (a, b), (c, d) = interval(ours), interval(theirs)
    return "ours" if b < c else "theirs" if d < a else None
""",
        "a machine that slows down: 'ours' in at least 180 of 200; yours: 0 ours takes 3%",
    ),
    ("measuring.3", lambda machine: "fast", "it returns 'fast', which is no time"),
    (
        "measuring.3",
        lambda machine: 58e-6,
        "yours 58.0 µs; a cold run takes 58.0, and yours runs no",
    ),
    (
        "measuring.3",
        changed("measuring.3", "        machine.flush()\n", ""),
        r"yours 4[01]\.\d µs; a cold run takes 58\.0, and one with its inputs in the cache 41\.0",
    ),
    (
        "measuring.3",
        changed("measuring.3", "np.median(times[3:])", "np.mean(times)"),
        r"yours [\d,.]+ µs; a cold run takes 58\.0",
    ),
    (
        "measuring.3",
        edited(
            changed("measuring.3", "begin = machine.event()", "begin = machine.now()"),
            {"times.append(machine.seconds(begin, end))": "times.append(machine.now() - begin)"},
        ),
        "yours 125.0 µs; a cold run takes 58.0",
    ),
    (
        "measuring.3",
        changed("measuring.3", "for _ in range(23)", "while True"),
        r"cold_seconds\(<machine>\) raises RuntimeError: more than 20,000 calls",
    ),
    (
        "measuring.3",
        changed("measuring.3", "busy(1e-3)", "busy(-1)"),
        r"cold_seconds\(<machine>\) raises ValueError: seconds=-1: must be from 0 to 1",
    ),
    (
        "gpu_primer.1",
        changed("gpu_primer.1", "blockDim.x * EACH +", "blockDim.x +"),
        r"With 1,535 values: y\[\d+\] is nan",
    ),
    (
        "gpu_primer.2",
        changed(
            "gpu_primer.2",
            "words[t] += words[t + step];\n    __syncthreads();",
            "words[t] += words[t + step];",
        ),
        r"race in line \d+: .* of 'words' with no barrier between them",
    ),
    *(
        ("gpu_primer.3", changed("gpu_primer.3", old, new), message)
        for old, new, message in (
            (
                "in_partition = sm.registers_per_sm // sm.partitions // of_warp",
                "in_partition = sm.registers_per_sm // of_warp / sm.partitions",
                "96 threads, 100 registers, .* and 5 fit; the limit is registers",
            ),
            (" + sm.reserved_shared_bytes", "", "the limit is shared memory"),
            ("rounded_up(shared, sm.shared_granularity)", "shared", "the limit is shared memory"),
            ("        sm.blocks_per_sm,\n", "", "and 16 fit; the limit is blocks"),
            ("-(-threads // 32)", "threads // 64 * 2 or 1", "96 threads.* the limit is"),
        )
    ),
    ("gpu_primer.3", lambda *_: True, "32 threads, .* on sm_75: yours is True, and 16 fit"),
    (
        "first_draft.1",
        changed("first_draft.1", "i < 0 || ", ""),
        "C_in=1, C_out=1, groups=1, 6 inputs, .* 4 bytes before the start of 'x'",
    ),
    (
        "first_draft.1",
        edited(
            changed("first_draft.1", "sum = bias[co];", "sum = 0.0f;"),
            {"    const int ci = ": "    sum += bias[co];\n    const int ci = "},
        ),
        r"With C_in=3, C_out=2, groups=1, .*: y\[0, 0\] is .* and should be",
    ),
    (
        "first_draft.2",
        changed(
            "first_draft.2",
            "((static_cast<int64_t>(n) * c_out + co) * out_h + oh) * out_w + ow",
            "static_cast<int64_t>(((n * c_out + co) * out_h + oh) * out_w + ow)",
        ),
        r"With the last value of \[128, 64, 514, 518\]: at\[0\] is .* and should be 2\.18",
    ),
    ("first_draft.3", lambda: lab.Problem(), "should return a dict of Problem's arguments"),
    (
        "first_draft.3",
        lambda: {"padding": 1},
        r"there is no such problem: padding=\(1, 1\) leaves no output",
    ),
    ("first_draft.3", lambda: {"kernel": 1}, "there is no such problem: .*'kernel'"),
    (
        "first_draft.3",
        changed("first_draft.3", "width=3", "width=7"),
        "not yet at most 1,000 multiply-adds; yours: [0-9,]+$",
    ),
    (
        "first_draft.3",
        lambda: {"batch": 0, "kernel_size": 10**8},
        "at most 10,000 values in a tensor; yours: 10,000,000,000,000,000$",
    ),
    ("first_draft.4", lambda *_: 1, "PyTorch's own result: it returns 1, and should return True"),
    (
        "first_draft.4",
        changed(
            "first_draft.4",
            "bool((error <= 8 * 2**-24 * scale).all())",
            """(
        not (error > 8 * 2**-24 * scale).any()
    )""",
        ),
        "not yet a single NaN: yours says True nothing but NaN: yours says True$",
    ),
    (
        "first_draft.4",
        changed("first_draft.4", "    if y.shape != exact.shape:\n        return False\n", ""),
        "not yet one image where there are two, .*: yours says True channels .* it raises Value",
    ),
    (
        "first_draft.4",  # a mean: one wrong value is lost in it
        changed(
            "first_draft.4",
            "bool((error <= 8 * 2**-24 * scale).all())",
            "bool(error.sum() <= 1e-3 * scale.sum())",
        ),
        "one wrong value in the midst of right ones: yours says True",
    ),
    (
        "gather.1",
        lambda weight, padding, dilation: weight,
        r"and should return \(weight, \(rows, co",
    ),
    (
        "gather.1",
        changed("gather.1", ".swapaxes(0, 1)", ""),
        r"wants a weight \[C_out, C_in, KH, KW\], here \[3, 2, 3, 3\]; yours is \[2, 3, 3, 3\]",
    ),
    (
        "gather.1",
        changed("gather.1", "flipped, (rows, columns)", "flipped, (columns, rows)"),
        r"weight \[3, 4, 3, 4\], padding=0, dilation=1: the convolution's output has shape",
    ),
    ("gather.1", lambda weight, *_: (weight, -1), "two integers from 0 up, not -1"),
    ("gather.2", lambda *_: None, "it returns None, and should return a list of outputs"),
    ("gather.2", lambda *_: [0], "output 0 is in your list, and its sum has terms: 1"),
    ("gather.2", lambda *_: [1], "there is no output 1, for there are 1"),
    (
        "gather.2",
        changed("gather.2", "if o not in reached]", "if o not in reached] * 2"),
        "an output is in your list twice",
    ),
    (
        "coalesced.2",
        changed("coalesced.2", "cudaError_t coalesced(", "cudaError_t mine("),
        "The answer has a launcher, and none that is called 'coalesced': that is the name",
    ),
    (
        "coalesced.2",
        changed("coalesced.2", "  const int64_t blocks =", "  exit(0);\n  const int64_t blocks ="),
        "The launcher 'coalesced' ends the whole process: it must return an error",
    ),
    (
        "gpu_primer.1",
        changed("gpu_primer.1", "const float* x, float* y", "float* y, float factor").replace(
            "float factor, float factor", "float factor, const float* x"
        ),
        r"The kernel must keep its parameters: scale\(const float\* x, float\* y, float factor",
    ),
    ("gather.3", lambda *_: [0], r"it returns \[0\], and should return a range"),
    (
        "gather.3",
        changed("gather.3", "min(kernel, o + padding + 1)", "kernel"),
        "output 0: yours are the taps 0, 1; those that meet an input from 0 to 0 are 0",
    ),
    ("gather.4", lambda x, weight, problem, gather: x, "output has shape .* and should have"),
    (
        "gather.4",
        lambda x, weight, problem, gather: lab.reference.scatter(x, weight, **problem.arguments),
        "right, but it never calls the gather that it is given",
    ),
    (
        "gather.4",  # zeros between the inputs
        """
def by_phases(x, weight, problem, gather):
    rows, columns = problem.axes
    n, c_in, height, width = x.shape
    wide = ((height - 1) * rows.stride + 1, (width - 1) * columns.stride + 1)
    spread = np.zeros((n, c_in, *wide))
    spread[:, :, :: rows.stride, :: columns.stride] = x
    part = gather(spread, weight, (rows.dilation, columns.dilation))
    full = np.zeros((*part.shape[:2], *(a.out_size + 2 * a.padding for a in problem.axes)))
    full[:, :, : part.shape[2], : part.shape[3]] = part
    bottom, right = rows.padding + rows.out_size, columns.padding + columns.out_size
    return full[:, :, rows.padding : bottom, columns.padding : right]
""",
        "stride 2, dilation 1: right, but it multiplies [0-9,]+ times, and .* once is 3,780",
    ),
    (
        "ladder.1",
        lambda counts, gpu: float("nan"),
        "naive_gather star: it returns nan, which is no",
    ),
    ("ladder.2", lambda blocks, places, one_block: 0, "batch 1: it returns 0, which is no time"),
    ("ladder.3", lambda width, taps: width, "it returns 32 and should return two counts"),
    (
        "operator.1",
        changed("operator.1", "(15 - exponent)", "(17 - exponent)"),
        r"normal values: high of -?\d\.\d+ is -?inf",
    ),
    (
        "operator.1",
        changed("operator.1", "2048).astype", "2).astype"),
        r"normal values: .* is split into .* miss more than 4 units of a float32's rounding",
    ),
    ("operator.1", lambda values: (values, values, 1.0), "normal values: high must be float16 of"),
    (
        "operator.1",
        changed("operator.1", " if largest > 0 else 0", " if largest > 0 else 2000"),
        "zero values: scale=0.0 is no power of two",
    ),
    ("operator.2", lambda problem, kernels: "hopper", "it returns 'hopper'; this problem is taken"),
    ("operator.3", lambda near: None, "it returns None, and should return 'pytorch' or one of"),
    ("operator.3", lambda near: "pytorch", r"slower .* yours: 0\.0% .* 1\.7 times .* yours: 1\.00"),
    (
        "operator.4",
        changed("operator.4", "INPUTS = 2;", "INPUTS = 1;"),
        r"global loads: at most 80 requests; yours: 128, line \d+ .*window\[j\]",
    ),
    ("decoder.1", lambda share, wanted: None, "wanted 1.05: None is no speed-up"),
    (
        "decoder.2",
        lambda model, layer_class: model,
        "A model of three layers: the layer '0' is not",
    ),
    (
        "decoder.2",
        start("decoder.2"),
        "an optimizer: .* Parameters of its own.* a hook: .* no longer called.* in eval mode: .* "
        "used twice: one layer has become two.* nothing more: it is not swapped.* a subclass: it "
        "must be left alone.* weight_norm: it raises RuntimeError",
    ),
    ("decoder.2", lambda model, layer_class: None, "it must return the model that it was given"),
    ("decoder.3", lambda before, after, exact: 1, "it returns 1, and should return True or False"),
    ("decoder.3", lambda *_: True, "a layer that has lost digits: yours says True, but errors are"),
    (
        "decoder.3",
        changed("decoder.3", "max(1e-6, 2 * error(before, name))", "2 * error(before, name)"),
        "a loss that was exact by luck, and is one rounding off now: yours says False",
    ),
    ("decoder.4", lambda factor: np.ones(4), "factor 1: 1 weights are wanted, not shape"),
    ("hopper.1", lambda width, taps, padding: 0, "padding 0: 0 is no distance from one row to the"),
    ("hopper.2", lambda *_: 1.5, "step 0 of 1×1 taps, pitch 16, region 200: 1.5 is no integer"),
    (
        "hopper.2",
        lambda *_: 0,
        "region 200: the matrix begins at unit 0, which is outside the tile's",
    ),
    (
        "hopper.2",
        changed("hopper.2", "8 << 32", "16 << 32"),
        "the next eight pixels are said to be 16 units on, and are 8",
    ),
    ("hopper.3", lambda use, count: 0, r"turn\(0, 1\) is 0: it must be three integers"),
    (
        "hopper.3",
        lambda use, count: (use, 0, 1),
        r"turn\(1, 1\) is \(1, 0, 1\): it must be a buffer",
    ),
    ("hopper.3", lambda use, count: (0, 0, 1), "use 1 fills buffer 0 before use 0 is read"),
    (
        "hopper.3",
        lambda use, count: (0, use % 2, (use + 1) % 2),
        "count 2: the first round leaves some buffers out",
    ),
    (
        "hopper.3",
        lambda use, count: (use % count, use // count % 2, use // count % 2),
        "before use 0 is read, both sides wait for ever",
    ),
    (
        "hopper.3",
        lambda use, count: (use % count, (use // count + 1) % 2, (use // count + 1) % 2),
        "reads buffer 0, in which there is nothing yet",
    ),
    (
        "hopper.4",
        changed("hopper.4", "&& ww < width;", ";"),
        r"With an image of 1×1, .* out_of_bounds in line \d+: .* byte 4 of 'x', which is outside",
    ),
    (
        "ladder.4",
        changed("ladder.4", "THREAD_W = 4, THREAD_CO = 2;", "THREAD_W = 2, THREAD_CO = 4;"),
        r"right values .* shared loads: at least 2 FMAs per load; yours: 1\.56, line \d+",
    ),
]


def text_of(result) -> str:
    """What is printed, as one line."""
    return " ".join(str(result).split())


# --- every exercise -------------------------------------------------------------------------------


def test_there_are_enough():
    chapters = [name.rpartition(".")[0] for name in NAMES]
    assert len(NAMES) >= 24
    assert all(chapters.count(chapter) >= 3 for chapter in chapters)
    assert set(WRONG) == set(NAMES)


@each_exercise
def test_the_solution_passes(name):
    result = check(name, solution(name))
    assert result.passed, result
    assert str(result).startswith(f"{name}: right\n")


@each_exercise
def test_a_wrong_answer_is_told_what_is_wrong(name):
    answer, message = WRONG[name]
    result = check(name, answer)
    assert result.passed is False
    assert str(result).startswith(f"{name}: not yet\n")
    assert re.search(message, text_of(result)), result


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        pytest.param(*one, id=f"{one[0]}-{[name for name, *_ in ALSO_WRONG[:i]].count(one[0]) + 1}")
        for i, one in enumerate(ALSO_WRONG)
    ],
)
def test_another_wrong_answer_is_told_what_is_wrong(name, answer, message):
    result = check(name, answer)
    assert result.passed is False
    assert re.search(message, text_of(result)), result


@each_exercise
def test_the_start_does_not_pass(name):
    result = check(name, start(name))
    assert not result.passed
    if isinstance(start(name), str):
        assert "This is the starting text, unchanged." in str(result)


@each_exercise
def test_hints_lead_on(name):
    hints = str(lab.exercises.hints(name)).splitlines()
    assert len(hints) >= 2
    for number, text in enumerate(hints, 1):
        assert text == f"{number}. {lab.exercises.hint(name, number)}"
    with pytest.raises(ValueError, match=rf"number={len(hints) + 1}: {name} has hints 1 to"):
        lab.exercises.hint(name, len(hints) + 1)


@each_exercise
def test_hints_and_reasons_hold_no_number_that_nothing_compares(name):
    for text in (*lab.exercises.hints(name).texts, solution(name).why):
        text = re.sub(r"`[^`]+`|\$[^$]+\$|(?:dilation|stride) \d", "…", text, flags=re.IGNORECASE)
        assert not re.search(r"(?<!\w)\d", text)


# --- what hints and reasons say -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (
            "simulator.2",  # two tiles in turn
            {
                "tile[64]": "tile[2][64]",
                "tile[threadIdx.x] =": "tile[i % 2][threadIdx.x] =",
                "sum += tile[": "sum += tile[i % 2][",
            },
        ),
        (
            "coalesced.2",  # any tile that is a whole number of warps wide
            changed("coalesced.2", "TILE_H = 4;", "TILE_H = 8;").replace("W = 64;", "W = 32;"),
        ),
        ("ladder.2", lambda blocks, places, one_block: -(-blocks // places) * one_block),
        (
            "ladder.4",  # other register blocks
            changed("ladder.4", "THREAD_W = 4, THREAD_CO = 2;", "THREAD_W = 8, THREAD_CO = 1;"),
        ),
        (
            "hopper.3",  # as the kernel has it
            lambda use, count: (use % count, use // count & 1, use // count & 1 ^ 1),
        ),
        (
            "operator.1",  # a smaller scale
            changed("operator.1", "(15 - exponent)", "(14 - exponent)"),
        ),
        (
            "operator.3",  # more caution, and the nearer problems count more
            """
def guess(near):
    found = {}
    for distance, ratios in near[:4]:
        for kernel, ratio in ratios.items():
            found.setdefault(kernel, []).append((1 / (0.5 + distance), np.log(ratio)))
    means = {k: sum(w * r for w, r in of) / sum(w for w, _ in of) for k, of in found.items()}
    best = max(means, key=means.get)
    return best if means[best] >= np.log(1.25) else "pytorch"
""",
        ),
        ("operator.4", changed("operator.4", "INPUTS = 2;", "INPUTS = 4;")),
        (
            "measuring.2",  # who wins more rounds than a coin would
            """
def faster(ours, theirs):
    wins = sum(a < b for a, b in zip(ours, theirs))
    return "ours" if wins >= 15 else "theirs" if wins <= 5 else None
""",
        ),
        (
            "measuring.3",  # a flush after the work of another makes Python early enough, too
            changed(
                "measuring.3", "machine.busy(1e-3)", "machine.flush()\n        machine.flush()"
            ),
        ),
    ],
)
def test_another_answer_that_is_right(name, answer):
    result = check(name, answer)
    assert result.passed, result


def test_a_single_piece_keeps_the_first_budget_and_not_the_second():
    answer = changed("register_blocked.1", "THREAD_W = 12; ", "THREAD_W = 4; ")
    first, second = re.findall(
        r"(?:most|least) ([\d.]+) [^;]*; yours: ([\d.]+)",
        text_of(check("register_blocked.1", answer)),
    )
    assert float(first[1]) <= float(first[0])
    assert float(second[1]) < float(second[0])


@pytest.mark.parametrize(("pixels", "keeps"), [(20, True), (28, True), (36, False)])
def test_pixels_that_keep_both_budgets(pixels, keeps):
    """As the solution says."""
    assert "twelve, twenty and twenty-eight keep both" in solution("register_blocked.1").why
    answer = changed("register_blocked.1", "THREAD_W = 12; ", f"THREAD_W = {pixels}; ")
    result = check("register_blocked.1", answer)
    assert result.passed == keeps
    assert keeps or re.search(r"at most 2\.5 wavefronts [^;]*; yours: 2\.5\d", text_of(result))


def test_words_between_the_products_of_winograd():
    size, banks = figures.constants(
        lab.stages["winograd"], "f23::KW * f23::BLOCK_CO", "32"
    ).values()
    for words in range(0, 2 * banks, 4):
        pieces = {(start + i) % banks for start in (0, size + words) for i in range(4)}
        assert (len(pieces) == 8) == (words % banks != 0)


def test_how_many_loads_the_register_blocks_save():
    def per_load(name: str, answer) -> float:
        return float(re.search(r"FMAs per load; yours: ([\d.]+)", str(check(name, answer)))[1])

    saved = {
        name: per_load(name, solution(name)) / per_load(name, start(name))
        for name in ("register_blocked.2", "register_blocked.3")
    }
    assert 3 < saved["register_blocked.2"] < 4
    assert saved["register_blocked.3"] == 4


def test_rules_that_pick_the_fastest_for_the_decoders_layers():
    names: dict = {}
    exec(solution("operator.2").answer, names)
    for alone in decoder_record.find("nvidia-h200-decoder").mode("float32").alone.values():
        seconds = alone.seconds
        assert names["choose"](alone.problem, set(seconds)) == min(seconds, key=seconds.get)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"in_channels": 2}, ["[C_out, C_in]"]),
        ({"kernel_size": (1, 2)}, ["[KW, KH]"]),
        ({"kernel_size": 1}, ["[KW, KH]", "flips", "dilation"]),
        ({"stride": 3}, ["stride"]),
        ({"padding": 1}, ["padding"]),
        ({"dilation": 2}, ["dilation"]),
        ({"output_padding": 0}, ["output_padding"]),
        ({"out_channels": 2}, ["[C_out, C_in]", "co % groups"]),
        ({"bias": False}, ["forgets the bias", "first channel's bias"]),
        ({"batch": 1}, ["first image"]),
        ({"in_channels": 8}, ["in pairs"]),
        ({"width": 4}, ["in fours"]),
    ],
)
def test_a_wrong_operator_is_right_where_its_mistake_does_not_show(change, names):
    given: dict = {}
    exec(solution("first_draft.3").answer, given)
    found = first_draft.unseen(lab.Problem(**given["test_problem"]() | change))
    assert len(found) == len(names)
    assert all(name in text for name, text in zip(names, found, strict=True)), found


def test_the_bound_that_the_first_drafts_judge_is_told():
    assert "8 * 2**-24 of that" in start("first_draft.4")
    assert reference.FLOAT32_GATE * reference.UNIT_ROUNDOFF == 8 * 2**-24


def test_the_decoder_begins_with_tents():
    names: dict = {"np": np}
    exec(solution("decoder.4").answer, names)
    weight = SegmentationNet(classes=3, width=1).up4.weight.detach().numpy()
    tent = names["bilinear"](2)
    assert np.array_equal(weight, np.broadcast_to(np.outer(tent, tent), weight.shape))


def test_the_least_pitch_is_the_kernels():
    source = """
    #include "warpgroup_plan.cuh"
    extern "C" int pitch(int width, int taps, int padding) {
      const int out_width = width + taps - 1 - 2 * padding;
      const Axis axis = make_axis(width, out_width, taps, 1, padding, 1);
      return warpgroups::Reach(axis, 1).positions(out_width, taps - 1, false);
    }
    """
    library = compile_source(source, "simulator", name="pitch").library
    names: dict = {}
    exec(solution("hopper.1").answer, names)
    for sizes in ((6, 7, 0), (5, 1, 0), (6, 7, 3), (9, 4, 1), (3, 5, 2), (40, 7, 5)):
        assert names["pitch"](*sizes) == library.pitch(*sizes)


# --- what is said of answers in CUDA --------------------------------------------------------------

LOOP = "for (int ci = 0; ci < group_in; ++ci) {"


def test_a_compiler_error_has_the_learners_line():
    text = start("coalesced.2").replace("const int oh =", "const int oh_ =")
    line = next(i for i, t in enumerate(text.splitlines(), 1) if "if (oh >=" in t)
    result = text_of(check("coalesced.2", text))
    assert f"The compiler refuses line {line}: 'oh' was not declared" in result
    assert "if (oh >= p.out_height || ow >= p.out_width) return;" in result


def test_the_kernel_alone_is_enough_and_has_lines_of_its_own():
    kernel = figures.listing(str(start("naive_gather.1")), "naive_gather_kernel").text
    whole = solution("naive_gather.1").answer
    mended = figures.listing(whole, "naive_gather_kernel").text
    assert "cudaError_t" not in mended
    assert check("naive_gather.1", mended).passed
    line = next(i for i, t in enumerate(kernel.splitlines(), 1) if "fmaf(" in t)
    assert f"line {line} sum = fmaf(input" in text_of(check("naive_gather.1", kernel))
    broken = kernel.replace("sum = fmaf(", "total = fmaf(")
    assert f"refuses line {line}: 'total' was not declared" in text_of(
        check("naive_gather.1", broken)
    )


def test_changes_of_the_start_are_an_answer():
    old, new = "y[i * stride + k] +=", "y[i * stride + k] = y[i * stride + k] +"
    assert "write_conflict in line 7" in text_of(check("naive_gather.2", {old: new}))
    result = text_of(check("naive_gather.2", {"z[i]": "y[i]"}))
    assert "does not fit: the text to replace must stand there once, not 0 times: z[i]" in result


def test_a_loop_without_end_comes_to_one():
    result = text_of(check("coalesced.2", {LOOP: LOOP + "\n for (;;) { if (sum > 1e9f) break; }"}))
    assert "has not come to an end after 20,000,000 iterations" in result


def test_a_crash_is_told_with_its_line():
    text = start("coalesced.2").replace("fmaf(*x, *w, sum)", "fmaf(x[1 << 28], *w, sum)")
    line = next(i for i, t in enumerate(text.splitlines(), 1) if "1 << 28" in t)
    result = check("coalesced.2", text)
    assert f"out_of_bounds in line {line}: thread (0, 0, 0)" in text_of(result)
    assert result.report.hazards
    zero = {"sum = fmaf(*x, *w, sum);": "sum += 100 / (static_cast<int>(sum) / 1000000);"}
    assert "integer division by zero" in text_of(check("coalesced.2", zero))


def test_a_launcher_is_tried_wherever_the_package_was_found(monkeypatch, tmp_path):
    """Not by its path alone, and not with what lies in the current folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "pickle.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    assert check("coalesced.2", lab.exercises.solution("coalesced.2")).passed
    monkeypatch.setattr(cuda, "_TRY_LAUNCHERS", "import no_such_module")
    with pytest.raises(lab.BuildError, match="can't try the launcher: Traceback"):
        check("coalesced.2", lab.exercises.solution("coalesced.2"))


def test_a_launcher_without_end_or_with_a_crash_brings_nothing_down(monkeypatch):
    fits = "if (floats <= SHARED_FLOATS) {"
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "HOST_SECONDS", 3.0)
        result = text_of(check("shared_tiled.1", {fits: "if (floats < 0) {"}))
    assert "The launcher 'shared_tiled' has not come to an end after 3 seconds" in result
    result = text_of(check("shared_tiled.1", {fits: f"*(volatile int*)nullptr = 0;\n    {fits}"}))
    assert "The launcher 'shared_tiled' crashes (SIGSEGV) before any kernel runs" in result
    # What is only in order: the race is still there.
    assert "race" in text_of(check("shared_tiled.1", {"CHUNK_CI = 16;": "CHUNK_CI = 8;"}))


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (
            "coalesced.2",
            3,
            r"takes CUDA C\+\+ as a str, or a dict of changes .* this is of type int",
        ),
        ("coalesced.2", None, "this is of type NoneType"),
        ("coalesced.2", "", "neither the launcher 'coalesced' nor the kernel 'coalesced_kernel'"),
        (
            "coalesced.2",
            {"cudaStream_t stream) {": "cudaStream_t stream, int more) {"},
            "The launcher must keep its parameters: coalesced.const float. input, .* stream.",
        ),
        (
            "naive_gather.3",
            {"int stride, int out_size": "int stride"},
            "refuses line 4: 'out_size' was not declared",
        ),
        (
            "naive_gather.3",
            "__device__ float nowhere(int);\n"
            "__global__ void gather_1d(const float* x, const float* w, float* y, int size,\n"
            "                          int taps, int stride, int out_size) {\n"
            "  y[0] = nowhere(1);\n"
            "}\n",
            r"refuses line 4: nowhere\(int\) is declared, but nowhere defined",
        ),
        ("naive_gather.3", "__global__ void gather_1d() {\n", "the '{' in line 1 is never closed"),
        ("naive_gather.3", "kernel.cu", "pass the text, not the name of a file"),
        (
            "naive_gather.3",
            {"int out_size)": "int out_size, int more)"},
            "must keep its parameters: gather_1d.const float. x, .* int out_size.",
        ),
        (
            "naive_gather.3",
            {"float* y,": "double* y,"},
            r"must keep its parameters: gather_1d\(const float\* x, const float\* w, float\* y",
        ),
        ("naive_gather.3", {"gather_1d(": "gather("}, "no kernel 'gather_1d' .* it has 'gather'"),
        ("naive_gather.3", "int x;", "it has none"),
        ("coalesced.1", 1.25, "takes 2 numbers: sectors .* This is 1.25"),
        ("coalesced.1", (1, "1"), "takes 2 numbers"),
        ("coalesced.1", (1, float("nan")), "takes 2 numbers"),
        ("scatter_reference.1", 0, "takes the function 'output_padding', .* this is of type int"),
        ("scatter_reference.1", lambda size: 0, "calls output_padding.size, .* does not fit"),
        ("scatter_reference.1", "def f(:", "Python refuses line 1"),
        ("scatter_reference.1", "x = 1", "NameError: it defines no 'output_padding'"),
        (
            "scatter_reference.1",
            lambda size, kernel, stride, padding, dilation: 1 // 0,
            r"output_padding\(9, 1, 1, 0, 1\) raises ZeroDivisionError",
        ),
        ("scatter_reference.3", lambda *_: float("nan"), "the result has shape .. and should have"),
        (
            "tensor_core.1",
            lambda row, half: 4 * half,
            r"place\(1, 0\) is 0, and so is place\(0, 0\)",
        ),
        ("tensor_core.1", lambda row, half: row, r"place\(0, 1\) is 0|must be a multiple of 4"),
        ("tensor_core_split.2", lambda parts: [(0, 3)], r"\(0, 3\) must be a pair of different"),
        ("tensor_core_split.1", lambda v, r: (r(v),), "returns 1 parts and should return two"),
        ("winograd.1", lambda d, g: [d[0] * d[1]] * 4, "raises TypeError"),
        (
            "operator.3",
            lambda near: near[99],
            r"guess\(\[\(.{50,60}…\) raises IndexError: list index out of range",
        ),
    ],
)
def test_what_is_no_answer_is_told_and_not_raised(name, answer, message):
    result = check(name, answer)
    assert not result.passed
    assert re.search(message, text_of(result)), result


def test_what_fails_before_the_answer_is_called_is_not_its_fault(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("no such record")

    monkeypatch.setattr("convt_lab.records.load_named", missing)
    with pytest.raises(FileNotFoundError, match="no such record"):
        check("ladder.1", solution("ladder.1"))


def test_nan_is_never_right():
    text = solution("simulator.3").answer.replace("0.0f;", "NAN;")
    result = text_of(check("simulator.3", text))
    assert re.search(r"y\[0\] is nan and should be -?\d+; 3 of 3 values are wrong", result)


def test_a_budget_is_judged_only_if_values_are_right_and_bounds_both_ways():
    lazy = changed("winograd.3", "    m[3] = fmaf(d[1] - d[3], g[2], m[3]);\n", "")
    assert "should be" in text_of(check("winograd.3", lazy))
    unseen = re.sub(
        r"m\[(\d)\] = fmaf\((.*), (.*), m\[\d\]\);",
        r"m[\1] += (\2) * (\3);",
        solution("winograd.3").answer,
    )
    result = text_of(check("winograd.3", unseen))
    assert "at least 3,072 and at most 4,096 FMAs; yours: 0" in result


def test_parameters_may_have_other_names():
    text = start("coalesced.3").replace("* w", "* taps_").replace("w[k]", "taps_[k]")
    result = text_of(check("coalesced.3", text))
    assert re.search(r"loads of 'taps_': at most 48 requests; yours: 66, line 10", result)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A back end called gpu, which is the simulator; returns what changes the texts for it."""
    change = []

    def compiled(text, backend, name):
        for old, new in change if backend == "gpu" else []:
            text = edited(text, {old: new})
        return compile_source(text, "simulator", name=name)

    monkeypatch.setattr(cuda, "backend_named", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(cuda, "compile_source", compiled)
    return change


def test_what_the_simulator_finds_right_runs_on_the_gpu_too(pretended_gpu):
    answer = solution("simulator.2")
    assert "right values on the GPU, too" in str(check("simulator.2", answer, backend="gpu"))
    pretended_gpu.append(("% 64]", "% 32]"))
    result = check("simulator.2", answer, backend="gpu")
    assert not result.passed
    assert re.search(r"on the GPU, three rows, draw 0: y\[31\] is", text_of(result))
    # A wrong answer is never launched there.
    pretended_gpu.append(("no such text", ""))
    assert "race" in str(check("simulator.2", start("simulator.2"), backend="gpu"))


def test_a_gpu_that_lacks_the_instruction_is_not_asked(pretended_gpu):
    pretended_gpu.append(("no such text", ""))
    result = check("tensor_core.3", solution("tensor_core.3"), backend="gpu")
    assert result.passed
    assert "not run on this GPU: it takes compute capability 8.0" in str(result)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    answer = edited(solution("simulator.2").answer, {"float sum": "// anew\n  float sum"})
    with pytest.raises(lab.BuildError, match="torch sees no CUDA device"):
        check("simulator.2", answer, backend="gpu")
    assert "on the GPU" not in str(check("coalesced.1", (1.25, 1), backend="gpu"))


@pytest.mark.gpu
@each_exercise
def test_the_solution_passes_on_a_gpu(name):
    result = check(name, solution(name), backend="gpu")
    assert result.passed, result


def test_names_and_back_ends_that_do_not_exist():
    with pytest.raises(ValueError, match=r"name='coalesced.9': no such exercise; there are scatt"):
        check("coalesced.9", "")
    for function in (start, solution, lab.exercises.hint, lab.exercises.hints):
        with pytest.raises(ValueError, match=r"there are .*simulator\.3"):
            function("nothing")
    with pytest.raises(ValueError, match="backend='cpu': must be"):
        check("coalesced.2", "", backend="cpu")


# --- the book -------------------------------------------------------------------------------------


def cells() -> list[tuple[str, object]]:
    return [
        (path.stem, cell)
        for path in sorted((ROOT / "book").glob("*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
    ]


@pytest.mark.parametrize("function", ["start", "check", "hints", "solution"])
def test_chapters_and_registry_name_the_same_exercises(function):
    named = [
        (chapter, name)
        for chapter, cell in cells()
        if cell.cell_type == "code"
        for name in re.findall(rf'exercises\.{function}\(\s*"([^"]+)"', cell.source)
    ]
    assert sorted({name for _, name in named}) == sorted(NAMES)
    assert all(name.rpartition(".")[0] == chapter for chapter, name in named)


@each_exercise
def test_the_chapter_shows_a_start_that_fails_and_a_solution_that_passes(name):
    outputs = {"check": "", "solution": ""}
    for _, cell in cells():
        if cell.cell_type != "code":
            continue
        for function in outputs:
            if f'exercises.{function}("{name}"' in cell.source:
                for output in cell.outputs:
                    outputs[function] += "".join(output.get("data", {}).values())
    assert f"{name}: not yet" in outputs["check"]
    assert ":class: dropdown" in outputs["solution"]
    assert f"{name}: right" in outputs["solution"]


@pytest.mark.parametrize("name", ["naive_gather.3", "simulator.2"])
def test_a_kernel_that_the_chapter_shows_is_the_start(name):
    chapter = name.rpartition(".")[0]
    typed = "\n".join(cell.source for at, cell in cells() if at == chapter)
    assert start(name).strip() in typed


def test_importing_the_library_imports_no_exercises():
    code = (
        "import sys, convt_lab as lab; assert 'convt_lab.exercises' not in sys.modules;"
        "assert 'matplotlib' not in sys.modules; print(lab.exercises.names[0]);"
        "assert 'matplotlib' not in sys.modules; assert 'exercises' in lab.__all__"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "scatter_reference.1\n"
