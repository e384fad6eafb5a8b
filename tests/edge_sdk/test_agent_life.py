"""The agent's life beside an application: real threads, a real coordinator process, real training."""

from __future__ import annotations

import contextlib
import io
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.agent import Agent, Stopping
from edge_sdk.callbacks import Callbacks
from edge_sdk.commands.chat import Chat
from edge_sdk.conditions import Conditions, Surroundings
from edge_sdk.connection import transport
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import InputError, Unreachable
from edge_sdk.core.messages import Base
from edge_sdk.machine.surroundings import Watch
from edge_sdk.model import base_model
from edge_sdk.options import Event, Options
from edge_sdk.training.plan import Start
from edge_sdk.training.trainer import Trainer
from edge_sdk.worker.messages import Finished
from edge_sdk.worker.worker import Worker
from tests.models import build_model
from tests.processes import PATIENCE_S, CoordinatorProcess, environment
from tests.test_federation import checkpointed_step, configuration, wait_for_version, write_data

STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_model.describe(str(build_model(tmp_path_factory.mktemp("base"), "llama")))


@pytest.fixture
def coordinator(tmp_path: Path, base: Base, request: pytest.FixtureRequest) -> Iterator[CoordinatorProcess]:
    """Carry, one update a version; `parametrize(…, indirect=True)` changes the policy."""
    policy = {"buffer_size": 1} | getattr(request, "param", {})
    training: dict[str, object] = {"steps": STEPS, "checkpoint_s": 3600.0}
    with CoordinatorProcess(tmp_path, configuration(tmp_path, base, "carry", training, policy)) as process:
        yield process


