"""The example on Natural Instructions: reading, filtering and choosing clients; its verdict. No training."""

import json
import lzma
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.core.choice.model_facts import facts_from_config
from edge_sdk.core.choice.rank import Carry, Device, Limits
from edge_sdk.core.choice.rank import choose as choose_rank
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import InputError
from edge_sdk.model import base_model
from edge_sdk.model.files import read_config, resolve
from examples import natural_instructions
from examples.instruction_clients import Client, Filter, choose, eligible, read_clients, spread
from examples.instruction_report import Loss, Participant, Report, fell, markdown, means

Line = dict[str, Any] | bytes
FileOf = Callable[..., Path]
WORDS = Filter(train_rows=3, held_out_rows=1, median_tokens=6)


def record(number: int, category: str = "Misc.", **changes: Any) -> dict[str, Any]:
    """A client as a line of the file; its rows are `input n` -> `output n`."""
    rows = [[f"input {n}", f"output {n}"] for n in range(6)]
    whole = {"client": number, "category": category, "task": 100 + number, "instruction": "Say it."}
    return whole | {"train": rows[:4], "eval": rows[4:5], "test": rows[5:]} | changes


@pytest.fixture
def file_of(tmp_path: Path) -> FileOf:
    """Write lines (records or raw bytes) as an xz file."""

    def write(*lines: Line) -> Path:
        path = tmp_path / "clients.jsonl.xz"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(lzma.compress(b"".join(line + b"\n" for line in raw)))
        return path

    return write


def words(text: str) -> int:
    return len(text.split())


# --- reading ---


def test_a_client_is_read_as_it_stands(file_of: FileOf) -> None:
    (client,) = read_clients(file_of(record(7, "Question Answering")))
    assert (client.id, client.category, client.task) == (7, "Question Answering", 107)
    assert client.train == tuple((f"input {n}", f"output {n}") for n in range(4))
    assert client.held_out == (("input 4", "output 4"), ("input 5", "output 5"))
    assert client.records(client.held_out[:1]) == [
        {"instruction": "Say it.", "input": "input 4", "output": "output 4"}
    ]


def test_rows_without_output_and_held_out_rows_that_were_trained_do_not_count(file_of: FileOf) -> None:
    line = record(
        1, train=[["a", "x"], ["b", " "]], eval=[["a", "another output"], ["c", "z"]], test=[["d", ""]]
    )
    (client,) = read_clients(file_of(line))
    assert client.train == (("a", "x"),)
    assert client.held_out == (("c", "z"),)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{broken", ":2: not JSON"),
        (b"\xff\xfe", ":2: not JSON"),
        (b"[]", ":2: a JSON list, not an object"),
        ({"client": 1}, ":2: the field 'train' is missing"),
        (record(1, task="5"), ":2: 'task' is a JSON str, not int"),
        (record(1, client=True), ":2: 'client' is a JSON bool, not int"),
        (record(1, eval=[["a", "b"], ["only input"]]), ":2: eval[1] is not a pair"),
        (record(1, train=[["a", 5]]), ":2: train[0] is not a pair"),
    ],
)
def test_a_broken_line_is_named(file_of: FileOf, line: Line, complaint: str) -> None:
    path = file_of(record(0), line)
    with pytest.raises(InputError, match=re.escape(f"{path}{complaint}")):
        read_clients(path)


def test_files_that_are_no_data(file_of: FileOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; name Natural Instructions"):
        read_clients(tmp_path / "missing.xz")
    with pytest.raises(InputError, match="cannot be read"):
        read_clients(tmp_path)
    with pytest.raises(InputError, match="holds no clients"):
        read_clients(file_of())
    plain = tmp_path / "plain.xz"
    plain.write_text(json.dumps(record(0)))
    with pytest.raises(InputError, match="plain.xz: not a whole xz file"):
        read_clients(plain)
    whole = file_of(*(record(n) for n in range(50)))
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"not a whole xz file \(damaged after line"):
        read_clients(whole)


# --- the filter ---


