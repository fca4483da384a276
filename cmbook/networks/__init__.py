"""Networks F(x, c_noise, label): plain PyTorch, one family a file.

Each family is a frozen dataclass of knobs with `build(shape, classes)`, which makes the module.
"""

from cmbook.networks.mlp import MLP, ResidualMLP
from cmbook.networks.ncsnpp import NCSNpp
from cmbook.networks.unet import UNet

Network = MLP | ResidualMLP | UNet | NCSNpp

__all__ = ["MLP", "NCSNpp", "Network", "ResidualMLP", "UNet"]
