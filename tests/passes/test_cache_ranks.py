"""Several ranks decide as one: where one of them computes, all do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditc.passes.cache.ranks import group_name
from ditc.passes.errors import PassError


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_compute_where_one_of_them_must(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("ranks_worker.py")
    commands = [[sys.executable, str(worker), str(rank), str(tmp_path / "meeting")] for rank in range(2)]
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    found = []
    for rank in ranks:
        out, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors[-4000:]
        found.append(json.loads(out.splitlines()[-1]))
    (alone_0, world_0), (alone_1, world_1) = found
    still = [[False, False]] + [[True, True]] * 3 + [[False, False]]
    assert alone_0["hits"][:5] == still and alone_0["hits"] != alone_1["hits"]
    assert [hits[1] for hits in alone_1["hits"]] == [False] * 6 and alone_1["hits"][4][0]
    both = [
        [a and b for a, b in zip(*pair, strict=True)] for pair in zip(alone_0["hits"], alone_1["hits"], strict=True)
    ]
    assert world_0["hits"] == world_1["hits"]
    assert [hits[0] for hits in world_0["hits"][:5]] == [hits[0] for hits in both[:5]]
    assert [hits[1] for hits in world_0["hits"]] == [False] * 6
    assert "each rank decides for itself" in alone_0["details"] and "decide as one" in world_0["details"]


def test_a_group_needs_ranks() -> None:
    with pytest.raises(PassError, match="init_process_group"):
        group_name("world")
