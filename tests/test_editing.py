"""Editing keeps what is known, equals the paper's rotations and the official functions."""

import math
from itertools import pairwise

import pytest
import torch

from cmbook.editing import (
    LUMINANCE,
    STROKE_SIGMAS,
    Both,
    Downsampling,
    Grayscale,
    Inpainting,
    Linear,
    consistent_with,
    denoise,
    edit,
    interpolate,
    minus,
    orthogonal_basis,
    slerp,
    stroke,
)
from cmbook.noise import NoiseRange, PerImage, Replay, normal, seeded
from cmbook.oracle import Gaussian
from cmbook.samplers import multistep, prior
from cmbook.schedules import karras_sigmas

RANGE = NoiseRange()


def known_half(h=8, w=8):
    known = torch.zeros(h, w, dtype=torch.bool)
    known[:, : w // 2] = True
    return known


def images(n=4, c=3, side=8, dtype=torch.float64, seed=0):
    return torch.rand(n, c, side, side, generator=seeded(seed), dtype=dtype) * 2 - 1


def tanh_model(x, sigma, label=None):
    return torch.tanh(x / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1).to(x))


MATRIX = torch.randn(20, 192, generator=seeded(9), dtype=torch.float64) / 192**0.5
MEASURES = {
    "inpainting": Inpainting(known_half()),
    "grayscale": Grayscale(),
    "downsampling": Downsampling(2),
    "linear": Linear(MATRIX, (3, 8, 8)),
    "mask and brightness": Both(Inpainting(known_half()), Grayscale()),
    "brightness and means": Both(Grayscale(), Downsampling(4)),
    "means, then a mask": Both(Downsampling(4), Inpainting(torch.eye(8) > 0)),
    "three": Both(Both(Grayscale(), Downsampling(4)), Inpainting(torch.eye(8) > 0)),
}


def rows(y):
    """A measurement as one vector for each image."""
    return torch.cat([rows(part) for part in y], 1) if isinstance(y, tuple) else y.flatten(1)


# ── the pseudo-inverse ──


@pytest.mark.parametrize("name", MEASURES)
def test_measuring_what_was_put_back_gives_the_measurement(name):
    measure, x = MEASURES[name], images()
    y = measure(x)
    assert float(rows(minus(measure(measure.pinv(y)), y)).abs().max()) < 1e-6


@pytest.mark.parametrize("name", MEASURES)
def test_replacement_is_the_orthogonal_projection_onto_what_is_known(name):
    """Built from the matrix of A itself, column by column: x + A⁺(y - A x), A⁺ from the SVD."""
    measure, x, other = MEASURES[name], images(), images(seed=1)
    eye = torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    a = rows(measure(eye)).T
    want = x.flatten(1) + rows(minus(measure(other), measure(x))) @ torch.linalg.pinv(a).T
    ours = consistent_with(measure(other), measure, limit=None)(x)
    assert torch.allclose(ours.flatten(1), want, atol=1e-5)


def test_two_measurements_that_commute_need_one_turn():
    x, y = images(), images(seed=1)
    measure = Both(Inpainting(known_half()), Grayscale(), sweeps=1)
    edited = consistent_with(measure(y), measure, limit=None)(x)
    assert torch.allclose(edited[..., :4], y[..., :4])
    assert torch.allclose(Grayscale()(edited), Grayscale()(y))


def test_one_after_the_other_is_no_projection_onto_both():
    x, y = images(), images(seed=1)
    mask = Inpainting(torch.eye(8) > 0)
    means = Downsampling(4)
    first = consistent_with(means(y), means, limit=None)(x)
    second = consistent_with(mask(y), mask, limit=None)(first)
    assert float((means(second) - means(y)).abs().max()) > 0.05


