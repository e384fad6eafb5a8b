"""`edge-sdk profile --model`: the answer on this machine, the report by example, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_sdk.cli import main
from edge_sdk.commands.device_config import load_device_config
from edge_sdk.commands.profile import parse_ladder
from edge_sdk.core.choice.memory import Estimate
from edge_sdk.core.choice.rank import Candidate, Limits
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import DeviceProfile, load_profile
from edge_sdk.diagnosis import model_fit_report
from edge_sdk.diagnosis.model_fit import FitQuestion, ModelFit, class_placement
from edge_sdk.options import Options
from edge_sdk.trials import library_memory
from tests.edge_sdk.trials.test_step_times import SMALL

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `edge-sdk profile` with a cache of its own: (exit code, output, errors)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["profile", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


# --- answers --------------------------------------------------------------------------------------


def test_tiny_on_this_machine(said: Callable[..., tuple[int, str, str]], cache: Path) -> None:
    """Measured step times and libraries, every candidate, and terms that make up the peak."""
    code, out, _ = said(
        *("--model", "tiny", "--json", "--ladder", "4,2", "--batch", "2", "--sequence-len", "64"),
        *("--memory-budget", "2GB", "--device", "cpu"),
    )
    found = json.loads(out)
    assert code == 0
    assert found["parameters"] == 5_770_496
    assert found["budget_bytes"] == 2_000_000_000
    assert [c["rank"] for c in found["candidates"]] == [4, 2]
    best = found["candidates"][0]
    assert found["chosen"] == best
    assert set(best) == {
        *("ranks", "carry_rank", "sequence_len", "micro_batch", "checkpointing", "optimizer"),
        *("carried_dtype", "peak_bytes", "step_s", "assignment_s", "upload_bytes", "why_not"),
        *("rank", "fits", "chosen"),
    }
    assert best["step_s"] > 0
    assert best["assignment_s"] == pytest.approx(20 * best["step_s"])
    at_peak = sum(size for name, size in found["terms"].items() if name not in found["not_at_the_peak"])
    assert at_peak == best["peak_bytes"]
    assert found["terms"]["framework"] > 100_000_000
    remembered = json.loads((cache / "edge-sdk" / library_memory.REMEMBERED).read_text())
    assert list(remembered.values()) == [found["terms"]["framework"]]


def test_a_bare_configuration_on_a_class_of_devices(
    said: Callable[..., tuple[int, str, str]], large: Path
) -> None:
    """8 billion parameters fit a 12 GB card if all of it is given, without a weight on the disk."""
    asked = ("--model", large, "--profile", "rtx-3060-12gb")
    code, out, _ = said(*asked, "--memory-budget", "11GB")
    assert code == 0
    assert "large.json: 8.0B parameters, 32 blocks" in " ".join(out.split())
    assert "computes on cuda, bfloat16, 4-bit weights (NF4)" in out
    assert re.search(r"^→ +32 +1\d GB +– +– +336 MB +fits$", out, re.MULTILINE)
    assert "Step times: not measured (this is a class of devices, not this machine)." in out


def test_where_nothing_fits(said: Callable[..., tuple[int, str, str]], large: Path) -> None:
    code, out, _ = said("--model", large, "--profile", "raspberry-pi-5-8gb", "--deadline", "600")
    assert code == 1
    assert "→" not in out
    assert len(re.findall(r"GB too much$", out, re.MULTILINE)) == 5
    folded = " ".join(out.split())
    assert "Nothing fits in 2.1 GB; the least needs" in folded
    assert "and the device has 8.6 GB; a smaller model is needed." in folded
    assert "so that the deadline was not checked" in folded


def test_under_carry_the_table_says_what_is_carried(said: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = said(
        *("--model", "tiny", "--quick", "--rule", "carry", "--rank-cap", "12", "--profile", "rtx-4090-24gb"),
        *("--rank", "attention=4,mlp=30"),
    )
    assert code == 0
    assert len(re.findall(r"fits$", out, re.MULTILINE)) == 4
    assert re.search(r"^→ +4/30 +12 in int8 ", out, re.MULTILINE)
    assert re.search(r"^ +4/30 +6 in nf4 ", out, re.MULTILINE)


def test_a_class_computes_by_the_rule_of_the_devices() -> None:
    found = {
        name: class_placement(load_profile(name), True) for name in ("rtx-3060-12gb", "raspberry-pi-5-8gb")
    }
    assert found["rtx-3060-12gb"].compute_bytes == 2
    assert found["rtx-3060-12gb"].heap_spread == 0
    assert found["raspberry-pi-5-8gb"].compute_bytes == 4
    whole = class_placement(load_profile("rtx-3060-12gb"), False)
    assert whole.weight_bytes == 2


# --- the report by example ------------------------------------------------------------------------

MACHINE = DeviceProfile(
    "box", "Linux", "x86_64", "Some CPU", 4, 2, 16 * 10**9, memory_available_bytes=9 * 10**9
)


def example() -> ModelFit:
    low, high = (Setting(Ranks.uniform(rank), 0, 64, 2, checkpointing=True) for rank in (2, 8))
    wide = Candidate(high, 700_000_000, 9.0, 180.0, 4_000_000, "needs 700 MB, 200 MB over the budget")
    slim = Candidate(low, 460_000_000, 0.5, 10.0, 1_000_000, "")
    return ModelFit(
        model="a/model",
        facts=SMALL,
        machine=MACHINE,
        measured=True,
        place="cpu, float32",
        quantised=True,
        notice="",
        question=FitQuestion("a/model", Options(memory_budget_bytes=500_000_000), (2, 8), deadline_s=90.0),
        limits=Limits(500_000_000, 90.0),
        times=None,
        candidates=(wide, slim),
        chosen=slim,
        terms=Estimate(300_000_000, 60_000_000, 0, 0, 0, 0, 40_000_000, 60_000_000, 50_000_000, 1, 0),
        reason="rank 2 needs 460 MB; rank 8 needs 700 MB, 200 MB over the budget",
    )


TEXT = """\
machine   box: Some CPU, 4 logical cores, 16 GB RAM (9.0 GB free)
          computes on cpu, float32, 4-bit weights (NF4), 1 thread
