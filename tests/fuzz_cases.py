"""What `test_fuzz` runs in processes of their own: calls with arguments that nobody would choose.

``python fuzz_cases.py NAME COUNT SEED [DEVICE]`` draws COUNT calls of one public function, whose
tensors are on DEVICE (``cpu``), or a few of them elsewhere. Each must return what is right or raise
what PyTorch raises, or an error of the package. What does not is printed, and ends in exit status
1. A crash or a hang is for the parent to see.
"""

import contextlib
import functools
import math
import random
import resource
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import convt_lab as lab
from convt_lab.distributed import RowPlan, conv_transpose2d_rows
from convt_lab.reference import scatter
from convt_lab.stages import kernels

#: Seconds that one call may take.
PATIENCE = 5.0

#: Bytes of memory beyond what is in use once all is imported: enough for each legal call.
ROOM = 4 * 2**30

#: Where tensors are, but for a few.
device = "cpu"

#: What is large is so large that no output of it can be: of those that just can, PyTorch's own
#: function may crash where memory ends.
INTEGERS = [0, 1, 1, 1, 2, 2, 3, 5, -1, -3, 2**31 - 1, 2**31, 2**40, 2**63, -(2**63)]
ODD = [
    None, True, False, 1.0, 2.5, math.nan, math.inf, "2", b"2", 1j, object(), [], {}, (),
    np.int64(2), np.float32(2), torch.tensor(2), torch.tensor([2, 2]), np.array([1, 2]),
    range(1, 3),
]  # fmt: skip


#: What a wrong argument may raise.
ERRORS = TypeError | ValueError | RuntimeError | MemoryError


def integer(rng):
    return rng.choice(INTEGERS)


def pair(rng):
    """Return something that stands where a pair of integers should."""
    kind = 1.6 * rng.random()
    if kind < 0.45 or kind >= 1:
        return rng.choice([1, 1, 2, 3])
    if kind < 0.6:
        return tuple(rng.choice([1, 1, 2, 3]) for _ in range(2))
    if kind < 0.7:
        return [integer(rng) for _ in range(rng.choice([1, 2, 2, 3]))]
    if kind < 0.8:
        return integer(rng)
    if kind < 0.9:
        return tuple(rng.choice([1, *ODD]) for _ in range(2))
    return rng.choice(ODD)


def sizes(rng, rank):
    if rng.random() < 0.15:
        rank = rng.choice([0, 1, 2, 3, 5])
    return [rng.choice([0, *range(1, 8), *range(1, 8), *range(1, 8)]) for _ in range(rank)]


def changed(tensor, rng):
    """Return the tensor in another form: dtype, layout, device, strides, or no tensor at all."""
    kind = rng.random()
    if kind < 0.6:
        return tensor
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool]
    if kind < 0.75:
        return tensor.to(rng.choice([*dtypes, torch.complex64, torch.uint8]))
    if kind < 0.78 and tensor.dim() > 0:
        return tensor.to_sparse()
    if kind < 0.81:
        return tensor.to(rng.choice(["meta", "cpu"]) if device == "cuda" else "meta")
    if kind < 0.85 and tensor.dim() > 0:
        return tensor[:1].expand(tensor.shape)  # overlapping memory
    if kind < 0.88 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind < 0.91:
        return tensor.clone().requires_grad_()
    if kind < 0.94 and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    odd = [tensor.cpu().numpy(), tensor.tolist(), None, 3, "x", tensor.new_tensor(math.nan)]
    return rng.choice(odd)


def drawn_tensors(rng, rank=4):
    """Draw input, weight and bias that often fit together."""
    groups = rng.choice([1, 1, 1, 1, 2, 2, 3, 0])
    shape = sizes(rng, rank)
    if len(shape) >= 3 and groups > 0 and rng.random() < 0.7:
        shape[-3] = groups * rng.choice([1, 2])
    weight_shape = sizes(rng, 4)
    if len(weight_shape) == 4 and len(shape) >= 3 and rng.random() < 0.85:
        weight_shape[0] = shape[-3]
    channels = weight_shape[1] * groups if len(weight_shape) > 1 else 1
    bias_shape = [channels] if rng.random() < 0.85 else sizes(rng, 1)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    x, weight, bias = (
        torch.randn(s, generator=generator).to(device) for s in (shape, weight_shape, bias_shape)
    )
    return x, weight, None if rng.random() < 0.5 else bias, groups


