"""The agent as an example's device process embeds it: on a base so small that its budget is scaled."""

from __future__ import annotations

import argparse
from typing import Any

from edge_sdk import Agent, Event, Options


def embedded_agent(arguments: argparse.Namespace, **more: Any) -> Agent:
    """An agent for `name`, `home` (with train.jsonl), `url`, `token` and `budget`; `more` are Options.

    What happens is printed, but for the single steps.
    """

    def note(event: Event) -> None:
        if event.kind != "step":
            print(f"{arguments.name}: {event.text}", flush=True)

    return Agent(
        arguments.url,
        data=arguments.home / "train.jsonl",
        join_token=arguments.token,
        options=Options(
            name=arguments.name,
            state_dir=arguments.home / "state",
            memory_budget_bytes=arguments.budget,
            budget_covers_libraries=False,  # the budget is scaled to the small base; the libraries are not
            isolate=False,  # this process is the device, and nothing else
            progress=False,
            **more,
        ),
        on_event=note,
    )
