"""Models that the evaluations can be sure of: one knows every answer, one has not read anything."""

import math
import random
import re
from collections.abc import Mapping, Sequence

from longwing.evals.task import Answer


class Blind:
    """Answers without reading: always the same words, any letter, any token as likely as another.

    A token is four characters of a prompt; with `chat` a template adds 3.
    """

    VOCAB = 1000

    def __init__(self, name: str = "blind", context_len: int = 100_000, **settings: object) -> None:
        self.name = name
        self.context_len = context_len
        self.settings: Mapping[str, object] = settings
        self.asked = 0

    def count_tokens(self, text: str, *, chat: bool) -> int:
        return -(-len(text) // 4) + 3 * chat

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        self.asked += 1
        needed = self.count_tokens(prompt, chat=chat)
        assert needed + max_new_tokens <= self.context_len, "asked for more than it can read"
        text = self.answer(prompt)
        return Answer(text=text, prompt_len=needed, num_tokens=len(text) // 4 + 1, seconds=0.25)

    def answer(self, prompt: str) -> str:
        return "I was not listening. 17, perhaps."

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        rng = random.Random(prompt)
        return [math.log(rng.random()) for _ in options]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % self.VOCAB for letter in text]

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        return [None, *(-math.log(self.VOCAB) for _ in token_ids[1:])]


class Oracle(Blind):
    """Finds each answer in the prompt itself; letters it knows from a key."""

    def __init__(self, name: str = "oracle", key: Mapping[str, str] | None = None, **more: object):
        super().__init__(name, **more)  # type: ignore[arg-type]
        self.key = key or {}

    def answer(self, prompt: str) -> str:
        if line := re.search(r"<REGISTER_CONTENT> in line (.+?)\?", prompt):
            record = rf"\nline {re.escape(line[1])}: REGISTER_CONTENT is <(\d+)>\n"
            (value,) = re.findall(record, prompt)
            return f"The <REGISTER_CONTENT> in line {line[1]} is <{value}>."
        if key := re.search(r"The pass key is (\d+)\. Remember it\.", prompt):
            return f" {key[1]}. Remember"
        if asked := re.search(r"storage codes of (the .+) and (the .+?)\? Give", prompt):
            names = [*asked[1].split(", "), asked[2]]
            found = [re.search(rf"code of {re.escape(name)} is (\d+)\.", prompt) for name in names]
            return ", ".join(match[1] for match in found if match)
        asked = re.search(r"What is the (\w+) topic we discussed\?", prompt)
        assert asked
        begun = re.findall(r"USER: I would like to discuss the topic of (.+?)\. ", prompt)
        number = _number(asked[1]) - 1
        return f"The topic was {begun[number].upper()}!"

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        return [0.0 if self.key[prompt] == option else -9.0 for option in options]

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        return [None, *(0.0 for _ in token_ids[1:])]


def _number(ordinal: str) -> int:
    """2 for "second", 12 for "12th"."""
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
    if ordinal[0].isdigit():
        return int(ordinal[:-2])
    return (*words, "tenth").index(ordinal) + 1
