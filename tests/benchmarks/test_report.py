"""What is made of measurements: medians, what failed, targets, and how peers compare with elsewhere."""

from __future__ import annotations

import pytest
from benchmarks.__main__ import points
from benchmarks.cases import CASES, SYSTEMS
from benchmarks.report import Asked
from benchmarks.results import Failure, Point, Results

from benchmarks import elsewhere, growth, profile, report, targets


def asked(*cases: str, size: tuple[str, ...] = SYSTEMS) -> Asked:
    return Asked(cases, size, (), (), rounds=3, machine="a machine", server="18")


def measured(**values: float) -> Results:
    """Of `case__system` one value."""
    results = Results()
    for name, value in values.items():
        case, system = name.split("__")
        results.values[Point(case, system)] = {1: [value]}
    return results


def target(what: str) -> targets.Target:
    [found] = [one for one in targets.TARGETS if one.what == what]
    return found


# ---------------------------------------------------------------- medians


def test_a_value_is_the_median_of_the_rounds_and_not_of_all_samples() -> None:
    results = Results()
    results.values[Point("latency_1", "durable")] = {1: [1, 1, 1], 2: [9], 3: [5]}
    assert results.value("latency_1", "durable") == 5


def test_a_timer_is_summed_up_by_its_p99() -> None:
    results = Results()
    results.values[Point("timer", "durable")] = {1: list(range(101))}
    assert results.value("timer", "durable") == 99


def test_the_floor_has_one_value_for_all_steps() -> None:
    results = Results()
    for case, value in zip(("one_step", "ten_step", "fifty_step"), (1.0, 2.0, 9.0), strict=True):
        results.values[Point(case, "floor")] = {1: [value]}
    results.values[Point("ten_step", "floor", "in flight 1")] = {1: [100.0]}
    assert [results.value(case, "floor") for case in ("one_step", "ten_step", "fifty_step")] == [2, 2, 2]


def test_all_cases_and_systems_are_in_the_json() -> None:
    medians = measured(ten_step__durable=12.3456789).medians()
    assert set(medians) == set(CASES)
    assert all(tuple(systems) == SYSTEMS for systems in medians.values())
    assert medians["ten_step"]["durable"] == 12.346
    assert medians["signal"]["procrastinate"] is None


def test_each_round_goes_case_after_case_through_all_systems() -> None:
    assert [str(point) for point in points(["start", "idle"], ["durable", "dbos"])] == [
        "start of durable",
        "start of dbos",
        "idle of durable",
        "idle of dbos",
    ]


def test_latencies_are_compared_by_the_p99_of_all_rounds_too() -> None:
    results = Results()
    results.values[Point("latency_10", "durable")] = {1: [1.0] * 50, 2: [1.0] * 50 + [4.0]}
    compared = target("latency_10 / dbos, p99")
    assert compared.found(results) is None
    results.values[Point("latency_10", "dbos")] = {1: [10.0]}
    assert compared.found(results) == 0.1
    results.values[Point("latency_10", "durable")] = {1: list(range(51)), 2: list(range(51, 101))}
    assert compared.found(results) == 9.9


# ---------------------------------------------------------------- what is missing


def test_what_a_system_does_not_have_and_what_failed_are_told_apart() -> None:
    results = Results()
    results.failures.append(Failure("dbos", "it broke", Point("signal", "dbos")))
    results.values[Point("takeover", "absurd")] = {1: []}
    page = report.parts(results, asked("signal", "takeover"))["results"]
    assert "| signal | from a signal to the run's end, p50 (ms) | - | - | - | failed | - | - |" in page
    assert "not within 60 s" in page
    assert "- dbos: it broke (signal of dbos)" in page


def test_a_value_of_which_some_rounds_failed_says_so() -> None:
    results = measured(start__durable=100.0)
    results.failures += [Failure("durable", "lost", Point("start", "durable"))] * 2
    page = report.parts(results, asked("start"))["results"]
    assert "100 (some failed)" in page
    assert "lost (start of durable, 2 times)" in page


def test_a_system_that_is_not_installed_is_not_tried_again() -> None:
    results = Results()
    results.failures.append(Failure("dbos", "No module named 'dbos'"))
    assert results.hopeless(Point("start", "dbos"))
    assert not results.hopeless(Point("start", "durable"))


def test_a_takeover_that_nobody_made_is_not_tried_again() -> None:
    results = Results()
    results.values[Point("takeover", "absurd")] = {1: []}
    assert results.hopeless(Point("takeover", "absurd"))
    assert results.value("takeover", "absurd") is None


# ---------------------------------------------------------------- comparisons


def test_more_than_one_is_better_whatever_the_unit() -> None:
    results = measured(ten_step__durable=300, ten_step__dbos=100, latency_1__durable=2, latency_1__dbos=8)
    shown = report.ratios(results, asked("ten_step", "latency_1", size=("durable", "dbos")))
    assert "| ten_step | 3.00 x |" in shown
    assert "| latency_1 | 4.00 x |" in shown


