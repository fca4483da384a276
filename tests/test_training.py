"""Training: every method learns, nothing leaks into the teacher, and precision cancels."""

from copy import deepcopy
from typing import get_args

import pytest
import torch

from cmbook import (
    EDM,
    L2,
    MLP,
    AdaptiveLevels,
    Clock,
    ConsistencyDistillation,
    ConsistencyScalings,
    ConsistencyTraining,
    DoublingLevels,
    EDMScalings,
    Models,
    NoiseRange,
    Pair,
    Preconditioned,
    ResidualMLP,
    Toy,
    UNet,
    blend,
    distilled,
    normal,
    seeded,
    train,
)
from cmbook.losses import AnyObjective
from cmbook.losses.regression import self_consistency
from cmbook.protocols import Batch
from cmbook.training import (
    Adam,
    LearningRate,
    RAdam,
    State,
    _whole_float32,
    frozen_copy,
    frozen_view,
)

RANGE = NoiseRange(sigma_max=10.0)
RING = Toy("ring").build()
TARGETED = AdaptiveLevels(2, 20)  # μ > 0: a target network of its own
METHODS = {
    "edm": EDM(RANGE),
    "cd": ConsistencyDistillation(RANGE),
    "cd with a target": ConsistencyDistillation(RANGE, decay=0.9),
    "ct": ConsistencyTraining(RANGE, DoublingLevels(10, 40)),
    "ct with a target": ConsistencyTraining(RANGE, TARGETED),
}


