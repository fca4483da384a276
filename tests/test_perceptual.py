"""LPIPS against the package itself, stored numbers of piq, and its own definition.

VGG's trained weights are never needed: a narrow trunk stands in, or a random one.
"""

import copy
import hashlib
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import nn

from cmbook import (
    LPIPS,
    ConsistencyDistillation,
    ConsistencyScalings,
    ContinuousDistillation,
    ContinuousTraining,
    Digits,
    Experiment,
    NoiseRange,
    ResidualMLP,
    perceptual,
)
from cmbook.experiment import dumps, loads
from cmbook.losses.continuous import curvature
from cmbook.noise import Replay, normal, seeded, uniform
from cmbook.parameterization import Preconditioned
from cmbook.protocols import Batch, Clock, Distance, Models

NARROW = [4, 4, "M", 8, 8, "M", 12, 12, 12, "M", 16, 16, 16, "M", 16, 16, 16]


def images(seed, *shape, dtype=torch.float32):
    """Images in [-1, 1]."""
    n = torch.Size(shape).numel()
    return (uniform(n, seeded(seed)).reshape(shape) * 2 - 1).to(dtype)


def slope(distance, x, y):
    """Of the sum of the distances, by the first argument."""
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(distance(x, y).sum(), x)[0]


def package(network):
    """The package's own forward pass, one number per sample."""
    return lambda x, y: network(x, y).flatten()


@pytest.fixture
def stand_in(monkeypatch):
    """Puts another network where the trained one would be fetched."""

    def put(make):
        monkeypatch.setattr(perceptual, "_pretrained", make)
        perceptual._network.cache_clear()

    yield put
    perceptual._network.cache_clear()


@pytest.fixture(scope="session")
def narrow_network(lpips):
    """VGG-16 with few channels, of the package's own parts, so that its forward pass runs too."""

    class Network(lpips.LPIPS):
        def __init__(self, net="vgg"):
            nn.Module.__init__(self)
            self.lpips, self.spatial, self.version = True, False, "0.1"
            self.scaling_layer, (features, heads) = lpips.ScalingLayer(), narrow_parts()
            self.net = sliced(lpips, features)
            self.lins = nn.ModuleList(lpips.NetLinLayer(head.shape[1]) for head in heads)
            for linear, head in zip(self.lins, heads, strict=True):
                linear.model[-1].weight = nn.Parameter(head)
            self.L = len(heads)

    return Network


def narrow_parts():
    """The features of torchvision's VGG-16 in narrow, and the five heads."""
    from torchvision.models.vgg import make_layers

    stored = load_file(GOLDEN / "lpips_narrow_weights.safetensors")
    stored = {key: value.float() for key, value in stored.items()}
    features = make_layers(NARROW)
    features.load_state_dict({k[9:]: v for k, v in stored.items() if k.startswith("features.")})
    return features, [stored[f"lin{i}"] for i in range(5)]


def sliced(lpips, features):
    """The package's trunk, with these layers in place of torchvision's."""
    with pytest.MonkeyPatch.context() as patch:
        other = SimpleNamespace(vgg16=lambda pretrained: SimpleNamespace(features=features))
        patch.setattr(lpips.pn, "tv", other)
        return lpips.pn.vgg16()


@pytest.fixture
def narrow(stand_in, narrow_network):
    stand_in(narrow_network)
    return narrow_network


@pytest.fixture(scope="session")
def random_vgg(lpips):
    """The full graph with the published heads, and a random trunk."""
    return with_random_trunk(lpips, "vgg")


def with_random_trunk(lpips, net):
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it speaks to torchvision as of old
        torch.manual_seed(0)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


# ── it is LPIPS ──


@pytest.mark.parity
@pytest.mark.parametrize(("case", "resize"), [("direct", None), ("resized224", 224)])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_values_equal_those_of_piq(golden, narrow, pooling, case, resize):
    """What the PyTorch release calls; it maps to [0, 1], then by ImageNet's mean and deviation."""
    stored = golden("lpips_narrow")
    distances = LPIPS(pooling=pooling, resize=resize)(stored["a"], stored["b"])
    expected = stored[f"{'avg' if pooling == 'average' else 'max'}/{case}"]
    torch.testing.assert_close(distances, expected, rtol=2e-5, atol=0)


