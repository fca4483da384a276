"""Networks: shapes, classes, how they start, what they hear."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmbook.networks import MLP, NCSNpp, ResidualMLP, UNet
from cmbook.networks.blocks import Attention, GroupNorm, Sinusoids, octaves
from cmbook.noise import normal, seeded

ADM = UNet(
    channels=32, attention=(8, 4), head_channels=16, middle=True, resample="block",
    time_scale=1000.0, groups="all",
)  # fmt: skip
STRIDED = UNet(
    channels=16, attention=(4,), heads=2, heads_up=1, resample="conv", told="add",
    groups="quarters",
)  # fmt: skip
NCSN = NCSNpp(channels=16, multipliers=(1, 2), blocks=1, attention=(4,))
DDPM = NCSNpp(
    channels=16, multipliers=(1, 2), blocks=1, attention=(8,), embedding="positional",
    taps=(1, 1), pyramid=False,
)  # fmt: skip
SWITCHES = [(ADM, (1, 8, 8)), (STRIDED, (1, 8, 8)), (NCSN, (1, 8, 8)), (DDPM, (3, 8, 8))]
IMAGES = [
    *SWITCHES,
    (ResidualMLP(width=32, depth=2), (1, 8, 8)),
    (UNet(channels=16, heads=2), (1, 8, 8)),
    (UNet(channels=16, multipliers=(1, 2, 2), blocks=2, attention=(8, 4), heads=2), (3, 32, 32)),
]
ALL = [(MLP(width=32, depth=2), (2,)), *IMAGES]


def built(network, shape, classes=None):
    """A network whose every weight is random, so that no path is closed by a zero."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = network.build(shape, classes)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize(("network", "shape"), ALL)
def test_the_output_has_the_shape_of_the_input(network, shape):
    x = normal(torch.empty(3, *shape), seeded(0))
    assert built(network, shape)(x, torch.zeros(3), None).shape == x.shape


SMALLEST = [(MLP(width=32, depth=1), (2,)), (ResidualMLP(width=32, depth=1), (1, 8, 8))]


@pytest.mark.parametrize(("network", "shape"), [*ALL, *SMALLEST])
def test_every_weight_is_heard(network, shape):
    """Of sigma, of the label, and of every layer, however few there are."""
    module = built(network, shape, classes=3)
    x = normal(torch.empty(3, *shape), seeded(0))
    module(x, torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 1, 2])).square().sum().backward()
    deaf = [
        name for name, w in module.named_parameters() if w.grad is None or not bool(w.grad.any())
    ]
    assert not deaf


@pytest.mark.parametrize(("network", "shape"), ALL)
def test_a_network_runs_without_numbers(network, shape):
    """On the meta device, where shapes of the largest networks are found in a second."""
    with torch.device("meta"):
        module, x, level = network.build(shape), torch.empty(3, *shape), torch.empty(3)
    assert module.to("meta")(x, level).shape == x.shape


@pytest.mark.parametrize(("network", "shape"), ALL)
def test_every_weight_gets_a_gradient(network, shape):
    module = built(network, shape, 4)
    x = normal(torch.empty(4, *shape), seeded(0))
    module(x, torch.linspace(-1, 1, 4), torch.arange(4)).square().sum().backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(("network", "shape"), ALL)
def test_noise_level_and_class_are_heard(network, shape):
    module = built(network, shape, 4)
    x = normal(torch.empty(1, *shape), seeded(0))
    quiet = module(x, torch.zeros(1), torch.tensor([1]))
    assert not torch.allclose(quiet, module(x, torch.ones(1), torch.tensor([1])))
    assert not torch.allclose(quiet, module(x, torch.zeros(1), torch.tensor([2])))


@pytest.mark.parametrize(("network", "shape"), ALL)
def test_samples_of_a_batch_do_not_mix(network, shape):
    module = built(network, shape)
    x = normal(torch.empty(3, *shape), seeded(0))
    c_noise = torch.tensor([-1.0, 0.0, 1.0])
    alone = torch.cat([module(x[i : i + 1], c_noise[i : i + 1], None) for i in range(3)])
    torch.testing.assert_close(module(x, c_noise, None), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("network", "shape"), IMAGES)
def test_a_fresh_image_network_says_nothing(network, shape):
    """So training starts from the scalings alone, which are right at both ends.

    NCSN++ whispers, as it was published: its last weights are tiny, not zero.
    """
    out = network.build(shape)(torch.ones(2, *shape), torch.zeros(2), None)
    assert float(out.detach().abs().max()) <= (1e-3 if isinstance(network, NCSNpp) else 0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"has 4 classes: label must be 2 integers in 0 \.\.\. 3"),
        (torch.tensor([0, 4]), r"0 \.\.\. 3; got \[0, 4\]"),
        (torch.tensor([-1, 0]), r"0 \.\.\. 3; got"),
    ],
)
@pytest.mark.parametrize(("network", "shape"), ALL)
def test_wrong_labels_are_refused(network, shape, label, message):
    with pytest.raises(ValueError, match=message):
        network.build(shape, 4)(torch.ones(2, *shape), torch.zeros(2), label)


