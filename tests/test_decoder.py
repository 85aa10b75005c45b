"""The network of the book's last chapter: the model, its profile, its record, and what measures."""

import copy
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decoder_record_for_tests import (
    LAYERS,
    SHARES,
    UPS,
    made_after,
    made_errors,
    made_mode,
    made_profile,
    made_record,
    made_time,
)
from paths import PATHS, counting_runs, on_path, without_tf32
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import convt_lab as lab
from convt_lab import Problem, decoder, decoder_record, decoder_report, dispatch, figures, records
from convt_lab import reference as exact_reference
from convt_lab.decoder import SegmentationNet, outcome, scenes
from convt_lab.decoder_record import MODES, NETWORK, PASSES, amdahl
from convt_lab.layer_profile import REST, by_layer, flops_by_layer, labelled
from convt_lab.measure import WARM_UPS, Repeats
from convt_lab.records import RecordError

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.append(str(TOOLS))

import decoder_profile  # noqa: E402


def network(classes=4, width=3):
    torch.manual_seed(0)
    return SegmentationNet(classes, width)


# ---- The model -----------------------------------------------------------------------------------


class TestTheNetwork:
    @pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 3, 48, 32)])
    def test_scores_every_pixel(self, shape):
        batch, _, height, width = shape
        assert network()(torch.zeros(shape)).shape == (batch, 4, height, width)

    def test_its_layers_are_of_four_kinds(self):
        model = network()
        assert [name for name, _ in model.named_children()] == LAYERS
        layers = decoder.transposed_layers(model)
        assert list(layers) == UPS
        kinds = {(layer.kernel_size, layer.stride, layer.groups) for layer in layers.values()}
        assert kinds == {
            ((2, 2), (2, 2), 1),
            ((4, 4), (2, 2), 1),
            ((3, 7), (1, 1), 1),
            ((4, 4), (2, 2), 4),
        }

    @pytest.mark.parametrize("wrong", [dict(classes=0), dict(width=2.0), dict(width=True)])
    def test_sizes_that_are_none(self, wrong):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=rf"{name}={value!r} must be an integer of at least 1"):
            SegmentationNet(**wrong)

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ((3, 16, 16), r"shape \[3, 16, 16\]: it must be \[N, 3, H, W\]"),
            ((1, 4, 16, 16), r"it must be \[N, 3, H, W\]"),
            ((1, 3, 24, 16), "height 24: it must be a multiple of 16"),
            ((1, 3, 16, 17), "width 17: it must be a multiple of 16"),
        ],
    )
    def test_images_of_another_shape(self, shape, words):
        with pytest.raises(ValueError, match=words):
            network()(torch.zeros(shape))

    def test_the_last_layers_interpolate(self):
        x = torch.rand(1, 4, 5, 6)
        wanted = F.interpolate(x, scale_factor=2, mode="bilinear")
        inside = slice(1, -1)
        close = torch.isclose(network().up4(x), wanted, atol=1e-6)
        assert close[..., inside, inside].all()
        assert not close[..., 0, :].any()

    def test_scenes_are_the_same_every_time(self):
        images, labels = scenes(2, 16, 32, classes=4, seed=1)
        assert images.shape == (2, 3, 16, 32)
        assert images.dtype == torch.float32
        assert labels.shape == (2, 16, 32)
        assert 0 <= labels.min() < labels.max() < 4
        again, other = scenes(2, 16, 32, classes=4, seed=1), scenes(2, 16, 32, classes=4, seed=2)
        assert torch.equal(images, again[0])
        assert torch.equal(labels, again[1])
        assert not torch.equal(images, other[0])


