"""Every stage against float64, on every legal kind of problem, on the simulator and on a GPU."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.reference import FLOAT32_GATE, condition_error, gather, scatter, tf32_gate
from convt_lab.stages import _ConvTransposeProblem, fma_stages, kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: The others are tried on the same problems by test_kernels.py, in all their types and formats.
STAGES = list(fma_stages)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Let what torch allocates start as NaN, so that a pixel nobody wrote can't look right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_fresh_tensor_is_poisoned(device):
    assert torch.empty(1000, device=device).isnan().all()


def run(stage, x, weight, bias=None, device="cpu", **arguments):
    """Run a stage on CPU tensors' copies on `device`; the result is on the CPU."""
    tensors = [None if t is None else t.to(device) for t in (x, weight, bias)]
    return lab.stages[stage](*tensors, **arguments).cpu()


@pytest.mark.parametrize("part", range(6))  # so that several processes can share the work
def test_float64_agrees_on_300_random_problems(device, part):
    errors = {}
    for number, problem in enumerate(problem_set(300)):
        if number % 6 != part:
            continue
        x, weight, bias = inputs(problem, seed=number)
        expected = scatter(x, weight, bias, **problem.arguments)
        for stage in STAGES:
            y = run(stage, x, weight, bias, device, **problem.arguments)
            error = condition_error(y, x, weight, bias, expected=expected, **problem.arguments)
            errors[stage, number] = error
    wrong = {
        key: (error, problem_set(300)[key[1]])
        for key, error in errors.items()
        if not error <= FLOAT32_GATE
    }
    assert len(errors) == 50 * len(STAGES)
    assert wrong == {}


def test_a_block_takes_almost_all_that_it_may_unasked(device):
    """48 KiB hold what a kernel declares, too: it has to ask earlier than for more than those."""
    problem = lab.Problem(1, 31, 16, 1, 1, (5, 2), 4, (1, 0), output_padding=(0, 2))
    (launch,) = lab.stages["register_blocked"].launches(problem)
    assert 48 * 1024 - 100 <= launch.shared_bytes < 48 * 1024
    x, weight, bias = inputs(problem)
    expected = scatter(x, weight, bias, **problem.arguments)
    y = run("register_blocked", x, weight, bias, device, **problem.arguments)
    error = condition_error(y, x, weight, bias, expected=expected, **problem.arguments)
    assert error <= FLOAT32_GATE


#: Kernels of the star's size, for which some stages have a way of their own, at its edges: widths
#: of whole vectors and others, one channel more or less than a block has, wide rows, paddings that
#: cut more than the kernel adds, few input channels and many.
OF_3X7 = [
    lab.Problem(2, 16, 17, 14, 41, kernel_size=(3, 7)),
    lab.Problem(1, 8, 18, 15, 48, kernel_size=(3, 7)),
    lab.Problem(1, 17, 33, 7, 64, kernel_size=(3, 7), padding=(2, 1), bias=False),
    lab.Problem(1, 5, 16, 10, 100, kernel_size=(3, 7), padding=(1, 3)),
    lab.Problem(2, 34, 36, 9, 44, kernel_size=(3, 7), padding=(1, 2), groups=2),
    lab.Problem(3, 32, 66, 2, 4, kernel_size=(3, 7), groups=2, bias=False),
    lab.Problem(1, 16, 32, 20, 30, kernel_size=(3, 7), padding=(2, 9)),
    lab.Problem(1, 20, 19, 8, 16, kernel_size=(3, 7), padding=(4, 6)),
    lab.Problem(1, 16, 1, 1, 1, kernel_size=(3, 7)),
    lab.Problem(1, 16, 33, 2, 1500, kernel_size=(3, 7), padding=(1, 0)),
    lab.Problem(1, 2, 3, 2, 1501, kernel_size=(3, 7), padding=(0, 5)),
    lab.Problem(1, 16, 20, 2, 9000, kernel_size=(3, 7)),
    lab.Problem(1, 16, 2, 1, 9000, kernel_size=(3, 7)),
]


