"""DMD2 and LADD in closed form: gradients by hand, none for whom they are not meant, and the student that they make."""

import pytest
import torch
from torch import nn

from ditc.distill.batch import Batch
from ditc.distill.critic import Heads, fooling_loss, places_for, telling_loss
from ditc.distill.errors import DistillError
from ditc.distill.methods.dmd2 import DMD2, FAKE, HEADS
from ditc.distill.methods.ladd import CRITIC, LADD
from ditc.distill.nets import Nets
from ditc.distill.seeds import seeded
from ditc.runtime.samplers import flow_mix, flow_sigmas, flow_x0

from .gaussian import MEAN, SPREAD, Gaussian, play, velocity
from .gaussian import subject as gaussian_subject
from .toys import Tiny, tiny_subject


def rows(subject: object, count: int = 8, seed: int = 3) -> Batch:
    return Batch(subject, count, seeded(seed))  # type: ignore[arg-type]


def tiny_nets(method: DMD2 | LADD) -> tuple[Nets, dict[str, nn.Module]]:
    subject = tiny_subject()
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"student": Tiny(), **method.players(subject)}
    for module in modules.values():
        module.requires_grad_(True)
    return Nets(subject, modules), modules


def with_gradient(modules: dict[str, nn.Module]) -> set[str]:
    return {name for name, module in modules.items() if any(p.grad is not None for p in module.parameters())}


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_the_fake_score_learns_and_the_generator_gets_no_gradient(adversarial: float) -> None:
    method = DMD2(steps=2, adversarial=adversarial)
    nets, modules = tiny_nets(method)
    method.loss(FAKE, nets, rows(nets.subject)).value.backward()  # type: ignore[no-untyped-call]
    assert with_gradient(modules) == {FAKE} | ({HEADS} if adversarial else set())


def test_the_critic_learns_and_neither_generator_nor_teacher_get_a_gradient() -> None:
    method = LADD(steps=2)
    nets, modules = tiny_nets(method)
    method.loss(CRITIC, nets, rows(nets.subject)).value.backward()  # type: ignore[no-untyped-call]
    assert with_gradient(modules | {"teacher": nets.subject.teacher}) == {CRITIC}


def test_what_moves_the_generator_is_the_weighted_difference_of_scores() -> None:
    """The gradient for a sample is (mu_fake - mu_real) / (mean|x - mu_real| N), on data whose scores are known."""
    subject = gaussian_subject(guidance=2.0)
    student, fake = Gaussian(mean=0.3), Gaussian(mean=0.4, s=0.9)
    method = DMD2(steps=1)
    loss = method.loss("student", play(subject, student, fake=fake), rows(subject)).value
    (got,) = torch.autograd.grad(loss, student.mean)

    batch = rows(subject)
    noise, sigma = batch.normal(), torch.ones(8, 1, 1)
    mean = batch.condition.view(-1, 1, 1)
    moved = Gaussian(mean=0.3)
    x = flow_x0(noise, velocity(noise, sigma, mean * moved.mean, moved.s), sigma)
    t = (0.02 + 0.96 * batch.uniform()).view(-1, 1, 1)
    noisy = flow_mix(x, batch.normal(), t)
    # guidance 2 with a null condition of mean 0 is the score of data of twice the mean
    real = flow_x0(noisy, velocity(noisy, t, 2 * MEAN * mean, torch.tensor(SPREAD)), t)
    made = flow_x0(noisy, velocity(noisy, t, 0.4 * mean, torch.tensor(0.9)), t)
    weight = 1 / ((x - real).abs().mean((1, 2), keepdim=True) + 1e-6)
    direction = (weight * (made - real) / x.numel()).detach()
    (expected,) = torch.autograd.grad((x * direction).sum(), moved.mean)
    torch.testing.assert_close(got, expected)


def test_nothing_moves_where_the_scores_agree() -> None:
    subject = gaussian_subject(guidance=1.0)
    student = Gaussian(mean=0.1)
    loss = DMD2(steps=2).loss("student", play(subject, student, fake=Gaussian()), rows(subject)).value
    (gradient,) = torch.autograd.grad(loss, student.mean)
    assert float(loss.detach()) < 1e-10
    assert float(gradient.abs()) < 1e-6