class TestTheSwap:
    @pytest.mark.parametrize("path", PATHS)
    def test_scores_and_every_gradient_are_right_before_and_after(self, path):
        before = network()
        images, labels = scenes(2, 32, 48, classes=4)
        exact = outcome(copy.deepcopy(before).double(), images.double(), labels)
        after = lab.replace_conv_transpose(copy.deepcopy(before))
        with on_path(path) as device, without_tf32(device), counting_runs() as runs:
            for model in (before, after):
                found = outcome(model.to(device), images.to(device), labels.to(device))
                assert set(found) == {"scores", "loss", "images", *dict(model.named_parameters())}
                for name, value in exact.items():
                    error = exact_reference.relative_l2(found[name], value)
                    assert error <= 1e-4, f"{name} on {path}: {error}"
                assert all(parameter.grad is None for parameter in model.parameters())
        if path in ("simulator", "cuda_ours"):
            assert len(runs) == len(UPS)

    def test_it_learns_the_same(self):
        curves = []
        with on_path("simulator"), counting_runs() as runs:
            for swap in (lambda model: model, lab.replace_conv_transpose):
                model = swap(network())
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
                losses = []
                for seed in range(12):
                    images, labels = scenes(1, 32, 32, classes=4, seed=seed)
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(images), labels)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
                curves.append(losses)
        assert len(runs) == 12 * len(UPS)
        assert curves[1] == pytest.approx(curves[0], rel=0.02)
        assert max(curves[1][-3:]) < curves[1][0]

    def test_each_layer_is_explained(self):
        images, _ = scenes(2, 16, 16, classes=4)
        model = network()
        assert {c.kernel for c in decoder.explained(model, images).values()} == {"pytorch"}
        assert list(decoder.explained(model, images)) == UPS
        assert not any(layer._forward_pre_hooks for layer in model.modules())

    def test_hooks_go_even_if_the_model_raises(self):
        model = network()
        with pytest.raises(ValueError, match="multiple"):
            decoder.explained(model, torch.zeros(1, 3, 15, 16))
        assert not any(layer._forward_pre_hooks for layer in model.modules())

    def test_problems_and_inputs(self):
        images, _ = scenes(2, 16, 32, classes=4)
        model = network()
        problems, inputs = decoder.problems_of(model, images), decoder.inputs_of(model, images)
        assert list(problems) == list(inputs) == UPS
        assert problems["wide"] == Problem(
            2, 6, 6, 4, 8, kernel_size=(3, 7), padding=(1, 3), bias=True
        )
        assert problems["up4"].groups == 4
        for name, problem in problems.items():
            assert inputs[name].shape == problem.input_shape
            layer = model.get_submodule(name)
            y = F.conv_transpose2d(inputs[name], layer.weight, layer.bias, **problem.arguments)
            assert torch.equal(y, layer(inputs[name]))


# ---- The profile ---------------------------------------------------------------------------------


def event(name, start, children=(), number=-1, scope=0, us=0.0, kernels=(), **changes):
    """Stand in for a profiler's event."""
    made = SimpleNamespace(
        name=name,
        device_type=DeviceType.CPU,
        is_async=False,
        time_range=SimpleNamespace(start=start),
        cpu_children=list(children),
        cpu_parent=None,
        sequence_nr=number,
        scope=scope,
        cpu_time_total=us,
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
    )
    vars(made).update(changes)
    for child in children:
        child.cpu_parent = made
    return made


def flat(*events):
    """Return a profiler that saw events, and those that they called."""
    found = []
    for one in events:
        found += [one, *flat(*one.cpu_children).events()]
    return SimpleNamespace(events=lambda: found)


class TestByLayer:
    @pytest.mark.parametrize("path", ["cpu", "simulator"])
    def test_of_a_network(self, path):
        model = lab.replace_conv_transpose(network())
        images, labels = scenes(2, 16, 16, classes=4)
        with on_path(path):
            model(images)
            activities = [ProfilerActivity.CPU]
            with labelled(model), profile(activities=activities, acc_events=True) as profiler:
                for _ in range(2):
                    F.cross_entropy(model(images), labels).backward()
        seen = by_layer(profiler)
        assert list(seen) == [*LAYERS, REST]
        ours = path == "simulator"
        operator = f"{'convt_lab' if ours else 'aten'}::conv_transpose2d"
        node = "TransformableFunctionBackward" if ours else "ConvolutionBackward0"
        for name in LAYERS:
            assert seen[name].calls == 2
            assert seen[name].forward > 0
            assert seen[name].backward > 0
        for name in UPS:
            assert seen[name].operators == 2 * [operator]
            assert seen[name].nodes == 2 * [node]
        assert len(seen["fuse1"].nodes) == 2 * 3
        assert seen[REST].forward > 0
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def test_of_kernels(self):
        forward = event(
            "layer up",
            0,
            [event("aten::conv_transpose2d", 1, number=7, kernels=[("gemm", 30.0), ("add", 5.0)])],
            us=999.0,
            # The label itself, as it lies on the GPU's timeline.
            kernels=[("layer up", 400.0)],
        )
        backward = event("ConvolutionBackward0", 21, number=7, scope=1, kernels=[("dgrad", 60.0)])
        outer = event("autograd::engine::evaluate_function", 20, [backward])
        loss = event("aten::nll_loss2d", 10, kernels=[("nll", 2.0)])
        on_gpu = event("layer up", 3, device_type=DeviceType.CUDA, us=35.0)
        seen = by_layer(flat(forward, loss, outer, on_gpu), "cuda")
        assert list(seen) == ["up", REST]
        assert (seen["up"].calls, seen["up"].nodes) == (1, ["ConvolutionBackward0"])
        assert seen["up"].forward == pytest.approx(35e-6)
        assert seen["up"].backward == pytest.approx(60e-6)
        assert seen[REST].forward == pytest.approx(2e-6)
        assert by_layer(flat(forward, loss, outer, on_gpu))["up"].forward == pytest.approx(999e-6)

    def test_a_number_is_of_the_layer_that_looked_at_it_last(self):
        looked = event("aten::size", 1, number=3)
        first = event("layer a", 0, [event("aten::relu", 0.5, number=2), looked])
        second = event("layer b", 2, [event("aten::conv2d", 3, number=3)])
        nodes = [event(f"N{n}", 10 - n, number=n, scope=1, us=n) for n in (2, 3, 4)]
        seen = by_layer(flat(second, *nodes, first))
        assert seen["a"].nodes == ["N2"]
        assert seen["b"].nodes == ["N3"]
        assert seen[REST].forward == pytest.approx(4e-6)

    def test_without_labels_everything_is_the_rest(self):
        seen = by_layer(flat(event("aten::add", 0, us=5.0)))
        assert list(seen) == [REST]
        assert seen[REST].forward == pytest.approx(5e-6)

    def test_labels_go_even_if_the_model_raises(self):
        model = network()
        with pytest.raises(ValueError, match="multiple"), labelled(model):
            model(torch.zeros(1, 3, 15, 16))
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def test_flops_are_those_of_the_problems(self):
        images, _ = scenes(2, 16, 32, classes=4)
        model = network()
        for swapped in (model, lab.replace_conv_transpose(copy.deepcopy(model))):
            flops = flops_by_layer(swapped, images)
            assert list(flops) == LAYERS
            for name, problem in decoder.problems_of(model, images).items():
                assert flops[name] == problem.flops
            with FlopCounterMode(display=False) as counter:
                swapped(images)
            assert sum(flops.values()) == counter.get_total_flops()


