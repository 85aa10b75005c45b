"""Divergent warps, counted exactly: random kernels against an interpreter of SIMT execution.

The interpreter is `simt.py`'s, which executes a warp under an active mask. The simulator must give
its counts at every site (a line's accesses of one kind to one buffer), and its memory.

Not a test yet: in some kernels the lanes of a few sites are grouped otherwise than the interpreter
does. To see how many, and the source of the first kernels that differ::

    python tests/divergence_fuzz.py 500 [first seed]
"""

import sys
from collections import Counter

import numpy as np
from simt import Counts, Kernel, random_kernel

import convt_lab as lab

KERNELS_PER_SOURCE = 50


def sources(count: int, first_seed: int):
    """Yield lists of kernels that go into one source: compiling them together is faster."""
    for start in range(0, count, KERNELS_PER_SOURCE):
        numbers = range(start, min(start + KERNELS_PER_SOURCE, count))
        yield [random_kernel(f"k{i}", first_seed + i) for i in numbers]


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


def main(count: int, first_seed: int) -> int:
    total, wrong = Counter(), []
    for kernels in sources(count, first_seed):
        more, compared = differences(kernels)
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
