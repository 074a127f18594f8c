"""Prompts that a language model goes on from with one token, and which of their words decide it.

``ioi``: indirect objects (Wang et al. 2022). Two names, one of them again: who was named once gets what is
given. The three names decide.

``agreement``: a verb agrees with its subject, past a noun of the other number (Linzen, Dupoux and Goldberg
2016). The subject decides.

``arithmetic``: a sum behind another one, with one digit to go: of numbers of one digit the sum, of numbers
of two digits, whose units do not carry, the units of the sum. The last digits of the two numbers decide.

Each prompt names another answer, that the right one is compared with: the other name, the verb of the other
number, a digit beside the right one. Names, nouns, verbs and digits are one token each of SmolLM2, so the
prompts of a task have few lengths.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping

import numpy as np

from libragrad_fx.errors import InputError

_NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "David", "Peter", "Emma", "Alice", "Mark",
    "Lucy", "Adam", "Laura", "Simon", "Kate", "Jack", "Lisa", "George", "Susan", "Michael", "Rachel",
    "Robert", "Julia", "Daniel", "Martin", "Helen", "Henry", "Jane", "Frank", "Ruth", "Charles", "Rose",
    "Ben", "Amy", "Luke",
)  # fmt: skip
_PLACES = ("store", "park", "office", "school", "house", "station")
_THINGS = ("drink", "book", "letter", "ball", "ring", "key")
_GIFTS = (
    "When {one} and {two} went to the {place}, {giver} gave a {thing} to",
    "Then, {one} and {two} had a long talk, and {giver} said goodbye to",
    "After {one} and {two} went to the {place}, {giver} handed a {thing} to",
    "While {one} and {two} were working at the {place}, {giver} gave a {thing} to",
)
_NOUNS = (
    ("key", "keys"), ("book", "books"), ("dog", "dogs"), ("child", "children"), ("teacher", "teachers"),
    ("car", "cars"), ("letter", "letters"), ("bird", "birds"), ("picture", "pictures"), ("man", "men"),
    ("woman", "women"), ("tree", "trees"), ("box", "boxes"), ("student", "students"), ("house", "houses"),
)  # fmt: skip
_VERBS = (" is", " are")
_CLAUSES = tuple(
    f"{begin} that the {{subject}} {place} the {{attractor}}"
    for begin in ("I think", "We know", "They say")
    for place in ("near", "behind", "beside")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A text without its next token.

    answer, other: the right next token, and what it is compared with
    evidence:      bool (N,), over the characters of the text: what the answer depends on
    """

    text: str
    answer: str
    other: str
    evidence: np.ndarray


def prompt(task: str, index: int, seed: int = 0) -> Prompt:
    """One prompt: the same for the same arguments.

    Raises:
        InputError: no such task, or a negative index or seed.
    """
    if task not in TASKS:
        raise InputError(f"no prompts {task!r}: choose from {', '.join(TASKS)}")
    if index < 0 or seed < 0:
        raise InputError(f"index {index} and seed {seed} of a prompt must not be negative")
    return TASKS[task](np.random.default_rng([seed, [*TASKS].index(task), index]))


def filled(template: str, words: Mapping[str, str], evidence: set[str]) -> tuple[str, np.ndarray]:
    """A template with its fields filled, and bool (N,): the characters of those that are evidence."""
    text, marks = "", list[bool]()
    for before, field, _, _ in string.Formatter().parse(template):
        for piece, mark in ((before, False), (words[field] if field else "", field in evidence)):
            text += piece
            marks += [mark] * len(piece)
    return text, np.array(marks)


def _ioi(rng: np.random.Generator) -> Prompt:
    once, giver = map(str, rng.choice(_NAMES, 2, replace=False))
    one, two = (once, giver) if rng.random() < 0.5 else (giver, once)
    words = {
        "one": one, "two": two, "giver": giver,
        "place": str(rng.choice(_PLACES)), "thing": str(rng.choice(_THINGS)),
    }  # fmt: skip
    text, evidence = filled(str(rng.choice(_GIFTS)), words, {"one", "two", "giver"})
    return Prompt(text, f" {once}", f" {giver}", evidence)


def _agreement(rng: np.random.Generator) -> Prompt:
    plural = int(rng.integers(2))
    subject, attractor = rng.choice(len(_NOUNS), 2, replace=False)
    words = {"subject": _NOUNS[subject][plural], "attractor": _NOUNS[attractor][1 - plural]}
    text, evidence = filled(str(rng.choice(_CLAUSES)), words, {"subject"})
    return Prompt(text, _VERBS[plural], _VERBS[1 - plural], evidence)


def _arithmetic(rng: np.random.Generator) -> Prompt:
    tens = rng.random() < 0.5
    (a, b, c), (d, e, f) = _sum(rng, tens), _sum(rng, tens)
    words = {"a": a[:-1], "unit": a[-1], "b": b[:-1], "other unit": b[-1], "c": c[:-1]}
    template = f"{d} + {e} = {f}. {{a}}{{unit}} + {{b}}{{other unit}} = {{c}}"
    text, evidence = filled(template, words, {"unit", "other unit"})
    right = int(c[-1])
    wrong = right - 1 if right == 9 or rng.random() < 0.5 else right + 1
    return Prompt(text, str(right), str(wrong), evidence)


def _sum(rng: np.random.Generator, tens: bool) -> tuple[str, str, str]:
    """Two numbers and their sum, none of whose digits carries."""
    whole = rng.integers(2, 10, 2)
    first = [int(rng.integers(1, n)) for n in whole]
    total, one = (int(10 * v[0] + v[1]) if tens else int(v[1]) for v in (whole, first))
    return str(one), str(total - one), str(total)


TASKS: Mapping[str, Callable[[np.random.Generator], Prompt]] = {
    "ioi": _ioi, "agreement": _agreement, "arithmetic": _arithmetic
}  # fmt: skip
