"""The norm of what the fast weights give, and its sum with the attention."""

from torch import Tensor, nn

from lact_kernels.ops.rms_norm_scale_add import rms_norm_scale_add


class BranchNorm(nn.RMSNorm):
    """An RMS norm over the channels of a fast head, in one kernel with what follows: `rms_norm_scale_add`.

    Who reads a parameter is the module that has it: a weight that is kept on the host or on a disk
    (accelerate), or in parts on other ranks, is brought when its module is called.
    """

    def forward(self, ttt: Tensor, attn: Tensor, scale: Tensor | None, backend: str) -> Tensor:
        """`attn + norm(ttt) * scale`, `[B, T, C]`, of arguments as in `rms_norm_scale_add`."""
        return rms_norm_scale_add(attn, ttt, self.weight, scale, eps=self.eps, backend=backend)