# ---- The record ----------------------------------------------------------------------------------

RECORD = decoder_record.from_json(decoder_record.to_json(made_record()))  # rounded
JSON = decoder_record.to_json(RECORD)


def at(value, place):
    for step in place:
        value = value[step]
    return value


MODE = ("modes", 0)
AFTER = (*MODE, "after", 1)
WRONG = [
    (("schema",), 2, "schema = 2: must be 1"),
    (("network", "input_shape"), [1, 4, 16, 16], r"must be a list \[N, 3, H, W\]"),
    (("network", "classes"), 0, "classes = 0: must be an integer of at least 1"),
    (("network", "colour"), 1, "colour is no field"),
    (("modes", 1, "name"), "float32", r"another than those before it"),
    ((*MODE, "dtype"), "float64", "must be one of"),
    (("modes", 2, "allow_tf32"), False, "must be true, as dtype is bfloat16"),
    ((*MODE, "layers", 1), "stem", "another than those before it"),
    ((*MODE, "alone", "relu"), JSON["modes"][0]["alone"]["up1"], r"alone\.relu is unknown"),
    ((*MODE, "alone", "up1", "seconds"), {"ours": 1.0}, "must be an object with pytorch"),
    ((*MODE, "alone", "up1", "seconds", "pytorch"), -1.0, "must be a finite number above 0"),
    ((*MODE, "alone", "up1", "problem", "groups"), 3, "groups"),
    ((*MODE, "before", "errors", "gradients"), {}, "at least one gradient"),
    ((*MODE, "before", "errors", "scores"), "nan", 'must be a finite number of at least 0, or "i'),
    ((*MODE, "before", "profile", "forward", "stem"), -1e-3, "at least 0"),
    ((*MODE, "before", "profile", "forward", "relu"), 1e-3, r"forward\.relu is unknown"),
    (
        (*MODE, "before", "profile", "backward"),
        dict.fromkeys([*LAYERS, REST], 0.0),
        "a profile whose backward takes some time",
    ),
    ((*MODE, "after"), [], "a list of at least one network"),
    ((*MODE, "after", 0, "chosen_by"), "measurements", "another than those before it"),
    ((*AFTER, "chosen_by"), "chance", 'must be one of "tables", "measurements"'),
    ((*AFTER, "choices", "up4", "kernel"), "winograd", 'must be one of "pytorch", "one_channel"'),
    ((*AFTER, "choices", "up4", "reason"), "", "a text that is not empty"),
    ((*AFTER, "times", "training", "after", "cold", "seconds"), 0, "above 0"),
    ((*AFTER, "times", "training", "after", "cold", "runs"), 0, "at least 1"),
    ((*AFTER, "times", "sleeping"), {}, "sleeping is no field"),
]