@pytest.mark.parametrize("problem", OF_3X7, ids=lambda p: f"{p.input_shape} {p.weight_shape}")
def test_the_stars_kernel_at_its_edges(problem, device):
    x, weight, bias = inputs(problem)
    expected = scatter(x, weight, bias, **problem.arguments)
    for stage in STAGES:
        y = run(stage, x, weight, bias, device, **problem.arguments)
        assert torch.equal(y, run(stage, x, weight, bias, device, **problem.arguments)), stage
        error = condition_error(y, x, weight, bias, expected=expected, **problem.arguments)
        assert error <= FLOAT32_GATE, stage
    x, weight, bias = inputs(problem, kind="small_integers")
    expected = scatter(x, weight, bias, **problem.arguments)
    for stage in STAGES:
        y = run(stage, x, weight, bias, device, **problem.arguments)
        np.testing.assert_array_equal(y.double().numpy(), expected, stage)


def test_an_input_that_is_not_aligned(device):
    """A width of whole vectors does not help if the first value lies between two."""
    problem = OF_3X7[1]
    x, weight, _ = inputs(problem)
    shifted = torch.empty(x.numel() + 1, device=device)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16 != 0
    for stage in STAGES:
        y = lab.stages[stage](shifted, weight.to(device), None, **problem.arguments)
        assert torch.equal(y.cpu(), run(stage, x, weight, None, device, **problem.arguments)), stage


def test_small_integers_are_exact(device):
    for number, problem in enumerate(problem_set(300)[::7]):
        x, weight, bias = inputs(problem, seed=number, kind="small_integers")
        expected = scatter(x, weight, bias, **problem.arguments)
        for stage in STAGES:
            y = run(stage, x, weight, bias, device, **problem.arguments)
            np.testing.assert_array_equal(y.double().numpy(), expected, f"{stage}: {problem}")


def test_all_stages_give_the_same_bits_twice(device):
    """One order of summation (channel, row, column of the kernel), all fused.

    Winograd's products are others: there it is the same bits twice.
    """
    for number, problem in enumerate(problem_set(300)[::7]):
        x, weight, bias = inputs(problem, seed=number)
        results = [
            run(stage, x, weight, bias, device, **problem.arguments) for stage in (*STAGES, *STAGES)
        ]
        for stage, result in zip((*STAGES, *STAGES), results, strict=True):
            other = "F(2, 3)" in lab.stages[stage].variant(problem)
            same = results[STAGES.index(stage)] if other else results[0]
            assert torch.equal(result, same), f"{stage}: {problem}"


