"""`instavm bench` on real sandboxes: that it measures and says so, not how fast."""

import json

import pytest

from instavm.bench import baseline
from instavm.cli.app import run


@pytest.mark.parametrize(
    ("subject", "measured"),
    [
        ("interactive", {"one after the other", "200 ms apart", "all at once"}),
        ("density", {"private memory of a VMM, idle", "CPU of a sandbox, idle", "answer of each of 2 live sandboxes"}),
        ("baseline", {baseline.OURS, baseline.RESTORED, baseline.BOOTED, baseline.FLOOR}),
        ("sizes", {"2 vCPUs, 512 MB"}),
    ],
)
def test_a_bench_keeps_what_it_measured(subject, measured, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTAVM_CACHE_DIR", str(settings.cache_dir))
    monkeypatch.setattr("instavm.bench.density.IDLE_S", 1.0)
    monkeypatch.setattr("instavm.bench.baseline.BOOTS", 1)
    monkeypatch.setattr("instavm.bench.sizes.MEMORY_MIB", (512,))
    monkeypatch.setattr("instavm.bench.sizes.VCPUS", (2,))
    assert run(["bench", subject, "-n", "2", "--json", str(tmp_path / "out.json"), "--markdown"]) == 0
    kept = json.loads((tmp_path / "out.json").read_text())
    assert measured <= set(kept["results"])
    assert kept["machine"]["count"] == 2
    assert all(figures["n"] > 0 for name, figures in kept["results"].items() if name in measured)
    assert "| what | measured |" in capsys.readouterr().out
