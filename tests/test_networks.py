"""Networks: shapes, classes, how they start, what they hear."""

import pytest
import torch

from cmbook.networks import MLP, ResidualMLP, UNet
from cmbook.networks.blocks import Sinusoids, octaves
from cmbook.noise import normal, seeded

IMAGES = [
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
    """So training starts from the scalings alone, which are right at both ends."""
    out = network.build(shape)(torch.ones(2, *shape), torch.zeros(2), None)
    assert not out.any()


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


def test_bfloat16_weights_run_and_stay_bfloat16():
    module = built(UNet(channels=16, heads=2), (1, 8, 8)).to(torch.bfloat16)
    out = module(torch.ones(1, 1, 8, 8, dtype=torch.bfloat16), torch.zeros(1), None)
    assert out.dtype == torch.bfloat16


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
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_unet_of_odd_width_still_normalizes():
    built(UNet(channels=3, heads=1), (1, 8, 8))(torch.ones(1, 1, 8, 8), torch.zeros(1), None)
