"""The agent's life beside an application: real threads, a real coordinator process, real training."""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from edge_sdk.membership.session import Session
from edge_sdk.model import base_model
from edge_sdk.options import Event, Limits, Options
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.participation.resident_model import worker_for
from edge_sdk.training.plan import Start, StepAnswer, StepReport
from edge_sdk.training.trainer import Trainer
from edge_sdk.worker.messages import Finished, Job, Question
from edge_sdk.worker.worker import Worker
from tests.device_agents import Clock
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
def make(coordinator: CoordinatorProcess, base: Base, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
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
                model=base.model,
                limits=Limits(least_examples=1),
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


@dataclass
class Observed:
    """A worker in this process, what an agent has asked of it, and what it trained.

    `hold` is called after every step, before the agent hears of it.
    """

    worker: Worker
    jobs: list[Job] = field(default_factory=list)
    trained: list[bytes] = field(default_factory=list)  # as they lay in the outbox
    hold: Callable[[], object] = lambda: None
    closed: bool = False

    def train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        self.jobs.append(job)
        done = self.worker.train(job, lambda report: (self.hold(), on_step(report))[1])
        self.trained.append(Path(job.outbox).read_bytes())
        return done

    def generate(self, question: Question, on_text: Callable[[str], None] | None = None) -> list[str]:
        return self.worker.generate(question, on_text)

    def close(self) -> None:
        self.closed = True
        self.worker.close()


class Workers:
    """Makes the workers of an agent and keeps them."""

    def __init__(self) -> None:
        self.made: list[Observed] = []

    def __call__(self, *arguments: Any) -> Observed:
        worker = worker_for(*arguments)
        assert isinstance(worker, Worker)
        self.made.append(Observed(worker))
        return self.made[-1]

    @property
    def loaded(self) -> bool:
        return not all(one.closed for one in self.made)

    @property
    def trainer(self) -> Trainer:
        """Of the worker that was made last."""
        return self.made[-1].worker.trainer


def session_of(agent: Agent) -> Session:
    session = agent.journal.load()
    assert session is not None
    return session


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
    workers = Workers()
    seen: list[Any] = []

    def on_progress(event: Event) -> None:
        if event.step in (3, 8):
            agent.pause()

    def on_pause(reason: str) -> None:
        seen.append((reason, workers.loaded, checkpointed_step(agent.journal.checkpoint)))

    agent = make(
        on_event=events.append,
        callbacks=Callbacks(on_progress=on_progress, on_pause=on_pause),
        collaborators=Collaborators(make_worker=workers),
    )
    agent.prepare()
    trainer = weakref.ref(workers.trainer)
    agent.start()
    wait_until(lambda: len(seen) == 1)
    assert trainer() is None  # nothing holds the model any more
    job = workers.made[0].jobs[0]
    agent.generate("turn the red light on", 4)
    agent.resume()
    wait_until(lambda: len(seen) == 2)
    agent.resume()
    wait_until(lambda: workers.made[-1].trained)
    delivered = workers.made[-1].trained[0]
    assert agent.stop(PATIENCE_S) == Stopping(True)
    assert seen == [("asked to", False, 3), ("asked to", False, 8)]
    assert texts(events, "paused", "resumed")[:4] == ["paused: asked to", "resumed"] * 2
    first = [event.step for event in events if event.kind == "step"][:STEPS]
    assert first == list(range(1, STEPS + 1))

    agent.prepare()
    rows = workers.made[-1].worker.rows_of(job.plan.sequence_len)
    start = Start(None, None, job.ranks, job.seed)
    unbroken = workers.trainer.train(start, rows, job.plan, on_step=lambda _: "continue")
    of = agent.federation
    assert codec.encode(unbroken.adapter, of.scaling, of.upload_dtype) == delivered


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

    collaborators = Collaborators(
        clock=lambda: 1e6 * time.monotonic(),  # so that the owner's surroundings are looked at all the time
        measure=lambda _: Surroundings(on_mains=mains.is_set()),
    )
    options = {"conditions": Conditions(on_mains=True)}
    agent = make(on_event=listen, options=options, collaborators=collaborators)
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
    agent = make(
        on_event=events.append,
        options={"conditions": Conditions(on_mains=True)},
        collaborators=Collaborators(measure=lambda _: Surroundings()),
    )
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
    assert session_of(agent).phase == "idle"


# --- stop -------------------------------------------------------------------------------------------


def test_stop_says_what_it_waits_for(make: Callable[..., Agent]) -> None:
    """A step that does not end: stop returns all the same, and the run ends after the step."""
    workers = Workers()
    agent = make(collaborators=Collaborators(make_worker=workers))
    agent.prepare()
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert over.wait(PATIENCE_S)

    workers.made[0].hold = hold
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
    wait_until(lambda: session_of(agent).delivered)


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
    events: list[Event] = []
    agent = make(on_event=events.append)
    upload, asked = transport.Transport.upload, itertools.count(1)

    def stopped_within(self: Any, id: str, path: Path, stopping: Callable[[], bool]) -> None:
        def heard() -> bool:
            if next(asked) == 2:
                agent.request_stop()
            return stopping()

        upload(self, id, path, heard)

    monkeypatch.setattr(transport.Transport, "upload", stopped_within)
    assert agent.run(updates=1) == 0
    assert session_of(agent).phase == "outbox"
    assert texts(events, "delivered", "offline") == []
    agent.start()
    wait_until(lambda: session_of(agent).delivered == 1)


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
    workers, clock = Workers(), Clock()
    agent = make(
        callbacks=Callbacks(on_new_adapter=versions.append),
        collaborators=Collaborators(clock=clock, make_worker=workers),
    )
    assert agent.run(updates=1) == 1
    model = workers.trainer.base.model
    wait_for_version(agent, 1)
    agent.start()
    prompt, said = "turn the red light on", {}
    wait_until(lambda: len(versions) >= 3)
    while len(said) < 2:
        said[agent.refresh()] = agent.generate(prompt, 12)
        time.sleep(0.3)
    agent.stop(PATIENCE_S)
    assert versions == sorted(set(versions))
    agent.prepare()
    trainer = workers.trainer
    assert trainer.base.model is model
    _, adapter = agent.newest()
    clock.forward()
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
    clock = Clock()
    reader = make("reader", data=False, collaborators=Collaborators(clock=clock))
    out, notes = io.StringIO(), io.StringIO()
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) == 2:
            assert trained.run(updates=1) == 1
            wait_for_version(trained, 1)
            clock.forward()
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

    said: list[str] = []

    class CtrlC(io.StringIO):
        """A terminal at which somebody presses Ctrl-C at the first word."""

        def write(self, text: str) -> int:
            said.append(text)
            if len(said) == 1:
                raise KeyboardInterrupt
            return len(text)

    chat = Chat(reader, CtrlC(), io.StringIO(), max_new_tokens=16)

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
    make: Callable[..., Agent], coordinator: CoordinatorProcess, base: Base, tmp_path: Path
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
                "--model",
                base.model,
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
