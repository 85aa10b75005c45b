"""`ConvTranspose2d`, the layer: PyTorch's own in everything but the kernel that runs."""

from __future__ import annotations

import torch

from convt_lab.operator import conv_transpose2d

__all__ = ["ConvTranspose2d"]


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """A 2-D transposed convolution layer that computes with `convt_lab.conv_transpose2d`.

    Constructor, parameters, their initial values, ``state_dict`` and repr are those of
    ``torch.nn.ConvTranspose2d``.
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
        """
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
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
