"""LPIPS: how different two images look, by the features of a network that recognizes objects.

The features and their learned weights are those of the package `lpips`; what happens to images
before, and what code bases do differently, stands here.
"""

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbook.distances import LARGEST
from cmbook.protocols import PerSample, Samples
from cmbook.schedules import check_choice

Trunk = Literal["vgg", "alex", "squeeze"]
Pooling = Literal["max", "average"]

WIDE = 256  # images of this width and more are never resized
SMALLEST = 32  # what every trunk can take
URL = "https://download.pytorch.org/models/"
FILES: dict[str, tuple[str, int]] = {  # of a trunk: its name, which ends in its hash, and its MB
    "vgg": ("vgg16-397923af.pth", 528),
    "alex": ("alexnet-owt-7be5be79.pth", 233),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 5),
}


@dataclass(frozen=True)
class LPIPS:
    r"""The learned perceptual distance of two images.

    $$d(x, y) = \sum_l \frac{1}{h_l w_l} \sum_{h, w}
        \big\lVert \sqrt{w_l} \odot (\hat\phi_l(x) - \hat\phi_l(y)) \big\rVert^2$$

    $\hat\phi_l$ are the features of layer l of the trunk, of length 1 at every place, and
    $w_l \ge 0$ was fitted to what people see. Needs `pip install 'cmbook[lpips]'`; the trunk's
    weights are fetched when it is first used.

    Always in float32, outside autocast. Gradients flow to both images, never to the trunk. Gray
    images become three equal channels.

    Attributes:
        net: The trunk: VGG-16, AlexNet or SqueezeNet.
        pooling: `"average"` replaces the trunk's max pooling, window for window.
        resize: Images narrower than 256 become `resize` x `resize` first, bilinearly. `None`
            (kept as 0, which a recipe can hold) leaves them as they are.

    Raises:
        ValueError: If a choice is none, or `resize` is out of range; when called, if samples are no
            images of 1 or 3 channels and at least 32 x 32, or package or weights are missing.

    Note: The paper's CIFAR-10 code keeps max pooling, its PyTorch code (ImageNet, LSUN) has
        average pooling. It says [0, 1] and ImageNet's mean and deviation where `lpips` says
        [-1, 1] and a shift and scale: the same numbers.

    Source: Zhang et al. (2018), eq. 1, v0.1; Song et al. (2023), §6 and released code.
    """

    net: Trunk = "vgg"
    pooling: Pooling = "max"
    resize: int | None = 224

    def __post_init__(self) -> None:
        check_choice("net", self.net, get_args(Trunk))
        check_choice("pooling", self.pooling, get_args(Pooling))
        object.__setattr__(self, "resize", self.resize or 0)
        if self.resize and not SMALLEST <= self.resize <= LARGEST:
            raise ValueError(
                f"resize must be at least {SMALLEST}, or 0 to leave images as they are, and at "
                f"most {LARGEST}; got {self.resize}"
            )

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances, in float32."""
        network = _network(self.net, self.pooling, prediction.device)
        device = "cpu" if prediction.is_meta else prediction.device.type  # meta knows no autocast
        with torch.autocast(device, enabled=False):
            x, y = (_features(network, self._prepared(images)) for images in (prediction, target))
            layers = zip(network.lins, x, y, strict=True)
            parts = [weigh((a - b).square()).mean((1, 2, 3)) for weigh, a, b in layers]
        return torch.stack(parts).sum(0)

    def prepare(self, device: torch.device) -> nn.Module:
        """The frozen trunk on a device, fetched and checked; a run asks before it has a folder."""
        network: nn.Module = _network(self.net, self.pooling, device)
        return network

    def _prepared(self, images: Samples) -> Tensor:
        """Three channels of float32, in the size that the trunk is to see."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS takes images (b, c, h, w) of 1 or 3 channels; got shape "
                f"{tuple(images.shape)}"
            )
        images = images.float().expand(-1, 3, -1, -1)
        if self.resize and images.shape[-1] < WIDE:
            return F.interpolate(images, (self.resize, self.resize), mode="bilinear")
        if min(images.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"LPIPS takes images of at least {SMALLEST}x{SMALLEST}, or resizes them; got "
                f"{images.shape[-2]}x{images.shape[-1]}"
            )
        return images


def _features(network: Any, images: Tensor) -> list[Tensor]:
    """Of every layer, each place of length 1.

    Places where all features are 0 stay 0, in forward mode too. There the package's own formula
    has the infinite slope of a square root: a jvp through it, or `torch.func.hessian`, is NaN.
    """
    found = []
    for features in network.net(network.scaling_layer(images)):
        squares = features.square().sum(1, keepdim=True)
        length = torch.where(squares > 0, squares, 1).sqrt()
        found.append(features / (length + 1e-10))
    return found


