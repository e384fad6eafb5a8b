"""Device profiles: TOML both ways, what is refused, and the packaged classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import (
    Accelerator,
    DeviceProfile,
    from_toml,
    known_profiles,
    load_profile,
    to_toml,
)

PROFILES = Path(__file__).parents[3] / "profiles"
PI = DeviceProfile("pi", "Linux", "aarch64", "BCM2712", 4, 4, 8_000)

# Everything that UTF-8 can carry: control characters, quotes, line ends and emoji included.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ['"', "\\", "\x7f", "\x00", "\r\n", '"""', "a # b", "= 1", "𝔘 🍓", "\u2028", "[accelerator]"]
)
counts = st.integers(1, 2**62)
sizes = st.none() | st.integers(0, 2**62)
accelerators = st.builds(
    Accelerator,
    kind=st.sampled_from(["cuda", "mps", "xpu"]),
    name=texts,
    memory_total_bytes=counts,
    memory_free_bytes=sizes,
    shared=st.booleans(),
    compute_capability=st.none() | texts,
    bf16=st.none() | st.booleans(),
)
profiles = st.builds(
    DeviceProfile,
    name=texts,
    system=texts,
    machine=texts,
    cpu=texts,
    cores=counts,
    threads=counts,
    memory_total_bytes=counts,
    cpu_features=st.none() | st.lists(texts, max_size=3).map(tuple),
    memory_available_bytes=sizes,
    swap_total_bytes=sizes,
    swap_free_bytes=sizes,
    disk_free_bytes=sizes,
    on_battery=st.none() | st.booleans(),
    battery_percent=st.none() | st.floats(0, 100),
    gemm_dtype=st.none() | st.sampled_from(["float32", "bfloat16"]),
    gflops=st.none() | st.floats(1e-300, 1e300),
    accelerators=st.lists(accelerators, max_size=3).map(tuple),
)


def test_the_laws_below_draw_every_field() -> None:
    for strategy, record in ((profiles, DeviceProfile), (accelerators, Accelerator)):
        drawn = set(strategy.wrapped_strategy.kwargs)
        assert drawn == {field.name for field in dataclasses.fields(record)}


@given(profiles)
def test_a_profile_survives_toml(profile: DeviceProfile) -> None:
    assert from_toml(to_toml(profile), "p.toml") == profile


