"""The exercises of the chapter on Hopper's own instruction, which can be checked on any CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convt_lab import figures
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.exercises.cuda import Budget, KernelExercise, Launch
from convt_lab.exercises.exercise import first_wrong
from convt_lab.exercises.python import FunctionExercise
from convt_lab.program import compile as compile_source

__all__ = ["EXERCISES"]


# ---- The flat axis -----------------------------------------------------------------------------


def _on_one_axis(x: np.ndarray, w: np.ndarray, padding: int, pitch: int) -> np.ndarray:
    """Transpose convolve rows [rows, width] with w [taps], all on one axis."""
    rows, width = x.shape
    out_width = width + len(w) - 1 - 2 * padding
    starts = np.arange(rows)[:, None] * pitch
    # Output o of a row lies at start + o, and meets with tap k what is taps - 1 - k further on.
    inputs = starts + np.arange(width) + len(w) - 1 - padding
    outputs = starts + np.arange(out_width)
    axis = np.zeros(max(inputs.max(), outputs.max() + len(w)) + 1)
    for row, place in zip(x, inputs, strict=True):
        axis[place] += row
    return sum(axis[outputs + len(w) - 1 - k] * w[k] for k in range(len(w)))


def _judge_pitch(function: Callable) -> tuple[str | None, str]:
    count = 0
    for width, taps, padding in ((6, 7, 0), (5, 1, 0), (6, 7, 3), (9, 4, 1), (3, 5, 2), (7, 3, 2)):
        case = f"width {width}, {taps} taps, padding {padding}"
        found = function(width, taps, padding)
        if not isinstance(found, int | np.integer) or found < 1:
            return f"{case}: {found!r} is no distance from one row to the next", ""
        generator = np.random.default_rng(width)
        x = generator.integers(1, 10, (3, width)).astype(float)
        w = generator.integers(1, 10, taps).astype(float)
        exact = np.array([np.convolve(row, w)[padding : width + taps - 1 - padding] for row in x])
        y = _on_one_axis(x, w, padding, int(found))
        if wrong := first_wrong(y, exact, 0.0, "y"):
            return f"{case}: rows are {found} positions apart, and {wrong}", ""
        if np.array_equal(_on_one_axis(x, w, padding, int(found) - 1), exact):
            return (
                f"{case}: with rows {found} positions apart all outputs are right, but rows can "
                "lie closer to each other",
                "",
            )
        count += 1
    return None, f"{count} images, with as few zeros between their rows as can be"


# ---- Descriptors -------------------------------------------------------------------------------

# The kernel's own way from step to step, in its own words. They ask for little of a plan.
_WALK = """
#include <cuda_runtime.h>

#include <cstdint>

struct Taps {{
  int taps;
}};
struct Task {{
  Taps along_h, along_w;
}};
struct Plan {{
  int pitch, region;
}};

{code}

__global__ void walk(int inputs, int pixel, int pitch, int region, int taps_h, int taps_w,
                     int steps, int64_t* descriptors) {{
  const Plan plan = {{pitch, region}};
  const Way way(Task{{{{taps_h}}, {{taps_w}}}}, plan);
  Position b = {{static_cast<uint32_t>(inputs + pixel)}};
  for (int step = 0; step < steps; ++step, b.go_on(way)) {{
    descriptors[step] = descriptor(b.address, plan.region);
  }}
}}
"""


@dataclass(frozen=True)
class _Tile:
    """What a warpgroup multiplies: see the starting text."""

    inputs: int
    pixel: int
    pitch: int
    region: int
    taps_h: int
    taps_w: int
    subchunks: int

    def said_of(self, unit: int) -> str:
        """Say what lies in a unit of 16 bytes."""
        octet, position = divmod(unit - self.inputs, self.region)
        if not 0 <= octet < 2 * self.subchunks:
            return f"unit {unit}, which is outside the tile's inputs"
        return f"position {position} of octet {octet}"


_TILES = (
    _Tile(inputs=64, pixel=0, pitch=16, region=200, taps_h=1, taps_w=1, subchunks=1),
    _Tile(inputs=64, pixel=0, pitch=110, region=530, taps_h=3, taps_w=7, subchunks=1),
    _Tile(inputs=600, pixel=152, pitch=34, region=372, taps_h=2, taps_w=2, subchunks=2),
    _Tile(inputs=0, pixel=5, pitch=20, region=250, taps_h=5, taps_w=1, subchunks=4),
)


@functools.cache
def _walk(tile: _Tile) -> tuple[int, ...]:
    """Return the kernel's descriptors of all steps."""
    parts = (
        ("wgmma.cuh", "descriptor"),
        ("warpgroup_plan.cuh", "Way"),
        ("warpgroup_plan.cuh", "Position"),
    )
    code = "\n\n".join(figures.listing(KERNEL_FOLDER / file, name).text for file, name in parts)
    program = compile_source(_WALK.format(code=code), "simulator", name="exercise")
    steps = tile.taps_h * tile.taps_w * tile.subchunks
    found = np.zeros(steps, np.int64)
    sizes = (tile.pitch, tile.region, tile.taps_h, tile.taps_w)
    program.launch("walk", 1, 1, [tile.inputs, tile.pixel, *sizes, steps, found])
    return tuple(found.tolist())