def drawn_call(rng):
    """Draw the arguments of a call of the operator."""
    x, weight, bias, groups = drawn_tensors(rng, rng.choice([4, 4, 4, 3]))
    if rng.random() < 0.3:
        x, weight = changed(x, rng), changed(weight, rng)
        bias = bias if bias is None else changed(bias, rng)
    arguments = {}
    for name in ("stride", "padding", "output_padding", "dilation"):
        if rng.random() < 0.35:
            arguments[name] = pair(rng)
    if groups != 1 or rng.random() < 0.3:
        arguments["groups"] = groups if rng.random() < 0.9 else rng.choice([*INTEGERS, *ODD])
    return (x, weight, bias), arguments


def outcome_of(function, *arguments, **keywords):
    """Return what a call returns or raises, and its seconds."""
    begin = time.monotonic()
    try:
        result = function(*arguments, **keywords)
    except Exception as error:
        result = error
    return result, time.monotonic() - begin


def told_of(value):
    """Describe a value in few words."""
    if isinstance(value, torch.Tensor | np.ndarray):
        where = f" on {value.device}" if isinstance(value, torch.Tensor) else ""
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}{where}"
    return repr(value)[:200]


def same(a, b):
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.device.type == "meta" or a.numel() == 0 or a.is_sparse or not a.is_floating_point():
        return True
    # PyTorch's sums depend on where the memory lies.
    return torch.allclose(a.detach(), b.detach(), rtol=1e-2, atol=1e-2, equal_nan=True)


def operator(rng):
    """`conv_transpose2d` as PyTorch's."""
    tensors, arguments = drawn_call(rng)
    ours, seconds = outcome_of(lab.conv_transpose2d, *tensors, **arguments)
    theirs, _ = outcome_of(F.conv_transpose2d, *tensors, **arguments)
    if isinstance(theirs, Exception):
        # ProblemError is a RuntimeError and a ValueError; of the former PyTorch has kinds.
        kind = RuntimeError if isinstance(theirs, RuntimeError) else type(theirs)
        fine = isinstance(ours, kind)
    elif isinstance(ours, lab.ProblemError | TypeError):
        # PyTorch returns nothing, or what nobody computed, where there is an error: for sizes of 0,
        # one tensor without data, and what is no integer.
        odd = any(isinstance(v, float | bool) for v in arguments.values())
        devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
        sizes_of_0 = any(0 in t.shape for t in tensors if isinstance(t, torch.Tensor))
        fine = theirs.numel() == 0 or sizes_of_0 or len(devices) > 1 or odd
    else:
        fine = isinstance(ours, torch.Tensor) and same(ours, theirs)
    return (
        fine,
        seconds,
        f"{list(map(told_of, tensors))} {arguments}: {told_of(ours)}, PyTorch: {told_of(theirs)}",
    )


def rows(rng):
    """`conv_transpose2d_rows` of one rank, as PyTorch's of float64, on what it takes."""
    if not dist.is_initialized():
        file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
    keywords = {}
    if rng.random() < 0.3:
        keywords["heights"] = rng.choice([[3], [4], (5,), [-1], [1.5], [1, 2], *ODD])
    if rng.random() < 0.2:
        keywords["timeout"] = rng.choice([5, 2.5, 0, -1, math.nan, *ODD])
    if rng.random() < 0.05:
        keywords["group"] = rng.choice([dist.group.WORLD, *ODD])
    fine, seconds, told = compared(
        rng, functools.partial(conv_transpose2d_rows, **keywords), lambda result: result
    )
    return fine, seconds, f"{keywords}: {told}"


