"""The first draft with its mistakes, and what mends each of them.

`Draft.read()` is the draft as it stands in first_draft.cu and first_draft.py. A `Mend` is a small
edit of these texts; `MENDS` holds them in the chapter's order, and a mend needs those before it.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import convt_lab as lab
from convt_lab.figures import Listing

FOLDER = Path(__file__).parent
CUDA, PYTHON = "first_draft.cu", "first_draft.py"


@dataclass(frozen=True)
class Mend:
    """Edits that put one mistake right: (file, what stands there, what shall stand there)."""

    name: str
    edits: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Draft:
    """One version of the draft: the texts of its two files."""

    cuda: str
    python: str

    @classmethod
    def read(cls) -> Draft:
        return cls((FOLDER / CUDA).read_text(), (FOLDER / PYTHON).read_text())

    @classmethod
    def without(cls, name: str) -> Draft:
        """The draft with every mend that comes before the one called `name`."""
        names = [mend.name for mend in MENDS]
        return cls.read().mend(*names[: names.index(name)])

    @classmethod
    def mended(cls) -> Draft:
        """The draft with every mend."""
        return cls.read().mend(*(mend.name for mend in MENDS))

    def mend(self, *names: str) -> Draft:
        texts = {CUDA: self.cuda, PYTHON: self.python}
        for mend in (next(mend for mend in MENDS if mend.name == name) for name in names):
            for file, before, after in mend.edits:
                if texts[file].count(before) != 1:
                    raise ValueError(f"mend {mend.name!r}: {file} has not once {before!r}")
                texts[file] = texts[file].replace(before, after)
        return Draft(texts[CUDA], texts[PYTHON])

    def diff(self, after: Draft) -> Listing:
        """The lines that changed, and one around them, in both files."""
        shown = []
        for old, new in ((self.cuda, after.cuda), (self.python, after.python)):
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=1, lineterm="")
            # Without the two file names; a mark of line numbers only between two places.
            shown += [re.sub(r"^@@.*", "...", line) for line in list(lines)[2:]]
        return Listing("\n".join(shown[1:]), "diff", "the mend")

    @property
    def host_listing(self) -> Listing:
        """The host's side, without its imports."""
        text = self.python
        return Listing(text[text.index("def data_ptr") :].rstrip(), "python", PYTHON)

    @functools.cached_property
    def program(self) -> lab.Program:
        return lab.compile(self.cuda, backend="simulator", name="first_draft")

    @functools.cached_property
    def host(self) -> dict:
        names: dict = {}
        exec(compile(self.python, PYTHON, "exec"), names)
        names["program"] = self.program
        return names

    def __call__(self, x, weight, bias=None, **arguments) -> torch.Tensor:
        return self.host["conv_transpose2d"](x, weight, bias, **arguments)

    @property
    def layer(self) -> type[torch.nn.Module]:
        return self.host["ConvTranspose2d"]

    def profile(self, problem: lab.Problem):
        """Trace the kernel on a problem: what its loads and stores ask of the memory."""
        reports = []

        def call(*arguments):
            reports.append(self.program.call(*arguments, trace=True))

        names = dict(self.host, program=SimpleNamespace(call=call))
        exec(compile(self.python.replace("program = None", ""), PYTHON, "exec"), names)
        names["conv_transpose2d"](*problem.random_inputs(), **problem.arguments)
        return reports[0]

    def tally(self, problem: lab.Problem) -> tuple[int, int]:
        """Count the taps that are tried, and the divisions and remainders by a stride.

        A copy of the text is run in which each of them adds one to a counter.
        """
        operand, stride = r"(?:\w+|\([^()]*\))", r"stride\w*"
        text = re.sub(rf"({operand} [/%] {stride})", r"counted(\1)", self.cuda)
        innermost = text.rindex("for (", 0, text.index('extern "C"'))
        body = text.index("{", text.index("\n", innermost) - 2) + 1
        counters = """
__device__ unsigned long long tried, divided;
__device__ int counted(int value) {
  atomicAdd(&divided, 1);
  return value;
}
__global__ void take_counts(unsigned long long* counts) {
  counts[0] = tried;
  counts[1] = divided;
  tried = divided = 0;
}
"""
        head = text.index("constexpr")
        counting = f"{text[:head]}{counters}{text[head:body]} atomicAdd(&tried, 1);{text[body:]}"
        draft, counts = Draft(counting, self.python), np.zeros(2, np.uint64)
        draft(*problem.random_inputs(), **problem.arguments)
        draft.program.launch("take_counts", grid=1, block=1, args=[counts])
        return int(counts[0]), int(counts[1])


