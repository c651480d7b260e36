"""The region in which float32 products go to oneDNN, and the self-check before it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from ditc.kernels import matmul
from ditc.kernels.matmul import fp32 as module

FLAG = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def flag_is_put_back() -> Iterator[None]:
    before = FLAG.fp32_precision
    yield
    assert module._depth == 0
    FLAG.fp32_precision = "none"
    assert FLAG.fp32_precision == before


@pytest.fixture
def accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The region's own logic, also on CPUs whose oneDNN rounds."""
    monkeypatch.setattr(module, "fp32_matmul_reason", lambda: None)


@pytest.mark.usefixtures("accurate")
def test_flag_is_set_inside_and_restored_outside() -> None:
    with matmul.fp32_matmul():
        assert FLAG.fp32_precision == "bf16"
        with matmul.fp32_matmul():
            assert FLAG.fp32_precision == "bf16"
        assert FLAG.fp32_precision == "bf16"
    assert FLAG.fp32_precision == "none"


@pytest.mark.usefixtures("accurate")
def test_flag_is_restored_after_an_exception() -> None:
    with pytest.raises(KeyError), matmul.fp32_matmul():
        raise KeyError
    assert FLAG.fp32_precision == "none"


@pytest.mark.usefixtures("accurate")
@pytest.mark.parametrize("value", ["ieee", "tf32", "bf16"])
def test_a_value_set_before_comes_back(value: str) -> None:
    FLAG.fp32_precision = value
    with matmul.fp32_matmul():
        assert FLAG.fp32_precision == "bf16"
    assert FLAG.fp32_precision == value


@pytest.mark.usefixtures("accurate")
def test_an_inherited_value_stays_inherited() -> None:
    torch.backends.fp32_precision = "ieee"
    try:
        with matmul.fp32_matmul():
            assert FLAG.fp32_precision == "bf16"
        assert FLAG.fp32_precision == "ieee"
        torch.backends.fp32_precision = "tf32"
        assert FLAG.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.usefixtures("accurate")
def test_a_value_set_inside_stays() -> None:
    with matmul.fp32_matmul():
        FLAG.fp32_precision = "ieee"
    assert FLAG.fp32_precision == "ieee"


@pytest.mark.usefixtures("accurate")
def test_threads_that_overlap_restore_once_and_last() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with matmul.fp32_matmul():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with matmul.fp32_matmul():
        thread.start()
        assert inside.wait(10)
    assert FLAG.fp32_precision == "bf16"  # the other thread is still in its region
    leave.set()
    thread.join(10)
    assert FLAG.fp32_precision == "none"


def test_a_cpu_that_rounds_is_refused_with_the_measured_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fp32_matmul_error", lambda: 3e-3)
    assert "3.0e-03" in str(module.fp32_matmul_reason())
    with pytest.raises(matmul.Fp32MatmulError, match="rounds"), matmul.fp32_matmul():
        pass
    assert FLAG.fp32_precision == "none"


def test_a_measurement_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fp32_matmul_error", lambda: float("nan"))
    assert module.fp32_matmul_reason() is not None


def test_the_probe_tells_bfloat16_from_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that rounds its operands, as oneDNN does on AMX, must be beyond the bound."""
    linear = torch.nn.functional.linear

    def rounding(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == torch.float32 and FLAG.fp32_precision == "bf16":
            x, w = x.bfloat16().float(), w.bfloat16().float()
        return linear(x, w, b)

    monkeypatch.setattr(torch.nn.functional, "linear", rounding)
    error = module.fp32_matmul_error.__wrapped__()
    assert error > 100 * matmul.ERROR_BOUND


def test_a_region_is_as_accurate_as_it_says() -> None:
    reason = matmul.fp32_matmul_reason()
    if reason is not None:
        pytest.skip(reason)
    x, w = torch.randn(300, 700), torch.randn(500, 700)
    with matmul.fp32_matmul():
        y = torch.nn.functional.linear(x, w)
    truth = x.double() @ w.double().t()
    assert float((y - truth).norm() / truth.norm()) < matmul.ERROR_BOUND


def test_it_acts_on_graphs_compiled_before() -> None:
    """The flag is read when a product runs: a compiled graph gives other last digits inside a region."""
    reason = matmul.fp32_matmul_reason()
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    x, w, b = torch.randn(96, 768), torch.randn(256, 768), torch.randn(256)

    def product() -> torch.Tensor:
        return torch.nn.functional.linear(x, w, b)

    compiled = torch.compile(lambda: torch.relu(product()), fullgraph=True)
    with torch.no_grad():
        outside, eager_outside = compiled(), product()
        with matmul.fp32_matmul():
            inside, eager_inside = compiled(), product()
    if torch.equal(eager_outside, eager_inside):
        pytest.skip("the flag changes nothing on this CPU, eagerly either")
    assert torch.equal(inside, eager_inside.relu()) and torch.equal(outside, eager_outside.relu())