def test_a_label_given_to_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="no classes"):
        MLP().build((2,))(torch.ones(1, 2), torch.zeros(1), torch.tensor([0]))


@pytest.mark.parametrize("shape", [(2,), (3, 9, 8), (8, 8)])
def test_a_unet_refuses_what_it_cannot_halve(shape):
    with pytest.raises(ValueError, match=r"divisible by 2; got"):
        UNet().build(shape)


def test_a_unet_refuses_heads_that_do_not_divide_its_channels():
    with pytest.raises(ValueError, match="cannot be shared among 3 heads"):
        UNet(channels=32, heads=3).build((1, 8, 8))


def test_dropout_acts_in_training_alone():
    module = built(ResidualMLP(width=32, depth=2, dropout=0.5), (1, 8, 8))
    x = normal(torch.empty(2, 1, 8, 8), seeded(0))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert not torch.equal(module(x, torch.zeros(2), None), module(x, torch.zeros(2), None))
    module.eval()
    assert torch.equal(module(x, torch.zeros(2), None), module(x, torch.zeros(2), None))


@pytest.mark.parametrize(("network", "shape"), [(UNet(channels=16, heads=2), (1, 8, 8)), *SWITCHES])
def test_bfloat16_weights_run_and_stay_bfloat16(network, shape):
    module = built(network, shape).to(torch.bfloat16)
    out = module(torch.ones(1, *shape, dtype=torch.bfloat16), torch.zeros(1), None)
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(("network", "shape"), ALL)
def test_without_memory_a_network_has_the_same_names_and_constants(network, shape):
    with torch.device("meta"):
        empty = network.build(shape, 4)
    full = built(network, shape, 4)
    assert all(p.is_meta for p in empty.parameters())
    assert {n: w.shape for n, w in empty.state_dict().items()} == {
        n: w.shape for n, w in full.state_dict().items()
    }
    saved, constants = full.state_dict(), dict(empty.named_buffers())
    for name, constant in full.named_buffers():
        assert not constants[name].is_meta
        assert name in saved or torch.equal(constants[name], constant)


@pytest.mark.parametrize(
    ("network", "shape", "classes", "parameters"),
    [
        (
            UNet(
                channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8),
                head_channels=64, middle=True, resample="block", time_scale=1000.0, groups="all",
            ),
            (3, 64, 64), 1000, 295_899_267,
        ),
        (
            UNet(
                channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(32, 16, 8),
                head_channels=64, middle=True, resample="block", told="add", time_scale=1000.0,
                groups="all",
            ),
            (3, 256, 256), None, 526_304_771,
        ),
        (NCSNpp(), (3, 32, 32), None, 56_395_523),
        (NCSNpp(blocks=8), (3, 32, 32), None, 97_610_499),
        (
            NCSNpp(embedding="positional", taps=(1, 1), pyramid=False),
            (3, 32, 32), None, 55_732_739,
        ),
    ],
    ids=["imagenet64", "lsun256", "cifar10", "cifar10 deep", "ddpm++"],
)  # fmt: skip
def test_published_networks_have_their_published_sizes(network, shape, classes, parameters):
    with torch.device("meta"):
        module = network.build(shape, classes)
    assert sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize(("network", "shape"), SWITCHES)
def test_images_of_another_size_are_refused(network, shape):
    wrong = (shape[0], 16, 16)
    with pytest.raises(ValueError, match=r"takes images \(\d, 8, 8\); got \(\d, 16, 16\)"):
        network.build(shape)(torch.ones(1, *wrong), torch.zeros(1), None)
    with pytest.raises(ValueError, match=r"divisible by 2; got \(\d, 9, 8\)"):
        network.build((shape[0], 9, 8))


@pytest.mark.parametrize("network", [ADM, STRIDED, NCSN, DDPM])
def test_a_second_noise_level_says_nothing_at_first_and_then_is_heard(network):
    network, x, zeros = replace(network, two_times=True), torch.ones(1, 1, 8, 8), torch.zeros(1)
    told = network.build((1, 8, 8)).conditioning
    assert torch.equal(told(zeros, None, zeros), told(zeros, None, zeros + 1))
    assert not torch.allclose(told(zeros, None, zeros), told(zeros + 1, None, zeros))
    module = built(network, (1, 8, 8))
    quiet = module(x, zeros, None, zeros)
    assert not torch.allclose(quiet, module(x, zeros, None, zeros + 1))
    assert not torch.allclose(quiet, module(x, zeros + 1, None, zeros))


@pytest.mark.parametrize("network", [ADM, NCSN])
def test_a_second_noise_level_is_given_exactly_where_one_is_expected(network):
    x, zeros = torch.ones(1, 1, 8, 8), torch.zeros(1)
    with pytest.raises(ValueError, match=r"told one noise level\(s\); it was given two"):
        network.build((1, 8, 8))(x, zeros, None, zeros)
    with pytest.raises(ValueError, match=r"told two noise level\(s\); it was given one"):
        replace(network, two_times=True).build((1, 8, 8))(x, zeros, None)


