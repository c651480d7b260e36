"""The loop: the same bits after a kill, gradients for one network at a time, checkpoints of other trainings refused."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from ditc.distill.errors import DistillError
from ditc.distill.loop import CHECKPOINT, QUALITY, UPDATES, run_training
from ditc.distill.method import Method
from ditc.distill.methods.dmd2 import DMD2
from ditc.distill.methods.ladd import LADD
from ditc.distill.nets import AVERAGE
from ditc.distill.parallel import World
from ditc.distill.run import Run
from ditc.distill.training import Training

from .toys import tiny_subject

DMD = DMD2(steps=2, fake_updates=2, adversarial=0.1)
ALONE = World(torch.device("cpu"))


def training(method: Method = DMD, **options: object) -> Training:
    given = {"updates": 12, "batch": 4, "precision": "fp32", "learning_rate": 1e-2, "save_every": 5, "log_every": 3}
    return Training(tiny_subject(), method, Run(**given | options), ALONE)  # type: ignore[arg-type]


def weights(done: Training) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value for name, module in done.modules.items() for key, value in module.state_dict().items()
    }


def assert_equal(one: Training, other: Training) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", [DMD, LADD(steps=2)], ids=["dmd2", "ladd"])
def test_a_run_that_was_killed_equals_one_that_was_not(method: Method, tmp_path: Path) -> None:
    straight = training(method, accumulate=2, precision="bf16")
    for _ in range(8):
        straight.step()
    killed = training(method, accumulate=2, precision="bf16")
    for _ in range(5):
        killed.step()
    killed.save(tmp_path / "it.pt")
    killed.step()  # lost with the process
    resumed = training(method, accumulate=2, precision="bf16")
    resumed.load(tmp_path / "it.pt")
    for _ in range(3):
        resumed.step()
    assert (resumed.update, resumed.student_updates) == (straight.update, straight.student_updates)
    assert_equal(resumed, straight)


@pytest.mark.parametrize("method", [DMD, DMD2(steps=1), LADD(steps=2)], ids=["dmd2", "no heads", "ladd"])
def test_a_turn_moves_its_player_alone(method: Method) -> None:
    run = training(method)
    for update in range(4):
        player = method.turn(update)
        before = copy.deepcopy({"teacher": run.subject.teacher, **run.modules})
        run.step()
        for name, module in {"teacher": run.subject.teacher, **run.modules}.items():
            moved = any(
                not torch.equal(a, b) for a, b in zip(module.parameters(), before[name].parameters(), strict=True)
            )
            owned = name == player or name.startswith(f"{player}.") or (name == AVERAGE and player == "student")
            assert moved == owned, (update, player, name)


def test_ctrl_c_ends_an_update_and_the_same_call_goes_on(tmp_path: Path) -> None:
    class Interrupted(Training):
        def step(self):  # type: ignore[no-untyped-def]
            if self.update == 7:
                signal.raise_signal(signal.SIGINT)
            return super().step()

    stopped = Interrupted(tiny_subject(), DMD, training().run, ALONE)
    assert not run_training(stopped, tmp_path)
    assert stopped.update == 8
    resumed = training()
    assert run_training(resumed, tmp_path)
    straight = training()
    for _ in range(12):
        straight.step()
    assert_equal(resumed, straight)
    logged = [json.loads(line)["update"] for line in (tmp_path / UPDATES).read_text().splitlines()]
    assert logged == [3, 6, 9, 12]
    measured = json.loads((tmp_path / QUALITY).read_text())
    assert (measured["update"], measured["rows"]) == (12, 2)


def test_what_a_killed_run_logged_after_its_checkpoint_is_forgotten(tmp_path: Path) -> None:
    class Killed(Training):
        def step(self):  # type: ignore[no-untyped-def]
            if self.update == 8:
                raise SystemError("the power is gone")
            return super().step()

    with pytest.raises(SystemError):
        run_training(Killed(tiny_subject(), DMD, training().run, ALONE), tmp_path)
    with (tmp_path / UPDATES).open("a") as file:
        file.write('{"update": 9, "pla')
    resumed = training()
    assert run_training(resumed, tmp_path)
    logged = [json.loads(line)["update"] for line in (tmp_path / UPDATES).read_text().splitlines()]
    assert logged == [3, 6, 9, 12]
    assert resumed.update == 12


def test_gradients_of_several_forwards_are_averaged() -> None:
    run = training(DMD2(steps=2), accumulate=2)
    run.modules["fake"].requires_grad_(True)
    seen = []
    for forwards in (1, 2):
        run.run = run.run.model_copy(update={"accumulate": forwards})
        run.modules["fake"].zero_grad()
        run._backward("fake")
        seen.append(torch.cat([p.grad.flatten() for p in run.modules["fake"].parameters() if p.grad is not None]))
    # the second forward's draws are its own, so the mean differs from the first alone, and is of its size
    assert not torch.equal(*seen)
    assert 0.3 < float(seen[1].norm() / seen[0].norm()) < 3


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (DMD2(steps=2, fake_updates=2), {}, "method.adversarial"),
        (LADD(), {}, "method"),
        (DMD, {"learning_rate": 2e-2}, "run.learning_rate"),
        (DMD, {"seed": 1}, "run.seed"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    method: Method, options: dict[str, object], told: str, tmp_path: Path
) -> None:
    training().save(tmp_path / CHECKPOINT)
    with pytest.raises(DistillError, match=told):
        training(method, **options).load(tmp_path / CHECKPOINT)


def test_the_end_may_move_but_not_before_what_was_done(tmp_path: Path) -> None:
    done = training()
    done.step()
    done.step()
    done.save(tmp_path / CHECKPOINT)
    training(updates=40, save_every=7).load(tmp_path / CHECKPOINT)
    with pytest.raises(DistillError, match="beyond the 1"):
        training(updates=1).load(tmp_path / CHECKPOINT)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({"format": "something"}, tmp_path / CHECKPOINT)
    with pytest.raises(DistillError, match="no checkpoint"):
        training().load(tmp_path / CHECKPOINT)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    run = training()
    with torch.no_grad():
        next(run.modules["fake"].parameters()).fill_(float("inf"))
    before = copy.deepcopy(run.modules["fake"])
    with pytest.raises(FloatingPointError, match=r"run\.learning_rate"):
        run.step()
    assert run.update == 0
    assert all(torch.equal(a, b) for a, b in zip(run.modules["fake"].parameters(), before.parameters(), strict=True))


def test_the_rate_rises_stays_and_falls() -> None:
    run = Run(updates=100, warmup=10, decay=0.5)
    assert run.pace_at(0) == pytest.approx(0.1)
    assert run.pace_at(9) == run.pace_at(50) == 1
    assert run.pace_at(75) == pytest.approx(0.5)
    assert 0 < run.pace_at(99) < 0.03


def test_a_method_must_not_name_the_loops_own_networks() -> None:
    class Odd(DMD2):
        def players(self, subject: object) -> dict[str, nn.Module]:
            return {"teacher": nn.Linear(1, 1)}

    with pytest.raises(DistillError, match="teacher"):
        training(Odd(steps=2))
