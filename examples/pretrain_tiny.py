"""Pre-train the embedded `tiny` base model from scratch on CPU.

    python examples/pretrain_tiny.py prepare --data ../shared/data --work .work/tiny
    python examples/pretrain_tiny.py train   --work .work/tiny --steps 3000 --threads 1
    python examples/pretrain_tiny.py export  --work .work/tiny --out edge_sdk/tiny

`prepare` trains the tokenizer and packs the text; `train` is resumable (Ctrl-C or kill it, run it again)
and writes a checkpoint every few minutes; `export` writes a Hugging Face model directory and its card.

Data: T0 prompt templates, and the English sides of the Natural Instructions *translation* tasks. Nothing
that can be a client in an experiment is read: the two held-out T0 data sets are kept for perplexity only,
and a translation task never serves as a client of a `tiny` federation.

Copying: a small model trained on text alone learns grammar long before it learns to look something up and
repeat it (after 10M tokens a repeated sentence was no easier the second time). So a share of the rows are
exercises made from the same text: repeat a sentence, say what follows a word, look a value up by its key.

Optimiser: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) on the matrices inside
the blocks, AdamW on embeddings and norms; warm-up, constant, then linear decay of the learning rate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_sdk.core.records import to_json

SEQUENCE_LEN = 512
VOCAB_SIZE = 4096
PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
SPECIALS = [PAD, BOS, EOS, USER, ASSISTANT]
HELD_OUT_T0 = ("ropes", "trec")  # whole data sets, so that no passage of theirs is ever trained on
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|eos|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ENGLISH = {"the", "of", "and", "to", "in", "is", "that", "it", "you", "for", "was", "a", "i", "we"}


# --- text ----------------------------------------------------------------------------------------


def t0_examples(data: Path) -> Iterator[tuple[bool, str, str]]:
    """Yield (held_out, prompt, completion) for every non-empty T0 example."""
    with lzma.open(data / "t0" / "t0.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, completion = row["prompt"].strip(), row["completion"].strip()
            if prompt and completion:
                yield row["task"].startswith(HELD_OUT_T0), prompt, completion


def english_sentences(data: Path) -> list[str]:
    """Distinct English sides of the translation tasks, in a stable order."""
    seen: dict[str, None] = {}
    path = data / "natural_instructions" / "clients.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["category"] != "Translation":
                continue
            for pair in row["train"]:
                for text in pair:
                    if is_english(text):
                        seen.setdefault(text.strip())
    return list(seen)


def is_english(text: str) -> bool:
    """True for text of four words or more, nearly all ASCII, an eighth of it English function words."""
    words = text.lower().split()
    ascii_share = sum(c < "\x80" for c in text) / max(1, len(text))
    return len(words) >= 4 and ascii_share > 0.97 and sum(w in ENGLISH for w in words) * 8 >= len(words)


def copy_exercises(texts: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, completion) pairs whose completion stands in the prompt, made from words of `texts`."""
    rng = random.Random(seed)
    exercises = []
    while len(exercises) < count:
        words = rng.choice(texts).split()
        if len(words) < 8:
            continue
        begin = rng.randrange(len(words) - 6)
        words = words[begin : begin + rng.randint(6, 24)]
        kind = rng.choice(["repeat", "after", "look up", "shuffled"])
        if kind == "repeat":
            exercises.append((" ".join(words), " ".join(words)))
        elif kind == "shuffled":  # no grammar to lean on: only copying helps
            rng.shuffle(words)
            words = [*words[:10], str(rng.randrange(1000))]
            exercises.append((" ".join(words), " ".join(words)))
        elif kind == "after":
            place = rng.randrange(len(words) - 3)
            question = f'{" ".join(words)}\nWhat follows "{" ".join(words[place : place + 2])}"?'
            exercises.append((question, " ".join(words[place + 2 : place + 6])))
        else:
            keys = list(dict.fromkeys(words))[:5]
            values = [
                " ".join(rng.choice(texts).split()[:3]) if rng.random() < 0.6 else str(rng.randrange(1000))
                for _ in keys
            ]
            pairs = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
            asked = rng.randrange(len(keys))
            exercises.append(("\n".join([*pairs, f"{keys[asked]}?"]), values[asked]))
    return exercises


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE; each digit is a token of its own, so that a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(documents: list[list[int]], length: int, pad: int) -> np.ndarray:
    """Pack whole documents into rows of `length` tokens (first fit among the 64 rows last opened)."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []
    for document in documents:
        for row in open_rows:
            if len(row) + len(document) <= length:
                row.extend(document)
                break
        else:
            open_rows.append(list(document))
            if len(open_rows) > 64:
                rows.append(open_rows.pop(0))
    rows.extend(open_rows)
    packed = np.full((len(rows), length), pad, dtype=np.uint16)
    for index, row in enumerate(rows):
        packed[index, : len(row)] = row
    return packed


def prepare(data: Path, work: Path) -> None:
    """Write tokenizer.json, the packed rows (train, copy, valid_*.npy) and corpus.json into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    examples = list(t0_examples(data))
    sentences = english_sentences(data)
    random.Random(0).shuffle(sentences)
    held_out_sentences, sentences = sentences[:400], sentences[400:]
    kept = [(p, c) for held_out, p, c in examples if not held_out]
    unseen = random.Random(0).sample([(p, c) for held_out, p, c in examples if held_out], 400)
    tokenizer = train_tokenizer(text for pair in random.Random(0).sample(kept, 15000) for text in pair)
    tokenizer.save(str(work / "tokenizer.json"))
    bos, eos, user, assistant = (tokenizer.token_to_id(t) for t in (BOS, EOS, USER, ASSISTANT))

    def encode_pairs(pairs: list[tuple[str, str]]) -> list[list[int]]:
        prompts = tokenizer.encode_batch([p for p, _ in pairs])
        completions = tokenizer.encode_batch([c for _, c in pairs])
        documents = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tail = [assistant, *completion.ids[:200], eos]
            room = SEQUENCE_LEN - len(tail) - 2
            documents.append([bos, user, *prompt.ids[-room:], *tail])
        return documents

    def encode_plain(texts: list[str]) -> list[list[int]]:
        return [[bos, *e.ids, eos][:SEQUENCE_LEN] for e in tokenizer.encode_batch(texts)]

    train = encode_pairs(kept) + encode_plain(sentences)
    random.Random(1).shuffle(train)
    passages = [p for p, _ in random.Random(2).sample(kept, 20000)] + sentences
    sets = {
        "train": train,
        "copy": encode_pairs(copy_exercises(passages, 140_000, seed=3)),
        "valid_t0": encode_pairs(unseen),
        "valid_english": encode_plain(held_out_sentences),
    }
    counts: dict[str, Any] = {"held_out_t0": list(HELD_OUT_T0), "english_sentences": len(sentences)}
    for name, documents in sets.items():
        packed = pack(documents, SEQUENCE_LEN, 0)
        np.save(work / f"{name}.npy", packed)
        counts[name] = {"documents": len(documents), "tokens": int((packed != 0).sum()), "rows": len(packed)}
    (work / "corpus.json").write_text(json.dumps(counts, indent=1))
    print(json.dumps(counts, indent=1))