def problem(rng):
    """`Problem` as the operator's, in float64, on what it takes."""
    names = ("batch", "in_channels", "out_channels", "height", "width", "groups")
    arguments = {
        name: rng.choice([1, 2, 4, *INTEGERS, *ODD])
        if rng.random() < 0.15
        else rng.choice([1, 2, 4])
        for name in names
        if rng.random() < 0.7
    }
    for name in ("kernel_size", "stride", "padding", "output_padding", "dilation"):
        if rng.random() < 0.5:
            arguments[name] = pair(rng)
    if rng.random() < 0.3:
        arguments["bias"] = rng.choice([True, False, *ODD])
    ours, seconds = outcome_of(lab.Problem, **arguments)
    if isinstance(ours, Exception):
        return isinstance(ours, TypeError | lab.ProblemError), seconds, f"{arguments}: {ours!r}"
    elements = math.prod(ours.output_shape) + math.prod(ours.weight_shape)
    fine = True
    if 0 < elements < 10_000 and math.prod(ours.input_shape) < 10_000:
        tensors = [
            torch.ones(s, dtype=torch.float64) for s in (ours.input_shape, ours.weight_shape)
        ]
        theirs, _ = outcome_of(F.conv_transpose2d, *tensors, **ours.arguments)
        fine = not isinstance(theirs, Exception) and tuple(theirs.shape) == ours.output_shape
    return fine, seconds, f"{arguments}: {ours!r}"


def reference(rng):
    """`reference.scatter` as PyTorch in float64, on what it takes."""
    return compared(rng, scatter, lambda result: torch.from_numpy(np.asarray(result)))


def stage(rng):
    """A stage. Of two, the simulator runs ten blocks in a second: they are left to GPUs."""
    slow = ("tensor_core_split", "hopper") if device == "cpu" else ()
    name = rng.choice([name for name in lab.stages if name not in slow])
    # Its operands are rounded to TF32's eleven bits.
    tolerance = 1e-2 if name == "tensor_core" else 1e-4
    return compared(rng, lab.stages[name], lambda result: torch.as_tensor(result), tolerance)


def gather(rng):
    """`reference.gather`, likewise."""
    return compared(rng, lab.reference.gather, lambda result: torch.from_numpy(np.asarray(result)))


def drawn_problem(rng):
    """Draw a problem, of few values or very many, or of none."""
    groups = rng.choice([1, 1, 1, 2, 3])
    extents = [0, 1, 1, 2, 3, 5, 16, 33, 64, 100, 500, 2**20]
    while True:
        with contextlib.suppress(lab.ProblemError):
            return lab.Problem(
                rng.choice([0, 1, 1, 2, 3, 70000]),
                groups * rng.choice([0, 1, 2, 16, 17, 64, 300]),
                groups * rng.choice([1, 2, 3, 16, 40, 129]),
                *(rng.choice(extents) for _ in range(2)),
                kernel_size=(rng.randint(1, 5), rng.choice([1, 2, 3, 4, 7, 11, 100])),
                stride=(rng.choice([1, 1, 2, 3, 300]), rng.choice([1, 1, 2, 3, 70000])),
                padding=(rng.choice([0, 0, 1, 2, 20]), rng.choice([0, 1, 3, 600])),
                dilation=(rng.choice([1, 1, 2, 500]), rng.choice([1, 1, 2, 3, 4])),
                groups=groups,
                bias=rng.random() < 0.5,
            )


def rung(rng):
    """What a kernel tells of a problem: `kernel_for`, `variant`, `launches`, `packed_bytes`."""
    stage = kernels[rng.choice(list(kernels))]
    arguments = [rng.choice([drawn_problem(rng), lab.Problem.named("star")])]
    if rng.random() < 0.2:
        arguments = [rng.choice(ODD)]
    keywords = {}
    ask = rng.choice(["kernel_for", "variant", "launches", "packed_bytes"])
    if ask != "variant":
        if rng.random() < 0.3:
            keywords["dtype"] = rng.choice([torch.float32, torch.float16, torch.int32, *ODD])
        if rng.random() < 0.2:
            keywords["channels_last"] = rng.choice([True, False, *ODD])
    if ask == "launches" and rng.random() < 0.3:
        keywords["max_shared_bytes"] = rng.choice([0, 1, 49152, 232448, *INTEGERS, *ODD])
    if ask == "kernel_for" and rng.random() < 0.3:
        keywords["capability"] = rng.choice([(9, 0), (7, 5), (1, 0), *ODD])
    ours, seconds = outcome_of(getattr(stage, ask), *arguments, **keywords)
    told = f"{stage.name}.{ask} {arguments} {keywords}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    kind = {"kernel_for": type(stage), "variant": str, "launches": tuple, "packed_bytes": int}[ask]
    return isinstance(ours, kind), seconds, told