@pytest.mark.gpu
def test_the_simulator_computes_the_bits_of_the_gpu():
    for number, problem in enumerate(problem_set(300)[::7]):
        x, weight, bias = inputs(problem, seed=number)
        for stage in STAGES:
            simulated = run(stage, x, weight, bias, "cpu", **problem.arguments)
            real = run(stage, x, weight, bias, "cuda", **problem.arguments)
            assert torch.equal(simulated, real), f"{stage}: {problem}"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": (3, 7)},
        {"kernel_size": (3, 7), "padding": (1, 2)},
        {"kernel_size": (3, 7), "in_channels": 32, "out_channels": 36, "height": 10},
        {"kernel_size": (3, 4), "stride": 2, "padding": 1, "dilation": (1, 3)},
    ],
)
class TestNonFiniteValues:
    """They reach the outputs whose sum holds them, and no others."""

    @pytest.fixture
    def problem(self, settings):
        shape = {"batch": 2, "in_channels": 4, "out_channels": 6, "height": 9, "width": 45}
        return lab.Problem(**{**shape, "groups": 2, **settings})

    def check(self, stage, problem, x, weight, device):
        expected = torch.from_numpy(scatter(x, weight, **problem.arguments))
        y = run(stage, x, weight, None, device, **problem.arguments).double()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[expected.isinf()], expected[expected.isinf()])
        assert y.isfinite().equal(expected.isfinite())
        assert not expected.isfinite().all()

    def test_in_the_input(self, stage, problem, value, device):
        x, weight, _ = problem.random_inputs()
        x[1, 2, 3, 4] = value
        x[0, 0, 0, 0] = value
        self.check(stage, problem, x, weight, device)

    def test_in_the_weight(self, stage, problem, value, device):
        """Beyond the image's edge there is no product, not one with zero."""
        x, weight, _ = problem.random_inputs()
        weight[1, 1, 0, -1] = value
        weight[3, 2, 2, 0] = -value
        self.check(stage, problem, x, weight, device)

    @pytest.mark.parametrize("becomes", ["nan", "inf"])
    def test_on_the_way(self, stage, problem, value, device, becomes):
        """Sums of inputs overflow where no output does (and only the largest keep their digits).

        Times a weight of zero the sum would be NaN, times another it would stay infinite.
        """
        if not math.isinf(value):
            return
        x, weight, _ = problem.random_inputs()
        if becomes == "nan":
            x[1, 2, 3], x[1, 2, 5] = 2e38, -2e38
            weight[2] = 0
            weight[2, :, 1, 0] = 0.5
        else:
            x[1, 2, 3, 20], x[1, 2, 5, 20] = 2e38, -2e38
            weight[2] = 0.5
        y = run(stage, x, weight, None, device, **problem.arguments)
        expected = scatter(x, weight, **problem.arguments)
        assert np.abs(expected).max() > 9e37
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("stage", STAGES)
class TestCalls:
    """The forms that PyTorch's function accepts."""

    problem = lab.Problem(
        batch=2, in_channels=4, out_channels=6, height=5, width=9, kernel_size=(3, 7),
        stride=(2, 1), padding=(1, 2), output_padding=(1, 0), groups=2, bias=True,
    )  # fmt: skip

    @pytest.fixture
    def data(self):
        return self.problem.random_inputs(1)

    @pytest.fixture
    def expected(self, data):
        x, weight, bias = data
        return torch.nn.functional.conv_transpose2d(
            x.double(), weight.double(), bias.double(), **self.problem.arguments
        )

    def test_numpy_arrays_give_a_numpy_array(self, stage, data, expected):
        y = lab.stages[stage](*(t.numpy() for t in data), **self.problem.arguments)
        assert isinstance(y, np.ndarray)
        np.testing.assert_allclose(y, expected, atol=1e-5)

    def test_numpy_views_and_read_only_arrays(self, stage, data, expected):
        x, weight, bias = (t.numpy() for t in data)
        flipped = np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
        weight.flags.writeable = False
        y = lab.stages[stage](flipped, weight, bias, **self.problem.arguments)
        np.testing.assert_allclose(y, expected, atol=1e-5)

    def test_a_tensor_that_is_missing(self, stage, data):
        x, weight, _ = data
        with pytest.raises(TypeError, match="x must be a tensor or a NumPy array, not NoneType"):
            lab.stages[stage](None, weight)
        with pytest.raises(TypeError, match="weight must be a tensor or a NumPy array"):
            lab.stages[stage](x, None)

    def test_positional_arguments_in_pytorchs_order(self, stage, data, expected):
        p = self.problem
        y = lab.stages[stage](*data, p.stride, p.padding, p.output_padding, p.groups, p.dilation)
        assert torch.allclose(y.double(), expected, atol=1e-5)

    def test_unbatched(self, stage, data, expected, device):
        x, weight, bias = data
        y = run(stage, x[1], weight, bias, device, **self.problem.arguments)
        assert torch.allclose(y.double(), expected[1], atol=1e-5)

    def test_an_empty_batch(self, stage, data, expected, device):
        x, weight, bias = data
        y = run(stage, x[:0], weight, bias, device, **self.problem.arguments)
        assert y.shape == (0, *expected.shape[1:])

    def test_views(self, stage, data, expected, device):
        """Channels last, transposed, expanded, with an offset into its storage."""
        x, weight, bias = (t.to(device) for t in data)
        last = x.contiguous(memory_format=torch.channels_last)
        transposed = weight.transpose(2, 3).contiguous().transpose(2, 3)
        offset = torch.cat([bias, bias])[6:]
        y = lab.stages[stage](last, transposed, offset, **self.problem.arguments)
        assert torch.allclose(y.cpu().double(), expected, atol=1e-5)
        same = x[:1].expand(2, -1, -1, -1)
        y = lab.stages[stage](same, weight, bias, **self.problem.arguments)
        assert torch.allclose(y.cpu().double(), expected[:1].expand(2, -1, -1, -1), atol=1e-5)

    def test_a_one_tuple_and_an_int_mean_both_axes(self, stage, data):
        x, weight, _ = data
        assert torch.equal(
            lab.stages[stage](x, weight, stride=(2,), padding=1, groups=2),
            lab.stages[stage](x, weight, stride=2, padding=[1, 1], groups=2),
        )

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(2, 4, 5, 9, dtype=torch.float64)}, TypeError, "x has dtype"),
            ({"x": np.zeros((2, 4, 5, 9))}, TypeError, "x has dtype float64"),
            ({"weight": torch.zeros(4, 3, 3, 7).half()}, TypeError, "weight has dtype"),
            ({"bias": [0.0] * 6}, TypeError, "bias must be a tensor or a NumPy array, not list"),
            ({"weight": torch.zeros(4, 3, 3, 7, device="meta")}, ValueError, "weight is on meta"),
            ({"x": torch.zeros(5, 9)}, ValueError, "input"),
            ({"x": torch.zeros(2, 5, 5, 9)}, ValueError, "input"),
            ({"weight": torch.zeros(4, 3, 3)}, ValueError, "weight"),
            ({"bias": torch.zeros(5)}, ValueError, "bias"),
            ({"stride": 0}, ValueError, "stride"),
            ({"stride": 1.0}, TypeError, "stride"),
            ({"output_padding": 2}, ValueError, "output_padding"),
            ({"padding": 40}, RuntimeError, "padding"),
            ({"groups": 3}, RuntimeError, "groups"),
        ],
    )
    def test_refusals(self, stage, data, change, error, message):
        x, weight, bias = data
        call = {"x": x, "weight": weight, "bias": bias, **self.problem.arguments, **change}
        with pytest.raises(error, match=message):
            lab.stages[stage](**call)

    def test_inputs_that_require_gradients_are_only_read(self, stage, data):
        x, weight, bias = (t.requires_grad_() for t in data)
        assert not lab.stages[stage](x, weight, bias, **self.problem.arguments).requires_grad


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "problem",
    [
        lab.Problem(1, 2, 2, 3, 4, kernel_size=(2, 700)),
        lab.Problem(1, 2, 1, 2, 3, kernel_size=(150, 2), stride=2),
        lab.Problem(1, 1, 1, 4, 5, kernel_size=(3, 4), dilation=300),
        lab.Problem(1, 3, 2, 70, 3, kernel_size=(5, 90), dilation=(7, 3)),
        lab.Problem(1, 1, 1, 3, 2, kernel_size=2, stride=(100, 300)),
        lab.Problem(1, 1, 1, 1, 1, kernel_size=3, stride=(2**29, 2**30 - 1), dilation=5),
        lab.Problem(1, 2, 3, 1, 1, kernel_size=(1, 3), stride=2**31 - 2**17, padding=(0, 1)),
    ],
    ids=lambda p: f"{p.kernel_size}, stride {p.stride}, dilation {p.dilation}",
)
def test_kernels_too_large_for_shared_memory(stage, problem, device):
    x, weight, bias = problem.random_inputs()
    y = run(stage, x, weight, bias, device, **problem.arguments)
    assert condition_error(y, x, weight, bias, **problem.arguments) <= FLOAT32_GATE


