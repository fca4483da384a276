"""The published checkpoints: where each lies, and how its authors drew samples from it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cmbook.conventions import OpenAI
from cmbook.data.fetch import Remote, fetch
from cmbook.data.prepare import cache_folder
from cmbook.experiment import nearest
from cmbook.noise import NoiseRange

STORE = "https://openaipublic.blob.core.windows.net/consistency"
NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"


@dataclass(frozen=True)
class Official:
    """A published checkpoint.

    Attributes:
        what: What it is, for people.
        remote: Its file. Neither sizes nor checksums are published.
        levels: Of the grid that its authors walk, or in which they choose time points.
        second: The index in that grid of the second evaluation; `None` where none is published.

    Source: openai/consistency_models, README and `scripts/launch.sh`;
        openai/consistency_models_cifar10, README and notebook; NVlabs/edm, README.
    """

    what: str
    remote: Remote
    levels: int = 40
    second: int | None = None

    def sigmas(self, noise_range: NoiseRange) -> list[float]:
        """Where the model is evaluated: for one step the first, for two steps both."""
        if self.second is None:
            return [noise_range.sigma_max]
        written = [0, self.second, self.levels - 1]
        return cast(list[float], OpenAI(self.levels, noise_range).sigmas(written).tolist())


def _torch(name: str, what: str, levels: int = 40, second: int | None = None) -> Official:
    return Official(what, Remote(f"{name}.pt", (f"{STORE}/{name}.pt",), None), levels, second)


def _flax(name: str, what: str, number: int, second: int | None = None) -> Official:
    url = f"{STORE}/jcm_checkpoints/{name}/checkpoints/checkpoint_{number}"
    return Official(what, Remote(f"{name}.msgpack", (url,), None), 18, second)


def _pickle(name: str, what: str, levels: int = 18) -> Official:
    return Official(what, Remote(f"{name}.pkl", (f"{NVIDIA}/{name}.pkl",), None), levels)


OFFICIAL: dict[str, Official] = {
    "edm_imagenet64_ema": _torch("edm_imagenet64_ema", "teacher, ImageNet 64x64"),
    "cd_imagenet64_l2": _torch("cd_imagenet64_l2", "CD with l2, ImageNet 64x64", 40, 22),
    "cd_imagenet64_lpips": _torch("cd_imagenet64_lpips", "CD with LPIPS, ImageNet 64x64", 40, 22),
    "ct_imagenet64": _torch("ct_imagenet64", "CT, ImageNet 64x64", 201, 106),
    "edm_bedroom256_ema": _torch("edm_bedroom256_ema", "teacher, LSUN Bedroom 256x256"),
    "cd_bedroom256_l2": _torch("cd_bedroom256_l2", "CD with l2, LSUN Bedroom 256x256", 40, 18),
    "cd_bedroom256_lpips": _torch(
        "cd_bedroom256_lpips", "CD with LPIPS, LSUN Bedroom 256x256", 40, 17
    ),
    "ct_bedroom256": _torch("ct_bedroom256", "CT, LSUN Bedroom 256x256", 151, 67),
    "edm_cat256_ema": _torch("edm_cat256_ema", "teacher, LSUN Cat 256x256"),
    "cd_cat256_l2": _torch("cd_cat256_l2", "CD with l2, LSUN Cat 256x256"),
    "cd_cat256_lpips": _torch("cd_cat256_lpips", "CD with LPIPS, LSUN Cat 256x256"),
    "ct_cat256": _torch("ct_cat256", "CT, LSUN Cat 256x256", 151, 62),
    "edm_cifar10_ema": Official(
        "teacher, CIFAR-10",
        Remote("edm_cifar10_ema.msgpack", (f"{STORE}/jcm_checkpoints/edm_cifar10_ema",), None),
        18,
    ),
    "cd-l1": _flax("cd-l1", "CD with l1, CIFAR-10", 80, 11),
    "cd-l2": _flax("cd-l2", "CD with l2, CIFAR-10", 80, 11),
    "cd-lpips": _flax("cd-lpips", "CD with LPIPS, CIFAR-10", 80, 11),
    "ct-lpips": _flax("ct-lpips", "CT with LPIPS, CIFAR-10", 74),
    "cifar10-continuous-cd-l2": _flax(
        "cifar10-continuous-cd-l2", "continuous-time CD with l2, CIFAR-10", 40
    ),
    "cifar10-continuous-cd-l2-stopgrad": _flax(
        "cifar10-continuous-cd-l2-stopgrad", "the same with a frozen target", 40
    ),
    "cifar10-continuous-cd-lpips-stopgrad": _flax(
        "cifar10-continuous-cd-lpips-stopgrad", "the same with LPIPS", 40
    ),
    "continuous-ct-l2": _flax("continuous-ct-l2", "continuous-time CT with l2, CIFAR-10", 80),
    "continuous-ct-lpips": _flax(
        "continuous-ct-lpips", "continuous-time CT with LPIPS, CIFAR-10", 40
    ),
    "edm-cifar10-32x32-uncond-vp": _pickle("edm-cifar10-32x32-uncond-vp", "EDM, DDPM++, CIFAR-10"),
    "edm-cifar10-32x32-uncond-ve": _pickle("edm-cifar10-32x32-uncond-ve", "EDM, NCSN++, CIFAR-10"),
    "edm-cifar10-32x32-cond-vp": _pickle(
        "edm-cifar10-32x32-cond-vp", "EDM, DDPM++, CIFAR-10 with classes"
    ),
    "edm-cifar10-32x32-cond-ve": _pickle(
        "edm-cifar10-32x32-cond-ve", "EDM, NCSN++, CIFAR-10 with classes"
    ),
    "edm-imagenet-64x64-cond-adm": _pickle(
        "edm-imagenet-64x64-cond-adm", "EDM, ADM, ImageNet 64x64", 40
    ),
}


def get(name: str, folder: Path, *, progress: bool = True) -> Path:
    """The file of a published checkpoint, fetched unless it is there; it may be gone on with.

    Args:
        name: One of `OFFICIAL`.
        folder: Where to put it.
        progress: Show a bar.

    Raises:
        ValueError: If there is no such checkpoint, or it cannot be had: then it says which file
            to put where.

    Source: ours.
    """
    if name not in OFFICIAL:
        raise ValueError(
            f"there is no official checkpoint {name!r}{nearest(name, list(OFFICIAL))} "
            "`cmbook get` without a name lists them"
        )
    return fetch(OFFICIAL[name].remote, folder, progress=progress)


def local(source: str | Path) -> Path:
    """A file on this machine: the path itself, or what lies at a URL, fetched into the cache once.

    Raises:
        ValueError: If the URL cannot be fetched.

    Source: ours.
    """
    if not str(source).startswith(("http://", "https://")):
        return Path(source)
    url = str(source)
    known = next((o.remote for o in OFFICIAL.values() if url in o.remote.urls), None)
    name = url.split("?")[0].rsplit("/", 1)[-1] or "weights"
    apart = "" if known else hashlib.sha256(url.encode()).hexdigest()[:12]  # names may repeat
    remote = known or Remote(name, (url,), None)
    return fetch(remote, cache_folder() / "weights" / apart)


def published(origin: str) -> Official | None:
    """The published checkpoint whose file this is: by the name that `get` gives it, or its own.

    Source: ours.
    """
    path = Path(origin).resolve()
    for entry in OFFICIAL.values():
        theirs = entry.remote.urls[0].removeprefix(f"{STORE}/jcm_checkpoints/")
        if path.name == entry.remote.name or path.as_posix().endswith(f"/{theirs}"):
            return entry
    return None
