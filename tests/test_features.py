"""Features: what extractors see, and what they refuse to load."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cmbook import normal, seeded
from cmbook.features import (
    _BEFORE_MIXED_6,
    Extractor,
    GlyphNet,
    Inception,
    Pixels,
    _as_tensorflow_resized,
    extract,
    from_bytes,
    to_bytes,
)

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def images(n=4, channels=3, size=16, seed=0):
    return normal(torch.empty(n, channels, size, size), seeded(seed)).clamp(-1, 1)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 1)

    def forward(self, x):
        return self.conv(x)


class StandIn(nn.Module):
    """The call of the field's file, with next to nothing inside."""

    def __init__(self, branch: bool = True):
        super().__init__()
        names = [*_BEFORE_MIXED_6, "pool"] if branch else ["pool"]
        self.layers = nn.Sequential()
        for name in names:
            self.layers.add_module(name, nn.AvgPool2d(2) if name.startswith("pool") else nn.ReLU())
        if branch:
            self.layers.add_module("mixed_6", Branch())
        self.output = nn.Linear(12, 5)

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        features = functional.adaptive_avg_pool2d(img.float(), 2).flatten(1) / 255
        if return_features:
            return features
        logits = features @ self.output.weight.T
        return (logits if no_output_bias else logits + self.output.bias).softmax(1)


@pytest.fixture(scope="module", params=[True, False], ids=["with mixed_6", "without"])
def scripted(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "stand-in.pt"
    net = StandIn(request.param)
    with torch.jit.optimized_execution(False):
        torch.jit.script(net).save(path)
    return net, path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_rounding_brings_every_level_back():
    assert torch.equal(to_bytes(from_bytes(LEVELS)), LEVELS)


def test_truncation_loses_the_63_levels_that_the_docs_tell():
    lost = LEVELS.int() - to_bytes(from_bytes(LEVELS), "truncate").int()
    assert (int(lost.sum()), int(lost.max())) == (63, 1)


def test_the_rules_are_those_of_the_released_codes():
    x = images().double()
    truncated = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    rounded = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    assert torch.equal(to_bytes(x, "truncate"), truncated)
    assert torch.equal(to_bytes(x, "round"), rounded)
    assert float((rounded.float() - truncated.float()).mean()) == pytest.approx(0.5, abs=0.25)


def test_no_rule_gives_no_bytes():
    with pytest.raises(ValueError, match="need a rule"):
        to_bytes(images(), "none")


def test_values_out_of_range_are_clipped():
    assert to_bytes(torch.tensor([[-3.0, 3.0]])).tolist() == [[0, 255]]


def test_pixels_are_what_was_saved():
    x = images()
    assert torch.equal(Pixels()(x).features, from_bytes(to_bytes(x)).flatten(1))
    assert torch.equal(Pixels("none")(x).features, x.flatten(1))


@pytest.mark.parametrize("extractor", [Pixels(), GlyphNet()])
def test_activations_do_not_depend_on_the_batch(extractor):
    x = images(10)
    whole, parts = extractor(x), extract(extractor, x.split(3))
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-4, atol=1e-5)


def test_extractors_say_what_they_are(scripted):
    _, path, sha256 = scripted
    for extractor in (Pixels(), GlyphNet(), Inception(path, sha256)):
        assert isinstance(extractor, Extractor)
        assert extractor.quantization == "round"
    assert len(GlyphNet().sha256) == 64


def test_of_no_images_there_are_no_features():
    with pytest.raises(ValueError, match="no images"):
        extract(Pixels(), [])


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64)])
def test_the_small_network_takes_every_size(channels, size):
    seen = GlyphNet()(images(2, channels, size))
    assert (seen.features.shape, seen.spatial) == ((2, 64), None)
    torch.testing.assert_close(seen.probabilities.sum(1), torch.ones(2))


def test_the_small_network_sees_gray_as_it_sees_equal_channels():
    x = images(2, 1, 32)
    gray, color = (GlyphNet()(z).features for z in (x, x.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(gray, color, rtol=1e-3, atol=2e-3)


def test_the_weights_are_small_enough_for_the_wheel():
    assert GlyphNet.FILE.stat().st_size < 150_000


def test_the_call_of_the_field_is_made(scripted):
    net, path, sha256 = scripted
    x = images(3)
    seen = Inception(path, sha256)(x)
    with torch.no_grad():
        torch.testing.assert_close(seen.features, net(to_bytes(x), return_features=True))
        torch.testing.assert_close(seen.probabilities, net(to_bytes(x), no_output_bias=True))


def test_the_8_bit_rule_reaches_the_network(scripted):
    net, path, sha256 = scripted
    x = images(3)
    for rule, entering in [("truncate", to_bytes(x, "truncate")), ("none", (x + 1) * 127.5)]:
        seen = Inception(path, sha256, quantization=rule)(x)
        with torch.no_grad():
            torch.testing.assert_close(seen.features, net(entering, return_features=True))


def test_spatial_features_are_the_first_7_channels_of_mixed_6_conv(scripted):
    net, path, sha256 = scripted
    seen = Inception(path, sha256)(images(2))
    if not hasattr(net.layers, "mixed_6"):
        assert seen.spatial is None
        return
    x = (resized_by_grid(to_bytes(images(2)).float(), 299) - 128) / 128
    with torch.no_grad():
        for name in _BEFORE_MIXED_6:
            x = getattr(net.layers, name)(x)
        expected = net.layers.mixed_6.conv(x)[:, :7].flatten(1)
    torch.testing.assert_close(seen.spatial, expected, rtol=1e-3, atol=1e-4)


def resized_by_grid(x, size):
    """TensorFlow 1's bilinear resize, by a grid: the shift is what torch's half pixels add."""
    n, c, h, w = x.shape
    theta = torch.tensor([[1.0, 0, 1 / w - 1 / size], [0, 1, 1 / h - 1 / size]]).expand(n, 2, 3)
    grid = functional.affine_grid(theta, [n, c, size, size], align_corners=False)
    return functional.grid_sample(x, grid, "bilinear", "border", align_corners=False)


@pytest.mark.parametrize("size", [16, 64, 400])
def test_the_resize_is_that_of_the_fields_file(size):
    x = 255 * (images(1, 3, size) + 1) / 2
    torch.testing.assert_close(
        _as_tensorflow_resized(x, 299), resized_by_grid(x, 299), rtol=0, atol=0.05
    )


def test_the_resize_of_a_ramp_is_a_ramp():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    expected = np.minimum(np.arange(16) / 2, 7)
    np.testing.assert_allclose(_as_tensorflow_resized(ramp, 16)[0, 0, 3], expected)


def test_gray_images_become_three_channels(scripted):
    _, path, sha256 = scripted
    x = images(2, 1)
    one, three = (Inception(path, sha256)(z).features for z in (x, x.expand(-1, 3, -1, -1)))
    assert torch.equal(one, three)


def test_two_channels_are_refused(scripted):
    _, path, sha256 = scripted
    with pytest.raises(ValueError, match="1 or 3 channels"):
        Inception(path, sha256)(images(1, 2))


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*put it there from https://nvlabs"):
        Inception(tmp_path / "inception-2015-12-05.pt")(images())


def test_code_that_is_not_expected_is_not_loaded(scripted, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="A TorchScript file is code"):
        Inception(scripted[1])(images())


def test_what_is_no_network_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        Inception(path, hashlib.sha256(b"no network").hexdigest())(images())
