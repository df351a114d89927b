import json

from hypothesis import given
from hypothesis import strategies as st

from instavm.bench import report

FACTS = {"cpu": "a CPU", "cores": 2, "kernel": "6", "at": "2000-01-01T00:00:00Z"}
RESULTS = {"start": {"p50_ms": 1.5, "p95_ms": 2.25, "n": 9}, "memory": {"each_mib": 3, "n": 9}}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_times_that_were_measured(times):
    found = report.spread(times)
    rounded = {round(time, 2) for time in times}
    assert found["n"] == len(times)
    assert found["p95_ms"] in rounded
    assert min(rounded) <= found["p50_ms"] <= found["p95_ms"] <= found.get("p99_ms", max(rounded)) <= max(rounded)


def test_figures_come_with_their_units():
    assert report.markdown(FACTS, RESULTS).splitlines()[4:] == [
        "| start | p50 1.50 ms, p95 2.25 ms, n 9 |",
        "| memory | each 3.00 MiB, n 9 |",
    ]
    assert "p95      2.25 ms" in report.table(FACTS, RESULTS)


def test_results_are_kept_with_their_machine_and_drawn(tmp_path):
    report.save(tmp_path / "folder" / "r.json", FACTS, RESULTS)
    assert json.loads((tmp_path / "folder" / "r.json").read_text()) == {"machine": FACTS, "results": RESULTS}
    for name, begins in (("p.png", b"\x89PNG"), ("another/p.svg", b"<?xml")):
        report.plot(tmp_path / name, FACTS, RESULTS)
        assert (tmp_path / name).read_bytes().startswith(begins)
