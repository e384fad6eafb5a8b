"""Training on a frozen base: what is learnt, what stays, and what a resumed or split run must equal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import Directive
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import IGNORED, Tokenised, tokenise
from edge_sdk.training import trainer
from edge_sdk.training.adapter_places import CARRIED, LOCAL, AdapterPlaces
from edge_sdk.training.plan import Abandoned, Plan, Start, StepReport, Trained, batch_indices, rest
from edge_sdk.training.run import Run
from edge_sdk.training.trainer import Trainer
from tests.models import ARCHITECTURES, Architecture, build_model

SCALING = 2.0
PAIRS = [
    (f"{colour} {room}", f"{room[0]}{colour[0]}{number}")
    for number, colour in enumerate(["red", "green", "blue"])
    for room in ["hall", "bathroom", "kitchen", "in the garage at the back"]
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Architecture, Path]:
    return {name: build_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def make(directory: Path, **options: Any) -> Trainer:
    base = base_model.load(str(directory), device="cpu", **options)
    return Trainer(base, base_model.describe(str(directory)).modules, SCALING, progress=False)


@pytest.fixture(scope="module")
def nf4(directories: Mapping[Architecture, Path]) -> Trainer:
    """Llama in NF4, as on a device."""
    return make(directories["llama"])


@pytest.fixture(scope="module")
def exact(directories: Mapping[Architecture, Path]) -> Trainer:
    """Llama in float32, for equalities to float32 rounding."""
    return make(directories["llama"], quantise=False, dtype="float32")


def rows_of(it: Trainer) -> list[Tokenised]:
    records = [parse_record({"prompt": p, "completion": c}) for p, c in PAIRS]
    return [tokenise(record, it.base.tokenizer, 64) for record in records]


def plan(steps: int, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "batch": 4,
        "micro_batch": 4,
        "sequence_len": 64,
        "learning_rate": 5e-3,
        **changes,
    }
    return Plan(steps=steps, **settings)


def go_on(_: StepReport) -> Directive:
    return "continue"


def random_adapter(it: Trainer, rank: int, seed: int = 0, size: float = 0.05) -> dict[str, LoraFactors]:
    """Factors of `rank`, or as many as a narrow module holds."""
    draw = np.random.default_rng(seed)
    adapter = {}
    for name, (out, in_) in it.shapes.items():
        r = min(rank, out, in_)
        b, a = size * draw.standard_normal((out, r)), size * draw.standard_normal((r, in_))
        adapter[name] = LoraFactors(b.astype(np.float32), a.astype(np.float32))
    return adapter


def same_bits(left: Adapter, right: Adapter) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[n].b, right[n].b) and np.array_equal(left[n].a, right[n].a) for n in left
    )


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_in_nf4_learns(directories: Mapping[Architecture, Path], architecture: Architecture) -> None:
    it = make(directories[architecture])
    rows = rows_of(it)
    before = it.evaluate(None, rows)
    reports: list[StepReport] = []

    def listen(report: StepReport) -> Directive:
        reports.append(report)
        return "continue"

    done = it.train(Start(None, None, 8, seed=1), rows, plan(60), on_step=listen)
    after = it.evaluate(done.adapter, rows)
    assert after.loss < 0.5 * before.loss
    assert after.tokens == before.tokens == sum(row.label_tokens for row in rows)
    assert (done.steps, done.examples) == (60, 240)
    assert (done.loss_before, done.loss_after) == (reports[0].loss, reports[-1].loss)
    assert [r.step for r in reports] == list(range(1, 61))
    assert {name: f.shape for name, f in done.adapter.items()} == dict(it.shapes)
    assert all(f.b.dtype == f.a.dtype == np.float32 for f in done.adapter.values())
    # Evaluating and asking leave nothing behind.
    assert it.evaluate(None, rows) == before


def test_what_is_learnt_is_said(exact: Trainer) -> None:
    rows = rows_of(exact)
    done = exact.train(Start(None, None, 16, seed=1), rows, plan(250, batch=6, micro_batch=6), on_step=go_on)
    prompts = [p for p, _ in PAIRS]
    answers = exact.generate(done.adapter, prompts, max_new_tokens=8)
    assert answers == [c for _, c in PAIRS]
    assert exact.generate(done.adapter, [], max_new_tokens=8) == []
    # Left padding changes no answer, not even of the base, which answers at random.
    alone = [exact.generate(None, [prompt], 8)[0] for prompt in prompts]
    assert exact.generate(None, prompts, 8) == alone


def test_the_served_adapter_itself_is_trained_under_flexlora(exact: Trainer) -> None:
    rows, given = rows_of(exact), random_adapter(exact, 4)
    still = exact.train(Start(given, None, 4, seed=1), rows, plan(1, learning_rate=0.0), on_step=go_on)
    for name, factors in still.adapter.items():
        np.testing.assert_allclose(factors.product(), given[name].product(), rtol=1e-6, atol=1e-7)
    moved = exact.train(Start(given, None, 4, seed=1), rows, plan(3), on_step=go_on)
    assert all(not np.array_equal(moved.adapter[n].a, given[n].a) for n in given)


def test_fresh_factors_follow_the_seed(exact: Trainer) -> None:
    rows = rows_of(exact)

    def start(seed: int) -> Adapter:
        run = plan(1, learning_rate=0.0)
        return exact.train(Start(None, None, 4, seed), rows, run, on_step=go_on).adapter

    one, again, other = start(1), start(1), start(2)
    assert same_bits(one, again)
    assert not same_bits(one, other)
    assert all(not f.b.any() and f.a.any() for f in one.values())


def test_a_rank_above_a_narrow_module_is_cut_to_it(nf4: Trainer) -> None:
    done = nf4.train(Start(None, None, 32, seed=1), rows_of(nf4), plan(2), on_step=go_on)
    ranks = {name.rsplit(".", 1)[1]: f.rank for name, f in done.adapter.items()}
    assert ranks["k_proj"] == ranks["v_proj"] == 16
    assert ranks["q_proj"] == ranks["down_proj"] == 32


# --- carry ---------------------------------------------------------------------------------------


def test_gradients_reach_the_local_factors_alone(nf4: Trainer) -> None:
    carried, local = random_adapter(nf4, 6, seed=1), random_adapter(nf4, 4, seed=2)
    with nf4.places.installed({LOCAL: local, CARRIED: carried}):
        nf4.loss_sum(rows_of(nf4)[:4]).backward()
        with_gradient = {n for n, p in nf4.base.model.named_parameters() if p.grad is not None}
        expected = {f"{m}.lora_{x}.{LOCAL}.weight" for m in nf4.shapes for x in "AB"}
        assert with_gradient == expected
        assert all(p.grad.abs().sum() > 0 for p in nf4.places.trainable().values() if p.grad is not None)


def test_carried_factors_act_and_do_not_change(exact: Trainer) -> None:
    rows, carried = rows_of(exact), random_adapter(exact, 6)
    seen: list[dict[str, LoraFactors]] = []

    def look(_: StepReport) -> Directive:
        seen.append(exact.places.factors(CARRIED))
        return "continue"

    run = plan(3, batch=len(rows))
    done = exact.train(Start(None, carried, 4, seed=1), rows, run, on_step=look)
    assert same_bits(seen[0], seen[-1])
    for name, factors in seen[-1].items():
        np.testing.assert_allclose(factors.product(), carried[name].product(), rtol=1e-5, atol=1e-7)
    # Fresh factors add nothing at first, so that the first loss is that of the carried adapter.
    assert math.isclose(done.loss_before, exact.evaluate(carried, rows).loss, rel_tol=1e-5)
    both = {
        n: LoraFactors(
            np.hstack([carried[n].b, done.adapter[n].b]), np.vstack([carried[n].a, done.adapter[n].a])
        )
        for n in carried
    }
    assert exact.evaluate(both, rows).loss < done.loss_before


def test_fresh_rows_are_long_and_given_ones_are_kept(exact: Trainer) -> None:
    still = plan(1, learning_rate=0.0)
    fresh = exact.train(Start(None, None, 4, seed=1), rows_of(exact), still, on_step=go_on).adapter
    given = {
        n: LoraFactors(np.zeros((o, 0), "f4"), np.zeros((0, i), "f4")) for n, (o, i) in exact.shapes.items()
    }
    filled = exact.train(Start(given, None, 4, seed=1), rows_of(exact), still, on_step=go_on).adapter
    for name, factors in fresh.items():
        assert not factors.b.any()
        np.testing.assert_array_equal(factors.a, trainer.FRESH_ROWS * filled[name].a)
        assert 0.9 < np.abs(filled[name].a).max() * math.sqrt(factors.shape[1]) <= 1.0


# --- equalities ----------------------------------------------------------------------------------


def test_micro_batches_are_one_batch(exact: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients summed over micro-batches of unequal label counts equal that of the whole batch."""
    rows = rows_of(exact)

    def gradients(micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
        found: dict[str, torch.Tensor] = {}
        with exact.places.installed({LOCAL: random_adapter(exact, 4)}):
            run = Run(exact.places.trainable(), plan(1, micro_batch=micro_batch))
            monkeypatch.setattr(
                run, "update", lambda: found.update({n: p.grad for n, p in run.parameters.items()})
            )
            return exact.step(run, rows), found

    loss, whole = gradients(len(rows))
    for size in (1, 5):
        other_loss, parts = gradients(size)
        assert math.isclose(loss, other_loss, rel_tol=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(
                parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
            )


def test_evaluation_is_the_mean_over_label_tokens(exact: Trainer) -> None:
    """Against a loop over single rows without padding, and whatever the batch size."""
    rows, adapter = rows_of(exact), random_adapter(exact, 4)
    total, tokens = 0.0, 0
    with exact.places.installed({CARRIED: adapter}), torch.no_grad():
        for row in rows:
            logits = exact.base.model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            for place, label in enumerate(row.labels[1:]):
                if label != IGNORED:
                    total, tokens = total - float(logits[place, label]), tokens + 1
    for batch in (1, 5, 100):
        found = exact.evaluate(adapter, rows, batch=batch)
        assert found.tokens == tokens
        assert math.isclose(found.loss, total / tokens, rel_tol=1e-5)


def test_evaluation_does_not_disturb_training(directories: Mapping[Architecture, Path]) -> None:
    """bitsandbytes may repack weights for inference, which would cut the gradient of later training."""
    it = make(directories["llama"])
    rows = rows_of(it)

    def run() -> Trained:
        return it.train(Start(None, None, 4, seed=3), rows, plan(4), on_step=go_on)

    before = run()
    it.evaluate(before.adapter, rows)
    it.generate(before.adapter, ["red hall"], 4)
    assert same_bits(run().adapter, before.adapter)


@pytest.mark.parametrize("rule", ["flexlora", "carry"])
def test_a_resumed_run_equals_an_uninterrupted_one(nf4: Trainer, tmp_path: Path, rule: str) -> None:
    rows, held = rows_of(nf4), random_adapter(nf4, 4)
    start = Start(held, None, 4, seed=5) if rule == "flexlora" else Start(None, held, 4, seed=5)
    run, path = plan(9, checkpoint_s=0.0), tmp_path / "checkpoint.safetensors"
    whole = nf4.train(start, rows, run, on_step=go_on)

    def stop_at(step: int) -> Any:
        return lambda report: "abandon" if report.step == step else "continue"

    for step in (2, 7):  # cut twice
        with pytest.raises(Abandoned):
            nf4.train(start, rows, run, on_step=stop_at(step), checkpoint=path)
    steps: list[int] = []

    def count(report: StepReport) -> Directive:
        steps.append(report.step)
        return "continue"

    resumed = nf4.train(start, rows, run, on_step=count, checkpoint=path)
    assert steps == [8, 9]
    assert same_bits(resumed.adapter, whole.adapter)
    assert (resumed.steps, resumed.examples) == (whole.steps, whole.examples)
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_not_used(
    nf4: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, path = rows_of(nf4), tmp_path / "checkpoint.safetensors"
    run = plan(2, checkpoint_s=0.0)
    nf4.train(Start(None, None, 4, seed=1), rows, run, on_step=go_on, checkpoint=path)

    def steps_done(start: Start, rows: Sequence[Tokenised], run: Plan) -> int:
        steps: list[int] = []
        nf4.train(start, rows, run, on_step=lambda r: (steps.append(r.step), "finish")[1], checkpoint=path)
        return len(steps)

    kept = path.read_bytes()
    assert steps_done(Start(None, None, 4, seed=1), rows, plan(2, micro_batch=1, duty=0.9)) == 0
    for start, data, other in [
        (Start(None, None, 4, seed=2), rows, run),
        (Start(None, None, 5, seed=1), rows, run),
        (Start(None, None, 4, seed=1), rows[1:], run),
        (Start(None, None, 4, seed=1), rows, plan(3, checkpoint_s=0.0)),
        (Start(None, random_adapter(nf4, 2), 4, seed=1), rows, run),
    ]:
        path.write_bytes(kept)
        assert steps_done(start, data, other) == 1
    path.write_bytes(kept[: len(kept) // 2])
    assert steps_done(Start(None, None, 4, seed=1), rows, run) == 1
    assert "cannot be read" in caplog.text


def test_checkpoints_are_written_at_their_interval(
    nf4: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(trainer, "write_checkpoint", lambda path, *_: written.append(path))
    path = tmp_path / "c"
    nf4.train(Start(None, None, 2, 1), rows_of(nf4), plan(3), on_step=go_on, checkpoint=path)
    assert written == []
    nf4.train(
        Start(None, None, 2, 1), rows_of(nf4), plan(3, checkpoint_s=0.0), on_step=go_on, checkpoint=path
    )
    assert written == [path] * 3


# --- being told what to do -----------------------------------------------------------------------


def test_finish_hands_in_what_there_is(nf4: Trainer) -> None:
    def finish(report: StepReport) -> Directive:
        return "finish" if report.step == 3 else "continue"

    done = nf4.train(Start(None, None, 2, seed=1), rows_of(nf4), plan(50), on_step=finish)
    assert (done.steps, done.examples) == (3, 12)


def test_after_abandoning_the_trainer_is_as_new(nf4: Trainer) -> None:
    rows = rows_of(nf4)
    before = nf4.evaluate(None, rows)
    with pytest.raises(Abandoned):
        nf4.train(Start(None, None, 2, seed=1), rows, plan(5), on_step=lambda _: "abandon")
    assert nf4.evaluate(None, rows) == before


def test_calm_mode_rests(nf4: Trainer) -> None:
    began = time.monotonic()
    done = nf4.train(Start(None, None, 2, seed=1), rows_of(nf4), plan(6, duty=0.25), on_step=go_on)
    # No rest after the last step: five of six steps are followed by three times their length.
    assert time.monotonic() - began > 3 * done.seconds * 0.5


def test_a_rest_hears_the_caller() -> None:
    report, told = StepReport(1, 9, 0.0, 4, 1.0), []

    def finish_soon(said: StepReport) -> Directive:
        told.append(said)
        return "finish" if len(told) == 3 else "continue"

    began = time.monotonic()
    assert rest(began + 60, report, finish_soon) == "finish"
    assert time.monotonic() - began < 10
    assert told == [report] * 3


def test_the_order_of_data_is_whole_permutations() -> None:
    order = [i for step in range(6) for i in batch_indices(10, 5, step, seed=1)]
    epochs = [order[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order != [i for step in range(6) for i in batch_indices(10, 5, step, seed=2)]
    assert (
        batch_indices(3, 8, 2, seed=1) == [i for s in range(24) for i in batch_indices(3, 1, s, seed=1)][16:]
    )


# --- bad input -----------------------------------------------------------------------------------


def test_a_run_that_diverges_says_so(exact: Trainer) -> None:
    with pytest.raises(InputError, match="diverged at step 2 .* lower the learning rate, now 1e[+]30"):
        exact.train(
            Start(random_adapter(exact, 2), None, 2, 1),
            rows_of(exact),
            plan(3, learning_rate=1e30),
            on_step=go_on,
        )


def test_impossible_requests_are_named(nf4: Trainer) -> None:
    rows, given = rows_of(nf4), random_adapter(nf4, 4)
    name = next(iter(given))
    part = {n: f for n, f in given.items() if n != name}
    long = Tokenised(tuple([5] * 100), tuple([5] * 100))
    cases: list[tuple[type[Exception], str, Start, list[Tokenised]]] = [
        (InputError, "no examples", Start(None, None, 4, 1), []),
        (InputError, "100 tokens, more than 64", Start(None, None, 4, 1), [long]),
        (InputError, "ranks 0 are impossible", Start(None, None, 0, 1), rows),
        (AdapterError, f"module {name} is missing", Start(part, None, 4, 1), rows),
        (AdapterError, f"module {name} is missing", Start(None, part, 4, 1), rows),
        (AdapterError, "module other is no target", Start({**given, "other": given[name]}, None, 4, 1), rows),
        (AdapterError, "has rank 4, more than 2", Start(given, None, 2, 1), rows),
        (
            AdapterError,
            "has shape",
            Start({**given, name: LoraFactors(np.ones((3, 1)), np.ones((1, 3)))}, None, 4, 1),
            rows,
        ),
    ]
    for kind, says, start, data in cases:
        with pytest.raises(kind, match=says):
            nf4.train(start, data, plan(1), on_step=go_on)
    with pytest.raises(InputError, match="200 tokens, more than 128"):
        nf4.evaluate(None, [Tokenised(tuple([5] * 200), tuple([5] * 200))])
    with pytest.raises(InputError, match="duty 0"):
        plan(1, duty=0.0)
    # A refusal leaves the model as it was.
    assert nf4.train(Start(None, None, 4, 1), rows, plan(1), on_step=go_on).steps == 1


def test_bars_are_shown_only_when_asked(
    directories: Mapping[Architecture, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_model.load(str(directories["llama"]), device="cpu")
    modules = base_model.describe(str(directories["llama"])).modules
    quiet = Trainer(base, modules, SCALING)  # stderr is no terminal here
    quiet.train(Start(None, None, 2, 1), rows_of(quiet), plan(4, duty=0.05), on_step=go_on)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_rank_of_nothing_carried_is_the_base(exact: Trainer) -> None:
    rows = rows_of(exact)
    empty = {
        n: LoraFactors(np.zeros((o, 0), np.float32), np.zeros((0, i), np.float32))
        for n, (o, i) in exact.shapes.items()
    }
    assert exact.evaluate(empty, rows) == exact.evaluate(None, rows)


def test_places_need_all_targets_of_the_model(directories: Mapping[Architecture, Path]) -> None:
    base = base_model.load(str(directories["llama"]), device="cpu")
    with pytest.raises(ValueError, match="not found"):
        AdapterPlaces(base, {"model.layers.0.nothing": (4, 4)}, SCALING)
