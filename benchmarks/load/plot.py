"""Memory, open files and uploads of the coordinator over the time of a load measurement, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.plotting import headless_pyplot

GOAL_MB = 300.0
BIN_S = 2.0
LEAST_SHARE = 0.05  # of the time, for a phase whose name is written


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the PNG."""
    pyplot = headless_pyplot()
    samples = found["samples"]
    at = [sample["at_s"] for sample in samples]
    figure, (memory, files, uploads) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 7))
    memory.plot(at, [sample["rss_bytes"] / 1e6 for sample in samples], color="tab:blue")
    memory.axhline(GOAL_MB, color="tab:red", linewidth=0.8, linestyle="--")
    memory.set(ylabel="resident memory, MB", ylim=(0, 1.15 * GOAL_MB))
    files.plot(at, [sample["files"] for sample in samples], color="tab:green")
    files.set(ylabel="open files")
    times, rates = _rates(samples)
    uploads.plot(times, rates, color="tab:orange", drawstyle="steps-post")
    uploads.set(ylabel="acknowledged, MB/s", xlabel="seconds")
    shown = ""
    for sample in samples:
        if sample["phase"] != shown:
            shown = sample["phase"]
            for axis in (memory, files, uploads):
                axis.axvline(sample["at_s"], color="0.8", linewidth=0.8)
            share = sum(other["phase"] == shown for other in samples) / len(samples)
            if share > LEAST_SHARE:  # else there is no room
                memory.annotate(shown, (sample["at_s"], 1.02 * GOAL_MB), rotation=25, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rates(samples: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Bytes acknowledged in every BIN_S, in MB/s."""
    times, rates = [0.0], [0.0]
    begin = samples[0]
    for sample in samples:
        passed_s = sample["at_s"] - begin["at_s"]
        if passed_s >= BIN_S:
            times.append(begin["at_s"])
            rates.append((sample["uploaded_bytes"] - begin["uploaded_bytes"]) / 1e6 / passed_s)
            begin = sample
    return times, rates
