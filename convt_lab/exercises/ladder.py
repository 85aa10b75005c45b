"""The exercises of the chapter that measures the ladder."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from numbers import Real

import numpy as np

from convt_lab import architectures, records
from convt_lab.exercises.cuda import Budget, KernelExercise, Launch
from convt_lab.exercises.python import FunctionExercise
from convt_lab.problem import Problem
from convt_lab.stages import stages

__all__ = ["EXERCISES"]

SCHEDULERS = 4  # of an SM

#: What a model has to explain of each measured time, and how far the waves may be off.
EXPLAINED, OFF = 2 / 3, 0.1


@functools.cache
def _profiles() -> dict[str, dict]:
    text = (records.FOLDER / "nvidia-h200-profiles.json").read_text(encoding="utf-8")
    return {name: profile for name, (profile,) in json.loads(text)["profiles"].items()}


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf


def _judge_least_seconds(function: Callable) -> tuple[str | None, str]:
    record = records.load_named("nvidia-h200")
    wrong, shares = [], []
    for name, profile in _profiles().items():
        measured = profile["duration_seconds"]
        gpu = {
            "fmas_per_second": record.ceilings.fp32_fma / 2,
            "bytes_per_second": record.ceilings.copy,
            "sms": record.gpu.multiprocessors,
            "schedulers": SCHEDULERS,
            "clock_hz": profile["sm_clock_hz"],
        }
        slots = gpu["sms"] * gpu["schedulers"] * gpu["clock_hz"] * measured
        counts = {
            "fmas": profile["fma"],
            "dram_bytes": profile["dram_read_bytes"] + profile["dram_write_bytes"],
            "sectors": profile["l1_global_load_sectors"],
            "wavefronts": profile["shared_load_wavefronts"] + profile["shared_store_wavefronts"],
            "instructions": round(profile["issue_slots_busy_percent"] / 100 * slots),
        }
        seconds = function(counts, gpu)
        if not _is_positive(seconds):
            return f"{name}: it returns {seconds!r}, which is no time", ""
        share = float(seconds) / measured
        shares.append(share)
        if not EXPLAINED <= share <= 1:
            what = "more than it took" if share > 1 else "too little of it"
            wrong.append(
                f"{name}: yours {1000 * float(seconds):.3f} ms of {1000 * measured:.3f}, {what}"
            )
    if wrong:
        bounds = f"at least {EXPLAINED:.0%} of each measured time, and never more than it"
        return "\n".join([bounds, *wrong]), ""
    return None, (
        f"{len(shares)} measured times, of which it explains {min(shares):.0%} to {max(shares):.0%}"
    )


def _judge_waves(function: Callable) -> tuple[str | None, str]:
    record = records.load_named("nvidia-h200")
    (blocks_per_sm,) = {
        launch["blocks_per_sm"]
        for row in json.loads(architectures.RECORD.read_text(encoding="utf-8"))["kernels"]
        if (row["stage"], row["architecture"]) == ("winograd", "sm_90")
        for launch in row["launches"]
        if launch["problem"] == "classic"
    }
    places = record.gpu.multiprocessors * blocks_per_sm
    points = [point for axis in ("batch", "side") for point in record.growth[axis]]
    one_wave = points[0].row("winograd").seconds()
    worst = 0.0
    for point in points:
        (launch,) = stages["winograd"].launches(point.problem)
        blocks = math.prod(launch.grid)
        seconds, measured = function(blocks, places, one_wave), point.row("winograd").seconds()
        if not _is_positive(seconds):
            return f"{point.name}: it returns {seconds!r}, which is no time", ""
        off = float(seconds) / measured - 1
        if not abs(off) <= OFF:
            return (
                f"{point.name}, {blocks:,} blocks for {places} places: yours "
                f"{1000 * float(seconds):.3f} ms, measured {1000 * measured:.3f}; "
                f"at most {OFF:.0%} off",
                "",
            )
        worst = max(worst, abs(off))
    return None, f"{len(points)} measured times, and the prediction is at most {worst:.1%} off"


def _judge_requests(function: Callable) -> tuple[str | None, str]:
    count = 0
    for width, taps in ((32, 1), (32, 3), (8, 7), (40, 7), (96, 15), (200, 7)):
        problem = Problem(1, 1, 1, 1, width, kernel_size=(1, taps))
        report = stages["coalesced"].profile(*problem.random_inputs(), **problem.arguments)
        (site,) = (s for s in report.sites if (s.buffer, s.op) == ("input", "load"))
        found = function(width, taps)
        if not isinstance(found, tuple | list) or len(found) != 2:
            return f"it returns {found!r} and should return two counts", ""
        for what, yours, counted in zip(
            ("requests", "sectors"), found, (site.requests, site.sectors), strict=True
        ):
            if yours != counted:
                more = "more" if not (isinstance(yours, Real) and yours > counted) else "fewer"
                return (
                    f"width {width}, {taps} taps: {yours} {what} are wrong; the simulator counts "
                    f"{more}",
                    "",
                )
        count += 1
    return None, f"as the simulator counts, for {count} rows"


def _rows() -> list[Launch]:
    launches = []
    for c_in, c_out, size in ((1, 1, 2), (3, 11, 70), (4, 16, 250)):
        generator = np.random.default_rng(size)
        x = generator.standard_normal((c_in, size)).astype(np.float32)
        w = generator.standard_normal((c_in, c_out, 7)).astype(np.float32)
        out_size = size + 6
        exact, scale = np.zeros((c_out, out_size)), np.zeros((c_out, out_size))
        for ci in range(c_in):
            for co in range(c_out):
                exact[co] += np.convolve(x[ci].astype(np.float64), w[ci, co])
                scale[co] += np.convolve(np.abs(x[ci]).astype(np.float64), np.abs(w[ci, co]))
        y = np.full(exact.shape, np.nan, np.float32)
        grid = (math.ceil(out_size / 64), math.ceil(c_out / 8))
        label = f"{c_in} input channels, {c_out} output channels, {size} inputs in a row"
        args = (x, w, y, c_in, c_out, size)
        launches.append(Launch(label, grid, 64, args, 2, exact, scale))
    return launches


EXERCISES = (
    FunctionExercise(
        name="ladder.1",
        function="least_seconds",
        text='''
def least_seconds(counts, gpu):
    """The least time that a kernel takes, in seconds.

    counts: "fmas", "dram_bytes"; "sectors" of global loads; "wavefronts" of
    shared accesses; "instructions" of warps, FMAs among them.
    gpu: "fmas_per_second"; "bytes_per_second" from DRAM; "sms"; "schedulers" of
    an SM; "clock_hz".
    """
    fmas = counts["fmas"] / gpu["fmas_per_second"]
    dram = counts["dram_bytes"] / gpu["bytes_per_second"]
    return max(fmas, dram)
''',
        edits={
            "    return max(fmas, dram)\n": (
                '    clocks = gpu["sms"] * gpu["clock_hz"]\n'
                '    first_level = (counts["sectors"] / 4 + counts["wavefronts"]) / clocks\n'
                '    issuing = counts["instructions"] / (gpu["schedulers"] * clocks)\n'
                "    return max(fmas, dram, first_level, issuing)\n"
            )
        },
        judge=_judge_least_seconds,
        hints=(
            "The start is the roofline, and the first stages stand far below it. What else has a "
            "rate? The chapter's table of floors has two more columns.",
            "An SM serves one wavefront or four sectors a clock, and each of its schedulers issues "
            "one instruction a clock. How many clocks do all SMs have in a second?",
            'With `clocks = gpu["sms"] * gpu["clock_hz"]`, the instructions take '
            '`counts["instructions"] / (gpu["schedulers"] * clocks)` seconds. The least time is '
            "the largest of the four.",
        ),
        why="Each count divided by its rate is a floor, and the highest floor counts. The roofline "
        "has two of them, and explains hardly anything of the first three stages. What explains "
        "all ten times is the floor of issuing: a scheduler issues one instruction a clock, "
        "whatever it is. The floor of the first-level memory is never the highest here.",
    ),
    FunctionExercise(
        name="ladder.2",
        function="predict",
        text='''
def predict(blocks, places, one_block):
    """Seconds for so many blocks, if there are places for some of them at once.

    one_block: seconds for a block from its beginning to its end.
    """
    return blocks / places * one_block
''',
        edits={
            "def predict(": "import math\n\n\ndef predict(",
            "blocks / places * one": "math.ceil(blocks / places) * one",
        },
        judge=_judge_waves,
        hints=(
            "What does it predict for a single block?",
            "A block that begins late ends late, however few begin with it. So count waves, not "
            "their average filling.",
            "Round the quotient up, with `math.ceil` or as `-(-blocks // places)`.",
        ),
        why="A wave takes as long as a block, be it full or nearly empty. One image and four take "
        "the same time, because neither fills a wave; from there on the time goes up in steps. "
        "One measured time and one division explain both curves of the chapter's growth, over "
        "images and over sides, to within the tolerance.",
    ),
    FunctionExercise(
        name="ladder.3",
        function="requests_and_sectors",
        text='''
def requests_and_sectors(width, taps):
    """Of all loads of one row of inputs by `coalesced`: stride 1, no padding.

    A row has a multiple of eight inputs and begins with a sector. Lane l of warp v
    owns output 32 v + l, if there is one; there are width + taps - 1 of them. A
    lane's first tap meets the last input that it may, min(output, width - 1), and
    every further tap the input before.
    """
    warps = (width + taps - 1 + 31) // 32
    return warps * taps, warps * taps * 4
''',
        whole='''
def requests_and_sectors(width, taps):
    """Of all loads of one row of inputs by `coalesced`: stride 1, no padding."""
    out_width = width + taps - 1
    requests = sectors = 0
    for first in range(0, out_width, 32):
        outputs = range(first, min(first + 32, out_width))
        for tap in range(taps):
            inputs = [min(output, width - 1) - tap for output in outputs]
            # Input i meets output o with tap o - i, if there is such a tap.
            loaded = {i for i, o in zip(inputs, outputs) if i >= 0 and o - i < taps}
            requests += len(loaded) > 0
            sectors += len({i // 8 for i in loaded})
    return requests, sectors
''',
        judge=_judge_requests,
        hints=(
            "Thirty-two neighbours fill four sectors only if the first of them begins one. Which "
            "do the second tap's lanes load?",
            "Don't think, count: for each warp and each of its rounds, collect the set of "
            "`input // 8` over its lanes. A round in which no lane loads is no request.",
            "In round `tap` the lane of output o loads input `i = min(o, width - 1) - tap`, if "
            "`i >= 0` and its tap `o - i` is below `taps`.",
        ),
        why="A request is a round of a warp in which any lane loads, and its sectors are the "
        "different `input // 8`. Once the window has moved by one input, it begins in the middle "
        "of a sector and touches five. At the rims lanes have fewer taps, so late rounds touch "
        "fewer sectors, and the last of them may be nobody's. Every counter of the simulator is "
        "such a count, of the addresses that the kernel really computes.",
    ),
    KernelExercise(
        name="ladder.4",
        kernel="row",
        text="""