def test_two_measurements_are_brought_together_in_float64():
    """From float32 they give what their float64 copies give, rounded once at the end."""
    measure, x = Both(Downsampling(4), Inpainting(torch.eye(8) > 0)), images(dtype=torch.float32)
    means, known = measure(x)
    found = measure.pinv((means, known))
    assert found.dtype == torch.float32
    assert torch.equal(found, measure.pinv((means.double(), known.double())).float())


def test_measurements_of_two_different_images_are_refused():
    measure = Both(Downsampling(4), Inpainting(known_half()), sweeps=200)
    with pytest.raises(ValueError, match="do they come from one image"):
        measure.pinv((torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 8, 8)))


def test_questions_that_repeat_each_other_are_answered_once():
    """Dependent rows are no contradiction, as long as their answers agree; in float32 too."""
    rows_of_it = torch.cat([MATRIX[:5], MATRIX[:5] + MATRIX[1:6]]).float()
    measure, x = Linear(rows_of_it, (3, 8, 8)), images(dtype=torch.float32)
    made = edited(measure(x), measure)
    assert torch.allclose(measure(made), measure(x), atol=1e-5)


# ── the paper's rotations ──


def test_the_matrix_for_colorization_is_the_papers():
    q = orthogonal_basis(torch.tensor(LUMINANCE))
    papers = [[0.4471, -0.8204, 0.3563], [0.8780, 0.4785, 0.0], [0.1705, -0.3129, -0.9343]]
    assert torch.allclose(q, torch.tensor(papers, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "first", [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [-1.0, 2.0, 0.5]]
)
def test_the_first_column_points_along_the_direction_and_not_against_it(first):
    direction = torch.tensor(first, dtype=torch.float64)
    assert torch.allclose(orthogonal_basis(direction)[:, 0], direction / direction.norm())


@pytest.mark.parametrize("p", [2, 4, 8])
def test_the_matrix_for_super_resolution_begins_with_the_mean(p):
    q = orthogonal_basis(torch.ones(p * p))
    assert torch.allclose(q[:, 0], torch.full((p * p,), 1 / p, dtype=torch.float64))
    assert torch.allclose(q.T @ q, torch.eye(p * p, dtype=torch.float64))


def test_a_direction_of_length_zero_is_refused():
    with pytest.raises(ValueError, match="points nowhere"):
        orthogonal_basis(torch.zeros(3))


def test_colorization_by_rotation_is_the_projection():
    x, y = images(), images(seed=1)
    q = orthogonal_basis(torch.tensor(LUMINANCE))
    turned, known = (torch.einsum("bchw,cd->bdhw", t, q) for t in (x, y))
    turned[:, 0] = known[:, 0]
    rotated = torch.einsum("bdhw,cd->bchw", turned, q)
    ours = consistent_with(Grayscale()(y), Grayscale(), limit=None)(x)
    assert float((ours - rotated).abs().max()) < 1e-7  # float32 weights in the tuple


def test_super_resolution_by_rotation_is_the_projection():
    x, y, p = images(), images(seed=1), 4
    q = orthogonal_basis(torch.ones(p * p))

    def patches(t):
        return t.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 1, 2, 4, 3, 5).flatten(4)

    turned, known = patches(x) @ q, patches(y) @ q
    turned[..., 0] = known[..., 0]
    rotated = turned @ q.T
    ours = consistent_with(Downsampling(p)(y), Downsampling(p), limit=None)(x)
    assert torch.allclose(patches(ours), rotated, atol=1e-12)


# ── the official functions ──


