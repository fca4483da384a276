"""The command line: what it makes, what it refuses, and what survives a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmbook
from cmbook.__main__ import main
from cmbook.checkpoints import checkpoints
from cmbook.data import Images
from cmbook.experiment import recipe_text, recipes
from cmbook.features import GlyphNet, extract
from cmbook.references import load_statistics
from cmbook.runs import students

RING = """# A small ring.
data = { kind = "Toy" }
network = { kind = "MLP", width = 16, depth = 2 }
scalings = { kind = "ConsistencyScalings" }
[noise_range]
sigma_max = 10.0
[objective]
kind = "ConsistencyTraining"
curriculum = { kind = "AdaptiveLevels", start = 2, end = 8 }
[training]
steps = 4
batch_size = 8
optimizer = { kind = "Adam" }
save_every = 2
[sampling]
sigmas = [10.0, 1.0]
"""
TINY = ("training.steps=2", "training.batch_size=4", "network={kind='MLP', width=8, depth=2}")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test starts in an empty folder with one recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMBOOK_CACHE", str(tmp_path / "cache"))
    Path("ring.toml").write_text(RING, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on the ring and one on labelled digits."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "ring.toml").write_text(RING, encoding="utf-8")
    main(["train", str(folder / "ring.toml"), "--out", str(folder / "ring")])
    main(["train", "digits/edm", *TINY, "--out", str(folder / "digits")])
    return folder


# what it makes


def test_train_says_what_to_do_next(capsys):
    main(["train", "ring.toml"])
    assert "cmbook sample runs/ring" in capsys.readouterr().out


def test_the_bar_shows_loss_and_steps_per_second(capsys):
    main(["train", "ring.toml"])
    shown = capsys.readouterr().err
    assert ("loss" in shown, "step/s" in shown) == (True, True)


def test_a_setting_on_the_command_line_counts():
    main(["train", "ring.toml", "training.steps=2"])
    assert [path.name for path in checkpoints(Path("runs/ring/checkpoints"))] == ["step-00000002"]


def test_configs_lists_every_recipe_with_its_first_line(capsys):
    main(["configs"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == recipes()


def test_configs_prints_one_recipe_that_can_be_used_as_a_file(capsys):
    main(["configs", "digits/cd"])
    assert capsys.readouterr().out == recipe_text("digits/cd")


def test_points_are_saved_as_numbers(runs):
    main(["sample", str(runs / "ring"), "--n", "5", "--steps", "2", "--out", "new/points.npz"])
    with np.load("new/points.npz") as arrays:
        assert (arrays.files, arrays["arr_0"].shape) == (["arr_0"], (5, 2))


def test_images_are_saved_as_bytes_with_channels_last_and_labels(runs):
    main(["sample", str(runs / "digits"), "--n", "12", "--steps", "2", "--out", "digits.npz"])
    with np.load("digits.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (12, 8, 8, 1))
    assert labels.tolist() == [*range(10), 0, 1]


def test_one_class_can_be_asked_for(runs):
    digits = str(runs / "digits")
    main(["sample", digits, "--n", "3", "--steps", "2", "--label", "7", "--out", "a.npz"])
    with np.load("a.npz") as arrays:
        assert arrays["arr_1"].tolist() == [7, 7, 7]


def test_a_sample_depends_on_its_seed_alone(runs):
    ring = str(runs / "ring")
    main(["sample", ring, "--n", "10", "--seed", "5", "--out", "many.npz"])
    main(["sample", ring, "--n", "1", "--seed", "8", "--out", "one.npz"])
    with np.load("many.npz") as many, np.load("one.npz") as one:
        np.testing.assert_allclose(many["arr_0"][3:4], one["arr_0"], atol=1e-5)


@pytest.mark.parametrize("name", ["ring", "digits"])
def test_a_run_is_measured(runs, name, capsys):
    features = ["--features", "pixels", "--rounds", "2"]
    main(["evaluate", str(runs / name), "--n", "30", "--steps", "2", *features, "--out", "new"])
    assert "real data" in capsys.readouterr().out
    assert sorted(path.name for path in Path("new").iterdir()) == ["report.json", "samples.npz"]


def test_inception_without_its_file_says_where_to_get_it(runs, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "evaluate",
                str(runs / "digits"),
                "--n",
                "20",
                "--steps",
                "2",
                "--features",
                "inception",
            ]
        )
    assert "put it there from https://" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ring", "digits"])
def test_samples_are_drawn_as_a_picture(runs, name):
    main(["sample", str(runs / name), "--n", "3", "--steps", "2", "--out", "a.png"])
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["train"], ["sample"], ["edit"], ["export"], ["configs"], ["notebooks"]],
)
def test_every_command_has_help_without_words_of_programmers(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert (stop.value.code, "dataclass" in shown, len(shown) > 200) == (0, False, True)


@pytest.mark.parametrize("arguments", [[], ["trainer"], ["train"], ["sample", "x", "--n", "many"]])
def test_a_wrong_usage_ends_with_code_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_one_of_several_averages_can_be_sampled_and_exported():
    main(["train", "ring.toml", "training.also_average=[0.0]"])
    for average in ("0.9999", "0.0"):
        main(["sample", "runs/ring", "--average", average, "--out", f"{average}.npz"])
    main(["export", "runs/ring", "alone", "--average", "0.0"])
    main(["sample", "alone", "--out", "alone.npz"])
    drawn = [np.load(f"{name}.npz")["arr_0"] for name in ("0.9999", "0.0", "alone")]
    assert not np.allclose(drawn[0], drawn[1])
    assert np.array_equal(drawn[1], drawn[2])


def test_a_training_can_be_followed_on_tensorboard():
    pytest.importorskip("tensorboard")
    main(["train", "ring.toml", "--tensorboard"])
    assert list(Path("runs/ring/tensorboard").glob("events.*"))


# what comes with it


@pytest.mark.parametrize("name", students())
def test_a_student_of_the_package_draws_at_once(capsys, name):
    main(["sample", name, "--n", "4", "--steps", "2", "--out", "a.png"])
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""


def test_a_student_of_the_package_is_still_found_after_it_was_measured():
    main(["evaluate", "digits/cd", "--n", "20", "--features", "pixels", "--rounds", "0"])
    assert Path("evaluation/report.json").is_file()
    main(["sample", "digits/cd", "--n", "4", "--out", "a.png"])
    assert Path("a.png").is_file()


def test_a_run_of_the_user_comes_before_a_student_of_the_package(runs):
    Path("digits").mkdir()
    main(["export", str(runs / "ring"), "digits/cd"])
    main(["sample", "digits/cd", "--n", "5", "--out", "a.npz"])
    with np.load("a.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 2)


def test_who_may_have_meant_their_own_run_is_told_where_it_is(capsys):
    Path("runs/digits/cd").mkdir(parents=True)
    main(["sample", "digits/cd", "--n", "2", "--out", "a.npz"])
    told = "digits/cd is the student that comes with cmbook; your run is runs/digits/cd\n"
    assert capsys.readouterr().err == told


def test_the_book_is_copied_whole(capsys):
    main(["notebooks", "my book"])
    assert capsys.readouterr().out.splitlines()[-1] == "jupyter lab 'my book'"
    source = Path(cmbook.__file__).parents[1] / "notebooks"
    for path in [*source.glob("*.ipynb"), *source.glob("weights/*/*")]:
        copy = Path("my book", path.relative_to(source))
        assert copy.read_bytes() == path.read_bytes()


def test_what_a_reader_wrote_in_a_notebook_is_not_lost(capsys):
    main(["notebooks", "book"])
    mine = next(Path("book").glob("07_*.ipynb"))
    whole = mine.read_bytes()
    for other in Path("book").glob("*.ipynb"):
        other.write_text("mine") if other == mine else other.unlink()
    with pytest.raises(SystemExit):
        main(["notebooks", "book"])
    assert f"{mine} is already there; --overwrite replaces it" in capsys.readouterr().err
    assert (mine.read_text(), len([*Path("book").glob("*.ipynb")])) == ("mine", 1)
    main(["notebooks", "book", "--overwrite"])
    assert mine.read_bytes() == whole


# what it refuses, in one sentence

REFUSED = {
    "unknown setting": (
        ["train", "ring.toml", "objective.curriclum.end=3"],
        "objective.curriclum is not a setting; did you mean 'curriculum'?",
    ),
    "unknown kind": (["train", "ring.toml", "network.kind=MLPP"], "did you mean 'MLP'?"),
    "unknown recipe": (["train", "digits/emd"], "did you mean 'digits/edm'?"),
    "wrong type": (["train", "ring.toml", "training.steps=many"], "must be of type int"),
    "no network for this data": (
        ["train", "ring.toml", "network={kind='UNet'}"], "needs images"
    ),
    "negative width": (["train", "ring.toml", "network.width=-1"], "width"),
    "width beyond memory": (["train", "ring.toml", "network.width=100000000000"], "width"),
    "batch beyond memory": (
        ["train", "ring.toml", "training.batch_size=10000000000000"], "at most 1,000,000"
    ),
    "sigmas that rise": (["train", "ring.toml", "sampling.sigmas=[1, 10]"], "must decrease"),
    "missing teacher": (
        ["train", "digits/cd"], "make it first: cmbook train digits/edm"
    ),
    "folder is a file": (["train", "ring.toml", "--out", "ring.toml"], "ring.toml is a file"),
    "folder below a file": (["train", "ring.toml", "--out", "ring.toml/x"], "ring.toml/x"),
    "nothing to resume": (["train", "ring.toml", "--resume"], "leave out --resume"),
    "no such device": (["train", "ring.toml", "--device", "gpu"], "no device 'gpu' here"),
    "device without numbers": (["train", "ring.toml", "--device", "meta"], "no device 'meta'"),
    "no tensorboard": (
        ["train", "ring.toml", "--tensorboard"], "pip install 'cmbook[tensorboard]'"
    ),
    "unknown average": (["sample", "RING", "--average", "0.9"], "of decay 0.9999; got 0.9"),
    "notebooks into a file": (["notebooks", "ring.toml"], "ring.toml"),
    "no run": (["sample", "nowhere"], "there is no run with a checkpoint in nowhere"),
    "no samples": (["sample", "RING", "--n", "0"], "--n must be at least 1; got 0"),
    "label without classes": (["sample", "RING", "--label", "1"], "leave out --label"),
    "label out of range": (["sample", "DIGITS", "--label", "10"], "0 ... 9; got 10"),
    "negative label": (["sample", "DIGITS", "--label", "-1"], "0 ... 9; got -1"),
    "more steps than levels": (["sample", "RING", "--steps", "9"], "9 steps were asked for"),
    "too short a grid": (["sample", "DIGITS", "--steps", "1"], "at least 2 levels"),
    "huge seed": (["sample", "RING", "--seed", "9" * 30], "--seed must lie in 0"),
    "unknown picture": (["sample", "RING", "--out", "a.gif"], "must end in .png or .npz"),
    "picture is a folder": (["sample", "RING", "--out", "folder.png"], "is a folder"),
    "picture below a file": (["sample", "RING", "--out", "ring.toml/a.npz"], "ring.toml"),
    "unknown recipe to print": (["configs", "digits/edmm"], "did you mean 'digits/edm'?"),
    "wrong demo setting": (["demo", "--set", "training.stesp=3"], "did you mean 'steps'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_ends_with_one_clear_sentence_and_code_1(capsys, runs, case, monkeypatch):
    arguments, message = REFUSED[case]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Path("folder.png").mkdir()
    folders = {"RING": str(runs / "ring"), "DIGITS": str(runs / "digits")}
    with pytest.raises(SystemExit) as stop:
        main([folders.get(argument, argument) for argument in arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert (stop.value.code, last.startswith("cmbook: "), message in last) == (1, True, True), last


def test_a_folder_that_holds_a_run_is_refused(capsys):
    main(["train", "ring.toml"])
    with pytest.raises(SystemExit):
        main(["train", "ring.toml"])
    assert "cmbook: runs/ring already holds a run; --resume" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(capsys):
    main(["train", "ring.toml"])
    path = Path("runs/ring/checkpoints/step-00000004/average.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit):
        main(["sample", "runs/ring"])
    assert f"cmbook: {path} is not what was saved" in capsys.readouterr().err


def test_folders_may_have_any_name(capsys):
    folder = "ün ïcode/数字 and spaces"
    main(["train", "ring.toml", "--out", folder])
    main(["sample", folder, "--n", "2", "--out", f"{folder}/bild ü.png"])
    assert Path(folder, "bild ü.png").exists()


# what survives a kill


LONG = ["ring.toml", "training.steps=150", "training.save_every=10", "training.average_decay=0.9"]


def numbers(run):
    """The weights, the average, the target and the optimizer of a run's last checkpoint."""
    last = checkpoints(run / "checkpoints")[-1]
    found = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    state = torch.load(last / "state.pt", weights_only=True)
    moments = [
        m.numpy().tobytes() for s in state["optimizer"]["state"].values() for m in s.values()
    ]
    return last.name, found, moments


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "ring.toml").write_text(RING, encoding="utf-8")
    main(["train", str(folder / "ring.toml"), *LONG[1:], "--out", str(folder / "run")])
    return numbers(folder / "run")