MENDS = (
    Mend(
        "weight layout",
        (
            (CUDA, "weight [C_out, C_in, KH, KW]", "weight [C_in, C_out, KH, KW]"),
            (
                CUDA,
                "weight[offset(co, ci, kh, kw, in_channels, kernel_h, kernel_w)]",
                "weight[offset(ci, co, kh, kw, out_channels, kernel_h, kernel_w)]",
            ),
            (PYTHON, "out_channels, _, *kernel =", "_, out_channels, *kernel ="),
            (
                PYTHON,
                "torch.empty(out_channels, in_channels,",
                "torch.empty(in_channels, out_channels,",
            ),
        ),
    ),
    Mend(
        "output padding",
        (
            (CUDA, "oh + padding_h + output_padding_h - kh", "oh + padding_h - kh"),
            (CUDA, "ow + padding_w + output_padding_w - kw", "ow + padding_w - kw"),
        ),
    ),
    Mend(
        "groups",
        (
            (
                CUDA,
                "weight [C_in, C_out, KH, KW], bias [C_out], output",
                "weight [C_in, C_out/groups, KH, KW], bias [C_out],\n// output",
            ),
            (
                CUDA,
                """
  for (int ci = 0; ci < in_channels; ++ci) {
""",
                """
  const int group_in = in_channels / groups, group_out = out_channels / groups;
  const int first_ci = co / group_out * group_in;
  for (int ci = first_ci; ci < first_ci + group_in; ++ci) {
""",
            ),
            (
                CUDA,
                "offset(ci, co, kh, kw, out_channels,",
                "offset(ci, co % group_out, kh, kw, group_out,",
            ),
            (
                PYTHON,
                """
    _, out_channels, *kernel = weight.shape
""",
                """
    _, group_out, *kernel = weight.shape
    out_channels = groups * group_out
""",
            ),
            (
                PYTHON,
                """
        self.weight = torch.nn.Parameter(torch.empty(in_channels, out_channels, *pair(kernel_size)))
""",
                """
        shape = (in_channels, out_channels // groups, *pair(kernel_size))
        self.weight = torch.nn.Parameter(torch.empty(shape))
""",
            ),
        ),
    ),
    Mend(
        "bias flag",
        (
            (PYTHON, "        self.bias = bias  # whether there is one\n", ""),
            (
                PYTHON,
                "self.bias = torch.nn.Parameter(torch.zeros(out_channels))",
                "self.bias = torch.nn.Parameter(torch.zeros(out_channels)) if bias else None",
            ),
            (PYTHON, "        bias = self.bias if self.bias is not False else None\n", ""),
            (PYTHON, "(x, self.weight, bias,", "(x, self.weight, self.bias,"),
        ),
    ),
    Mend(
        "plain memory",
        (
            (
                PYTHON,
                """
    nbytes = tensor.numel()""",
                """
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {tensor.dtype}; pass float32")
    tensor = tensor.contiguous()
    nbytes = tensor.numel()""",
            ),
        ),
    ),
    Mend(
        "offsets",
        (
            (
                CUDA,
                "#include <cuda_runtime.h>\n",
                """#include <cuda_runtime.h>

#include <cstdint>
""",
            ),
            (CUDA, "__device__ int offset(int a,", "__device__ int64_t offset(int64_t a,"),
        ),
    ),
    Mend(
        "stream",
        (
            (
                CUDA,
                "<<<grid, block>>>(",
                "<<<grid, block, 0, stream>>>(\n" + 38 * " ",
            ),
        ),
    ),
    Mend("checked launch", ((CUDA, "return cudaSuccess;", "return cudaGetLastError();"),)),
    Mend(
        "grid",
        (
            (
                CUDA,
                """
  const int ow = blockIdx.x * TILE_W + threadIdx.x;
  const int oh = blockIdx.y * TILE_H + threadIdx.y;
  const int co = blockIdx.z % out_channels;
  const int n = blockIdx.z / out_channels;
""",
                """
  const unsigned tiles_h = (out_height + TILE_H - 1) / TILE_H;
  const unsigned tiles_w = (out_width + TILE_W - 1) / TILE_W;
  const int ow = blockIdx.x % tiles_w * TILE_W + threadIdx.x;
  const int oh = blockIdx.x / tiles_w % tiles_h * TILE_H + threadIdx.y;
  const int co = blockIdx.x / tiles_w / tiles_h % out_channels;
  const int n = blockIdx.x / tiles_w / tiles_h / out_channels;
""",
            ),
            (
                CUDA,
                """
  const dim3 grid((out_width + TILE_W - 1) / TILE_W, (out_height + TILE_H - 1) / TILE_H,
                  batch * out_channels);
""",
                """
  const int64_t tiles_h = (out_height + TILE_H - 1) / TILE_H;
  const int64_t tiles_w = (out_width + TILE_W - 1) / TILE_W;
  const int64_t grid = tiles_w * tiles_h * out_channels * batch;
  if (grid == 0) return cudaSuccess;  // an empty batch: there is nothing to do
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
""",
            ),
            (CUDA, "<<<grid, block, 0,", "<<<static_cast<unsigned>(grid), block, 0,"),
        ),
    ),
    Mend(
        "taps",
        (
            (
                CUDA,
                """
__global__ void first_draft_kernel""",
                """
// The taps that reach output o: first, first + step, ... They are a residue class of the stride.
__device__ void find_taps(int o, int kernel, int stride, int padding, int dilation, int* first,
                          int* step) {
  *step = 1;
  while ((*step * dilation) % stride != 0) ++*step;
  *first = 0;
  while ((o + padding - *first * dilation) % stride != 0) {
    if (++*first == *step) {  // no tap of a whole period: none at all
      *first = kernel;
      return;
    }
  }
}

__global__ void first_draft_kernel""",
            ),
            (
                CUDA,
                """
  float sum = 0.0f;
""",
                """
  int first_kh, first_kw, step_h, step_w;
  find_taps(oh, kernel_h, stride_h, padding_h, dilation_h, &first_kh, &step_h);
  find_taps(ow, kernel_w, stride_w, padding_w, dilation_w, &first_kw, &step_w);
  const int first_h = (oh + padding_h - first_kh * dilation_h) / stride_h;
  const int first_w = (ow + padding_w - first_kw * dilation_w) / stride_w;
  const int back_h = (step_h * dilation_h) / stride_h;
  const int back_w = (step_w * dilation_w) / stride_w;

  float sum = 0.0f;
""",
            ),
            (
                CUDA,
                """
    for (int kh = 0; kh < kernel_h; ++kh) {
      for (int kw = 0; kw < kernel_w; ++kw) {
        const int top = oh + padding_h - kh * dilation_h;
        const int left = ow + padding_w - kw * dilation_w;
        const int h = top / stride_h, rest_h = top % stride_h;
        const int w = left / stride_w, rest_w = left % stride_w;
        if (rest_h != 0 || rest_w != 0 || h < 0 || h >= height || w < 0 || w >= width) continue;
""",
                """
    for (int kh = first_kh, h = first_h; kh < kernel_h; kh += step_h, h -= back_h) {
      for (int kw = first_kw, w = first_w; kw < kernel_w; kw += step_w, w -= back_w) {
        if (h < 0 || h >= height || w < 0 || w >= width) continue;
""",
            ),
        ),
    ),
    Mend(
        "tile",
        (
            (CUDA, "TILE_H = 16;", "TILE_H = 8;"),
            (CUDA, "TILE_W = 16;", "TILE_W = 32;"),
            (
                CUDA,
                """the fastest for a TITAN RTX (sm_75). A thread
// computes one output value. Optimised: a block is a tile of 16 x 16 output pixels, so that all
// loads and stores are coalesced; the sum stays in a register; all pointers are __restrict__.
""",
                """whose speed nobody has measured. A thread
// computes one output value. A block is a tile of 8 x 32 output pixels, so that a warp's requests
// are of one row.
""",
            ),
        ),
    ),
)
