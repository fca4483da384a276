"""Real images: the field's files are read as they are, and prepared as the official code does."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmbook.data import Glyphs, ImageData, Images, inspect, prepare, readers
from cmbook.data.readers import Rows
from cmbook.experiment import dumps, loads, recipe_text

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CMBOOK_CACHE", str(place))
    return place


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **knobs: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **knobs)
    return path


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder: Path, packed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A tiny set in MNIST's four files."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = noise(7, 28, 28), noise(3, 28, 28, seed=1)
    for name, images in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(len(images)))):
            data = idx(array.astype(np.uint8))
            end = ".gz" if packed else ""
            (folder / f"{name}-{kind}-ubyte{end}").write_bytes(
                gzip.compress(data) if packed else data
            )
    return train, test


def as_python_2(batch: dict[bytes, object]) -> bytes:
    return pickle.dumps(batch, protocol=2)


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_pixel_by_pixel(tmp_path, packed):
    train, test = idx_folder(tmp_path, packed)
    data = Images(str(tmp_path)).build()
    assert (data.shape, data.classes, len(data.rows)) == ((1, 28, 28), 10, 7)
    np.testing.assert_array_equal(data.rows[np.arange(7)][:, 0], train)
    torch.testing.assert_close(
        data.held_out().x, torch.from_numpy(test)[:, None].float() / 127.5 - 1
    )
    assert data.held_out().label.tolist() == [0, 1, 2]


def test_an_unpacked_idx_file_is_mapped_not_read(tmp_path):
    idx_folder(tmp_path, packed=False)
    found, _ = readers.find(tmp_path)
    assert isinstance(found.rows.parts[0].base, np.memmap)


def test_cifar_batches_of_any_number_and_length_are_read(tmp_path):
    first, second = noise(5, 3072), noise(2, 3072, seed=1)
    for name, rows in (("data_batch_1", first), ("data_batch_4", second)):
        batch = {b"data": rows, b"labels": [1] * len(rows), b"filenames": [b"x.png"] * len(rows)}
        (tmp_path / name).write_bytes(as_python_2(batch))
    (tmp_path / "batches.meta").write_bytes(as_python_2({b"label_names": [b"airplane", b"car"]}))
    data = Images(str(tmp_path)).build()
    assert (data.shape, data.classes, len(data.rows)) == ((3, 32, 32), 2, 7)
    expected = np.concatenate([first, second]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(data.rows[np.arange(7)], expected)
    np.testing.assert_array_equal(data.rows[np.array([6, 0, 4, 5])], expected[[6, 0, 4, 5]])


class _Marker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker, folder = tmp_path / "was-run", tmp_path / "set"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(as_python_2({b"data": _Marker(marker), b"labels": [0]}))
    with pytest.raises(ValueError, match=r"would call posix.mkdir, which a data file never does"):
        Images(str(folder)).build()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("shape", "seen"),
    [((4, 8, 8, 3), (3, 8, 8)), ((4, 3, 8, 8), (3, 8, 8)), ((4, 8, 8), (1, 8, 8))],
)
@pytest.mark.parametrize("save_arrays", [np.savez, np.savez_compressed])
def test_an_npz_in_any_layout_is_read(tmp_path, shape, seen, save_arrays):
    images, path = noise(*shape), tmp_path / "set.npz"
    save_arrays(path, images, np.array([0, 1, 1, 0]))
    data = Images(str(path)).build()
    assert (data.shape, data.classes) == (seen, 2)
    planes = images.transpose(0, 3, 1, 2) if shape[-1] == 3 else images.reshape(4, *seen)
    np.testing.assert_array_equal(data.rows[np.arange(4)], planes)


def test_the_files_of_down_sampled_imagenet_count_labels_from_one(tmp_path):
    for k in (1, 2):
        images = noise(3, 3 * 16 * 16, seed=k)
        np.savez(tmp_path / f"train_data_batch_{k}.npz", data=images, labels=[1, 2, 1000])
    np.savez(tmp_path / "val_data.npz", data=noise(2, 768), labels=[1, 1])
    data = Images(str(tmp_path)).build()
    assert (data.shape, data.classes, len(data.rows)) == ((3, 16, 16), 1000, 6)
    assert data.rows.label.tolist() == [0, 1, 999] * 2
    assert len(data.held_out().x) == 2


def test_an_npz_that_is_stored_unpacked_stays_on_disk(tmp_path):
    np.savez(tmp_path / "set.npz", noise(4, 8, 8, 3))
    found, _ = readers.find(tmp_path / "set.npz")
    base = found.rows.parts[0]
    while not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_python_objects_in_an_npz_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-run"
    np.savez(tmp_path / "set.npz", arr_0=np.array([_Marker(marker)], object))
    with pytest.raises(ValueError, match="holds Python objects, which are not read"):
        Images(str(tmp_path / "set.npz")).build()
    assert not marker.exists()


def test_a_folder_names_the_class_and_files_keep_their_order(tmp_path):
    pixels = {f"{c}/{i}.png": noise(8, 8, 3, seed=i) for c in ("ant", "bee") for i in range(3)}
    for name, picture in pixels.items():
        save(tmp_path / name, picture)
    data = Images(str(tmp_path)).build()
    assert (data.shape, data.classes, data.rows.classes) == ((3, 8, 8), 2, ("ant", "bee"))
    assert data.rows.label.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.stack(list(pixels.values())).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.rows[np.arange(6)], expected)


def test_in_a_flat_folder_the_file_name_up_to_the_underscore_is_the_class(tmp_path):
    for name in ("cat_1", "cat_2", "dog_1_b"):
        save(tmp_path / f"{name}.png", noise(8, 8))
    assert Images(str(tmp_path)).build().rows.label.tolist() == [0, 0, 1]


def test_a_flat_folder_without_underscores_has_no_classes(tmp_path):
    for name in ("1", "2_b"):
        save(tmp_path / f"{name}.png", noise(8, 8))
    data = Images(str(tmp_path)).build()
    assert data.classes is None
    assert next(data.batches(2, 0)).label is None
    with pytest.raises(ValueError, match="has no classes: put each class into a folder"):
        Images(str(tmp_path), labelled=True).build()


def test_an_archive_gives_what_the_folder_gives(tmp_path):
    files = [
        save(tmp_path / "set" / c / f"{i}.png", noise(8, 8, 3, seed=i))
        for c in "ab"
        for i in (1, 2)
    ]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for file in files:
            packed.write(file, file.relative_to(tmp_path / "set"))
    one, other = (Images(str(tmp_path / name)).build() for name in ("set", "set.zip"))
    assert one.sha256() == other.sha256()
    assert one.rows.label.tolist() == other.rows.label.tolist()


def test_labels_of_an_archive_come_from_its_dataset_json(tmp_path):
    out = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(out, "png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for name in ("00000/img0.png", "00000/img1.png"):
            packed.writestr(name, out.getvalue())
        labels = [["00000/img1.png", 3], ["00000/img0.png", 1]]
        packed.writestr("dataset.json", json.dumps({"labels": labels}))
    assert Images(str(tmp_path / "set.zip")).build().rows.label.tolist() == [1, 3]


def test_a_set_of_the_hub_is_read_by_name(tmp_path):
    pytest.importorskip("datasets")
    for c in ("ant", "bee"):
        for i in range(2):
            save(tmp_path / "set" / "train" / c / f"{i}.png", noise(8, 8, 3, seed=i))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "hub")
    data = Images(f"hf://imagefolder?data_dir={tmp_path / 'set'}").build()
    assert (data.shape, data.classes, data.rows.classes) == ((3, 8, 8), 2, ("ant", "bee"))
    np.testing.assert_array_equal(data.rows[np.array([0])][0], noise(8, 8, 3).transpose(2, 0, 1))


def test_lsun_is_unpacked_picture_by_picture(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    out = io.BytesIO()
    Image.fromarray(noise(12, 10, 3)).save(out, "webp", lossless=True)
    with (
        lmdb.open(str(tmp_path / "db"), map_size=1 << 20) as database,
        database.begin(write=True) as w,
    ):
        for key in ("0a1b", "ffee"):
            w.put(key.encode(), out.getvalue())
    with pytest.raises(ValueError, match=r"unpack it first: cmbook data export-lsun"):
        Images(str(tmp_path / "db")).build()
    assert readers.export_lsun(tmp_path / "db", tmp_path / "out") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0a1b.webp", "ffee.webp"]
    assert Images(str(tmp_path / "out"), size=8).build().shape == (3, 8, 8)


# ---- preparation ---------------------------------------------------------------------------------


def official(picture: Image.Image, size: int) -> np.ndarray:
    """What the ADM paper's data code does, told by its numbers: box, bicubic, crop."""
    w, h = picture.size
    while min(w, h) >= 2 * size:
        w, h = w // 2, h // 2
        picture = picture.resize((w, h), Image.Resampling.BOX)
    w, h = (round(side * size / min(w, h)) for side in (w, h))
    pixels = np.array(picture.resize((w, h), Image.Resampling.BICUBIC))
    return pixels[(h - size) // 2 :][:size, (w - size) // 2 :][:, :size]


@pytest.mark.parametrize("side", [(40, 61), (9, 8), (128, 33), (16, 16), (5, 7)])
def test_pictures_of_any_size_are_prepared_as_officially(tmp_path, side):
    picture = noise(*side, 3)
    save(tmp_path / "a.png", picture)
    data = Images(str(tmp_path), size=8).build()
    expected = official(Image.fromarray(picture), 8)
    np.testing.assert_array_equal(data.rows[np.array([0])][0].transpose(1, 2, 0), expected)


@needs_shared
def test_originals_of_imagenet_become_the_pixels_of_the_64x64_sample():
    originals = Images(str(SHARED / "imagenet-sample-jpeg"), 64, 3, upright=False).build()
    sample, compared = SHARED / "imagenet64-sample", 0
    for i, name in enumerate(originals.rows.classes):
        (file,) = (sample / name).iterdir()
        ours = originals.rows[np.array([i])][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(ours, np.array(Image.open(file)))
        compared += 1
    assert compared == 20


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "mean", "std"),
    [("fashion-mnist", 60_000, 0.28604, 0.35302), ("mnist", 60_000, 0.13066, 0.30811)],
)
def test_the_official_files_have_their_known_mean_and_deviation(name, count, mean, std):
    checked = inspect.check(SHARED / name)
    assert checked.count == count
    assert (checked.mean + 1) / 2 == pytest.approx(mean, abs=1e-5)
    assert checked.std / 2 == pytest.approx(std, abs=1e-5)


