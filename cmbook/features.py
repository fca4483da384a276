"""What turns images into features, so that sets of images can be measured.

A figure such as FID belongs to its extractor: another network, another resize or another rule
for 8 bits gives another figure of the same name. So each extractor here says what it is.
"""

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from cmbook.editing import LUMINANCE
from cmbook.protocols import Samples

Quantization = Literal["round", "truncate", "none"]


class Activations(NamedTuple):
    """What an extractor sees in images.

    Attributes:
        features: `(b, d)`: for the Frechet distance, precision and recall.
        spatial: `(b, d')`, which keep places: for sFID; or `None`.
        probabilities: `(b, classes)`: for the Inception Score; or `None`.
    """

    features: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


@runtime_checkable
class Extractor(Protocol):
    """Turns images `(b, c, h, w)` in [-1, 1] into features."""

    @property
    def name(self) -> str:
        """What it is, as a report says it."""
        ...

    @property
    def sha256(self) -> str:
        """Of its weights; empty if it has none."""
        ...

    @property
    def quantization(self) -> Quantization:
        """How images become 8-bit first."""
        ...

    def __call__(self, x: Samples) -> Activations:
        """The activations, one row per image, on the CPU."""
        ...


def to_bytes(x: Samples, rule: Quantization = "round") -> Tensor:
    """Images in [-1, 1] as 8-bit numbers, by the rule that is named.

    `"round"` takes the nearest level, so that 8-bit images come back as they were. `"truncate"`
    rounds down: on average half a level darker, and of 8-bit images that went through [-1, 1] in
    float32, 63 of the 256 levels come back one lower.

    Args:
        x: Values outside [-1, 1] are clipped.
        rule: One of the two.

    Raises:
        ValueError: If the rule is `"none"`, which has no 8-bit result.

    Source: rounding as in the released code of Karras et al. (2022), truncation as in that of
    Song et al. (2023).
    """
    if rule == "none":
        raise ValueError('8-bit images need a rule: "round" or "truncate"; got "none"')
    levels = x * 127.5 + 128 if rule == "round" else (x + 1) * 127.5  # each as its code has it
    return levels.clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Samples:
    """8-bit numbers as floating-point images in [-1, 1]: x / 127.5 - 1.

    Source: as in the released code of Song et al. (2023).
    """
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves: honest for tiny images, blind to what a shift of one pixel means.

    Attributes:
        quantization: How images become 8-bit first.

    Source: ours.
    """

    quantization: Quantization = "round"
    name: ClassVar[str] = "pixels"
    sha256: ClassVar[str] = ""

    def __call__(self, x: Samples) -> Activations:
        """Flattened pixels in [-1, 1]."""
        return Activations(_quantized(x, self.quantization).flatten(1).cpu())


@dataclass(frozen=True)
class GlyphNet:
    """A small network that comes with cmbook: it has learned to read letters and digits.

    It was trained by `python benchmarks/glyphnet.py` on endless renderings of 62 characters in 20
    fonts, and reads 96.6% of new ones (98.8% but for upper and lower case). Its features are the
    64 of the last hidden layer. Color becomes luminance (Rec. 601), any size becomes 32x32
    (bilinear, antialiased). Its figures are no FID; compare them only with each other.

    Attributes:
        device: Where it runs.
        quantization: How images become 8-bit first.

    Source: ours.
    """

    device: str = "cpu"
    quantization: Quantization = "round"
    name: ClassVar[str] = "glyphnet"
    FILE: ClassVar[Path] = Path(__file__).parent / "weights" / "glyphnet.safetensors"

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return _sha256(self.FILE)

    @torch.no_grad()
    def __call__(self, x: Samples) -> Activations:
        """64 features, and the probabilities of 62 characters."""
        net = _glyphnet(self.FILE, self.device)
        x = _quantized(x, self.quantization).to(self.device, torch.float32)
        if x.shape[1] == 3:
            x = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMINANCE))[:, None]
        if x.shape[-2:] != (32, 32):
            x = functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        features = net[:-1](x)
        return Activations(features.cpu(), None, net[-1](features).softmax(1).cpu())


def glyph_network() -> nn.Sequential:
    """The untrained network of `GlyphNet`: gray 32x32 images to 62 characters, 51,000 weights.

    Source: ours.
    """
    channels = (1, 16, 32, 32)
    blocks: list[nn.Module] = []
    for width, wider in pairwise(channels):
        convolution = nn.Conv2d(width, wider, 3, padding=1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(wider), nn.SiLU(), nn.AvgPool2d(2)]
    return nn.Sequential(
        *blocks, nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.SiLU(), nn.Linear(64, 62)
    )


INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class Inception:
    """The network of the field, Inception-v3 of 2015-12-05, from a TorchScript file.

    **A TorchScript file is code.** The file is loaded only if its SHA-256 is the one that is
    expected: by default that of the official file, as published by k-diffusion. To let another
    scripted network stand in, one with the same call, pass the hash of its file.

    Images enter as 8-bit numbers at their own size; the network makes them 299x299 itself, as
    TensorFlow 1 did. Gray images become three equal channels.

    Attributes:
        path: The file `inception-2015-12-05.pt`.
        expected_sha256: What the file must hash to.
        device: Where it runs.
        quantization: How images become 8-bit; `"none"` feeds floating-point numbers in [0, 255].

    Raises:
        ValueError: When first used, if the file is missing, is another one, or holds no such
            network; if images have neither 1 nor 3 channels.

    Note: Pool features are the field's 2,048. The probabilities leave out the bias of the last
    layer, as the original code did. The spatial features are the first 7 channels of the branch
    `mixed_6/conv`; a stand-in without that branch has none.

    Source: Heusel et al. (2017), FID; Salimans et al. (2016), Inception Score; Nash et al. (2021),
    sFID; the file is that of Karras et al. (2020), StyleGAN2-ADA.
    """

    path: Path
    expected_sha256: str = INCEPTION_SHA256
    device: str = "cpu"
    quantization: Quantization = "round"
    name: ClassVar[str] = "inception-2015-12-05"

    @property
    def sha256(self) -> str:
        """Of the file."""
        return self.expected_sha256

    @torch.no_grad()
    def __call__(self, x: Samples) -> Activations:
        """2,048 features, 2,023 spatial ones, and the probabilities of 1,008 classes."""
        net = _scripted(Path(self.path), self.expected_sha256, self.device)
        if x.shape[1] not in (1, 3):
            raise ValueError(f"Inception takes 1 or 3 channels; got images {tuple(x.shape)}")
        x = x.expand(-1, 3, -1, -1).to(self.device)
        if self.quantization == "none":
            images = (x.float() + 1) * 127.5
        else:
            images = to_bytes(x, self.quantization)
        features = net(images, return_features=True).float()
        last = dict(net.named_parameters())["output.weight"].float()
        probabilities = functional.linear(features, last).softmax(1)  # without a second pass
        spatial = _mixed_6(net, images)
        return Activations(
            features.cpu(), None if spatial is None else spatial.cpu(), probabilities.cpu()
        )


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Activations:
    """The activations of many batches, which may differ in size, one after the other.

    Raises:
        ValueError: If there is no batch.

    Source: ours.
    """
    parts = [extractor(batch) for batch in batches]
    if not parts:
        raise ValueError("there are no images to extract features from")
    spatial = [part.spatial for part in parts if part.spatial is not None]
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return Activations(
        torch.cat([part.features for part in parts]),
        torch.cat(spatial) if spatial else None,
        torch.cat(probabilities) if probabilities else None,
    )


_BEFORE_MIXED_6 = (
    *("conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1"),
    *("mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5"),
)


def _mixed_6(net: nn.Module, images: Tensor) -> Tensor | None:
    """The first 7 channels of the branch `mixed_6/conv`, flattened."""
    layers = getattr(net, "layers", None)
    if layers is None or not all(hasattr(layers, name) for name in (*_BEFORE_MIXED_6, "mixed_6")):
        return None
    x = (_as_tensorflow_resized(images.float(), 299) - 128) / 128
    for name in _BEFORE_MIXED_6:
        x = getattr(layers, name)(x)
    spatial: Tensor = layers.mixed_6.conv(x)[:, :7].flatten(1).float()
    return spatial


def _as_tensorflow_resized(x: Tensor, size: int) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel j lies at j * width / size of the input."""
    for axis in (-2, -1):
        n = x.shape[axis]
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.long()
        part = (at - low).reshape(-1, *[1] * (-1 - axis))
        high = (low + 1).clamp(max=n - 1)
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), part)
    return x


def _quantized(x: Samples, rule: Quantization) -> Tensor:
    return x if rule == "none" else from_bytes(to_bytes(x, rule))


@lru_cache(maxsize=2)
def _glyphnet(file: Path, device: str) -> nn.Sequential:
    net = glyph_network().half()
    net.load_state_dict(load_file(file))
    return net.float().eval().requires_grad_(False).to(device)


@lru_cache(maxsize=2)
def _scripted(path: Path, sha256: str, device: str) -> nn.Module:
    """The network of a TorchScript file, whose hash is checked before its code is loaded."""
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}. Inception features need inception-2015-12-05.pt (96 MB): "
            f"put it there from {INCEPTION_URL}"
        )
    found = _sha256(path)
    if found != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {sha256}. A TorchScript file is code: if you "
            "know where this one comes from, pass its hash as expected_sha256"
        )
    try:
        with warnings.catch_warnings():  # the field's file is TorchScript, deprecated or not
            warnings.simplefilter("ignore", DeprecationWarning)
            net: nn.Module = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {error!s}".splitlines()[0]) from error
    if "output.weight" not in dict(net.named_parameters()):
        raise ValueError(f"{path} has no last layer `output`; Inception and its stand-ins have one")
    return net


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