class TestTheRecord:
    def test_what_is_saved_is_loaded(self, tmp_path):
        path = tmp_path / "records" / "nvidia-test-decoder.json"
        decoder_record.save(RECORD, path)
        assert decoder_record.load(path) == RECORD
        assert decoder_record.find("nvidia-test-decoder", path.parent) == RECORD
        assert decoder_record.find("nvidia-other-decoder", path.parent) is None
        assert records.names(path.parent) == ()  # it is none of the ladder's

    @pytest.mark.parametrize(("place", "value", "words"), WRONG)
    def test_what_is_wrong_is_named(self, place, value, words):
        changed = copy.deepcopy(JSON)
        at(changed, place[:-1])[place[-1]] = value
        with pytest.raises(RecordError, match=words):
            decoder_record.from_json(changed)

    @pytest.mark.parametrize(
        "place",
        [
            *[(field,) for field in JSON],
            *[(*MODE, field) for field in JSON["modes"][0]],
            *[(*AFTER, field) for field in at(JSON, AFTER)],
            (*MODE, "before", "profile", "inference", REST),
            (*AFTER, "choices", "up1"),
            (*AFTER, "times", "inference", "before"),
        ],
    )
    def test_what_is_missing_is_named(self, place):
        changed = copy.deepcopy(JSON)
        del at(changed, place[:-1])[place[-1]]
        with pytest.raises(RecordError, match=place[-1]):
            decoder_record.from_json(changed)

    def test_a_wrong_one_is_not_written(self, tmp_path):
        wrong = replace(RECORD, modes=(made_mode(), made_mode()))
        with pytest.raises(RecordError, match="another than those before it"):
            decoder_record.save(wrong, tmp_path / "a.json")
        assert not list(tmp_path.iterdir())

    def test_no_json(self, tmp_path):
        (tmp_path / "x-decoder.json").write_text("{")
        with pytest.raises(RecordError, match="is no JSON"):
            decoder_record.find("x-decoder", tmp_path)

    def test_names(self):
        assert RECORD.mode("TF32").chosen_by("tables").chosen_by == "tables"
        with pytest.raises(KeyError, match="no mode 'float64'; there are: 'float32'"):
            RECORD.mode("float64")
        with pytest.raises(KeyError, match="nothing was chosen by 'chance'"):
            RECORD.modes[0].chosen_by("chance")
        with pytest.raises(ValueError, match="a_pass='sleep' must be one of inference, training"):
            made_profile().of("sleep")

    def test_an_infinite_error_is_kept(self, tmp_path):
        run = replace(RECORD.modes[0].before, errors=made_errors(math.inf))
        mode = replace(made_mode(), before=run)
        decoder_record.save(made_record(mode), tmp_path / "a.json")
        assert decoder_record.load(tmp_path / "a.json").modes[0].before.errors.scores == math.inf

    @pytest.mark.parametrize("path", sorted(records.FOLDER.glob("*-decoder.json")), ids=str)
    def test_those_of_the_repository(self, path):
        record = decoder_record.load(path)
        assert path.stem == f"{records.slug(record.gpu.name)}-decoder"
        assert record.network == NETWORK
        assert [mode.name for mode in record.modes] == list(MODES)
        assert decoder_report.suspicious(record) == []


class TestAmdahl:
    @pytest.mark.parametrize(
        ("parts", "expected"),
        [
            ([], 1.0),
            ([(0.5, 2.0)], 4 / 3),
            ([(0.5, math.inf)], 2.0),
            ([(0.25, 2.0), (0.25, 4.0)], 1 / (1 - 0.125 - 0.1875)),
            ([(1.0, 3.0)], 3.0),
            ([(0.5, 0.5)], 2 / 3),
            ([(1.0, math.inf)], math.inf),
        ],
    )
    def test_values(self, parts, expected):
        assert amdahl(parts) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("parts", "words"),
        [
            ([(-0.1, 2)], r"share=-0\.1 must be at least 0"),
            ([(math.nan, 2)], "share=nan must be at least 0"),
            ([(0.5, 0)], "speedup=0 must be above 0"),
            ([(0.6, 2), (0.6, 2)], r"the shares are 1\.2 together: at most 1"),
        ],
    )
    def test_what_is_no_part(self, parts, words):
        with pytest.raises(ValueError, match=words):
            amdahl(parts)

    def test_of_a_record(self):
        mode = RECORD.mode("float32")
        total, saved = sum(SHARES.values()), 0.75 * SHARES["up4"]
        after = mode.chosen_by("measurements")
        assert mode.predicted(after, "inference") == pytest.approx(total / (total - saved))
        whole = 3 * total - 2 * SHARES[REST]
        assert mode.predicted(after, "training") == pytest.approx(whole / (whole - saved))
        assert mode.predicted(mode.chosen_by("tables"), "training") == 1
        ups = sum(SHARES[name] for name in UPS)
        assert mode.limit("inference") == pytest.approx(total / (total - ups))

    @pytest.mark.parametrize("a_pass", PASSES)
    def test_what_is_saved_adds_up(self, a_pass):
        mode = RECORD.mode("float32")
        saved = mode.saved(mode.chosen_by("measurements"), a_pass)
        parts = [saved[name] for name in ("forward", "backward", "elsewhere", "idle")]
        assert sum(parts) == pytest.approx(saved["all"])
        assert saved["forward"] == pytest.approx(0.8 * SHARES["up4"])
        assert saved["predicted"] == pytest.approx(0.75 * SHARES["up4"])
        assert parts[1:] == pytest.approx([0, 0, 0], abs=1e-12)