def test_the_filter_keeps_what_passes_each_condition(file_of: FileOf) -> None:
    long = [[f"one two three {n}", "four"] for n in range(6)]  # 2 + 4 + 1 = 7 words a row, 6 are allowed
    lines = [
        record(0),
        record(1, category="Translation"),
        record(2, train=[["a", "b"]] * 2),
        record(3, eval=[], test=[]),
        record(4, instruction="Это не английский язык"),
        record(5, train=long[:4]),
        record(6),
    ]
    assert [client.id for client in eligible(read_clients(file_of(*lines)), WORDS, words)] == [0, 6]


def test_ascii_share_counts_characters() -> None:
    client = Client(0, "Misc.", 1, "abcd", (("é", "xyz"), ("ü", "w")), ())
    assert client.ascii_share == 8 / 10


def test_the_filter_states_itself() -> None:
    assert str(WORDS) == (
        "not Translation; at least 98% ASCII; at least 3 train rows and 1 held-out rows with an output; "
        "a median of at most 6 tokens with the base model's tokenizer"
    )


# --- the choice ---


def clients(sizes: list[int]) -> list[Client]:
    """Categories `A`, `B`, … of the given sizes."""
    ids = iter(range(1000))
    return [
        Client(next(ids), chr(65 + c), 1, "", (), ()) for c, size in enumerate(sizes) for _ in range(size)
    ]


def test_participants_are_of_different_categories_and_nobody_is_drawn_twice() -> None:
    everyone = clients([1, 2, 3, 4, 1, 5])
    choice = choose(everyone, devices=3, unseen=4, seed=0)
    taking_part = {client.category for client in choice.participants}
    assert len(choice.participants) == len(taking_part) == 3
    assert taking_part <= {"B", "C", "D", "F"}  # the others have one client
    assert len(choice.same_category) == len(choice.other_category) == 4
    assert {client.category for client in choice.same_category} == taking_part  # one of each, then more
    assert not {client.category for client in choice.other_category} & taking_part
    drawn = [c.id for c in (*choice.participants, *choice.same_category, *choice.other_category)]
    assert len(set(drawn)) == len(drawn) == 11


def test_the_choice_follows_from_the_seed_and_not_from_the_order() -> None:
    everyone = clients([3] * 8)
    choices = [choose(everyone, 4, 4, seed) for seed in range(5)]
    assert choose(everyone[::-1], 4, 4, 0) == choices[0]
    assert len({choice.participants for choice in choices}) == 5


@pytest.mark.parametrize("devices", [0, -1, 3])
def test_as_many_devices_as_categories_with_two_clients(devices: int) -> None:
    with pytest.raises(InputError, match=rf"--devices {devices}: .* choose 1 to 2$"):
        choose(clients([2, 1, 2]), devices, 4, 0)


@pytest.mark.parametrize("count", [1, 5, 6, 9, 15])
def test_clients_are_spread_evenly_over_all_categories(count: int) -> None:
    everyone = clients([1, 2, 3, 4, 5])
    drawn = spread(everyone, count, seed=0)
    assert len({client.id for client in drawn}) == len(drawn) == count
    counts = Counter(client.category for client in drawn)
    for category, size in Counter(client.category for client in everyone).items():
        # No category has two more than one that has more to give.
        assert counts[category] == size or counts[category] >= max(counts.values()) - 1
    assert spread(everyone[::-1], count, 0) == drawn
    assert spread(everyone, count, 1) != drawn


@pytest.mark.parametrize("count", [0, 16])
def test_no_more_clients_are_spread_than_there_are(count: int) -> None:
    with pytest.raises(InputError, match=rf"^{count} devices: 15 clients pass .* at most$"):
        spread(clients([1, 2, 3, 4, 5]), count, 0)


# --- the run's settings ---


