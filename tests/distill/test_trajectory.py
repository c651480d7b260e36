"""The trajectory methods on Gaussian data: zero loss at the exact student, gradients by hand, convergence to it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditc.distill.errors import DistillError
from ditc.distill.method import Method
from ditc.distill.methods.consistency import Consistency, lead, pseudo_huber
from ditc.distill.methods.meanflow import MeanFlow, along, logit_normal, next_level
from ditc.distill.methods.perflow import PeRFlow
from ditc.distill.methods.progressive import FINISHED, PREVIOUS, Progressive, truncated_snr
from ditc.distill.nets import Nets
from ditc.distill.subject import Subject
from ditc.distill.trajectory import euler_walk, walk
from ditc.runtime.generate import generate
from ditc.runtime.samplers import flow_sigmas

from .gaussian import (
    GUIDANCE,
    MEAN,
    SHAPE,
    SPREAD,
    Gaussian,
    average_velocity,
    batch,
    flow_map,
    play,
    subject,
    tabulated,
)

STRAIGHT = [
    PeRFlow(),
    PeRFlow(starts="teacher", times="start"),
    PeRFlow(starts="student", shift=3.0),
    PeRFlow(windows=1, starts="teacher"),
    PeRFlow(windows=2),
    Progressive(round_updates=10),
    Progressive(round_updates=10, rounds=1, shift=2.0),
    Consistency(),
    Consistency(windows=4, target="average", shift=2.0),
    MeanFlow(),
    MeanFlow(velocity="data", power=0.75),
    MeanFlow(derivative="difference", shift=2.0),
]


def ids(method: object) -> str | None:
    if not isinstance(method, Method):
        return None
    return f"{method.name}-{','.join(f'{k}={getattr(method, k)}' for k in sorted(method.model_fields_set))}"


def nets_of(method: Method, of: Subject, student: nn.Module, **players: nn.Module) -> Nets:
    return play(of, student, **method.players(of), **players)


@pytest.mark.parametrize("method", STRAIGHT, ids=ids)
def test_teacher_of_straight_lines_is_its_own_exact_student(method: Method) -> None:
    """One point of data: trajectories are straight, so any number of steps is exact and all losses are zero."""
    guided = subject(s=0.0, guidance=1.0)
    loss = method.loss("student", nets_of(method, guided, Gaussian(s=0.0)), batch(guided))
    assert loss.value.shape == ()
    assert float(loss.value.detach()) == pytest.approx(0, abs=1e-5)
    assert all(value.shape == () and not value.requires_grad for value in loss.log.values())
    wrong = method.loss("student", nets_of(method, guided, Gaussian(s=0.0, factor=1.1)), batch(guided))
    assert float(wrong.value.detach()) > 1e-2


@pytest.mark.parametrize("method", STRAIGHT, ids=ids)
def test_only_the_student_gets_gradients(method: Method) -> None:
    of = subject()
    of.teacher.requires_grad_(True)
    average, student = Gaussian(factor=0.7), Gaussian(factor=0.9)
    nets = Nets(of, {"student": student, "average": average, **method.players(of)})
    method.loss("student", nets, batch(of)).value.backward()
    assert student.factor.grad is not None and float(student.factor.grad) != 0
    for held in (of.teacher, average, *([nets.module(PREVIOUS)] if method.name == "progressive" else [])):
        assert all(p.grad is None for p in held.parameters())


@pytest.mark.parametrize("starts", ["data", "teacher", "student"])
def test_perflow_gradient_by_hand(starts: str) -> None:
    """Student w v on straight lines v: loss (w - 1)² mean v², gradient 2 (w - 1) mean v²; guidance moves the mean."""
    of = subject(s=0.0)
    student = Gaussian(s=0.0, mean=GUIDANCE * MEAN, factor=1.25)
    method = PeRFlow(starts=starts, times="start", parts=1)
    loss = method.loss("student", play(of, student), batch(of))
    loss.value.backward()
    again = batch(of)
    mean = GUIDANCE * MEAN * again.condition.view(-1, 1, 1)
    if starts == "data":
        window = again.integers(4)
        t = flow_sigmas(4)[window].view(-1, 1, 1)
        x = (1 - t) * again.data + t * again.normal()
        v = (x - mean) / t
    else:
        x, paths = again.normal(), []
        for t, r in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
            paths.append((x - mean) / t)
            x = x - (t - r) * paths[-1] * (1.25 if starts == "student" else 1)
        v = torch.stack(paths)
    square = float(v.square().mean())
    assert float(loss.value) == pytest.approx(0.25**2 * square, rel=1e-4)
    assert float(student.factor.grad) == pytest.approx(2 * 0.25 * square, rel=1e-4)


@pytest.mark.parametrize(("starts", "order"), [("data", 1), ("data", 2), ("teacher", 2)])
def test_perflow_error_is_that_of_the_teachers_solver(starts: str, order: int) -> None:
    """The exact average velocity: what is left falls with the step of the solver, by its order, squared."""
    of = subject()
    exact = Gaussian(average_velocity(flow_sigmas(4)), mean=GUIDANCE * MEAN)
    coarse, fine = (
        float(
            PeRFlow(times="start", starts=starts, parts=parts, order=order)
            .loss("student", play(of, exact), batch(of, 64))
            .value.detach()
        )
        for parts in (16, 32)
    )
    assert coarse / fine == pytest.approx(4**order, rel=0.25)
    assert fine < 1e-3


def test_adams_bashforth_is_exact_where_velocity_is_linear_in_time() -> None:
    levels = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0])
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return 2 * t.view(-1, 1).expand_as(x)

    path = walk(velocity, torch.ones(2, 3), levels, torch.tensor([0, 1]), 3, order=2)
    assert len(path) == 4
    assert torch.allclose(torch.stack(calls), torch.tensor([[1.0, 0.8], [0.8, 0.5], [0.5, 0.1]]))
    # the integral of 2 t, but for the first step, which is Euler's and (t - t')² too long
    assert torch.allclose(path[-1][0], torch.full((3,), 0.1**2 - 0.2**2), atol=1e-6)
    assert torch.allclose(path[-1][1], torch.full((3,), 1 + 0.0**2 - 0.8**2 - 0.3**2), atol=1e-6)


def test_perflow_asks_inside_the_window_on_the_line() -> None:
    """A straight student of the wrong mean errs by what the line's points give it, anywhere in the window."""
    of, seen = subject(s=0.0, guidance=1.0), []

    def record(x: Tensor, t: Tensor, mean: Tensor, s: Tensor) -> Tensor:
        seen.append((x, t.flatten()))
        return (x - mean) / t

    PeRFlow(parts=1, windows=2).loss("student", play(of, Gaussian(record, s=0.0)), batch(of, 256))
    x, t = seen[0]
    again = batch(of, 256)
    start = 1 - again.integers(2) / 2
    again.normal()
    assert torch.allclose(t, start - again.uniform() / 2)
    assert t.min() < 0.02 and t.max() > 0.98
    assert x.shape == (256, *SHAPE)


