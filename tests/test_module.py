"""The layer in PyTorch's place, and models whose layers are swapped."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from paths import PATHS, device_of, on_path, without_tf32
from torch import nn

import convt_lab as lab

ARGUMENTS = ((4, 6, (3, 7)), {"stride": 2, "padding": 1, "groups": 2})


@pytest.fixture(params=PATHS)
def device(request):
    with on_path(request.param) as device, without_tf32(device):
        yield device_of(request.param)


def pair(device="cpu", *positional, **keywords):
    """Make our layer and PyTorch's from the same random numbers."""
    if not positional:
        positional, keywords = ARGUMENTS[0], {**ARGUMENTS[1], **keywords}
    layers = []
    for kind in (lab.ConvTranspose2d, nn.ConvTranspose2d):
        torch.manual_seed(3)
        layers.append(kind(*positional, **keywords, device=device))
    return layers


class Decoder(nn.Module):
    """A small model with layers of many kinds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False)
        self.same = self.up
        self.depthwise = nn.ModuleList([nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=4)])
        self.outside = [self.up]  # no registered child
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.same(self.up(self.body(x)))
        for layer in self.depthwise:
            x = layer(x)
        return self.head(x)


class TestTheLayer:
    def test_the_constructor_is_pytorchs(self):
        ours, theirs = (inspect.signature(c) for c in (lab.ConvTranspose2d, nn.ConvTranspose2d))
        assert ours == theirs

    @pytest.mark.parametrize(
        ("positional", "keywords"),
        [
            ARGUMENTS,
            ((4, 6, 3), {}),
            ((4, 6, 3, 2, 1, 1, 2, False, 2), {}),
            ((4, 6, (1, 2)), {"bias": False, "dilation": (2, 3), "output_padding": (1, 2)}),
            ((4, 6, 3), {"dtype": torch.float64, "padding_mode": "zeros"}),
        ],
    )
    def test_initial_values_state_and_repr(self, positional, keywords):
        ours, theirs = pair("cpu", *positional, **keywords)
        assert repr(ours) == repr(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
            assert ours.state_dict()[name].dtype == value.dtype
        assert isinstance(ours, nn.ConvTranspose2d)

    @pytest.mark.parametrize(
        "wrong",
        [
            dict(groups=3),
            dict(groups=0),
            dict(padding_mode="reflect"),
            dict(in_channels=3, groups=2),
        ],
    )
    def test_constructor_errors(self, wrong):
        arguments = dict(in_channels=4, out_channels=6, kernel_size=3) | wrong
        with pytest.raises(ValueError) as theirs:  # noqa: PT011 (its message is the next match)
            nn.ConvTranspose2d(**arguments)
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            lab.ConvTranspose2d(**arguments)
        assert str(ours.value) == str(theirs.value)

    def test_forward_and_output_size(self, device):
        ours, theirs = pair(device)
        x = torch.randn(2, 4, 5, 6, device=device)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert torch.allclose(ours(x[0]), theirs(x[0]), atol=1e-5)
        assert ours(x[:0]).shape == theirs(x[:0]).shape
        for size in ([9, 15], [10, 16], (2, 6, 10, 15), torch.Size([10, 15])):
            y = ours(x, output_size=size)
            assert y.shape == theirs(x, output_size=size).shape
            assert torch.allclose(y, theirs(x, output_size=size), atol=1e-5)

    @pytest.mark.parametrize("size", [[40, 40], [8, 15], [9], [1, 2, 3]])
    def test_output_sizes_that_cannot_be(self, device, size):
        ours, theirs = pair(device)
        x = torch.randn(2, 4, 5, 6, device=device)
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            theirs(x, output_size=size)
        with pytest.raises(ValueError) as found:  # noqa: PT011
            ours(x, output_size=size)
        assert str(found.value) == str(expected.value)

    def test_a_wrong_number_of_channels(self, device):
        ours, theirs = pair(device)
        for layer in (ours, theirs):
            with pytest.raises(RuntimeError, match="channels"):
                layer(torch.randn(2, 3, 5, 6, device=device))

    def test_another_padding_mode_set_later(self):
        for layer in pair():
            layer.padding_mode = "circular"
            with pytest.raises(ValueError, match="Only `zeros` padding mode"):
                layer(torch.randn(2, 4, 5, 6))

    def test_it_learns(self, device):
        layer, _ = pair(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x = torch.randn(2, 4, 5, 6, device=device)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]

    def test_copies(self, device):
        layer, theirs = pair(device)
        x = torch.randn(2, 4, 5, 6, device=device)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ]
        for other in copies:
            assert type(other) is lab.ConvTranspose2d
            assert torch.equal(other(x), layer(x))
            with torch.no_grad():
                other.weight.zero_()
        assert torch.allclose(layer(x), theirs(x), atol=1e-5)  # a copy's weight is its own

    def test_state_goes_both_ways(self):
        ours, theirs = pair()
        with torch.no_grad():
            theirs.weight.add_(1)
        assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(
            ours.state_dict()
        )
        assert torch.equal(ours.weight, theirs.weight)

    def test_conversions(self):
        layer, _ = pair()
        assert layer.double().weight.dtype == torch.float64
        assert layer(torch.randn(1, 4, 5, 6, dtype=torch.float64)).dtype == torch.float64
        assert layer.to("meta")(torch.randn(1, 4, 5, 6, device="meta", dtype=torch.double)).is_meta
        assert layer.to_empty(device="cpu").weight.device.type == "cpu"

    def test_functional_call(self, device):
        layer, _ = pair(device)
        x = torch.randn(2, 4, 5, 6, device=device)
        doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
        y = torch.func.functional_call(layer, doubled, (x,))
        assert torch.allclose(y, 2 * layer(x), atol=1e-5)

    def test_it_can_be_parametrized(self):
        ours, theirs = pair()
        for layer in (ours, theirs):
            nn.utils.parametrizations.weight_norm(layer)
        x = torch.randn(2, 4, 5, 6)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_script_computes_with_pytorchs_own():
    layer = lab.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 5)
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x), layer(x))
    assert torch.equal(scripted(x, [10, 12]), layer(x, [10, 12]))


class TestFromTorch:
    def test_parameters_are_shared(self, device):
        _, theirs = pair(device)
        theirs.eval()
        theirs.weight.requires_grad_(False)
        ours = lab.ConvTranspose2d.from_torch(theirs)
        assert type(ours) is lab.ConvTranspose2d
        assert type(theirs) is nn.ConvTranspose2d
        assert ours.weight is theirs.weight
        assert ours.bias is theirs.bias
        assert not ours.training
        assert repr(ours) == repr(theirs)
        x = torch.randn(2, 4, 5, 6, device=device)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        with torch.no_grad():
            theirs.bias.add_(1)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        ours.train()
        ours.weight = nn.Parameter(torch.zeros_like(ours.weight))
        assert not theirs.training
        assert theirs.weight.count_nonzero() > 0

    def test_what_compile_left_is_not_taken_over(self):
        source = nn.ConvTranspose2d(2, 3, 3)
        source.compile(backend="eager")
        layer = lab.ConvTranspose2d.from_torch(source)
        layer.bias = nn.Parameter(torch.full((3,), 100.0))
        assert layer(torch.zeros(1, 2, 4, 4)).min() == 100

    def test_the_names_of_buffers_are_its_own(self):
        source = nn.ConvTranspose2d(2, 3, 3)
        source.register_buffer("mask", torch.ones(1))
        layer = lab.ConvTranspose2d.from_torch(source)
        layer.register_buffer("mask", torch.ones(1), persistent=False)
        assert "mask" in source.state_dict()
        assert "mask" not in layer.state_dict()

    def test_hooks_are_taken_over(self):
        _, theirs = pair()
        calls = []
        handle = theirs.register_forward_hook(lambda module, *_: calls.append(type(module)))
        ours = lab.ConvTranspose2d.from_torch(theirs)
        ours.register_forward_hook(lambda *_: calls.append("ours alone"))
        x = torch.randn(2, 4, 5, 6)
        theirs(x)
        assert calls == [nn.ConvTranspose2d]
        ours(x)
        assert calls[1:] == [lab.ConvTranspose2d, "ours alone"]
        handle.remove()
        ours(x)
        assert len(calls) == 5

    def test_one_of_ours_and_subclasses(self):
        class Mine(lab.ConvTranspose2d):
            pass

        ours, theirs = pair()
        assert lab.ConvTranspose2d.from_torch(ours).weight is ours.weight
        assert type(Mine.from_torch(theirs)) is Mine

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: nn.Conv2d(4, 6, 3), "must be a torch.nn.ConvTranspose2d, not Conv2d"),
            (lambda: "layer", "not str"),
            (lambda: nn.LazyConvTranspose2d(6, 3), "is lazy"),
            (
                lambda: nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3)),
                "computes its weight",
            ),
            (lambda: type("Sub", (nn.ConvTranspose2d,), {})(4, 6, 3), "is more than"),
        ],
    )
    def test_what_is_refused(self, make, message):
        with pytest.raises(TypeError, match=message):
            lab.ConvTranspose2d.from_torch(make())

    def test_a_lazy_layer_that_has_seen_an_input(self):
        layer = nn.LazyConvTranspose2d(6, 3)
        x = torch.randn(2, 4, 5, 6)
        expected = layer(x)
        assert torch.allclose(lab.ConvTranspose2d.from_torch(layer)(x), expected, atol=1e-5)


class TestReplace:
    def test_a_model(self, device):
        torch.manual_seed(0)
        model = Decoder().to(device)
        original = copy.deepcopy(model)
        parameters = dict(model.named_parameters())
        calls = []
        model.up.register_forward_hook(lambda *_: calls.append("up"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert lab.replace_conv_transpose(model) is model
        found = [m for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
        assert len(found) == 3
        assert all(type(m) is lab.ConvTranspose2d for m in found)
        assert model.same is model.up is model.outside[0]
        assert type(model.head) is nn.Conv2d
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
        assert model.state_dict().keys() == original.state_dict().keys()
        assert repr(model) == repr(original)

        x = torch.randn(2, 4, 5, 6, device=device)
        results = []
        for network in (model, original):
            y = network(x)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in network.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert calls == ["up", "up"]
        optimizer.step()
        assert not torch.equal(model.up.weight, original.up.weight)

    def test_a_layer_alone_and_a_model_without_one(self):
        _, theirs = pair()
        weight = theirs.weight
        replaced = lab.replace_conv_transpose(theirs)
        assert type(replaced) is lab.ConvTranspose2d
        assert replaced.weight is weight
        other = nn.Linear(2, 3)
        assert lab.replace_conv_transpose(other) is other

    def test_twice_is_once(self):
        model = lab.replace_conv_transpose(Decoder())
        layers = list(model.modules())
        assert list(lab.replace_conv_transpose(model).modules()) == layers

    def test_the_mode_and_frozen_parameters_stay(self):
        model = Decoder().eval().requires_grad_(False)
        lab.replace_conv_transpose(model)
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm:FutureWarning")
    def test_what_is_more_than_the_class_is_left_alone(self):
        class Own(nn.ConvTranspose2d):
            def forward(self, input):
                return 2 * super().forward(input)

        patched = nn.ConvTranspose2d(4, 4, 3)
        patched.forward = lambda input: input
        layers = [
            Own(4, 4, 3),
            nn.utils.weight_norm(nn.ConvTranspose2d(4, 4, 3)),
            nn.utils.spectral_norm(nn.ConvTranspose2d(4, 4, 3)),
            nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 4, 3)),
            nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 3)),
            patched,
            nn.LazyConvTranspose2d(4, 3),
            nn.ConvTranspose1d(4, 4, 3),
            nn.ConvTranspose3d(4, 4, 3),
        ]
        kinds = [type(layer) for layer in layers]
        lab.replace_conv_transpose(nn.ModuleList(layers))
        assert [type(layer) for layer in layers] == kinds

    def test_what_is_no_model(self):
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not list"):
            lab.replace_conv_transpose([nn.ConvTranspose2d(4, 4, 3)])

    def test_a_model_that_is_compiled_already(self):
        torch.compiler.reset()
        model = torch.compile(Decoder(), backend="eager", fullgraph=True)
        x = torch.randn(2, 4, 5, 6)
        before = model(x)
        lab.replace_conv_transpose(model)
        assert torch.allclose(model(x), before, atol=1e-5)
        torch.compiler.reset()
