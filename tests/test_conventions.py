"""How other code bases write time points: exact both ways, and refused where it would mislead."""

import pytest
import torch

from cmbook.conventions import ECT, JCM, Diffusers, Kinyugo, OpenAI
from cmbook.noise import NoiseRange, Replay, seeded, shuffled
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.samplers import multistep

PUBLISHED = [  # the six of docs/notation.md, and the other time points of the released scripts
    (OpenAI(40), [0, 22, 39], [80, 1.382368]),
    (OpenAI(201), [0, 106, 200], [80, 1.912844]),
    (OpenAI(40), [0, 17, 39], [80, 4.365562]),
    (OpenAI(40), [0, 18, 39], [80, 3.519699]),
    (OpenAI(151), [0, 67, 150], [80, 3.991219]),
    (OpenAI(151), [0, 62, 150], [80, 5.248503]),
    (JCM(), [0, 11, 17], [80, 0.585348]),
    (Diffusers(40), [22, 0], [80, 1.382368]),
    (Kinyugo(), [80.0, 2.25], [80, 2.25]),
    (ECT(), [0.821], [80, 0.821]),
    (OpenAI(40), [0, 39], [80]),
    (Diffusers(40), [0], [80]),
    (Kinyugo(), [80.0], [80]),
    (ECT(), [], [80]),
]
OTHER = NoiseRange(sigma_min=0.01, sigma_max=50.0, rho=5.0)


@pytest.mark.parametrize(("convention", "written", "sigmas"), PUBLISHED)
def test_published_time_points_mean_these_levels_and_back(convention, written, sigmas):
    plain = convention.sigmas(written)
    torch.testing.assert_close(
        plain, torch.tensor(sigmas, dtype=torch.float64), rtol=1e-6, atol=1e-12
    )
    assert convention.written(plain) == written


@pytest.mark.parametrize("noise_range", [NoiseRange(), OTHER])
@pytest.mark.parametrize("levels", [2, 18, 40, 151, 201])
def test_indices_and_levels_convert_both_ways_exactly(noise_range, levels):
    """Random lists of every length, through plain levels and back, and from one to the next."""
    official, diffusers = OpenAI(levels, noise_range), Diffusers(levels, noise_range)
    for seed in range(20):
        count = 1 + seed * (levels - 2) // 20
        indices = sorted(shuffled(levels - 1, seeded(seed))[:count].tolist())
        sigmas = official.sigmas([*indices, levels - 1])
        assert torch.equal(sigmas, noise_range.grid(levels)[indices])
        assert official.written(sigmas) == [*indices, levels - 1]
        assert diffusers.written(sigmas) == indices[::-1]
        assert torch.equal(diffusers.sigmas(indices[::-1]), sigmas)
        assert official.written(sigmas.float()) == [*indices, levels - 1]


def test_the_cifar10_code_writes_as_the_other_official_code():
    assert JCM(18).written(OpenAI(18).sigmas([0, 3, 11, 17])) == [0, 3, 11, 17]
    assert torch.equal(JCM(18, OTHER).sigmas([0, 11, 17]), OpenAI(18, OTHER).sigmas([0, 11, 17]))


def test_plain_levels_come_back_bit_for_bit():
    sigmas = 80 * torch.tensor([1.0, 0.3, 0.0123456789], dtype=torch.float64)
    assert torch.equal(Kinyugo().sigmas(Kinyugo().written(sigmas)), sigmas)
    assert torch.equal(ECT().sigmas(ECT().written(sigmas)), sigmas)


@pytest.mark.parametrize(
    ("convention", "written", "message"),
    [
        (OpenAI(40), [0, 22], r"end with 39.*Noise of level 1\.382 would be left.*\[0, 22, 39\]"),
        (JCM(18), [0, 11], r"end with 17.*Noise of level 0\.5853 would be left"),
        (OpenAI(40), [39], "after at least one evaluation"),
        (OpenAI(40), [39, 22, 0], r"ts must rise; got .*Did you mean \[0, 22, 39\]\?"),
        (OpenAI(40), [0, 22, 22, 39], r"ts must rise; got \[0, 22, 22, 39\]\.$"),
        (OpenAI(40), [0, 22, 40], r"indices in 0 \.\.\. 39; got \[0, 22, 40\]"),
        (OpenAI(40), [], r"indices in 0 \.\.\. 39; got \[\]"),
        (Diffusers(40), [0, 22], r"timesteps must fall; got .*Did you mean \[22, 0\]\?"),
        (Diffusers(40), [3, 22, 0], r"timesteps must fall; got \[3, 22, 0\]\.$"),
        (Diffusers(40), [22, -1], r"timesteps must be indices in 0 \.\.\. 39; got \[22, -1\]"),
        (Kinyugo(), [2.25, 80.0], r"sigmas must decrease.*flip"),
        (ECT(), [0.3, 0.8], "sigmas must decrease"),
        (ECT(), [90.0], "sigmas must decrease"),
    ],
)
def test_lists_that_would_mislead_are_refused(convention, written, message):
    with pytest.raises(ValueError, match=message):
        convention.sigmas(written)