def test_progressive_gradient_weight_and_steps_by_hand() -> None:
    of = subject(s=0.0)
    method = Progressive(round_updates=5, rounds=2, shift=2.0)
    student = Gaussian(s=0.0, mean=GUIDANCE * MEAN, factor=1.25)
    loss = method.loss("student", nets_of(method, of, student), batch(of))
    loss.value.backward()
    again = batch(of)
    # the first of two rounds that end at 4 steps has 8
    t = flow_sigmas(8, 2.0)[again.integers(8)].view(-1, 1, 1)
    x = (1 - t) * again.data + t * again.normal()
    square = ((x - GUIDANCE * MEAN * again.condition.view(-1, 1, 1)) / t).square().mean((1, 2))
    weighted = float((torch.maximum(t**2, (1 - t) ** 2).flatten() * square).mean())
    assert float(loss.value) == pytest.approx(0.25**2 * weighted, rel=1e-4)
    assert float(student.factor.grad) == pytest.approx(2 * 0.25 * weighted, rel=1e-4)
    assert float(loss.log["error"]) == pytest.approx(0.25**2 * float(square.mean()), rel=1e-4)


def test_truncated_snr_is_the_papers_on_the_data() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9])
    snr = ((1 - sigma) / sigma) ** 2
    assert torch.allclose(truncated_snr(sigma), sigma**2 * snr.clamp(min=1))


