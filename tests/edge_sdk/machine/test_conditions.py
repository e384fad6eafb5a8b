"""When a device may train: hand-computed decisions, and what is measured for them."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.commands.device_config import DeviceConfig, load_device_config
from edge_sdk.conditions import Conditions, Surroundings, unmeasured, why_not, within
from edge_sdk.core.errors import InputError
from edge_sdk.machine import surroundings
from edge_sdk.machine.surroundings import CPU_AVERAGE_S, Observer, Watch, averaged, metered_in, others_percent
from edge_sdk.system import priority

TIMES = st.times().map(lambda time: time.replace(second=0, microsecond=0))
NIGHT = datetime.time(23, 30)
NOON = datetime.time(12, 0)


# --- the decision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "now", "reason"),
    [
        (Conditions(), Surroundings(False, 1, 100, NOON, True), None),
        (Conditions(on_mains=True), Surroundings(on_mains=True), None),
        (Conditions(on_mains=True), Surroundings(on_mains=False), "on battery power"),
        (Conditions(on_mains=True), Surroundings(on_mains=None), None),
        (Conditions(battery_above=40), Surroundings(battery_percent=41), None),
        (
            Conditions(battery_above=40),
            Surroundings(True, 40),
            "battery at 40 %, waiting for more than 43 %",
        ),
        (Conditions(battery_above=40), Surroundings(), None),
        (Conditions(cpu_below=50), Surroundings(others_cpu_percent=49.9), None),
        (
            Conditions(cpu_below=50),
            Surroundings(others_cpu_percent=50),
            "other programs use 50 % of the processors, waiting for less than 40 %",
        ),
        (Conditions(hours="22:00-07:00"), Surroundings(time=NIGHT), None),
        (Conditions(hours="22:00-07:00"), Surroundings(time=NOON), "outside the hours 22:00-07:00"),
        (Conditions(unmetered=True), Surroundings(metered=True), "the network link is metered"),
        (Conditions(unmetered=True), Surroundings(metered=None), None),
        (
            Conditions(on_mains=True, hours="22:00-07:00"),
            Surroundings(on_mains=False, time=NOON),
            "on battery power; outside the hours 22:00-07:00",
        ),
    ],
)
def test_the_reason_to_wait(conditions: Conditions, now: Surroundings, reason: str | None) -> None:
    assert why_not(conditions, now) == reason


def test_what_paused_it_must_improve_a_little_before_training_goes_on() -> None:
    """A limit of 50 % is left below 40 %, a battery limit of 40 % above 43 %."""
    busy = Conditions(cpu_below=50)
    assert why_not(busy, Surroundings(others_cpu_percent=45)) is None
    assert why_not(busy, Surroundings(others_cpu_percent=45), paused=True) is not None
    assert why_not(busy, Surroundings(others_cpu_percent=39), paused=True) is None
    flat = Conditions(battery_above=40)
    assert why_not(flat, Surroundings(battery_percent=43), paused=True) is not None
    assert why_not(flat, Surroundings(battery_percent=44), paused=True) is None
    assert why_not(Conditions(battery_above=99), Surroundings(battery_percent=100), paused=True) is None


@given(begin=TIMES, end=TIMES, now=TIMES)
def test_an_interval_and_the_rest_of_the_day_are_disjoint(
    begin: datetime.time, end: datetime.time, now: datetime.time
) -> None:
    if begin == end:
        return
    there, back = f"{begin:%H:%M}-{end:%H:%M}", f"{end:%H:%M}-{begin:%H:%M}"
    assert within(there, now) != within(back, now)
    assert within(there, begin)
    assert not within(there, end)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"battery_above": 100}, "battery_above 100 must be"),
        ({"battery_above": -1}, "battery_above -1 must be"),
        ({"cpu_below": 0}, "cpu_below 0 must be"),
        ({"cpu_below": 101}, "cpu_below 101 must be"),
        ({"hours": "22-7"}, "hours '22-7' is no interval; write it like 22:00-07:00"),
        ({"hours": "24:00-07:00"}, "is no interval"),
        ({"hours": "07:00-07:00"}, "begins when it ends"),
    ],
)
def test_conditions_that_cannot_be(wrong: dict[str, int | str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Conditions(**wrong)  # type: ignore[arg-type]


def test_what_a_machine_does_not_tell_is_named() -> None:
    every = Conditions(True, 40, 50, "22:00-07:00", True)
    assert unmeasured(every, Surroundings(True, 50.0, None, NOON, False)) == ()
    assert unmeasured(Conditions(), Surroundings()) == ()
    assert [text.split()[0] for text in unmeasured(every, Surroundings())] == ["whether", "how", "whether"]


# --- measuring --------------------------------------------------------------------------------------


def test_the_load_of_others_is_without_our_own() -> None:
    # Two processors for 10 s: 12 s of 20 busy, 8 of them ours. Others used 4 of 20.
    assert others_percent((100.0, 1000.0, 50.0), (112.0, 1020.0, 58.0)) == pytest.approx(20)
    assert others_percent((0.0, 0.0, 0.0), (1.0, 10.0, 1.3)) == 0  # clocks of different grain
    assert others_percent((1.0, 10.0, 1.0), (1.0, 10.0, 1.0)) == 0


def test_the_average_load_follows_slowly() -> None:
    assert averaged(None, 80, 1) == 80
    half = averaged(0, 100, CPU_AVERAGE_S * 0.6931471805599453)  # ln 2: half of the way
    assert half == pytest.approx(50)
    assert averaged(averaged(10, 90, 2), 90, 3) == pytest.approx(averaged(10, 90, 5))


def test_our_own_work_is_no_load() -> None:
    """A thread of this process that computes all the time; whatever others do is on both sides."""
    observer, conditions = Observer(), Conditions(cpu_below=50)
    before = observer.times
    done = threading.Event()

    def burn() -> None:
        while not done.is_set():
            sum(range(10_000))

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        done.wait(1.0)
        found = observer.look(conditions).others_cpu_percent
    finally:
        done.set()
        thread.join()
    after = observer.times
    assert found is not None
    own_s, busy_s, total_s = (after[i] - before[i] for i in (3, 1, 2))
    assert own_s > 0.2  # it was ours
    assert found == pytest.approx(100 * max(0.0, busy_s - own_s) / total_s)


def test_nothing_is_measured_that_nobody_asked_for() -> None:
    assert Observer().look(Conditions()) == Surroundings()
    told = Observer().look(Conditions(hours="00:00-23:59"))
    assert told.time is not None
    assert told == Surroundings(time=told.time)


@pytest.mark.parametrize(
    ("text", "metered"),
    [
        ("GENERAL.METERED:no (guessed)\n\nGENERAL.METERED:unknown\n", False),
        ("GENERAL.METERED:unknown\n\nGENERAL.METERED:yes\n", True),
        ("GENERAL.METERED:yes (guessed)\n", True),
        ("GENERAL.METERED:unknown\n", None),
        ("", None),
    ],
)
def test_what_network_manager_says(text: str, metered: bool | None) -> None:
    assert metered_in(text) is metered


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for nmcli")
def test_network_manager_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nmcli"
    program.write_text('#!/bin/sh\n[ "$4" = device ] && echo GENERAL.METERED:yes\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert surroundings.metered() is None  # not executable: not there
    program.chmod(0o755)
    assert surroundings.metered() is True
    program.write_text("#!/bin/sh\nexit 8\n")  # NetworkManager does not run
    assert surroundings.metered() is None


def test_a_watch_looks_now_and_then_and_hears_at_once() -> None:
    looks: list[Conditions] = []

    def look(conditions: Conditions) -> Surroundings:
        looks.append(conditions)
        return Surroundings(on_mains=False)

    watch = Watch(Conditions(on_mains=True), look, clock=lambda: 100.0)
    assert [watch.reason() for _ in range(100)] == ["on battery power"] * 100
    assert len(looks) == 1
    watch.pause()
    watch.pause()
    assert watch.reason() == "asked to"
    watch.resume()
    assert watch.reason() == "on battery power"
    idle = Watch(Conditions(), look)
    assert idle.reason() is None
    assert len(looks) == 1


# --- priority ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to threads on Linux alone")
def test_niceness_is_of_the_thread_and_of_what_it_starts() -> None:
    """In a process of its own: torch's workers are as nice as the thread that computes, no other is."""
    program = """
import os, threading, torch
from pathlib import Path
from edge_sdk.system import priority
torch.set_num_threads(3)
def niceness():
    tasks = [int(p.name) for p in Path("/proc/self/task").iterdir()]
    return {task: os.getpriority(os.PRIO_PROCESS, task) for task in tasks}
before = set(niceness())
usual = os.getpriority(os.PRIO_PROCESS, 0)
found = {}
def compute():
    assert priority.lower_thread(usual + 7)
    priority.lower_thread(usual + 3)  # never back up
    a = torch.ones(512, 512)
    (a @ a).sum() + torch.exp(torch.ones(1 << 20)).sum()
    found.update(niceness())
thread = threading.Thread(target=compute)
thread.start(); thread.join()
new = [nice for task, nice in found.items() if task not in before]
assert len(new) >= 3 and set(new) == {usual + 7}, found
assert {nice for task, nice in found.items() if task in before} == {usual}, found
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"OMP_NUM_THREADS": "3", "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_niceness_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "lower_thread", lambda _: pytest.fail("it was asked for nothing"))
    priority.lower_process(0)


# --- the file ---------------------------------------------------------------------------------------

CONFIG = """
url = "http://127.0.0.1:1"
data = "notes.jsonl"
threads = 2
quantise = false
[conditions]
on_mains = true
hours = "22:00-07:00"
"""


def test_a_file_and_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text(CONFIG)
    file = load_device_config(path)
    assert file.data == str(tmp_path / "notes.jsonl")
    both = DeviceConfig(threads=1, nice=0, conditions=Conditions(cpu_below=30, hours="01:00-02:00")).over(
        file
    )
    assert (both.threads, both.nice, both.url, both.quantise) == (1, 0, "http://127.0.0.1:1", False)
    assert both.conditions == Conditions(on_mains=True, cpu_below=30, hours="01:00-02:00")
    options = both.options()
    assert (options.threads, options.nice, options.duty, options.quantise) == (1, 0, 1.0, False)
    assert options.conditions == both.conditions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("thread = 2\n", "unknown key 'thread'; the keys are url, data,"),
        ("[conditions]\nmains = true\n", "unknown key 'conditions.mains'"),
        ("[conditions]\non_mains = 1\n", "key conditions.on_mains: expected bool, got int"),
        ("conditions = 3\n", "key conditions: expected a table, got int"),
        ("threads = '2'\n", "key threads: expected int, got str"),
        ("[conditions]\ncpu_below = 0\n", "cpu_below 0 must be"),
        ("threads\n", "not a TOML file"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_key(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "device.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_device_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device.toml: No such file"):
        load_device_config(tmp_path / "device.toml")