# ---- What is said of it --------------------------------------------------------------------------

TABLES = [
    *(decoder_report.about, decoder_report.layers, decoder_report.verdict, decoder_report.limits),
    *(decoder_report.choices, decoder_report.reasons, decoder_report.gains, decoder_report.gap),
    *(decoder_report.errors, decoder_report.left_over),
]


class TestTheReport:
    @pytest.mark.parametrize("table", TABLES)
    def test_without_a_record(self, table):
        assert table(None) == decoder_report.NOT_MEASURED
        assert "tools/decoder_profile.py" in decoder_report.NOT_MEASURED

    @pytest.mark.parametrize("table", TABLES)
    def test_fits_on_a_page_and_names_all_modes(self, table):
        text = table(RECORD)
        if not text.startswith("- "):  # which is Markdown, and wrapped by the page
            assert max(map(len, text.splitlines())) <= 80
        if table not in (decoder_report.layers, decoder_report.reasons):
            assert all(f"{name}" in text for name in MODES)

    def test_the_bottleneck(self):
        first = " ".join(decoder_report.verdict(made_record(made_mode())).split())
        assert "the slowest layer is `wide` with 21.1% of the time" in first
        flops = decoder_report.flops_of(NETWORK)
        assert f"{100 * flops['wide'] / sum(flops.values()):.1f}% of the forward" in first
        assert "then come `up4` (15.8%) and" in first
        lines = [line.split() for line in decoder_report.layers(RECORD).splitlines()]
        assert ["wide", "*", "25.9%", "4.000", "21.1%", "4.000", "8.000", "22.6%"] in lines

    def test_gains(self):
        record = made_record(made_mode())
        lines = [line.split() for line in decoder_report.gains(record).splitlines()]
        assert lines[1:3] == [
            ["inference", "tables", "1.00", "1.00", "19.000", "19.000"],
            ["inference", "measurements", "1.13", "1.14", "19.000", "16.600"],
        ]
        assert "measured" not in decoder_report.gains(record, measured=False).splitlines()[0]

    def test_python_that_is_waited_for_is_marked(self):
        mode = made_mode()
        after = mode.after[1]
        slow = decoder_record.Pair(made_time(0.019), made_time(0.0166, enqueue=0.015))
        after = replace(after, times={**after.times, "inference": slow})
        text = decoder_report.gains(made_record(replace(mode, after=(mode.after[0], after))))
        assert "! 1.14" in text
        assert "the GPU waited for Python" in text
        assert "!" not in decoder_report.gains(RECORD)

    @pytest.mark.parametrize(
        ("kernels", "words"),
        [
            (["pytorch"] * 5, "Every layer is left to PyTorch: no kernel here is faster."),
            (["one_channel"] * 5, "No layer is left to PyTorch"),
            (["pytorch"] + ["one_channel"] * 4, "`up1` is left to PyTorch"),
            (["pytorch"] * 3 + ["one_channel"] * 2, "`up1`, `up2` and `wide` are left to PyTorch"),
        ],
    )
    def test_what_is_left(self, kernels, words):
        choices = {
            name: decoder_record.Chosen(k, "so") for name, k in zip(UPS, kernels, strict=True)
        }
        mode = replace(made_mode(), after=(replace(made_after(), choices=choices),))
        assert words in decoder_report.left_over(made_record(mode))

    def test_a_form_that_no_kernel_takes(self):
        mode = made_mode()
        alone = {name: replace(one, seconds={"pytorch": 0.004}) for name, one in mode.alone.items()}
        mode = replace(mode, alone=alone, after=(made_after("measurements", "pytorch", 1.0),))
        assert "no kernel here takes it in this form" in decoder_report.left_over(made_record(mode))

    def test_errors_that_grow_are_suspicious(self):
        assert decoder_report.suspicious(RECORD) == []
        for scores in (5e-7, math.inf, math.nan):
            worse = replace(made_after(), errors=made_errors(scores))
            (found,) = decoder_report.suspicious(made_record(replace(made_mode(), after=(worse,))))
            assert found.startswith("float32, by measurements: the error of scores is")

    def test_everything(self):
        text = decoder_report.everything(RECORD)
        assert text.isascii()
        words = " ".join(text.split())
        assert all(" ".join(table(RECORD).split()) in words for table in TABLES)


