"""The doctor on this machine, on broken parts, against coordinators of every kind; joining without 4 bits."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import pytest
import torch

from edge_sdk.cli import main
from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import JoinReply, JoinRequest
from edge_sdk.core.profile import Accelerator, DeviceProfile
from edge_sdk.core.records import to_json
from edge_sdk.diagnosis import doctor, federation_checks, machine_checks
from edge_sdk.diagnosis.check import Check, fine, not_fine, rendered, warning
from edge_sdk.diagnosis.doctor import JoinPlan
from edge_sdk.membership.journal import Journal
from edge_sdk.membership.session import joined
from edge_sdk.model import base_model
from edge_sdk.options import Options
from edge_sdk.participation import decision
from edge_sdk.trials.four_bit import FourBitTrial
from tests.broken_bitsandbytes import CODE, write_package
from tests.models import build_model
from tests.processes import CoordinatorProcess, environment, toml

RECORD = '{"prompt": "turn the light on", "completion": "done"}\n'
WORKS = FourBitTrial(True, "", 1.5)
LAPTOP = DeviceProfile("l", "Linux", "x86_64", "N100", 4, 4, 8 * 10**9, memory_available_bytes=5 * 10**9)
BROKEN = FourBitTrial(False, "bitsandbytes failed at its first kernels: no kernel", 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def coordinator(folder: Path) -> Iterator[CoordinatorProcess]:
    model = build_model(folder / "base", "llama")
    (folder / "base.json").write_text(json.dumps(to_json(base_model.describe(str(model)))))
    config = toml({"training": {"steps": 4, "batch": 2, "sequence_len": 32}}, folder / "base.json")
    with CoordinatorProcess(folder, config) as process:
        yield process


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text(RECORD * 3)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two parts that start processes; they have tests of their own."""
    monkeypatch.setattr(machine_checks, "import_problems", lambda names: dict.fromkeys(names, ""))
    monkeypatch.setattr(doctor, "four_bit_works", lambda device: WORKS)


def here(folder: Path, coordinator: CoordinatorProcess | None = None) -> Options:
    """A device with memory enough, whatever this machine has, whose owner names a coordinator's base."""
    model = base_of(coordinator) if coordinator else None
    return Options(state_dir=folder, device="cpu", profile=LAPTOP, model=model)


def base_of(coordinator: CoordinatorProcess) -> str:
    return str(coordinator.data.parent / "base")


def diagnosis(plan: JoinPlan) -> dict[str, Check]:
    """Subject -> check, each subject once."""
    checks = list(doctor.examine(plan))
    found = {check.subject: check for check in checks}
    assert len(found) == len(checks)
    for check in checks:
        assert "\n" not in check.found + check.mend
        assert (check.mend == "") == (check.state == "fine")
    return found


def states(found: dict[str, Check]) -> dict[str, str]:
    return {subject: check.state for subject, check in found.items() if check.state != "fine"}


# --- whole runs -------------------------------------------------------------------------------------


