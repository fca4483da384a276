"""Reference statistics that know where they come from, and samples in the files of the field.

A Frechet distance compares only what was made alike. So statistics carry their provenance, and
`distance` refuses two that differ in extractor, 8-bit rule, image size or preprocessing.
"""

import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmbook.disk import replacing
from cmbook.evaluation import Moments, frechet_distance
from cmbook.features import Activations, Extractor, Quantization, from_bytes, to_bytes
from cmbook.protocols import Labels, Samples


@dataclass(frozen=True)
class Provenance:
    """Where statistics come from; `None` is what nobody has written down.

    Attributes:
        data: Which images, such as `"Fashion-MNIST, training set"`.
        preprocessing: What was done to them, such as `"as stored"` or `"ADM center crop"`.
        images: How many.
        size: Channels, height, width before the extractor.
        extractor: The network's name.
        extractor_sha256: Of its weights; empty if it has none.
        quantization: How images became 8-bit.

    Source: ours.
    """

    data: str | None = None
    preprocessing: str | None = None
    images: int | None = None
    size: tuple[int, ...] | None = None
    extractor: str | None = None
    extractor_sha256: str | None = None
    quantization: Quantization | None = None


LARGEST = 2**31  # bytes that a packed array may have unpacked
MUST_AGREE = ("extractor", "extractor_sha256", "quantization", "size", "preprocessing")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the features of a set of images, and where they come from.

    Attributes:
        moments: Of the features.
        spatial: Of the features that keep places, for sFID; or `None`.
        provenance: Where they come from.

    Source: ours.
    """

    moments: Moments
    spatial: Moments | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @classmethod
    def of(
        cls,
        activations: Activations,
        extractor: Extractor,
        size: tuple[int, ...],
        *,
        data: str | None = None,
        preprocessing: str | None = "as stored",
    ) -> "Statistics":
        """The statistics of what an extractor has seen."""
        made = provenance(extractor, size, data, preprocessing)
        moments, spatial = _moments_of(activations)
        return cls(moments, spatial, replace(made, images=moments.count))

    @classmethod
    def streamed(
        cls,
        batches: Iterable[Tensor],
        extractor: Extractor,
        size: tuple[int, ...],
        *,
        data: str | None = None,
        preprocessing: str | None = "as stored",
    ) -> "Statistics":
        """The statistics of images that come in batches, in memory that does not grow.

        Raises:
            ValueError: If there is no batch.
        """
        whole: Moments | None = None
        places: Moments | None = None
        for batch in batches:
            moments, spatial = _moments_of(extractor(batch))
            whole = moments if whole is None else whole + moments
            if spatial is not None:
                places = spatial if places is None else places + spatial
        if whole is None:
            raise ValueError("there are no images to take statistics of")
        made = provenance(extractor, size, data, preprocessing)
        return cls(whole, places, replace(made, images=whole.count))


def distance(
    samples: Statistics, reference: Statistics, *, comparable_anyway: bool = False
) -> float:
    """The Frechet distance of samples to a reference, if the two are comparable.

    Args:
        samples: Statistics of generated images.
        reference: Statistics of real ones. Their number may differ, as in the field.
        comparable_anyway: You have checked it yourself, for instance because the file of an
            official reference does not say how it was made.

    Raises:
        ValueError: If the two were not made alike, saying in what they differ.

    Source: ours.
    """
    provenances = asdict(samples.provenance), asdict(reference.provenance)
    check_comparable(*provenances, comparable_anyway=comparable_anyway)
    return frechet_distance(samples.moments, reference.moments)


def check_comparable(
    here: dict[str, Any],
    there: dict[str, Any],
    names: tuple[str, ...] = MUST_AGREE,
    *,
    comparable_anyway: bool = False,
) -> None:
    """Refuse to compare what was not made alike.

    Args:
        here: What is known of one thing.
        there: What is known of the other.
        names: What must agree; what is unknown agrees with nothing.
        comparable_anyway: Let it pass.

    Raises:
        ValueError: Naming every difference.

    Source: ours.
    """
    different = [
        f"{name} is {_told(here.get(name))} here and {_told(there.get(name))} there"
        for name in names
        if here.get(name) is None or here.get(name) != there.get(name)
    ]
    if different and not comparable_anyway:
        raise ValueError(
            f"not comparable: {'; '.join(different)}. Measure both alike, or say "
            "comparable_anyway if you know better"
        )


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics as the field's `.npz`: mu, sigma (mu_s, sigma_s), and their provenance.

    Source: the layout of Dhariwal and Nichol (2021), released code; provenance is ours.
    """
    arrays: dict[str, Any] = {
        "mu": statistics.moments.mean.numpy(),
        "sigma": statistics.moments.covariance.numpy(),
        "provenance": np.array(json.dumps(asdict(statistics.provenance))),
    }
    if statistics.spatial is not None:
        arrays["mu_s"] = statistics.spatial.mean.numpy()
        arrays["sigma_s"] = statistics.spatial.covariance.numpy()
    with replacing(path) as file:
        np.savez(file, **arrays)


