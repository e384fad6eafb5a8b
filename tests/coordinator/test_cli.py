"""The host's mistakes: one line that names the key, exit code 2, and nothing written."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.cli import main
from tests.coordinator.devices import configuration, member
from tests.processes import CoordinatorProcess, command


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Serve with this configuration; the one line that it is refused with."""

    def attempt(text: str) -> str:
        (tmp_path / "c.toml").write_text(text)
        code = main(
            ["serve", "--data", str(tmp_path / "data"), "--config", str(tmp_path / "c.toml"), "--port", "0"]
        )
        said = capsys.readouterr()
        assert (code, said.out) == (2, "")
        assert said.err.startswith("edge-coordinator: ")
        assert said.err.count("\n") == 1
        assert not (tmp_path / "data").exists()
        return said.err

    return attempt


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("[storage]\nkeep_versions = 0", "storage.keep_versions is 0; it must be 1 or more"),
        (
            "[storage]\nkeep_version = 3",
            "unknown key 'storage.keep_version'; the keys are storage.keep_versions; did you mean",
        ),
        ("[policy]\nbuffer_size = 0", "policy.buffer_size is 0; it must be above 0"),
        ("[policy]\nlease_s = 1e12", "no device would take this federation: Federation.lease_s"),
        ("[policy]\nquorum = 9", "policy.quorum is 9, above policy.buffer_size 4"),
        ("[policy]\ntimeout_s = -1", "policy.timeout_s is -1"),
        ("[policy]\ntimeout_s = nan", "policy.timeout_s: expected float"),
        ("[policy]\nlease_s = -600", "policy.lease_s is -600"),
        ("[policy]\ndeadline_mads = 0", "policy.deadline_mads is 0"),
        ("[policy]\nwork_s = -5", "policy.work_s is -5"),
        ("[policy]\nmax_staleness = -1", "policy.max_staleness is -1; it must be 0 or more"),
        (
            "[policy]\nmax_staleness = 9",
            "policy.max_staleness is 9, but while a device uses its policy.lease_s",
        ),
        ("[policy]\nconcurrency = 0", "policy.concurrency is 0"),
        ("[policy]\nover_selection = 0.3", "policy.over_selection is for synchronous rounds"),
        ("[policy]\nmode = 'synchronous'\nover_selection = -1", "policy.over_selection is -1"),
        (
            "[policy]\nmode = 'synchronous'\nover_selection = 0.3\nconcurrency = 5",
            "policy.concurrency is 5, but a round gives work to 6 devices",
        ),
        ("[policy]\nmode = 'hurried'", "policy.mode: 'hurried' is not one of 'buffered', 'synchronous'"),
        ("[policy]\nbufer_size = 4", "unknown key 'policy.bufer_size'"),
        ("[policies]\nbuffer_size = 4", "unknown key 'policies'"),
        ("policy = 4", "key policy: expected a table, got int"),
        ("[federation]\nladder = [2, 17]\nrank_cap = 32", "larger than any module"),
        ("[federation]\nladder = [4, 2]", "federation.ladder must be rising"),
        ("[federation]\nladder = []", "federation.ladder must be rising"),
        ("[federation]\nladder = [0, 2]", "federation.ladder must be rising ranks from 1"),
        ("[federation]\nladder = ['2']", "federation.ladder[0]: expected int, got str"),
        ("[federation]\nrank_cap = 4", "federation.rank_cap 4 is below the ladder's 16"),
        ("[federation]\nscaling = 0.0", "federation.scaling: must be above 0 and at most 1000000, got 0.0"),
        (
            "[federation]\nrule = 'average'",
            "federation.rule 'average' is not known; there are carry, fedit, flexlora, flora,",
        ),
        ("[federation]\nrule = 'fedit'", "give federation.ladder one rank"),
        (
            "[federation]\nrule = 'flora'\nladder = [2]\nrank_cap = 2",
            "rule flora never truncates; set federation.rank_cap to",
        ),
        ("[training]\nsparse_versions = 2", "0 under any rule but flexlora, not carry"),
        ("[training]\nsteps = 0", "training.steps: must be 1 to 2147483647, got 0"),
        ("[training]\nlearning_rate = '2e-3'", "training.learning_rate: expected float, got str"),
        ("[policy", "not a TOML file"),
    ],
)
def test_a_bad_setting_is_named(
    refused: Callable[[str], str], tmp_path: Path, setting: str, reason: str
) -> None:
    base = configuration(tmp_path).splitlines()[0]
    said = refused(f"{base}\n{setting}\n")
    assert reason in said
    assert "c.toml" in said