def test_progressive_rounds_halve_the_steps_and_guide_only_the_first() -> None:
    of, method = subject(), Progressive(round_updates=5, rounds=2)
    average, student = Gaussian(factor=0.7), Gaussian(factor=0.9)
    nets = Nets(of, {"student": student, "average": average, **method.players(of)})
    previous = nets.module(PREVIOUS)
    for update in range(1, 5):
        method.advance(update, nets)
    assert int(previous.get_buffer(FINISHED)) == 0 and float(student.factor) == pytest.approx(0.9)
    method.advance(5, nets)
    assert int(previous.get_buffer(FINISHED)) == 1
    assert float(student.factor) == float(previous.get_parameter("factor")) == pytest.approx(0.7)
    method.advance(10, nets)
    assert int(previous.get_buffer(FINISHED)) == 1
    # the second round: 4 steps, each to match two of the previous student, whose teacher is not asked
    of.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    loss = method.loss("student", nets, batch(of))
    again, grid = batch(of), flow_sigmas(8)
    first = 2 * again.integers(4)
    start = grid[first].view(-1, 1, 1)
    x = (1 - start) * again.data + start * again.normal()
    with torch.no_grad():
        end = euler_walk(lambda x, t: previous(x, 1000 * t, again.condition), x, grid, first, 2)
        error = (student(x, 1000 * grid[first], again.condition) - (x - end) / 0.25).square().mean((1, 2))
    assert float(loss.log["error"]) == pytest.approx(float(error.mean()), rel=1e-4)


@pytest.mark.parametrize(("windows", "target"), [(1, "student"), (4, "student"), (4, "average")])
def test_consistency_gradient_by_hand(windows: int, target: str) -> None:
    """Straight lines v and a student w v: the difference is (w - 1)(t - t') v; only the student at t is moved."""
    of, w, c = subject(s=0.0), 1.25, 0.01
    student = Gaussian(s=0.0, mean=GUIDANCE * MEAN, factor=w)
    nets = Nets(of, {"student": student, "average": Gaussian(s=0.0, mean=GUIDANCE * MEAN)})
    method = Consistency(windows=windows, parts=2, target=target, huber=c)
    loss = method.loss("student", nets, batch(of))
    loss.value.backward()
    again, grid = batch(of), flow_sigmas(8)
    place = again.integers(8)
    t, step = grid[place], 1 / 8
    x = (1 - t.view(-1, 1, 1)) * again.data + t.view(-1, 1, 1) * again.normal()
    square = ((x - GUIDANCE * MEAN * again.condition.view(-1, 1, 1)) / t.view(-1, 1, 1)).square().mean((1, 2))
    reach = t if windows == 1 else t - grid[(place // 2 + 1) * 2]
    # f at t less f at t': -(w - 1) reach v, and + (w - 1)(reach - step) v where the student is its own target
    off = (w - 1) * (torch.full_like(reach, step) if target == "student" else reach)
    root = (off**2 * square + c**2).sqrt()
    assert float(loss.value) == pytest.approx(float(((root - c) / step).mean()), rel=1e-3)
    assert float(student.factor.grad) == pytest.approx(float((off * reach * square / root / step).mean()), rel=1e-3)


def test_consistency_boundary_and_distance() -> None:
    x, v, t = torch.randn(3, 2, 2), torch.randn(3, 2, 2), torch.tensor([0.2, 0.5, 1.0])
    assert torch.equal(lead(x, v, t, t), x)
    assert torch.allclose(lead(x, v, t, torch.zeros(3)), x - t.view(3, 1, 1) * v)
    assert float(pseudo_huber(torch.tensor(0.0), 0.1)) == 0
    assert float(pseudo_huber(torch.tensor(1e6), 0.1)) == pytest.approx(1e3 - 0.1)
    assert float(pseudo_huber(torch.tensor(1e-4), 0.1)) == pytest.approx(1e-4 / 0.2, rel=1e-2)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_meanflow_is_zero_at_the_average_velocity(derivative: str) -> None:
    """Curved trajectories, guided: the identity u = v - (t - r) du/dt holds at every time, so no step has an error."""
    of = subject()
    method = MeanFlow(steps=1, derivative=derivative, power=0.0)
    student = Gaussian(average_velocity(flow_sigmas(1)), mean=GUIDANCE * MEAN, factor=1.0)
    loss = method.loss("student", play(of, student), batch(of, 128))
    assert float(loss.log["error"]) < (1e-8 if derivative == "jvp" else 1e-5)


def test_meanflow_gradient_by_hand() -> None:
    """Student w u: the error is (w - 1) v, held weight 1 / (|error|² + c)^p, gradient 2 weight (w - 1) v·u."""
    of, w, power, floor = subject(guidance=1.0), 1.25, 0.75, 0.1
    levels = flow_sigmas(2)
    student = Gaussian(average_velocity(levels), factor=w)
    loss = MeanFlow(steps=2, level_share=1.0, power=power, floor=floor).loss("student", play(of, student), batch(of))
    loss.value.backward()
    again = batch(of)
    again.uniform()
    t = levels[again.integers(2)]
    again.uniform()
    x = (1 - t.view(-1, 1, 1)) * again.data + t.view(-1, 1, 1) * again.normal()
    with torch.no_grad():
        v = of.teacher(x, 1000 * t, again.condition)
        u = Gaussian(average_velocity(levels))(x, 1000 * t, again.condition)
    square = (w - 1) ** 2 * v.square().sum((1, 2))
    weight = (square + floor) ** -power
    assert float(loss.value) == pytest.approx(float((weight * square).mean()), rel=1e-3)
    assert float(student.factor.grad) == pytest.approx(
        float((weight * 2 * (w - 1) * (u * v).sum((1, 2))).mean()), rel=1e-3
    )


def test_times_are_logit_normal_and_windows_end_below_them() -> None:
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    logit = torch.special.logit(logit_normal(uniform, -0.4, 1.3).double())
    assert float(logit.mean()) == pytest.approx(-0.4, abs=1e-3) and float(logit.std()) == pytest.approx(1.3, abs=1e-2)
    assert 0 < float(logit_normal(torch.zeros(1), -0.4, 1.0)) < 0.01
    levels = flow_sigmas(4)
    t = torch.tensor([1.0, 0.9, 0.75, 0.7499, 0.5, 0.1, 1e-6])
    assert next_level(levels, t).tolist() == [0.75, 0.75, 0.5, 0.5, 0.25, 0.0, 0.0]


def test_derivative_along_the_trajectory_by_differences() -> None:
    """Attention, a norm, and sines of the time in fp64; at t = 1 the difference is one-sided."""
    weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def u(x: Tensor, t: Tensor) -> Tensor:
        q, k, v = torch.einsum("bnc,icd->ibnd", x + torch.sin(3 * t).view(-1, 1, 1), weight)
        return F.layer_norm(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0], (4,))

    x, v = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.3, 1.0], dtype=torch.float64)
    with torch.no_grad():
        exact = along(u, x, t, v, None)
        near, far = ((along(u, x, t, v, reach) - exact).abs().amax((1, 2)) for reach in (1e-5, 1e-4))
    assert float(exact.abs().max()) > 0.1
    assert near[0] < 1e-6 and near[1] < 1e-2
    assert float(far[0] / near[0]) == pytest.approx(100, rel=0.2) and float(far[1] / near[1]) == pytest.approx(
        10, rel=0.2
    )


