"""Smart-home commands and the JSON intents they mean, made up from a seed.

    python -m examples.smart_home --out runs/smart_home --households 6 --seed 0

Each household knows only a few of the intents, and every intent is known to at least two households, so that
what one household's model learnt from the others shows on the intents it has never seen. All values are
copied from the command as they stand there. Whether a command is for training or for testing follows from
its text alone (a hash), so that no test command is ever in anybody's training data, whatever the seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.core.errors import InputError

Record = dict[str, str]
"""`prompt` and `completion`."""

SLOTS: dict[str, tuple[str | int, ...]] = {
    "room": (
        "kitchen", "bedroom", "bathroom", "hallway", "office", "garage", "attic", "basement", "nursery",
        "living room", "dining room", "guest room", "play room", "laundry room",
    ),
    "colour": ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white", "warm white", "gold"),
    "level": tuple(range(5, 100, 5)),
    "degrees": tuple(range(14, 28)),
    "heat": tuple(range(120, 255, 5)),
    "minutes": tuple(range(2, 60)),
    "count": tuple(range(2, 13)),
    "time": tuple(f"{hour}:{minute:02d}" for hour in range(5, 23) for minute in range(0, 60, 5)),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "tomorrow"),
    "song": (
        "Yesterday", "Imagine", "Hallelujah", "Thriller", "Waterloo", "Respect", "Africa", "Jolene", "Hello",
        "Summertime", "Blue Moon", "Let It Be", "Hey Jude", "Space Oddity", "Moon River", "Dancing Queen",
        "Purple Rain", "Stand by Me", "My Girl", "Ring of Fire",
    ),
    "dish": (
        "pizza", "bread", "chicken", "salmon", "lasagne", "cookies", "potatoes", "apple pie", "muffins",
        "vegetables", "fish", "cake",
    ),
    "label": ("pasta", "tea", "eggs", "rice", "laundry", "homework", "yoga", "soup", "nap", "bath", "coffee"),
    "door": (
        "front door", "back door", "side door", "garage door", "garden gate", "cellar door", "patio door",
        "balcony door", "main gate", "shed",
    ),
    "power": ("quiet", "normal", "strong", "turbo"),
    "item": (
        "apples", "bananas", "lemons", "tomatoes", "onions", "carrots", "eggs", "candles", "batteries",
        "sponges", "towels", "napkins", "oranges", "peppers", "bottles of milk", "cans of beans",
        "bags of rice", "bars of soap",
    ),
    "person": (
        "Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Liam",
        "Mary", "Noah", "Olga", "Peter", "Rosa", "Sam", "Tom", "Vera",
    ),
    "text": (
        "dinner is ready", "I am home", "I am late", "please call me", "happy birthday", "good night",
        "the bus is late", "we need milk", "see you soon", "the dog is fed", "the mail is here", "thank you",
    ),
}  # fmt: skip

# Intent -> (slots in the order of the JSON keys, phrasings). The keys of the JSON are the slots' names.
TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "light_on": (("room", "colour"), (
        "turn on the {room} light in {colour}",
        "switch the {room} light on and make it {colour}",
        "I want {colour} light in the {room}",
        "lights on in the {room}, {colour} please",
        "make the {room} light {colour}",
        "could you light up the {room} in {colour}",
        "set the {room} lamp to {colour}",
        "give me {colour} light for the {room}",
    )),
    "light_dim": (("room", "level"), (
        "dim the {room} light to {level} percent",
        "set the {room} brightness to {level} percent",
        "lower the lights in the {room} to {level}",
        "bring the {room} lamp down to {level} percent",
        "make it less bright in the {room}, {level} percent",
        "{level} percent brightness in the {room} please",
        "can you dim the {room} to {level}",
        "the {room} is too bright, go to {level} percent",
    )),
    "thermostat_set": (("room", "degrees"), (
        "set the {room} to {degrees} degrees",
        "heat the {room} up to {degrees} degrees",
        "I want it {degrees} degrees warm in the {room}",
        "make the {room} {degrees} degrees",
        "turn the heating in the {room} to {degrees}",
        "change the temperature of the {room} to {degrees} degrees",
        "keep the {room} at {degrees} degrees",
        "{degrees} degrees in the {room} please",
    )),
    "blinds_move": (("room", "level"), (
        "set the blinds in the {room} to {level} percent",
        "move the {room} blinds to {level} percent",
        "put the {room} blinds at {level}",
        "blinds in the {room} to {level} percent please",
        "lower the {room} blinds to {level} percent",
        "can the {room} blinds go to {level} percent",
        "I want the {room} blinds at {level} percent",
        "pull the blinds of the {room} down to {level}",
    )),
    "music_play": (("song", "room"), (
        "play {song} in the {room}",
        "put on {song} in the {room}",
        "I want to hear {song} in the {room}",
        "start the song {song} in the {room}",
        "can you play {song} on the {room} speaker",
        "let the {room} speaker play {song}",
        "music in the {room} please, play {song}",
        "send the song {song} to the {room}",
    )),
    "timer_start": (("minutes", "label"), (
        "start a {minutes} minute timer for the {label}",
        "set a timer of {minutes} minutes for {label}",
        "count down {minutes} minutes for the {label}",
        "tell me when {minutes} minutes are over for the {label}",
        "{label} timer, {minutes} minutes",
        "I need a timer for {label}, {minutes} minutes",
        "the {label} needs {minutes} minutes, start a timer",
        "timer for the {label} please, {minutes} minutes",
    )),
    "alarm_set": (("time", "day"), (
        "wake me at {time} on {day}",
        "set an alarm for {time} on {day}",
        "alarm at {time} {day} please",
        "I have to get up at {time} on {day}",
        "ring at {time} on {day}",
        "on {day} wake me up at {time}",
        "make an alarm for {day} at {time}",
        "get me out of bed at {time} on {day}",
    )),
    "door_lock": (("door", "minutes"), (
        "lock the {door} in {minutes} minutes",
        "in {minutes} minutes lock the {door}",
        "close and lock the {door} after {minutes} minutes",
        "please lock the {door} {minutes} minutes from now",
        "make sure the {door} is locked in {minutes} minutes",
        "the {door} must be locked in {minutes} minutes",
        "can you lock the {door} in {minutes} minutes",
        "wait {minutes} minutes and then lock the {door}",
    )),
    "vacuum_start": (("room", "power"), (
        "vacuum the {room} at {power} power",
        "start the robot in the {room} with {power} power",
        "clean the {room} floor on {power}",
        "let the robot clean the {room} in {power} mode",
        "send the vacuum to the {room}, {power} mode",
        "the {room} is dirty, vacuum it on {power}",
        "use {power} power to vacuum the {room}",
        "can you vacuum the {room} in {power} mode",
    )),
    "shopping_add": (("count", "item"), (
        "add {count} {item} to the shopping list",
        "put {count} {item} on the list",
        "we need to buy {count} {item}",
        "I need {count} {item} from the shop",
        "remember to buy {count} {item}",
        "shopping list: {count} {item}",
        "we are out of {item}, get {count}",
        "please note {count} {item} for the shop",
    )),
    "message_send": (("person", "text"), (
        "tell {person} {text}",
        "send {person} a message: {text}",
        "write to {person} that {text}",
        "let {person} know: {text}",
        "message {person} and say {text}",
        "text {person}: {text}",
        "say {text} to {person} in a message",
        "send a note to {person}, {text}",
    )),
    "oven_preheat": (("heat", "dish"), (
        "preheat the oven to {heat} degrees for {dish}",
        "heat the oven to {heat} for the {dish}",
        "oven to {heat} degrees, I am making {dish}",
        "get the oven to {heat} degrees for {dish}",
        "I am baking {dish}, set the oven to {heat} degrees",
        "warm up the oven for {dish}, {heat} degrees",
        "the {dish} goes in at {heat} degrees, start the oven",
        "turn the oven on at {heat} for the {dish}",
    )),
}  # fmt: skip

INTENTS: tuple[str, ...] = tuple(TEMPLATES)
PER_HOUSEHOLD = (3, 4)
TEST_SHARE = 5  # one command in this many is for testing


@dataclass(frozen=True)
class Household:
    """One device's owner: the intents that it uses, and commands of these for training and for testing."""

    name: str
    intents: tuple[str, ...]
    train: tuple[Record, ...]
    test: tuple[Record, ...]