MODEL = f'"model": "m", "fingerprint": "{"f" * 64}"'


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "not a base record"),
        ("{}", "Base.model is missing"),
        ('{"model": "m", "fingerprint": "f", "modules": {}}', "Base.fingerprint: must be text of the form"),
        (f'{{{MODEL}, "modules": {{"q": [4]}}}}', "Base.modules.q: expected 2 items"),
        (f'{{{MODEL}, "modules": {{}}}}', "names no modules"),
        (f'{{{MODEL}, "modules": {{"q": [0, 4]}}}}', "Base.modules.q[0]: must be 1 to 16777216, got 0"),
        (f'{{{MODEL}, "modules": {{"q": [1, 4]}}}}', "larger than any module"),
    ],
)
def test_a_bad_base_record_is_named(
    refused: Callable[[str], str], tmp_path: Path, record: str, reason: str
) -> None:
    (tmp_path / "other.json").write_text(record)
    said = refused("base = 'other.json'")
    assert reason in said


def test_a_base_record_that_is_not_there_is_named(refused: Callable[[str], str]) -> None:
    assert "nowhere.json: No such file or directory; make it with" in refused("base = 'nowhere.json'")


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    done = command(
        "coordinator.cli", "serve", "--data", tmp_path / "data", "--config", tmp_path / "none.toml"
    )
    assert done.returncode == 2
    assert done.stderr == f"edge-coordinator: {tmp_path}/none.toml: No such file or directory\n"


def serve(coordinator: CoordinatorProcess, *more: object) -> str:
    """Serve on a folder where that must fail; the line that says why."""
    done = command(
        "coordinator.cli", "serve", "--data", coordinator.data, "--config", coordinator.config, *more
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith("edge-coordinator: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_federation_of_a_folder_is_fixed_and_its_policy_is_not(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path)) as coordinator:
        with member(coordinator) as device:
            federation = device.transport.federation()
        assert "cannot listen on 127.0.0.1" in serve(
            coordinator, "--data", tmp_path / "other", "--port", coordinator.port
        )
        assert coordinator.stop() == 0
        text = coordinator.config.read_text()
        for key, old, new in (
            ("ladder", "ladder = [2, 4, 8]", "ladder = [2, 4]"),
            ("scaling", "scaling = 2.0", "scaling = 1.0"),
            ("training", "[policy]", "[training]\nsteps = 3\n[policy]"),
        ):
            coordinator.config.write_text(text.replace(old, new))
            assert f"holds a federation with another {key};" in serve(coordinator)
        coordinator.config.write_text(text.replace("buffer_size = 2", "buffer_size = 3"))
        coordinator.start()
        with member(coordinator) as device:
            assert device.transport.federation() == federation
            assert device.status().buffer_size == 3


def test_a_data_folder_that_cannot_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "c.toml"
    base.write_text(configuration(tmp_path))
    (tmp_path / "file").write_text("not a folder")
    assert main(["serve", "--data", str(tmp_path / "file"), "--config", str(base)]) == 2
    assert f"{tmp_path}/file: no usable data folder" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coordinator.sqlite").write_bytes(b"nonsense " * 1000)
    assert main(["serve", "--data", str(tmp_path / "data"), "--config", str(base)]) == 2
    assert "not a usable coordinator database" in capsys.readouterr().err


def test_status_and_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["status"], ["export", "--out", str(tmp_path / "out")]):
        assert main([*arguments, "--data", str(tmp_path)]) == 2
        assert "no coordinator data here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_status_and_export_of_a_federation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1})) as coordinator:
        data, out = str(coordinator.data), str(tmp_path / "out")
        assert main(["export", "--data", data, "--out", out]) == 2
        assert "no version has been published yet" in capsys.readouterr().err
        with member(coordinator, "attic") as device:
            device.hand_in(device.work())
        assert coordinator.stop() == 0  # a running merge is finished first

    assert main(["status", "--data", data]) == 0
    said = capsys.readouterr().out
    assert "version     1\n" in said
    assert "attic" in said
    number, rank, updates, dropped = said.splitlines()[-1].split()
    assert (number, rank, updates) == ("1", "4", "1")
    assert dropped == "0.00%"
    assert "(rank cap 12)" in said
    for wrong in (["--version", "2"], ["--rank", "13"], ["--version", "0"], ["--rank", "-1"]):
        assert main(["export", "--data", data, "--out", out, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
    assert main(["export", "--data", data, "--out", out]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 0
    database = sqlite3.connect(coordinator.data / "coordinator.sqlite")
    assert database.execute("SELECT COUNT(*) FROM versions").fetchall() == [(1,)]
    database.close()
