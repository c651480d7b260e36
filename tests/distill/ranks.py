"""What each rank of a training under torchrun runs: `ranks.py FOLDER UPDATES`, from a checkpoint if there is one."""

import sys
from pathlib import Path

import torch
from toys import tiny_subject

from ditc.distill.artifact import write_student
from ditc.distill.loop import run_training
from ditc.distill.methods.dmd2 import DMD2
from ditc.distill.parallel import joined, leave
from ditc.distill.run import Run
from ditc.distill.training import Training

METHOD = DMD2(steps=2, fake_updates=2, adversarial=0.1)


def options(updates: int) -> Run:
    return Run(updates=updates, batch=8, accumulate=2, precision="fp32", learning_rate=1e-2, log_every=3)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with joined(torch.device("cpu")) as world:
        training = Training(tiny_subject(), METHOD, options(int(sys.argv[2])), world)
        run_training(training, out)
        write_student(training, out)
    leave()