@pytest.fixture
def make(coordinator: CoordinatorProcess, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Agents of that federation, ended after the test whatever it did."""
    made: list[Agent] = []

    def build(name: str = "red", data: bool = True, **arguments: Any) -> Agent:
        options = {"isolate": False} | arguments.pop("options", {})
        agent = Agent(
            coordinator.url,
            data=write_data(tmp_path / f"{name}.jsonl", name) if data else None,
            join_token=coordinator.join_token,
            options=Options(
                name=name,
                state_dir=tmp_path / name,
                device="cpu",
                memory_budget_bytes=10**9,
                nice=0,
                **options,
            ),
            **arguments,
        )
        made.append(agent)
        return agent

    yield build
    for agent in made:
        agent.stop(PATIENCE_S)
        agent.close()


def trainer_of(agent: Agent) -> Trainer:
    """The trainer of an agent that trains in this process."""
    agent.prepare()
    worker = agent._part.model.worker()
    assert isinstance(worker, Worker)
    return worker._trainer


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def texts(events: list[Event], *kinds: str) -> list[str]:
    return [event.text for event in events if event.kind in kinds]


# --- pause and resume -------------------------------------------------------------------------------


def test_a_paused_assignment_goes_on_to_the_same_bits(make: Callable[..., Agent]) -> None:
    """Paused twice in one assignment, an answer in between: the update has the bits of an unbroken run."""
    events: list[Event] = []
    agent: Agent
    delivered: list[bytes] = []
    seen: list[Any] = []

    def on_progress(event: Event) -> None:
        if event.step in (3, 8):
            agent.pause()

    def on_pause(reason: str) -> None:
        seen.append((reason, agent._part.model.loaded, checkpointed_step(agent.journal.checkpoint)))

    agent = make(on_event=events.append, callbacks=Callbacks(on_progress=on_progress, on_pause=on_pause))
    trainer = weakref.ref(trainer_of(agent))
    hand_in = agent._part._work._hand_in

    def keep(done: Finished) -> None:
        delivered.append(agent.journal.outbox.read_bytes())
        hand_in(done)

    agent._part._work._hand_in = keep  # type: ignore[method-assign]
    agent.start()
    wait_until(lambda: len(seen) == 1)
    assert trainer() is None  # nothing holds the model any more
    work, job = agent._membership.session.current(), agent._part._work._job((None, None))
    agent.generate("turn the red light on", 4)
    agent.resume()
    wait_until(lambda: len(seen) == 2)
    agent.resume()
    wait_until(lambda: delivered)
    assert agent.stop(PATIENCE_S) == Stopping(True)
    assert seen == [("asked to", False, 3), ("asked to", False, 8)]
    assert texts(events, "paused", "resumed")[:4] == ["paused: asked to", "resumed"] * 2
    first = [event.step for event in events if event.kind == "step"][:STEPS]
    assert first == list(range(1, STEPS + 1))

    it, worker = trainer_of(agent), agent._part.model.worker()
    rows = worker._rows_of(job.plan.sequence_len)  # type: ignore[union-attr]
    unbroken = it.train(Start(None, None, work.rank, work.seed), rows, job.plan, on_step=lambda _: "continue")
    of = agent.federation
    assert codec.encode(unbroken.adapter, of.scaling, of.upload_dtype) == delivered[0]


def test_conditions_pause_and_resume(make: Callable[..., Agent]) -> None:
    """The owner pulls the plug at step 4 and puts it back."""
    mains, paused = threading.Event(), threading.Event()
    mains.set()
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.kind == "step" and event.step == 4 and not paused.is_set():
            mains.clear()
        elif event.kind == "paused":
            paused.set()

    agent = make(on_event=listen, options={"conditions": Conditions(on_mains=True)})
    agent._part.watch = Watch(
        Conditions(on_mains=True), lambda _: Surroundings(on_mains=mains.is_set()), every_s=0.0
    )
    agent.start()
    assert paused.wait(PATIENCE_S)
    assert checkpointed_step(agent.journal.checkpoint) == 4
    mains.set()
    wait_until(lambda: texts(events, "delivered"))
    agent.stop(PATIENCE_S)
    assert texts(events, "paused", "resumed") == ["paused: on battery power", "resumed"]
    steps = [event.step for event in events if event.kind == "step"]
    assert steps[:STEPS] == list(range(1, STEPS + 1))


def test_a_condition_that_nobody_can_tell_is_named_once(make: Callable[..., Agent]) -> None:
    events: list[Event] = []
    agent = make(on_event=events.append, options={"conditions": Conditions(on_mains=True)})
    agent._part.watch = Watch(Conditions(on_mains=True), lambda _: Surroundings())
    assert agent.run(updates=1) == 1
    told = "this machine does not tell whether it is on mains power; that condition holds nothing back"
    assert texts(events, "notice") == [told]


@pytest.mark.parametrize("coordinator", [{"max_staleness": 0, "lease_s": 50.0}], indirect=True)
def test_paused_work_that_can_count_no_more_is_dropped(make: Callable[..., Agent]) -> None:
    events: list[Event] = []
    agent: Agent
    agent = make(
        on_event=events.append,
        callbacks=Callbacks(on_progress=lambda event: agent.pause() if event.step == 2 else None),
    )
    agent.start()
    wait_until(lambda: texts(events, "paused"))
    other = make("blue")
    assert other.run(updates=1) == 1
    wait_for_version(other, 1)
    wait_until(lambda: texts(events, "refused"))
    assert texts(events, "refused", "resumed") == ["work dropped, the coordinator no longer needs it"]
    assert agent._membership.session.phase == "idle"


# --- stop -------------------------------------------------------------------------------------------


def test_stop_says_what_it_waits_for(make: Callable[..., Agent]) -> None:
    """A step that does not end: stop returns all the same, and the run ends after the step."""
    agent = make()
    trainer = trainer_of(agent)
    begun, over = threading.Event(), threading.Event()
    step = trainer.step

    def long_step(run: Any, rows: Any) -> float:
        begun.set()
        assert over.wait(PATIENCE_S)
        return step(run, rows)

    trainer.step = long_step  # type: ignore[method-assign]
    agent.start()
    agent.start()  # one thread, however often
    assert begun.wait(PATIENCE_S)
    assert agent.stop() == Stopping(False, "the training step in hand")
    assert agent.stop(0.0) == Stopping(False, "the training step in hand")
    over.set()
    assert agent.stop(PATIENCE_S) == Stopping(True)
    assert agent.stop() == Stopping(True)
    # A step's work is not lost, though no checkpoint was due; the agent can start again and goes on.
    assert checkpointed_step(agent.journal.checkpoint) == 1
    agent.start()
    wait_until(lambda: agent._membership.session.delivered)


def test_stop_while_the_model_loads(make: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    load, begun, over = base_model.load, threading.Event(), threading.Event()

    def slow_load(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert over.wait(PATIENCE_S)
        return load(*arguments, **options)

    monkeypatch.setattr(base_model, "load", slow_load)
    events: list[Event] = []
    agent = make(on_event=events.append)
    agent.start()
    assert begun.wait(PATIENCE_S)
    assert agent.stop(0.1) == Stopping(False, "the base model to load")
    over.set()
    assert agent.stop(PATIENCE_S) == Stopping(True)
    assert not texts(events, "training", "step")  # it ended before it asked for work


def test_stop_while_nobody_answers(tmp_path: Path) -> None:
    """A server that accepts and says nothing. What ended the run comes out of stop, once."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        agent = Agent(url, join_token="t", options=Options(state_dir=tmp_path / "state"))
        agent.start()
        connection, _ = server.accept()
        with connection:
            connection.recv(1)  # the request has begun
            waiting = agent.stop(0.1)
            assert not waiting.done
            assert waiting.waiting_for.startswith("an answer of the coordinator")
    with pytest.raises(Unreachable):
        agent.stop(PATIENCE_S)
    assert agent.stop() == Stopping(True)


def test_stop_is_heard_within_an_upload_and_it_goes_on_later(
    make: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the second chunk of an upload; the next run sends the rest, once."""
    monkeypatch.setattr(transport, "CHUNK_BYTES", 4096)
    agent = make()
    agent.prepare()
    events: list[Event] = []
    agent._tell._on_event = events.append
    asked: list[bool] = []
    interrupted = agent._part._work._interrupted

    def within_the_upload() -> bool:
        asked.append(agent._part.activity.startswith("an upload"))
        if sum(asked) == 2:
            agent.request_stop()
        return interrupted()

    agent._part._work._interrupted = within_the_upload
    assert agent.run(updates=1) == 0
    assert agent._membership.session.phase == "outbox"
    assert texts(events, "delivered", "offline") == []
    agent.start()
    wait_until(lambda: agent._membership.session.delivered == 1)


def test_a_callback_may_stop_pause_and_fail(
    make: Callable[..., Agent], caplog: pytest.LogCaptureFixture
) -> None:
    agent: Agent
    answers: list[Stopping] = []

    def on_progress(event: Event) -> None:
        if event.step == 3:
            answers.append(agent.stop())
        raise RuntimeError("a progress bar that fell off the screen")

    agent = make(callbacks=Callbacks(on_progress=on_progress))
    agent.start()
    wait_until(lambda: answers)
    assert answers == [Stopping(False, "the callback that called stop")]
    assert agent.stop(PATIENCE_S) == Stopping(True)
    assert checkpointed_step(agent.journal.checkpoint) == 3
    assert caplog.text.count("a callback of the application failed") == 3
    assert "a progress bar that fell off the screen" in caplog.text


def test_one_run_at_a_time(make: Callable[..., Agent]) -> None:
    events: list[Event] = []
    agent = make(on_event=events.append)
    agent.start()
    wait_until(lambda: texts(events, "step"))
    with pytest.raises(InputError, match="runs already"):
        agent.run()


# --- the model it gets back -------------------------------------------------------------------------


def test_a_newer_version_is_swapped_in_beside_training(make: Callable[..., Agent]) -> None:
    """Answers follow the versions that training makes, with one base that is loaded once."""
    versions: list[int] = []
    agent = make(callbacks=Callbacks(on_new_adapter=versions.append))
    assert agent.run(updates=1) == 1
    model = trainer_of(agent).base.model
    wait_for_version(agent, 1)
    agent.start()
    prompt, said = "turn the red light on", {}
    wait_until(lambda: len(versions) >= 3)
    while len(said) < 2:
        said[agent.refresh()] = agent.generate(prompt, 12)
        time.sleep(0.3)
    agent.stop(PATIENCE_S)
    assert versions == sorted(set(versions))
    trainer = trainer_of(agent)
    assert trainer.base.model is model
    _, adapter = agent.newest()
    agent._part.assistant._due = 0.0
    assert agent.generate(prompt, 12) == trainer.generate(adapter, [prompt], 12)[0]


def test_a_device_without_data_follows_and_answers(
    make: Callable[..., Agent], coordinator: CoordinatorProcess, base: Base
) -> None:
    trained = make()
    assert trained.run(updates=1) == 1
    wait_for_version(trained, 1)
    expected = trained.generate("turn the red light on", 12)
    trained.close()

    versions: list[int] = []
    reader = make("reader", data=False, callbacks=Callbacks(on_new_adapter=versions.append))
    reader.start()
    wait_until(lambda: versions == [1])
    assert reader.stop(PATIENCE_S) == Stopping(True)
    assert reader.generate("turn the red light on", 12) == expected
    reader.close()
    assert reader.generate("turn the red light on", 12) == expected  # it connects again

    coordinator.kill()
    offline = make("reader", data=False)
    assert offline.generate("turn the red light on", 12) == expected
    assert not offline.online
    assert offline.refresh() == 1
    stranger = make("stranger", data=False)
    with pytest.raises(Unreachable):
        stranger.generate("anything")


def test_a_device_that_has_joined_waits_for_its_coordinator(
    make: Callable[..., Agent], coordinator: CoordinatorProcess
) -> None:
    assert make().run(updates=1) == 1
    coordinator.kill()
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.kind == "offline" and len(texts(events, "offline")) == 1:
            coordinator.start()

    agent = make(on_event=listen)
    assert agent.run(updates=1) == 1
    assert "trying again in" in texts(events, "offline")[0]
    agent.close()
    assert agent.run(updates=1) == 1  # it connects again


# --- chat -------------------------------------------------------------------------------------------


def test_chat_at_a_prompt_tells_which_version_answers(make: Callable[..., Agent]) -> None:
    trained = make()
    reader = make("reader", data=False)
    out, notes = io.StringIO(), io.StringIO()
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) == 2:
            assert trained.run(updates=1) == 1
            wait_for_version(trained, 1)
            reader._part.assistant._due = 0.0
        if len(prompts) == 4:
            raise EOFError
        return ["turn the red light on", "and off", "  "][len(prompts) - 1]

    Chat(reader, out, notes, max_new_tokens=6).talk(ask)
    assert prompts == ["v0> ", "v0> ", "v1> ", "v1> "]
    assert notes.getvalue().splitlines() == [
        "answering: the base alone, there is no version yet",
        "now answering: version 1",
        "",
    ]
    assert out.getvalue().endswith("\n")


def test_ctrl_c_cuts_an_answer_short_and_then_leaves(make: Callable[..., Agent]) -> None:
    reader = make("reader", data=False)
    asked: list[str] = []

    chat = Chat(reader, io.StringIO(), io.StringIO(), max_new_tokens=16)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    chat._say = say  # type: ignore[method-assign]

    def prompt(shown: str) -> str:
        asked.append(shown)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return "turn the red light on"

    chat.talk(prompt)
    assert said[1:] == [" …", "\n"]
    assert len(asked) == 2
    assert reader.generate("turn the red light on", 4)  # the model is as before


def test_chat_reads_a_pipe(
    make: Callable[..., Agent], coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    reader = make("reader", data=False)
    expected = " ".join(reader.generate("turn the red light on", 8).split())
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "edge_sdk.cli",
                "chat",
                coordinator.url,
                "--state",
                str(tmp_path / "chat"),
            ),
            *("--token", coordinator.join_token, "--device", "cpu", "--max-new-tokens", "8"),
        ],
        input="turn the red light on\n\n/quit\nnever asked\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