def row_plan(rng):
    """`RowPlan`: rows that make up input and output, or an error."""
    planned = lab.Problem(height=rng.randint(1, 9), kernel_size=rng.randint(1, 4))
    problem = planned if rng.random() < 0.9 else rng.choice(ODD)
    if rng.random() < 0.5:
        first = rng.randint(0, planned.height)
        heights = [first, planned.height - first]
        if rng.random() < 0.3:
            heights = rng.choice([[-1, planned.height + 1], [2, 2, 2], [1.5], [[1]], *ODD])
        make, given = RowPlan.for_heights, heights
    else:
        make, given = RowPlan.for_chunks, rng.choice([1, 2, 3, 7, 1000, *INTEGERS, *ODD])
        if isinstance(given, int) and given > 10**6:
            given = -given  # a plan for so many is legal, and long
    ours, seconds = outcome_of(make, problem, given)
    told = f"{problem}, {make.__name__} {given!r}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    owned = [row for rows in ours.output_rows for row in rows]
    had = [row for rows in ours.input_rows for row in rows]
    fine = owned == list(range(planned.out_height)) and had == list(range(planned.height))
    rank, other = (rng.choice([0, 0, 1, *INTEGERS, *ODD]) for _ in range(2))
    for ask in (ours.added_to, ours.bytes_sent, lambda r: ours.sent(r, other)):
        answer, _ = outcome_of(ask, rank)
        if isinstance(answer, Exception):
            fine = fine and isinstance(answer, TypeError | IndexError)
        else:
            fine = fine and isinstance(answer, int | range)
    return fine, seconds, told


def from_torch(rng):
    """`ConvTranspose2d.from_torch`: a layer that shares what it is made of, or an error."""
    kinds = [
        torch.nn.ConvTranspose2d(2, 3, 3),
        lab.ConvTranspose2d(2, 3, 3, device="meta"),
        torch.nn.LazyConvTranspose2d(3, 3),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose2d(2, 3, 3)),
        torch.nn.Conv2d(2, 3, 3),
        torch.nn.ConvTranspose2d,
        *ODD,
    ]
    module = rng.choice([*kinds[:2] * 3, *kinds])
    ours, seconds = outcome_of(lab.ConvTranspose2d.from_torch, module)
    told = f"{told_of(module)}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, TypeError), seconds, told
    return ours.weight is module.weight and ours is not module, seconds, told


def texts(rng):
    """`exercises.start`, `hint`, `hints` and `solution`: what a reader is shown, or an error."""
    ask = rng.choice(["start", "hint", "hints", "solution"])
    name = rng.choice(lab.exercises.names)
    arguments = [name if rng.random() < 0.7 else rng.choice(["", "coalesced", *ODD])]
    if ask == "hint" and rng.random() < 0.5:
        arguments.append(rng.choice([1, 2, *INTEGERS, *ODD]))
    ours, seconds = outcome_of(getattr(lab.exercises, ask), *arguments)
    told = f"{ask} {arguments}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    return arguments[0] == name and str(ours) != "", seconds, told


def profile(rng):
    """`Stage.profile`: counts, or an error."""
    tensors, arguments = drawn_call(rng)
    if rng.random() < 0.3:
        arguments["blocks"] = rng.choice([[0], [0, 1], [-1], [2**40], [1.5], "0", *ODD])
    ours, seconds = outcome_of(lab.stages["coalesced"].profile, *tensors, **arguments)
    told = f"{list(map(told_of, tensors))} {arguments}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    stores = [site for site in ours.sites if (site.space, site.op) == ("global", "store")]
    return stores != [] and ours.hazards == (), seconds, told


