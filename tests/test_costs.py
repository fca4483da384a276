"""What `cmbook estimate` says: products counted by hand, memory that balances, every recipe."""

import json
import math
from functools import cache

import pytest
import torch
from torch import nn

from cmbook import costs, estimate
from cmbook.__main__ import main
from cmbook.costs import HARDWARE, META, Hardware, Ledger, report
from cmbook.experiment import Experiment, loads, recipe_text, recipes
from cmbook.networks import MLP
from cmbook.parameterization import Preconditioned
from cmbook.training import train

SMALL = """
data = { kind = "Glyphs", characters = "AB", size = 16, labelled = false }
scalings = { kind = "ConsistencyScalings" }
objective = { kind = "ConsistencyTraining", distance = { kind = "L2" } }
network = { kind = "UNet", channels = 32 }
training = { batch_size = 64, steps = 10 }
"""
NO_NETWORK = SMALL.replace('network = { kind = "UNet", channels = 32 }', "")


def small(*overrides: str) -> Experiment:
    return loads(SMALL, list(overrides))


def taught(objective: str, *overrides: str) -> Experiment:
    return small(f"objective.kind={objective}", "teacher=runs/none", *overrides)


def multiplications(net: nn.Module, x: torch.Tensor) -> int:
    """Of one forward pass, by the formulas of convolutions, layers and attention."""
    found = 0

    def count(layer, inputs, out):
        nonlocal found
        each = layer.weight[0].numel()
        found += each * out.numel()

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v):
        nonlocal found
        found += 2 * q.numel() * k.shape[-2]
        return real(q, k, v)

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        net(x, torch.ones(len(x)))
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    return found


def test_a_forward_pass_is_every_product_of_the_network():
    recipe = small()
    found = estimate(recipe)
    net = recipe.network.build(found.shape)
    assert found.flops_forward == 2 * multiplications(net, torch.zeros(1, *found.shape))
    assert found.parameters == sum(p.numel() for p in net.parameters())


def test_a_step_is_its_evaluations():
    """Forward and backward of the student are 3 forwards, less what the first layer saves."""
    forward = estimate(small()).flops_forward
    rounds = {
        "ct: target": (small(), 3 + 1),
        "cd: target, and Heun's two of the teacher": (taught("ConsistencyDistillation"), 3 + 3),
        "Euler's one": (taught("ConsistencyDistillation", "objective.solver=euler"), 3 + 2),
        "no target of its own": (taught("ConsistencyDistillation", "objective.decay=0"), 3 + 3),
    }
    for what, (recipe, expected) in rounds.items():
        assert estimate(recipe).flops_step / forward == pytest.approx(expected, rel=0.02), what


def test_a_guided_teacher_is_asked_twice():
    labelled = ["data.labelled=true", "network.label_dropout=0.1"]
    plain = estimate(taught("ConsistencyDistillation", *labelled))
    guided = estimate(taught("ConsistencyDistillation", *labelled, "guidance=2"))
    extra = guided.flops_step - plain.flops_step
    assert extra == 2 * plain.flops_forward


def test_progressive_distillation_counts_all_its_rounds():
    recipe = loads(recipe_text("toy/progressive"))
    assert len(recipe.objective.rounds) > 1
    found = estimate(recipe)
    assert found.steps == len(recipe.objective.rounds) * recipe.training.steps


TRUNKS = {"vgg": 15.35e9, "alex": 0.656e9}  # multiplications of an image of 224x224


@pytest.mark.parametrize("net", TRUNKS)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_lpips_is_counted_without_its_weights(net, pooling):
    sizes = ["data.size=16"]
    plain = estimate(small(*sizes))
    knobs = ("kind=LPIPS", f"net={net}", f"pooling={pooling}")
    perceived = estimate(small(*sizes, *(f"objective.distance.{knob}" for knob in knobs)))
    trunk = 2 * TRUNKS[net]  # of one image, forward
    # both images forward; back through the prediction's, to the image and no weight
    assert perceived.flops_step - plain.flops_step == pytest.approx(3 * trunk, rel=0.01)


