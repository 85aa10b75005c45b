"""What the operator needs of a GPU's memory, and what it says where there is none left."""

import os
import subprocess
import sys

import pytest
import torch
from paths import tf32

import convt_lab as lab
from convt_lab import plan as plans
from convt_lab.gpu import check_fork
from convt_lab.plan import plan_for
from convt_lab.stages import kernels

gpu = pytest.mark.gpu

#: Bytes to which PyTorch's allocator rounds a large tensor up.
ROUNDING = 2 * 2**20


@gpu
@pytest.mark.parametrize(
    ("dtype", "allow_tf32"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float16, False),
        (torch.bfloat16, False),
    ],
)
def test_the_star_needs_memory_for_output_and_packed_weight_alone(dtype, allow_tf32):
    problem = lab.Problem.named("star")
    x, weight, _ = (None if t is None else t.to(dtype) for t in problem.random_inputs(0, "cuda"))
    with tf32(allow_tf32):
        plan = plan_for(x, weight, None, *problem.arguments.values())
        assert not plan.is_pytorchs
        packed = kernels[plan.kernel].packed_bytes(problem, dtype, backend="gpu")
        lab.conv_transpose2d(x, weight, **problem.arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = lab.conv_transpose2d(x, weight, **problem.arguments)
        most = torch.cuda.max_memory_allocated() - before
    # Far less than an input, or than the weight's outer product with one.
    assert packed < x.nbytes / 10
    assert y.nbytes <= most <= y.nbytes + packed + 2 * ROUNDING
    assert torch.cuda.memory_allocated() - before <= y.nbytes + ROUNDING


@gpu
def test_out_of_memory_is_pytorchs_error_and_the_next_call_works():
    torch.cuda.empty_cache()  # so that no segment has room beside what follows
    problem = lab.Problem(8, 32, 64, 256, 256, kernel_size=(3, 7))
    x, weight, _ = problem.random_inputs(0, "cuda")
    expected = lab.conv_transpose2d(x, weight)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = expected.nbytes // 2
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                lab.conv_transpose2d(x, weight)
        small = lab.conv_transpose2d(x[:1], weight)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(small, expected[:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(lab.conv_transpose2d(x, weight), expected)


FORKED = """
import os, sys
import torch
import convt_lab as lab

x, weight = torch.ones(1, 32, 8, 40), torch.ones(32, 32, 3, 7)
on_gpu = [t.cuda() for t in (x, weight)]
expected = lab.conv_transpose2d(*on_gpu).cpu()
child = os.fork()
if child == 0:
    try:
        assert torch.equal(lab.conv_transpose2d(x, weight), expected)
        try:
            lab.conv_transpose2d(*on_gpu)
        except RuntimeError as error:
            print(error, flush=True)
        try:
            lab.stages["coalesced"](*on_gpu)
        except RuntimeError as error:
            os._exit("was forked" not in str(error))
    except BaseException as error:
        print(type(error), error, flush=True)
    os._exit(1)
_, status = os.waitpid(child, 0)
assert torch.equal(lab.conv_transpose2d(*on_gpu).cpu(), expected)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@gpu
def test_a_forked_process_computes_on_the_cpu_and_says_why_not_on_the_gpu():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was forked from one that had used CUDA" in done.stdout
    assert "spawn" in done.stdout


def test_a_fork_forgets_its_parents_plans(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {"a call": "a plan"})
    child = os.fork()
    if child == 0:
        os._exit(len(plans._plans))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert plans._plans


def test_a_fork_that_cannot_use_cuda_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="start processes by the 'spawn' method"):
        check_fork()