def households(
    count: int, seed: int, train_per_intent: int = 60, test_per_intent: int = 10
) -> list[Household]:
    """Households of 3 or 4 intents each; at least two, and at most half of them, know an intent in use.

    Fewer than six households share fewer than all intents.

    Raises:
        InputError: fewer than four households, or more commands wanted of an intent than there are.
    """
    if count < 4:
        raise InputError(
            f"{count} households are too few for each intent to be known to two, but not most, of them"
        )
    homes = []
    for index, intents in enumerate(_deal(count, random.Random(f"deal/{seed}"))):
        name = f"household-{index + 1:02d}"
        train = _draw(intents, train_per_intent, f"{seed}/{name}", for_test=False)
        test = _draw(intents, test_per_intent, f"{seed}/{name}", for_test=True)
        homes.append(Household(name, intents, train, test))
    return homes


def test_set(intents: tuple[str, ...], per_intent: int, seed: int) -> tuple[Record, ...]:
    """Test commands of `intents`, e.g. of those that a household does not know."""
    return _draw(intents, per_intent, f"{seed}/test", for_test=True)


test_set.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest makes of the name


def _deal(count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """Intents of each household: those that the fewest have yet, so that none is forgotten."""
    most = PER_HOUSEHOLD[1]
    in_use = rng.sample(INTENTS, min(len(INTENTS), most * count // 2))
    sizes = [rng.choice(PER_HOUSEHOLD) for _ in range(count)]
    for index in range(count):
        if sum(sizes) < 2 * len(in_use):
            sizes[index] = most
    known = dict.fromkeys(in_use, 0)
    hands = []
    for size in sizes:
        hand = sorted(in_use, key=lambda intent: (known[intent], rng.random()))[:size]
        for intent in hand:
            known[intent] += 1
        hands.append(tuple(sorted(hand, key=INTENTS.index)))
    return hands


def _draw(intents: tuple[str, ...], per_intent: int, seed: str, *, for_test: bool) -> tuple[Record, ...]:
    """`per_intent` different commands of each intent, in random order."""
    records: list[Record] = []
    for intent in intents:
        rng = random.Random(f"{seed}/{intent}/{for_test}")
        found: dict[str, Record] = {}
        attempts = 0
        while len(found) < per_intent:
            attempts += 1
            if attempts > 200 * (per_intent + 10):
                raise InputError(f"there are not {per_intent} different commands for {intent}; ask for fewer")
            record = _command(intent, rng)
            if is_test(record["prompt"]) == for_test:
                found[record["prompt"]] = record
        records += found.values()
    random.Random(f"{seed}/order/{for_test}").shuffle(records)
    return tuple(records)


def _command(intent: str, rng: random.Random) -> Record:
    """One command and its intent as compact JSON."""
    slots, phrasings = TEMPLATES[intent]
    values = {slot: rng.choice(SLOTS[slot]) for slot in slots}
    prompt = rng.choice(phrasings).format(**values)
    completion = json.dumps({"intent": intent, **values}, separators=(",", ":"))
    return {"prompt": prompt, "completion": completion}


def is_test(prompt: str) -> bool:
    """Whether a command belongs to the test side: by its text alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] % TEST_SHARE == 0


def write(homes: list[Household], out: Path) -> list[Path]:
    """Write `<name>.train.jsonl` and `<name>.test.jsonl` of each household into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for home in homes:
        for part, records in (("train", home.train), ("test", home.test)):
            path = out / f"{home.name}.{part}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Write the households' files and say what each knows."""
    parser = argparse.ArgumentParser(description="Make smart-home commands for a number of households.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSONL files")
    parser.add_argument("--households", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=60, help="training commands of each intent")
    parser.add_argument("--test", type=int, default=10, help="test commands of each intent")
    options = parser.parse_args(arguments)
    try:
        homes = households(options.households, options.seed, options.train, options.test)
        write(homes, options.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for home in homes:
        print(f"{home.name}: {len(home.train)} + {len(home.test)} commands of {', '.join(home.intents)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