model     a/model: 0.0M parameters, 1 blocks
work      20 steps of 8 examples of 256 tokens, rule flexlora
budget    500 MB, as you said
deadline  90 s for an assignment

each step 8 examples, 2 at a time, 64 tokens each, activations computed twice
   rank    peak    step  20 steps  upload
      8  700 MB   9.0 s     3 min  4.0 MB  200 MB too much
→     2  460 MB  0.50 s      10 s  1.0 MB  fits

rank 2 at its peak, 460 MB
  libraries            300 MB   PyTorch and its like, measured
  weights of blocks     60 MB   4 bits, with their constants
  activations           40 MB   kept for the backward pass
  logits                60 MB
  backward             (50 MB)  at another moment
  gradients              (1 B)  at another moment

Rank 2 needs 460 MB; rank 8 needs 700 MB, 200 MB over the budget.
Step times: not measured (--quick was given), so that the deadline was not
checked.
"""


def test_the_report() -> None:
    assert model_fit_report.as_text(example(), 80) == TEXT


def test_no_line_is_longer_than_the_terminal() -> None:
    long = replace(example(), reason="rank 2 " + "and so on " * 40, notice="because " * 30)
    for width in (80, 100):
        assert max(map(len, model_fit_report.as_text(long, width).splitlines())) <= width


# --- what is refused ------------------------------------------------------------------------------


def test_fields_of_a_configuration_are_named(said: Callable[..., tuple[int, str, str]], large: Path) -> None:
    fields = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads")
    for field in fields:
        large.write_text(json.dumps({key: value for key, value in LLAMA_8B.items() if key != field}))
        code, _, err = said("--model", large)
        assert (code, err) == (2, f"edge-sdk: {large}: {field} is missing; the memory estimate needs it\n")
        large.write_text(json.dumps(LLAMA_8B | {field: -1}))
        assert said("--model", large)[2] == f"edge-sdk: {large}: {field} must be a positive integer, got -1\n"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[", "not readable as JSON"),
        ("[]", "not a JSON object"),
        (json.dumps(LLAMA_8B | {"model_type": "zork"}), "model type `zork`"),
        (json.dumps(LLAMA_8B | {"num_experts": 8}), "num_experts is set; mixture-of-experts"),
        (json.dumps(LLAMA_8B | {"num_attention_heads": 33, "head_dim": None}), "multiple of the number of"),
    ],
)
def test_configurations_that_cannot_be(
    said: Callable[..., tuple[int, str, str]], large: Path, config: str, reason: str
) -> None:
    large.write_text(config)
    code, _, err = said("--model", large)
    assert code == 2
    assert str(large) in err
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--model nothing.json", "nothing.json: no such file"),
        ("--model ./nowhere", "./nowhere: no such model directory"),
        ("--model no/such-model", "no/such-model: not on this machine; download its config.json"),
        (
            "--model tiny --profile toaster",
            "no profile is called 'toaster'; give a .toml file or one of: jetson",
        ),
        (
            "--model tiny --profile steam-deck --memory-budget 900GB",
            "memory budget 900 GB is more than steam-deck",
        ),
        ("--model tiny --memory-budget much", "'much' is not a size"),
        ("--model tiny --ladder 2,x", "ladder '2,x': write ranks like 2,4,8,16"),
        ("--model tiny --ladder=", "ladder '': write ranks"),
        ("--model tiny --ladder 2,4000", "rank 4000 on the ladder is larger than any module"),
        ("--model tiny --rank attention=3", "rank 'attention=3': write a number, or attention=30,mlp=200"),
        ("--model tiny --rank 0", "ranks 0 are impossible"),
        ("--model tiny --rank 2 --ladder 2,4", "not both"),
        ("--model tiny --steps 0", "--steps 0 must be 1 or more"),
        ("--model tiny --sequence-len=-5", "--sequence-len -5 must be 1 or more"),
        ("--model tiny --deadline nan", "--deadline nan must be 1 or more"),
        ("--model tiny --device quantum", "device 'quantum' is not available here"),
        ("--model tiny --profile steam-deck --device cuda", "only auto and cpu can be asked about"),
        ("--rank 3", "--rank needs --model"),
        ("--memory-budget 3GB", "--memory-budget needs --model"),
    ],
)
def test_flags_that_cannot_be(said: Callable[..., tuple[int, str, str]], arguments: str, reason: str) -> None:
    code, out, err = said(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("edge-sdk: ")
    assert reason in err
    assert err.count("\n") == 1


def test_a_ladder_in_any_order() -> None:
    assert parse_ladder("8, 2,4") == (8, 2, 4)


def test_the_rank_in_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text('rank = "attention=30,mlp=200"\n')
    assert load_device_config(path).options().ranks == Ranks(30, 200)
    path.write_text('rank = "many"\n')
    with pytest.raises(InputError, match="rank 'many': write a number"):
        load_device_config(path).options()


def test_a_measurement_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child that cannot import its libraries."""
    broken = tmp_path / "torch.py"
    broken.write_text("raise RuntimeError('no torch today')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Exception, match="cannot be measured: RuntimeError: no torch today"):
        library_memory.framework_bytes("cpu", quantise=True)


def test_a_rule_from_elsewhere_must_say_whether_devices_carry(capsys: pytest.CaptureFixture[str]) -> None:
    about = ["profile", "--model", "tiny", "--quick", "--json", "--profile", "rtx-4090-24gb"]
    assert main([*about, "--rule", "own_rule:EvenHanded"]) == 2
    said = capsys.readouterr().err
    assert "--rule own_rule:EvenHanded is none of flexlora, innovation, carry," in said
    assert len(said.splitlines()) == 1
    for own in ([], ["--rule", "carry"]):
        assert main([*about, *own, "--no-carries"]) == 2
        assert "--carries is for a --rule from elsewhere" in capsys.readouterr().err
    peaks = {}
    for flag, like in (("--carries", "carry"), ("--no-carries", "flexlora")):
        for rule in (["own_rule:EvenHanded", flag], [like]):
            assert main([*about, "--rule", *rule]) == 0
            peaks[rule[0], like] = json.loads(capsys.readouterr().out)["candidates"]
        assert peaks["own_rule:EvenHanded", like] == peaks[like, like]
    assert peaks["carry", "carry"] != peaks["flexlora", "flexlora"]
