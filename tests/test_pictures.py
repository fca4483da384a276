"""Pictures in files: read, edited from the command line, and refused with a reason."""

import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

from cmbook import load, runs
from cmbook.__main__ import main
from cmbook.editing import Downsampling, Grayscale
from cmbook.noise import PerImage, seeded
from cmbook.pictures import edit_picture, read_picture

MODEL = Path(__file__).parents[1] / "notebooks/weights/tinted"
TINY = ("training.steps=2", "training.batch_size=4", "network={kind='MLP', width=8, depth=2}")


def bomb() -> bytes:
    """A small PNG that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def made():
    """The shared model of tinted digits."""
    return load(MODEL)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with a picture, its gray and small versions, and a mask of the lower half."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(256, (8, 8, 3), generator=seeded(0)).byte().numpy()
    Image.fromarray(pixels).save("digit.png")
    Image.fromarray(pixels).convert("L").save("gray.png")
    Image.fromarray(pixels[::2, ::2]).save("small.png")
    Image.fromarray(pixels[:3, :2]).save("odd.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask * 0).save("black.png")
    Image.fromarray(mask * 0 + 255).save("white.png")
    Path("cut.png").write_bytes(Path("digit.png").read_bytes()[:120])
    Path("bomb.png").write_bytes(bomb())
    Path("words.png").write_text("no picture")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Runs that cannot edit: a diffusion model, a cloud of points; and a gray model."""
    folder = tmp_path_factory.mktemp("others")
    main(["train", "digits/edm", *TINY, "--out", str(folder / "edm")])
    main(["train", "digits/ct", *TINY, "--out", str(folder / "gray")])
    main(["train", "toy/ct", *TINY, "--out", str(folder / "cloud")])
    return folder


# ── reading ──


def test_pixels_become_numbers_from_minus_one_to_one():
    image = read_picture(Path("digit.png"), 3, (8, 8))
    with Image.open("digit.png") as picture:
        pixels = torch.from_numpy(np.array(picture))
    assert torch.equal(((image[0].permute(1, 2, 0) + 1) * 127.5).round().byte(), pixels)
    assert image.shape == (1, 3, 8, 8)


def test_a_color_picture_is_gray_for_a_gray_model_and_transparency_is_paper():
    assert read_picture(Path("digit.png"), 1, (8, 8)).shape == (1, 1, 8, 8)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save("clear.png")
    assert torch.equal(read_picture(Path("clear.png"), 3, (8, 8)), torch.ones(1, 3, 8, 8))


def test_a_large_picture_is_cropped_and_resized_if_asked():
    Image.new("RGB", (40, 20), (255, 255, 255)).save("large.png")
    with pytest.raises(ValueError, match="40x20 pixels, expected 8x8; --fit"):
        read_picture(Path("large.png"), 3, (8, 8))
    image = read_picture(Path("large.png"), 3, (8, 8), fit=True)
    assert torch.allclose(image, torch.ones(1, 3, 8, 8))


def test_sixteen_bit_pixels_are_refused():
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep.png")
    with pytest.raises(ValueError, match="save it as a picture of 8-bit colors"):
        read_picture(Path("deep.png"), 1, (8, 8))


# ── editing: what is known of a picture is kept ──


def edited(made, task, image=None, mask=None, n=3, **knobs):
    label = torch.arange(n) if task != "interpolate" else torch.zeros(n, dtype=torch.int64)
    generator = seeded(0) if task == "interpolate" else PerImage(range(n))
    return edit_picture(
        made, task, image and Path(image), mask and Path(mask), n=n, label=label,
        generator=generator, **knobs,
    )  # fmt: skip


def test_inpainting_keeps_what_the_mask_leaves_black(made):
    found, given = edited(made, "inpaint", "digit.png", "mask.png").results, "digit.png"
    image = read_picture(Path(given), 3, (8, 8))
    assert torch.allclose(found[:, :, :4], image[:, :, :4].expand(3, -1, -1, -1), atol=1e-6)
    assert float((found[:, :, 4:] - image[:, :, 4:]).abs().max()) > 0.1


