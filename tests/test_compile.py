"""The operator as torch.library, torch.compile and torch.export see it."""

import pytest
import torch
import torch.nn.functional as F
from paths import KERNEL, counting_runs, device_of, on_path, without_tf32

import convt_lab as lab
from convt_lab.library import torch_operator

PATHS = [
    "cpu",
    "simulator",
    *(pytest.param(p, marks=pytest.mark.gpu) for p in ("cuda", "cuda_ours")),
]
OURS = ["simulator", *(pytest.param(p, marks=pytest.mark.gpu) for p in ("cuda", "cuda_ours"))]

# What PyTorch's compiler does itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]


@pytest.fixture
def path(request):
    with on_path(request.param) as device, without_tf32(device):
        torch.compiler.reset()
        yield request.param
        torch.compiler.reset()


all_paths = pytest.mark.parametrize("path", PATHS, indirect=True)
our_paths = pytest.mark.parametrize("path", OURS, indirect=True)


def tensors(path, dtype=torch.float32, memory_format=torch.contiguous_format):
    problem = lab.Problem(2, 4, 6, 5, 4, (3, 2), groups=2, bias=True)
    x, weight, bias = (t.to(dtype) for t in problem.random_inputs(1, device_of(path)))
    return [x.to(memory_format=memory_format), weight, bias]


def ours(x, weight, bias):
    return lab.conv_transpose2d(x, weight, bias, (2, 1), 1, (1, 0), 2)


def theirs(x, weight, bias):
    return F.conv_transpose2d(x, weight, bias, (2, 1), 1, (1, 0), 2)


def with_gradients(function, *data):
    leaves = [t.detach().clone().requires_grad_() for t in data]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def agree(mine, others, check_stride=True):
    for one, two in zip(mine, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3, check_stride=check_stride)


class TestOpcheck:
    """All that torch.library.opcheck tests: schema, autograd, fake kernel, AOT with symbols."""

    @our_paths
    @pytest.mark.parametrize("needs_grad", [False, True])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_whole(self, path, dtype, memory_format, needs_grad):
        data = [t.requires_grad_(needs_grad) for t in tensors(path, dtype, memory_format)]
        arguments = ((2, 1), (1, 1), (1, 0), 2, (1, 1))
        result = torch.library.opcheck(torch_operator, (*data, *arguments), rtol=1e-2, atol=1e-2)
        assert len(result) == 4
        assert set(result.values()) == {"SUCCESS"}

    @our_paths
    @pytest.mark.parametrize(
        "change",
        [
            lambda x, w, b: (x[:0], w, b),
            lambda x, w, b: (x[:, :, ::2, ::2], w, None),
            lambda x, w, b: (x[:1].expand(3, -1, -1, -1), w, b),
            lambda x, w, b: (x, w.to(memory_format=torch.channels_last), b),
            lambda x, w, b: (x.mT, w.contiguous().mT, b),
        ],
    )
    def test_other_tensors(self, path, change):
        data = change(*tensors(path))
        torch.library.opcheck(torch_operator, (*data, (2, 1), (1, 1), (1, 0), 2))

    @our_paths
    def test_defaults(self, path):
        x, weight, _ = tensors(path)
        torch.library.opcheck(torch_operator, (x, weight))
        torch.testing.assert_close(torch_operator(x, weight), F.conv_transpose2d(x, weight))


