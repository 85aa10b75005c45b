"""A small segmentation network, whose decoder has transposed convolutions of four kinds.

The book's chapter on real networks finds this one's bottleneck and swaps its layers. It is made of
PyTorch's own layers, has no weights to download, and is small enough for a CPU. It is an example:
nothing else in the package depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convt_lab.dispatch import Choice, explain
from convt_lab.problem import Problem

__all__ = [
    "STRIDE",
    "SegmentationNet",
    "explained",
    "inputs_of",
    "outcome",
    "problems_of",
    "scenes",
    "transposed_layers",
]

#: Height and width of the images must be multiples of this.
STRIDE = 16

_T = TypeVar("_T")


class SegmentationNet(nn.Module):
    """Gives each pixel of an image a score for each class.

    Each of four blocks halves the image. The decoder doubles it again, by four kinds of transposed
    convolution: ``up1`` is 2×2 at stride 2, as in U-Net (Ronneberger et al., 2015, section 2);
    ``up2`` is 4×4 at stride 2, whose stamps overlap evenly; ``wide`` is 3×7 at stride 1 and looks
    along the rows; ``up3`` and ``up4`` enlarge the scores of each class by themselves, begin as
    bilinear interpolation (Long et al., 2015, section 4) and are trained like the rest.

    Parameters
    ----------
    classes
        Number of classes.
    width
        Channels after the first block; the last has eight times as many.

    Raises
    ------
    ValueError
        If a number is not an integer of at least 1.

    Examples
    --------
    >>> SegmentationNet(classes=3, width=8)(torch.zeros(2, 3, 32, 48)).shape
    torch.Size([2, 3, 32, 48])
    """

    def __init__(self, classes: int = 21, width: int = 64) -> None:
        for name, value in (("classes", classes), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        super().__init__()
        self.stem = _block(3, width, stride=2)
        self.down1 = _block(width, 2 * width, stride=2)
        self.down2 = _block(2 * width, 4 * width, stride=2)
        self.down3 = _block(4 * width, 8 * width, stride=2)

        # No bias where batch normalisation follows, which would take it away again.
        self.up1 = nn.ConvTranspose2d(8 * width, 4 * width, 2, stride=2, bias=False)
        self.fuse1 = _block(8 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False)
        self.fuse2 = _block(4 * width, 2 * width)
        self.wide = nn.ConvTranspose2d(2 * width, 2 * width, (3, 7), padding=(1, 3))
        self.score = nn.Conv2d(2 * width, classes, 1)
        self.up3 = _bilinear(classes)
        self.up4 = _bilinear(classes)

    def forward(self, images: Tensor) -> Tensor:
        """Score every pixel.

        Parameters
        ----------
        images
            [N, 3, H, W]; H and W are multiples of `STRIDE`.

        Returns
        -------
        torch.Tensor
            [N, classes, H, W]

        Raises
        ------
        ValueError
            If `images` has another shape.
        """
        _check(images)
        half = self.stem(images)
        quarter = self.down1(half)
        eighth = self.down2(quarter)
        x = self.down3(eighth)
        x = self.fuse1(torch.cat([self.up1(x), eighth], dim=1))
        x = self.fuse2(torch.cat([self.up2(x), quarter], dim=1))
        x = self.score(self.wide(x))
        return self.up4(self.up3(x))


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _bilinear(channels: int) -> nn.ConvTranspose2d:
    """Make a layer that doubles height and width, each channel by itself."""
    layer = nn.ConvTranspose2d(
        channels, channels, 4, stride=2, padding=1, groups=channels, bias=False
    )
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        layer.weight.copy_(torch.outer(taps, taps))
    return layer


def _check(images: Tensor) -> None:
    shape = list(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"images has shape {shape}: it must be [N, 3, H, W]")
    for name, size in zip(("height", "width"), shape[2:], strict=True):
        if size % STRIDE:
            raise ValueError(f"images has {name} {size}: it must be a multiple of {STRIDE}")


def scenes(
    batch: int,
    height: int,
    width: int,
    classes: int = 21,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw images of rectangles, each class in its colour, in some noise.

    Parameters
    ----------
    batch, height, width
        N, H and W.
    classes
        Number of classes; 0 is the background.
    seed
        Of the random numbers, which are the same on every device.
    device
        Where the result shall be.

    Returns
    -------
    images : torch.Tensor
        [N, 3, H, W], float32.
    labels : torch.Tensor
        [N, H, W], the class of each pixel.
    """
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    colours = torch.rand(classes, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(batch, height, width, dtype=torch.long)
    for image in labels:
        for _ in range(12):
            top, left = below(height), below(width)
            image[top : top + 1 + height // 3, left : left + 1 + width // 3] = below(classes)
    images = colours[labels].movedim(-1, 1).contiguous()
    images += 0.1 * torch.randn(images.shape, generator=generator)
    return images.to(device), labels.to(device)


def outcome(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:
    """Compute what two models are compared by: scores, loss and every gradient.

    Parameters
    ----------
    model
        Gives scores for images. Its own gradients are cleared, before and after.
    images
        [N, 3, H, W]
    labels
        [N, H, W]
    settings
        Makes the context of the forward pass, such as autocast.

    Returns
    -------
    dict of str to torch.Tensor
        ``scores``, ``loss``, ``images`` (the gradient), and a gradient for each parameter's name.
    """
    model.zero_grad(set_to_none=True)
    leaf = images.detach().clone().requires_grad_()
    with settings():
        scores = model(leaf)
        loss = F.cross_entropy(scores, labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"scores": scores.detach(), "loss": loss.detach(), "images": leaf.grad, **gradients}


def transposed_layers(model: nn.Module) -> dict[str, nn.ConvTranspose2d]:
    """Return a model's transposed convolution layers by name, in their order."""
    layers = model.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, nn.ConvTranspose2d)}


def explained(model: nn.Module, *inputs: Tensor) -> dict[str, Choice]:
    """Ask for each transposed convolution layer what would compute it, and why.

    Parameters
    ----------
    model
        Whose layers are swapped, or will be, and are called with their input alone. It is run
        once, without gradients.
    *inputs
        Of the model.

    Returns
    -------
    dict of str to Choice
        What `convt_lab.explain` says of each layer that runs, with the input that it gets.
    """

    def ask(x: Tensor, layer: nn.ConvTranspose2d) -> Choice:
        settings = (layer.stride, layer.padding, layer.output_padding, layer.groups)
        return explain(x, layer.weight, layer.bias, *settings, layer.dilation)

    return _of_each_layer(model, inputs, ask)


def inputs_of(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return what each transposed convolution layer of a model is given, as for `explained`."""
    return _of_each_layer(model, inputs, lambda x, layer: x)


def problems_of(model: nn.Module, *inputs: Tensor) -> dict[str, Problem]:
    """Return what each transposed convolution layer of a model computes.

    Parameters
    ----------
    model
        As for `explained`. On the ``meta`` device nothing is computed.
    *inputs
        Of the model.

    Returns
    -------
    dict of str to Problem
        By the layers' names, in the order in which they run.
    """

    def describe(x: Tensor, layer: nn.ConvTranspose2d) -> Problem:
        return Problem.from_shapes(
            tuple(x.shape),
            tuple(layer.weight.shape),
            None if layer.bias is None else tuple(layer.bias.shape),
            stride=layer.stride,
            padding=layer.padding,
            output_padding=layer.output_padding,
            groups=layer.groups,
            dilation=layer.dilation,
        )

    return _of_each_layer(model, inputs, describe)


def _of_each_layer(
    model: nn.Module, inputs: tuple[Tensor, ...], ask: Callable[[Tensor, nn.ConvTranspose2d], _T]
) -> dict[str, _T]:
    """Run a model and ask something of each transposed convolution layer and its input."""
    answers: dict[str, _T] = {}

    def hook(name: str) -> Callable[[nn.ConvTranspose2d, tuple], None]:
        def asked(layer: nn.ConvTranspose2d, arguments: tuple) -> None:
            answers[name] = ask(arguments[0], layer)

        return asked

    hooks = [
        layer.register_forward_pre_hook(hook(name))
        for name, layer in transposed_layers(model).items()
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for registered in hooks:
            registered.remove()
    return answers
