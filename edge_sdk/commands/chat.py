"""`edge-sdk chat`: ask the base with the newest global adapter, at a prompt or with one prompt a line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edge_sdk.commands import destination
from edge_sdk.commands.device_config import TRUST
from edge_sdk.core.errors import InputError
from edge_sdk.system.terminal import complain, write_text

if TYPE_CHECKING:
    from edge_sdk.agent import Agent

QUIT = "/quit"
HELP = f"Ask anything; each prompt stands alone. {QUIT} or Ctrl-D leaves, Ctrl-C cuts an answer short."


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    chat = commands.add_parser("chat", help="ask the base with the newest version of the adapter")
    destination.add_to(chat)
    chat.add_argument("--name", help="how the host sees this device (default: the host name)")
    chat.add_argument("--model", help="where the base model lies here (default: what the federation names)")
    chat.add_argument("--state", type=Path, help="the folder that `join` uses, if you named one")
    chat.add_argument("--threads", type=int, default=1, help="compute threads (default %(default)s)")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (%(default)s)")
    chat.add_argument("--device", default="auto", help="torch device (default: the best there is)")
    chat.add_argument("--no-quantise", action="store_true", help="keep the base in 16 or 32 bits")
    chat.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    chat.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer until there are no more prompts."""
    from edge_sdk.agent import Agent
    from edge_sdk.options import Options

    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} must be 1 or more")
    to = destination.of(options)
    if to is None:
        raise InputError("give the address of the coordinator or an invitation")
    chosen = {"name": options.name} if options.name else {}
    agent = Agent(
        **to.for_agent(),
        options=Options(
            **chosen,
            model=options.model,
            state_dir=options.state,
            threads=options.threads,
            device=options.device,
            quantise=not options.no_quantise,
            trust_remote_code=options.trust_remote_code,
            ca=Path(options.ca) if options.ca else None,
            insecure=bool(options.insecure),
        ),
        on_event=lambda event: None,
    )
    chat = Chat(agent, sys.stdout, sys.stderr, options.max_new_tokens)
    try:
        if not sys.stdin.isatty():
            agent.load()
            chat.answer_lines(sys.stdin)
            return 0
        complain(HELP, "Loading the base model …")
        agent.load()
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then has a history and edits the line
        chat.talk(input)
    finally:
        agent.close()
    return 0


class Chat:
    """Answers prompts until there are none.

    Args:
        agent: who answers.
        out: where answers go.
        notes: where everything else goes: which version answers, and that a newer one has come.
        max_new_tokens: the longest answer.
    """

    def __init__(self, agent: Agent, out: TextIO, notes: TextIO, max_new_tokens: int) -> None:
        self._agent, self._out, self._notes = agent, out, notes
        self._max_new_tokens = max_new_tokens
        self._version: int | None = None
        self._online = True

    def talk(self, ask: Callable[[str], str]) -> None:
        """Answer what `ask` (given the prompt to show) returns, until it raises EOFError or Ctrl-C."""
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                self._look()
                prompt = ask(f"v{self._version}> ").strip()
                if prompt == QUIT:
                    return
                if prompt:
                    self._look()
                    self._answer(prompt)
        self._note("")  # the line of the prompt ends

    def answer_lines(self, lines: TextIO) -> None:
        """One answer line for each line; line breaks within an answer become spaces."""
        for line in lines:
            prompt = line.strip()
            if prompt == QUIT:
                return
            if prompt:
                self._look()
                answer = self._agent.generate(prompt, self._max_new_tokens)
                self._say(" ".join(answer.split()) + "\n")

    def _answer(self, prompt: str) -> None:
        """Stream one answer. Ctrl-C cuts it short, and the conversation goes on."""
        try:
            self._agent.generate(prompt, self._max_new_tokens, self._say)
        except KeyboardInterrupt:
            self._say(" …")
        self._say("\n")

    def _say(self, text: str) -> None:
        write_text(self._out, text)

    def _look(self) -> None:
        """Pick up a newer version, and say what has changed."""
        version = self._agent.refresh()
        if self._agent.online != self._online:
            self._online = self._agent.online
            self._note(
                "the coordinator answers again"
                if self._online
                else "the coordinator does not answer; going on with the newest version on this device"
            )
        if version != self._version:
            first = self._version is None
            self._version = version
            named = f"version {version}" if version else "the base alone, there is no version yet"
            self._note(f"answering: {named}" if first else f"now answering: {named}")

    def _note(self, text: str) -> None:
        write_text(self._notes, text + "\n")