def built(network, shape=(2,), scalings=None, seed=0):
    """A model whose every weight is random, the zeroed ones too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Preconditioned(network.build(shape), scalings or ConsistencyScalings(RANGE))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def begin(objective, seed=0):
    """A small student in the right dress, and its optimizer."""
    dress = EDMScalings if isinstance(objective, EDM) else ConsistencyScalings
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = Preconditioned(MLP(64, 3).build((2,)), dress(RANGE))
    return student, Adam(3e-3).build(student)


def steps(objective, n, student=None, batches=None, **knobs):
    """The last of n steps."""
    if student is None:
        student, optimizer = begin(objective)
    else:
        optimizer = Adam(3e-3).build(student)
    teacher = RING.world.denoiser if isinstance(objective, ConsistencyDistillation) else None
    knobs = {"steps": n, "optimizer": optimizer, "teacher": teacher, "average_decay": 0.9, **knobs}
    for step in train(student, batches or RING.batches(128, 0), objective, **knobs):
        last = step
    return last


def error(model, objective):
    """The mean distance to the exact answer, over noise levels between 0.1 and 10."""
    generator = seeded(1)
    clean = RING.world.sample(500, generator=generator).x
    sigma = torch.logspace(-1, 1, 500)
    x = (clean + sigma[:, None] * normal(clean, generator)).float()
    truth = RING.world.denoiser if isinstance(objective, EDM) else RING.world.consistency
    with torch.no_grad():
        return float((model(x, sigma) - truth(x, sigma)).norm(dim=1).mean())


@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_bring_every_method_nearer_to_the_truth(method):
    objective = METHODS[method]
    untrained, _ = begin(objective)
    assert error(steps(objective, 50).average, objective) < 0.9 * error(untrained, objective)


@pytest.mark.parametrize("kind", get_args(AnyObjective))
def test_every_objective_of_the_union_trains(kind):
    last = steps(kind(RANGE), 2, teacher=RING.world.denoiser)
    assert (last.state.step, last.loss.value.isfinite().item()) == (2, True)
    assert all(bool(p.isfinite().all()) for p in last.state.student.parameters())


@pytest.mark.parametrize("kind", get_args(AnyObjective))
def test_every_objective_of_the_union_names_its_source(kind):
    assert "Source: " in kind.__doc__


@pytest.mark.parametrize("clock", [Clock(0, 1), Clock(0, 100), Clock(50, 100), Clock(99, 100)])
@pytest.mark.parametrize("kind", get_args(AnyObjective))
def test_the_target_decay_of_every_objective_of_the_union_lies_below_1(kind, clock):
    assert 0 <= kind(RANGE).target_decay(clock) < 1


@pytest.mark.parametrize("method", METHODS)
def test_training_repeats_bit_for_bit(method):
    first, second = (steps(METHODS[method], 3).state.student.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_trains_another_model():
    first, second = (steps(METHODS["edm"], 3, seed=seed).loss.value for seed in (0, 1))
    assert first != second


def test_training_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    steps(METHODS["ct with a target"], 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_teacher_is_bit_identical_after_five_distillation_steps():
    teacher = built(MLP(32, 3), scalings=EDMScalings(RANGE)).requires_grad_(False)
    before = deepcopy(teacher.state_dict())
    steps(METHODS["cd"], 5, distilled(teacher, ConsistencyScalings(RANGE)), teacher=teacher)
    assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)


def test_a_distilled_student_begins_with_the_teachers_weights():
    teacher = built(MLP(32, 3), scalings=EDMScalings(RANGE)).requires_grad_(False)
    student = distilled(teacher, ConsistencyScalings(RANGE))
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_distilled_student_keeps_the_boundary():
    """f(x, sigma_min) = x, although its teacher denoises a little there."""
    teacher, least = built(MLP(32, 3), scalings=EDMScalings(RANGE)), torch.full((3,), 0.002)
    x = normal(torch.empty(3, 2), seeded(0))
    assert torch.equal(distilled(teacher, ConsistencyScalings(RANGE))(x, least), x)
    assert not torch.equal(teacher(x, least), x)


def test_a_distilled_student_learns_although_its_teacher_is_frozen():
    teacher = built(MLP(32, 3), scalings=EDMScalings(RANGE)).requires_grad_(False)
    assert all(p.requires_grad for p in distilled(teacher, ConsistencyScalings(RANGE)).parameters())


NETWORKS = {
    "mlp": (MLP(32, 3), (2,)),
    "residual mlp": (ResidualMLP(32, 2, 16, dropout=0.5), (1, 8, 8)),
    "u-net": (UNet(16, (1, 2), dropout=0.5), (1, 8, 8)),
}


def distance_to_itself(network, shape, target_of, precision):
    """The loss of a student against a target of equal weights, at the same point."""
    student = built(network, shape).train()
    generator = seeded(0)
    x = normal(torch.empty(16, *shape), generator)
    sigma = torch.logspace(-2, 1, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return self_consistency(
            Models(student, target_of(student)),
            Pair(x, sigma, x, sigma),
            None,
            noise_range=RANGE,
            distance=L2(),
            weight="uniform",
            generator=generator,
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("target_of", [frozen_view, frozen_copy])
@pytest.mark.parametrize("network", NETWORKS)
def test_with_equal_weights_student_and_target_agree_exactly(network, target_of, precision):
    loss = distance_to_itself(*NETWORKS[network], target_of, precision)
    assert loss.per_sample.tolist() == [0.0] * 16


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_learns_in_every_precision(method, precision):
    """Autocast must not hand the student a weight that was cast where no gradient was kept."""
    student = built(MLP(16, 2), scalings=EDMScalings(RANGE) if method == "edm" else None)
    before = deepcopy(student.state_dict())
    steps(METHODS[method], 1, student, precision=precision)
    assert not any(torch.equal(before[name], after) for name, after in student.state_dict().items())


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_without_tf32_during_a_step_and_as_before_between_steps(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # without, nothing is switched
    seen = []

    class Watched(EDM):
        def __call__(self, models, batch, *, clock, generator):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().__call__(models, batch, clock=clock, generator=generator)

    student, optimizer = begin(EDM(RANGE))
    batches = RING.batches(8, 0)
    for _ in train(student, batches, Watched(RANGE), steps=2, optimizer=optimizer):
        assert torch.backends.cudnn.allow_tf32 == allowed
    assert seen == [False, False]


def test_a_choice_by_the_newer_names_stands():
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:
        pytest.skip("PyTorch before 2.9 has no newer names")
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        with _whole_float32():
            assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before


def test_float32_is_float32_inside_of_autocast_too():
    plain = steps(METHODS["edm"], 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = steps(METHODS["edm"], 1)
    assert torch.equal(plain.loss.value, inside.loss.value)


def test_bfloat16_rounds():
    first, second = (steps(METHODS["edm"], 1, precision=p) for p in ("float32", "bfloat16"))
    assert 0 < abs(first.loss.value - second.loss.value) < 0.05 * first.loss.value


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (0.25, 2.5), (0.75, 1.5)])
def test_blend_is_the_weighted_mean(decay, expected):
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for layer, value in ((average, 1.0), (model, 3.0)):
        torch.nn.init.constant_(layer.weight, value)
        torch.nn.init.constant_(layer.bias, value)
    blend(average, model, decay)
    assert (average.weight.item(), average.bias.item()) == (expected, expected)


def test_blend_copies_buffers():
    average, model = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    model.running_mean.fill_(5.0)
    blend(average, model, 0.9)
    assert average.running_mean.item() == 5.0


def test_a_frozen_view_is_the_model_without_a_graph():
    model = built(MLP(16, 2))
    x, sigma = torch.ones(3, 2, requires_grad=True), torch.tensor([0.1, 1.0, 5.0])
    frozen = frozen_view(model)(x, sigma)
    assert model(x, sigma).requires_grad
    assert not frozen.requires_grad
    assert torch.equal(frozen, model(x, sigma))


def test_a_frozen_view_is_told_the_class(spy):
    model, label = spy(RING.world.denoiser), torch.tensor([3, 1])
    frozen_view(model)(torch.ones(2, 2), torch.ones(2), label)
    assert len(model.labels) == 1
    assert model.labels[0] is label


def test_a_frozen_view_keeps_forward_mode_derivatives():
    model = built(MLP(16, 2))
    sigma, along = torch.ones(3), torch.ones(3, 2)
    slopes = [
        torch.func.jvp(lambda x, f=f: f(x, sigma), (torch.ones(3, 2),), (along,))[1]
        for f in (model, frozen_view(model))
    ]
    assert float(slopes[0].detach().abs().min()) > 0
    torch.testing.assert_close(slopes[1], slopes[0].detach())


@pytest.mark.parametrize("method", ["edm", "cd", "ct"])
def test_without_decay_no_second_copy_of_the_weights_is_kept(method):
    student, optimizer = begin(METHODS[method])
    assert State.begin(student, optimizer, METHODS[method]).target is None


@pytest.mark.parametrize("method", ["cd with a target", "ct with a target"])
def test_the_target_follows_the_student_with_the_objectives_decay(method):
    objective = METHODS[method]
    student, optimizer = begin(objective)
    before = deepcopy(student.state_dict())
    target = steps(objective, 1, student, optimizer=optimizer).state.target.state_dict()
    mu = objective.target_decay(Clock(0, 1))
    for name, after in student.state_dict().items():
        torch.testing.assert_close(target[name], mu * before[name] + (1 - mu) * after)


@pytest.mark.parametrize("method", ["ct", "ct with a target"])
def test_the_average_follows_the_student_with_its_own_decay(method):
    student, optimizer = begin(METHODS[method])
    before = deepcopy(student.state_dict())
    knobs = {"optimizer": optimizer, "average_decay": 0.7}
    average = steps(METHODS[method], 1, student, **knobs).average.state_dict()
    for name, after in student.state_dict().items():
        torch.testing.assert_close(average[name], 0.7 * before[name] + 0.3 * after)


def test_a_step_follows_the_gradient_of_its_own_batch_alone():
    student, _ = begin(METHODS["edm"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    training = train(student, RING.batches(32, 0), METHODS["edm"], steps=2, optimizer=optimizer)
    next(training)
    alone = deepcopy(student)
    next(training)
    batch, clock = next(RING.batches(32, 0, start=1)), Clock(1, 2)
    loss = METHODS["edm"](Models(alone), batch, clock=clock, generator=seeded(0, "step", 1))
    loss.value.backward()
    for after, before in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad)


def test_every_step_draws_noise_of_its_own():
    student, optimizer = begin(METHODS["edm"])
    training = train(student, RING.batches(32, 0), METHODS["edm"], steps=3, optimizer=optimizer)
    first, second, third = (step.loss.sigma for step in training)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_student_trains_and_the_average_does_not():
    state = steps(METHODS["ct with a target"], 1).state
    modes = (state.student.training, state.target.training, state.average.training)
    assert modes == (True, True, False)


def test_the_clock_of_the_steps_counts_from_zero():
    student, optimizer = begin(METHODS["edm"])
    batches = RING.batches(4, 0)
    found = [s.clock for s in train(student, batches, METHODS["edm"], steps=3, optimizer=optimizer)]
    assert found == [Clock(0, 3), Clock(1, 3), Clock(2, 3)]


@pytest.mark.parametrize(
    ("rate", "step", "expected"),
    [
        (LearningRate(2.0), 0, 2.0),
        (LearningRate(2.0), 99, 2.0),
        (LearningRate(2.0, warmup=3), 0, 0.5),
        (LearningRate(2.0, warmup=3), 3, 2.0),
        (LearningRate(2.0, decay="linear"), 25, 1.5),
        (LearningRate(2.0, decay="cosine"), 0, 2.0),
        (LearningRate(2.0, decay="cosine"), 50, 1.0),
        (LearningRate(2.0, warmup=1, decay="cosine"), 0, 1.0),
    ],
)
def test_the_learning_rate_warms_up_and_decays(rate, step, expected):
    assert rate(Clock(step, 100)) == pytest.approx(expected)


def test_the_optimizer_runs_at_the_learning_rate_of_the_clock():
    student, optimizer = begin(METHODS["edm"])
    steps(METHODS["edm"], 4, student, optimizer=optimizer, learning_rate=LearningRate(1.0, 7))
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("optimizer", [Adam(lr=0.5), RAdam(lr=0.5)])
def test_an_optimizer_has_the_knobs_of_the_recipe(optimizer):
    group = optimizer.build(torch.nn.Linear(1, 1)).param_groups[0]
    assert (group["lr"], tuple(group["betas"])) == (0.5, (0.9, 0.999))


def sharded_gradients(objective, accumulation):
    """The gradients of one step of 12 samples, the step, and the model they belong to."""
    student, _ = begin(objective)
    before, still = deepcopy(student), torch.optim.SGD(student.parameters(), lr=0.0)
    last = steps(
        objective, 1, student, batches=RING.batches(12, 0), optimizer=still,
        accumulation=accumulation,
    )  # fmt: skip
    return [p.grad for p in student.parameters()], last, before


@pytest.mark.parametrize("method", ["edm", "cd with a target", "ct"])
def test_accumulated_gradients_are_those_of_the_mean_of_the_shards(method):
    objective = METHODS[method]
    found, last, student = sharded_gradients(objective, 3)
    batch, clock = next(RING.batches(12, 0)), Clock(0, 1)
    models = Models(student, frozen_view(student), RING.world.denoiser)
    losses = [
        objective(models, Batch(x), clock=clock, generator=seeded(0, "step", 0, shard))
        for shard, x in enumerate(batch.x.split(4))
    ]
    torch.stack([loss.value for loss in losses]).mean().backward()
    for ours, theirs in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)
    torch.testing.assert_close(last.loss.value, last.loss.per_sample.mean())
    assert torch.equal(last.loss.sigma, torch.cat([loss.sigma for loss in losses]))


def test_the_samples_of_a_step_cut_into_shards_each_have_noise_of_their_own():
    sigma = sharded_gradients(METHODS["edm"], 3)[1].loss.sigma
    assert len(sigma.unique()) == 12


def test_one_shard_is_the_step_as_it_was():
    """The draws of a training without accumulation are those of all published runs."""
    found, _, student = sharded_gradients(METHODS["edm"], 1)
    batch = next(RING.batches(12, 0))
    loss = METHODS["edm"](Models(student), batch, clock=Clock(0, 1), generator=seeded(0, "step", 0))
    loss.value.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, student.parameters(), strict=True))


def test_shards_keep_their_labels():
    seen = []

    def objective(models, batch, *, clock, generator):
        seen.append((batch.x[:, 0].tolist(), batch.label.tolist()))
        return METHODS["edm"](models, batch, clock=clock, generator=generator)

    objective.target_decay = METHODS["edm"].target_decay
    batch = Batch(torch.arange(4.0).repeat(2, 1).T, torch.arange(4))
    with torch.random.fork_rng():
        student = Preconditioned(MLP(8, 2).build((2,), 4), EDMScalings(RANGE))
    steps(objective, 1, student, batches=iter([batch]), accumulation=2)
    assert seen == [([0.0, 1.0], [0, 1]), ([2.0, 3.0], [2, 3])]


def gradient_of(clip):
    student, optimizer = begin(METHODS["edm"])
    last = steps(METHODS["edm"], 1, student, optimizer=optimizer, clip=clip)
    return torch.cat([p.grad.flatten() for p in student.parameters()]), last.gradient_norm


def test_the_norm_of_a_step_is_that_of_the_whole_gradient():
    gradient, norm = gradient_of(None)
    torch.testing.assert_close(norm, gradient.norm())


def test_a_long_gradient_is_shortened_and_keeps_its_direction():
    whole, norm = gradient_of(None)
    clipped, before = gradient_of(float(norm) / 4)
    torch.testing.assert_close(clipped, whole / 4, rtol=1e-4, atol=1e-7)
    assert before == norm


def test_a_short_gradient_is_left_alone():
    whole, norm = gradient_of(None)
    assert torch.equal(gradient_of(2 * float(norm))[0], whole)


def test_further_averages_follow_with_decays_of_their_own():
    """Each is the average that a training with this decay alone would have."""
    last = steps(METHODS["ct"], 3, average_decay=0.9, also_average=(0.5, 0.0))
    assert list(last.state.averages) == [0.5, 0.0]
    for decay, average in {0.9: last.average, **last.state.averages}.items():
        alone = steps(METHODS["ct"], 3, average_decay=decay).average.state_dict()
        assert all(torch.equal(alone[name], w) for name, w in average.state_dict().items())
        assert not average.training


def test_a_step_tells_the_learning_rate_it_was_taken_with():
    student, optimizer = begin(METHODS["edm"])
    rate, batches = LearningRate(1.0, warmup=3), RING.batches(8, 0)
    training = train(
        student, batches, METHODS["edm"], steps=5, optimizer=optimizer, learning_rate=rate
    )
    assert [step.learning_rate for step in training] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_rate_that_decays_falls_monotonically_to_nearly_0():
    rate = LearningRate(1.0, warmup=10, decay="cosine")
    found = [rate(Clock(k, 100)) for k in range(100)]
    assert found[:10] == sorted(found[:10])
    assert found[10:] == sorted(found[10:], reverse=True)
    assert 0 < found[-1] < 0.001


def test_the_fused_kernel_of_adam_descends_as_the_plain_one():
    students = [begin(METHODS["edm"])[0] for _ in range(2)]
    plain = torch.optim.Adam(students[1].parameters(), 3e-3)
    fused = Adam(3e-3).build(students[0])
    assert fused.defaults["fused"]
    for student, optimizer in zip(students, (fused, plain), strict=True):
        steps(METHODS["edm"], 3, student, optimizer=optimizer)
    for ours, theirs in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"average_decay": 1.0}, r"average_decay must lie in \[0, 1\); got 1"),
        ({"also_average": (0.5, 1.0)}, r"also_average must lie in \[0, 1\); got 1"),
        ({"also_average": (0.9,)}, r"other than average_decay = 0.9, each once; got \(0.9,\)"),
        ({"also_average": (0.5, 0.5)}, r"each once; got \(0.5, 0.5\)"),
        ({"accumulation": 0}, "accumulation must be at least 1; got 0"),
        ({"accumulation": 3}, "a batch of 128 cannot be cut into 3 equal shards"),
        ({"clip": 0.0}, "clip must be positive, or left out; got 0.0"),
    ],
)
def test_impossible_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        steps(METHODS["edm"], 1, **knobs)


def test_two_noise_ranges_in_one_run_are_refused():
    with pytest.raises(ValueError, match="give both the same NoiseRange"):
        steps(EDM(NoiseRange(sigma_max=80.0)), 1)


def test_batches_that_end_are_refused():
    student, optimizer = begin(METHODS["edm"])
    batches = iter([next(RING.batches(4, 0))])
    with pytest.raises(ValueError, match="ended before step 1"):
        list(train(student, batches, METHODS["edm"], steps=2, optimizer=optimizer))


def test_a_state_of_another_student_is_refused():
    state = steps(METHODS["edm"], 1).state
    with pytest.raises(ValueError, match="belongs to another student or optimizer"):
        steps(METHODS["edm"], 2, state=state)


def test_a_state_with_other_averages_is_refused():
    student, optimizer = begin(METHODS["edm"])
    state = State.begin(student, optimizer, METHODS["edm"], (0.5,))
    with pytest.raises(ValueError, match=r"has further averages \(0.5,\); also_average asks for"):
        steps(METHODS["edm"], 2, student, optimizer=optimizer, state=state)


def test_a_misspelled_precision_is_refused():
    with pytest.raises(Exception, match="precision"):
        steps(METHODS["edm"], 1, precision="bf16")