class TestCompile:
    @all_paths
    def test_whole_graph_with_gradients(self, path):
        data = tensors(path)
        compiled = torch.compile(ours, fullgraph=True)
        with counting_runs() as runs:
            mine = with_gradients(compiled, *data)
            # PyTorch's own operator, compiled for a CPU, has gradients with strides of its own.
            agree(mine, with_gradients(theirs, *data), check_stride=path != "cpu")
            agree([compiled(*data)], [theirs(*data)])
        if path in ("simulator", "cuda_ours"):
            assert set(runs) == {KERNEL}

    @our_paths
    def test_dynamic_shapes(self, path):
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        x, weight, bias = tensors(path)
        counted = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
        compiled = torch.compile(ours, fullgraph=True, dynamic=True)
        for batch, height, width in [(7, 5, 9), (8, 7, 13), (5, 6, 11)]:
            new = torch.randn(batch, x.shape[1], height, width, device=x.device)
            agree([counted(new, weight, bias)], [theirs(new, weight, bias)])
            agree(
                with_gradients(compiled, new, weight, bias),
                with_gradients(theirs, new, weight, bias),
            )
        assert counter.frame_count == 1

    @our_paths
    def test_strides_under_channels_last(self, path):
        for of_weight in (torch.contiguous_format, torch.channels_last):
            x, weight, bias = tensors(path, memory_format=torch.channels_last)
            weight = weight.to(memory_format=of_weight)

            def used(function, *data):
                return function(*data).relu() + 1

            compiled = torch.compile(lambda *data: used(ours, *data), fullgraph=True)
            mine, others = compiled(x, weight, bias), used(theirs, x, weight, bias)
            agree([mine], [others])

    @our_paths
    def test_one_image(self, path):
        x, weight, bias = tensors(path)
        compiled = torch.compile(ours, fullgraph=True)
        agree([compiled(x[0], weight, bias)], [theirs(x[0], weight, bias)])

    @our_paths
    def test_sequences_of_one(self, path):
        x, weight, _ = tensors(path)
        arguments = dict(stride=[2], padding=(1,), output_padding=[1], dilation=(1,), groups=2)
        compiled = torch.compile(lambda x: lab.conv_transpose2d(x, weight, **arguments))
        agree([compiled(x)], [F.conv_transpose2d(x, weight, **arguments)])
        mapped = torch.func.vmap(lambda x: lab.conv_transpose2d(x, weight, **arguments))(x[None])
        agree([mapped[0]], [F.conv_transpose2d(x, weight, **arguments)])

    @our_paths
    def test_autocast(self, path):
        data = tensors(path)
        with torch.autocast(device_of(path), dtype=torch.bfloat16):
            y = torch.compile(ours, fullgraph=True)(*data)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, theirs(*data), rtol=5e-2, atol=5e-2)

    @our_paths
    def test_the_graph_holds_our_operator(self, path):
        targets = []

        def backend(graph, inputs):
            targets.extend(node.target for node in graph.graph.nodes)
            return graph

        torch.compile(ours, fullgraph=True, backend=backend)(*tensors(path))
        assert any("convt_lab" in str(target) for target in targets)

    @our_paths
    @pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
    def test_transforms(self, path, transform):
        """In a compiled forward derivative, above all, no tangent may be lost."""

        def transformed(function):
            if transform == "grad":
                return torch.func.grad(lambda *t: function(*t).square().sum(), (0, 1))
            if transform == "vmap":
                return torch.func.vmap(function, (0, None, None))
            return lambda *t: torch.func.jvp(function, t, t)

        data = tensors(path)
        if transform == "vmap":
            data[0] = torch.stack([data[0], 2 * data[0]])
        compiled = torch.compile(transformed(ours), fullgraph=True)
        agree(
            torch.utils._pytree.tree_leaves(compiled(*data)),
            torch.utils._pytree.tree_leaves(transformed(theirs)(*data)),
        )

    @all_paths
    def test_the_layer(self, path):
        torch.manual_seed(0)
        layer = lab.ConvTranspose2d(4, 6, 3, stride=2, device=device_of(path))
        x = torch.randn(2, 4, 5, 6, device=device_of(path))
        compiled = torch.compile(layer, fullgraph=True)
        agree([compiled(x)], [layer(x)])
        agree([compiled(x, output_size=[12, 14])], [layer(x, output_size=[12, 14])])

    # PyTorch begins with a graph of nothing, to have a memory pool.
    @pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
    @pytest.mark.gpu
    @pytest.mark.parametrize("path", ["cuda_ours"], indirect=True)
    def test_cuda_graphs(self, path):
        data = tensors(path)
        compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
        for number in range(4):
            new = [data[0] + number, *data[1:]]
            agree([compiled(*new).clone()], [theirs(*new)])


class TestExport:
    @all_paths
    @pytest.mark.parametrize("strict", [False, True])
    def test_what_is_exported_needs_no_convt_lab(self, path, strict):
        torch.manual_seed(0)
        layer = lab.ConvTranspose2d(4, 6, 3, stride=2, device=device_of(path))
        x = torch.randn(2, 4, 5, 6, device=device_of(path))
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(
            layer, (x,), dynamic_shapes={"input": {0: batch}}, strict=strict
        )
        assert "convt_lab" not in str(exported.graph)
        assert "conv_transpose2d" in str(exported.graph)
        more = torch.randn(5, 4, 5, 6, device=device_of(path))
        agree([exported.module()(more)], [layer(more)])

    @our_paths
    def test_make_fx_traces_our_operator(self, path):
        from torch.fx.experimental.proxy_tensor import make_fx

        data = tensors(path)
        graph = make_fx(ours)(*data)
        assert "convt_lab.conv_transpose2d" in graph.code
        new = [2 * data[0], *data[1:]]
        agree([graph(*new)], [theirs(*new)])