def layer(rng):
    """`ConvTranspose2d` as PyTorch's: made, then called."""
    arguments = [rng.choice([1, 2, 4, 4, 4]) for _ in range(2)] + [pair(rng)]
    if rng.random() < 0.2:
        arguments[rng.randrange(3)] = rng.choice([*INTEGERS, *ODD])
    keywords = {
        name: pair(rng)
        for name in ("stride", "padding", "output_padding", "dilation")
        if rng.random() < 0.2
    }
    if rng.random() < 0.3:
        keywords["groups"] = rng.choice([1, 2, 4, *INTEGERS, *ODD])
    if rng.random() < 0.1:
        keywords["bias"] = rng.choice([True, False, *ODD])
    if rng.random() < 0.1:
        keywords["padding_mode"] = rng.choice(["zeros", "reflect", "circular", *ODD])
    if rng.random() < 0.1:
        keywords["device"] = rng.choice(["cpu", "meta", "nowhere", *ODD])
    elif device != "cpu":
        keywords["device"] = device
    if rng.random() < 0.1:
        keywords["dtype"] = rng.choice([torch.float32, torch.float64, torch.int32, *ODD])
    x = torch.randn(sizes(rng, rng.choice([3, 4, 4, 4])), device=device)
    if x.dim() > 2 and x.numel() > 0 and rng.random() < 0.8:
        x = x.narrow(-3, 0, 1).repeat_interleave(4, -3)  # as many channels as most layers take
    x = changed(x, rng)
    given = [x] if rng.random() < 0.8 else [x, rng.choice([[9, 9], [4, 5], [3], *ODD])]

    def run(kind):
        torch.manual_seed(0)
        return kind(*arguments, **keywords)(*given)

    ours, seconds = outcome_of(run, lab.ConvTranspose2d)
    theirs, _ = outcome_of(run, torch.nn.ConvTranspose2d)
    told = (
        f"{arguments} {keywords}, {list(map(told_of, given))}: {told_of(ours)}, "
        f"PyTorch: {told_of(theirs)}"
    )
    if isinstance(theirs, Exception):
        kind = RuntimeError if isinstance(theirs, RuntimeError) else type(theirs)
        return isinstance(ours, kind), seconds, told
    if isinstance(ours, lab.ProblemError | TypeError):  # as for `operator`
        odd = any(isinstance(v, float | bool) for v in keywords.values())
        kinds = x.device.type, str(keywords.get("device", "cpu"))
        elsewhere = "meta" in kinds or kinds[0] != kinds[1]
        return theirs.numel() == 0 or odd or elsewhere, seconds, told
    return isinstance(ours, torch.Tensor) and same(ours, theirs), seconds, told


def replace(rng):
    """`replace_conv_transpose`: the model, or an error for what is none."""
    kinds = [
        lambda: torch.nn.ConvTranspose2d(2, 3, 3),
        lambda: torch.nn.LazyConvTranspose2d(3, 3),
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose2d(2, 3, 3)),
        lambda: torch.nn.ConvTranspose1d(2, 3, 3),
        lambda: torch.nn.Conv2d(2, 3, 3),
        lambda: lab.ConvTranspose2d(2, 3, 3, device="meta"),
        lambda: torch.nn.Sequential(*(rng.choice(kinds[:6])() for _ in range(rng.randrange(4)))),
        lambda: rng.choice([torch.nn.ConvTranspose2d, [torch.nn.ReLU()], *ODD]),
    ]
    model = rng.choice(kinds)()
    plain = type(model) is torch.nn.ConvTranspose2d
    ours, seconds = outcome_of(lab.replace_conv_transpose, model)
    told = f"{told_of(model)}: {told_of(ours)}"
    if not isinstance(model, torch.nn.Module):
        return isinstance(ours, TypeError), seconds, told
    fine = ours is model and (isinstance(model, lab.ConvTranspose2d) or not plain)
    return fine, seconds, told


