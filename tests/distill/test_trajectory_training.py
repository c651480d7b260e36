"""The trajectory methods in the one training loop: rounds survive a kill, ranks agree, configurations are whole."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from ditc.distill.configure import CONF
from ditc.distill.method import Method
from ditc.distill.methods.consistency import Consistency
from ditc.distill.methods.meanflow import MeanFlow
from ditc.distill.methods.perflow import PeRFlow
from ditc.distill.methods.progressive import FINISHED, PREVIOUS, Progressive
from ditc.distill.parallel import World, joined, leave, whole_state
from ditc.distill.run import Run
from ditc.distill.subject import Draw, Subject
from ditc.distill.training import Training

METHODS = [
    Progressive(rounds=2, round_updates=2),
    Consistency(target="average"),
    PeRFlow(starts="student"),
    MeanFlow(derivative="difference"),
]


class Blocks(nn.Module):
    """A network with blocks, so that there is something to divide."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.leave = nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        hidden = self.enter(torch.cat((x, timestep[:, None] / 1000), 1)) + condition
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.leave(hidden)


def subject() -> Subject:
    def draw(count: int, generator: torch.Generator) -> Draw:
        condition = torch.randn(count, 8, generator=generator)
        return Draw(condition, torch.zeros_like(condition), torch.randn(count, 4, generator=generator))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Blocks()
    return Subject("blocks", teacher, lambda net, x, t, c: net(x, t, c), (4,), draw, 2.0)


def training(method: Method, world: World) -> Training:
    run = Run(updates=5, batch=4, warmup=0, precision="fp32", device="cpu", learning_rate=1e-2)
    return Training(subject(), method, run, world)


def state_after(method: Method, world: World) -> dict[str, dict[str, Tensor]]:
    trained = training(method, world)
    for _ in range(5):
        trained.step()
    return {name: whole_state(module) for name, module in trained.modules.items()}


def test_progressive_goes_on_in_the_round_that_a_checkpoint_was_in(tmp_path: Path) -> None:
    alone, method = World(torch.device("cpu")), METHODS[0]
    whole = state_after(method, alone)
    killed = training(method, alone)
    for _ in range(3):
        killed.step()
    killed.save(tmp_path / "checkpoint.pt")
    resumed = training(method, alone)
    resumed.load(tmp_path / "checkpoint.pt")
    assert int(resumed.modules[PREVIOUS].get_buffer(FINISHED)) == 1
    for _ in range(2):
        resumed.step()
    for name, module in resumed.modules.items():
        for key, value in whole_state(module).items():
            assert torch.equal(value, whole[name][key]), f"{name}.{key}"


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Networks that are only asked (average, previous) are divided too, and are read and changed by the loop."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path],
        check=True,
        timeout=300,
    )
    for place, method in enumerate(METHODS):
        two = torch.load(tmp_path / f"{place}.pt", weights_only=True)
        for name, state in state_after(method, World(torch.device("cpu"))).items():
            for key, value in state.items():
                torch.testing.assert_close(two[name][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["progressive", "consistency", "perflow", "meanflow"])
def test_configurations_name_every_option_with_its_default(name: str) -> None:
    given = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text("utf-8"))
    module, _, kind = given.pop("_target_").rpartition(".")
    method = getattr(importlib.import_module(module), kind)
    assert method.name == name
    assert given.pop("steps") == "${steps}"
    assert given.keys() == method.model_fields.keys() - {"steps"}
    made = method(**given)
    defaults = {key: field.default for key, field in method.model_fields.items() if not field.is_required()}
    assert {key: getattr(made, key) for key in defaults} == defaults


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as world:
        for place, method in enumerate(METHODS):
            state = state_after(method, world)
            if world.leads:
                torch.save(state, Path(sys.argv[1]) / f"{place}.pt")
    leave()
