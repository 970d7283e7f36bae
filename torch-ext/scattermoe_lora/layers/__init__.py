"""The layers that `kernels` swaps in: pure forwards, one class a mapping name, stateless as `kernels` requires."""

from .blocks import HFScatterMoEGatedMLP, ScatterMoEGatedMLP
from .experts import ScatterMoEExperts, ScatterMoEParamWrapper

__all__ = ["HFScatterMoEGatedMLP", "ScatterMoEExperts", "ScatterMoEGatedMLP", "ScatterMoEParamWrapper"]