@pytest.mark.parametrize("image", ["digit.png", "gray.png"])
def test_colorizing_keeps_the_brightness(made, image):
    found, measure = edited(made, "colorize", image), Grayscale()
    expected = measure(read_picture(Path(image), 3, (8, 8))).expand(3, -1, -1, -1)
    assert torch.allclose(measure(found.results), expected, atol=1e-6)
    assert torch.allclose(found.given, expected[:1].expand(-1, 3, -1, -1), atol=1e-6)


def test_a_small_picture_is_the_mean_of_its_patches(made):
    found = edited(made, "superres", "small.png").results
    small = read_picture(Path("small.png"), 3, (4, 4)).expand(3, -1, -1, -1)
    assert torch.allclose(Downsampling(2)(found), small, atol=1e-6)


def test_a_large_picture_is_made_small_first(made):
    found = edited(made, "superres", "digit.png", factor=4).results
    means = Downsampling(4)(read_picture(Path("digit.png"), 3, (8, 8))).expand(3, -1, -1, -1)
    assert torch.allclose(Downsampling(4)(found), means, atol=1e-6)


def test_little_noise_changes_a_stroke_little_and_much_noise_much(made):
    image = read_picture(Path("digit.png"), 3, (8, 8))
    near, far = (
        float((edited(made, "stroke", "digit.png", sigma=s).results - image).square().mean())
        for s in (0.1, 10.0)
    )
    assert near < far / 5


def test_a_stroke_from_little_noise_is_evaluated_within_the_models_range_alone(made):
    """The second of the two levels would lie below sigma_min, where nothing is left to do."""
    told = []
    hook = made.model.register_forward_pre_hook(lambda model, args: told.append(float(args[1][0])))
    edited(made, "stroke", "digit.png", sigma=0.003)
    edited(made, "stroke", "digit.png", sigma=5.38)
    hook.remove()
    assert told == pytest.approx([0.003, 5.38, 2.24])


def test_an_interpolation_has_so_many_pictures_of_one_class(made):
    found = edited(made, "interpolate", n=5).results
    assert found.shape == (5, 3, 8, 8)
    steps = (found[1:] - found[:-1]).flatten(1).norm(dim=1)
    assert float(steps.max()) < float((found[-1] - found[0]).norm())


def test_a_result_does_not_depend_on_how_many_are_made(made):
    three, one = (edited(made, "inpaint", "digit.png", "mask.png", n=n).results for n in (3, 1))
    assert torch.allclose(three[:1], one, atol=1e-5)


# ── the command ──


@pytest.mark.parametrize("task", [
    ["inpaint", "--image", "digit.png", "--mask", "mask.png"], ["colorize", "--image", "gray.png"],
    ["superres", "--image", "small.png"], ["superres", "--image", "digit.png", "--factor", "2"],
    ["stroke", "--image", "digit.png", "--levels", "3"], ["denoise", "--image", "digit.png"],
    ["interpolate"],
], ids=lambda words: words[0] + str(len(words)))  # fmt: skip
def test_every_task_works_from_one_command(capsys, task):
    main(["edit", str(MODEL), "--task", *task, "--n", "3"])
    with Image.open("edited.png") as picture:
        assert picture.size[0] > 100
    assert "edited.png" in capsys.readouterr().out


def test_results_are_saved_as_numbers_in_the_layout_of_the_field():
    main(["edit", str(MODEL), "--task", "colorize", "--image", "gray.png", "--n", "4", "--out",
          "a.npz"])  # fmt: skip
    with np.load("a.npz") as arrays:
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((4, 8, 8, 3), np.uint8)
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3]


def test_known_pixels_of_a_saved_inpainting_are_those_of_the_file():
    """All 256 values, in the known halves of three pictures."""
    known = torch.arange(3 * 4 * 8 * 3) % 256
    for pixels in known.byte().view(3, 4, 8, 3).numpy():
        whole = np.concatenate([pixels, pixels])
        Image.fromarray(whole).save("many.png")
        main(["edit", str(MODEL), "--task", "inpaint", "--image", "many.png", "--mask", "mask.png",
              "--n", "2", "--levels", "2", "--out", "a.npz"])  # fmt: skip
        with np.load("a.npz") as arrays:
            assert (arrays["arr_0"][:, :4] == pixels).all()
            assert not (arrays["arr_0"][:, 4:] == pixels).all()