def test_what_is_compared_was_measured_in_the_same_round() -> None:
    results = Results()
    results.values[Point("ten_step", "durable")] = {1: [100.0], 2: [20.0], 3: [70.0], 4: [500.0]}
    results.values[Point("ten_step", "dbos")] = {1: [10.0], 3: [10.0], 2: [1.0], 5: [1_000.0]}
    assert results.ratio(("ten_step", "durable"), ("ten_step", "dbos")) == 10  # of 10, 20 and 7
    assert target("ten_step / dbos").found(results) == 10
    assert "| ten_step | 10.0 x |" in report.ratios(results, asked("ten_step", size=("durable", "dbos")))
    assert results.ratio(("ten_step", "durable"), ("ten_step", "absurd")) is None


@pytest.mark.parametrize(
    ("what", "value", "reached"),
    [
        ("ten_step / dbos", 10, True),
        ("ten_step / dbos", 9.9, False),
        ("latency_1 / dbos", 1, False),
        ("latency_1 / dbos", 0.99, True),
        ("idle, commits/s", 2, True),
        ("idle, commits/s", 2.1, False),
    ],
)
def test_a_target_is_reached_at_its_limit_unless_it_is_strict(what: str, value: float, reached: bool) -> None:
    assert target(what).reached(value) is reached


def test_a_target_without_values_is_not_measured() -> None:
    assert "| - | not measured |" in targets.markdown(Results(), "memory")


def test_the_verdict_of_a_quick_measurement_is_marked() -> None:
    results = measured(idle__durable=1.0)
    results.size = "quick"
    assert "reached (quick)" in targets.markdown(results, "cases")


@pytest.mark.parametrize(
    ("case", "here", "floor", "relative"),
    [
        ("ten_step", 300, 8_450, 1.0),
        ("ten_step", 150, 4_225, 1.0),  # half as fast a machine
        ("ten_step", 150, 8_450, 0.5),
        ("latency_1", 600, 8_450, 0.5),
        ("latency_1", 600, 4_225, 1.0),
        ("idle", 300, 4_225, 1.0),  # that does not depend on the machine
    ],
)
def test_a_peer_is_compared_relative_to_the_floor(case: str, here: float, floor: float, relative: float) -> None:
    assert elsewhere.relative(case, here, 300, floor) == pytest.approx(relative)


def test_a_peer_that_is_behind_must_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(one_step__floor=8_450, ten_step__dbos=200, ten_step__absurd=1_300)
    behind = {one.system: one.behind for one in elsewhere.comparisons(results)}
    assert behind == {"dbos": True, "absurd": False}
    assert "not explained" in elsewhere.markdown(results)
    monkeypatch.setitem(elsewhere.EXPLAINED, ("dbos", "ten_step"), "because")
    assert "| because |" in elsewhere.markdown(results)


# ---------------------------------------------------------------- growth, profile


def test_a_slowdown_is_above_one_for_rates_and_for_times() -> None:
    results = Results()
    for case, empty, large in (("ten_step", 200, 100), ("latency_1", 4, 6)):
        results.values[Point(case, "durable", "database empty")] = {1: [empty]}
        results.values[Point(case, "durable", "database large", database="large")] = {1: [large]}
    assert growth.slowdown(results, "ten_step", "large") == 2
    assert growth.slowdown(results, "latency_1", "large") == 1.5
    rows = targets.markdown(results, "growth").splitlines()
    assert "| ten_step, as slow on database large | <= 1.25 | 2.00 | **missed** |" in rows
    assert "| latency_1, as slow on database large | <= 1.25 | 1.50 | **missed** |" in rows
    assert "| one_step, as slow on database backlog | <= 1.25 | - | not measured |" in rows


def test_what_two_measures_of_growth_share_is_measured_once() -> None:
    wanted = growth.points(growth.NAMES)
    assert len(wanted) == len(set(wanted))


def test_what_is_built_in_is_charged_to_its_caller() -> None:
    caller = ("/x/durable/core/plan.py", 1, "plan")
    entry = ("/x/durable/engine/advance.py", 1, "advance")
    builtin = ("~", 0, "<built-in method builtins.len>")
    dumped = ("~", 0, "<method 'to_json' of 'pydantic_core._pydantic_core.SchemaSerializer' objects>")
    shares = profile.by_group(
        {
            entry: (1, 1, 1.0, 10.0, {}),
            caller: (1, 1, 4.0, 9.0, {entry: (1, 1, 4.0, 9.0)}),
            builtin: (1, 1, 2.0, 2.0, {caller: (1, 1, 2.0, 2.0)}),
            dumped: (1, 1, 3.0, 3.0, {caller: (1, 1, 3.0, 3.0)}),
        }
    )
    assert {group: share.own for group, share in shares.items()} == {
        "durable.core": 6.0,
        "pydantic and JSON": 3.0,
        "durable.engine": 1.0,
    }
    assert shares["durable.core"].in_all == 9.0
