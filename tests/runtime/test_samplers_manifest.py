"""The sampler manifest: what it accepts, what it refuses and with which words, and that it survives the journey."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.kernels.errors import DitcError
from ditc.runtime.samplers import SamplerError, flow_sigmas, perflow_times, static_shift
from ditc.runtime.samplers.manifest import Betas, GuidanceRule, Sampler, Shift, TokenLine
from ditc.runtime.samplers.published import published, published_names
from ditc.runtime.samplers.solver import make_solver, walk

EULER: dict[str, Any] = {
    "role": "student",
    "kind": "euler",
    "process": "flow",
    "solver": "ode",
    "prediction": "velocity",
    "steps": 2,
    "sigmas": [1.0, 0.5, 0.0],
    "warped": True,
    "timestep_scale": 1000.0,
}
LCM = {
    **{"role": "student", "timestep_scale": 1.0},
    **{"kind": "lcm", "process": "vp", "solver": "sde", "prediction": "eps"},
    **{"steps": 2, "timesteps": [999, 499, 0], "betas": {}},
}
SCM = {
    **{name: EULER[name] for name in ("role", "timestep_scale")},
    **{"kind": "trigflow", "process": "trigflow", "solver": "sde", "prediction": "trigflow"},
    **{"steps": 2, "angles": [1.5708, 1.3, 0.0], "sigma_data": 0.5},
}
PERFLOW = {**EULER, "kind": "perflow", "steps": 4, "sigmas": list(perflow_times(4)), "windows": 4}
RENOISE = {**EULER, "kind": "renoise", "solver": "sde"}


def refuse(base: dict[str, Any], reason: str, **changes: Any) -> None:
    values = {name: value for name, value in {**base, **changes}.items() if value is not ...}
    with pytest.raises(SamplerError, match=reason):
        Sampler(**values)


@pytest.mark.parametrize("base", [EULER, LCM, SCM, PERFLOW, RENOISE])
def test_the_bases_of_these_tests_are_right(base: dict[str, Any]) -> None:
    assert Sampler(**base).steps == base["steps"]


def test_errors_are_ditcs_and_values() -> None:
    assert issubclass(SamplerError, DitcError)
    assert issubclass(SamplerError, ValueError)


@pytest.mark.parametrize(
    ("base", "changes", "reason"),
    [
        (EULER, {"sigmaz": [1.0, 0.0]}, "unknown field 'sigmaz': did you mean 'sigmas'"),
        (EULER, {"zzz": 1}, "unknown field 'zzz': known fields: .*sigmas"),
        (EULER, {"shift": {"amout": 3.0}}, r"unknown field 'shift.amout': did you mean 'amount'"),
        (LCM, {"betas": {"begin": 0.1}}, r"unknown field 'betas.begin'"),
        (EULER, {"kind": "eulr"}, "kind='eulr'.*did you mean 'euler'"),
        (EULER, {"kind": ...}, "kind is missing"),
        (EULER, {"steps": "2"}, "steps='2'.*integer"),
        (EULER, {"warped": 1}, "warped=1.*bool"),
        (EULER, {"timestep_scale": 0.0}, "timestep_scale"),
        (EULER, {"format": "safetensors"}, "no sampler manifest: its format is 'safetensors'"),
        (EULER, {"version": 2}, "version 2.*reads up to 1"),
        (EULER, {"version": True}, "version must be a whole number"),
        # processes, solvers, predictions
        (EULER, {"process": "vp"}, "kind='euler' needs process 'flow', not 'vp'"),
        (EULER, {"prediction": "eps"}, "needs prediction 'velocity' or 'x0', not 'eps'"),
        (EULER, {"solver": "sde"}, "draws none: say solver='ode', or kind='renoise'"),
        (RENOISE, {"solver": "ode"}, "lives by it: say solver='sde', or kind='euler'"),
        (LCM, {"kind": "tcd", "eta": 0.0}, "eta 0 draws no noise and is the ode"),
        (LCM, {"kind": "tcd", "eta": 0.3, "solver": "ode"}, "sde needs eta > 0"),
        (LCM, {"kind": "tcd"}, "kind='tcd' needs eta"),
        (EULER, {"eta": 0.3}, "eta=0.3 has no meaning"),
        (SCM, {"sigma_data": None}, "needs sigma_data"),
        (EULER, {"windows": 4}, "windows=4 has no meaning"),
        (LCM, {"betas": None}, "needs betas"),
        (LCM, {"timestep_scale": 1000.0}, "timestep_scale=1000 contradicts process='vp'"),
        (EULER, {"betas": {}}, "betas have no meaning"),
        (LCM, {"betas": {"start": 0.5, "end": 0.1}}, "start=0.5 <= end=0.1"),
        # lists of levels
        (EULER, {"timesteps": [999, 0]}, "process='flow' goes by sigmas, not timesteps"),
        (LCM, {"sigmas": [1.0, 0.0]}, "process='vp' goes by timesteps, not sigmas"),
        (EULER, {"sigmas": None}, "needs sigmas, from noise to 0"),
        (EULER, {"steps": 4}, "steps=4 needs 5 sigmas, the last one 0; got 3"),
        (EULER, {"sigmas": [1.0, 0.5, 0.25]}, "must end at 0.*got 0.25"),
        (LCM, {"timesteps": [999, 749, 499]}, "must end at 0"),
        (EULER, {"sigmas": [0.5, 1.0, 0.0]}, "fall strictly"),
        (EULER, {"sigmas": [1.0, math.nan, 0.0]}, "finite"),
        (EULER, {"sigmas": [1000.0, 500.0, 0.0]}, "look like timesteps: divide"),
        (EULER, {"sigmas": [1.2, 0.5, 0.0]}, r"in \[0, 1\]"),
        (EULER, {"sigmas": [0.5, 0.25, 0.0]}, "begin at 1.*pure noise"),
        (SCM, {"angles": [1.6, 1.3, 0.0]}, r"in \[0, pi/2\]; got 1.6"),
        (SCM, {"angles": [1.0, 0.5, 0.0]}, "begin at pi/2"),
        (LCM, {"timesteps": [1000, 499, 0]}, r"in \[0, 999\]"),
        (LCM, {"timesteps": [999.5, 499, 0]}, "integer"),
        (PERFLOW, {"sigmas": [1.0, 0.6, 0.5, 0.25, 0.0]}, "leaves its window"),
        # shifts
        (EULER, {"warped": None}, "warped is missing"),
        (EULER, {"warped": False}, "warped=false needs shift"),
        (EULER, {"shift": {}}, "either amount, or by_tokens"),
        (EULER, {"shift": {"amount": 3.0, "by_tokens": {}}}, "either amount, or by_tokens"),
        (EULER, {"shift": {"by_tokens": {}}}, "type='exponential'"),
        (EULER, {"shift": -3.0}, "must be positive"),
        (EULER, {"shift": True}, "shift=True"),
        (EULER, {"shift": {"type": "linear", "by_tokens": {"highest_tokens": 10}}}, "must be above base_tokens"),
        (EULER, {"warped": False, "shift": 3.0, "sigmas": [0.99, 0.5, 0.0]}, "unwarped sigmas begin at 1"),
        (LCM, {"shift": 3.0}, "shift has no meaning with process='vp'"),
        (SCM, {"warped": True}, "warped has no meaning"),
        # guidance and shape
        (EULER, {"guidance": {"convention": "none", "scale": 4.0}}, "contradicts convention='none'"),
        (EULER, {"guidance": {"convention": "embedded"}}, "needs scale"),
        (EULER, {"guidance": {"convention": "cfg", "scale": 4.0}}, "guidance.convention='cfg'"),
        (EULER, {"shape": []}, "shape"),
        (EULER, {"shape": [16, 0]}, "positive sizes"),
    ],
)
def test_contradictions_are_refused(base: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    refuse(base, reason, **changes)


@pytest.mark.parametrize("shift", [2.0, 3.0, 5.0, 8.0])
def test_sigmas_that_carry_the_shift_are_not_shifted_again(shift: float) -> None:
    twice = {"steps": 4, "sigmas": flow_sigmas(4, shift).tolist(), "shift": shift}
    refuse(EULER, "already are the even grid shifted.*warped=true", **twice, warped=False)
    # rounded to three digits, as such lists are printed
    refuse(EULER, "warped=true", **{**twice, "sigmas": [round(s, 3) for s in twice["sigmas"]]}, warped=False)  # type: ignore[attr-defined]
    once = Sampler(**{**EULER, **twice, "warped": True})
    torch.testing.assert_close(once.resolve(), flow_sigmas(4, shift))
    even = Sampler(**{**EULER, **twice, "sigmas": flow_sigmas(4).tolist(), "warped": False})
    torch.testing.assert_close(even.resolve(), flow_sigmas(4, shift))
    for sampler in (once, even):
        with pytest.raises(SamplerError, match="a second time; leave it away"):
            sampler.check_request(shift=shift)
        sampler.check_request(shift=1)


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Sampler(**EULER).steps = 4


def test_shifts_that_depend_on_the_resolution() -> None:
    line = {"warped": False, "shift": {"type": "exponential", "by_tokens": {}}}
    sampler = Sampler(**{**EULER, **line, "role": "teacher"})
    torch.testing.assert_close(sampler.resolve(4096), flow_sigmas(2, math.exp(1.15)))
    torch.testing.assert_close(sampler.for_steps(6).resolve(256), flow_sigmas(6, math.exp(0.5)))
    with pytest.raises(SamplerError, match="pass tokens"):
        sampler.resolve()
    terminal = Sampler(**{**EULER, "warped": False, "shift": {"amount": 3.0, "terminal": 0.1}})
    assert float(terminal.resolve()[-2]) == pytest.approx(0.1)


def test_a_student_is_sampled_at_its_own_levels_only() -> None:
    student = Sampler(**EULER, name="toy")
    assert student.for_steps(2) is student
    student.check_request(steps=2, sigmas=torch.tensor([1.0, 0.5, 0.0]), shape=(3, 4))
    with pytest.raises(SamplerError, match=r"toy \(student\) is sampled in 2 steps, not 50.*distilled"):
        student.check_request(steps=50)
    with pytest.raises(SamplerError, match="2 steps, not 50"):
        student.check_request(sigmas=flow_sigmas(50, 3.0))
    with pytest.raises(SamplerError, match=r"sampled at 1, 0.5, 0, not at 1, 0.75, 0: leave sigmas away"):
        student.check_request(sigmas=torch.tensor([1.0, 0.75, 0.0]))
    with pytest.raises(SamplerError, match="has no sigmas"):
        Sampler(**LCM).check_request(sigmas=flow_sigmas(2))


def test_a_teacher_takes_any_number_of_steps_where_a_rule_gives_them() -> None:
    teacher = Sampler(**{**EULER, "role": "teacher", "warped": False, "shift": 3.0})
    torch.testing.assert_close(teacher.for_steps(28).resolve(), flow_sigmas(28, 3.0), rtol=1e-6, atol=1e-7)
    assert teacher.for_steps(28).steps == 28
    with pytest.raises(SamplerError, match="one by one"):
        Sampler(**{**EULER, "role": "teacher"}).for_steps(28)
    uneven = {**EULER, "role": "teacher", "warped": False, "shift": 3.0, "sigmas": [1.0, 0.3, 0.0]}
    with pytest.raises(SamplerError, match="not the even grid"):
        Sampler(**uneven).for_steps(28)


def test_shapes() -> None:
    sampler = Sampler(**EULER, shape=[16, -1, 32, 32])
    sampler.check_request(shape=(16, 5, 32, 32))
    for shape in ((16, 5, 32, 64), (16, 32, 32)):
        with pytest.raises(SamplerError, match="made for samples of shape"):
            sampler.check_request(shape=shape)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("a = ", "not TOML"),
        ("[1, 2]", "not TOML"),
        ("{}", "no 'format'"),
        ('format = "ditc.sampler"', "no 'version'"),
        ('{"format": "ditc.sampler", "version": 3, "novelty": 1}', "version 3"),
        ('{"_class_name": "LCMScheduler", "_diffusers_version": "0.42"}', "no 'format'"),
        (json.dumps({"format": "other", "version": 1}), "format is 'other'"),
    ],
)
def test_foreign_and_newer_files_are_refused(text: str, reason: str) -> None:
    with pytest.raises(SamplerError, match=reason):
        Sampler.from_text(text)


levels = st.lists(st.floats(0.01, 0.99), min_size=0, max_size=8, unique=True).map(
    lambda inner: [1.0, *sorted(inner, reverse=True), 0.0]
)
shifts = st.one_of(
    st.none(),
    st.floats(0.1, 9).map(lambda amount: Shift(amount=amount)),
    st.builds(Shift, type=st.just("exponential"), by_tokens=st.just(TokenLine()), terminal=st.none() | st.just(0.1)),
)
rules = st.one_of(
    st.just(GuidanceRule()),
    st.builds(
        GuidanceRule,
        convention=st.sampled_from(["embedded", "from_unconditional", "from_conditional"]),
        scale=st.floats(0, 100),
    ),
)


@settings(deadline=None)
@given(
    levels,
    shifts,
    rules,
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from(["student", "teacher"]),
    st.none() | st.lists(st.sampled_from([-1, 1, 16]), min_size=1, max_size=3),
)
def test_a_manifest_survives_json_and_toml(
    sigmas: list[float], shift: Shift | None, rule: GuidanceRule, name: str, role: str, shape: list[int] | None
) -> None:
    given = {"sigmas": sigmas, "steps": len(sigmas) - 1, "shift": shift, "guidance": rule, "name": name, "shape": shape}
    sampler = Sampler(**{**EULER, **given, "role": role})
    assert Sampler.from_text(sampler.to_json()) == sampler
    assert Sampler.from_text(sampler.to_toml()) == sampler
    assert Sampler.from_text(sampler.to_toml()).to_toml() == sampler.to_toml()


@pytest.mark.parametrize("base", [EULER, LCM, SCM, PERFLOW, RENOISE])
def test_every_kind_survives_json_and_toml(base: dict[str, Any]) -> None:
    sampler = Sampler(**base)
    assert Sampler.from_text(sampler.to_json()) == sampler == Sampler.from_text(sampler.to_toml())
    assert Sampler(**sampler.to_dict()) == sampler


pools: dict[str, list[Any]] = {
    "role": ["student", "teacher", "boss"],
    "kind": ["euler", "renoise", "lcm", "tcd", "trigflow", "flow_map", "perflow", 3],
    "process": ["flow", "vp", "trigflow", None],
    "solver": ["ode", "sde"],
    "prediction": ["velocity", "eps", "diff_eps", "x0", "v", "trigflow", "average_velocity"],
    "steps": [1, 2, 4, 0, 2.5],
    "sigmas": [None, [1.0, 0.5, 0.0], [1.0, 0.75, 0.5, 0.25, 0.0], [1, 0], [1.0, "x", 0.0], 7],
    "timesteps": [None, [999, 499, 0], [1000, 750, 500, 250, 0], [399, 0]],
    "angles": [None, [1.5708, 1.3, 0.0], [1.5, 0.0]],
    "warped": [None, True, False],
    "shift": [None, 3.0, 1, "3", {"type": "exponential", "amount": 1.0}, {"amount": 2.0, "terminal": 0.1}],
    "timestep_scale": [1.0, 1000.0, -1.0],
    "guidance": [{}, {"convention": "embedded", "scale": 3.5}, {"convention": "none", "scale": 1.0}],
    "betas": [None, {}, {"schedule": "cosine"}],
    "eta": [None, 0.0, 0.3, 2.0],
    "sigma_data": [None, 0.5],
    "windows": [None, 1, 4],
    "shape": [None, [4], []],
}


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([EULER, LCM, SCM, PERFLOW, RENOISE]),
    st.dictionaries(st.sampled_from(sorted(pools)), st.integers(0, 20), max_size=4),
)
def test_whatever_is_accepted_can_be_walked_and_the_rest_is_refused_in_words(
    base: dict[str, Any], choices: dict[str, int]
) -> None:
    changes = {name: pools[name][choice % len(pools[name])] for name, choice in choices.items()}
    try:
        sampler = Sampler(**{**base, **changes})
    except SamplerError as error:
        assert str(error)
        return
    solver = make_solver(sampler)
    noise = torch.ones(1, 4)
    fresh = [noise] * solver.steps
    result = walk(solver, lambda x, t, **more: 0.1 * x, noise, fresh)
    assert bool(torch.isfinite(result).all())
    assert Sampler.from_text(sampler.to_toml()) == sampler


# --- published schedules, each against what its closed form gives ---


def even(steps: int, shift: float) -> list[float]:
    """k / steps, shifted, written out: independent of the package's own arithmetic."""
    parts = [k / steps for k in range(steps, -1, -1)]
    return [shift * part / (1 + (shift - 1) * part) for part in parts]