@needs_shared
def test_the_official_cifar_batch_has_its_known_classes():
    data = Images(str(SHARED / "cifar-10-batches-py")).build()
    counts = [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert np.bincount(data.rows.label).tolist() == counts
    assert len(data.held_out().x) == 2500


def test_a_photograph_is_turned_upright_unless_told_otherwise(tmp_path):
    picture = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    save(tmp_path / "a.png", picture, exif=exif)
    up, lying = (
        Images(str(tmp_path), upright=u).build().rows[np.array([0])][0] for u in (True, False)
    )
    np.testing.assert_array_equal(lying.transpose(1, 2, 0), picture)
    np.testing.assert_array_equal(up.transpose(1, 2, 0), np.rot90(picture, -1))


def test_transparency_lies_on_white(tmp_path):
    save(tmp_path / "a.png", np.full((8, 8, 4), [10, 20, 30, 0], np.uint8))
    assert (Images(str(tmp_path)).build().rows[np.array([0])] == 255).all()


def test_a_second_build_reads_the_cache_and_no_picture(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(20, 20, seed=i))
    first = Images(str(tmp_path), size=8).build()
    decoded, calls = prepare.decoded, []
    monkeypatch.setattr(prepare, "decoded", lambda *a: calls.append(1) or decoded(*a))
    second = Images(str(tmp_path), size=8).build()
    assert len(calls) == 1  # the first picture, for what kind it is
    assert first.sha256() == second.sha256()
    assert isinstance(second.rows.parts[0], np.memmap)


def test_a_picture_that_changed_is_prepared_again(tmp_path):
    save(tmp_path / "0.png", noise(8, 8))
    before = Images(str(tmp_path)).build().sha256()
    save(tmp_path / "0.png", noise(8, 8, seed=1))
    os.utime(tmp_path / "0.png", ns=(1, 1))
    assert Images(str(tmp_path)).build().sha256() != before


KILLED = """
import os, sys
from cmbook.data import Images, prepare
write, left = prepare._write, [2]
def killed(*a):
    if not left[0]: os._exit(9)
    left[0] -= 1
    write(*a)
prepare._write = killed
Images(sys.argv[1], size=8).build()
"""


def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path, cache, monkeypatch):
    for i in range(5 * prepare.CHUNK // 2):  # three chunks, of which two are written
        save(tmp_path / f"{i:04}.png", noise(10, 10, seed=i))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == 9
    write, written = prepare._write, []
    monkeypatch.setattr(prepare, "_write", lambda *a: written.append(a[1]) or write(*a))
    data = Images(str(tmp_path), size=8).build()
    assert written == [2 * prepare.CHUNK * 64]  # only the last
    for i in (0, 200, len(data.rows) - 1):
        expected = official(Image.fromarray(noise(10, 10, seed=i)), 8)
        np.testing.assert_array_equal(data.rows[np.array([i])][0, 0], expected)


# ---- batches -------------------------------------------------------------------------------------


def rows(n: int = 10, side: int = 4) -> Rows:
    return Rows((noise(n, 1, side, side),), np.arange(n) % 2)


def test_an_epoch_shows_every_image_once_and_batch_k_is_a_function_of_k():
    data = ImageData(rows())
    batches = list(islice(data.batches(5, 0), 4))
    for epoch in (batches[:2], batches[2:]):
        seen = Counter(bytes(x.numpy().tobytes()) for b in epoch for x in b.x)
        assert len(seen) == 10
    again = next(data.batches(5, 0, start=3))
    assert torch.equal(again.x, batches[3].x)
    assert torch.equal(again.label, batches[3].label)


def test_pixels_are_scaled_as_officially():
    data = ImageData(Rows((np.array([[[[0, 255, 51]]]], np.uint8),)))
    assert next(data.batches(1, 0)).x.flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_half_of_the_images_are_mirrored_and_the_same_ones_again():
    stored = Rows((noise(1, 1, 4, 4),))
    plain = torch.from_numpy(stored.parts[0][0]).float() / 127.5 - 1
    batches = [list(islice(ImageData(stored, flip=True).batches(500, 7), 2)) for _ in (1, 2)]
    mirrored = (batches[0][1].x == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(batches[0][1].x == plain).flatten(1).all(1))
    assert 180 < mirrored.sum() < 320
    assert torch.equal(batches[0][1].x, batches[1][1].x)
    assert not torch.equal(batches[0][0].x, batches[0][1].x)


def test_a_share_is_held_out_and_the_rest_is_learned(tmp_path):
    np.savez(tmp_path / "set.npz", noise(40, 4, 4, 3), np.arange(40) % 4)
    data = Images(str(tmp_path / "set.npz"), held_out=0.25).build()
    assert (len(data.rows), len(data.held_out().x)) == (30, 10)
    together = np.concatenate([data.rows[np.arange(30)], data.aside[np.arange(10)]])
    assert len(np.unique(together.reshape(40, -1), axis=0)) == 40


def test_a_limit_takes_the_first_images(tmp_path):
    idx_folder(tmp_path)
    assert len(Images(str(tmp_path), limit=3).build().rows) == 3


@pytest.mark.parametrize("knobs", [{"color": True}, {"size": 16}, {"characters": "0123456789"}])
def test_letters_are_what_their_label_says_and_never_the_same(knobs):
    data = Glyphs(**knobs).build()
    x, label = next(data.batches(400, 0))
    assert x.shape[1:] == data.shape
    assert label.min() >= 0
    assert label.max() < data.classes
    assert len(np.unique(x.flatten(1).numpy(), axis=0)) > 0.8 * len(x)
    assert x.min() >= -1
    assert x.max() <= 1


def test_letters_of_a_class_resemble_their_class():
    """A nearest-mean classifier, which knows nothing of letters, finds most of them."""
    data = Glyphs("ILOXT", size=24).build()
    train, test = data.held_out(), next(data.batches(300, 0))
    means = torch.stack([train.x[train.label == c].mean(0) for c in range(5)]).flatten(1)
    found = torch.cdist(test.x.flatten(1), means).argmin(1)
    assert (found == test.label).float().mean() > 0.6


def test_a_letter_does_not_depend_on_when_it_is_asked_for():
    data = Glyphs().build()
    third = list(islice(data.batches(4, 1), 3))[2]
    assert torch.equal(third.x, next(data.batches(4, 1, start=2)).x)


# ---- bad input -----------------------------------------------------------------------------------


def folder_with(tmp_path: Path, name: str, make) -> str:
    save(tmp_path / "0.png", noise(8, 8, 3))
    make(tmp_path / name)
    return str(tmp_path)


BROKEN = {
    "cut short": lambda p: p.write_bytes((p.parent / "0.png").read_bytes()[:60]),
    "no picture": lambda p: p.write_text("hello"),
    "empty": lambda p: p.write_bytes(b""),
    "16 bits": lambda p: Image.fromarray(noise(8, 8).astype(np.uint16)).save(p),
    "gray": lambda p: save(p, noise(8, 8)),
    "another size": lambda p: save(p, noise(9, 8, 3)),
}
SAYS = {
    "cut short": "1.png is no picture that can be read",
    "no picture": "1.png is no picture that can be read",
    "empty": "1.png is no picture that can be read",
    "16 bits": "1.png has I;16 pixels; save it as a picture of 8-bit colors",
    "gray": "1.png is gray, the first is in color; data.channels = 3 makes all RGB",
    "another size": "1.png is 8x9 pixels, the first is 8x8; data.size = 64",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_picture_that_cannot_be_used_is_named(tmp_path, cache, how):
    path = folder_with(tmp_path, "1.png", BROKEN[how])
    with pytest.raises(ValueError, match="1 of 2 pictures cannot be used") as stop:
        Images(path).build()
    assert SAYS[how] in str(stop.value)
    assert not list(cache.glob("*/finished.json"))


@pytest.mark.parametrize("how", ["cut short", "no picture", "empty", "16 bits"])
def test_check_names_the_broken_file_and_counts_the_others(tmp_path, how):
    checked = inspect.check(folder_with(tmp_path, "1.png", BROKEN[how]))
    assert checked.count == 1
    assert list(checked.broken) == ["1.png"]
    assert " at 0x" not in str(checked)  # of an object in memory, which says nothing


def test_a_broken_file_does_not_count_in_its_class(tmp_path):
    for name in ("cat/0.png", "dog/0.png"):
        save(tmp_path / name, noise(8, 8))
    (tmp_path / "cat/1.png").write_text("hello")
    assert inspect.check(tmp_path).classes == {"cat": 1, "dog": 1}


def test_gray_among_color_and_sizes_can_be_made_alike(tmp_path):
    folder_with(tmp_path, "1.png", BROKEN["gray"])
    folder_with(tmp_path, "2.png", BROKEN["another size"])
    data = Images(str(tmp_path), size=8, channels=3).build()
    assert (data.shape, len(data.rows)) == ((3, 8, 8), 3)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", bytes(readers.LARGEST_FILE + 1))
    with pytest.raises(ValueError, match=r"a.png would unpack to 268 MB"):
        Images(str(tmp_path / "set.zip")).build()


@pytest.mark.parametrize(
    ("side", "says"),
    [((11_000, 10_000), "is 11000x10000 pixels, which is too large"), ((20_000,) * 2, "too many")],
)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side, says):
    Image.new("1", side).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=says):
        Images(str(tmp_path), size=8).build()