@pytest.mark.parametrize(
    ("convention", "sigmas", "message"),
    [
        (OpenAI(40), [80.0, 1.4], r"1\.4 is no level of this grid of 40.*index 22, 1\.38236"),
        (Diffusers(40), [80.0, 1.4], r"1\.4 is no level of this grid of 40.*index 22, 1\.38236"),
        (OpenAI(201), [80.0, 1.382368], "no level of this grid of 201"),
        (Diffusers(40), [80.0, 0.0], "0 is no level of this grid of 40; the nearest is index 39"),
        (OpenAI(40), [80.0, 0.002], "there the model changes nothing"),
        (OpenAI(40), [1.382368, 80.0], "sigmas must decrease"),
        (ECT(), [20.0, 0.821], "ECT begins at sigma_max = 80 .* the first level is 20"),
    ],
)
def test_levels_that_cannot_be_written_are_refused(convention, sigmas, message):
    with pytest.raises(ValueError, match=message):
        convention.written(torch.tensor(sigmas, dtype=torch.float64))


# ── the scheduler of diffusers ──

SCHEDULERS = {"sched0": Diffusers(40), "sched1": Diffusers(201), "sched2": Diffusers(18, OTHER)}
LISTS = {
    "sched0": [[0], [22, 0], [39, 7, 3, 0], [39, 0]],
    "sched1": [[0], [22, 0], [200, 7, 3, 0], [200, 0]],
    "sched2": [[0], [9, 0], [17, 7, 3, 0], [17, 0]],
}
COUNTS = {
    "sched0": [1, 2, 3, 5, 20, 40],
    "sched1": [1, 2, 3, 5, 100, 201],
    "sched2": [1, 2, 3, 5, 9, 18],
}
CASES = [
    *((name, f"ts{'_'.join(map(str, ts))}", ts) for name in LISTS for ts in LISTS[name]),
    *(  # a number of steps there means this list
        (name, f"n{k}", [i * (SCHEDULERS[name].levels // k) for i in reversed(range(k))])
        for name in COUNTS
        for k in COUNTS[name]
    ),
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "case", "timesteps"), CASES)
def test_levels_equal_those_of_the_diffusers_scheduler(golden, name, case, timesteps):
    """Its list of levels ends with an extra sigma_min; its `timesteps` are 250 ln σ."""
    stored, convention = golden("diffusers_schedule"), SCHEDULERS[name]
    sigmas = convention.sigmas(timesteps)
    close = {"rtol": 2e-6, "atol": 1e-6}
    with_end = torch.cat([sigmas, sigmas.new_tensor([convention.noise_range.sigma_min])])
    torch.testing.assert_close(with_end.float(), stored[f"{name}/{case}/sigmas"], **close)
    time = 1000 * EDMScalings(convention.noise_range).c_noise(sigmas)
    torch.testing.assert_close(time, stored[f"{name}/{case}/timesteps"], **close)


@pytest.mark.parity
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_grid_equals_that_of_the_diffusers_scheduler(golden, name):
    stored, convention = golden("diffusers_schedule"), SCHEDULERS[name]
    sigmas = convention.noise_range.grid(convention.levels)
    close = {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(sigmas, stored[f"{name}/init_sigmas"], **close)
    time = 1000 * EDMScalings(convention.noise_range).c_noise(sigmas)
    torch.testing.assert_close(time, stored[f"{name}/init_timesteps"], **close)


class Squash(torch.nn.Module):
    """The network of the stored run, tanh(0.7 x); it keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, x, c_noise, label=None):
        self.inputs.append(x)
        return torch.tanh(0.7 * x)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("run", "timesteps", "s_noise", "clip"),
    [
        ("run0", [0], 1.0, True),
        ("run1", [22, 0], 1.0, True),
        ("run2", [30, 20, 10, 0], 1.0, True),
        ("run3", [30, 12, 0], 1.01, False),
    ],
)
def test_multistep_equals_the_diffusers_scheduler_step_by_step(
    golden, run, timesteps, s_noise, clip
):
    """It draws noise for the last step too, and multiplies it by 0; its s_noise scales all."""
    stored = golden("diffusers_steps")
    noises = stored[f"{run}/noise"][:-1] if f"{run}/noise" in stored else []
    net, seen, draws = Squash(), [], Replay(normals=[s_noise * noise for noise in noises])
    model = Preconditioned(net, ConsistencyScalings())

    def consistency(x, sigma, label=None):
        seen.append(x)
        return model(x, sigma)

    out = multistep(
        consistency, stored[f"{run}/x0"], Diffusers(40).sigmas(timesteps),
        noise_range=NoiseRange(), generator=draws,
        edit=lambda x0: x0.clamp(-1, 1) if clip else x0,
    )  # fmt: skip
    close = {"rtol": 1e-4, "atol": 1e-5}
    for step, (given, after) in enumerate(zip(net.inputs, [*seen[1:], out], strict=True)):
        torch.testing.assert_close(given, stored[f"{run}/step{step}/model_input"], **close)
        torch.testing.assert_close(after, stored[f"{run}/step{step}/prev_sample"], **close)
    assert len(seen) == len(timesteps)
    assert draws.queues["normal"] == []


def test_the_hint_for_a_list_without_evaluation_is_a_list_that_works():
    with pytest.raises(ValueError, match=r"Did you mean \[0, 39\]"):
        OpenAI(40).sigmas([39])