def explain(rng):
    """`explain`: a kernel, PyTorch's own for CPU tensors; or an error."""
    tensors, arguments = drawn_call(rng)
    ours, seconds = outcome_of(lab.explain, *tensors, **arguments)
    told = f"{list(map(told_of, tensors))} {arguments}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, TypeError | ValueError | RuntimeError), seconds, told
    known = ours.kernel == "pytorch" or (device == "cuda" and ours.kernel in kernels)
    return known and len(str(ours)) > 20, seconds, told


def random_inputs(rng):
    """`Problem.random_inputs`: tensors of the problem's shapes, or an error."""
    keywords = {}
    if rng.random() < 0.7:
        keywords["seed"] = rng.choice([0, 1, 2**63, -1, *ODD])
    if rng.random() < 0.4:
        keywords["device"] = rng.choice(["cpu", "cpu", "meta", "cuda:99", "nowhere", *ODD])
    drawn = lab.Problem(bias=rng.random() < 0.5, height=rng.randint(1, 9), stride=rng.randint(1, 3))
    ours, seconds = outcome_of(drawn.random_inputs, **keywords)
    told = f"{keywords}: {told_of(ours)}"
    if isinstance(ours, Exception):  # without CUDA PyTorch has an error of its own
        return isinstance(ours, ERRORS) or "with CUDA enabled" in str(ours), seconds, told
    shapes = drawn.input_shape, drawn.weight_shape, drawn.bias_shape
    fine = all(s is None if t is None else t.shape == s for t, s in zip(ours, shapes, strict=True))
    return fine, seconds, told


def compile(rng):
    """`lab.compile`: a program, or an error; sources that compile are few, as that takes long."""
    source = rng.choice([*[KERNEL] * 20, *ODD])
    keywords = {}
    if rng.random() < 0.8:
        backends = [*["simulator"] * 20, "gpu", "auto", ""]
        keywords["backend"] = rng.choice([*backends, *ODD])
    if rng.random() < 0.4:
        keywords["name"] = rng.choice(["kernel", "", "a/b", "..", "a b", "ä", "x" * 300, *ODD])
    ours, seconds = outcome_of(lab.compile, source, **keywords)
    told = f"{told_of(source)[:20]} {keywords}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    return list(ours.kernels) == ["scale"], min(seconds, 1.0), told


def check(rng):
    """`exercises.check` with answers of a wrong kind, which are told so."""
    name = rng.choice(lab.exercises.names)
    if rng.random() < 0.2:
        name = rng.choice(["", "coalesced", "coalesced.99", *ODD])
    # An empty dict is the starting text, which is run.
    odd = [each for each in ODD if not isinstance(each, dict)]
    answer = rng.choice([{"no such text": ""}, {1: 2}, {"": "x"}, (1, 2), (), (None,), *odd])
    keywords = {}
    if rng.random() < 0.2:
        keywords["backend"] = rng.choice(["simulator", "auto", "gpu", "", *ODD])
    ours, seconds = outcome_of(lab.exercises.check, name, answer, **keywords)
    told = f"{name!r:.99}, {told_of(answer)}, {keywords}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    return not ours.passed and len(str(ours)) > 10, seconds, told