CLOSED_FORMS: dict[str, list[float]] = {
    "flux-1-schnell": even(4, 1),
    "self-forcing": even(4, 5),
    "wan-2.1-lightx2v": even(4, 5),
    "wan-2.2-lightx2v": even(4, 5),
    "hunyuanvideo-1.5": even(4, 5),
    # of the even grid of 25 steps shifted by 8, steps 25, 7 and 3, to whole timesteps
    "fastwan": [round(1000 * even(25, 8)[25 - k]) / 1000 for k in (25, 7, 3)] + [0],
    "causvid": [round(1000 * even(25, 8)[25 - k]) / 1000 for k in (25, 7, 3)] + [0],
    # four steps of 1 / 160, then three of its own: in units of 1 / 320
    "ltx-2-distilled": [1 - lost / 320 for lost in (0, 2, 4, 6, 8, 29, 88, 185, 320)],
    "qwen-image-lightning-4step": even(4, 3),
    "qwen-image-lightning-8step": even(8, 3),
    "z-image-turbo": even(8, 3),
    "sana-sprint-2step": [math.pi / 2, 1.3, 0],
    "sdxl-dmd2-4step": [250 * k - 1 for k in (4, 3, 2, 1)] + [0],
    "sdxl-dmd2-1step": [399, 0],
}