def test_wrong_weight_order_would_be_seen():
    """The random problems hold what tells the orders apart: two or more channels in a group."""
    found = 0
    for problem in problem_set(300):
        x, weight, bias = inputs(problem)
        c_in, c_out, kh, kw = weight.shape
        swapped = weight.reshape(c_out, c_in, kh, kw).transpose(0, 1)
        y = gather(x, swapped.contiguous(), bias, **problem.arguments).astype(np.float32)
        found += not condition_error(y, x, weight, bias, **problem.arguments) <= FLOAT32_GATE
    assert found > 100


class TestTheLadder:
    def test_order_and_neighbours(self):
        ladder = list(lab.stages)
        assert ladder[:4] == ["naive_gather", "coalesced", "shared_tiled", "register_blocked"]
        assert ladder[4:] == ["winograd", "tensor_core", "tensor_core_split", "hopper"]
        assert ladder[:5] == STAGES
        assert lab.stages[ladder[0]].previous is None
        for before, after in itertools.pairwise(ladder):
            assert lab.stages[after].previous is lab.stages[before]

    @pytest.mark.parametrize("stage", lab.stages)
    def test_source_and_chapter(self, stage):
        source = lab.stages[stage].source
        assert source == (KERNEL_FOLDER / f"{stage}.cu").read_text()
        assert re.search(rf'(extern "C" cudaError_t {stage}\(|LAUNCHER\({stage}, )', source)
        assert (KERNEL_FOLDER.parents[1] / f"{lab.stages[stage].chapter}.ipynb").is_file()
        assert "simulator" not in source.lower()
        assert "torch/" not in source

    def test_every_kernel_file_is_a_kernel(self):
        files = {path.stem for path in KERNEL_FOLDER.glob("*.cu")}
        assert files == set(kernels) | {"fma_rate"}  # a benchmark's

    def test_the_mapping_is_read_only(self):
        with pytest.raises(TypeError):
            lab.stages["mine"] = lab.stages["coalesced"]

    def test_which_variant_runs(self):
        stage = lab.stages["register_blocked"]
        assert stage.variant(lab.Problem.named("star")) == "3x7"
        for change in ({"stride": 2}, {"dilation": (1, 2)}, {"kernel_size": (7, 3)}):
            settings = {"height": 9, "width": 9, "kernel_size": (3, 7), **change}
            assert stage.variant(lab.Problem(**settings)) == "general"
        assert stage.variant(lab.Problem(1, 4, 4, 4, 100_000, kernel_size=(3, 7))) == "general"
        assert lab.stages["coalesced"].variant(lab.Problem.named("star")) == "general"

    def test_winograd_leaves_to_the_stage_before_what_it_does_not_cover(self):
        stage = lab.stages["winograd"]
        assert stage.variant(lab.Problem.named("star")) == "F(2, 3)"
        few = {"groups": 8, "out_channels": 160}
        narrow = {"out_channels": 16}
        for change, variant in (
            *((few, "3x7"), (narrow, "3x7"), ({"height": 9}, "3x7")),
            ({"stride": 2}, "general"),
        ):
            settings = {
                "in_channels": 32,
                "out_channels": 20,
                "height": 8,
                "width": 9,
                "kernel_size": (3, 7),
                **change,
            }
            problem = lab.Problem(**settings)
            assert stage.variant(problem) == variant
            x, weight, bias = problem.random_inputs()
            assert torch.equal(
                stage(x, weight, bias, **problem.arguments),
                stage.previous(x, weight, bias, **problem.arguments),
            )

    def test_the_problem_struct_mirrors_the_header(self):
        header = (KERNEL_FOLDER / "problem.cuh").read_text()
        body = re.search(r"struct ConvTransposeProblem \{(.*?)\n\};", header, re.DOTALL)[1]
        declared = re.findall(r"^\s*int ([\w, ]+);", body, re.MULTILINE)
        fields = [field.strip() for line in declared for field in line.split(",")]
        assert fields == [name for name, _ in _ConvTransposeProblem._fields_]