def _judge_descriptor(function: Callable) -> tuple[str | None, str]:
    count = 0
    for tile in _TILES:
        for step, exact in enumerate(_walk(tile)):
            sizes = (tile.pitch, tile.region, tile.taps_h, tile.taps_w)
            found = function(step, tile.inputs, tile.pixel, *sizes)
            count += 1
            where = (
                f"step {step} of {tile.taps_h}×{tile.taps_w} taps, pitch {tile.pitch}, region "
                f"{tile.region}"
            )
            if not isinstance(found, int | np.integer):
                return f"{where}: {found!r} is no integer", ""
            if found == exact:
                continue
            (begin, other, eight), (right, next_plane, rows) = (
                (bits & 0xFFFF, bits >> 16 & 0xFFFF, bits >> 32) for bits in (int(found), exact)
            )
            if begin != right:
                return (
                    f"{where}: the matrix begins at {tile.said_of(begin)}, and should begin at "
                    f"{tile.said_of(right)}",
                    "",
                )
            if other != next_plane:
                return (
                    f"{where}: the other eight channels of the first pixel are said to be at "
                    f"{tile.said_of(begin + other)}, and are at {tile.said_of(begin + next_plane)}",
                    "",
                )
            return (
                f"{where}: the next eight pixels are said to be {eight} units on, and are {rows}",
                "",
            )
    return None, f"{count} descriptors, bit for bit the kernel's"


# ---- Buffers -----------------------------------------------------------------------------------


def _run(
    plan: list[tuple[int, int, int]], count: int, prefers_filling: Callable[[], bool]
) -> str | None:
    """Let one side fill buffers and the other read them, as the parities let them go on.

    `plan` has buffer and both parities of each use. Returns what goes wrong, or None.
    """
    phases = {"full": [0] * count, "empty": [0] * count}  # that each barrier is in
    holds: list[int | None] = [None] * count
    is_read = [True] * count
    filled = read = 0

    def is_over(barrier: str, buffer: int, parity: int) -> bool:
        return (phases[barrier][buffer] - 1) % 2 == parity

    while read < len(plan):
        can_fill = filled < len(plan) and is_over("empty", plan[filled][0], plan[filled][2])
        can_read = is_over("full", plan[read][0], plan[read][1])
        if can_fill and (not can_read or prefers_filling()):
            buffer = plan[filled][0]
            if not is_read[buffer]:
                return f"use {filled} fills buffer {buffer} before use {holds[buffer]} is read"
            holds[buffer], is_read[buffer] = filled, False
            phases["full"][buffer] += 1
            filled += 1
        elif can_read:
            buffer = plan[read][0]
            if holds[buffer] != read:
                there = "nothing yet" if holds[buffer] is None else f"use {holds[buffer]}"
                return f"use {read} reads buffer {buffer}, in which there is {there}"
            is_read[buffer] = True
            phases["empty"][buffer] += 1
            read += 1
        else:
            return f"before use {read} is read, both sides wait for ever"
    return None


def _sides() -> Iterator[Callable[[], bool]]:
    """Yield who goes on where both may: the side that fills, the one that reads, or chance."""
    yield lambda: True
    yield lambda: False
    for seed in range(6):
        generator = np.random.default_rng(seed)
        yield lambda generator=generator: generator.random() < 0.5


def _judge_turns(function: Callable) -> tuple[str | None, str]:
    runs = 0
    for count in (1, 2, 3, 4):
        plan = []
        for use in range(4 * count + 1):
            found = function(use, count)
            try:
                buffer, full, empty = (int(number) for number in found)
            except (TypeError, ValueError):
                return f"turn({use}, {count}) is {found!r}: it must be three integers", ""
            if not 0 <= buffer < count or {full, empty} - {0, 1}:
                return (
                    f"turn({use}, {count}) is {found!r}: it must be a buffer below {count} and "
                    "two parities, each 0 or 1",
                    "",
                )
            plan.append((buffer, full, empty))
        if len({buffer for buffer, _, _ in plan[:count]}) < count:
            return f"count {count}: the first round leaves some buffers out", ""
        found = [_run(plan, count, prefers_filling) for prefers_filling in _sides()]
        runs += len(found)
        if wrong := list(filter(None, found)):
            # What is lost says more than who waits.
            return f"count {count}: {min(wrong, key=lambda text: 'wait' in text)}", ""
    return None, f"{runs} runs, with both sides as far ahead as they may be, and nothing is lost"