@pytest.mark.parity
@pytest.mark.parametrize("task", ["inpainting", "colorization", "superres"])
def test_editing_equals_the_official_function(golden, task):
    """From the recorded first noise; 9 levels, of which indices 0, 2 and 5 are evaluated."""
    stored = golden(f"edit_{task}")
    measure = {
        "inpainting": lambda: Inpainting(stored["mask"] > 0.5),
        "colorization": Grayscale,
        "superres": lambda: Downsampling(8),
    }[task]()
    y = measure(stored["images"])
    edited = multistep(
        tanh_model,
        stored["x"],
        karras_sigmas(9, 0.002, 80.0, 7.0)[[0, 2, 5]],
        noise_range=RANGE,
        generator=Replay(normals=list(stored["noise"][:2])),
        edit=consistent_with(y, measure),
    )
    torch.testing.assert_close(edited, stored["out"], rtol=1e-4, atol=2e-5)
    reference = stored["reference_image"]
    if task == "inpainting":
        reference = torch.where(stored["mask"] > 0.5, reference, torch.zeros_like(reference))
    torch.testing.assert_close(measure.pinv(y), reference, rtol=1e-4, atol=2e-5)


# ── Algorithm 4 ──


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_known_is_kept(name, dtype):
    measure, x = MEASURES[name], images(dtype=dtype)
    y = measure(x)
    made = edit(tanh_model, y, measure, noise_range=RANGE, generator=seeded(0))
    assert made.dtype == dtype
    # float32 rounds each answer of the matrix, a sum over 192 numbers, by a little more
    bound = 3e-6 if name == "linear" and dtype == torch.float32 else 1e-6
    assert float(rows(minus(measure(made), y)).abs().max()) < bound


def test_editing_starts_from_the_measurement_and_visits_the_papers_forty_levels():
    seen = []

    def model(x, sigma, label=None):
        seen.append((x.clone(), float(sigma[0])))
        return torch.zeros_like(x)

    known, x = known_half(), images()
    noise = [normal(x, seeded(i)) for i in range(40)]
    edit(model, x, Inpainting(known), noise_range=RANGE, generator=Replay(normals=noise))
    assert [s for _, s in seen] == pytest.approx(RANGE.grid(40).tolist())
    assert torch.allclose(seen[0][0], torch.where(known, x, 0.0) + 80 * noise[0])


def test_the_other_convention_for_unknown_pixels_is_a_start():
    seen = []

    def model(x, sigma, label=None):
        seen.append(x.clone())
        return torch.zeros_like(x)

    known, x = known_half(), images()
    black = torch.where(known, x, -1.0)
    sigmas, noise = torch.tensor([1.0]), normal(x, seeded(0))
    edit(
        model, x, Inpainting(known), noise_range=RANGE, generator=Replay(normals=[noise]),
        sigmas=sigmas, start=black,
    )  # fmt: skip
    assert torch.allclose(seen[0], black + noise)


def test_samples_are_clamped_before_what_is_known_is_put_back():
    measure = Downsampling(2)
    y = measure(torch.full((1, 1, 2, 2), 0.9))
    x0 = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]])
    assert torch.allclose(consistent_with(y, measure)(x0), torch.full((1, 1, 2, 2), 0.9))
    unclamped = consistent_with(y, measure, limit=None)(x0)
    assert float(unclamped[0, 0, 0, 0]) == pytest.approx(3.0 - 0.6)


def test_samples_are_clamped_to_the_limit_that_is_asked_for():
    measure, x0 = Downsampling(2), torch.tensor([[[[3.0, 1.5], [1.5, 2.0]]]])
    made = consistent_with(measure(x0), measure, limit=2.0)(x0)
    assert torch.allclose(made, torch.tensor([[[[2.25, 1.75], [1.75, 2.25]]]]))


def test_the_default_levels_are_those_of_the_models_range():
    seen, wide = [], NoiseRange(sigma_min=0.01, sigma_max=90.0, rho=5.0)

    def model(x, sigma, label=None):
        seen.append(float(sigma[0]))
        return torch.zeros_like(x)

    edit(model, images(), Inpainting(known_half()), noise_range=wide, generator=seeded(0))
    assert seen == pytest.approx(wide.grid(40).tolist())


