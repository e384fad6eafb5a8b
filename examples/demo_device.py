"""One device of the demonstration: the embedded agent, tested before and after. `examples.demo` starts it.

    python -m examples.demo_device --name pi --home runs/demo/pi --url http://127.0.0.1:8765 --token …

Writes `before.json` and `after.json` beside its data. Killed and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from edge_sdk.agent import Agent
from edge_sdk.core.errors import EdgeError
from edge_sdk.core.lora import Adapter
from edge_sdk.core.profile import load_profile
from edge_sdk.model import base_model
from edge_sdk.system.durable import write_durably
from edge_sdk.text.examples import load_examples
from edge_sdk.text.rows import tokenise
from edge_sdk.training.trainer import Trainer
from examples.embedded import embedded_agent

ANSWER_TOKENS = 40  # the longest intent of the generator has about 35


def score(trainer: Trainer, adapter: Adapter | None, tests: Path, sequence_len: int) -> dict[str, float]:
    """Loss per token and exact-match share on a JSONL file of commands."""
    records = [json.loads(line) for line in tests.read_text(encoding="utf-8").splitlines()]
    rows = [tokenise(example, trainer.base.tokenizer, sequence_len) for example in load_examples(tests)]
    answers = trainer.generate(adapter, [record["prompt"] for record in records], ANSWER_TOKENS)
    matches = [answer.strip() == r["completion"] for answer, r in zip(answers, records, strict=True)]
    return {
        "loss": trainer.evaluate(adapter, rows).loss,
        "exact_match": sum(matches) / len(matches),
    }


def score_both(agent: Agent, adapter: Adapter | None, home: Path) -> dict[str, Any]:
    """On the intents that this household knows, and on those it has never seen."""
    federation = agent.federation
    base_model.use_threads(1)
    base = base_model.load(federation.base.model)
    trainer = Trainer(base, federation.base.modules, federation.scaling, progress=False)
    length = federation.training.sequence_len
    return {part: score(trainer, adapter, home / f"{part}.test.jsonl", length) for part in ("own", "unseen")}


def run(options: argparse.Namespace) -> None:
    """Test, train until told to stop, test again."""
    home: Path = options.home
    agent = embedded_agent(options, profile=load_profile(options.profile), duty=options.duty)
    signal.signal(signal.SIGTERM, lambda *_: agent.request_stop())
    agent.prepare()
    if not (home / "before.json").exists():
        write_durably(home / "before.json", json.dumps(score_both(agent, None, home)).encode())
    agent.run()
    version, adapter = agent.newest()
    after = {"version": version, "r": agent.choice.rank, **score_both(agent, adapter, home)}
    write_durably(home / "after.json", json.dumps(after).encode())


def main() -> int:
    """Parse the command line and run; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument(
        "--home", type=Path, required=True, help="folder with train, own.test and unseen.test"
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--budget", type=int, required=True, help="memory budget in bytes")
    parser.add_argument("--duty", type=float, default=1.0)
    try:
        run(parser.parse_args())
    except EdgeError as error:
        print(f"demo device: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