class TestThePicture:
    def test_bars_are_as_long_as_the_times(self):
        picture = figures.layer_times(RECORD, "float32", after="measurements")
        still, training = picture.figure.axes
        count = len(LAYERS) + 1
        assert len(still.patches) == 2 * count
        assert len(training.patches) == 4 * count
        up4 = LAYERS.index("up4")
        assert still.patches[up4].get_width() == pytest.approx(3.0)
        assert still.patches[count + up4].get_width() == pytest.approx(0.6)
        backward = training.patches[count + up4]
        assert (backward.get_x(), backward.get_width()) == pytest.approx((3.0, 6.0))
        assert [label.get_text() for label in still.get_yticklabels()][up4] == "up4 *"
        lines = [line.split() for line in picture.table().splitlines()]
        assert lines[0] == ["ms", "before", "after"]
        assert ["up4", "*", "3.000", "3.000", "6.000", "0.600", "0.600", "6.000"] in lines

    def test_before_alone(self):
        picture = figures.layer_times(RECORD, "float32")
        assert len(picture.figure.axes[0].patches) == len(LAYERS) + 1
        assert "after" not in picture.table()

    def test_without_a_record(self):
        picture = figures.layer_times(None)
        assert picture.table() == "not measured yet"
        assert picture._repr_png_()[0].startswith(b"\x89PNG")

    def test_a_method_is_shown_like_a_function(self):
        shown = figures.listing(SegmentationNet.forward)
        assert shown.title == "decoder.py: SegmentationNet.forward"
        assert shown.text.startswith("def forward(self, images: Tensor) -> Tensor:\n    _check(")
        compile(shown.text, "forward", "exec")


# ---- What measures -------------------------------------------------------------------------------


class StandIn:
    """A clock that runs what it is given and says that it took a second; keeps the order."""

    def __init__(self):
        self.functions = []

    def time(self, function):
        function()
        self.functions.append(function)
        return 1.0

    def repeat(self, function, runs):
        for _ in range(runs):
            function()
        return Repeats(1.0 * runs, 0.25)


class Ours:
    """A kernel that is PyTorch's."""

    def __call__(self, *tensors, **arguments):
        return F.conv_transpose2d(*tensors, **arguments)


TINY = replace(decoder_profile.TRIAL, input_shape=(2, 3, 16, 16))


def measured(name="float32", clock=None, change=lambda model: model, candidates=None):
    size = TINY
    torch.manual_seed(0)
    model = SegmentationNet(size.classes, size.width)
    images, labels = scenes(2, 16, 16, size.classes)
    exact = outcome(copy.deepcopy(model).double(), images.double(), labels)
    with pytest.MonkeyPatch.context() as patch:
        swap = decoder_profile.replace_conv_transpose
        patch.setattr(decoder_profile, "replace_conv_transpose", lambda m: change(swap(m)))
        return decoder_profile.measure_mode(
            model,
            images,
            labels,
            exact,
            decoder_profile.Setting(name, "cpu", clock or StandIn(), profiles=1, runs=2),
            RECORD.gpu,
            RECORD.software,
            candidates or (lambda *form, tf32: {"ours": Ours()}),
        )


