"""What a launcher would launch, asked without running anything."""

import ctypes
import math
import re

import pytest

import convt_lab as lab
from convt_lab.program import backend_named
from convt_lab.simulator.planning import readable_name
from convt_lab.stages import fma_stages, kernels

SOURCE = """
template <int N>
__global__ void fill(float* y) { y[threadIdx.x] = N; }
static __global__ void idle() {}

extern "C" cudaError_t start(float* y, int blocks, cudaStream_t stream) {
  fill<1><<<dim3(blocks, 2), dim3(4, 8, 2), 100, stream>>>(y);
  if (cudaGetLastError() != cudaSuccess) return cudaErrorInvalidValue;
  idle<<<1, 32>>>();
  fill<2><<<blocks, 96>>>(y);
  return cudaGetLastError();
}
"""


def depthwise(channels, kernel_size):
    return lab.Problem(
        1, channels, channels, 8, 8, kernel_size=kernel_size, stride=16, groups=channels
    )


def plan(blocks):
    return lab.compile(SOURCE, "simulator").plan("start", None, ctypes.c_int(blocks))


def test_every_launch_is_listed_in_order():
    launches = plan(3)
    assert [(launch.grid, launch.block, launch.shared_bytes) for launch in launches] == [
        ((3, 2, 1), (4, 8, 2), 100),
        ((1, 1, 1), (32, 1, 1), 0),
        ((3, 1, 1), (96, 1, 1), 0),
    ]
    assert [launch.threads for launch in launches] == [64, 32, 96]
    symbols = [launch.symbol for launch in launches]
    assert symbols[0] == "_Z4fillILi1EEvPf"
    assert "idle" in symbols[1]
    assert symbols[2] == "_Z4fillILi2EEvPf"
    assert [readable_name(symbol) for symbol in symbols] == ["fill<1>", "idle", "fill<2>"]
    assert plan(3) == launches


def test_a_launch_is_planned_in_the_stream_that_it_names():
    simulator = backend_named("simulator")
    library = lab.compile(SOURCE, "simulator").library
    with simulator.plan(library) as launches:
        code = library.start(None, ctypes.c_int(3), ctypes.c_void_p(7))
    assert code == 0
    assert [launch.stream for launch in launches] == [7, 0, 0]
    assert [launch.stream for launch in plan(3)] == [0, 0, 0]


def test_a_bad_configuration_is_refused_and_forgotten():
    with pytest.raises(lab.KernelError, match="grid"):
        plan(0)
    assert len(plan(1)) == 3


def test_launches_run_again_afterwards():
    plan(1)
    x, weight, bias = lab.Problem.named("star_small").random_inputs()
    y = lab.stages["coalesced"](x, weight, bias)
    assert not y.isnan().any()


def test_an_empty_output_takes_no_launch():
    for stage in lab.stages.values():
        assert stage.launches(lab.Problem(batch=0)) == (), stage.name


@pytest.mark.parametrize(
    ("kernel", "refused", "taken"),
    [
        ("coalesced", lab.Problem(2**16 + 1, 1, 2**16, 1, 1), lab.Problem(2**15, 1, 2**15, 1, 1)),
        ("shared_tiled", lab.Problem(2**16, 1, 2**15, 1, 1), lab.Problem(2**15, 1, 2**15, 1, 1)),
        *(
            (name, lab.Problem(1, 1, 1, 1, 1, (65600, n), padding=(0, 16383)), lab.Problem())
            for name, n in (("register_blocked", 32768), ("tensor_core", 32767))
        ),
        ("tensor_core_split", depthwise(448, 224), depthwise(440, 224)),
        ("tensor_core_narrow", depthwise(40000, 96), depthwise(36000, 96)),
    ],
)
def test_more_than_32_bits_count_is_refused(kernel, refused, taken):
    """Blocks of a grid; a packed weight's vectors."""
    with pytest.raises(lab.KernelError, match="invalid"):
        kernels[kernel].launches(refused)
    assert kernels[kernel].launches(taken)


@pytest.mark.parametrize("stage", lab.stages.values(), ids=lambda stage: stage.name)
def test_a_stage_is_planned_as_it_is_profiled(stage):
    problem = lab.Problem.named("strided_small")
    x, weight, bias = problem.random_inputs()
    launches = stage.launches(problem)
    report = stage.profile(x, weight, bias, **problem.arguments, blocks=[0])
    x, y, z = launches[-1].grid
    assert report.grid_blocks == x * y * z


def test_a_stage_is_planned_for_a_problem_too_large_to_run():
    problem = lab.Problem(
        batch=64, in_channels=512, out_channels=512, height=512, width=512, kernel_size=3
    )
    for stage in lab.stages.values():
        assert stage.launches(problem)


@pytest.mark.parametrize("stage", fma_stages)
def test_as_many_blocks_as_the_images_need(stage):
    """64 images have more outputs than 32 bits can count, and need as many blocks as 64 times one.

    A few less, where images share tiles.
    """
    one, all_images = (
        lab.Problem(batch, 512, 512, height=512, width=512, kernel_size=3) for batch in (1, 64)
    )
    assert math.prod(one.output_shape) < 2**31 < math.prod(all_images.output_shape)
    blocks = [
        sum(math.prod(launch.grid) for launch in lab.stages[stage].launches(problem))
        for problem in (one, all_images)
    ]
    assert 0.95 * 64 * blocks[0] <= blocks[1] <= 64 * blocks[0]


def test_a_launcher_may_ask_how_much_shared_memory_there_is():
    """The last stage takes fewer channels at once where a block may have less."""
    stage, problem = lab.stages["winograd"], lab.Problem.named("star")
    (large,), (small,) = stage.launches(problem), stage.launches(problem, 64 * 1024)
    assert 64 * 1024 >= small.shared_bytes > large.shared_bytes // 3
    assert large.shared_bytes > 64 * 1024
    assert stage.launches(problem) == (large,)


@pytest.mark.parametrize(
    ("problem", "most", "error", "message"),
    [
        (lab.Problem(), 0, ValueError, "max_shared_bytes=0: it must be at least 1"),
        (lab.Problem(), 1.5, TypeError, "max_shared_bytes=1.5 must be an integer"),
        ((1, 2), None, TypeError, "problem=(1, 2) must be a Problem"),
    ],
)
def test_wrong_arguments(problem, most, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lab.stages["coalesced"].launches(problem, most)


@pytest.mark.parametrize("stage", ["register_blocked", "winograd"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (3, 7)])
def test_rows_of_all_images_that_32_bits_cannot_count_are_not_one_axis(stage, kernel_size):
    problem = lab.Problem(2**17, 8, 20, 2**15, 1, kernel_size, padding=(1, kernel_size[1] // 2))
    (launch,) = lab.stages[stage].launches(problem)
    assert launch.grid[0] % problem.batch == 0