constexpr int TAPS = 7;
constexpr int TILE_W = 64, TILE_CO = 8;  // outputs of a block of 64 threads

// A row of the star: x [C_in, size], w [C_in, C_out, TAPS], y [C_out, size + TAPS - 1];
// y[co][o] is the sum over ci and k of x[ci][o - k] * w[ci][co][k].
__global__ void row(const float* x, const float* w, float* y,
                    int c_in, int c_out, int size) {
  const int out_size = size + TAPS - 1;
  const int o = blockIdx.x * TILE_W + threadIdx.x;
  if (o >= out_size) return;
  for (int q = 0; q < TILE_CO; ++q) {
    const int co = blockIdx.y * TILE_CO + q;
    if (co >= c_out) return;
    float sum = 0.0f;
    for (int ci = 0; ci < c_in; ++ci) {
      for (int k = 0; k < TAPS; ++k) {
        const int i = o - k;
        if (i < 0 || i >= size) continue;
        sum = fmaf(x[ci * size + i], w[(ci * c_out + co) * TAPS + k], sum);
      }
    }
    y[co * out_size + o] = sum;
  }
}
""",
        launches=_rows,
        budgets=(
            Budget("FMAs per load", least=20),
            Budget("FMAs per load", least=2, space="shared"),
            Budget("sectors per request", most=6),
        ),
        whole="""
