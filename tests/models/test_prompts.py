"""Texts that the zoo makes: their answers are right, and the words that decide them are marked."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libragrad_fx.demo import sentences, sources
from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Item, open_data
from zoo import heads, prompts, real, sets, topics

INDICES = st.integers(0, 10_000)
HEAD = "" if heads.weights("topics").is_file() else "python tools/train_heads.py topics"


def marked(item: Item) -> str:
    """The characters that are evidence of the label; others are spaces."""
    text = item.content
    assert isinstance(text, str)
    mask = item.masks[item.label]
    assert len(mask) == len(text)
    return "".join(c if m else " " for c, m in zip(text, mask, strict=True))


@given(INDICES)
def test_who_was_named_once_gets_what_is_given(index: int) -> None:
    item = sets.prompts("ioi").get(index)
    names = marked(item).split()
    assert len(names) == 3
    assert names[2] == str(item.against).strip()
    assert sorted(names[:2]) == sorted([names[2], str(item.label).strip()])
    assert item.label != item.against


@given(INDICES)
def test_a_verb_agrees_with_its_subject_and_not_with_the_last_noun(index: int) -> None:
    item = sets.prompts("agreement").get(index)
    (subject,) = marked(item).split()
    last = str(item.content).split()[-1]
    plural = [subject.endswith("s") or subject in ("children", "men", "women"),
              last.endswith("s") or last in ("children", "men", "women")]  # fmt: skip
    assert plural[0] != plural[1]
    assert item.label == (" are" if plural[0] else " is")
    assert {item.label, item.against} == {" is", " are"}


@given(INDICES)
def test_sums_are_right_and_do_not_carry(index: int) -> None:
    item = sets.prompts("arithmetic").get(index)
    text = f"{item.content}{item.label}"
    sums = re.findall(r"(\d+) \+ (\d+) = (\d+)", text)
    assert len(sums) == 2
    for a, b, c in sums:
        assert int(a) + int(b) == int(c)
        assert int(a[-1]) + int(b[-1]) < 10
    a, b, _ = sums[1]
    assert marked(item).split() == [a[-1], b[-1]]
    assert abs(int(str(item.label)) - int(str(item.against))) == 1


@settings(deadline=None)
@given(INDICES, st.sampled_from(["train", "val", "test"]))
def test_two_things_of_a_topic_and_one_of_another(index: int, split: str) -> None:
    item = sets.topics(split).get(index)  # pyright: ignore[reportArgumentType]
    assert isinstance(item.label, int)
    assert isinstance(item.against, int)
    things = topics._THINGS
    mine, other = (things[topics.CLASSES[c]] for c in (item.label, item.against))
    found = marked(item).split()
    assert len(found) == 2
    assert {*found} <= {*mine}
    words = set(re.findall(r"\w+", str(item.content)))
    assert len(words & {*other}) == 1
    assert len(words & {w for each in things.values() for w in each}) == 3
    assert sentences.split_of(tuple(str(item.content).split())) == split


@settings(deadline=None)
@given(INDICES)
def test_sentences_as_a_set_are_those_of_training(index: int) -> None:
    """The tokenizer gives the same ids, and evidence lies on the same words."""
    item, one = sets.sentences("val").get(index), sentences.sentence("val", index)
    ids = TOKENIZER(item.content)
    assert [*ids] == ["input_ids"]
    assert torch.equal(torch.tensor(ids["input_ids"]), sentences.encoded([one])[0, : len(one.words)])
    assert marked(item).split() == [w for w, e in zip(one.words, one.evidence, strict=True) if e]


TOKENIZER = sentences.tokenizer()


def test_sets_are_the_same_each_time_and_say_what_is_not_there() -> None:
    for load, args in ((n, {"task": t}) for n, t in (("prompts", "ioi"), ("prompts", "arithmetic"))):
        data = open_data({"load": f"zoo.sets:{load}", "args": args})
        one, again = data.get(3), pickle.loads(pickle.dumps(data)).get(3)
        assert data.peek(3) == pickle.loads(pickle.dumps(data)).peek(3)
        assert (one.content, one.label, one.against) == (again.content, again.label, again.against)
    with pytest.raises(InputError, match="no prompts 'poems': choose from ioi, agreement, arithmetic"):
        sets.prompts("poems")
    for make in (sets.sentences, sets.topics):
        with pytest.raises(InputError, match="no split 'tomorrow'"):
            make("tomorrow")
    with pytest.raises(InputError, match="must not be negative"):
        prompts.prompt("ioi", -1)


@pytest.mark.slow
@pytest.mark.skipif(bool(sources.missing("smollm2")), reason=sources.missing("smollm2"))
def test_smollm2_answers_them() -> None:
    """Each answer is one token, and is preferred to the other one."""
    model, tokenizer = real.smollm2()
    for task in prompts.TASKS:
        right = 0
        for i in range(16):
            one = prompts.prompt(task, i)
            ((answer,), (other,)) = (
                tokenizer.encode(w, add_special_tokens=False) for w in (one.answer, one.other)
            )
            with torch.no_grad():
                z = model(**tokenizer(one.text, return_tensors="pt")).logits[0, -1]
            right += bool(z[answer] > z[other])
        assert right >= 14, task


@pytest.mark.slow
@pytest.mark.skipif(bool(HEAD or sources.missing("minilm")), reason=HEAD or sources.missing("minilm"))
def test_the_head_on_minilm_knows_topics() -> None:
    model, tokenizer, data = heads.topics(), real.minilm_tokenizer(), sets.topics("test")
    items = [data.get(i) for i in range(32)]
    with torch.no_grad():
        y = model(**tokenizer([i.content for i in items], return_tensors="pt", padding=True))
    assert (y.argmax(1) == torch.tensor([i.label for i in items])).double().mean() > 0.9
