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
    assert "which no door of cmbook knows" in stops(capsys, "convert", "odd.safetensors", "out")
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


# ── what a careful reader found ──


PUBLISHED = {
    "cd_imagenet64_l2": 1.3824, "cd_imagenet64_lpips": 1.3824, "ct_imagenet64": 1.9128,
    "cd_bedroom256_lpips": 4.3656, "cd_bedroom256_l2": 3.5197, "ct_bedroom256": 3.9912,
    "ct_cat256": 5.2485, "cd-l1": 0.5853, "cd-l2": 0.5853, "cd-lpips": 0.5853,
}  # fmt: skip


@pytest.mark.parametrize("name", official.OFFICIAL)
def test_the_second_level_is_the_published_one(name):
    sigmas = official.OFFICIAL[name].sigmas(NoiseRange())
    assert sigmas[1:] == pytest.approx([PUBLISHED[name]] if name in PUBLISHED else [], rel=1e-4)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("weights/cd_imagenet64_l2.pt", "cd_imagenet64_l2"),
        ("somewhere/cd-l2/checkpoints/checkpoint_80", "cd-l2"),
        ("cd-l2/checkpoints/checkpoint_79", None),
        ("cd_imagenet64_teacher.pt", None),
    ],
)
def test_an_official_file_is_known_by_its_own_name_too(path, name):
    assert official.published(path) == official.OFFICIAL.get(name or "")


def test_two_addresses_with_one_last_name_are_two_files(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(official, "fetch", lambda _, folder: folders.append(folder) or folder)
    for place in ("one", "two"):
        official.local(f"https://example.org/{place}/model.pt")
    assert folders[0] != folders[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: torch.full_like(w, float("nan")), "not finite"),
        (lambda w: w.to_sparse(), "must be a dense tensor of real numbers"),
        (lambda w: w.int(), "must be a dense tensor of real numbers"),
        (lambda w: w.cfloat(), "must be a dense tensor of real numbers"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(weights, capsys, change, message):
    weights["out.0.weight"] = change(weights["out.0.weight"])
    torch.save(weights, "cd_imagenet64_l2.pt")
    said = stops(capsys, "convert", "cd_imagenet64_l2.pt", "out", "--head-channels", "16")
    assert message in said


def test_one_tensor_under_two_names_is_no_shortage_of_memory(weights):
    weights["out.0.bias"] = weights["out.0.weight"]
    torch.save(weights, "cd_imagenet64_l2.pt")
    main(["convert", "cd_imagenet64_l2.pt", "out", "--head-channels", "16"])


def test_a_model_does_not_share_weights_with_what_it_was_made_from(weights):
    model = openai.load(weights, scalings=EDMScalings(), head_channels=16)
    before = weights["input_blocks.0.0.weight"].clone()
    model.net.inlet.weight.data.fill_(7)
    assert torch.equal(weights["input_blocks.0.0.weight"], before)


def test_blocks_with_absurd_numbers_do_not_hang(weights):
    weights["output_blocks.1000000000.x"] = torch.ones(1)
    with pytest.raises(ValueError, match="numbered beyond"):
        openai.load(weights, scalings=EDMScalings(), head_channels=16)


def test_what_a_door_does_not_take_is_not_dropped_in_silence(capsys):
    folder = str(GOLDEN / "diffusers_pipeline")
    said = stops(capsys, "convert", folder, "out", "--head-channels", "16")
    assert "tells its head_channels; leave it out" in said
    for size in ("0", "-16"):
        assert "whole numbers in 1" in stops(capsys, "convert", folder, "out", "--image-size", size)


def test_contents_decide_and_not_the_suffix(weights):
    torch.save(weights, "cd_imagenet64_l2")
    knobs = {"scalings": ConsistencyScalings(), "head_channels": 16}
    assert convert.read("cd_imagenet64_l2", **knobs).classes == 10
    Path("link.pt").symlink_to("cd_imagenet64_l2.pt")
    torch.save(weights, "cd_imagenet64_l2.pt")
    assert convert.read("link.pt", head_channels=16).scalings == ConsistencyScalings()


def test_a_folder_of_ours_is_not_converted(weights, capsys):
    torch.save(weights, "cd_imagenet64_l2.pt")
    main(["convert", "cd_imagenet64_l2.pt", "in", "--head-channels", "16"])
    assert "a folder of cmbook already" in stops(capsys, "convert", "in", "out")


def test_a_model_of_time_steps_is_told_time_steps(weights):
    """guided-diffusion's networks, in the scalings of DDPM."""
    scalings = cmbook.IDDPMScalings()
    model = openai.load(weights, scalings=scalings, head_channels=16)
    told = []
    model.net.conditioning.sinusoids.register_forward_hook(
        lambda part, args, out: told.append(part.scale * args[0])
    )
    sigma = torch.tensor([1.0])
    model(torch.ones(1, 3, 16, 16), sigma, torch.tensor([0]))
    assert torch.equal(told[0], scalings.c_noise(sigma))


def test_the_newer_order_of_guided_diffusion_is_taken_as_it_is(weights):
    flat = {
        n: w[..., 0] if n.endswith(("qkv.weight", "proj_out.weight")) else w
        for n, w in weights.items()
    }
    knobs = {"scalings": EDMScalings(), "head_channels": 16}
    as_it_is = openai.read(flat, new_attention_order=True, **knobs).weights
    plain = openai.read(weights, **knobs).weights
    assert all(torch.equal(as_it_is[name], plain[name]) for name in plain)


def test_a_student_cannot_start_as_a_copy_of_a_model_with_another_clock(weights, capsys):
    torch.save(weights, "ddpm.pt")
    convert.convert("ddpm.pt", Path("teacher"), scalings=cmbook.VPScalings(), head_channels=16)
    rng = np.random.default_rng(0)
    np.savez(
        "set.npz", data=rng.integers(0, 256, (20, 768), np.uint8), labels=np.arange(20) % 10 + 1
    )
    Path("cd.toml").write_text(
        """teacher = "teacher"
        data = { kind = "Images", path = "set.npz" }
        objective = { kind = "ConsistencyDistillation", levels = 18 }
        scalings = { kind = "ConsistencyScalings" }
        """,
        encoding="utf-8",
    )
    assert "cannot start as its copy" in stops(capsys, "train", "cd.toml", "--out", "run")


def test_an_interrupted_conversion_leaves_nothing(weights, monkeypatch):
    torch.save(weights, "cd_imagenet64_l2.pt")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cmbook.checkpoints._sealed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.convert("cd_imagenet64_l2.pt", Path("out"), head_channels=16)
    assert sorted(p.name for p in Path().iterdir()) == ["cd_imagenet64_l2.pt"]
