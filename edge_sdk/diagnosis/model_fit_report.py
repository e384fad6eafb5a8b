"""What `edge-sdk profile --model` found, as text for people or as JSON for programs. Pure."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from edge_sdk.core.choice.memory import human_bytes
from edge_sdk.core.choice.rank import Candidate
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.profile import DeviceProfile
from edge_sdk.diagnosis.model_fit import ModelFit, budget_in_words, way_of

LABEL = 10  # columns before what a line says
MARK = "→"

TERMS = {
    "framework": ("libraries", ""),
    "linear_weights": ("weights of blocks", ""),
    "other_weights": ("other weights", "embeddings, norms, head"),
    "factors": ("LoRA factors", ""),
    "moments": ("optimiser", "its moments"),
    "carried": ("carried", "components of the global adapter"),
    "activations": ("activations", "kept for the backward pass"),
    "logits": ("logits", ""),
    "backward": ("backward", "of one block"),
    "gradients": ("gradients", "of the LoRA factors"),
    "heap": ("heap", "what the allocator holds besides"),
}


def as_text(fit: ModelFit, width: int = 80) -> str:
    """The report, with prose folded at `width` columns."""
    blocks = [
        _head(fit, width),
        _table(fit, width),
        _terms(fit, width),
        _verdict(fit, width),
    ]
    return "\n\n".join(blocks) + "\n"


def _head(fit: ModelFit, width: int) -> str:
    machine, training = fit.machine, fit.question.training
    weights = "4-bit weights (NF4)" if fit.quantised else "unquantised weights"
    threads = fit.question.options.threads
    computes = f"computes on {fit.place}, {weights}"
    if fit.measured:
        computes += f", {threads} thread" + ("s" if threads > 1 else "")
    total = fit.facts.linear_parameters + fit.facts.other_parameters
    lines = [
        ("machine" if fit.measured else "class", _machine(machine)),
        ("", computes),
        ("model", f"{fit.model}: {_count(total)} parameters, {fit.facts.layers} blocks"),
        (
            "work",
            (
                f"{training.steps} steps of {training.batch} examples of {training.sequence_len} tokens, "
                f"rule {fit.question.rule}"
            ),
        ),
        ("budget", f"{human_bytes(fit.limits.budget_bytes)}, {budget_in_words(fit)}"),
    ]
    if fit.limits.deadline_s:
        lines.append(("deadline", f"{_duration(fit.limits.deadline_s)} for an assignment"))
    if fit.notice:
        lines.append(("notice", fit.notice))
    if not fit.measured:
        lines.append(("notice", "the memory of the libraries was measured on this machine, on its CPU"))
    return "\n".join(_folded(text, width, label) for label, text in lines)


def _machine(machine: DeviceProfile) -> str:
    """Name, processor or accelerator, memory."""
    accelerator = machine.accelerator
    parts = [f"{machine.cpu}, {machine.cores} logical core" + ("s" if machine.cores > 1 else "")]
    ram = f"{human_bytes(machine.memory_total_bytes)} RAM"
    if machine.memory_available_bytes is not None:
        ram += f" ({human_bytes(machine.memory_available_bytes)} free)"
    parts.append(ram)
    if accelerator:
        shared = "shared" if accelerator.shared else human_bytes(accelerator.memory_total_bytes)
        parts.append(f"{accelerator.name} ({shared})")
    return f"{machine.name}: " + ", ".join(parts)


def _table(fit: ModelFit, width: int) -> str:
    """Candidates, best first, under what holds for all of them."""
    candidates = fit.candidates
    steps = fit.question.training.steps
    carries = any(candidate.setting.carry_rank for candidate in candidates)
    header = ["", "rank", *(["carried"] if carries else []), "peak", "step", f"{steps} steps", "upload", ""]
    rows = [header]
    for candidate in candidates:
        setting = candidate.setting
        carried = [f"{setting.carry_rank} in {setting.carried_dtype}"] if carries else []
        times = [_time(candidate.step_s), _time(candidate.assignment_s)]
        rows.append(
            [
                MARK if candidate == fit.chosen else "",
                _ranks(setting.ranks),
                *carried,
                human_bytes(candidate.peak_bytes),
                *times,
                human_bytes(candidate.upload_bytes),
                _fits(candidate, fit.limits.budget_bytes),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    batch = fit.question.training.batch
    lines = [_folded(f"{batch} examples, {way_of(candidates[0].setting)}", width, "each step")]
    for row in rows:
        cells = [row[0].ljust(1)]
        cells += [text.rjust(size) for text, size in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def _ranks(ranks: Ranks) -> str:
    """`8`, or `30/200`: attention and feed-forward."""
    return str(ranks.mlp) if ranks.attention == ranks.mlp else f"{ranks.attention}/{ranks.mlp}"


def _fits(candidate: Candidate, budget_bytes: int) -> str:
    """Whether it does, and if not by how much; the last column."""
    if candidate.fits:
        return "fits"
    over = candidate.peak_bytes - budget_bytes
    return f"{human_bytes(over)} too much" if over > 0 else "too slow"


def _terms(fit: ModelFit, width: int) -> str:
    """Each memory term of the chosen way; in brackets what is not there at the peak."""
    terms = fit.terms
    setting = (fit.chosen or min(fit.candidates, key=lambda c: c.peak_bytes)).setting
    what = "" if fit.chosen else "the least: "
    lines = [f"{what}rank {setting.ranks} at its peak, {human_bytes(terms.peak_bytes)}"]
    apart = terms.beside_peak()
    for name, size in terms.terms().items():
        if not size:
            continue
        label, note = TERMS[name]
        if name == "linear_weights":
            note = "4 bits, with their constants" if fit.quantised else "not quantised"
        if name == "framework":
            note = "PyTorch and its like, measured"
        shown = f"({human_bytes(size)})" if name in apart else f"{human_bytes(size)} "
        note = "at another moment" if name in apart else note
        lines.append(f"  {label:<17} {shown:>10}  {note}".rstrip()[:width])
    return "\n".join(lines)


def _verdict(fit: ModelFit, width: int) -> str:
    """Why this one and not the next, or why none; and what the times rest on."""
    reason = fit.reason[:1].upper() + fit.reason[1:] + "."
    lines = [_wrapped(reason, width)]
    if fit.times is None:
        lines.append(_wrapped(_untimed(fit), width))
    return "\n".join(lines)


def _untimed(fit: ModelFit) -> str:
    """Why there are no step times."""
    if not fit.measured:
        why = "this is a class of devices, not this machine"
    else:
        why = "--quick was given" if fit.chosen else "nothing fits"
    unchecked = ", so that the deadline was not checked" if fit.limits.deadline_s else ""
    return f"Step times: not measured ({why}){unchecked}."


def _folded(text: str, width: int, label: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=label.ljust(LABEL),
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else _duration(seconds)


def _duration(seconds: float) -> str:
    """0.21 s, 8.4 s, 96 s, 14 min, 5.2 h."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _count(number: int) -> str:
    """5.8M, 8.0B."""
    return f"{number / 1e9:.1f}B" if number >= 999_500_000 else f"{number / 1e6:.1f}M"