def compared(rng, function, as_tensor, tolerance=1e-4):
    tensors, arguments = drawn_call(rng)
    ours, seconds = outcome_of(function, *tensors, **arguments)
    told = f"{list(map(told_of, tensors))} {arguments}: {told_of(ours)}"
    if isinstance(ours, Exception):
        return isinstance(ours, ERRORS), seconds, told
    doubles = [None if t is None else torch.as_tensor(t).detach().cpu().double() for t in tensors]
    theirs, _ = outcome_of(F.conv_transpose2d, *doubles, **arguments)
    if isinstance(theirs, Exception):
        return as_tensor(ours).numel() == 0, seconds, f"{told}, PyTorch: {told_of(theirs)}"
    actual = as_tensor(ours).cpu().double()
    fine = actual.shape == theirs.shape and torch.allclose(
        actual, theirs, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return fine, seconds, told


KERNEL = """
extern "C" __global__ void scale(const float* x, float* y, int n, float factor) {
  __shared__ float kept[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    kept[threadIdx.x % 32] = x[i] * factor;
    y[i] = kept[threadIdx.x % 32];
  }
}
"""


def launch(rng):
    """`lab.compile(...).launch(...)` with other arguments than the kernel's."""
    program = lab.compile(KERNEL, backend="simulator")
    n = rng.choice([0, 1, 33, 64])
    arguments = [np.arange(n, dtype=np.float32), np.full(n, np.nan, np.float32), n, 2.0]
    odd = [*ODD, np.zeros(3), np.zeros(3, np.int8), np.zeros(4, np.float32)[::2], torch.ones(2)]
    is_changed = rng.random() < 0.7
    if is_changed:
        for _ in range(rng.choice([1, 1, 2])):
            kind = rng.random()
            if kind < 0.2 and arguments:
                arguments.pop(rng.randrange(len(arguments)))
            elif kind < 0.35:
                arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(odd))
            elif arguments:
                arguments[rng.randrange(len(arguments))] = rng.choice([*odd, *INTEGERS])
    grid, block, shared = 2, 32, 0
    if rng.random() < 0.4:
        grid = rng.choice([1, 2, (2, 1), (1, 1, 2), *INTEGERS[:9], *ODD, 2**31, (1, 2**17, 1)])
    if rng.random() < 0.4:
        block = rng.choice([32, 64, (8, 4), (0, 1), 1025, 2**20, -1, *ODD, (1, 1, 65)])
    if rng.random() < 0.2:
        shared = rng.choice([0, 4, -4, 2**18, 2**40, *ODD])
    name = "scale" if rng.random() < 0.95 else rng.choice(["", "none", None, 3])
    given = arguments if rng.random() < 0.97 else rng.choice([None, 3, "ab", np.zeros(4)])
    traced = {}
    if rng.random() < 0.2:
        traced["trace"] = rng.choice([True, True, True, False, *ODD])
    if rng.random() < 0.1:
        traced["blocks"] = rng.choice([[0], (1, 0), range(2), [], [-1], [7], [2**40], 0, *ODD])
    ours, seconds = outcome_of(
        lambda: program.launch(name, grid, block, given, shared_bytes=shared, **traced)
    )
    told = f"{name!r}, {grid!r}, {block!r}, {arguments!r}, {shared!r}, {traced}: {told_of(ours)}"
    if isinstance(ours, Exception):
        kinds = TypeError | ValueError | RuntimeError | AttributeError | KeyError
        return isinstance(ours, kinds), seconds, told
    return True, seconds, told


FUNCTIONS = {
    function.__name__: function
    for function in (
        *(operator, layer, replace, from_torch, explain, rows, row_plan),
        *(problem, random_inputs, reference, gather),
        *(stage, rung, profile, compile, launch, check, texts),
    )
}

#: Those of them that take tensors on a GPU.
ON_GPU = ("operator", "layer", "explain", "stage", "profile")


def limit_memory():
    """Leave room for `ROOM` bytes more than what is in use."""
    if device == "cpu":
        limit, field = resource.RLIMIT_AS, 0
    else:
        # CUDA reserves addresses for all the GPU's memory: count what may be written alone.
        limit, field = resource.RLIMIT_DATA, 5
        torch.cuda.set_per_process_memory_fraction(
            ROOM / torch.cuda.get_device_properties(device).total_memory
        )
        torch.zeros(1, device=device)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[field]) * resource.getpagesize()
    resource.setrlimit(limit, (used + ROOM, used + ROOM))


def main(name, count, seed, where="cpu"):
    global device
    device = where
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit_memory()
    if name in ("stage", "rung"):  # a build takes longer than any answer may
        for kernel in kernels.values():
            kernel.program("simulator" if where == "cpu" else "gpu")
    wrong = 0
    returned = 0
    for number in range(count):
        rng = random.Random(f"{name} {seed} {number}")
        fine, seconds, told = FUNCTIONS[name](rng)
        returned += "Error" not in told
        if not fine or seconds > PATIENCE:
            wrong += 1
            print(f"{number} ({seconds:.1f} s): {told[:600]}", flush=True)
    print(f"{count} calls of {name}, {returned} returned, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]) > 0)
