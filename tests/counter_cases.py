"""Launches whose counters are compared with the hardware's, and with values derived by hand.

`tools/hardware_counters.py` runs them on a GPU under Nsight Compute and keeps what it measured in
``records/``; `test_counters.py` runs them on the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import convt_lab as lab
from convt_lab.simulator.planning import readable_name
from convt_lab.simulator.report import Report
from convt_lab.stages import fma_stages

PATTERNS = """
__global__ void global_words(const float* x, float* y, int stride, int offset) {
  y[threadIdx.x] = x[threadIdx.x * stride + offset];
}
__global__ void global_vectors(const float4* x, float4* y, int stride) {
  y[threadIdx.x] = x[threadIdx.x * stride];
}
__global__ void shared_words(const float* x, float* y, int stride) {
  __shared__ float tile[33 * 32];
  for (int i = threadIdx.x; i < 33 * 32; i += 32) tile[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * stride];
}
__global__ void shared_vectors(const float4* x, float4* y, int stride) {
  __shared__ float4 tile[8 * 32];
  for (int i = threadIdx.x; i < 8 * 32; i += 32) tile[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * stride];
}
__global__ void shared_pairs(const float2* x, float2* y, int stride) {
  __shared__ float2 tile[8 * 32];
  for (int i = threadIdx.x; i < 8 * 32; i += 32) tile[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * stride];
}
__global__ void shared_vectors_by_group(const float4* x, float4* y, int group, int stride) {
  __shared__ float4 tile[8 * 32];
  for (int i = threadIdx.x; i < 8 * 32; i += 32) tile[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x / group * stride];
}
__global__ void half_of_the_lanes(const float* x, float* y) {
  if (threadIdx.x % 2 == 0) y[threadIdx.x] = fmaf(x[threadIdx.x], 2.0f, 1.0f);
}
"""


@dataclass(frozen=True)
class Pattern:
    """One warp's launch of a kernel of `PATTERNS`.

    `expected` is what the access under study costs: sectors of the global load, or wavefronts of
    the shared load.
    """

    kernel: str
    numbers: tuple[int, ...]
    expected: int

    def __str__(self) -> str:
        return " ".join([self.kernel, *map(str, self.numbers)])

    @property
    def space(self) -> str:
        return "shared" if self.kernel.startswith("shared") else "global"

    def run(self, backend: str, trace: bool = False) -> Report | None:
        x, y = np.zeros(33 * 32, np.float32), np.zeros(4 * 32, np.float32)
        program = lab.compile(PATTERNS, backend)
        return program.launch(self.kernel, 1, 32, [x, y, *self.numbers], trace=trace)


PATTERN_CASES = [
    *(Pattern("global_words", (stride, 0), e) for stride, e in [(1, 4), (2, 8), (8, 32), (32, 32)]),
    Pattern("global_words", (1, 1), 5),
    Pattern("global_words", (0, 0), 1),
    *(Pattern("global_vectors", (stride,), e) for stride, e in [(1, 16), (2, 32)]),
    *(
        Pattern("shared_words", (stride,), e)
        for stride, e in [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1), (3, 1), (0, 1)]
    ),
    *(Pattern("shared_vectors", (stride,), e) for stride, e in [(1, 4), (2, 8), (8, 32)]),
    *(Pattern("shared_pairs", (stride,), e) for stride, e in [(1, 2), (2, 4)]),
    # Groups of lanes read one vector each; the vectors lie in the same banks or not.
    *(
        Pattern("shared_vectors_by_group", numbers, e)
        for numbers, e in [((32, 1), 2), ((8, 1), 2), ((8, 8), 4), ((2, 1), 2), ((16, 8), 2)]
    ),
    Pattern("half_of_the_lanes", (), 4),
]

PROBLEMS = ["star_small", "channels_small", "strided_small"]


@dataclass(frozen=True)
class StageCase:
    """A stage on a named problem."""

    stage: str
    problem: str

    def __str__(self) -> str:
        return f"{self.stage} {self.problem}"

    @property
    def kernel(self) -> str:
        (launch,) = lab.stages[self.stage].launches(lab.Problem.named(self.problem))
        return readable_name(launch.symbol)

    def run(self, backend: str, trace: bool = False) -> Report | None:
        problem = lab.Problem.named(self.problem)
        x, weight, bias = problem.random_inputs(device="cuda" if backend == "gpu" else "cpu")
        stage = lab.stages[self.stage]
        run = stage.profile if trace else stage
        result = run(x, weight, bias, **problem.arguments)
        if backend == "gpu":
            torch.cuda.synchronize()
        return result if trace else None


def _stage_cases() -> list[StageCase]:
    """Return each stage on each problem, once where a stage leaves it to the one before."""
    cases: dict[tuple[str, str], StageCase] = {}
    for problem in PROBLEMS:
        for stage in fma_stages:
            case = StageCase(stage, problem)
            cases.setdefault((problem, case.kernel), case)
    return list(cases.values())


STAGE_CASES = _stage_cases()
CASES = [*PATTERN_CASES, *STAGE_CASES]