def test_every_evaluation_of_an_edit_is_told_the_class(spy):
    label, x, known = torch.tensor([3, 1]), images(2), {"noise_range": RANGE}
    model = spy(lambda x, sigma: tanh_model(x, sigma))
    edit(model, x, Inpainting(known_half()), label, generator=seeded(0), **known)
    stroke(model, x, label, generator=seeded(0), **known)
    denoise(model, x, torch.ones(2), label)
    interpolate(model, x, x.flip(0), 2, RANGE, label)
    assert len(model.labels) == 40 + 2 + 1 + 2
    assert all(told is label for told in model.labels)


def test_an_edit_does_not_depend_on_its_batch():
    measure, x = Inpainting(known_half()), images()
    together = edit(tanh_model, x, measure, noise_range=RANGE, generator=PerImage(range(4)))
    alone = edit(tanh_model, x[2:3], measure, noise_range=RANGE, generator=PerImage([2]))
    assert torch.allclose(together[2:3], alone)


CORRELATION = 0.8


def replaced(levels: int) -> tuple[float, float]:
    """Mean and std of the second of two correlated numbers, the first being put back to 1.

    The exact consistency function is linear and the noise Gaussian, so each level is a step of
    mean and variance: with eigenvalues l = 0.25 (1 ± 0.8) along (1, ±1)/√2, the function is
    √((l + ε²)/(l + σ²)).
    """
    eigen, smallest = 0.25 * torch.tensor([1 + CORRELATION, 1 - CORRELATION]).double(), 0.002
    axes = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    mean = variance = torch.zeros((), dtype=torch.float64)
    for i, sigma in enumerate(RANGE.grid(levels).tolist()):
        added = sigma**2 - (smallest**2 if i else 0)  # as in multistep, after the start
        f = axes @ torch.diag(((eigen + smallest**2) / (eigen + sigma**2)).sqrt()) @ axes
        mean = f[1, 0] + f[1, 1] * mean
        variance = f[1, 0] ** 2 * added + f[1, 1] ** 2 * (variance + added)
    return float(mean), math.sqrt(float(variance))


def test_replacement_is_not_posterior_sampling():
    """The posterior is N(0.8, 0.3²); replacement with 40 levels gives N(0.5752, 0.3468²)."""
    assert replaced(40) == pytest.approx((0.5752, 0.3468), abs=1e-4)
    world = Gaussian(
        torch.zeros(2, dtype=torch.float64),
        0.25 * torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64),
    )
    y = torch.tensor([[1.0]], dtype=torch.float64).expand(20_000, 1)
    first = Linear(torch.tensor([[1.0, 0.0]], dtype=torch.float64), (2,))
    made = edit(
        world.consistency, y, first, noise_range=RANGE, generator=seeded(0), limit=None
    )  # fmt: skip
    mean, std = float(made[:, 1].mean()), float(made[:, 1].std())
    assert float((made[:, 0] - 1).abs().max()) < 1e-12
    assert (mean, std) == pytest.approx(replaced(40), abs=0.01)  # four standard errors


def test_replacement_nears_the_posterior_like_one_over_the_levels():
    means, stds = zip(*(replaced(n) for n in (640, 1280, 2560)), strict=True)
    for values, posterior in ((means, 0.8), (stds, 0.3)):
        off = [abs(value - posterior) for value in values]
        halved = [later / sooner for sooner, later in pairwise(off)]
        assert halved == pytest.approx([0.5, 0.5], abs=0.03)


# ── strokes, noise, interpolation ──


def test_strokes_start_at_the_painting_with_the_papers_two_levels():
    seen = []

    def model(x, sigma, label=None):
        seen.append((x.clone(), float(sigma[0])))
        return 0.5 * torch.ones_like(x)

    painting = images()
    noise = [normal(painting, seeded(i)) for i in range(2)]
    made = stroke(model, painting, noise_range=RANGE, generator=Replay(normals=noise))
    assert [s for _, s in seen] == pytest.approx(list(STROKE_SIGMAS))
    assert torch.allclose(seen[0][0], painting + STROKE_SIGMAS[0] * noise[0])
    assert torch.equal(made, 0.5 * torch.ones_like(painting))


