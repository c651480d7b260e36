"""Quantising while reading: the same weights as by hand, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditc.kernels.formats import FORMATS
from ditc.runtime.checkpoints import CheckpointError, load_and_quantize, pack, parameters_on_meta

Net = Callable[..., nn.Module]


@pytest.fixture
def plain(net: Net, tmp_path: Path) -> Path:
    save_file(net().state_dict(), tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


@pytest.mark.parametrize("format", FORMATS)
def test_packs_each_listed_layer(net: Net, plain: Path, format: str) -> None:
    source, x = net(), torch.randn(5, 64)
    with parameters_on_meta():
        model = net(1)
    report = load_and_quantize(model, plain, {"inner": format})
    expected = torch.ops.ditc.quantize_weight(source.inner.weight, format)
    assert report.formats == {"inner": format} and report.producer == "plain" and report.plain == 5
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(model.inner.parts, expected, strict=True)
    )
    assert torch.equal(model.outer.weight, source.outer.weight) and torch.equal(model.inner.bias, source.inner.bias)
    assert (model(x) - source(x)).norm() < 0.3 * source(x).norm()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("chunk", [1, 64 * 7, 64 * 95])
def test_rows_at_a_time_are_the_whole_weight(
    net: Net, plain: Path, format: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "CHUNK", chunk)
    model = net(1)
    load_and_quantize(model, plain, {"inner": format})
    expected = torch.ops.ditc.quantize_weight(net().inner.weight, format)
    for a, b in zip(model.inner.parts, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("formats", "change", "message"),
    [
        ({"inner": "fp5"}, {}, "inner cannot be 'fp5': there are int8"),
        ({"norm": "int8"}, {}, "norm is a LayerNorm"),
        ({"missing": "int8"}, {}, "Net has none"),
        ({"inner": "int8"}, {"inner.weight": None}, "holds no inner.weight"),
        ({"inner": "int8"}, {"inner.weight": torch.zeros(96, 64, dtype=torch.int8)}, "float32, bfloat16 or float16"),
        ({"inner": "int8"}, {"inner.weight": torch.zeros(96, 32)}, "does not fit inner"),
        ({"inner": "int8"}, {"outer.weight": torch.zeros(48, 95)}, "outer.weight .* does not fit"),
        ({"inner": "int8"}, {"inner.weight": torch.full((96, 64), torch.nan)}, "NaN or infinity"),
        ({"inner": "nvfp4"}, {"inner.weight": torch.full((96, 64), torch.inf)}, "NaN or infinity"),
        ({"inner": "mxfp4"}, {"inner.weight": torch.full((96, 64), torch.nan)}, "NaN or infinity"),
        ({"inner": "int8"}, {"norm.bias": None}, "nothing for 1 tensors"),
        ({"inner": "int8"}, {"more": torch.zeros(2)}, "no module takes 1 tensors"),
    ],
)
def test_refusals_leave_the_model_alone(
    net: Net, tmp_path: Path, formats: dict[str, str], change: dict[str, Tensor | None], message: str
) -> None:
    tensors = net().state_dict() | change
    save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / "plain.safetensors")
    model = net(1)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize(model, tmp_path / "plain.safetensors", formats)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[k]) for k, t in before.items())


def test_a_k_that_the_format_does_not_admit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(24, 8))
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"0 cannot be quantised: nvfp4 needs .* K = 24"):
        load_and_quantize(model, tmp_path / "plain.safetensors", {"0": "nvfp4"})


PEAK = textwrap.dedent("""
    import json, sys, threading, time
    import torch
    from torch import nn
    from ditc.runtime.checkpoints import load_and_quantize, parameters_on_meta

    def resident():  # anonymous memory and mapped files
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024

    path, layers, width, format = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.ops.ditc.quantize(torch.ops.ditc.dequantize(  # what is imported and compiled once
        torch.ops.ditc.quantize_weight(torch.randn(64, 64), format), format, torch.float32), format)
    with parameters_on_meta():
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    peak, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.0005)

    start = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = load_and_quantize(model, path, {str(i): format for i in range(layers)})
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak[0] - start, "packed": report.packed_bytes}))
""")


LAYERS, WIDTH = 10, 2048


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 layers of 16 MiB."""
    path = tmp_path_factory.mktemp("large") / "plain.safetensors"
    save_file({f"{i}.weight": torch.full((WIDTH, WIDTH), i + 0.5) for i in range(LAYERS)}, path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_memory_peaks_at_the_packed_model_and_little_more(large: Path, format: str) -> None:
    """160 MiB in full precision, which must never be there as a whole."""
    layer = WIDTH * WIDTH * 4
    arguments = [str(large), str(LAYERS), str(WIDTH), format]
    # what is freed goes back at once, so that the figure is what is held and not what malloc keeps for later
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # the layer as its file maps it and as a copy, and less than another for intermediate results
    assert found["packed"] < found["peak"] < found["packed"] + 3 * layer < LAYERS * layer