def run(*arguments: object, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`edge-sdk` in a process of its own, with a package in front of the installed ones."""
    paths = environment() | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    if site is not None:
        paths["PYTHONPATH"] = os.pathsep.join([str(site), paths["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", "edge_sdk.cli", *map(str, arguments)],
        env=paths,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_machine_that_is_fit(coordinator: CoordinatorProcess, data: Path, tmp_path: Path) -> None:
    arguments = ("doctor", coordinator.url, "--token", coordinator.join_token, "--data", data, "--device=cpu")
    arguments += ("--model", base_of(coordinator))
    done = run(*arguments, "--state", tmp_path / "state", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["fit"] is True
    subjects = [check["subject"] for check in report["checks"]]
    assert subjects == [
        *("python", "libraries", "coordinator", "clock", "data", "base model", "device"),
        *("memory", "disk", "4-bit", "rank"),
    ]
    found = {check["subject"]: check["found"] for check in report["checks"]}
    assert "transformers " in found["libraries"]
    assert "gives right gradients" in found["4-bit"]
    assert "the federation's" in found["base model"]
    assert f"{data}: 3 conversations" in found["data"]
    assert " needs " in found["rank"]
    assert not (tmp_path / "state" / "session.json").exists()


def test_a_bitsandbytes_that_kills_its_process(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_checks, "import_problems", lambda names: dict.fromkeys(names, ""))
    monkeypatch.syspath_prepend(str(write_package(CODE["illegal instruction"], tmp_path / "site")))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert main(["doctor", "--data", str(data), "--device", "cpu"]) == 0  # a warning: it goes on unquantised
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if "4-bit" in line)
    assert lines[place].startswith(
        "warning   4-bit        bitsandbytes failed at its first kernels: the process"
    )
    assert "killed by SIGILL" in lines[place]
    assert "training goes on unquantised where that fits" in lines[place]
    assert "→ python -m pip install --force-reinstall bitsandbytes==" in lines[place + 1]
    assert lines[-1].startswith("Fit to take part, with ")


def test_joining_goes_on_unquantised_and_says_so(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """With the hardest one: PEFT imports bitsandbytes wherever it finds it, and that kills the process."""
    site = write_package(CODE["import crashes"], tmp_path / "site")
    arguments = ("join", coordinator.url, "--token", coordinator.join_token, "--data", data, "--device=cpu")
    arguments += ("--model", base_of(coordinator))
    done = run(*arguments, "--state", tmp_path / "state", "--updates", 1, site=site)
    assert done.returncode == 0, done.stderr
    assert "4-bit training does not work here: bitsandbytes failed " in done.stdout
    assert "; training goes on unquantised" in done.stdout
    assert "delivered rank" in done.stdout


def test_the_decision_to_quantise(
    coordinator: CoordinatorProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transport = Transport(coordinator.url, coordinator.join_token)
    federation = transport.federation()
    transport.close()
    options = Options(device="cpu", memory_budget_bytes=10**9, model=base_of(coordinator))
    monkeypatch.setattr(decision, "four_bit_works", lambda device, folder: WORKS)
    assert decision.decide(federation, options).quantise
    monkeypatch.setattr(decision, "four_bit_works", lambda device, folder: BROKEN)
    decided = decision.decide(federation, options)
    assert not decided.quantise
    assert (
        decided.notice == f"4-bit training does not work here: {BROKEN.reason}; training goes on unquantised"
    )
    assert decided.choice == decision.choose_rank(federation, options, quantise=False)
    # Not wished for: not tried, and nothing to say.
    plain = decision.decide(federation, dataclasses.replace(options, quantise=False))
    assert (plain.quantise, plain.notice) == (False, "")
    small = dataclasses.replace(options, memory_budget_bytes=1000)
    with pytest.raises(InputError) as caught:
        decision.decide(federation, small)
    said = str(caught.value)
    assert said.startswith(
        f"4-bit training does not work here: {BROKEN.reason}; unquantised, not enough memory"
    )
    assert said.endswith("; `edge-sdk doctor` says what mends it")


# --- libraries --------------------------------------------------------------------------------------


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_one.py").write_text("raise OSError('no such library\\nsecond line')")
    (tmp_path / "killing_one.py").write_text("import os; os.abort()")
    (tmp_path / "using_bitsandbytes.py").write_text("import bitsandbytes")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("json", "raising_one", "killing_one", "re", "using_bitsandbytes", "absent_one")
    found = machine_checks.import_problems(names)
    assert list(found) == list(names)
    assert found["json"] == found["re"] == ""
    assert found["raising_one"] == "OSError: no such library"
    assert found["killing_one"].startswith("the process was killed by SIGABRT")
    assert "None in sys.modules" in found["using_bitsandbytes"]  # one broken library at a time
    assert found["absent_one"] == "ModuleNotFoundError: No module named 'absent_one'"


def test_a_library_that_is_broken_stops_what_needs_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problems = dict.fromkeys(machine_checks.LIBRARIES, "") | {"torch": "the process was killed by SIGILL"}
    monkeypatch.setattr(machine_checks, "import_problems", lambda names: problems)
    found = diagnosis(JoinPlan(Options(state_dir=tmp_path), data=data))
    assert list(found) == ["python", "torch", "libraries", "data"]
    assert "cannot be imported: the process was killed by SIGILL" in found["torch"].found
    assert found["torch"].mend.startswith("python -m pip install --force-reinstall torch==")
    assert not doctor.fit(list(found.values()))


def test_libraries_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "LIBRARIES", ("psutil", "no-such-library"))
    monkeypatch.setattr(machine_checks, "minimum_versions", lambda: {"psutil": "99.0"})
    monkeypatch.setattr(machine_checks, "import_problems", lambda names: dict.fromkeys(names, ""))
    old, absent = (check for _, check in machine_checks.library_checks())
    assert "is too old, 99.0 is needed" in old.found
    assert (absent.found, absent.mend) == ("not installed", machine_checks.INSTALL)


def test_the_versions_wanted_are_those_of_the_package() -> None:
    wanted = machine_checks.minimum_versions()
    assert set(machine_checks.LIBRARIES) <= set(wanted)
    assert machine_checks.version_numbers("2.13.0+cpu") == (2, 13, 0)
    assert machine_checks.version_numbers("5.0rc1") == (5, 0)
    assert machine_checks.version_numbers("none") == ()


# --- the machine ------------------------------------------------------------------------------------


def test_memory() -> None:
    assert machine_checks.memory_check(LAPTOP) == fine("memory", "5.0 GB of 8.0 GB memory free")
    swapping = dataclasses.replace(LAPTOP, swap_total_bytes=2 * 10**9, swap_free_bytes=10**9)
    assert machine_checks.memory_check(swapping).found.endswith("free, swap 1.0 GB of 2.0 GB")
    assert (
        machine_checks.memory_check(dataclasses.replace(LAPTOP, memory_available_bytes=10**9)).state
        == "warning"
    )
    full = dataclasses.replace(LAPTOP, memory_available_bytes=10**8)
    assert machine_checks.memory_check(full).state == "not fine"
    card = dataclasses.replace(full, accelerators=(Accelerator("cuda", "card", 10**10, 9 * 10**9),))
    assert "100 MB of RAM free, the libraries take 400 MB" in machine_checks.memory_check(card).found


def test_disk(tmp_path: Path) -> None:
    assert machine_checks.disk_check(tmp_path / "new", 1000).state == "fine"
    assert list(tmp_path.iterdir()) == []
    short = machine_checks.disk_check(tmp_path, 10**18)
    assert (short.state, "1000000 TB needed" in short.found) == ("not fine", True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    check = machine_checks.disk_check(tmp_path, 0)
    assert check.found == f"{tmp_path} cannot be written: Permission denied"


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine_checks.tempfile, "TemporaryFile", broken)
    assert machine_checks.disk_check(tmp_path, 0) == not_fine(
        "disk",
        f"{tmp_path} cannot be written: Read-only file system",
        "name a folder of your own with --state",
    )


def test_a_device_that_is_not_to_be_had() -> None:
    check = machine_checks.device_check("cuda:77", LAPTOP)
    assert check.state == "not fine"
    assert "device 'cuda:77' is not available here" in check.found


def test_a_card_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.device(torch.accelerator.current_accelerator() or "cpu").type != "cpu":
        pytest.skip("torch sees one here")
    assert machine_checks.device_check("auto", LAPTOP).state == "fine"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    check = machine_checks.device_check("auto", LAPTOP)
    assert (check.state, "this torch sees no GPU" in check.found) == ("warning", True)
    assert machine_checks.device_check("cpu", LAPTOP).state == "fine"  # wished for


def test_what_the_trial_says() -> None:
    assert machine_checks.four_bit_check(WORKS).state == "fine"
    assert machine_checks.four_bit_check(BROKEN).state == "warning"
    check = machine_checks.four_bit_check(BROKEN, otherwise="not enough memory to train")
    assert check.state == "not fine"
    assert check.found.endswith("no kernel; and unquantised, not enough memory to train")


def test_what_is_needed_on_the_disk() -> None:
    assert federation_checks.adapter_values({"a": (10, 4), "b": (100, 100)}, 8) == 14 * 4 + 200 * 8


# --- the federation ---------------------------------------------------------------------------------


def test_without_a_token(coordinator: CoordinatorProcess, quick: None, tmp_path: Path) -> None:
    found = diagnosis(JoinPlan(here(tmp_path, coordinator), coordinator.url))
    assert states(found) == {"coordinator": "warning"}
    assert found["coordinator"].found == f"{coordinator.url} answers; without a token it tells no more"
    assert found["clock"].state == "fine"


def test_with_a_wrong_token(coordinator: CoordinatorProcess, quick: None, tmp_path: Path) -> None:
    found = diagnosis(JoinPlan(here(tmp_path, coordinator), coordinator.url, token="wrong"))
    assert states(found) == {"coordinator": "not fine"}
    assert "ask the host for the join token" in found["coordinator"].mend


def test_a_device_that_has_joined_needs_no_token(
    coordinator: CoordinatorProcess, quick: None, tmp_path: Path
) -> None:
    transport = Transport(coordinator.url, coordinator.join_token)
    base = transport.federation().base
    reply: JoinReply = transport.join(JoinRequest("here", base.fingerprint))
    transport.close()
    Journal(tmp_path).save(joined(coordinator.url, reply))
    found = diagnosis(JoinPlan(here(tmp_path, coordinator), coordinator.url))
    assert states(found) == {}
    assert "ranks 2, 4" in found["coordinator"].found


def test_nobody_answers(quick: None, tmp_path: Path) -> None:
    found = diagnosis(JoinPlan(here(tmp_path), "https://no.invalid", token="t"))
    assert states(found) == {"coordinator": "not fine"}
    assert "clock" not in found
    assert "no coordinator answers at https://no.invalid" in found["coordinator"].found


def test_unquantised_training_that_would_not_fit(
    coordinator: CoordinatorProcess, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "four_bit_works", lambda device: BROKEN)
    options = dataclasses.replace(here(tmp_path, coordinator), memory_budget_bytes=1000)
    found = diagnosis(JoinPlan(options, coordinator.url, coordinator.join_token))
    assert states(found) == {"4-bit": "not fine"}
    assert "and unquantised, not enough memory to train" in found["4-bit"].found
    roomy = dataclasses.replace(options, memory_budget_bytes=None)
    assert states(diagnosis(JoinPlan(roomy, coordinator.url, coordinator.join_token))) == {"4-bit": "warning"}


def test_another_base_model(
    coordinator: CoordinatorProcess, quick: None, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "base", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    options = dataclasses.replace(here(tmp_path / "state"), model=str(other))
    found = diagnosis(JoinPlan(options, coordinator.url, coordinator.join_token))
    assert found["base model"].state == "not fine"
    assert "this device's base model has fingerprint" in found["base model"].found
    assert "rank" not in found


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer.json", "holds no tokeniser"),
        (".", "no such model directory"),
    ],
)
def test_a_base_model_with_a_file_missing(
    coordinator: CoordinatorProcess, folder: Path, tmp_path: Path, missing: str, reason: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "base", broken)
    shutil.rmtree(broken) if missing == "." else (broken / missing).unlink()
    check = federation_checks.model_check(Options(model=str(broken)), None, tmp_path / "digests.json")
    assert check.state == "not fine"
    assert reason in check.found


def test_a_base_model_that_was_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    check = federation_checks.model_check(Options(model="somebody/something"), None, tmp_path / "d.json")
    assert check == warning(
        "base model",
        "somebody/something is not on this machine yet; joining downloads it",
        "to have it beforehand: hf download somebody/something",
    )
    assert federation_checks.model_check(Options(model="a b"), None, tmp_path / "d.json").state == "not fine"


def test_data(tmp_path: Path, coordinator: CoordinatorProcess) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(RECORD + '{"text": "plain"}\n{"text": "more"}\n')
    assert federation_checks.data_check(path, None) == fine(
        "data", f"{path}: 1 conversations and 2 plain texts"
    )
    path.write_text(RECORD + "{\n")
    bad = federation_checks.data_check(path, None)
    assert (bad.state, f"{path}:2: not JSON" in bad.found) == ("not fine", True)
    assert "no such file" in federation_checks.data_check(tmp_path / "gone.jsonl", None).found


@pytest.mark.parametrize(
    ("ahead_s", "state", "words"),
    [
        (0, "fine", "within 1 s"),
        (-299, "fine", "within 299 s"),
        (600, "warning", "10 minutes ahead of"),
        (-7200, "warning", "120 minutes behind"),
    ],
)
def test_the_clock(ahead_s: int, state: str, words: str) -> None:
    theirs = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    check = federation_checks.clock_check(format_datetime(theirs, usegmt=True), theirs.timestamp() + ahead_s)
    assert (check.state, words in check.found) == (state, True), check


def test_a_date_that_is_none() -> None:
    assert federation_checks.clock_check("yesterday").state == "warning"


# --- what a person gets wrong, and sees -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["notaurl"], "'notaurl' is no address of a coordinator"),
        (["https://h", "--token", "tökén"], "the token is not one"),
        (["--state", __file__], "no usable state folder (it is a file)"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], reason: str, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert reason in said.err
    assert said.err.count("\n") == 1


def test_a_session_that_cannot_be_read(quick: None, tmp_path: Path) -> None:
    (tmp_path / "session.json").write_text("{")
    with pytest.raises(InputError, match="not a session"):
        list(doctor.examine(JoinPlan(here(tmp_path), "http://h")))


def test_what_is_not_fit_ends_with_1(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--state", str(tmp_path), "--data", str(tmp_path / "gone.jsonl")]) == 1
    said = capsys.readouterr().out
    assert "not fine  data " in said
    assert said.endswith("Not fit yet: 1 of 8 checks must be mended first.\n")


def test_how_a_check_looks() -> None:
    assert rendered(fine("disk", "much")) == "fine      disk         much"
    check = not_fine("4-bit", "it failed at the first kernel", "pip install it")
    assert rendered(check) == (
        "not fine  4-bit        it failed at the first kernel\n                       → pip install it"
    )
    folded = rendered(check, width=44, colour=True).splitlines()
    assert folded[0] == "\x1b[1;31mnot fine  \x1b[0m4-bit        it failed at the"
    assert folded[1:] == [" " * 23 + "first kernel", " " * 23 + "→ pip install it"]


def test_the_profile_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= found["threads"] >= 1
    assert found["gflops"] is None
    assert set(found) == {field.name for field in dataclasses.fields(DeviceProfile)}


def test_an_interpreter_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_checks.python_check().state == "fine"
    monkeypatch.setattr(machine_checks.sys, "maxsize", 2**31 - 1)
    assert "32 bits; PyTorch needs 64" in machine_checks.python_check().found