def test_an_array_that_would_fill_the_memory_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 32, 32, 3)}
    )
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("arr_0.npy", header.getvalue() + b"few")
    with pytest.raises(ValueError, match="says 30,720,000,000 bytes, the archive 131"):
        Images(str(tmp_path / "set.npz")).build()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist; data.path names a folder of pictures"),
        (lambda p: p.mkdir(), "holds no pictures"),
        (lambda p: p.write_text("x"), "cannot be read as images"),
        (
            lambda p: (save(p / "a" / "1.png", noise(4, 4)), (p / "b").mkdir()),
            "'b' has no pictures",
        ),
        (
            lambda p: (save(p / "a" / "1.png", noise(4, 4)), save(p / "2.png", noise(4, 4))),
            "both in folders and beside them",
        ),
    ],
)
def test_a_path_that_is_no_data_set_says_what_is_wrong(tmp_path, make, says):
    make(tmp_path / "set")
    with pytest.raises(ValueError, match=says):
        Images(str(tmp_path / "set")).build()


@pytest.mark.parametrize("cut", [3, 12, 100])
def test_a_cut_idx_file_is_named(tmp_path, cut):
    idx_folder(tmp_path, packed=False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole idx file"):
        Images(str(tmp_path)).build()


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_or_too_long_idx_file_is_named(tmp_path, packed):
    idx_folder(tmp_path, packed)
    file = next(tmp_path.glob("train-images*"))
    data = bytearray(file.read_bytes())
    if packed:
        data[-6] ^= 1  # in the checksum
    else:
        data += b"more"
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is not a whole idx file"):
        Images(str(tmp_path)).build()


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (np.array([10**12, 0]), "labels must lie in 0"),
        (np.array([-1, 0]), "labels must lie in 0"),
        (np.array([0.5, 1]), "labels must be integers, got float64"),
        (np.array(["a", "b"]), "labels must be integers"),
        (np.array([0]), "expected 2 whole numbers as labels"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, label, says):
    np.savez(tmp_path / "set.npz", noise(2, 4, 4), label)
    with pytest.raises(ValueError, match=says):
        inspect.check(tmp_path / "set.npz")


def test_no_images_are_refused(tmp_path):
    np.savez(tmp_path / "set.npz", noise(0, 4, 4))
    with pytest.raises(ValueError, match="holds no images"):
        inspect.check(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"labels": [["a.png", 1000000000000000000000000000000]]}', "expected 1 whole numbers"),
        ('{"labels": [["b.png", 1]]}', "no label for 'a.png'"),
        ("[" * 100_000, "cannot be read as labels"),
    ],
)
def test_a_dataset_json_that_is_none_is_named(tmp_path, text, says):
    out = io.BytesIO()
    Image.fromarray(noise(4, 4)).save(out, "png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        packed.writestr("a.png", out.getvalue())
        packed.writestr("dataset.json", text)
    with pytest.raises(ValueError, match=says):
        Images(str(tmp_path / "set.zip")).build()


def test_a_damaged_member_of_an_archive_is_named(tmp_path):
    out = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(out, "png")
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for name in ("a.png", "b.png"):
            packed.writestr(name, out.getvalue())
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT", data.index(b"b.png")) + 20] ^= 255
    path.write_bytes(bytes(data))
    assert list(inspect.check(path).broken) == ["b.png"]
    with pytest.raises(ValueError, match=r"1 of 2 pictures cannot be used: b.png"):
        Images(str(path)).build()


@pytest.mark.parametrize("names", [5, ["a"], [b"a"]])
def test_class_names_that_are_none_are_refused(tmp_path, names):
    (tmp_path / "data_batch_1").write_bytes(
        as_python_2({b"data": noise(2, 3072), b"labels": [0, 1]})
    )
    (tmp_path / "batches.meta").write_bytes(as_python_2({b"label_names": names}))
    with pytest.raises(ValueError, match=r"no list of names|larger than the 1 classes"):
        Images(str(tmp_path)).build()


def test_color_of_16_bits_is_named(tmp_path):
    ihdr = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(12) for _ in range(2)))
    chunks = [(b"IHDR", ihdr), (b"IDAT", rows), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(ValueError, match=r"deep.png has 16 bits a color"):
        Images(str(tmp_path)).build()


def test_gray_with_transparency_is_gray(tmp_path):
    save(tmp_path / "0.png", noise(4, 4))
    Image.fromarray(noise(4, 4)).convert("LA").save(tmp_path / "1.png")
    assert Images(str(tmp_path)).build().shape == (1, 4, 4)


def test_folders_that_are_links_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "1.png", noise(4, 4))
    save(tmp_path / "set" / "a" / "1.png", noise(4, 4))
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    assert Images(str(tmp_path / "set")).build().classes == 2