# --- training ------------------------------------------------------------------------------------


def build_model() -> LlamaForCausalLM:
    """The `tiny` architecture: 6 Llama blocks of width 256, 5.8M parameters, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Schedule:
    """Steps in all, the share at full learning rate, the share of copying exercises and their first step."""

    steps: int
    decay_from: float
    copy_share: float
    copy_from: int


def learning_rate_factor(step: int, steps: int, decay_from: float) -> float:
    """Warm-up over 50 steps, constant, then linear to zero from `decay_from * steps` on."""
    start = decay_from * steps
    decay = 1.0 if step < start else (steps - step) / (steps - start)
    return min(1.0, (step + 1) / 50) * decay


def next_token_loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over non-pad targets; rows (batch, length) of token ids."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows).logits[:, :-1]  # all 512 positions go in: 511 ran a third slower
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0
    )


def perplexity(model: Any, rows: np.ndarray) -> float:
    """Token-weighted perplexity of packed rows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(0, len(rows), 16):
            batch = torch.from_numpy(rows[index : index + 16].astype(np.int64))
            tokens = int((batch[:, 1:] != 0).sum())
            total += float(next_token_loss(model, batch)) * tokens
            count += tokens
    return math.exp(total / count)


def train(work: Path, schedule: Schedule, batch: int, threads: int) -> None:
    """Train to the end of the schedule, from the last checkpoint if there is one."""
    steps = schedule.steps
    torch.set_num_threads(threads)
    model = build_model()
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    muon = torch.optim.Muon(inner, lr=0.02, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    base_rates = {id(muon): 0.02, id(adam): 3e-3}
    rows, copy_rows = np.load(work / "train.npy"), np.load(work / "copy.npy")
    checkpoint = work / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step = state["step"]
    compiled_loss = torch.compile(lambda rows: next_token_loss(model, rows))
    started, saved, since = time.monotonic(), time.monotonic(), step
    while step < steps:
        copies = round(batch * schedule.copy_share) if step >= schedule.copy_from else 0
        parts = [take(rows, step, batch - copies), take(copy_rows, step, copies)]
        picked = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        factor = learning_rate_factor(step, steps, schedule.decay_from)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = base_rates[id(optimizer)] * factor
        loss = compiled_loss(picked)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            rate = (step - since) * batch * (SEQUENCE_LEN - 1) / (time.monotonic() - started)
            line = f"step {step}/{steps}  loss {loss.item():.3f}  lr x{factor:.2f}  {rate:.0f} tokens/s"
            print(line, flush=True)
        if time.monotonic() - saved > 180 or step == steps:
            save(checkpoint, model, muon, adam, step)
            saved = time.monotonic()
    for name in ("valid_t0", "valid_english"):
        print(f"{name}: perplexity {perplexity(model, np.load(work / f'{name}.npy')):.2f}")


def take(rows: np.ndarray, step: int, count: int) -> np.ndarray:
    """The `count` rows of this step, in epochs of seeded permutations."""
    if count == 0:
        return rows[:0]
    epoch, offset = divmod(step * count, len(rows) - count)
    return rows[np.random.default_rng(epoch).permutation(len(rows))[offset : offset + count]]


def save(path: Path, model: Any, muon: Any, adam: Any, step: int) -> None:
    """Write the checkpoint beside its place and move it there, so that a kill leaves the old one whole."""
    state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def export(work: Path, out: Path, batch: int) -> None:
    """Write bfloat16 weights, tokenizer, chat template and figures (training.json) into `out`."""
    model = build_model()
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    figures = {
        "steps": state["step"],
        "tokens_seen": state["step"] * batch * SEQUENCE_LEN,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": json.loads((work / "corpus.json").read_text()),
    }
    for name in ("valid_t0", "valid_english"):
        figures[f"perplexity_{name}"] = round(perplexity(model, np.load(work / f"{name}.npy")), 3)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    from edge_sdk.model import base_model

    quantised = base_model.load(str(out), device="cpu", dtype="bfloat16").model
    for name in ("valid_t0", "valid_english"):
        figures[f"perplexity_{name}_nf4"] = round(perplexity(quantised, np.load(work / f"{name}.npy")), 3)
    figures["weights_sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "README.md").write_text(model_card(figures))
    base = replace(base_model.describe(str(out)), model="tiny")
    (out / "base.json").write_text(json.dumps(to_json(base), indent=1) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)
    print(json.dumps(figures, indent=1))


def model_card(figures: dict[str, Any]) -> str:
    """The card beside the weights, from what was measured."""
    corpus = figures["corpus"]
    text, copies = corpus["train"]["tokens"], corpus["copy"]["tokens"]
    seen = figures["tokens_seen"]
    table = "\n".join(
        f"| {label} | {figures[key]:.1f} | {figures[key + '_nf4']:.1f} |"
        for label, key in (
            ("T0 data sets never seen", "perplexity_valid_t0"),
            ("English sentences never seen", "perplexity_valid_english"),
        )
    )
    return f"""# tiny

A Llama-architecture language model of {figures["parameters"]:,} parameters ({VOCAB_SIZE}-entry byte-level
BPE, 6 blocks of width 256, 4 heads, 2 key-value heads, tied embeddings, 1,024 positions), for demonstrations,
tests and experiments on a CPU. It writes English-looking text, copies from its prompt, and knows next to
nothing.

**Data.** {text:,} tokens of T0 prompt templates (as published in yizhongw/self-instruct, Apache-2.0) and of
{corpus["english_sentences"]:,} English sides of the Natural Instructions v2 *translation* tasks (Apache-2.0),
and {copies:,} tokens of copying exercises made from the same text. Held out, whole: the T0 data sets
{" and ".join(corpus["held_out_t0"])}, and 400 of the sentences. No Natural Instructions task but translations
was seen, so the others can be clients of an experiment; nor was a smart-home command of the demonstration.

**Training.** {figures["steps"]:,} steps of 16 rows of 512 tokens: {seen / 1e6:.1f}M tokens seen,
{seen / (text + copies):.1f} times as many as there are. Muon and AdamW, bfloat16 autocast, one to two CPU
cores for about two hours. The copying exercises, a third of the later rows, joined at step 1,300, after a
check showed that nothing had been learnt about copying by then: after 10M tokens the model had learnt grammar
and memorised passages, but a repeated sentence was no easier the second time, and such a base cannot copy a
room name from a command. A rebuild has them from the start.

| perplexity per token | bfloat16 | NF4 |
|---|---|---|
{table}

**Use.** Chat template `<|user|>…<|assistant|>…<|eos|>`. Digits are single tokens. Licence: Apache-2.0.

**Rebuild.** `python examples/pretrain_tiny.py prepare`, then `train`, then `export`; its docstring has the
details, `training.json` here the figures.
"""


def main() -> int:
    """Parse the command line and run one of the three stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=["prepare", "train", "export"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--out", type=Path, default=Path("edge_sdk/tiny"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="rows of 512 tokens in a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the steps at full rate")
    parser.add_argument("--copy-share", type=float, default=0.35, help="share of the rows that are exercises")
    parser.add_argument("--copy-from", type=int, default=0, help="first step with exercises")
    options = parser.parse_args()
    if options.stage == "prepare":
        prepare(options.data, options.work)
    elif options.stage == "train":
        schedule = Schedule(options.steps, options.decay_from, options.copy_share, options.copy_from)
        train(options.work, schedule, options.batch, options.threads)
    else:
        export(options.work, options.out, options.batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
