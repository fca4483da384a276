"""Shared by all tests: quiet threads, stored numbers, small worlds."""

import os

# Before torch is imported: waiting threads sleep, so that parallel tests do not starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cmbook.noise import seeded
from cmbook.oracle import Gaussian, GaussianMixture

# A shell that puts the suite into the background has Ctrl-C ignored, and nohup SIGHUP; runs respect
# both.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """Numbers of the reference implementations: a file name to a dict of tensors."""

    def read(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}

    return read


@pytest.fixture
def generator():
    return seeded(0)


@pytest.fixture
def gaussian():
    """A Gaussian with unequal, turned axes."""
    return Gaussian(
        torch.tensor([0.3, -0.2], dtype=torch.float64),
        torch.tensor([[0.25, 0.1], [0.1, 0.09]], dtype=torch.float64),
    )


@pytest.fixture
def separable():
    """A 2-D mixture whose paths are known: a 1-D mixture along x, one Gaussian along y."""
    means = torch.tensor([[-0.5, 0.1], [0.4, 0.1], [0.9, 0.1]], dtype=torch.float64)
    variances = torch.tensor([[0.15, 0.2], [0.1, 0.2], [0.2, 0.2]], dtype=torch.float64) ** 2
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.diag_embed(variances))


@pytest.fixture(scope="session")
def torchvision():
    """The package torchvision, also beside a torch for the CPU alone.

    Its own wheel then cannot load its compiled half, and its import fails for want of two
    operators, which neither LPIPS nor diffusers calls. Here they are declared, and do nothing.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        yield library  # what is declared lives as long as this
        return
    yield None


@pytest.fixture(scope="session")
def lpips(torchvision):
    """The package `lpips`."""
    return pytest.importorskip("lpips")


class Spy:
    """A denoiser that keeps the noise levels and the labels it is told."""

    def __init__(self, denoise):
        self.denoise, self.sigmas, self.labels = denoise, [], []

    def __call__(self, x, sigma, label=None):
        self.sigmas.append(sigma)
        self.labels.append(label)
        return self.denoise(x, sigma)


@pytest.fixture
def spy():
    return Spy
