"""`ConvTranspose2d`, the layer: PyTorch's own in everything but the kernel that runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from convt_lab.operator import conv_transpose2d

__all__ = ["ConvTranspose2d", "replace_conv_transpose"]


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """A 2-D transposed convolution layer that computes with `convt_lab.conv_transpose2d`.

    Constructor, parameters, their initial values, ``state_dict``, repr and errors are those of
    ``torch.nn.ConvTranspose2d``, of which it is a subclass.

    Parameters
    ----------
    in_channels, out_channels : int
        C_in and C_out, both divisible by `groups`.
    kernel_size, stride, padding, output_padding, dilation : int or pair of int
        One value for both axes, or (rows, columns).
    groups : int
        Number of groups into which the channels are split.
    bias : bool
        Whether the layer has a bias.
    padding_mode : str
        ``"zeros"``; there is no other.
    device : torch.device, optional
        Where the parameters shall be.
    dtype : torch.dtype, optional
        Type of the parameters.

    Examples
    --------
    >>> layer = ConvTranspose2d(4, 2, kernel_size=3, stride=2, padding=1)
    >>> layer(torch.ones(1, 4, 5, 5), output_size=[10, 10]).shape
    torch.Size([1, 2, 10, 10])
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Apply the layer.

        Parameters
        ----------
        input
            [N, C_in, H, W] or [C_in, H, W].
        output_size
            The wanted OH and OW; `output_padding` follows from it, as in PyTorch.

        Returns
        -------
        torch.Tensor
            [N, C_out, OH, OW], or [C_out, OH, OW].

        Raises
        ------
        ValueError
            If no `output_padding` gives `output_size`, or `padding_mode` is not ``"zeros"``.
        """
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        if torch.jit.is_scripting():  # a script knows PyTorch's own alone
            return F.conv_transpose2d(
                input,
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                output_padding,
                self.groups,
                self.dilation,
            )
        return conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )

    @classmethod
    def from_torch(cls, module: torch.nn.ConvTranspose2d) -> ConvTranspose2d:
        """Make a layer of a layer of PyTorch's, which stays as it is.

        The two share their Parameters, so training one trains the other. Settings and whether it is
        in training mode are taken over, and so are the hooks registered so far; later ones, and the
        removal of a hook by its handle, concern the layer that they were registered on.

        Parameters
        ----------
        module : torch.nn.ConvTranspose2d
            The layer. It must be one that `replace_conv_transpose` would replace, or one of ours.

        Returns
        -------
        ConvTranspose2d

        Raises
        ------
        TypeError
            If `module` is no such layer.
        """
        if type(module) is not ConvTranspose2d and (reason := _why_not(module)):
            raise TypeError(f"module={module!r} {reason}")
        layer = cls.__new__(cls)
        # Dictionaries (of parameters, hooks and so on) become its own, what they hold is shared.
        layer.__dict__ = {
            name: value.copy() if isinstance(value, dict | set) else value
            for name, value in module.__dict__.items()
        }
        layer._compiled_call_impl = None  # what ``module.compile()`` left is a call of `module`
        return layer


def replace_conv_transpose(model: torch.nn.Module) -> torch.nn.Module:
    """Let all transposed convolution layers of a model compute with this package's operator.

    The layers change in place: each ``torch.nn.ConvTranspose2d`` in `model` (or `model` itself, if
    it is one) becomes a `ConvTranspose2d`. It stays the same object, with its parameters, hooks and
    mode, so that optimizers, checkpoints and other references to it go on working, and a layer that
    is used in two places stays one layer.

    Left alone are layers that are more than that class: subclasses, which may have a ``forward`` of
    their own (to replace one by hand, call `convt_lab.conv_transpose2d` in it); layers with
    parametrizations or with ``weight_norm`` or ``spectral_norm``, which compute their weight; and
    lazy layers that have not seen an input yet.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is no Module.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 2, 3), torch.nn.ReLU())
    >>> type(replace_conv_transpose(model)[0])
    <class 'convt_lab.module.ConvTranspose2d'>
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        if _why_not(module) is None:
            module.__class__ = ConvTranspose2d
    return model


def _why_not(module: torch.nn.Module) -> str | None:
    """Say why `module` is not replaced; None if it is."""
    if not isinstance(module, torch.nn.ConvTranspose2d):
        return f"must be a torch.nn.ConvTranspose2d, not {type(module).__name__}"
    if isinstance(module, torch.nn.LazyConvTranspose2d):
        return "is lazy: apply it to an input first, which makes it an ordinary layer"
    if torch.nn.utils.parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "computes its weight: remove its parametrization or norm first"
    if type(module) is not torch.nn.ConvTranspose2d or "forward" in module.__dict__:
        return "is more than a torch.nn.ConvTranspose2d: call convt_lab.conv_transpose2d in it"
    return None
