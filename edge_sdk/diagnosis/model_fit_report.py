"""What `edge-sdk profile --model` found, as text for people or as JSON for programs. Pure."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from edge_sdk.core.choice.memory import human_bytes
from edge_sdk.core.choice.rank import Candidate
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.profile import DeviceProfile
from edge_sdk.diagnosis.model_fit import Prospect, budget_in_words, way_of

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


def as_text(prospect: Prospect, width: int = 80) -> str:
    """The report, with prose folded at `width` columns."""
    blocks = [
        _head(prospect, width),
        _table(prospect, width),
        _terms(prospect, width),
        _verdict(prospect, width),
    ]
    return "\n\n".join(blocks) + "\n"


def _head(prospect: Prospect, width: int) -> str:
    machine, training = prospect.machine, prospect.question.training
    weights = "4-bit weights (NF4)" if prospect.quantised else "unquantised weights"
    threads = prospect.question.options.threads
    computes = f"computes on {prospect.place}, {weights}"
    if prospect.measured:
        computes += f", {threads} thread" + ("s" if threads > 1 else "")
    total = prospect.facts.linear_parameters + prospect.facts.other_parameters
    lines = [
        ("machine" if prospect.measured else "class", _machine(machine)),
        ("", computes),
        ("model", f"{prospect.model}: {_count(total)} parameters, {prospect.facts.layers} blocks"),
        (
            "work",
            (
                f"{training.steps} steps of {training.batch} examples of {training.sequence_len} tokens, "
                f"rule {prospect.question.rule}"
            ),
        ),
        ("budget", f"{human_bytes(prospect.limits.budget_bytes)}, {budget_in_words(prospect)}"),
    ]
    if prospect.limits.deadline_s:
        lines.append(("deadline", f"{_duration(prospect.limits.deadline_s)} for an assignment"))
    if prospect.notice:
        lines.append(("notice", prospect.notice))
    if not prospect.measured:
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


def _table(prospect: Prospect, width: int) -> str:
    """Candidates, best first, under what holds for all of them."""
    candidates = prospect.candidates
    steps = prospect.question.training.steps
    carries = any(candidate.setting.carry_rank for candidate in candidates)
    header = ["", "rank", *(["carried"] if carries else []), "peak", "step", f"{steps} steps", "upload", ""]
    rows = [header]
    for candidate in candidates:
        setting = candidate.setting
        carried = [f"{setting.carry_rank} in {setting.carried_dtype}"] if carries else []
        times = [_time(candidate.step_s), _time(candidate.assignment_s)]
        rows.append(
            [
                MARK if candidate == prospect.chosen else "",
                _ranks(setting.ranks),
                *carried,
                human_bytes(candidate.peak_bytes),
                *times,
                human_bytes(candidate.upload_bytes),
                _fits(candidate, prospect.limits.budget_bytes),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    batch = prospect.question.training.batch
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


def _terms(prospect: Prospect, width: int) -> str:
    """Each memory term of the chosen way; in brackets what is not there at the peak."""
    terms = prospect.terms
    setting = (prospect.chosen or min(prospect.candidates, key=lambda c: c.peak_bytes)).setting
    what = "" if prospect.chosen else "the least: "
    lines = [f"{what}rank {setting.ranks} at its peak, {human_bytes(terms.peak_bytes)}"]
    apart = terms.beside_peak()
    for name, size in terms.terms().items():
        if not size:
            continue
        label, note = TERMS[name]
        if name == "linear_weights":
            note = "4 bits, with their constants" if prospect.quantised else "not quantised"
        if name == "framework":
            note = "PyTorch and its like, measured"
        shown = f"({human_bytes(size)})" if name in apart else f"{human_bytes(size)} "
        note = "at another moment" if name in apart else note
        lines.append(f"  {label:<17} {shown:>10}  {note}".rstrip()[:width])
    return "\n".join(lines)


def _verdict(prospect: Prospect, width: int) -> str:
    """Why this one and not the next, or why none; and what the times rest on."""
    reason = prospect.reason[:1].upper() + prospect.reason[1:] + "."
    lines = [_wrapped(reason, width)]
    if prospect.times is None:
        lines.append(_wrapped(_untimed(prospect), width))
    return "\n".join(lines)


def _untimed(prospect: Prospect) -> str:
    """Why there are no step times."""
    if not prospect.measured:
        why = "this is a class of devices, not this machine"
    else:
        why = "--quick was given" if prospect.chosen else "nothing fits"
    unchecked = ", so that the deadline was not checked" if prospect.limits.deadline_s else ""
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


def as_json(prospect: Prospect) -> dict[str, Any]:
    """The report as JSON values. Sizes are bytes, times seconds; null: not measured."""
    question, terms = prospect.question, prospect.terms
    chosen = prospect.chosen
    return {
        "model": prospect.model,
        "parameters": prospect.facts.linear_parameters + prospect.facts.other_parameters,
        "machine": asdict(prospect.machine),
        "measured": prospect.measured,
        "place": prospect.place,
        "quantised": prospect.quantised,
        "notice": prospect.notice,
        "training": asdict(question.training),
        "rule": question.rule,
        "budget_bytes": prospect.limits.budget_bytes,
        "deadline_s": prospect.limits.deadline_s,
        "times": asdict(prospect.times) if prospect.times else None,
        "candidates": [_candidate_json(candidate, candidate == chosen) for candidate in prospect.candidates],
        "terms": terms.terms(),
        "not_at_the_peak": list(terms.beside_peak()),
        "chosen": _candidate_json(chosen, True) if chosen else None,
        "reason": prospect.reason,
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