def train(of: Subject, method: Method, student: nn.Module, updates: int, rate: float = 0.1) -> None:
    """Adam with a falling rate; the average is the student itself."""
    nets = nets_of(method, of, student)
    adam = torch.optim.Adam((p for p in student.parameters() if p.requires_grad), rate, betas=(0.9, 0.99))
    for update in range(updates):
        for group in adam.param_groups:
            group["lr"] = rate * (1 - update / updates)
        adam.zero_grad()
        method.loss("student", nets, batch(of, 64, seed=update)).value.backward()
        adam.step()
        method.advance(update + 1, nets)


@pytest.mark.parametrize(
    ("method", "updates", "parts"),
    [
        (PeRFlow(steps=2, parts=8, times="start", shift=2.0, order=1), 100, 16),
        (PeRFlow(steps=2, parts=8, times="start", starts="teacher", order=1), 80, 16),
        (PeRFlow(steps=2, parts=8, times="start", starts="student", order=1), 80, 16),
        (Progressive(steps=2, rounds=3, round_updates=100), 300, 16),
        (Consistency(steps=2, parts=3, windows=2), 300, 6),
        (Consistency(steps=2, parts=3, windows=1), 300, 6),
    ],
    ids=ids,
)
def test_students_converge_to_the_exact_map(method: Method, updates: int, parts: int) -> None:
    """A student that is affine at every level ends at the teacher's walk along `parts` levels, near the flow map."""
    fine = flow_sigmas(parts, method.shift)
    student = tabulated(fine[:-1])
    train(replace(subject(), teacher=tabulated(fine[:-1])), method, student, updates)
    exact, mean = Gaussian(mean=GUIDANCE * MEAN), torch.tensor(GUIDANCE * MEAN)
    x, condition = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(5)), torch.ones(64, 1)
    for first in (0, parts // 2):
        last = parts if method.name == "consistency" and method.windows == 1 else first + parts // 2
        t, r = fine[first], fine[last]
        with torch.no_grad():
            made = x - (t - r) * student(x, (1000 * t).expand(64), condition)
            walked = euler_walk(
                lambda x, t: exact(x, 1000 * t, condition), x, fine, torch.full((64,), first), last - first
            )
        assert float((made - walked).square().mean().sqrt()) < 0.03
        true = flow_map(x, t, r, mean, torch.tensor(SPREAD))
        assert float((made - true).square().mean().sqrt()) < (0.3 if parts == 6 else 0.1)
        x = 0.7 * x


def test_meanflow_converges_to_mean_and_spread() -> None:
    """A student of the right form finds the data's two numbers, guidance included, from the identity alone."""
    student = Gaussian(average_velocity(flow_sigmas(2)), mean=0.0, s=1.0)
    student.factor.requires_grad_(False)
    train(subject(), MeanFlow(steps=2), student, 120, rate=0.1)
    assert float(student.mean) == pytest.approx(GUIDANCE * MEAN, abs=0.02)
    assert abs(float(student.s)) == pytest.approx(SPREAD, abs=0.02)


@pytest.mark.parametrize(
    "method",
    [
        PeRFlow(),
        PeRFlow(windows=2),
        PeRFlow(shift=2.0),
        Progressive(round_updates=1),
        Consistency(windows=4),
        MeanFlow(),
    ],
    ids=ids,
)
def test_manifest_samples_an_exact_student_exactly(method: Method) -> None:
    """Noise eps at 1 belongs to mean + s eps at 0, whatever the levels between."""
    of = subject()
    sampler = method.sampler(of)
    ends = flow_sigmas(getattr(method, "count", 4), method.shift)
    assert (sampler.role, sampler.steps, sampler.guidance.convention) == ("student", 4, "none")
    assert (sampler.kind == "perflow") == (method.name == "perflow" and method.shift == 1)
    # within a window the line is straight: its slope at a point between is that of its start
    if method.name == "perflow" and method.windows == 2:
        assert sampler.windows == 2
        return
    student = Gaussian(average_velocity(ends))
    seeds, condition = [1, 2, 3], torch.ones(3, 1)
    noise = generate(
        Gaussian(lambda x, t, m, s: torch.zeros_like(x)), condition, seeds=seeds, shape=SHAPE, sampler=sampler
    )
    made = generate(student, condition, seeds=seeds, shape=SHAPE, sampler=sampler)
    assert torch.allclose(made, MEAN + SPREAD * noise, atol=1e-5)


def test_consistency_models_are_sampled_by_renoising() -> None:
    of = subject(s=0.0)
    sampler = Consistency(shift=3.0).sampler(of)
    assert (sampler.kind, sampler.solver, sampler.warped) == ("renoise", "sde", True)
    assert Consistency(steps=1).sampler(of).kind == "euler"
    made = generate(Gaussian(s=0.0), torch.ones(2, 1), seeds=[1, 2], shape=SHAPE, sampler=sampler)
    assert torch.allclose(made, torch.full_like(made, MEAN), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PeRFlow(windows=3), "multiple of windows=3"),
        (lambda: PeRFlow(windows=2, times="start"), "times='inside'"),
        (lambda: PeRFlow(starts="nowhere"), "starts"),
        (lambda: PeRFlow(part=4), "did you mean 'parts'"),
        (Progressive, "needs 'round_updates'"),
        (lambda: Progressive(round_updates=0), "round_updates=0"),
        (lambda: Consistency(windows=2), "windows must be 1 or steps=4"),
        (lambda: Consistency(windows=4, parts=1), "use more parts"),
        (lambda: MeanFlow(time_std=0.0), "time_std"),
        (lambda: MeanFlow(reach=0.5), "reach"),
        (lambda: MeanFlow(shift=0.0), "shift"),
    ],
)
def test_wrong_options_are_refused(make: object, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        make()  # type: ignore[operator]


def test_data_is_asked_for_only_where_it_is_read() -> None:
    bare = subject(data=False)
    for starts in ("teacher", "student"):
        PeRFlow(starts=starts).loss("student", play(bare, Gaussian()), batch(bare))
    for method in (PeRFlow(), Progressive(round_updates=1), Consistency(), MeanFlow()):
        with pytest.raises(DistillError, match="gives none"):
            method.loss("student", nets_of(method, bare, Gaussian()), batch(bare))