def interrupted(number):
    """The exit code and stderr of a real training that got a signal after its first checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = str(Path(cmbook.__file__).parents[1])
    command = [sys.executable, "-m", "cmbook", "train", *LONG, "--out", "run"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as training:
        while not checkpoints(Path("run/checkpoints")) and training.poll() is None:
            time.sleep(0.01)
        training.send_signal(number)
        _, shown = training.communicate(timeout=120)
    return training.returncode, shown


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, 130, "cmbook: stopped after step"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
    ids=["ctrl-c", "kill -9"],
)
def test_a_stopped_training_resumes_to_the_same_bits(undisturbed, number, code, sentence):
    found, shown = interrupted(number)
    assert (found, sentence in shown, "Traceback" in shown) == (code, True, False), shown
    assert numbers(Path("run"))[0] < "step-00000150"
    main(["train", *LONG, "--out", "run", "--resume"])
    assert numbers(Path("run")) == undisturbed


# data


def pictures(folder: Path, n: int = 12) -> Path:
    """A user's own pictures: two classes, of many sizes."""
    for i in range(n):
        place = folder / ("bright" if i % 2 else "dark") / f"photo {i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (200 * (i % 2), 30, 40)).save(place)
    return folder


def test_check_prints_what_is_there_and_draws_a_sheet(capsys):
    main(["data", "check", str(pictures(Path("my pictures"))), "--size", "8", "--sheet", "s.png"])
    printed = capsys.readouterr().out
    assert "images   12: 12 of 8x8 RGB" in printed
    assert "classes  2: bright 6, dark 6" in printed
    with Image.open("s.png") as sheet:
        assert sheet.size[0] > 100


