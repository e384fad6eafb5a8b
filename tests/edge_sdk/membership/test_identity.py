"""Which base a device loads: what its owner says, or what is on the hub; no folder that a stranger names."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from edge_sdk.cli import main
from edge_sdk.core.errors import BaseMismatch, InputError
from edge_sdk.core.messages import Federation
from edge_sdk.membership.identity import fingerprint, model_of
from edge_sdk.model import base_model, files
from edge_sdk.options import Options


def federation_of(model: str) -> Federation:
    base = dataclasses.replace(base_model.describe("tiny"), model=model)
    return Federation("f-1", base, "carry", (2, 4), 8, 2.0, "balanced")


@pytest.mark.parametrize(
    "named",
    [
        "/home/somebody/model",
        "relative",
        "./relative/model",
        "../up",
        "org/../up",
        "org/..",
        "a/b/c",
        "~/model",
        r"\\host\share",
        r"C:\models\x",
        "C:/models",
        "//host/share",
        "file:///etc",
        "https://host/x",
        "org/name\n",
        "org/na me",
        "",
    ],
)
def test_a_federation_names_no_folder(named: str) -> None:
    with pytest.raises(InputError, match="--model") as caught:
        model_of(federation_of(named), Options())
    assert "\n" not in str(caught.value)
    assert model_of(federation_of(named), Options(model="/mine")) == "/mine"


def test_a_federation_names_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = "HuggingFaceTB/SmolLM2-135M"
    assert model_of(federation_of(named), Options()) == named
    (tmp_path / named).mkdir(parents=True)
    with pytest.raises(InputError, match="file or folder of that name here; say which you mean with --model"):
        model_of(federation_of(named), Options())
    assert model_of(federation_of(named), Options(model=named)) == named
    (tmp_path / "tiny").mkdir()
    assert model_of(federation_of("tiny"), Options()) == "tiny"
    assert files.resolve("tiny") != tmp_path / "tiny"


def test_shapes_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    true = federation_of("tiny")
    assert fingerprint(true, Options(), tmp_path / "d.json") == true.base.fingerprint
    modules = {name: (2**24, inner) for name, (_, inner) in true.base.modules.items()}
    lie = dataclasses.replace(true, base=dataclasses.replace(true.base, modules=modules))
    with pytest.raises(BaseMismatch, match="other shapes of modules than tiny has"):
        fingerprint(lie, Options(), tmp_path / "d.json")


CODE = """\
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({mark!r}).touch()
class Config(LlamaConfig):
    model_type = "custom_x"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A base with code of its own, which leaves a mark where it runs."""
    folder = tmp_path / "base"
    shutil.copytree(files.resolve("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "its_code.Config", "AutoModelForCausalLM": "its_code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "custom_x", "auto_map": code}))
    (folder / "its_code.py").write_text(CODE.format(mark=os.fspath(tmp_path / "ran")))
    return folder


def test_code_of_a_base_is_refused_in_one_line(
    with_code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, mend in (
        (["base", str(with_code)], "add --trust-remote-code"),
        (["profile", "--quick", "--model", str(with_code)], "`profile` runs none"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "brings code of its own (config.json has auto_map)" in said
        assert said.count("\n") == 1
        assert mend in said
    for attempt in (base_model.describe, base_model.load):
        with pytest.raises(InputError, match="if you trust it, add --trust-remote-code"):
            attempt(str(with_code))
    with pytest.raises(InputError, match="--trust-remote-code"):
        fingerprint(federation_of("tiny"), Options(model=str(with_code)), tmp_path / "d.json")
    assert not (tmp_path / "ran").exists()


def test_a_tokeniser_with_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(files.resolve("tiny"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tokenizer_config.json has auto_map"):
        base_model.load(str(folder))


def test_its_owner_may_trust_it(with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    found = base_model.describe(str(with_code), trust_remote_code=True)
    assert found.modules == base_model.describe("tiny").modules
    assert (tmp_path / "ran").exists()