def test_folders_of_equal_names_sizes_and_times_are_told_apart(tmp_path):
    for folder, level in (("one", 1), ("two", 2)):
        save(tmp_path / folder / "0.png", np.full((4, 4), level, np.uint8))
        os.utime(tmp_path / folder / "0.png", ns=(1, 1))
    one, two = (Images(str(tmp_path / folder)).build() for folder in ("one", "two"))
    assert one.sha256() != two.sha256()


def test_the_fingerprint_of_pictures_tells_their_classes(tmp_path):
    for folder, classes in (("one", "ab"), ("two", "ba")):
        for c, level in zip(classes, (1, 2), strict=True):
            save(tmp_path / folder / c / "0.png", np.full((4, 4), level, np.uint8))
    flat = [Images(str(tmp_path / f)).build().rows for f in ("one", "two")]
    first, second = (rows[np.array([0, 1])] for rows in flat)
    np.testing.assert_array_equal(first, second[::-1])
    assert flat[0].sha256() != flat[0].unlabelled().sha256()
    relabelled = replace(flat[0], label=flat[0].label[::-1].copy())
    assert relabelled.sha256() != flat[0].sha256()


@pytest.mark.parametrize("damage", ["images.u8", "finished.json"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, damage):
    save(tmp_path / "0.png", noise(4, 4))
    before = Images(str(tmp_path)).build().sha256()
    next(cache.glob(f"*/{damage}")).write_bytes(b"")
    after = Images(str(tmp_path)).build()
    assert after.sha256() == before
    np.testing.assert_array_equal(after.rows[np.array([0])][0, 0], noise(4, 4))


def test_labels_that_do_not_fit_are_refused(tmp_path):
    idx_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(noise(6))))
    with pytest.raises(ValueError, match=r"images \(7, 28, 28\) but labels \(6,\)"):
        Images(str(tmp_path)).build()