constexpr int TAPS = 7;
constexpr int TILE_W = 64, TILE_CO = 8;      // outputs of a block of 64 threads,
constexpr int THREAD_W = 4, THREAD_CO = 2;   // and of a thread
constexpr int COLUMNS = TILE_W / THREAD_W;   // of threads
constexpr int INPUTS = TILE_W + TAPS - 1;    // of a channel, that a block meets,
constexpr int WINDOW = THREAD_W + TAPS - 1;  // and a thread
static_assert(COLUMNS * (TILE_CO / THREAD_CO) == 64, "each thread has outputs");

// A row of the star: x [C_in, size], w [C_in, C_out, TAPS], y [C_out, size + TAPS - 1].
__global__ void row(const float* x, const float* w, float* y,
                    int c_in, int c_out, int size) {
  __shared__ float inputs[INPUTS], weights[TILE_CO * TAPS];
  const int out_size = size + TAPS - 1;
  const int first = blockIdx.x * TILE_W, first_co = blockIdx.y * TILE_CO;
  const int column = threadIdx.x % COLUMNS * THREAD_W;
  const int q = threadIdx.x / COLUMNS * THREAD_CO;
  float sum[THREAD_CO][THREAD_W] = {};
  for (int ci = 0; ci < c_in; ++ci) {
    __syncthreads();  // nobody reads the channel before any more
    for (int j = threadIdx.x; j < INPUTS; j += 64) {
      const int i = first - (TAPS - 1) + j;
      inputs[j] = i >= 0 && i < size ? x[ci * size + i] : 0.0f;
    }
    // The weights of neighbouring output channels lie end to end.
    if (threadIdx.x < TILE_CO * TAPS) {
      const int index = first_co * TAPS + threadIdx.x, count = c_out * TAPS;
      weights[threadIdx.x] = index < count ? w[ci * count + index] : 0.0f;
    }
    __syncthreads();
    float window[WINDOW];
#pragma unroll
    for (int j = 0; j < WINDOW; ++j) window[j] = inputs[column + j];
#pragma unroll
    for (int k = 0; k < TAPS; ++k) {
#pragma unroll
      for (int c = 0; c < THREAD_CO; ++c) {
        const float weight = weights[(q + c) * TAPS + k];
#pragma unroll
        for (int j = 0; j < THREAD_W; ++j) {
          sum[c][j] = fmaf(window[j + TAPS - 1 - k], weight, sum[c][j]);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < THREAD_CO; ++c) {
#pragma unroll
    for (int j = 0; j < THREAD_W; ++j) {
      const int co = first_co + q + c, o = first + column + j;
      if (co < c_out && o < out_size) y[co * out_size + o] = sum[c][j];
    }
  }
}
""",
        hints=(
            "One rung at a time. First let the block copy what its tile meets of one input "
            "channel, inputs and weights, into shared memory, with zeros outside the row, and "
            "sum from there. That keeps the first budget, and not the second.",
            "Then let a thread own several outputs, say four neighbours of two channels, in "
            "`float sum[2][4]`. With all threads at work, that is the block's tile. It loads a "
            "window of ten inputs once for an input channel, and each weight once.",
            "Put a barrier after the copies, and another one before the next channel's. Copy zeros "
            "where inputs or channels run out, and test once more before each store.",
        ),
        why="All rungs in one kernel: neighbouring lanes copy neighbours (`coalesced`); a block "
        "brings each value once for all its outputs (`shared_tiled`); a thread loads a value from "
        "shared memory once for several of its own (`register_blocked`). Its stores leave gaps "
        "between lanes, but there is one for an output, after all channels. Two barriers for an "
        "input channel keep the kernel simple; the ladder's copy several channels at once.",
    ),
)