def test_memory_is_every_copy_of_the_weights():
    weights = 4 * estimate(small()).parameters
    training = estimate(small()).memory
    assert training["student"] == training["averages"] == training["target"] == weights
    assert training["optimizer"] == 2 * weights
    assert training["teacher"] == 0
    distilled = estimate(taught("ConsistencyDistillation")).memory
    assert distilled["teacher"] == weights
    assert distilled["target"] == 0  # decay 0: the student without gradient
    halved = estimate(taught("ConsistencyDistillation", "training.teacher_precision=bfloat16"))
    assert halved.memory["teacher"] == weights // 2
    more = estimate(small("training.also_average=[0.9,0.99]"))
    assert more.memory["averages"] == 3 * weights
    assert more.checkpoint == estimate(small()).checkpoint + 2 * weights


def test_the_trunk_of_lpips_is_a_part_of_its_own():
    """VGG-16's convolutions, 14,714,688 weights, and 1472 of LPIPS."""
    assert estimate(small()).memory["distance"] == 0
    sizes = ["data.size=16", "objective.distance.kind=LPIPS"]
    assert estimate(small(*sizes)).memory["distance"] == 4 * (14_714_688 + 1472)


def test_memory_grows_by_the_image_and_shrinks_by_the_shard():
    whole, halves = estimate(small()), estimate(small("training.accumulation=2"))
    four = estimate(small("training.accumulation=2"), gpus=2)
    assert (whole.shard, halves.shard, four.shard) == (64, 32, 16)
    assert whole.peak - halves.peak == pytest.approx(32 * whole.per_image, rel=0.1)
    bigger = estimate(small("training.batch_size=128"))
    assert bigger.peak == pytest.approx(whole.peak + 64 * whole.per_image, rel=0.01)


def test_bfloat16_halves_what_the_products_keep():
    wide = ["network.channels=64", "training.batch_size=64"]
    full, half = estimate(small(*wide)), estimate(small(*wide, "training.precision=bfloat16"))
    assert half.flops_step == full.flops_step
    assert full.flops_by["bfloat16"] == 0
    assert 0.4 * full.per_image < half.per_image < full.per_image


WIDE = Hardware(gigabytes=24, float32=1, bfloat16=4)


def hours_by_hand(found, by):
    """Each precision at its own speed."""
    seconds = by.get("float32", 0) / 1e12 + by.get("bfloat16", 0) / 4e12
    return seconds * found.batch_size * found.steps / 0.4 / 3600


def test_lpips_is_in_float32_in_a_recipe_of_bfloat16():
    knobs = ["data.size=16", "training.precision=bfloat16"]
    plain, perceived = (
        estimate(small(*knobs, f"objective.distance.kind={kind}")) for kind in ("L2", "LPIPS")
    )
    trunk = perceived.flops_step - plain.flops_step
    assert plain.flops_by["bfloat16"] > 0.98 * plain.flops_step  # all but the embedding of σ
    assert perceived.flops_by["bfloat16"] == plain.flops_by["bfloat16"]
    assert perceived.flops_by["float32"] == plain.flops_by["float32"] + trunk
    for found in (plain, perceived):
        assert sum(found.flops_by.values()) == found.flops_step
        assert found.hours(WIDE) == pytest.approx(hours_by_hand(found, found.flops_by))
    optimist = hours_by_hand(perceived, {"bfloat16": perceived.flops_step})
    assert perceived.hours(WIDE) > 2 * optimist


def test_derivatives_are_in_float32_in_a_recipe_of_bfloat16():
    found = estimate(taught("ContinuousDistillation", "training.precision=bfloat16"))
    rounded = found.flops_by["bfloat16"] / found.flops_forward
    assert rounded == pytest.approx(3 + 1, rel=0.05)  # student forward and backward, the teacher
    # the target's value, and a slope: PyTorch's rule for convolutions takes two, the second of
    # weights that do not move
    assert found.flops_by["float32"] / found.flops_forward == pytest.approx(1 + 2, rel=0.05)