class TestMeasuring:
    def test_a_mode(self):
        clock = StandIn()
        mode = measured(clock=clock)
        record = made_record(mode)
        assert decoder_record.from_json(decoder_record.to_json(record)).modes[0].name == "float32"
        assert mode.layers == tuple(LAYERS)
        assert list(mode.alone) == UPS
        assert set(mode.alone["up1"].seconds) == {"pytorch", "ours"}
        assert [after.chosen_by for after in mode.after] == ["tables", "measurements"]
        for after in mode.after:
            assert {c.kernel for c in after.choices.values()} == {"pytorch"}  # it is a CPU
            assert after.errors == mode.before.errors
            for pair in after.times.values():
                assert pair.before.seconds == pair.after.seconds == 1.0
                assert pair.before.cold.runs == 2
                assert pair.before.enqueue_seconds == 0.25
        assert max(mode.before.errors.gradients.values()) < 1e-4
        assert dispatch._only is None

    def test_before_and_after_are_timed_in_turn(self):
        clock = StandIn()
        measured(clock=clock, candidates=lambda *form, tf32: {})
        alone = len(UPS) * (WARM_UPS + decoder_profile.autotune.RUNS)
        for start in range(alone, len(clock.functions), 2 * (WARM_UPS + 2)):
            one = clock.functions[start : start + 2 * (WARM_UPS + 2)]
            before, after = one[0], one[WARM_UPS]
            assert before is not after
            assert one == [before] * WARM_UPS + [after] * WARM_UPS + [before, after] * 2

    def test_a_wrong_layer_is_seen(self):
        def change(model):
            layer = model.up4
            layer.forward = lambda x: 1.001 * lab.ConvTranspose2d.forward(layer, x)
            return model

        mode = measured(change=change)
        found = decoder_report.suspicious(made_record(mode))
        assert any("scores" in line for line in found)

    def test_a_nan_is_seen(self):
        def change(model):
            model.up4.register_forward_hook(lambda layer, given, y: y * math.nan)
            return model

        mode = measured(change=change)
        assert mode.after[0].errors.scores == math.inf
        assert set(mode.after[0].errors.gradients.values()) == {math.inf}
        assert decoder_report.suspicious(made_record(mode))

    @pytest.mark.parametrize("name", MODES)
    def test_every_pass_computes_as_the_mode_says(self, name):
        dtype, tf32, layout = MODES[name]
        seen = []

        class Probe(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Conv2d(3, 4, 3, padding=1)

            def forward(self, x):
                last = [t.is_contiguous(memory_format=torch.channels_last) for t in (x, w)]
                y = self.layer(x)
                seen.append(("forward", self.training, torch.is_grad_enabled(), y.dtype, *last))
                seen.append(cudnn())
                if y.requires_grad:
                    y.register_hook(lambda g: seen.append(cudnn()))
                    y.register_hook(lambda g: seen.append(torch.is_autocast_enabled("cpu")))
                return y

        def cudnn():
            flags = torch.backends.cudnn
            return flags.allow_tf32, flags.benchmark

        setting = decoder_profile.Setting(name, "cpu", StandIn())
        images, labels = scenes(2, 8, 8, classes=4)
        model = setting.laid(Probe())
        w = model.layer.weight
        passes = decoder_profile.passes_of(model, setting.laid(images), labels, setting)
        assert list(passes) == list(PASSES)
        for run in passes.values():
            run()
        last, best = layout == "channels_last", (tf32, True)
        kind = getattr(torch, dtype)
        assert seen == [
            ("forward", False, False, kind, last, last),
            best,
            ("forward", True, True, kind, last, last),
            best,
            best,  # in the backward, too
            False,
        ]

    def test_the_operator_can_choose_by_what_was_measured(self):
        setting = decoder_profile.Setting("bfloat16", "cpu", StandIn())
        problem = Problem(2, 4, 4, 8, 8, kernel_size=4, stride=2, padding=1, groups=4, bias=True)
        alone = {"up4": decoder_record.Alone(problem, {"pytorch": 0.004, "one_channel": 0.001})}
        table = decoder_profile.table_of(alone, setting, RECORD.gpu, RECORD.software)
        choice = dispatch.choose_by_tables(
            [table], "NVIDIA Test", (9, 0), problem, "bfloat16", False, False, ["one_channel"]
        )
        assert choice.kernel == "one_channel"
        assert "measured on NVIDIA Test" in choice.reason
        form = table.measurements[0].form
        assert form == ("bfloat16", False, False)
        tf32 = replace(setting, name="TF32")
        table = decoder_profile.table_of(alone, tf32, RECORD.gpu, RECORD.software)
        assert table.measurements[0].form == ("float32", False, True)

    def test_the_error_is_the_references(self):
        exact = torch.randn(3, 4, dtype=torch.float64)
        actual = (exact + 1e-3).float()
        found = decoder_profile.relative_l2(actual, exact)
        assert found == pytest.approx(exact_reference.relative_l2(actual, exact), rel=1e-6)
        actual[1, 2] = math.nan
        assert decoder_profile.relative_l2(actual, exact) == math.inf
        zero = torch.zeros(2)
        assert decoder_profile.relative_l2(zero, zero) == 0.0
        assert decoder_profile.relative_l2(zero + 1, zero) == math.inf


class TestTheCommand:
    @pytest.fixture(autouse=True)
    def _folder(self, monkeypatch, tmp_path):
        monkeypatch.setattr(records, "FOLDER", tmp_path / "records")
        monkeypatch.setenv("KINETO_LOG_LEVEL", "6")  # as the command sets it

    @pytest.fixture
    def asked(self, monkeypatch):
        """Stand in for the GPU and for the measurement; the list of what was asked for."""
        asked = []
        tools = SimpleNamespace(device="cuda", clock=StandIn())
        machine = SimpleNamespace(gpu=RECORD.gpu, software=RECORD.software, tools=tools)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(decoder_profile, "_current_gpu", lambda: nullcontext(machine))
        monkeypatch.setattr(
            decoder_profile, "measure_all", lambda *arguments: asked.append(arguments) or RECORD
        )
        return asked

    def test_the_whole_record(self, asked, tmp_path, capsys):
        decoder_profile.main([])
        path = tmp_path / "records" / "nvidia-test-decoder.json"
        assert decoder_record.load(path) == RECORD
        printed = capsys.readouterr().out
        assert decoder_report.gains(RECORD) in printed
        assert f"wrote {path}" in printed
        ((names, size, gpu, _, device, _),) = asked
        assert (names, size, gpu, device) == (list(MODES), NETWORK, RECORD.gpu, "cuda")

    @pytest.mark.parametrize("options", [["--modes", "TF32"], ["--batch", "2"]])
    def test_a_part_is_not_written_but_where_it_is_said(self, asked, tmp_path, capsys, options):
        decoder_profile.main(options)
        assert "a part of the record" in capsys.readouterr().err
        assert not (tmp_path / "records").exists()
        decoder_profile.main([*options, "--output", str(tmp_path / "part.json")])
        assert decoder_record.load(tmp_path / "part.json") == RECORD
        if options[0] == "--batch":
            assert asked[0][1].input_shape == (2, *NETWORK.input_shape[1:])
        else:
            assert asked[0][0] == ["TF32"]

    def test_what_is_wrong_ends_with_a_status(self, asked, monkeypatch):
        worse = replace(made_after(), errors=made_errors(1.0))
        wrong = made_record(replace(made_mode(), after=(replace(worse, chosen_by="tables"), worse)))
        monkeypatch.setattr(decoder_profile, "measure_all", lambda *arguments: wrong)
        with pytest.raises(SystemExit, match="wrong: float32, by tables: the error of scores"):
            decoder_profile.main([])

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="no CUDA device"):
            decoder_profile.main([])

    @pytest.mark.parametrize(
        ("options", "words"), [(["--batch", "0"], "at least 1"), (["--trial"], "--output")]
    )
    def test_options_that_cannot_be(self, capsys, options, words):
        with pytest.raises(SystemExit):
            decoder_profile.main(options)
        assert words in capsys.readouterr().err

    def test_a_trial_goes_all_the_way(self, monkeypatch, tmp_path, capsys):
        """On the CPU and with its own clock, everything but what needs a GPU."""
        monkeypatch.setattr(decoder_profile, "TRIAL", TINY)
        monkeypatch.setattr(decoder_report, "suspicious", lambda record: [])
        path = tmp_path / "trial.json"
        decoder_profile.main(["--trial", "--output", str(path)])
        record = decoder_record.load(path)
        assert [mode.name for mode in record.modes] == list(MODES)
        assert record.network == TINY
        assert json.loads(path.read_text())["schema"] == 1
        assert "float32: PyTorch's layers" in capsys.readouterr().out
        assert not (tmp_path / "records").exists()


