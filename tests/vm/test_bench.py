"""`instavm bench` on real sandboxes: that it measures and says so, not how fast."""

import json

import pytest

from instavm.bench import baseline, start
from instavm.cli.app import run


@pytest.mark.parametrize(
    ("subject", "measured"),
    [
        ("interactive", {"one after the other", "200 ms apart", "all at once"}),
        ("density", {"private memory of a VMM, idle", "CPU of a sandbox, idle", "answer of each of 2 live sandboxes"}),
        ("baseline", {baseline.OURS, baseline.RESTORED, baseline.BOOTED, baseline.FLOOR}),
        ("sizes", {"2 vCPUs, 512 MB", "a snapshot with 8 MiB more than the image"}),
        ("start", {start.WHOLE, "  node: identity", f"warm machines, {start.WHOLE}", start.FLOOR}),
        ("execute", {"round trip: python, print(1)", "streamed: print of a line to event", "20 MB of stdout"}),
        ("files", {"upload of 1 MiB", "download of 1 MiB", "2 MiB, a sandbox of 512 MB"}),
        ("snapshots", {"fork(1) → result of each", "suspend", "resume → result", "pause of the source: fork"}),
        (
            "drivers",
            {f"qemu-tcg: {how}, to the first result" for how in ("cold boot", "restored", "template restored")},
        ),
        ("egress", {"TLS, connection and request, filtered", "TLS, connection and request, direct"}),
    ],
)
def test_a_bench_keeps_what_it_measured(subject, measured, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTAVM_CACHE_DIR", str(settings.cache_dir))
    monkeypatch.setenv("INSTAVM_STATE_DIR", str(settings.state_dir))  # what the probe found is kept there
    monkeypatch.setattr("instavm.bench.density.IDLE_S", 1.0)
    monkeypatch.setattr("instavm.bench.baseline.BOOTS", 1)
    monkeypatch.setattr("instavm.bench.interactive.SETTLED_S", 0.0)
    monkeypatch.setattr("instavm.bench.execute.SETTLED_S", 0.0)
    monkeypatch.setattr("instavm.bench.start.COLDS", 0)
    monkeypatch.setattr("instavm.bench.start.JAILS", ())
    monkeypatch.setattr("instavm.bench.execute.CELLS", (("python", "print(1)"), ("python", "1 + 1")))
    monkeypatch.setattr("instavm.bench.execute.MEGABYTES", 20)
    monkeypatch.setattr("instavm.bench.files.MIDDLING_MIB", 1)
    monkeypatch.setattr("instavm.bench.files.LARGE_MIB", 2)
    monkeypatch.setattr("instavm.bench.snapshots.WRITTEN_MIB", (0,))
    monkeypatch.setattr("instavm.bench.snapshots.FORKS", (1,))
    monkeypatch.setattr("instavm.bench.egress.BULK_MIB", 1)
    monkeypatch.setattr("instavm.bench.sizes.MEMORY_MIB", (512,))
    monkeypatch.setattr("instavm.bench.sizes.VCPUS", (2,))
    monkeypatch.setattr("instavm.bench.sizes.ADDED_MIB", (8,))
    assert run(["bench", subject, "-n", "2", "--json", str(tmp_path / "out.json"), "--markdown"]) == 0
    kept = json.loads((tmp_path / "out.json").read_text())
    assert measured <= set(kept["results"])
    assert kept["machine"]["count"] == 2
    assert all(figures["n"] > 0 for name, figures in kept["results"].items() if name in measured)
    assert all(figures["p50_ms"] <= figures["p95_ms"] for figures in kept["results"].values() if "p95_ms" in figures)
    assert "| what | measured |" in capsys.readouterr().out