def test_both_ways_to_scale_images_are_one_function(lpips):
    """Shift and scale of `lpips` are those of ImageNet on [0, 1], in exact decimals."""
    x = images(0, 2, 3, 8, 8, dtype=torch.float64)
    mean, deviation = (
        x.new_tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    ours = lpips.ScalingLayer()(x)
    torch.testing.assert_close(ours, ((x + 1) / 2 - mean) / deviation, rtol=0, atol=5e-7)


@pytest.mark.parity
def test_values_and_slopes_equal_those_of_the_package(stand_in, random_vgg):
    stand_in(lambda net: copy.deepcopy(random_vgg))
    x, y = images(1, 2, 3, 64, 64), images(2, 2, 3, 64, 64)
    ours, theirs = LPIPS(resize=None), package(random_vgg)
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-6, atol=0)
    expected = slope(theirs, x, y)
    size = float(expected.abs().max())
    torch.testing.assert_close(slope(ours, x, y), expected, rtol=0, atol=1e-6 * size)


@pytest.mark.parity
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_the_other_trunks_equal_the_package_too(lpips, stand_in, net):
    random = with_random_trunk(lpips, net)
    stand_in(lambda net: copy.deepcopy(random))
    x, y = images(1, 2, 3, 64, 64), images(2, 2, 3, 64, 64)
    expected = package(random)(x, y).detach()
    torch.testing.assert_close(LPIPS(net, resize=None)(x, y), expected, rtol=1e-6, atol=0)
    averaged = LPIPS(net, "average", resize=None)(x, y)
    assert float((averaged / expected - 1).abs().min()) > 1e-3


def test_a_random_vgg_resizes_as_the_official_code_does(stand_in, random_vgg):
    stand_in(lambda net: copy.deepcopy(random_vgg))
    x, y = images(1, 1, 3, 32, 32), images(2, 1, 3, 32, 32)
    big = [F.interpolate(v, size=224, mode="bilinear") for v in (x, y)]
    with torch.no_grad():
        torch.testing.assert_close(LPIPS()(x, y), package(random_vgg)(*big), rtol=1e-6, atol=0)


# ── its knobs ──


def layers_of(distance):
    network = perceptual._network(distance.net, distance.pooling, torch.device("cpu"))
    return [type(m) for m in network.net.modules()], network


def test_average_pooling_takes_the_place_of_max_pooling(narrow):
    kept, _ = layers_of(LPIPS())
    assert (kept.count(nn.MaxPool2d), kept.count(nn.AvgPool2d)) == (4, 0)
    replaced, network = layers_of(LPIPS(pooling="average"))
    assert (replaced.count(nn.MaxPool2d), replaced.count(nn.AvgPool2d)) == (0, 4)
    pools = [m for m in network.net.modules() if isinstance(m, nn.AvgPool2d)]
    assert {(m.kernel_size, m.stride, m.padding, m.ceil_mode) for m in pools} == {(2, 2, 0, False)}
    swapped = [nn.MaxPool2d if m is nn.AvgPool2d else m for m in replaced]
    assert swapped == kept, "nothing else changes, nor does the order"


@pytest.mark.parametrize(
    ("width", "seen"), [(32, 224), (64, 224), (255, 224), (256, 256), (300, 300)]
)
def test_images_narrower_than_256_are_resized_to_224(narrow, width, seen):
    x, y = images(1, 1, 3, 40, width), images(2, 1, 3, 40, width)
    height = 224 if width < 256 else 40
    expected = [F.interpolate(v, (height, seen), mode="bilinear") for v in (x, y)]
    plain = LPIPS(resize=None)
    assert torch.equal(LPIPS()(x, y), plain(*expected))
    assert torch.equal(LPIPS(resize=64)(x, y), plain(x, y)) == (width >= 256)


def test_gray_images_are_three_equal_channels(narrow):
    x, y = images(1, 2, 1, 32, 32), images(2, 2, 1, 32, 32)
    assert torch.equal(LPIPS()(x, y), LPIPS()(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(2, 5), (2, 2, 32, 32), (2, 3, 32)])
def test_what_is_no_image_is_refused(narrow, shape):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        LPIPS()(images(0, *shape), images(1, *shape))


