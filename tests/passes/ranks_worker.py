"""One of two ranks that guard the same model on different data: prints what it reused, alone and agreed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

import ditc


def main(rank: int, file: str) -> None:
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tiny.TinyDiT(depth=2).eval()
    # samples of rank 0 stand still but for step 4; on rank 1 the second sample moves
    x = torch.randn(2, 4, 8, 8)
    moving = torch.tensor([0.0, float(rank)]).reshape(2, 1, 1, 1)
    inputs = [x + moving * i * torch.randn(2, 4, 8, 8) + (4.0 * (rank == 0 and i == 4)) for i in range(6)]
    found = []
    for group in (None, "world"):
        torch._dynamo.reset()
        cache = {"policy": "first-block", "threshold": 0.1} | ({} if group is None else {"group": group})
        guarded = torch.compile(model, backend="ditc", options={"cache": cache, "lower": "eager", "fuse": False})
        with torch.no_grad(), ditc.session(steps=6):
            for value in inputs:
                guarded(value, torch.full((2,), 500.0))
        program = ditc.stats(model).programs[-1]
        assert program.guard is not None
        details = " ".join(detail for report in program.passes for detail in report.details)
        found.append({"hits": [step.hits for step in program.guard.steps], "details": details})
    print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it: see ditc.distill.parallel.leave


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