def test_a_full_disk_leaves_no_finished_cache(tmp_path, cache, monkeypatch):
    save(tmp_path / "0.png", noise(8, 8))

    def full(*ignored):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Images(str(tmp_path)).build()
    assert not list(cache.glob("*/finished.json"))
    monkeypatch.undo()
    assert len(Images(str(tmp_path)).build().rows) == 1


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"held_out": 1.0}, "held_out is a share"),
    ],
)
def test_wrong_settings_are_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        Images("x", **knobs)


# ---- check and recipes ---------------------------------------------------------------------------


def test_check_counts_measures_and_advises(tmp_path):
    for c, n in (("few", 1), ("many", 12)):
        for i in range(n):
            save(tmp_path / c / f"{i}.png", np.full((8, 8, 3), 255 * (i % 2), np.uint8))
    checked = inspect.check(tmp_path)
    assert (checked.count, checked.shapes) == (13, {(3, 8, 8): 13})
    assert checked.classes == {"few": 1, "many": 12}
    assert (checked.lowest, checked.highest) == (-1, 1)
    assert checked.std == pytest.approx(float(np.std([-1] * 7 + [1] * 6)))
    told = str(checked)
    assert "'few' has 1" in told
    assert "noise_range.sigma_data=1.00" in told


@pytest.mark.parametrize("name", ["fashion/edm", "fashion/cd", "fashion/ct"])
def test_a_recipe_on_images_is_stored_and_read_back(name):
    recipe = loads(recipe_text(name), ["data.size=16", "data.flip=true"])
    assert loads(dumps(recipe)) == recipe
    assert recipe.data == Images("data/fashion-mnist", 16, flip=True)