def test_both_pages_tell_the_precisions_apart():
    sizes = ["data.size=16", "training.precision=bfloat16", "objective.distance.kind=LPIPS"]
    found = estimate(small(*sizes))
    shares = {kind: found.flops_by[kind] / found.flops_step for kind in found.flops_by}
    page = report(found, {"wide": WIDE}, 0.4)
    assert f"in float32 {shares['float32']:.0%}, in bfloat16 {shares['bfloat16']:.0%}" in page
    told = costs.numbers(found, {"wide": WIDE}, 0.4)
    assert told["flops_by"] == found.flops_by
    row = told["hardware"]["wide"]
    assert row["flops_per_second_by"] == {"float32": 1e12, "bfloat16": 4e12}
    assert 1e12 < row["flops_per_second"] < 4e12


def test_the_ledger_balances():
    with Ledger() as ledger:
        a = torch.ones(1000, device=META)
        b = a.view(10, 100)  # the same memory
        c = a + 1
        assert ledger.now == 8000
        del c
        assert ledger.now == 4000
        del a
        assert ledger.now == 4000  # b holds it
        del b
        assert ledger.now == 0
        assert ledger.peak == 8000


def test_the_optimizer_of_a_gpu_holds_all_weights_once_more():
    """What `whole` adds for RAdam, which takes all weights at once where it can."""
    weights = [torch.zeros(1000, device=META, requires_grad=True) for _ in range(20)]
    optimizer = torch.optim.RAdam(weights, foreach=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with Ledger() as ledger:
        optimizer.step()
    assert ledger.peak == pytest.approx(20 * 4000, rel=0.1)


def test_two_moments_are_what_both_optimizers_keep():
    for knobs in costs.experiment.AnyOptimizer.__args__:
        net = MLP().build((2,))
        optimizer = knobs().build(net)
        for weight in net.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        kept = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
        assert kept == 2 * sum(p.nbytes for p in net.parameters())


def test_memory_is_what_a_real_step_holds():
    """The same step with numbers, its tensors counted as they come and go."""
    recipe = small("training.batch_size=32", "training.optimizer.kind=Adam")
    found = estimate(recipe)
    student = Preconditioned(recipe.network.build(found.shape), recipe.scalings)
    batches = recipe.data.build().batches(32, 0)
    taken = train(
        student, batches, recipe.objective, steps=2,
        optimizer=recipe.training.optimizer.build(student),
    )  # fmt: skip
    with RealLedger() as ledger:
        next(taken)
    copies = sum(found.memory[part] for part in ("target", "averages", "optimizer"))
    activations = found.memory["gradients, activations, workspace"]
    assert ledger.peak == pytest.approx(copies + activations, rel=0.15)


class RealLedger(Ledger):
    """The same of tensors with numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return out


def test_hours_are_products_over_speed():
    found = estimate(small())
    each = Hardware(gigabytes=1, float32=1, bfloat16=2)
    seconds = found.flops_step * 64 * 10 / 1e12
    assert found.hours(each, utilization=0.5) == pytest.approx(seconds / 0.5 / 3600)
    shared = estimate(small(), gpus=2)
    assert shared.hours(each) == pytest.approx(found.hours(each) / 2)
    fits = found.largest_shard(each)
    fixed = found.peak - found.shard * found.per_image
    assert fixed + fits * found.per_image <= 0.9e9 < fixed + (fits + 1) * found.per_image
    assert found.largest_shard(Hardware(1e-3, 1, 1)) == 0


@pytest.mark.parametrize("name", [n for n in recipes() if n.endswith("-one-gpu")])
def test_every_full_size_recipe_is_known_without_its_data(name):
    recipe = loads(recipe_text(name))
    shape, classes = costs.of_data(recipe)
    side = {"cifar10": 32, "imagenet64": 64, "lsun256": 256}[name.split("/")[0]]
    assert shape == (3, side, side)
    assert classes == (1000 if "imagenet" in name else 0)


@cache
def of_one_gpu(name):
    return estimate(loads(recipe_text(name)))


def test_imagenet64_fits_where_its_recipe_says():
    found = of_one_gpu("imagenet64/cd-one-gpu")
    assert found.parameters == 295_899_267
    page = report(found, HARDWARE, 0.4)
    assert "295,899,267" in page
    assert "A100" in page
    assert "do not fit" not in page


@pytest.mark.parametrize("name", [n for n in recipes() if n.endswith("-one-gpu")])
def test_every_recipe_of_one_gpu_fits_on_a_card_of_24_gigabytes(name):
    text = recipe_text(name)
    assert text.startswith(f"# {name.removesuffix('-one-gpu')} on one GPU of 24 GB.")
    found = of_one_gpu(name)
    assert 1 <= found.shard <= found.largest_shard(HARDWARE["RTX 4090"])


def test_a_shard_that_does_not_fit_is_marked():
    cards = {
        "small": Hardware(0.1, 1, 1),
        "none": Hardware(1e-3, 1, 1),
        "large": Hardware(24, 1, 1),
    }
    found = estimate(small())
    small_, none, large = report(found, cards, 0.4).splitlines()[-3:]
    assert small_.endswith("  64 do not fit")
    assert none.endswith("none fits  64 do not fit")
    assert "fit" not in large
    rows = costs.numbers(found, cards, 0.4)["hardware"]
    assert [row["fits"] for row in rows.values()] == [False, False, True]


@pytest.mark.parametrize("gpus", [0, -1])
def test_there_is_at_least_one_gpu(gpus):
    with pytest.raises(ValueError, match=f"gpus must be at least 1; got {gpus}"):
        estimate(small(), gpus=gpus)


@pytest.mark.parametrize("name", [n for n in recipes() if n.startswith("fashion/")])
def test_clothes_are_known_before_they_are_fetched(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = estimate(loads(recipe_text(name)))
    assert (found.shape, found.classes) == ((1, 28, 28), 10)
    with pytest.raises(ValueError, match="say what they are"):  # other pictures are not
        estimate(loads(recipe_text(name), ["data.path=my/pictures"]))


def test_what_cannot_be_known_says_what_to_do():
    with pytest.raises(ValueError, match=r"data\.classes=1000 or data\.labelled=false"):
        estimate(loads(recipe_text("fashion/ct"), ["data.path=nowhere"]))
    with pytest.raises(ValueError, match="cannot be cut into 3 GPUs times accumulation 1"):
        estimate(small(), gpus=3)
    unnamed = loads(NO_NETWORK, ["teacher=runs/none"])
    with pytest.raises(ValueError, match="no \\[network\\]"):
        estimate(unnamed)
    with pytest.raises(ValueError, match='net="vgg" or "alex"'):
        estimate(small("objective.distance.kind=LPIPS", "objective.distance.net=squeeze"))


def test_a_teacher_that_is_a_shipped_recipe_says_which_network():
    found = estimate(loads(NO_NETWORK, ["teacher=runs/imagenet64/edm-laptop"]))
    expected = loads(recipe_text("imagenet64/edm-laptop")).network.build(found.shape)
    assert found.parameters == sum(p.numel() for p in expected.parameters())


def test_the_command(capsys):
    main(["estimate", "cifar10/cd-laptop", "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["peak"] == sum(numbers["memory"].values())
    assert numbers["utilization"] == 0.4
    assert numbers["hardware"]["this machine"]["hours"] > 0
    main(["estimate", "cifar10/cd-laptop", "--utilization", "0.5"])
    page = capsys.readouterr().out
    assert "50% of the peak speed" in page
    assert "this machine" in page
    for share in ("0", "1.1", "nan"):
        with pytest.raises(SystemExit) as stopped:
            main(["estimate", "cifar10/cd-laptop", "--utilization", share])
        assert stopped.value.code
        assert "share of 1" in capsys.readouterr().err


def test_numbers_are_short():
    assert costs._size(1184e6) == "1.18 GB"
    assert costs._size(0) == "0 B"
    assert costs._flops(1.739e21) == "1.74 ZFLOP"
    assert costs._rounded(0.0001) == "< 0.01"
    assert costs._rounded(1234.5) == "1,234"
    assert math.isfinite(costs.this_machine().float32)