def test_how_an_image_was_augmented_is_heard():
    module = built(replace(NCSN, augment=3), (1, 8, 8))
    x, c_noise = torch.ones(1, 1, 8, 8), torch.zeros(1)
    quiet = module(x, c_noise)
    torch.testing.assert_close(quiet, module(x, c_noise, augment=torch.zeros(1, 3)))
    assert not torch.allclose(quiet, module(x, c_noise, augment=torch.ones(1, 3)))
    with pytest.raises(ValueError, match="built without augment"):
        NCSN.build((1, 8, 8))(x, c_noise, augment=torch.ones(1, 3))


def test_what_is_added_before_single_channels_are_normalized_is_not_heard():
    """Why 32 channels, 32 groups and `add` do not go together, as in one official test network."""
    deaf = UNet(channels=32, multipliers=(1,), attention=(), told="add", groups="all")
    module, x = built(deaf, (1, 8, 8)).double(), torch.ones(1, 1, 8, 8, dtype=torch.float64)
    x[..., 0] = 0.3
    said = [module(x, torch.full((1,), c, dtype=torch.float64)) for c in (0.0, 1.0)]
    torch.testing.assert_close(*said, rtol=1e-9, atol=1e-9)


def test_neighboring_noise_levels_have_different_embeddings():
    """150 levels of the paper's grid, told apart by more than float32 rounding."""
    from cmbook.noise import NoiseRange

    c_noise = NoiseRange().grid(151).log().float() / 4
    gaps = Sinusoids(octaves(64))(c_noise).diff(dim=0).norm(dim=1)
    assert float(gaps.min()) > 0.05


def test_the_demos_network_has_the_size_its_recipe_says():
    module = ResidualMLP().build((1, 8, 8), 10)
    assert sum(p.numel() for p in module.parameters()) == 1_655_488


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(width=0), "width must be at least 1; got 0"),
        (lambda: MLP(depth=-3), "depth must be at least 1; got -3"),
        (lambda: ResidualMLP(depth=0), "depth must be at least 1"),
        (lambda: ResidualMLP(dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (lambda: UNet(channels=0), "channels must be at least 1"),
        (lambda: UNet(multipliers=()), "multipliers must be 1 or more"),
        (lambda: UNet(blocks=0), "blocks must be at least 1"),
        (lambda: UNet(head_channels=-1), "head_channels must be at least 1; got -1"),
        (lambda: UNet(head_channels=24).build((1, 16, 16)), "64 channels cannot be cut into heads"),
        (lambda: UNet(channels=48, groups="all").build((1, 8, 8)), "48 channels cannot be shared"),
        (lambda: NCSNpp(multipliers=()), "multipliers must be 1 or more"),
        (lambda: NCSNpp(taps=(1, 2, 1)), "taps must be an even number of weights"),
        (lambda: NCSNpp(taps=(1, 2)), "the same from both ends"),
        (lambda: NCSNpp(augment=-1), "augment must be at least 0"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_unet_of_odd_width_still_normalizes():
    built(UNet(channels=3, heads=1), (1, 8, 8))(torch.ones(1, 1, 8, 8), torch.zeros(1), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_exact_when_weights_are_rounded(dtype):
    for network in (UNet(32, (1,), time_scale=1000.0), NCSNpp(channels=16, multipliers=(1,))):
        net = network.build((3, 8, 8))
        before = net.conditioning.sinusoids.frequencies.clone()
        net.to(dtype)
        assert torch.equal(net.conditioning.sinusoids.frequencies, before)
        assert net.inlet.weight.dtype == dtype


@pytest.mark.parametrize(
    "knobs", [{"resample": "blocks"}, {"told": "ad"}, {"groups": "al"}, {"embedding": "fourrier"}]
)
def test_a_switch_that_is_none_is_refused(knobs):
    with pytest.raises((ValueError, TypeError), match=next(iter(knobs))):  # here types are checked
        (NCSNpp if "embedding" in knobs else UNet)(**knobs)


def test_two_noise_levels_are_one_a_sample():
    net = UNet(channels=16, heads=2, two_times=True).build((1, 8, 8))
    with pytest.raises((ValueError, TypeError), match="noise"):  # here shapes are checked
        net(torch.ones(2, 1, 8, 8), torch.zeros(2), None, torch.zeros(1))


def test_labels_of_any_integer_type_are_taken():
    net = UNet(channels=16, heads=2).build((1, 8, 8), 4).eval()
    x, zero = torch.ones(2, 1, 8, 8), torch.zeros(2)
    net(x, zero, torch.tensor([1, 3], dtype=torch.int16))
    with pytest.raises((ValueError, TypeError), match="label"):  # here types are checked
        net(x, zero, torch.tensor([True, False]))


def test_attention_is_one_kernel():
    """The fused kernels refuse heads whose numbers do not lie side by side, and say so in a warning
    alone: without them, memory grows with the square of the pixels."""
    attention = Attention(32, 2, partial(GroupNorm, groups="all"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention(torch.zeros(2, 32, 8, 8))