@pytest.mark.parametrize("size", [8, 31])
def test_images_that_no_trunk_can_take_are_refused_unless_resized(narrow, size):
    x = images(0, 1, 3, size, size)
    with pytest.raises(ValueError, match=rf"at least 32x32, or resizes them; got {size}x{size}"):
        LPIPS(resize=None)(x, x)
    assert LPIPS(resize=32)(x, x).shape == (1,)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"net": "vgg19"}, "net must be one of vgg, alex, squeeze"),
        ({"pooling": "mean"}, "pooling must be one of max, average"),
        ({"resize": 31}, "resize must be at least 32, or 0"),
        ({"resize": -224}, "resize must be at least 32, or 0"),
    ],
)
def test_wrong_knobs_are_refused(knobs, message):
    made = LPIPS()
    for name, value in knobs.items():  # past the type checker of the tests, as users come
        object.__setattr__(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.__post_init__()


# ── it is a distance ──


def test_it_is_a_distance_zero_for_equals_symmetric_and_per_sample(narrow):
    distance = LPIPS(resize=64)
    x, y = images(1, 4, 3, 32, 32), images(2, 4, 3, 32, 32)
    assert isinstance(distance, Distance)
    assert torch.equal(distance(x, x), torch.zeros(4))
    assert float(distance(x, y).min()) > 0
    torch.testing.assert_close(distance(x, y), distance(y, x), rtol=1e-6, atol=0)
    alone = torch.cat([distance(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(distance(x, y), alone, rtol=1e-6, atol=0)
    others = torch.autograd.functional.jacobian(lambda v: distance(v, y), x)
    assert float(others[0, 1:].abs().max()) == 0 < float(others[0, 0].abs().max())


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_slopes_flow_through_the_resize(narrow, pooling):
    """Those of the package behind PyTorch's own resize, and of finite differences."""
    distance, network = LPIPS(pooling=pooling), narrow().eval()
    if pooling == "average":
        perceptual._average(network.net)
    x, y = images(1, 1, 3, 32, 32), images(2, 1, 3, 32, 32)
    told = slope(distance, x, y)

    def grown(a, b):
        return network(*(F.interpolate(v, size=224, mode="bilinear") for v in (a, b)))

    expected = slope(grown, x, y)
    torch.testing.assert_close(told, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    length = told.norm()
    step = 1e-2 * told / length  # coarse: a smaller one drowns in float32
    measured = (distance(x + step, y) - distance(x - step, y)) / 2e-2
    torch.testing.assert_close(measured, length[None], rtol=5e-2, atol=0)


def test_where_all_features_are_0_every_derivative_is_finite(stand_in, narrow_network):
    """Shift and scale make black of these images, and black pixels no features at all."""
    network = narrow_network()
    for layer in network.net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.bias, -0.05)
    stand_in(lambda net: copy.deepcopy(network))
    ours, theirs = LPIPS(resize=None), package(network.eval().requires_grad_(False))
    x, y, v = (images(i, 1, 3, 32, 32) for i in (1, 2, 3))
    x[..., :20], y[..., 12:] = network.scaling_layer.shift, network.scaling_layer.shift
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope(ours, x, y), slope(theirs, x, y), rtol=1e-5, atol=1e-8)
    pushed = torch.func.jvp(lambda z: ours(z, y), (x,), (v,))[1]
    torch.testing.assert_close(pushed.sum(), (slope(ours, x, y) * v).sum(), rtol=1e-4, atol=0)
    assert bool(torch.func.jvp(lambda z: theirs(z, y), (x,), (v,))[1].isnan()), "no such place"
    steep = torch.func.grad(lambda z: ours(z, x).sum())
    forward = torch.func.jvp(steep, (x,), (v,))[1]
    bent = curvature(ours, x, v)
    torch.testing.assert_close(forward, bent, rtol=0, atol=1e-4 * float(bent.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_computed_in_float32_whatever_comes(narrow, dtype):
    x, y = images(1, 2, 3, 32, 32, dtype=dtype), images(2, 2, 3, 32, 32, dtype=dtype)
    distances = LPIPS()(x, y)
    assert distances.dtype == torch.float32
    assert torch.equal(distances, LPIPS()(x.float(), y.float()))
    assert slope(LPIPS(), x, y).dtype == dtype


def test_autocast_changes_nothing(narrow):
    x, y = images(1, 2, 3, 32, 32), images(2, 2, 3, 32, 32)
    plain, steep = LPIPS()(x, y), slope(LPIPS(), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LPIPS()(x, y), plain)
        assert torch.equal(slope(LPIPS(), x, y), steep)


# ── its network ──


def test_the_trunk_is_built_once_frozen_and_in_eval_mode(stand_in, narrow_network):
    built = []
    stand_in(lambda net: built.append(net) or narrow_network())
    x, y = images(1, 1, 3, 32, 32), images(2, 1, 3, 32, 32)
    for distance in (LPIPS(), LPIPS(resize=64), copy.deepcopy(LPIPS())):
        slope(distance, x, y)
    assert built == ["vgg"]
    network = perceptual._network("vgg", "max", torch.device("cpu"))
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_an_objective_that_holds_it_can_be_copied_and_pickled(narrow):
    objective = ConsistencyDistillation(distance=LPIPS(pooling="average"))
    x, y = images(1, 1, 3, 32, 32), images(2, 1, 3, 32, 32)
    before = objective.distance(x, y)
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert other == objective
        assert torch.equal(other.distance(x, y), before)


def first_under_inference(x, y):
    with torch.inference_mode():
        LPIPS(resize=None)(x, y)


def first_under_a_transform(x, y):
    curvature(LPIPS(resize=None), x, y)


def first_on_another_default_device(x, y):
    with torch.device("meta"):
        LPIPS(resize=None)(x, y)


@pytest.mark.parametrize(
    "first", [first_under_inference, first_under_a_transform, first_on_another_default_device]
)
def test_in_whatever_mode_it_is_first_called_it_can_be_trained_with_afterwards(narrow, first):
    x, y = images(1, 1, 3, 32, 32), images(2, 1, 3, 32, 32)
    expected = slope(LPIPS(resize=None), x, y)
    perceptual._network.cache_clear()
    first(x, y)
    assert torch.equal(slope(LPIPS(resize=None), x, y), expected)


def test_building_it_leaves_the_global_random_state(narrow):
    x, before = images(1, 1, 3, 32, 32), torch.get_rng_state()
    LPIPS()(x, x)
    assert torch.equal(torch.get_rng_state(), before)


# ── it trains ──

SMALL = NoiseRange(sigma_max=5.0)


def student(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = ResidualMLP(width=32, depth=1, told=16).build((1, 8, 8), None)
        for p in net.parameters():  # the zeroed output layers would make all targets alike
            nn.init.normal_(p, std=0.1)
        return Preconditioned(net, ConsistencyScalings(SMALL))


def test_steps_of_distillation_lower_the_loss(narrow):
    """The same batch, levels and noise at every step, so that nothing but the student moves."""
    objective = ConsistencyDistillation(SMALL, levels=5, distance=LPIPS(resize=32))
    model, teacher = student(), lambda x, sigma, label=None: torch.zeros_like(x)
    batch = Batch(images(1, 8, 1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        models = Models(model, model, teacher)
        loss = objective(models, batch, clock=Clock(0, 1), generator=seeded(3))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append(float(loss.value.detach()))
    assert losses[-1] < 0.75 * losses[0]


# ── it bends: continuous time ──


def embedded(network, x):
    """The vector whose squared distances LPIPS is, in float64: sqrt(w / places) times features."""
    parts = []
    for linear, f in zip(network.lins, perceptual._features(network, x), strict=True):
        scale = (linear.model[-1].weight / f[0, 0].numel()).sqrt()
        parts.append((scale * f).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_its_curvature_is_twice_the_square_of_its_features_slope(narrow, pooling):
    """At y = x no second derivative of the features is left, kinks or not: H = 2 JᵀJ."""
    x, v = images(1, 1, 3, 32, 32), normal(torch.empty(1, 3, 32, 32), seeded(2))
    network = copy.deepcopy(perceptual._network("vgg", pooling, torch.device("cpu"))).double()
    function, at = lambda z: embedded(network, z), x.double()
    pushed = torch.func.jvp(function, (at,), (v.double(),))[1]
    expected = 2 * torch.func.vjp(function, at)[1](pushed)[0]
    bent = curvature(LPIPS(pooling=pooling, resize=None), x, v)
    size = float(expected.abs().max())
    torch.testing.assert_close(bent.double(), expected, rtol=0, atol=1e-4 * size)


def replayed(seed):
    """The draws of a continuous-time loss; it also refuses whoever draws besides."""
    like = torch.empty(2, 1, 8, 8)
    return Replay(normals=[normal(like, seeded(seed))], uniforms=[uniform(2, seeded(seed))])


@pytest.mark.parametrize(
    "objective",
    [
        ContinuousDistillation(SMALL, LPIPS(resize=32)),
        ContinuousDistillation(SMALL, LPIPS(resize=32), frozen_target=False),
        ContinuousTraining(SMALL, LPIPS(resize=32)),
    ],
    ids=["distillation", "distillation, not frozen", "training"],
)
def test_the_objectives_of_continuous_time_take_it(narrow, objective):
    model, teacher = student(), lambda x, sigma, label=None: torch.zeros_like(x)
    models, batch = Models(model, model, teacher), Batch(images(1, 2, 1, 8, 8))
    loss = objective(models, batch, clock=Clock(0, 1), generator=replayed(1))
    loss.value.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(loss.per_sample.min()) > 0
    assert bool(grads.isfinite().all())
    assert float(grads.abs().max()) > 0


# ── recipes ──


@pytest.mark.parametrize(
    "distance", [LPIPS(), LPIPS("squeeze", "average", 64), LPIPS(resize=None), LPIPS(resize=0)]
)
def test_a_recipe_with_it_comes_back_equal(distance):
    recipe = Experiment(
        Digits(),
        ConsistencyDistillation(distance=distance),
        ConsistencyScalings(),
        teacher="runs/digits/edm",
    )
    assert loads(dumps(recipe)) == recipe


def test_a_recipe_names_it_by_its_kind():
    text = dumps(
        Experiment(
            Digits(), ConsistencyDistillation(), ConsistencyScalings(), teacher="runs/digits/edm"
        )
    )
    recipe = loads(text, ['objective.distance={ kind = "LPIPS" }'])
    assert recipe.objective.distance == LPIPS()
    with pytest.raises(ValueError, match="pooling must be one of max, average; got 'mean'"):
        loads(text, ['objective.distance={ kind = "LPIPS", pooling = "mean" }'])
    with pytest.raises(ValueError, match="did you mean 'resize'"):
        loads(text, ['objective.distance={ kind = "LPIPS", resized = 64 }'])


# ── what may be missing ──

X = torch.zeros(1, 3, 32, 32)


@pytest.fixture
def offline(lpips, tmp_path, monkeypatch):
    """An empty folder for weights, and no network."""

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    perceptual._network.cache_clear()
    yield tmp_path / "hub" / "checkpoints"
    perceptual._network.cache_clear()


@pytest.mark.parametrize("net", perceptual.FILES)
def test_without_weights_the_error_says_which_file_to_put_where(offline, net):
    name, size = perceptual.FILES[net]
    with pytest.raises(ValueError) as caught:
        LPIPS(net)(X, X)
    for words in (f"{name} ({size} MB)", f"into {offline} ", f"from {perceptual.URL}{name}"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("net", perceptual.FILES)
def test_files_and_sizes_are_those_that_torchvision_fetches(lpips, net):
    from torchvision import models

    weights = {
        "vgg": models.VGG16_Weights.IMAGENET1K_V1,
        "alex": models.AlexNet_Weights.IMAGENET1K_V1,
        "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }[net]
    name, size = perceptual.FILES[net]
    assert weights.url == perceptual.URL + name
    assert abs(weights.meta["_file_size"] - size) < 0.5


def test_the_weights_in_the_file_are_those_that_are_used(lpips, offline, monkeypatch):
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        stored = squeezenet1_1(weights=None).state_dict()
    offline.mkdir(parents=True)
    file = offline / perceptual.FILES["squeeze"][0]
    torch.save(stored, file)
    with pytest.raises(ValueError, match="not whole, or another file: its SHA-256 begins with"):
        LPIPS("squeeze")(X, X)
    monkeypatch.setattr(perceptual, "_check", lambda file: None)
    LPIPS("squeeze")(X, X)
    used = perceptual._network("squeeze", "max", X.device).net.slice1[0].weight
    assert torch.equal(used, stored["features.0.weight"])


def test_a_file_is_known_by_the_hash_in_its_name(tmp_path):
    content = b"weights"
    good = tmp_path / f"vgg16-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    good.write_bytes(content)
    perceptual._check(good)
    good.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not whole"):
        perceptual._check(good)


def test_without_the_package_the_error_says_what_to_install(stand_in, monkeypatch):
    stand_in(perceptual._pretrained)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"^LPIPS needs a package: pip install 'cmbook\[lpips\]'$"):
        LPIPS()(X, X)


def test_a_torchvision_of_another_build_is_told_as_such(stand_in, monkeypatch, tmp_path):
    (tmp_path / "lpips.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    stand_in(perceptual._pretrained)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"built for torch .*torchvision::nms does not exist\)$"):
        LPIPS()(X, X)


def test_the_package_is_imported_when_it_is_needed_and_not_before():
    code = (
        "import sys; from cmbook import LPIPS, Experiment; LPIPS(); "
        "print('lpips' in sys.modules, 'torchvision' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]