def test_check_names_a_broken_file_and_exits_with_one(capsys):
    (pictures(Path("set")) / "dark" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "set"])
    assert stop.value.code == 1
    assert "broken   dark/bad.png is no picture" in capsys.readouterr().out


def test_one_command_trains_on_a_folder_of_pictures_and_another_draws():
    knobs = ["training.steps=2", "training.batch_size=4", "data.size=8", "data.channels=1"]
    main(["train", "fashion/ct", f"data.path={pictures(Path('set'))}", *knobs, "--out", "mine"])
    main(["sample", "mine", "--n", "6", "--out", "mine.png"])
    assert Path("mine.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere"], "nowhere does not exist; data.path names"),
        (["get", "fashion"], "no data set 'fashion' to fetch; known: fashion-mnist"),
        (["export-lsun", "here", "there"], "here holds no data.mdb"),
        (["check", "set", "--sheet", "s.png"], "--sheet needs --size"),
        (["check", "set", "--sheet", "s.gif"], "must end in .png or .npz"),
    ],
)
def test_data_commands_say_what_is_wrong(arguments, says, capsys):
    pictures(Path("set"))
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    assert stop.value.code == 1
    assert says in capsys.readouterr().err


def test_reference_statistics_of_a_folder_say_where_they_come_from():
    pictures(Path("set"), 30)
    main(["data", "reference", "set", "ref.npz", "--size", "16", "--features", "glyphnet"])
    statistics = load_statistics(Path("ref.npz"))
    told = statistics.provenance
    assert (told.data, told.images, told.size) == ("set", 30, (3, 16, 16))
    assert (told.preprocessing, told.extractor) == ("ADM center crop, upright", "glyphnet")
    seen = extract(GlyphNet(), Images("set", 16).build().in_order(7)).features.double()
    near = {"atol": 1e-4, "rtol": 1e-4}  # features of another batch size differ in float32
    torch.testing.assert_close(statistics.moments.mean, seen.mean(0), **near)
    torch.testing.assert_close(statistics.moments.covariance, seen.T.cov(), **near)