class TestHandingDown:
    """What a stage's kernel is not for is computed by a stage before it."""

    #: Handed down by rungs on tensor cores: strides too far apart, few channels, a wide reach.
    PROBLEMS = (
        lab.Problem(1, 3, 5, 4, 5, kernel_size=3, stride=(17, 2), bias=True),
        lab.Problem(2, 4, 6, 7, 9, kernel_size=(3, 7), groups=2, padding=1),
        lab.Problem(1, 2, 3, 30, 6, kernel_size=(24, 20), padding=(3, 0)),
        lab.Problem(1, 16, 24, 6, 6, kernel_size=2, stride=2, output_padding=1),
    )

    @pytest.mark.parametrize("stage", lab.stages)
    @pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
    def test_every_stage_takes_every_problem(self, stage, problem, device):
        x, weight, bias = inputs(problem)
        y = run(stage, x, weight, bias, device, **problem.arguments)
        gate = FLOAT32_GATE
        if lab.stages[stage].precision == "tf32":
            terms = -(-problem.in_channels // 8) * 8 * math.prod(problem.kernel_size)
            gate = tf32_gate(terms)
        assert condition_error(y, x, weight, bias, **problem.arguments) <= gate

    def test_to_whom(self):
        wide, few, _, easy = self.PROBLEMS
        hopper, split = lab.stages["hopper"], lab.stages["tensor_core_split"]
        assert hopper.kernel_for(easy) is hopper
        assert hopper.kernel_for(few) is split
        # tensor_core lies between, but would round to TF32.
        assert hopper.kernel_for(wide) is split.kernel_for(wide) is lab.stages["winograd"]
        assert lab.stages["tensor_core"].kernel_for(wide) is lab.stages["tensor_core"]
        # Other types have nothing to round.
        assert split.kernel_for(wide, torch.float16) is lab.stages["tensor_core"]
        assert hopper.kernel_for(easy, torch.float16) is split
        with pytest.raises(ValueError, match=r"hopper: no stage computes .* in torch\.float64"):
            hopper.kernel_for(easy, torch.float64)

    @pytest.mark.parametrize(
        ("capability", "expected"),
        [
            ((7, 5), "winograd"),
            ((8, 6), "tensor_core_split"),
            ((9, 0), "hopper"),
            ((10, 0), "tensor_core_split"),
        ],
    )
    def test_a_gpu_without_the_instructions(self, capability, expected, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6;9.0a;10.0")
        problem = self.PROBLEMS[3]
        assert lab.stages["hopper"].kernel_for(problem, capability=capability).name == expected

    def test_channels_last(self, device):
        """Also where the stage that computes takes contiguous tensors alone."""
        for problem in (self.PROBLEMS[0], self.PROBLEMS[3]):
            x, weight, bias = inputs(problem)
            last = x.to(device).contiguous(memory_format=torch.channels_last)
            y = lab.stages["hopper"](
                last,
                weight.to(device),
                None if bias is None else bias.to(device),
                **problem.arguments,
            )
            assert condition_error(y.cpu(), x, weight, bias, **problem.arguments) <= FLOAT32_GATE
            taken = lab.stages["hopper"].kernel_for(problem).takes_channels_last
            assert taken == y.is_contiguous(memory_format=torch.channels_last)

    def test_what_runs_is_what_is_planned_and_counted(self):
        problem = self.PROBLEMS[0]
        hopper, winograd = lab.stages["hopper"], lab.stages["winograd"]
        x, weight, bias = inputs(problem)
        assert hopper.launches(problem) == winograd.launches(problem)
        assert hopper.variant(problem) == winograd.variant(problem)
        assert hopper.packed_bytes(problem) == 0
        report = hopper.profile(x, weight, bias, **problem.arguments)
        assert report.to_dict() == winograd.profile(x, weight, bias, **problem.arguments).to_dict()

    def test_a_stage_that_is_no_rung_is_itself(self):
        """One with a changed text keeps the name of the stage that it is made from."""
        changed = dataclasses.replace(lab.stages["coalesced"], summary="mine")
        assert changed.kernel_for(self.PROBLEMS[0]) is changed