def test_the_levels_of_strokes_are_those_of_the_papers_grid():
    assert torch.allclose(RANGE.grid(40)[[16, 20]].float(), torch.tensor(STROKE_SIGMAS), atol=0.01)


def test_denoising_is_one_evaluation():
    world = Gaussian.isotropic([0.0, 0.0], 0.5)
    x, sigma = world.sample(10, 0.3, generator=seeded(0)).x, torch.full((10,), 0.3).double()
    assert torch.equal(denoise(world.consistency, x, sigma), world.consistency(x, sigma))


def test_slerp_keeps_the_law_of_noise_and_a_straight_line_does_not():
    start, end = (normal(torch.empty(2000, 64), seeded(i)) for i in (0, 1))
    assert float(slerp(start, end, 0.5).std()) == pytest.approx(1.0, abs=0.01)
    assert float(((start + end) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_slerp_turns_each_sample_by_its_own_angle():
    start, end = (normal(torch.empty(5, 3, 4, 4), seeded(i)) for i in (0, 1))
    whole = slerp(start, end, 0.3)
    alone = torch.cat([slerp(a[None], b[None], 0.3) for a, b in zip(start, end, strict=True)])
    assert torch.allclose(whole, alone)
    quarter = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 0.5)
    assert torch.allclose(quarter, torch.tensor([[math.sqrt(0.5), 2 * math.sqrt(0.5)]]))


@pytest.mark.parametrize("angle", [0.002, 0.05, 0.5, 3.0])
def test_slerp_turns_at_one_speed(angle):
    """A third of the way is a third of the angle, however small; a line would be slower first."""
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    end, third = (
        torch.tensor([[math.cos(a), math.sin(a)]], dtype=torch.float64) for a in (angle, angle / 3)
    )
    assert torch.allclose(slerp(start, end, 1 / 3), third, rtol=0, atol=1e-9)


def test_slerp_ends_at_its_ends_and_bears_equal_ones():
    start, end = (normal(torch.empty(3, 8), seeded(i)) for i in (0, 1))
    assert torch.allclose(slerp(start, end, 0.0), start)
    assert torch.allclose(slerp(start, end, 1.0), end, atol=1e-6)
    assert torch.allclose(slerp(start, start, 0.4), start)
    shares = torch.tensor([0.0, 0.5, 1.0])
    mixed = slerp(start, end, shares)
    assert torch.allclose(mixed[1:2], slerp(start[1:2], end[1:2], 0.5))


def test_interpolation_goes_from_one_sample_to_the_other():
    world = Gaussian.isotropic([0.1, 0.2], 0.5)
    like = torch.empty(6, 2, dtype=torch.float64)
    start, end = (prior(like, RANGE, seeded(i)) for i in (0, 1))
    path = interpolate(world.consistency, start, end, 5, RANGE)
    top = torch.full((6,), 80.0, dtype=torch.float64)
    assert path.shape == (5, 6, 2)
    assert torch.allclose(path[0], world.consistency(start, top))
    assert torch.allclose(path[-1], world.consistency(end, top))


# ── bad input ──


def edited(y, measure, **knobs):
    return edit(tanh_model, y, measure, noise_range=RANGE, generator=seeded(0), **knobs)


BAD = {
    "everything known": (lambda: Inpainting(torch.ones(8, 8) > 0), "every pixel is known"),
    "nothing known": (lambda: Inpainting(torch.zeros(8, 8) > 0), "no pixel is known"),
    "a mask of numbers": (lambda: Inpainting(torch.ones(8, 8)), r"Write mask > 0\.5"),
    "a factor of 1": (lambda: Downsampling(1), "factor must be at least 2"),
    "gray to gray": (lambda: Grayscale()(images(c=1)), "a channel for each weight"),
    "no tiling": (lambda: Downsampling(3)(images()), "do not tile"),
    "a matrix of another size": (lambda: Linear(MATRIX, (1, 8, 8)), "a matrix of 64 columns"),
    "a mask of another size": (
        lambda: Inpainting(known_half(4, 4))(images()), r"shape \(4, 4\), the images \(4, 3, 8, 8\)"
    ),
    "a mask for another batch": (
        lambda: edited(images(1), Inpainting(known_half().expand(4, 3, 8, 8))), "of these images"
    ),
    "a mask of color for gray": (
        lambda: edited(images(c=1), Inpainting(known_half().expand(3, 8, 8))), "of these images"
    ),
    "color as brightness": (
        lambda: edited(images(), Grayscale()), r"expected the brightness of images, \(b, 1, h, w\)"
    ),
    "one image without a batch": (
        lambda: edited(images()[0], Downsampling(2)), r"means of patches, \(b, c, h, w\); got"
    ),
    "fewer answers than questions": (
        lambda: edited(torch.zeros(4, 19), Linear(MATRIX, (3, 8, 8))), r"measures \(b, 20\); got"
    ),
    "answers that contradict each other": (
        lambda: edited(torch.eye(2)[:1], Linear(torch.tensor([[1.0, 0.0]] * 2), (2,))),
        r"misses them by 0\.5\. .* do all come from one sample",
    ),
    "a start for another batch": (
        lambda: edited(images(), Inpainting(known_half()), start=images(3)),
        r"start has shape \(3, 3, 8, 8\); y belongs to samples of \(4, 3, 8, 8\)",
    ),
    "no images": (lambda: edited(images(0), Inpainting(known_half())), "there are no images"),
    "no levels": (
        lambda: edited(images(), Inpainting(known_half()), sigmas=torch.empty(0)),
        "at least one noise level",
    ),
    "levels above the range": (
        lambda: edited(images(), Inpainting(known_half()), sigmas=torch.tensor([81.0, 1.0])),
        "may start at sigma_max = 80; got 81",
    ),
    "strokes above the range": (
        lambda: stroke(
            tanh_model, images(), noise_range=NoiseRange(sigma_max=2.0), generator=seeded(0)
        ),
        "may start at sigma_max = 2; got 5.38",
    ),
    "no noisy images": (lambda: denoise(tanh_model, images(0), torch.ones(0)), "are no images"),
    "NaN of noise": (
        lambda: denoise(tanh_model, images(1), torch.tensor([math.nan])), "finite and at least 0"
    ),
    "beyond the ends": (
        lambda: slerp(torch.ones(2, 3), torch.eye(3)[:2], 1.5), r"lie in \[0, 1\]; got 1\.5"
    ),
    "no fraction": (lambda: slerp(torch.ones(2, 3), torch.eye(3)[:2], math.nan), "got nan"),
    "shapes differ": (lambda: slerp(torch.ones(2, 3), torch.ones(2, 4), 0.5), "shapes differ"),
    "one opposite of several": (
        lambda: slerp(torch.ones(2, 3), torch.tensor([[1.0], [-1.0]]).expand(2, 3), 0.5),
        "are opposite",
    ),
    "opposite noise": (lambda: slerp(torch.ones(2, 3), -torch.ones(2, 3), 0.5), "are opposite"),
    "one step": (
        lambda: interpolate(tanh_model, images(), images(), 1, RANGE), "at least its 2 ends"
    ),
    "pixels of 0 to 255": (
        lambda: edit(
            tanh_model, images() * 127 + 128, Inpainting(known_half()), noise_range=RANGE,
            generator=seeded(0),
        ),
        r"become x / 127\.5 - 1",
    ),
    "a painting of 0 to 255": (
        lambda: stroke(tanh_model, 200 + images(), noise_range=RANGE, generator=seeded(0)),
        r"become x / 127\.5 - 1",
    ),
    "NaN": (
        lambda: stroke(tanh_model, math.nan * images(), noise_range=RANGE, generator=seeded(0)),
        "values should lie in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_what_to_do(name):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()