def test_one_step_reaches_the_guided_mean() -> None:
    """A student whose only parameter is its mean, and a fake score that learns: both end at the guided mean."""
    subject = gaussian_subject(guidance=2.0)
    student, fake = Gaussian(), Gaussian()
    nets = play(subject, student, fake=fake)
    method = DMD2(steps=1, fake_updates=2)
    optimisers = {
        "student": torch.optim.Adam([student.mean], lr=0.03, betas=(0.0, 0.9)),
        FAKE: torch.optim.Adam([fake.mean, fake.s], lr=0.06, betas=(0.0, 0.9)),
    }
    for update in range(240):
        player = method.turn(update)
        optimisers[player].zero_grad()
        method.loss(player, nets, rows(subject, 32, update)).value.backward()  # type: ignore[no-untyped-call]
        optimisers[player].step()
    # one step from noise lands on the mean itself: x0 = -velocity at sigma 1 is the mean
    assert float(student.mean.detach()) == pytest.approx(2 * MEAN, abs=0.2)
    assert float(fake.mean.detach()) == pytest.approx(2 * MEAN, abs=0.2)


def test_trajectories_are_those_of_the_sampler() -> None:
    """Backward simulation re-noises the student's own samples, row by row one step of one trajectory."""
    method = DMD2(steps=3)
    subject = gaussian_subject()
    nets = play(subject, Gaussian(mean=0.2))
    inputs, sigma, made = method.simulate(nets, rows(subject, 6), outputs=True)
    noise = rows(subject, 6).normal()
    condition = rows(subject, 6).condition
    assert sigma.tolist() == pytest.approx([*flow_sigmas(3)[:-1].tolist()] * 2)
    for first in (0, 3):
        assert torch.equal(inputs[first], noise[first])
        for row in range(first, first + 3):
            at = sigma[row : row + 1]
            x0 = flow_x0(inputs[[row]], nets("student", inputs[[row]], at, condition[[first]]), at)
            torch.testing.assert_close(made[[row]], x0)
            if row < first + 2:
                torch.testing.assert_close(inputs[[row + 1]], flow_mix(x0, noise[[row + 1]], sigma[row + 1]))
    last, _, empty = method.simulate(nets, rows(subject, 6), outputs=False)
    assert torch.equal(last, inputs)
    assert empty.numel() == 0


def test_a_batch_is_whole_trajectories() -> None:
    nets = play(gaussian_subject(), Gaussian(), fake=Gaussian())
    with pytest.raises(DistillError, match="multiple of 4"):
        DMD2(steps=4).loss(FAKE, nets, rows(nets.subject, 6))


def test_turns() -> None:
    assert [DMD2(fake_updates=2).turn(k) for k in range(6)] == [FAKE, FAKE, "student"] * 2
    assert [LADD().turn(k) for k in range(4)] == [CRITIC, "student"] * 2


def test_the_critics_losses() -> None:
    real, made = torch.tensor([[0.0], [2.0]]), torch.tensor([[-1.0], [1.0]])
    softplus = lambda x: torch.log1p(torch.exp(torch.tensor(x)))  # noqa: E731
    torch.testing.assert_close(fooling_loss(made), (softplus(1.0) + softplus(-1.0)) / 2)
    expected = (softplus(0.0) + softplus(-2.0)) / 2 + (softplus(-1.0) + softplus(1.0)) / 2
    torch.testing.assert_close(telling_loss(real, made), expected)


def test_places_of_heads() -> None:
    tiny = Tiny()
    assert places_for(tiny, (), 1) == ("blocks.1",)
    assert places_for(tiny, (), 3) == ("blocks.0", "blocks.1", "blocks.2")
    assert places_for(tiny, ("embed",), 1) == ("embed",)
    with pytest.raises(DistillError, match="4 places"):
        places_for(tiny, (), 4)
    with pytest.raises(DistillError, match="'block'"):
        places_for(tiny, ("block",), 1)
    with pytest.raises(DistillError, match="no list of blocks"):
        places_for(nn.Linear(1, 1), (), 1)
    assert Heads([6, 6])([torch.zeros(2, 5, 6), torch.zeros(2, 3, 6)]).shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sigmas": (1.0, 0.5)}, "falling from 1"),
        ({"steps": 2, "sigmas": (0.5, 1.0)}, "falling from 1"),
        ({"lowest": 0.9, "highest": 0.5}, "lowest"),
        ({"stepps": 4}, "did you mean 'steps'"),
        ({"steps": "4"}, "steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(DistillError, match=told):
        DMD2(**options)


def test_manifests() -> None:
    subject = tiny_subject()
    for method in (DMD2(steps=2, sigmas=(1.0, 0.7)), LADD(steps=4)):
        sampler = method.sampler(subject)
        assert (sampler.role, sampler.kind, sampler.solver, sampler.guidance.convention) == (
            "student",
            "renoise",
            "sde",
            "none",
        )
    assert DMD2(steps=2, sigmas=(1.0, 0.7)).sampler(subject).sigmas == (1.0, 0.7, 0.0)
