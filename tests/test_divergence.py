"""Divergent warps, counted exactly: random kernels against an interpreter of SIMT execution.

The interpreter is `simt.py`'s, which executes a warp under an active mask. The simulator must give
its counts at every site (a line's accesses of one kind to one buffer), and its memory.

Below that are kernels with what the generator does not draw. To see how much a run of any size
compares, and the source of the first kernels that differ::

    python tests/test_divergence.py 500 [first seed]
"""

import os
import sys
from collections import Counter

import numpy as np
import pytest
from simt import Counts, Kernel, random_kernel

import convt_lab as lab

KERNELS_PER_SOURCE = 50


def random_kernels(count: int, first_seed: int) -> list[Kernel]:
    return [random_kernel(f"k{i}", first_seed + i) for i in range(count)]


def differences(kernels: list[Kernel]) -> tuple[list[tuple[Kernel, str]], Counter]:
    """Compile and launch the kernels; returns what is wrong, and how much was compared."""
    program = lab.compile("".join(kernel.text for kernel in kernels), "simulator")
    wrong, compared = [], Counter()
    above = 0
    for kernel in kernels:
        expected = kernel.run()
        wrong += [(kernel, text) for text in _wrong_memory(program, kernel, expected.memory)]
        arrays = kernel.arrays()
        report = program.launch(
            kernel.name, kernel.blocks, kernel.block, [*arrays.values(), 0], trace=True
        )
        found = {
            (s.line - above, s.space, s.op, s.buffer): Counts(s.requests, s.active_lanes, s.cost)
            for s in report.sites
        }
        for site in sorted(expected.counts.keys() | found.keys()):
            if expected.counts.get(site) != found.get(site):
                text = f"{site}: expected {expected.counts.get(site)}, found {found.get(site)}"
                wrong.append((kernel, text))
                compared["wrong sites"] += 1
        wrong += [(kernel, f"{h.kind} in line {h.line - above}") for h in report.hazards]
        for name, array in arrays.items():
            if (array != expected.memory[name]).any():
                wrong.append((kernel, f"the traced launch leaves other values in {name!r}"))
        compared["kernels"] += 1
        compared["sites"] += len(expected.counts)
        compared["requests"] += sum(c.requests for c in expected.counts.values())
        compared["lanes"] += sum(c.active_lanes for c in expected.counts.values())
        above += kernel.text.count("\n")
    return wrong, compared


def _wrong_memory(program: lab.Program, kernel: Kernel, expected: dict[str, np.ndarray]):
    arrays = kernel.arrays()
    program.launch(kernel.name, kernel.blocks, kernel.block, [*arrays.values(), 0])
    for name, array in arrays.items():
        if (array != expected[name]).any():
            yield f"the plain launch leaves other values in {name!r}"


@pytest.mark.parametrize("part", range(10 if os.environ.get("CONVT_LAB_LONG") else 2))
def test_random_kernels_are_counted_as_a_masked_warp_runs_them(part):
    """500 kernels take two minutes: CONVT_LAB_LONG=1 asks for them."""
    wrong, compared = differences(random_kernels(KERNELS_PER_SOURCE, part * KERNELS_PER_SOURCE))
    assert [(kernel.seed, text) for kernel, text in wrong] == []
    assert compared["sites"] > 700
    assert compared["lanes"] < 20 * compared["requests"]  # they do diverge