def test_every_published_schedule_has_a_closed_form_here() -> None:
    assert set(published_names()) == set(CLOSED_FORMS)
    shipped = Path(__file__).parents[2] / "runtime" / "samplers" / "schedules"
    assert {file.stem for file in shipped.iterdir()} == set(CLOSED_FORMS)


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS))
def test_published_schedules(name: str) -> None:
    sampler = published(name)
    assert sampler.resolve().tolist() == pytest.approx(CLOSED_FORMS[name], abs=5e-6)
    assert sampler.role == "student"
    assert sampler.name
    assert sampler.source
    assert Sampler.from_text(sampler.to_json()) == sampler
    solver = make_solver(sampler)
    assert solver.steps == sampler.steps == len(solver.timesteps)
    with pytest.raises(SamplerError, match="distilled"):
        sampler.for_steps(50)


def test_facts_of_published_samplers() -> None:
    assert {name for name in published_names() if published(name).solver == "ode"} == {
        "flux-1-schnell",
        "hunyuanvideo-1.5",
        "ltx-2-distilled",
        "qwen-image-lightning-4step",
        "qwen-image-lightning-8step",
        "wan-2.2-lightx2v",
        "z-image-turbo",
    }
    # a list that is already warped stays so
    for name in ("fastwan", "causvid"):
        sampler = published(name)
        assert sampler.warped
        assert sampler.shift == Shift(amount=8.0)
        with pytest.raises(SamplerError, match="already warped: shift=8"):
            sampler.check_request(shift=8.0)
    guided = {name: published(name).guidance.convention for name in published_names()}
    assert {name for name, rule in guided.items() if rule != "none"} == {"sana-sprint-2step"}
    assert make_solver(published("self-forcing")).timesteps.tolist() == pytest.approx(
        [1000, 937.5, 833.33, 625], abs=0.01
    )
    # SANA's transformer is told the flow's time
    angles = [math.pi / 2, 1.3]
    flow_times = [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]
    assert make_solver(published("sana-sprint-2step")).timesteps.tolist() == pytest.approx(flow_times, abs=1e-5)


def test_published_lists_that_diffusers_has() -> None:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

    assert list(published("ltx-2-distilled").levels) == [*DISTILLED_SIGMA_VALUES, 0.0]


def test_a_published_sampler_that_there_is_not() -> None:
    with pytest.raises(SamplerError, match="did you mean 'flux-1-schnell'"):
        published("flux-schnell")
    with pytest.raises(SamplerError, match="known ones: causvid, "):
        published("xyz")


def test_levels_fall_and_shift_within_the_unit_interval() -> None:
    for name in published_names():
        resolved = published(name).resolve().tolist()
        assert all(following < level for level, following in pairwise(resolved))
    assert torch.equal(static_shift(torch.tensor([0.0, 1.0]), 8.0), torch.tensor([0.0, 1.0]))


def test_betas_are_those_of_stable_diffusion() -> None:
    table = Betas().table()
    assert len(table) == 1000
    assert table[0] == pytest.approx(1 - 0.00085)
