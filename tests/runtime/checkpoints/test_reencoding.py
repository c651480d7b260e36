"""For which devices 4-bit weights are encoded anew at load."""

from __future__ import annotations

import pytest
import torch

from ditc.runtime.checkpoints.load import reencoding_for


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), None), ((8, 9), "fp8"), ((9, 0), "fp8"), ((10, 0), None), ((12, 0), None)],
)
def test_only_gpus_with_fp8_and_without_fp4(
    capability: tuple[int, int], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reencoding_for(torch.device("cuda")) == expected
    assert reencoding_for(torch.device("cpu")) is None