#: Kernels of one warp, and for each of their lines with loads the lanes of the requests.
OTHER = {
    "a loop without braces around a loop": (
        """
        __global__ void run(const float* x, float* y) {
          float sum = 0;
          for (int i = 0; i < threadIdx.x % 3; ++i)
            for (int j = 0; j <= threadIdx.x % 2; ++j)
              sum += x[i + j];
          y[threadIdx.x] = sum;
        }
        """,
        {6: (4, 21 + 11 + 10 + 5)},
    ),
    "do without braces, and an else behind a loop": (
        """
        __global__ void run(const float* x, float* y) {
          float sum = 0;
          int i = threadIdx.x % 4;
          if (threadIdx.x < 16)
            do sum += x[i];
            while (i-- > 0);
          else
            sum += x[i];
          y[threadIdx.x] = sum;
        }
        """,
        {6: (4, 16 + 12 + 8 + 4), 9: (1, 16)},
    ),
    "a loop in a macro, ended by a macro": (
        """
        #define TAPS(i, n) for (int i = 0; i < (n); ++i)
        #define TWICE(statement) do { statement; statement; } while (0)
        __global__ void run(const float* x, float* y) {
          float sum = 0;
          int k = 0;
          TAPS(i, threadIdx.x % 2 + 1) {
            if (threadIdx.x == 31) continue;
            TWICE(sum += x[k++]);
          }
          y[threadIdx.x] = sum;
        }
        """,
        {9: (4, 2 * (31 + 15))},
    ),
    "over an array, in a lambda, and in a constant": (
        """
        constexpr int log2(int n) { int log = 0; while (n >>= 1) ++log; return log; }
        __global__ void run(const float* x, float* y) {
          static_assert(log2(32) == 5);
          const int taps[] = {2, 3, log2(32)};
          auto load = [&](int n) {
            float sum = 0;
            for (int tap : taps) if (tap < n)
              sum += x[tap];
            return sum;
          };
          y[threadIdx.x] = load(threadIdx.x % 8);
        }
        """,
        {9: (3, 20 + 16 + 8)},
    ),
    "switch that falls through": (
        """
        __global__ void run(const float* x, float* y) {
          float sum = 0;
          for (int i = 0; i < 2; ++i) {
            switch (threadIdx.x % 4) {
              case 0: sum += x[i];
              case 1: if (i == 1) break;
              case 2: sum += x[i + 2];
            }
            sum += x[i + 4];
          }
          y[threadIdx.x] = sum;
        }
        """,
        {6: (2, 16), 8: (2, 24 + 8), 10: (2, 64)},
    ),
    "recursion": (
        """
        __device__ __noinline__ float tree(const float* x, int n) {
          if (n == 0) return 0;
          float sum = x[n];
          for (int i = 0; i < 2; ++i) sum += tree(x, n - 1);
          return sum;
        }
        __global__ void run(const float* x, float* y) { y[threadIdx.x] = tree(x, threadIdx.x % 4); }
        """,
        {4: (7, 24 + 2 * 16 + 4 * 8)},
    ),
    "a loop of gotos": (
        """
        __global__ void run(const float* x, float* y) {
          float sum = 0;
          int i = 0;
        again:
          sum += x[i];
          if (++i <= threadIdx.x % 4) goto again;
          y[threadIdx.x] = sum;
        }
        """,
        {6: (4, 32 + 24 + 16 + 8)},
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_kernels(name):
    source, expected = OTHER[name]
    source = source.removeprefix("\n")
    program = lab.compile(source, "simulator")
    report = program.launch(
        "run", 1, 32, [np.ones(64, np.float32), np.zeros(32, np.float32)], trace=True
    )
    # The text begins at line 2 of the literals above.
    loads = {s.line + 1: (s.requests, s.active_lanes) for s in report.sites if s.op == "load"}
    assert loads == expected
    stores = [s for s in report.sites if s.op == "store"]
    assert [(s.requests, s.active_lanes) for s in stores] == [(1, 32)]


def main(count: int, first_seed: int) -> int:
    total, wrong = Counter(), []
    for start in range(0, count, KERNELS_PER_SOURCE):
        size = min(KERNELS_PER_SOURCE, count - start)
        more, compared = differences(random_kernels(size, first_seed + start))
        wrong += more
        total += compared
    for kernel in list(dict.fromkeys(kernel for kernel, _ in wrong))[:3]:
        print(kernel.text)
        print("\n".join(f"{kernel.name}: {text}" for of, text in wrong if of is kernel))
    print(
        f"{total['kernels']} kernels from seed {first_seed}, {total['sites']:,} sites, "
        f"{total['requests']:,} requests of {total['lanes'] / total['requests']:.1f} lanes: "
        f"{total['wrong sites']} sites wrong, {len(wrong)} differences in all"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, [*sys.argv[1:], "500", "0"][:2])))