def load_statistics(path: Path) -> Statistics:
    """Read statistics: ours, or an official file, whose provenance is then unknown.

    Raises:
        ValueError: If the file is missing, no `.npz`, or holds no mu and sigma that fit.

    Source: the layout of Dhariwal and Nichol (2021), released code; provenance is ours.
    """
    arrays = _read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "provenance"))
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(
            f"{path} holds no statistics: expected mu and sigma, got {_listed(arrays)}"
        )
    made = _told_provenance(path, arrays.get("provenance"))
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        spatial = _moments(path, arrays["mu_s"], arrays["sigma_s"], made.images)
    moments = _moments(path, arrays["mu"], arrays["sigma"], made.images)
    return Statistics(moments, spatial, made)


def save_samples(
    path: Path, x: Tensor, label: Tensor | None = None, quantization: Quantization = "round"
) -> None:
    """Write samples as evaluators of the field read them.

    Images become `arr_0`, 8-bit, `(n, h, w, c)`; points stay as they are. Labels become `arr_1`.

    Source: the layout of Dhariwal and Nichol (2021), released code.
    """
    values = to_bytes(x, quantization).permute(0, 2, 3, 1) if x.ndim == 4 else x
    arrays = [values.cpu().numpy()] + ([] if label is None else [label.cpu().numpy()])
    with replacing(path) as file:
        np.savez(file, *arrays)


def load_samples(path: Path) -> tuple[Samples, Labels | None]:
    """Read samples and their labels: images in [-1, 1], `(n, c, h, w)`, or points.

    A reference batch of the field may be read too: its images are in `arr_0`.

    Raises:
        ValueError: If the file is missing, no `.npz`, or `arr_0` is neither 8-bit images nor
            points.

    Source: the layout of Dhariwal and Nichol (2021), released code.
    """
    arrays = _read_npz(path, ("arr_0", "arr_1"))
    x = arrays.get("arr_0", np.empty(0))
    images = x.ndim == 4 and x.dtype == np.uint8 and x.shape[3] in (1, 3)
    points = x.ndim == 2 and x.dtype.kind == "f"
    if not len(x) or not (images or points):
        raise ValueError(
            f"{path}: expected arr_0 with 8-bit images (n, h, w, 1 or 3) or points (n, d); got "
            f"{x.dtype} {x.shape}"
        )
    values = torch.from_numpy(x)
    label = None
    if "arr_1" in arrays:
        told = arrays["arr_1"]
        if told.dtype.kind not in "iu" or told.shape != (len(x),):
            raise ValueError(
                f"{path}: expected arr_1 with {len(x)} whole numbers; got {told.dtype} {told.shape}"
            )
        label = torch.from_numpy(told.astype(np.int64))
    return (from_bytes(values.permute(0, 3, 1, 2)) if images else values.float()), label


def _moments_of(seen: Activations) -> tuple[Moments, Moments | None]:
    spatial = seen.spatial
    return Moments.of(seen.features), None if spatial is None else Moments.of(spatial)


def provenance(
    extractor: Extractor,
    size: tuple[int, ...],
    data: str | None = None,
    preprocessing: str | None = None,
) -> Provenance:
    """What an extractor's statistics of images of a size will say, but for their number.

    Source: ours.
    """
    return Provenance(
        data,
        preprocessing,
        size=size,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        quantization=extractor.quantization,
    )


def _told_provenance(path: Path, text: Any) -> Provenance:
    """The provenance that a file tells, or that nothing is known."""
    if text is None:
        return Provenance()
    try:
        told: dict[str, Any] = dict(json.loads(str(text)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its provenance cannot be read: {error}") from error
    known = {entry.name for entry in fields(Provenance)}
    told = {name: value for name, value in told.items() if name in known and value is not None}
    if isinstance(told.get("size"), list):
        told["size"] = tuple(told["size"])
    for name, value in told.items():
        kind = {"images": int, "size": tuple}.get(name, str)
        if type(value) is not kind:
            raise ValueError(f"{path}: its provenance says {name} = {value!r}")
    return Provenance(**told)


def _moments(path: Path, mean: Any, covariance: Any, count: int | None) -> Moments:
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{path}: mean and covariance must be real numbers")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mean or covariance holds NaN or infinity")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mean {mean.shape} and covariance {covariance.shape} do not fit; expected "
            "(d,) and (d, d)"
        )
    if not np.allclose(covariance, covariance.T):
        raise ValueError(f"{path}: the covariance is not symmetric")
    return Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), count)


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of these names that a file holds, read without running what may be inside."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for entry in arrays.zip.infolist():
                if entry.file_size > LARGEST and entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"{entry.filename} would unpack to {entry.file_size / 1e9:,.1f} GB; save "
                        "it with np.savez, not savez_compressed"
                    )
            return {name: arrays[name] for name in names if name in arrays.files}
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error


def _told(value: Any) -> str:
    return "unknown" if value is None else repr(value)


def _listed(arrays: dict[str, Any]) -> str:
    return ", ".join(arrays) or "none of its kind"