def test_a_model_is_exported_from_the_command_line(others, capsys):
    main(["export", str(others / "gray"), "given/away"])
    assert "given/away" in capsys.readouterr().out
    assert runs.load("given/away").step == 2


REFUSED = {
    "no picture": (["colorize"], "colorize needs a picture, --image FILE"),
    "no such picture": (["colorize", "--image", "none.png"], "none.png"),
    "words": (["colorize", "--image", "words.png"], "is no picture that can be read"),
    "words, small": (["superres", "--image", "words.png"], "is no picture that can be read"),
    "wrong size": (["stroke", "--image", "small.png"], "4x4 pixels, expected 8x8; --fit"),
    "odd size": (["superres", "--image", "odd.png"], "must be 1/2, 1/4, ... of 8x8"),
    "words as a mask": (
        ["inpaint", "--image", "digit.png", "--mask", "words.png"], "words.png is no picture"
    ),
    "cut": (["colorize", "--image", "cut.png"], "cut.png is no picture that can be read"),
    "cut, small": (["superres", "--image", "cut.png"], "cut.png is no picture that can be read"),
    "a bomb": (["superres", "--image", "bomb.png"], "bomb.png "),
    "not small": (["superres", "--image", "digit.png"], "say --factor 2"),
    "small already": (
        ["superres", "--image", "small.png", "--factor", "2"], "small already; leave out --factor"
    ),
    "small, fitted": (["superres", "--image", "small.png", "--fit"], "leave out --fit, or say"),
    "factor that does not tile": (
        ["superres", "--image", "digit.png", "--factor", "3"], "do not tile"
    ),
    "no mask": (["inpaint", "--image", "digit.png"], "needs a mask, --mask FILE"),
    "a mask too many": (
        ["colorize", "--image", "digit.png", "--mask", "mask.png"], "leave out --mask"
    ),
    "everything known": (
        ["inpaint", "--image", "digit.png", "--mask", "black.png"],
        "black.png is all black; a mask is white where to fill in",
    ),
    "nothing known": (
        ["inpaint", "--image", "digit.png", "--mask", "white.png"], "white.png is all white"
    ),
    "sigma of another task": (
        ["colorize", "--image", "digit.png", "--sigma", "1"], "--sigma is for denoise and stroke"
    ),
    **{
        f"{task} from {sigma}": (
            [task, "--image", "digit.png", "--sigma", sigma],
            f"above 0.002 and up to 20; got {sigma}",
        )
        for task in ("denoise", "stroke") for sigma in ("0", "0.001", "-1", "nan", "99")
    },
    "levels of another task": (["denoise", "--image", "digit.png", "--levels", "3"], "--levels"),
    "a picture too many": (["interpolate", "--image", "digit.png"], "leave out --image"),
    "fitting nothing": (["interpolate", "--fit"], "reads no picture; leave out --fit"),
    "one step": (["interpolate", "--n", "1"], "--n must be at least 2, the two ends; got 1"),
    "no class": (["colorize", "--image", "digit.png", "--label", "10"], "0 ... 9; got 10"),
    "no results": (["colorize", "--image", "digit.png", "--n", "0"], "--n must be at least 1"),
    "another format": (["colorize", "--image", "digit.png", "--out", "a.jpg"], "--out must end"),
}  # fmt: skip


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert (stop.value.code, last.startswith("cmbook: ")) == (1, True), last
    return last


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_ends_with_one_clear_sentence(capsys, case):
    arguments, words = REFUSED[case]
    assert words in refused(capsys, ["edit", str(MODEL), "--task", *arguments])


@pytest.mark.parametrize(
    ("run", "task", "words"),
    [
        ("edm", "denoise", "is a diffusion model; editing needs a consistency model"),
        ("gray", "colorize", "colorize needs a model of 3 channels"),
        ("cloud", "denoise", "which are no pictures"),
    ],
)
def test_a_model_that_cannot_edit_is_refused(capsys, others, run, task, words):
    arguments = ["edit", str(others / run), "--task", task, "--image", "digit.png"]
    assert words in refused(capsys, arguments)