@lru_cache(maxsize=8)
def _network(net: Trunk, pooling: Pooling, device: torch.device) -> Any:
    """The network on a device, built once.

    In a thread of its own, where none of the first caller's modes hold: weights that were made in
    inference mode, or inside a transform of `torch.func`, could not be used outside.
    """
    with ThreadPoolExecutor(1) as thread, torch.random.fork_rng([]):
        return thread.submit(_frozen, net, pooling, device).result()


def _frozen(net: Trunk, pooling: Pooling, device: torch.device) -> Any:
    network: Any = _hollow(net) if device.type == "meta" else _pretrained(net)
    if pooling == "average":
        _average(network.net)
    return network.eval().requires_grad_(False).to(device)


def _hollow(net: Trunk) -> nn.Module:
    """A network with shapes and no numbers: enough to count what it costs, without the package."""
    if net == "squeeze":
        raise ValueError(f'the cost of LPIPS is known with net="vgg" or "alex"; got {net!r}')
    with torch.device("meta"):
        slices = [nn.Sequential(*part) for part in {"vgg": _vgg, "alex": _alex}[net]()]
        widths = [next(part[-2].parameters()).shape[0] for part in slices]  # of the convolution
        return _Hollow(slices, [nn.Conv2d(width, 1, 1, bias=False) for width in widths])


def _vgg() -> list[list[nn.Module]]:
    """VGG-16 up to its last rectifier, cut where LPIPS looks."""
    slices, channels = [], 3
    for i, (width, layers) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        parts: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for _ in range(layers):
            parts += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        slices.append(parts)
    return slices


def _alex() -> list[list[nn.Module]]:
    """AlexNet, the same."""
    convolutions = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1),
    ]
    pooled = (1, 2)
    return [
        [*([nn.MaxPool2d(3, 2)] if i in pooled else []), layer, nn.ReLU(inplace=True)]
        for i, layer in enumerate(convolutions)
    ]


class _Hollow(nn.Module):
    """The package's network, as far as a distance uses it."""

    def __init__(self, slices: Sequence[nn.Module], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.net, self.lins = _Slices(slices), nn.ModuleList(heads)
        self.scaling_layer = nn.Identity()


class _Slices(nn.ModuleList):
    """A trunk, called as the package's is."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """What each slice says."""
        found = []
        for part in self:
            images = part(images)
            found.append(images)
        return found


def _average(trunk: nn.Module) -> None:
    """Put average pooling in the place of max pooling."""
    for parent in trunk.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.MaxPool2d):
                window = (layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
                setattr(parent, name, nn.AvgPool2d(*window))


def _pretrained(net: Trunk) -> nn.Module:
    """The package's network with its trained trunk, or an error; never a random trunk.

    Tests put a function in this place that returns another network of the same kind.
    """
    lpips, (name, size) = _package(), FILES[net]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        _check(file)
        _check_inert(file)
    try:
        with warnings.catch_warnings():  # the package speaks to torchvision as of old
            warnings.simplefilter("ignore", UserWarning)
            network: nn.Module = lpips.LPIPS(net=net, verbose=False)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f'LPIPS(net="{net}") needs {name} ({size} MB), which could not be fetched ({reason}): '
            f"put it into {file.parent} from {URL}{name}"
        ) from error
    return network


def _check(file: Path) -> None:
    """Refuse a file that is not what the end of its name says."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(file.stem.rpartition("-")[2]):
        raise ValueError(
            f"{file} is not whole, or another file: its SHA-256 begins with {found[:8]}; put it "
            f"there anew from {URL}{file.name}"
        )


def _check_inert(file: Path) -> None:
    """Refuse a file that holds code: eight digits can be forged, and torchvision would run it."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(
            f"{file} holds more than tensors, and was not loaded; put it there anew from "
            f"{URL}{file.name}"
        ) from error


def _package() -> Any:
    """The package `lpips`, which is imported here alone."""
    try:
        import lpips
    except ImportError as error:
        raise ValueError("LPIPS needs a package: pip install 'cmbook[lpips]'") from error
    except RuntimeError as error:  # torchvision's compiled half is of another build
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"LPIPS needs a torchvision that was built for torch {torch.__version__}; install "
            f"both from one index (it said: {reason})"
        ) from error
    return lpips