# ---- A kernel ----------------------------------------------------------------------------------


def _images() -> Sequence[Launch]:
    launches = []
    generator = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 58), (20, 40)):
        x = generator.standard_normal((height, width)).astype(np.float32)
        w = generator.standard_normal((3, 7)).astype(np.float32)
        exact, scale = np.zeros((2, height + 2, width + 6))
        for kh in range(3):
            for kw in range(7):
                product = x * w[kh, kw].astype(np.float64)
                exact[kh : kh + height, kw : kw + width] += product
                scale[kh : kh + height, kw : kw + width] += np.abs(product)
        y = np.full(exact.shape, np.nan, np.float32)
        blocks = math.ceil(y.size / 128)
        args = (x, w, y, height, width)
        launches.append(Launch(f"an image of {height}×{width}", blocks, 128, args, 2, exact, scale))
    return launches


EXERCISES = (
    FunctionExercise(
        name="hopper.1",
        function="pitch",
        text='''
def pitch(width, taps, padding):
    """The least distance from one row to the next on the flat axis; the stride is 1.

    A row has `width` inputs and width + taps - 1 - 2 * padding outputs.
    """
    return width + taps - 1
''',
        edits={"return width + taps - 1": "return width + taps - 1 - padding"},
        judge=_judge_pitch,
        hints=(
            "How far beyond the last input of a row does its last output reach, if padding crops "
            "outputs at both ends?",
            "The last output that is left is `padding` outputs nearer to the inputs. So it reaches "
            "`padding` inputs less beyond them, and the first output the same on its side.",
            "Behind a row there must be `taps - 1 - padding` zeros. They are those in front of the "
            "next row, too.",
        ),
        why="Without padding the last output has only its last tap on an input, and the others "
        "reach up to `taps - 1` positions beyond. Each output that padding crops would have "
        "reached one further than the next. The first outputs reach as far in front of their row, "
        "and the same zeros serve both. The kernel finds this number from the first and the last "
        "input that outputs meet, and rounds it up to an even one.",
    ),
    FunctionExercise(
        name="hopper.2",
        function="descriptor",
        text='''
def descriptor(step, inputs, pixel, pitch, region, taps_h, taps_w):
    """The 64 bits that describe B, the inputs, for one step of a warpgroup.

    All distances are in units of 16 bytes: eight channels, an octet, of one
    position. Octet after octet lies from `inputs` on. Each takes `region` units,
    one for each position of the tile.

    A step has two octets, 16 channels. First come all taps of the first 16, row by
    row. The first tap meets position `pixel`, the next one the position behind;
    from one row of taps to the next it is `pitch` positions. Then come all taps of
    the next 16 channels, and so on.

    The bits: from 32 on, how far it is to the next eight pixels; from 16 on, to the
    other octet; from 0 on, where the matrix begins.
    """
    row, column = divmod(step, taps_w)
    begin = inputs + pixel + row * pitch + column
    return 8 << 32 | 1 << 16 | begin
''',
        edits={
            "    row, column = divmod(step, taps_w)\n": (
                "    subchunk, tap = divmod(step, taps_h * taps_w)\n"
                "    row, column = divmod(tap, taps_w)\n"
            ),
            "inputs + pixel + row": "inputs + 2 * subchunk * region + pixel + row",
            "1 << 16": "region << 16",
        },
        judge=_judge_descriptor,
        hints=(
            "Where are the other eight channels of the same pixel? One unit on is the next pixel.",
            "An octet takes `region` units, so that is the distance to the other one. And where "
            "does the walk go when all taps of sixteen channels are done?",
            "`subchunk, tap = divmod(step, taps_h * taps_w)`, and each sub-chunk is two octets "
            "further on: `2 * subchunk * region`.",
        ),
        why="The plane of an octet makes a pixel's neighbour lie one unit on, whatever the tap. "
        "Within a sub-chunk only `begin` changes from step to step, by one, or by what is left to "
        "the next row of taps. The kernel's `Position` adds up the same distances, since adding is "
        "all that it has time for; the check compares with its own code, compiled for the CPU.",
    ),
    FunctionExercise(
        name="hopper.3",
        function="turn",
        text='''
def turn(use, count):
    """Which of so many buffers is used, and the parities that both sides wait for.

    Uses are counted from 0, and take the buffers in turn. A buffer has two
    barriers. One side waits at `empty`, fills the buffer, and arrives at `full`. The
    other waits at `full`, reads, and arrives at `empty`.

    An arrival ends a barrier's phase; phases are counted from 0, too. Waiting for a
    parity, 0 or 1, is over as soon as the phase that ended last has that parity.
    Before phase 0 there was a phase -1.
    """
    buffer = use % count
    full, empty = 0, 1
    return buffer, full, empty
''',
        edits={
            "    buffer = use % count\n    full, empty = 0, 1\n": (
                "    round, buffer = divmod(use, count)\n"
                "    full, empty = round % 2, (round + 1) % 2\n"
            )
        },
        judge=_judge_turns,
        hints=(
            "In the first round all is well. Which phase of `full` is the one to wait for when a "
            "buffer is used for the second time?",
            "In round r the reader waits for phase r of `full`. The side that fills waits for the "
            "phase of `empty` that the last round's reader ended.",
            "That is phase `r - 1`, which in round zero is over from the start. Of its number "
            "only the last bit counts: `r % 2` and `(r + 1) % 2`.",
        ),
        why="In round r a buffer is full after phase r of `full`, and may be filled after phase "
        "`r - 1` of `empty`. One bit of the phase's number is enough, because neither side can get "
        "two phases ahead of the other: it would have to pass the other's barrier first. The "
        "kernel keeps the bit in its `Turn` and flips it when the buffers have gone round.",
    ),
    KernelExercise(
        name="hopper.4",
        kernel="flat",
        text="""
constexpr int KH = 3, KW = 7, TILE = 128;  // outputs of a block, one for each thread
constexpr int MAX_PITCH = 64;              // outputs of a row, at most

// Stride 1, no padding: x [height, width], w [KH, KW],
// y [height + KH - 1, width + KW - 1].
__global__ void flat(const float* x, const float* w, float* y,
                     int height, int width) {
  const int out_height = height + KH - 1, pitch = width + KW - 1;
  const int position = blockIdx.x * TILE + threadIdx.x;  // outputs, row after row
  if (position >= out_height * pitch) return;
  const int oh = position / pitch, ow = position % pitch;
  float sum = 0.0f;
  for (int kh = 0; kh < KH; ++kh) {
    for (int kw = 0; kw < KW; ++kw) {
      const int h = oh - kh, ww = ow - kw;
      if (h < 0 || h >= height || ww < 0 || ww >= width) continue;
      sum = fmaf(x[h * width + ww], w[kh * KW + kw], sum);
    }
  }
  y[position] = sum;
}
""",
        launches=_images,
        budgets=(Budget("requests", most=80, buffer="x"),),
        whole="""
constexpr int KH = 3, KW = 7, TILE = 128;  // outputs of a block, one for each thread
constexpr int MAX_PITCH = 64;              // outputs of a row, at most
constexpr int MAX_REACH = (KH - 1) * MAX_PITCH + KW - 1;

// Stride 1, no padding: x [height, width], w [KH, KW],
// y [height + KH - 1, width + KW - 1].
__global__ void flat(const float* x, const float* w, float* y,
                     int height, int width) {
  __shared__ float axis[MAX_REACH + TILE];  // from `first` on, zeros between rows
  const int out_height = height + KH - 1, pitch = width + KW - 1;
  const int reach = (KH - 1) * pitch + KW - 1;
  const int first = blockIdx.x * TILE - reach;
  for (int i = threadIdx.x; i < reach + TILE; i += TILE) {
    const int h = (first + i) / pitch, ww = (first + i) % pitch;
    const bool exists = first + i >= 0 && h < height && ww < width;
    axis[i] = exists ? x[h * width + ww] : 0.0f;
  }
  __syncthreads();
  const int position = blockIdx.x * TILE + threadIdx.x;
  if (position >= out_height * pitch) return;
  float sum = 0.0f;
  for (int kh = 0; kh < KH; ++kh) {
    for (int kw = 0; kw < KW; ++kw) {
      sum = fmaf(axis[reach + threadIdx.x - kh * pitch - kw], w[kh * KW + kw], sum);
    }
  }
  y[position] = sum;
}
""",
        hints=(
            "Number inputs as the outputs are numbered: input (h, w) has position "
            "`h * pitch + w`, and behind each row come `KW - 1` positions without an input. Which "
            "position does output `position` meet with tap (kh, kw)?",
            "It meets `position - kh * pitch - kw`, in whatever row that is. So a block needs all "
            "positions from `(KH - 1) * pitch + KW - 1` before its first output to its last.",
            "Copy these into shared memory once, zero where there is no input: that takes one "
            "division for each. Then a barrier, and a loop over taps without a test.",
        ),
        why="Every question that the start asks for each tap, whether there is a row and a column, "
        "is asked once for each position here, when it is copied. Then a tap is a distance. "
        "Zeros between the rows take a little room and a few FMAs that nobody needs; what they "
        "save are tests in the inner loop. `hopper` goes one step further: the loop over taps is "
        "left to an instruction, and the distance is all that it is told.",
    ),
)