def as_json(fit: ModelFit) -> dict[str, Any]:
    """The report as JSON values. Sizes are bytes, times seconds; null: not measured."""
    question, terms = fit.question, fit.terms
    chosen = fit.chosen
    return {
        "model": fit.model,
        "parameters": fit.facts.linear_parameters + fit.facts.other_parameters,
        "machine": asdict(fit.machine),
        "measured": fit.measured,
        "place": fit.place,
        "quantised": fit.quantised,
        "notice": fit.notice,
        "training": asdict(question.training),
        "rule": question.rule,
        "budget_bytes": fit.limits.budget_bytes,
        "deadline_s": fit.limits.deadline_s,
        "times": asdict(fit.times) if fit.times else None,
        "candidates": [_candidate_json(candidate, candidate == chosen) for candidate in fit.candidates],
        "terms": terms.terms(),
        "not_at_the_peak": list(terms.beside_peak()),
        "chosen": _candidate_json(chosen, True) if chosen else None,
        "reason": fit.reason,
    }


def _candidate_json(candidate: Candidate, chosen: bool) -> dict[str, Any]:
    values = asdict(candidate)
    return {
        **values.pop("setting"),
        **values,
        "rank": candidate.rank,
        "fits": candidate.fits,
        "chosen": chosen,
    }
