"""A test for each mistake of the first draft: it takes a `Draft` and raises if it finds one."""

from __future__ import annotations

import ctypes
import dataclasses
import textwrap

import numpy as np
import torch

import convt_lab as lab
from convt_lab import Problem, reference
from convt_lab.program import backend_named


def is_right(draft, problem):
    """Compare with float64, shape and values; NaN does not pass."""
    x, weight, bias = problem.random_inputs()
    y = draft(x, weight, bias, **problem.arguments)
    assert tuple(y.shape) == problem.output_shape, (
        f"shape {list(y.shape)}, not {list(problem.output_shape)}"
    )
    error = reference.condition_error(y, x, weight, bias, **problem.arguments)
    assert error <= reference.FLOAT32_GATE, f"error {error:.2g}, gate {reference.FLOAT32_GATE:g}"


def weight_layout(draft):
    for c_in, c_out in ((2, 3), (3, 3)):
        is_right(draft, Problem(1, c_in, c_out, height=4, width=5, kernel_size=(2, 3)))


def output_padding(draft):
    is_right(draft, Problem(height=4, width=5, kernel_size=3, stride=2, output_padding=1))


def groups(draft):
    for of_groups in (2, 4):  # the second is depthwise
        is_right(draft, Problem(1, 4, 4, height=4, width=5, kernel_size=3, groups=of_groups))


def bias_flag(draft):
    x = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    for bias in (True, False):
        theirs = torch.nn.ConvTranspose2d(2, 3, 3, bias=bias)
        ours = draft.layer(2, 3, 3, bias=bias)
        found, expected = (
            {name: tuple(value.shape) for name, value in layer.state_dict().items()}
            for layer in (ours, theirs)
        )
        assert found == expected, f"with bias={bias} the parameters are {found}, not {expected}"
        ours.load_state_dict(theirs.state_dict())
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def plain_memory(draft):
    problem = Problem(2, 2, 2, height=4, width=6, kernel_size=2)
    x, weight, _ = problem.random_inputs()
    expected = draft(x, weight)
    assert torch.equal(draft(x.contiguous(memory_format=torch.channels_last), weight), expected), (
        "channels-last memory gives other values"
    )
    try:
        draft(x.double(), weight.double())
    except TypeError:
        return
    raise AssertionError("float64 is accepted")


def offsets(draft):
    problem = dataclasses.replace(Problem.named("star"), batch=128)
    probe = """
__global__ void probe(long long* last, int n, int co, int oh, int ow, int b, int c, int d) {
  *last = offset(n, co, oh, ow, b, c, d);
}
"""
    sizes = problem.output_shape
    last = np.zeros(1, np.int64)
    program = lab.compile(draft.cuda + probe, backend="simulator", name="first_draft")
    program.launch("probe", 1, 1, [last, *(size - 1 for size in sizes), *sizes[1:]])
    expected = np.ravel_multi_index([size - 1 for size in sizes], sizes)
    assert last[0] == expected, f"the last output lies at {last[0]:,}, not {expected:,}"


def plan(draft, problem, stream=0):
    """What the launcher would launch, in which stream; nothing runs."""
    numbers = (problem.batch, problem.in_channels, problem.out_channels)
    numbers += (problem.height, problem.width, problem.out_height, problem.out_width)
    numbers += (*problem.kernel_size, *problem.stride, *problem.padding, *problem.output_padding)
    numbers += (problem.groups, *problem.dilation)
    library = draft.program.library
    with backend_named("simulator").plan(library) as launches:
        library.first_draft(*[None] * 4, *map(ctypes.c_int, numbers), ctypes.c_void_p(stream))
    return launches


def stream(draft):
    (launch,) = plan(draft, Problem(kernel_size=3), stream=7)
    assert launch.stream == 7, f"asked for stream 7, launched in stream {launch.stream}"


def blamed():
    """Run a kernel that is right; return the error that it gets, or None."""
    try:
        lab.stages["coalesced"](*Problem(kernel_size=1).random_inputs())
    except lab.KernelError as error:
        return error
    return None


def checked_launch(draft):
    problem = Problem(1, 1, 70_000, height=1, width=1, kernel_size=1)
    x, weight, _ = problem.random_inputs()
    try:
        y = draft(x, weight)
    except lab.KernelError:
        return  # whoever called is told
    assert blamed() is None, "no error here, but the next kernel has one"
    assert not y.isnan().any(), "no error, and outputs that nobody wrote"


def grid(draft):
    is_right(draft, Problem(1, 1, 70_000, height=1, width=1, kernel_size=1))
    is_right(draft, Problem(0, 2, 3, height=4, width=5, kernel_size=3))


def taps(draft):
    for stride in (1, 2, 3):
        problem = Problem(1, 8, 4, 12, 12, kernel_size=(3, 7), stride=stride, padding=(1, 3))
        tried, divided = draft.tally(problem)
        hits = problem.multiply_adds / tried
        assert hits > 0.8, f"stride {stride}: {hits:.0%} of the tried taps meet an input"
        assert divided < problem.multiply_adds, (
            f"stride {stride}: {divided / tried:.1f} divisions for each tap"
        )


def tile(draft):
    problem = Problem(1, 2, 2, height=16, width=64, kernel_size=(3, 7), padding=(1, 3))
    for request in draft.profile(problem).requests:
        assert request.cost <= 5, f"a {request.op} of {request.buffer!r}: {request.cost} sectors"


#: By the name of the mend.
CHECKS = {
    "weight layout": weight_layout,
    "output padding": output_padding,
    "groups": groups,
    "bias flag": bias_flag,
    "plain memory": plain_memory,
    "offsets": offsets,
    "stream": stream,
    "checked launch": checked_launch,
    "grid": grid,
    "taps": taps,
    "tile": tile,
}


def tell(when, name, draft):
    """Print what a check says of a draft."""
    print(textwrap.fill(f"{when} {outcome(name, draft)}", 86, subsequent_indent="    "))


def compare(name, before, after):
    """Print what a check says before its mend and after it."""
    tell("before the mend it", name, before)
    tell("after the mend it", name, after)


def outcome(name, draft):
    """Run a check; return "passes", or how it fails."""
    try:
        CHECKS[name](draft)
    except (AssertionError, lab.KernelError) as error:
        return f"fails: {error}"
    finally:
        blamed()  # so that the error of an unchecked launch is not taken for the next check's
    return "passes"
