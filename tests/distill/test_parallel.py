"""Two processes that share a training (FSDP2 on gloo) make what one makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditc.distill.errors import DistillError
from ditc.distill.loop import CHECKPOINT, QUALITY, UPDATES, run_training
from ditc.distill.methods.dmd2 import DMD2
from ditc.distill.parallel import World, blocks_of, load_state
from ditc.distill.run import Run
from ditc.distill.training import Training

from .toys import Tiny, tiny_subject

HERE = Path(__file__).parent
METHOD = DMD2(steps=2, fake_updates=2, adversarial=0.1)


def options(updates: int) -> Run:
    """As in ranks.py."""
    return Run(updates=updates, batch=8, accumulate=2, precision="fp32", learning_rate=1e-2, log_every=3)


def torchrun(out: Path, updates: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "ranks.py"), str(out), str(updates)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    alone = Training(tiny_subject(), METHOD, options(6), World(torch.device("cpu")))
    run_training(alone, tmp_path / "one")
    torchrun(tmp_path / "two", 6)
    state = torch.load(tmp_path / "two" / CHECKPOINT, weights_only=True)
    assert state["update"] == 6
    for name, module in alone.modules.items():
        for key, value in module.state_dict().items():
            torch.testing.assert_close(state["modules"][name][key], value, rtol=1e-4, atol=1e-5)
    for name in (UPDATES, QUALITY):
        ours, theirs = (
            [json.loads(line) for line in (tmp_path / folder / name).read_text().splitlines()]
            for folder in ("one", "two")
        )
        assert [record["update"] for record in ours] == [record["update"] for record in theirs]
        for one, two in zip(ours, theirs, strict=True):
            if name == UPDATES:
                assert one["players"]["fake"]["loss"] == pytest.approx(two["players"]["fake"]["loss"], rel=1e-4)
    student = load_file(tmp_path / "two" / "student" / "model.safetensors")
    for key, value in alone.modules["average"].state_dict().items():
        torch.testing.assert_close(student[key].float(), value, rtol=2e-3, atol=1e-4)

    # what two ranks saved, one goes on with
    again = Training(tiny_subject(), METHOD, options(8), World(torch.device("cpu")))
    again.load(tmp_path / "two" / CHECKPOINT)
    again.step()
    assert again.update == 7


def test_a_batch_that_ranks_cannot_share_is_refused_at_the_start() -> None:
    with pytest.raises(DistillError, match="multiple of 3"):
        Training(tiny_subject(), METHOD, Run(batch=8), World(torch.device("cpu"), rank=0, ranks=3))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(DistillError, match="another network"):
        load_state(Tiny(), {"weight": torch.zeros(1)})
    state = Tiny().state_dict()
    with pytest.raises(DistillError, match="shape"):
        load_state(Tiny(), state | {"out.bias": torch.zeros(2)})


def test_blocks_are_the_longest_list() -> None:
    assert len(blocks_of(Tiny())) == 3
    assert blocks_of(torch.nn.Linear(1, 1)) == []
