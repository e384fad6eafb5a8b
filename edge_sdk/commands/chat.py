"""Asking the base with the newest global adapter: at a prompt, or one prompt a line from a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from edge_sdk.agent import Agent

QUIT = "/quit"
HELP = f"Ask anything; each prompt stands alone. {QUIT} or Ctrl-D leaves, Ctrl-C cuts an answer short."


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
                self._out.write(" ".join(answer.split()) + "\n")
                self._out.flush()

    def _answer(self, prompt: str) -> None:
        """Stream one answer. Ctrl-C cuts it short, and the conversation goes on."""
        try:
            self._agent.generate(prompt, self._max_new_tokens, self._say)
        except KeyboardInterrupt:
            self._say(" …")
        self._say("\n")

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

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
        self._notes.write(text + "\n")
        self._notes.flush()