@pytest.mark.parametrize("rule", ["carry", "flexlora"])
def test_each_budget_gives_its_rank(rule: str) -> None:
    base = base_model.describe("tiny")
    facts = facts_from_config(read_config(resolve("tiny")), base.modules)
    carried = natural_instructions.RANK_CAP if rule == "carry" else 0
    for rank in natural_instructions.LADDER:
        budget = natural_instructions.budget_bytes(base, rule, rank)
        chosen = choose_rank(
            facts,
            natural_instructions.TRAINING,
            [Ranks.uniform(of) for of in natural_instructions.LADDER],
            Carry(carried),
            Limits(budget),
            Device(base_model.placement("auto")),
        ).setting
        assert (chosen.ranks.largest, chosen.carry_rank) == (rank, carried)
        assert (chosen.micro_batch, chosen.checkpointing) == (natural_instructions.TRAINING.batch, False)


def test_the_configuration_is_one_that_the_coordinator_takes(tmp_path: Path) -> None:
    from coordinator.settings import load_settings

    path = tmp_path / "federation.toml"
    path.write_text(natural_instructions.federation_toml("flexlora"))
    settings = load_settings(path)
    assert settings.training == natural_instructions.TRAINING
    assert settings.policy == natural_instructions.POLICY
    assert (settings.federation.rule, settings.federation.ladder) == ("flexlora", natural_instructions.LADDER)


# --- the verdict ---


def report(*changes: tuple[float, float]) -> Report:
    """A report whose unseen clients went (before, after) as given, in two groups."""
    losses = tuple(Loss(n, "Misc.", n, before, after, 10) for n, (before, after) in enumerate(changes))
    device = Participant(9, "QA", 3, 4.0, 2.0, 20, "qa", 60_000_000, 8, 5, 1.5, 2_500_000)
    return Report(
        command="python -m examples.natural_instructions",
        machine="a machine",
        base={"model": "tiny", "loaded": "NF4", "fingerprint": "ab" * 32},
        filter="all",
        clients=4,
        eligible=3,
        rule="carry",
        seed=0,
        training={"steps": 10, "batch": 8, "learning_rate": 0.001},
        policy={"buffer_size": 4, "server_learning_rate": 1.0},
        devices=(device,),
        unseen={"same category": losses[:1], "other category": losses[1:]},
        versions=6,
        training_s=200.0,
        seconds=260.0,
        adapter_dir="runs/adapter",
    )


def test_means_count_every_client_once() -> None:
    losses = [Loss(0, "A", 0, 4.0, 3.0, 1000), Loss(1, "B", 1, 2.0, 2.5, 10)]
    assert means(losses) == (3.0, 2.75)
    assert fell(losses) == 1


def test_learnt_is_a_lower_mean_over_all_unseen_clients() -> None:
    assert report((4.0, 3.0), (2.0, 2.5)).learnt
    assert not report((4.0, 3.0), (2.0, 3.0)).learnt  # equal is not lower
    assert not report((4.0, 3.5), (2.0, 3.0)).learnt
    assert not replace(report(), unseen={}).learnt


def test_the_report_is_json_with_its_means(tmp_path: Path) -> None:
    report((4.0, 3.0), (2.0, 2.5)).write(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["devices"][0]["name"] == "qa"
    assert read["devices"][0]["uploaded_bytes"] == 2_500_000
    assert read["means"]["all unseen"] == {"clients": 2, "loss_before": 3.0, "loss_after": 2.75, "fell": 1}


def test_the_markdown_has_both_tables() -> None:
    lines = markdown(report((4.0, 3.0), (2.0, 2.5))).splitlines()
    assert "| QA | 3 | 60 MB | 8 | 5 | 1.5 | 2.5 MB | 4.00 | 2.00 |" in lines
    assert "| participants | 4.00 | 2.00 | 1 of 1 |" in lines
    assert "| all unseen | 3.00 | 2.75 | 1 of 2 |" in lines


# --- bad input from the command line ---


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "missing.xz"], "missing.xz: no such file"),
        (["--data", "{data}", "--devices", "3"], "--devices 3: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    file_of: FileOf, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    data = file_of(record(0), record(1))
    command = [sys.executable, "-m", "examples.natural_instructions", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        command + [argument.format(data=data) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.strip().startswith(f"natural_instructions: {complaint}")
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