@pytest.mark.gpu
class TestOnAGPU:
    def test_a_small_network(self):
        from convt_lab.bench import _current_gpu

        size = decoder_record.Network(classes=21, width=16, input_shape=(2, 3, 128, 128))
        with _current_gpu() as machine:
            record = decoder_profile.measure_all(
                list(MODES),
                size,
                machine.gpu,
                machine.software,
                "cuda",
                machine.tools.clock,
                profiles=2,
                runs=5,
            )
        assert decoder_record.from_json(decoder_record.to_json(record))
        assert decoder_report.suspicious(record) == []
        for mode in record.modes:
            if mode.memory_format == "contiguous":
                assert len(mode.alone["up4"].seconds) > 1
            for profile_of in (mode.before.profile, *(after.profile for after in mode.after)):
                for name in LAYERS:
                    assert 0 < profile_of.inference[name] < 0.1
                    assert 0 < profile_of.forward[name] < 0.1
                    assert 0 < profile_of.backward[name] < 0.1
            chosen = mode.chosen_by("measurements")
            for name, choice in chosen.choices.items():
                is_ours = len(mode.alone[name].seconds) > 1
                assert ("measured on" if is_ours else "no kernel of ours takes") in choice.reason
            for pair in chosen.times.values():
                kernels = math.fsum(mode.before.profile.of("inference").values())
                assert pair.before.seconds > 0.3 * kernels