def test_the_toml_is_what_a_person_would_write() -> None:
    gpu = Accelerator("cuda", 'the "good" one', 100, shared=True, compute_capability="8.6", bf16=True)
    profile = dataclasses.replace(
        PI, accelerators=(gpu, Accelerator("xpu", "", 7)), cpu_features=("asimd", "bf16"), gflops=1.5
    )
    assert to_toml(profile) == (
        'name = "pi"\nsystem = "Linux"\nmachine = "aarch64"\ncpu = "BCM2712"\ncores = 4\nthreads = 4\n'
        'memory_total_bytes = 8000\ncpu_features = ["asimd", "bf16"]\ngflops = 1.5\n\n'
        '[[accelerators]]\nkind = "cuda"\nname = "the \\"good\\" one"\nmemory_total_bytes = 100\n'
        'shared = true\ncompute_capability = "8.6"\nbf16 = true\n\n'
        '[[accelerators]]\nkind = "xpu"\nname = ""\nmemory_total_bytes = 7\nshared = false\n'
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 4", "cores = 'four'", "cores: expected int, got str"),
        ("cores = 4", "cores = true", "cores: expected int, got bool"),
        ("cores = 4", "cores = 0", "cores must be positive, got 0"),
        ("cores = 4", "", "cores is missing"),
        ("cores = 4", "cores = 4\ngflops = nan", "gflops: expected float, got a number that is not finite"),
        ("cores = 4", "cores = 4\ngflops = -1.0", "gflops must be positive, got -1.0"),
        ("cores = 4", "cores = 4\nmemory_available_bytes = -1", "memory_available_bytes is negative"),
        ("cores = 4", "cores = 4\ncoers = 4", "unknown key 'coers'; the keys are name, system"),
        ("cores = 4", "cores 4", "not a TOML file"),
        ("cores = 4", "cores = 4\nswap_free_bytes = -1", "swap_free_bytes is negative"),
        ("cores = 4", "cores = 4\nbattery_percent = 101", "battery_percent must be from 0 to 100, got 101.0"),
        ("cores = 4", "cores = 4\ngemm_dtype = 'int8'", "'int8' is not one of 'float32', 'bfloat16'"),
        ("cores = 4", "cores = 4\ncpu_features = [1]", "cpu_features[0]: expected str, got int"),
        ("cores = 4", "cores = 4\naccelerators = 3", "accelerators: expected an array, got int"),
        ("cores = 4", "cores = 4\naccelerators = [3]", "accelerators[0]: expected a table, got int"),
        ("8000\n", "8000\n[accelerator]\nkind = 'cuda'\n", "unknown key 'accelerator'; the keys are name"),
        (
            "8000\n",
            "8000\n[[accelerators]]\nkind = 'tpu'\nname = ''\n",
            "accelerators[0].kind: 'tpu' is not one of 'cuda', 'mps', 'xpu'",
        ),
        (
            "8000\n",
            "8000\n[[accelerators]]\nkind = 'cuda'\nname = 'x'\nmemory_total_bytes = 0\n",
            "memory_total_bytes of accelerator 'x' must be positive, got 0",
        ),
        (
            "8000\n",
            "8000\n[[accelerators]]\nvram = 1\n",
            "unknown key 'accelerators[0].vram'; the keys are accelerators[0].k",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name_and_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(PI).replace(old, new))
    with pytest.raises(InputError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.toml: No such file"):
        load_profile(str(tmp_path / "gone.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(InputError, match=r"latin\.toml: not UTF-8 text: byte 11 is wrong"):
        load_profile(str(tmp_path / "latin.toml"))
    with pytest.raises(
        InputError, match=r"no profile is called 'toaster'.*raspberry-pi-5-8gb, rtx-3060-12gb"
    ):
        load_profile("toaster")


def test_memory_for_training() -> None:
    assert PI.trainable_memory_bytes() == 4_000  # half of the total where nothing was measured
    assert dataclasses.replace(PI, memory_available_bytes=6_000).trainable_memory_bytes() == 6_000
    card = Accelerator("cuda", "card", 12_000, 11_000)
    assert dataclasses.replace(PI, accelerators=(card,)).trainable_memory_bytes() == 11_000
    shared = Accelerator("cuda", "Orin", 8_000, 7_000, shared=True)
    assert (
        dataclasses.replace(
            PI, accelerators=(shared, card), memory_available_bytes=5_000
        ).trainable_memory_bytes()
        == 5_000
    )


@given(profiles)
def test_the_summary_is_text_and_keeps_private_things_to_itself(profile: DeviceProfile) -> None:
    summary = profile.summary()
    assert not {"name", "on_battery", "battery_percent"} & set(summary)
    assert all(isinstance(value, str) for value in summary.values())
    assert summary["cores"] == str(profile.cores)
    assert json.loads(json.dumps(summary)) == summary
    assert ("accelerator.kind" in summary) == (profile.accelerator is not None)


def test_packaged_classes() -> None:
    names = known_profiles()
    assert len(names) >= 10
    assert list(names) == sorted(path.stem for path in PROFILES.glob("*.toml"))
    for name in names:
        profile = load_profile(name)
        assert profile.name == name
        assert 1 <= profile.threads <= profile.cores
        for field in dataclasses.fields(profile)[7:-1]:
            assert getattr(profile, field.name) is None, f"{name}: {field.name} is no matter of a class"
        assert profile == load_profile(str(PROFILES / f"{name}.toml"))


def test_every_class_names_its_sources() -> None:
    for path in PROFILES.glob("*.toml"):
        comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert len(comments) >= 2, path.name
