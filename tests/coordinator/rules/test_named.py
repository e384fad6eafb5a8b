"""Rules by name: those of this project, those of packages installed beside it, and what is no rule."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from coordinator.rules.carry import Carry
from coordinator.rules.flexlora import FlexLora
from coordinator.rules.named import GROUP, known_rules, rule_named
from coordinator.settings import load_settings
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import CARRYING, OWN_RULES
from tests.coordinator.adapters.test_door import norm, stored, wait_for
from tests.coordinator.devices import SCALING, configuration, member, random_adapter
from tests.processes import ROOT, CoordinatorProcess, command

PACKAGE = "household_rules"  # not in this tree


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder as `pip install` leaves it: a package with the example's rule, and what it offers."""
    folder = tmp_path / "site"
    package, info = folder / PACKAGE, folder / f"{PACKAGE}-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    shutil.copyfile(ROOT / "examples" / "own_rule.py", package / "even.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\neven_handed = {PACKAGE}.even:EvenHanded\n")
    return folder


@pytest.fixture
def importable(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same for this process."""
    monkeypatch.syspath_prepend(str(elsewhere))
    rule_named.cache_clear()
    yield elsewhere / PACKAGE
    rule_named.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


# --- the six, and what devices know of them -------------------------------------------------------


def test_the_built_in_rules_come_by_the_same_way_as_others() -> None:
    assert known_rules() == sorted(OWN_RULES)
    found = {point.name: point.load() for point in metadata.entry_points(group=GROUP)}
    assert {
        name: type(rule) for name, rule in {name: rule_named(name) for name in OWN_RULES}.items()
    } == found
    assert rule_named("coordinator.rules.carry:Carry").carries
    assert type(rule_named("flexlora")) is FlexLora


def test_devices_know_which_of_them_carry() -> None:
    assert {
        name for name, rule in {name: rule_named(name) for name in OWN_RULES}.items() if rule.carries
    } == CARRYING


# --- a rule from a package outside the tree -------------------------------------------------------


def test_an_installed_package_offers_its_rule(importable: Path) -> None:
    assert "even_handed" in known_rules()
    assert type(rule_named("even_handed")).__name__ == "EvenHanded"
    assert isinstance(rule_named("even_handed"), Carry)


@pytest.mark.parametrize("name", ["even_handed", f"{PACKAGE}.even:EvenHanded"])
def test_a_federation_under_a_rule_from_elsewhere(tmp_path: Path, elsewhere: Path, name: str) -> None:
    """Devices have none of its code; what is published is what the rule says, by hand."""
    config = configuration(tmp_path, {"buffer_size": 2, "staleness": "constant"}, name)
    coordinator = CoordinatorProcess(tmp_path, config)
    coordinator.environment["PYTHONPATH"] = f"{ROOT}:{elsewhere}"
    short, long = random_adapter(4, 1), random_adapter(4, 2, scale=0.3)
    with coordinator, member(coordinator, "a") as one, member(coordinator, "b") as two:
        federation = one.transport.federation()
        assert federation.rule == name
        assert federation.carries
        for device, adapter in ((one, short), (two, long)):
            device.hand_in(device.work(), codec.encode(adapter, SCALING))
        wait_for(one, 1)
        coordinator.kill()
        coordinator.start()  # and it is found again
        assert one.status().version == 1
        for module, factors in stored(coordinator.data, 1).items():
            lengths = [norm({module: adapter[module]}) for adapter in (short, long)]
            mean = sum(lengths) / 2
            parts = [
                (mean / (2 * length), {module: adapter[module]})
                for length, adapter in zip(lengths, (short, long), strict=True)
            ]
            expected = sum(weight * adapter[module].product() for weight, adapter in parts)
            u, s, vt = np.linalg.svd(expected, full_matrices=False)
            kept = min(12, *expected.shape)
            np.testing.assert_allclose(
                factors.product(), (u[:, :kept] * s[:kept]) @ vt[:kept], atol=2e-5 * float(s[0])
            )


def test_a_folder_whose_rule_is_gone_says_which(tmp_path: Path, elsewhere: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path, configuration(tmp_path, None, "even_handed"))
    coordinator.environment["PYTHONPATH"] = f"{ROOT}:{elsewhere}"
    with coordinator:
        coordinator.stop()
    done = command("coordinator.cli", "serve", "--data", coordinator.data, "--config", coordinator.config)
    assert done.returncode == 2
    assert "federation.rule 'even_handed' is not known; there are carry, fedit," in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_rule_of_the_same_name_that_trains_otherwise_is_refused(tmp_path: Path, elsewhere: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path, configuration(tmp_path, None, "even_handed"))
    coordinator.environment["PYTHONPATH"] = f"{ROOT}:{elsewhere}"
    with coordinator:
        coordinator.stop()
    rule = elsewhere / PACKAGE / "even.py"
    changed = rule.read_text().replace("    def addends", "    carries = False\n\n    def addends")
    rule.write_text(changed)
    done = command(
        *("coordinator.cli", "serve", "--data", coordinator.data, "--config", coordinator.config),
        environ=coordinator.environment,
    )
    assert done.returncode == 2
    assert "rule even_handed trains a part of the global adapter, but this federation began" in done.stderr


# --- what is no rule ------------------------------------------------------------------------------

WRONG = {
    "NotAClass = 3": "is a int; it must be a class",
    "class NotAClass: pass": "lacks change, merge, needs_start, next, objection, serve, shorter,",
    "from coordinator.rules.rule import Rule\nclass NotAClass(Rule): pass": "lacks merge, stored_rank",
    "from coordinator.rules.rule import SumRule\nclass NotAClass(SumRule):\n"
    "    def stacked_rank(self, ranks, eta): return 1": "lacks addends",
    "from coordinator.rules.carry import Carry\nclass NotAClass(Carry):\n"
    "    def merge(self, updates): return None": r"NotAClass.merge takes \(updates\), not \(merging, rank\)",
    "from coordinator.rules.carry import Carry\nclass NotAClass(Carry):\n"
    "    def __init__(self, share): pass": r"NotAClass\(\) fails: .*missing 1 required positional argument",
    "from coordinator.rules.carry import Carry\nclass NotAClass(Carry): merge = None": "lacks merge",
    "from coordinator.rules.carry import Carry\nclass NotAClass(Carry):\n"
    "    carries = 'no'": r"NotAClass\.carries must be True or False",
    "import no_such_library": "cannot be imported from household_rules.wrong:NotAClass: No module named",
    "": "cannot be imported from household_rules.wrong:NotAClass",
    "class NotAClass(": "cannot be imported from household_rules.wrong:NotAClass: .*was never closed",
    "1 / 0": "cannot be imported from household_rules.wrong:NotAClass: .*division by zero",
}


@pytest.mark.parametrize(("text", "said"), WRONG.items())
def test_what_is_no_rule_is_refused_with_what_it_lacks(importable: Path, text: str, said: str) -> None:
    (importable / "wrong.py").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        rule_named(f"{PACKAGE}.wrong:NotAClass")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [
        "def merge(self, merging, rank, more=1): return None",
        "def merge(self, *given, **named): return None",
        "@staticmethod\n    def merge(merging, rank): return None",
    ],
)
def test_a_method_may_take_more_than_it_must(importable: Path, method: str) -> None:
    text = f"from coordinator.rules.carry import Carry\nclass Own(Carry):\n    {method}\n"
    (importable / "wide.py").write_text(text)
    assert type(rule_named(f"{PACKAGE}.wide:Own")).__name__ == "Own"


def test_a_rule_may_stand_inside_another_class(importable: Path) -> None:
    text = "from coordinator.rules.carry import Carry\nclass Outer:\n    class Inner(Carry): pass\n"
    (importable / "nested.py").write_text(text)
    assert type(rule_named(f"{PACKAGE}.nested:Outer.Inner")).__name__ == "Inner"


def test_a_broken_rule_of_somebody_else_spoils_no_other_message(importable: Path, tmp_path: Path) -> None:
    info = importable.parent / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nbroken = no_such_module:Rule\n")
    (tmp_path / "c.toml").write_text("[training]\nsparse_versions = 2\n")
    with pytest.raises(InputError, match=r"c\.toml: training\.sparse_versions is 2.*but flexlora, not carry"):
        load_settings(tmp_path / "c.toml")


def test_an_unknown_rule_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match="'cary' is not known; there are carry, fedit.*did you mean 'carry'"):
        rule_named("cary")
    with pytest.raises(InputError, match="cannot be imported from no_such.module:Rule"):
        rule_named("no_such.module:Rule")


def test_a_checkout_that_was_never_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    rule_named.cache_clear()
    with pytest.raises(InputError, match="no installed package offers rules; install flexlora-edge by pip"):
        rule_named("carry")


def test_a_name_that_two_packages_offer_is_nobody_s(importable: Path) -> None:
    info = importable.parent / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ncarry = {PACKAGE}.even:EvenHanded\n")
    with pytest.raises(InputError, match="'carry' is offered twice, as coordinator.rules.carry:Carry and as"):
        rule_named("carry")
    assert type(rule_named("coordinator.rules.carry:Carry")) is Carry


def test_settings_name_the_file_and_the_key(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[federation]\nrule = 'averge'\n")
    with pytest.raises(InputError, match=r"c\.toml: federation\.rule 'averge' is not known"):
        load_settings(tmp_path / "c.toml")
