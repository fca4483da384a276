"""From a file of somebody else to samples, on the command line and in Python."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import cmbook
from cmbook.__main__ import main
from cmbook.data.fetch import Remote
from cmbook.interop import convert, official, openai
from cmbook.noise import NoiseRange, PerImage
from cmbook.parameterization import ConsistencyScalings, EDMScalings
from cmbook.samplers import multistep, prior


@pytest.fixture
def weights():
    """Those of a small official U-Net: 16x16, ten classes, heads of 16 channels."""
    stored = load_file(GOLDEN / "unet_A_weights.safetensors")
    return {name: weight.float() for name, weight in stored.items()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMBOOK_CACHE", str(tmp_path / "cache"))


def stops(capsys, *arguments: str) -> str:
    """The one line that a refused command says."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "Traceback" not in said
    return said


def test_an_official_file_is_converted_and_sampled_from(weights):
    torch.save(weights, "cd_imagenet64_l2.pt")
    main(["convert", "cd_imagenet64_l2.pt", "models/in", "--head-channels", "16"])
    main(["sample", "models/in", "--label", "7", "--n", "3", "--steps", "2", "--out", "x.npz"])
    with np.load("x.npz") as drawn:
        images, labels = drawn["arr_0"], drawn["arr_1"]
    assert (images.shape, labels.tolist()) == ((3, 16, 16, 3), [7, 7, 7])

    model = openai.load("cd_imagenet64_l2.pt", head_channels=16)
    draws, noise_range = PerImage(range(3)), NoiseRange()
    x = prior(torch.empty(3, 3, 16, 16), noise_range, draws)
    second = noise_range.grid(40)[22]  # the official `--ts 0,22,39 --steps 40`
    levels = torch.tensor([80.0, second], dtype=torch.float64)
    seven = torch.full((3,), 7)
    own = multistep(model, x, levels, seven, noise_range=noise_range, generator=draws)
    pixels = ((own + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels - images).max() <= 1  # the last bit of a batch of another size


def test_the_folder_holds_the_very_weights_and_where_they_came_from(weights):
    torch.save(weights, "ct_imagenet64.pt")
    convert.convert("ct_imagenet64.pt", Path("ct"), head_channels=16)
    made = cmbook.load("ct")
    assert made.record["origin"] == "ct_imagenet64.pt"
    assert made.recipe.sampling.sigmas == pytest.approx((80.0, 1.9128), rel=1e-4)
    assert isinstance(made.recipe.scalings, ConsistencyScalings)
    back = openai.export(made.model, made.recipe.network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_teacher_is_a_diffusion_model_and_is_walked_as_published(weights):
    torch.save(weights, "edm_imagenet64_ema.pt")
    convert.convert("edm_imagenet64_ema.pt", Path("edm"), head_channels=16)
    recipe = cmbook.load("edm").recipe
    assert isinstance(recipe.scalings, EDMScalings)
    assert recipe.sampling.levels == 40


def test_a_student_may_be_distilled_from_a_converted_teacher(weights, tmp_path):
    torch.save(weights, "edm_imagenet64_ema.pt")
    convert.convert("edm_imagenet64_ema.pt", Path("edm"), head_channels=16)
    rng = np.random.default_rng(0)
    np.savez(
        "faces.npz",
        data=rng.integers(0, 256, (40, 3 * 256), np.uint8),
        labels=np.arange(1, 41) % 10 + 1,
    )
    Path("cd.toml").write_text(
        """teacher = "edm"
        data = { kind = "Images", path = "faces.npz" }
        objective = { kind = "ConsistencyDistillation", levels = 18 }
        scalings = { kind = "ConsistencyScalings" }
        training = { steps = 1, batch_size = 2 }
        """,
        encoding="utf-8",
    )
    main(["train", "cd.toml", "--out", "run"])
    assert cmbook.load("run").recipe.network == cmbook.load("edm").recipe.network


def test_bare_tensors_find_their_door(weights):
    save_file(weights, "x.safetensors")
    knobs = {"scalings": ConsistencyScalings(), "head_channels": 16}
    assert convert.read("x.safetensors", **knobs).network.channels == 32


def test_a_url_is_fetched_into_the_cache_once(weights, monkeypatch):
    fetched = []

    def fetch(remote: Remote, folder: Path, **_: object) -> Path:
        fetched.append((remote.urls, folder))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, folder / remote.name)
        return folder / remote.name

    monkeypatch.setattr(official, "fetch", fetch)
    model = openai.load(f"{official.STORE}/cd_imagenet64_l2.pt", head_channels=16)
    assert isinstance(model.scalings, ConsistencyScalings)
    assert fetched == [((f"{official.STORE}/cd_imagenet64_l2.pt",), Path.cwd() / "cache/weights")]


def test_get_lists_and_fetches(capsys, tmp_path, monkeypatch):
    main(["get"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(official.OFFICIAL) == 27
    (tmp_path / "there").write_bytes(b"weights")
    near = official.Official("near", Remote("near.pt", ((tmp_path / "there").as_uri(),), None))
    monkeypatch.setitem(official.OFFICIAL, "near", near)
    main(["get", "near"])
    assert Path("weights/near.pt").read_bytes() == b"weights"
    assert "did you mean 'cd_imagenet64_l2'" in stops(capsys, "get", "cd_imagnet64_l2")


@pytest.mark.parametrize("entry", official.OFFICIAL.values(), ids=list(official.OFFICIAL))
def test_every_official_entry_is_whole(entry):
    sigmas = entry.sigmas(NoiseRange())
    assert sigmas[0] == pytest.approx(80.0)
    assert entry.second is None or 0.1 < sigmas[1] < 10
    assert all(url.startswith("https://") for url in entry.remote.urls)


def test_what_cannot_be_converted_is_said_in_one_line(capsys, weights):
    assert "nothing at" in stops(capsys, "convert", "missing.pt", "out")
    Path("words.pt").write_text("no weights", encoding="utf-8")
    assert "no file that PyTorch saved" in stops(capsys, "convert", "words.pt", "out")
    torch.save(weights, "model000.pt")
    said = stops(capsys, "convert", "model000.pt", "out", "--head-channels", "16")
    assert "--kind" in said
    torch.save(weights, "cd_imagenet64_l2.pt")
    assert "heads of head_channels = 64" in stops(capsys, "convert", "cd_imagenet64_l2.pt", "out")
    save_file({"a": torch.ones(1)}, "odd.safetensors")
    assert "no door fits" in stops(capsys, "convert", "odd.safetensors", "out")
    Path("short.safetensors").write_bytes(b"12")
    assert "no safetensors file" in stops(capsys, "convert", "short.safetensors", "out")
    assert not Path("out").exists()
    Path("mine").mkdir()
    said = stops(capsys, "convert", "cd_imagenet64_l2.pt", "mine", "--head-channels", "16")
    assert "mine exists already" in said


def test_the_kind_is_told_where_the_name_does_not(weights):
    torch.save(weights, "model000.pt")
    told = ["--kind", "consistency", "--head-channels", "16"]
    main(["convert", "model000.pt", "out", *told])
    assert cmbook.load("out").recipe.sampling.sigmas == pytest.approx((80.0, 1.3824), rel=1e-4)


def test_a_wrong_label_and_too_many_steps_are_said_in_one_line(capsys, weights):
    torch.save(weights, "cd_imagenet64_l2.pt")
    main(["convert", "cd_imagenet64_l2.pt", "in", "--head-channels", "16"])
    capsys.readouterr()
    assert "0 ... 9" in stops(capsys, "sample", "in", "--label", "10")
    assert "3 steps were asked for" in stops(capsys, "sample", "in", "--steps", "3")


def test_samples_do_not_depend_on_how_many_are_drawn_at_a_time(weights, monkeypatch):
    torch.save(weights, "cd_imagenet64_l2.pt")
    main(["convert", "cd_imagenet64_l2.pt", "in", "--head-channels", "16"])
    main(["sample", "in", "--n", "5", "--out", "together.npz"])
    monkeypatch.setattr("cmbook.__main__.BATCH", 2 * 3 * 16 * 16)
    main(["sample", "in", "--n", "5", "--out", "apart.npz"])
    with np.load("together.npz") as one, np.load("apart.npz") as other:
        assert np.abs(one["arr_0"].astype(int) - other["arr_0"]).max() <= 1
        assert (one["arr_1"] == other["arr_1"]).all()
