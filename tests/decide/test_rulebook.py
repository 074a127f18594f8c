# ruff: noqa: E501 - one case a line
"""The loader is strict: whatever is wrong with a rules file, the message says ``file:line``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libragrad_fx.decide import rulebook
from libragrad_fx.errors import RuleError
from libragrad_fx.types import Kind

GOOD = "- {op: aten.relu, kind: homogeneous, stream: [self], why: w}\n"

# name: (text of the file, line that the error must name, words that it must say)
BAD_FACTS = {
    "unknown key": (GOOD + "- {op: aten.abs, kind: linear, stream: [self], why: w, colour: 1}", 2, "colour"),
    "missing key": ("- {op: aten.abs, kind: linear, stream: [self]}", 1, "missing key why"),
    "duplicate op": (GOOD + "# a comment\n" + GOOD, 3, "already has a row"),
    "unknown op": ("- {op: aten.no_such_op, kind: linear, stream: [self], why: w}", 1, "no_such_op"),
    "unknown overload": ("- {op: aten.add.Nope, kind: linear, stream: [self], why: w}", 1, "Nope"),
    "unknown namespace": ("- {op: nowhere.add, kind: linear, stream: [self], why: w}", 1, "nowhere"),
    "op without a packet": ("- {op: relu, kind: linear, stream: [self], why: w}", 1, "relu"),
    "op that is no name": ("- {op: 3, kind: linear, stream: [self], why: w}", 1, "op"),
    "unknown argument": (GOOD + "\n- {op: aten.abs, kind: linear, stream: [x], why: w}", 3, "'x'"),
    "argument that is no name": ("- {op: aten.abs, kind: linear, stream: [3], why: w}", 1, "3"),
    "unknown vjp": ("- {op: aten.abs, kind: gated, stream: [self], vjp: nope, why: w}", 1, "nope"),
    "unknown bias": ("- {op: aten.abs, kind: linear, stream: [self], bias: nope, why: w}", 1, "nope"),
    "vjp that is no name": ("- {op: aten.abs, kind: gated, stream: [self], vjp: [a], why: w}", 1, "vjp"),
    "bias that is no name": ("- {op: aten.abs, kind: linear, stream: [self], bias: {}, why: w}", 1, "bias"),
    "unknown kind": ("- {op: aten.abs, kind: bendy, stream: [self], why: w}", 1, "bendy"),
    "kind that is no word": ("- {op: aten.abs, kind: [linear], stream: [self], why: w}", 1, "linear"),
    "list expected": ("- {op: aten.abs, kind: linear, stream: self, why: w}", 1, "must be a list"),
    "rank that is no number": ("- {op: aten.abs, kind: linear, stream: [self], rank: high, why: w}", 1, "rank"),
    "at_zero that is no number": ("- {op: aten.abs, kind: linear, stream: [self], at_zero: x, why: w}", 1, "at_zero"),
    "affine_if that is no mapping": ("- {op: aten.abs, kind: linear, stream: [self], affine_if: 1, why: w}", 1, "affine_if"),
    "no operand": ("- {op: aten.abs, kind: linear, why: w}", 1, "names no operand"),
    "key twice": (GOOD + "- {op: aten.abs, kind: linear, kind: cut, why: w}", 2, "given twice"),
    "not YAML": (GOOD + "- {op: [", 2, "not YAML"),
    "a control character": ("- \x01", 1, "not YAML"),
    "an alias to nothing": (GOOD + "- *nowhere", 2, "not YAML"),
    "an impossible value": ("- {op: aten.abs, kind: linear, why: !!int x, stream: [self]}", 1, ""),
    "empty": ("", 1, "empty"),
    "only a comment": ("# nothing\n", 1, "empty"),
    "not a list": ("op: aten.relu", 1, "list of rows"),
    "row that is no mapping": (GOOD + "- relu", 2, "expected a mapping"),
}  # fmt: skip


def assert_names_place(error: RuleError, file: Path, line: int, words: str) -> None:
    text = str(error)
    assert text.startswith(f"{file}:{line}: "), text
    assert words in text


@pytest.mark.parametrize("name", BAD_FACTS)
def test_bad_facts(name: str, tmp_path: Path) -> None:
    text, line, words = BAD_FACTS[name]
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(RuleError) as caught:
        rulebook.load(rules=file)
    assert_names_place(caught.value, file, line, words)




def _row(kind: str, site: str, action: str, more: str = "optional: true") -> str:
    return f"- {{kind: {kind}, site: {site}, action: {action}, cite: c, {more}}}"


DOWN, ENDLESS = "where: 'b.{3..1}'", "where: 'b.{0..99999999}'"
ROW = "{kind: linear, site: value, action: keep, cite: c}"
BAD_POLICIES = {
    "unknown key": (f"policy: p\nrows:\n- {ROW}\n- {{kind: gated, site: gate, action: stop, cite: c, x: 1}}", 4, "x"),
    "missing key": ("policy: p\nrows:\n- {kind: linear, site: value, action: keep}", 3, "cite"),
    "unknown kind": ("policy: p\nrows:\n- {kind: bendy, site: value, action: keep, cite: c}", 3, "bendy"),
    "unknown action": ("policy: p\nrows:\n- {kind: linear, site: value, action: sing, cite: c}", 3, "sing"),
    "unknown site": ("policy: p\nrows:\n- {kind: linear, site: nowhere, action: keep, cite: c}", 3, "nowhere"),
    "site that is no word": ("policy: p\nrows:\n- {kind: linear, site: [gate], action: keep, cite: c}", 3, "gate"),
    "an action that the kind cannot": (
        "policy: p\nrows:\n- {kind: attention, site: value, action: scale, cite: c}", 3,
        "scale cannot be done to attention/value: give keep",
    ),
    "an action that the site cannot": (
        "policy: p\nrows:\n- {kind: gated, site: gate, action: secant, cite: c}", 3, "give keep or stop",
    ),
    "unreachable row": (f"policy: p\nrows:\n- {ROW}\n- {ROW}", 4, "unreachable"),
    "a rule for cuts": ("policy: p\nrows:\n- {kind: cut, site: value, action: keep, cite: c}", 3, "unreachable"),
    "a cut as a policy": ("policy: p\nrows:\n- {kind: linear, site: value, action: cut, cite: c}", 3, "a fact about"),
    "key twice": ("policy: p\nrows:\n- {kind: linear, kind: linear, site: value, action: keep, cite: c}", 3, "given twice"),
    "top key twice": ("policy: p\npolicy: q\nrows: []", 1, "given twice"),
    "rows that are no list": ("policy: p\nrows: 3", 1, "rows"),
    "a number that is none": (f"policy: p\nrows:\n- {ROW}\n{_row('attention', 'gate', '{scale: x}')}", 4, "number of 'scale'"),
    "a number that is not finite": (f"policy: p\nrows:\n{_row('attention', 'gate', '{scale: .inf}')}", 3, "finite"),
    "a number that is true": (f"policy: p\nrows:\n{_row('attention', 'gate', '{scale: true}')}", 3, "finite"),
    "a number that stops": (f"policy: p\nrows:\n{_row('attention', 'gate', '{scale: 0}')}", 3, "not be 0"),
    "two numbers": (f"policy: p\nrows:\n{_row('attention', 'gate', '{scale: 1, temper: 2}')}", 3, "one number"),
    "no number": (f"policy: p\nrows:\n{_row('attention', 'gate', '{}')}", 3, "one number"),
    "a number for keep": (f"policy: p\nrows:\n{_row('attention', 'gate', '{keep: 2}')}", 3, "{keep: number} cannot be done"),
    "a temperature of nothing": (f"policy: p\nrows:\n{_row('attention', 'weights', '{temper: -2}')}", 3, "above 0"),
    "a temperature without a number": (f"policy: p\nrows:\n{_row('attention', 'weights', 'temper')}", 3, "give keep or {temper: number}"),
    "a temperature for a value": (f"policy: p\nrows:\n{_row('gated', 'value', '{temper: 2}')}", 3, "give keep or secant"),
    "gamma of a sum": (f"policy: p\nrows:\n{_row('linear', 'value', '{gamma: 1}')}", 3, "{gamma: number} cannot be done to linear/value: give keep"),
    "gamma of several values": (f"policy: p\nrows:\n{_row('product', 'values', '{gamma: 1}')}", 3, "give keep"),
    "a negative gamma": (f"policy: p\nrows:\n- {ROW}\n{_row('product', 'value', '{gamma: -0.5}')}", 4, "finite and be above 0"),
    "an infinite gamma": (f"policy: p\nrows:\n{_row('product', 'value', '{gamma: .inf}')}", 3, "finite and be above 0"),
    "a gamma without a number": (f"policy: p\nrows:\n{_row('product', 'value', 'gamma')}", 3, "z_plus or {gamma: number}"),
    "a box of what is not the input": (f"policy: p\nrows:\n{_row('product', 'value', '{box: [0, 1]}')}", 3, "add 'reads: input'"),
    "a box upside down": (f"policy: p\nrows:\n{_row('product', 'value', '{box: [1, 0]}', 'reads: input')}", 3, "each low below its high"),
    "a box with one channel upside down": (
        f"policy: p\nrows:\n{_row('product', 'value', '{box: [[0, 0], [1, 0]]}', 'reads: input')}", 3, "each low below its high",
    ),
    "a box of one number": (f"policy: p\nrows:\n{_row('product', 'value', '{box: 1}', 'reads: input')}", 3, "[low, high]"),
    "a box without numbers": (f"policy: p\nrows:\n{_row('product', 'value', '{box: [[], []]}', 'reads: input')}", 3, "[low, high]"),
    "a box that is not finite": (f"policy: p\nrows:\n{_row('product', 'value', '{box: [0, .inf]}', 'reads: input')}", 3, "[low, high]"),
    "a box of other lengths": (f"policy: p\nrows:\n{_row('product', 'value', '{box: [[0, 0], [1, 1, 1]]}', 'reads: input')}", 3, "[low, high]"),
    "a box elsewhere": (f"policy: p\nrows:\n{_row('gated', 'value', '{box: [0, 1]}', 'reads: input')}", 3, "{box: [low, high]} cannot be done"),
    "what is not the input": (f"policy: p\nrows:\n{_row('linear', 'value', 'keep', 'reads: output')}", 3, "'reads' is input"),
    "reads that is no text": (f"policy: p\nrows:\n{_row('linear', 'value', 'keep', 'reads: [input]')}", 3, "'reads' is input"),
    "a range that goes down": (f"policy: p\nrows:\n{_row('linear', 'value', 'keep', DOWN)}", 3, "{3..1} is no range"),
    "a range without end": (f"policy: p\nrows:\n{_row('linear', 'value', 'keep', ENDLESS)}", 3, "is no range"),
    "made by no op of a pattern": (f"policy: p\nrows:\n{_row('product', 'gate', 'keep', 'of: aten.softmix*')}", 3, "aten.softmix*"),
    "a second box": (
        f"policy: p\nrows:\n{_row('product', 'value', 'z_plus', 'reads: input')}\n{_row('product', 'value', '{box: [0, 1]}', 'reads: input')}",
        4, "unreachable",
    ),
    "q and k by 1/n": (f"policy: p\nrows:\n{_row('attention', 'gate', 'scale')}", 3, "{scale: number}"),
    "weights of what has none": (f"policy: p\nrows:\n{_row('linear', 'weights', 'keep')}", 3, "give another site"),
    "a scope that is no text": (f"policy: p\nrows:\n{_row('linear', 'value', 'keep', 'where: 3')}", 3, "'where'"),
    "an operand that is no text": (f"policy: p\nrows:\n{_row('product', 'gate', 'keep', 'of: [a]')}", 3, "'of'"),
    "made by no op": (f"policy: p\nrows:\n- {ROW}\n{_row('product', 'gate', 'keep', 'of: aten.softmix')}", 4, "aten.softmix"),
    "q or k alone": (f"policy: p\nrows:\n{_row('attention', 'gate', 'keep', 'of: aten.softmax')}", 3, "one row"),
    "every factor stopped": (f"policy: p\nrows:\n{_row('product', 'values', 'stop')}", 3, "say with 'of'"),
    "optional that is no truth": (f"policy: p\nrows:\n{_row('linear', 'value', 'keep', 'optional: maybe')}", 3, "true or false"),
    "all optional, no truth": (f"policy: p\noptional: 3\nrows:\n- {ROW}", 4, "true or false"),
    "a narrow row behind a wide one": (
        f"policy: p\nrows:\n- {ROW}\n{_row('linear', 'value', 'keep', 'where: blocks')}", 4, "unreachable",
    ),
    "a narrow row twice": (
        f"policy: p\nrows:\n{_row('linear', 'value', 'keep', 'where: a')}\n{_row('linear', 'value', 'keep', 'where: a, of: linear')}",
        4, "unreachable",
    ),
    "a key too many": (f"policy: p\nextra: 1\nrows:\n- {ROW}", 1, "two keys"),
    "no name": (f"rows:\n- {ROW}", 1, "two keys"),
    "not a mapping": (f"- {ROW}", 1, "expected a mapping"),
    "not YAML": ("policy: p\nrows: [", 2, "not YAML"),
    "empty": ("", 1, "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_POLICIES)
def test_bad_policies(name: str, tmp_path: Path) -> None:
    text, line, words = BAD_POLICIES[name]
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(RuleError) as caught:
        rulebook.load(file)
    assert_names_place(caught.value, file, line, words)


def test_unknown_policy_lists_the_known() -> None:
    with pytest.raises(RuleError, match=r"no policy 'nope'.*ali_lrp, .*gim, libra, "):
        rulebook.load("nope")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="no policy"):
        rulebook.load(tmp_path / "gone.yaml")
    with pytest.raises(RuleError, match=f"^{re.escape(str(tmp_path))}.*:1: cannot be read"):
        rulebook.load(rules=tmp_path / "gone.yaml")


def test_not_text(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_bytes(b"\xff\xfe\x00- relu")
    with pytest.raises(RuleError, match=":1: cannot be read"):
        rulebook.load(rules=file)


SIGNS = "[]{}:-,'\"#*&!|>?%@~\n\t"
TOKENS = (
    "op kind why stream aten.relu linear self 1 .nan 2024-01-01 !!int !!binary !!set << null true"
)
WORDS = st.sampled_from([*SIGNS, *TOKENS.split()])
GARBAGE = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=16).map(" ".join))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=GARBAGE)
def test_garbage_raises_nothing_but_rule_errors(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text, "utf-8", errors="replace")
    for read in (rulebook._load_facts, rulebook._load_policy):
        try:
            read(file)
        except RuleError as e:
            assert str(e).startswith(f"{file}:")  # noqa: PT017 - an accepted file is no failure


def test_digest_follows_content_and_not_layout() -> None:
    book = rulebook.load()
    relu = {"op": "aten.relu", "kind": "homogeneous", "stream": ["self"], "why": "another reason"}
    assert book.extended([relu]).digest == book.digest
    assert book.extended([{**relu, "kind": "linear"}]).digest != book.digest
    assert rulebook.load("cp_lrp").digest != book.digest
    assert book.without(book.rows[0]).digest != book.digest


def test_digest_ignores_comments(tmp_path: Path) -> None:
    source = (rulebook.rules_folder() / "libra.yaml").read_text()
    file = tmp_path / "libra.yaml"
    file.write_text("# a comment\n\n" + source)
    assert rulebook.load(file).digest == rulebook.load().digest
    file.write_text(source.replace("action: scale", "action: keep"))
    assert rulebook.load(file).digest != rulebook.load().digest


def test_extended_by_mappings_and_by_a_file(tmp_path: Path) -> None:
    row = {"op": "aten.renorm", "kind": "homogeneous", "stream": ["self"], "why": "w"}
    file = tmp_path / "more.yaml"
    file.write_text("# mine\n- {op: aten.renorm, kind: homogeneous, stream: [self], why: w}\n")
    book = rulebook.load()
    assert "aten.renorm" not in book.facts
    by_mapping, by_file = book.extended([row]), book.extended(file)
    assert by_mapping.facts["aten.renorm"].kind is Kind.HOMOGENEOUS
    assert by_mapping.digest == by_file.digest == rulebook.load(rules=[row]).digest != book.digest
    assert str(by_file.facts["aten.renorm"].where) == f"{file}:2"
    assert "aten.renorm" not in book.facts


def test_extended_replaces_a_shipped_row_but_not_its_own() -> None:
    row = {"op": "aten.relu", "kind": "linear", "stream": ["self"], "why": "w"}
    assert rulebook.load().extended([row]).facts["aten.relu"].kind is Kind.LINEAR
    with pytest.raises(RuleError, match=r"^<rules=>:2: .*already has a row at <rules=>:1"):
        rulebook.load().extended([row, row])


def test_a_bad_mapping_in_code_says_which() -> None:
    with pytest.raises(RuleError, match=r"^<rules=>:2: unknown key"):
        rulebook.load(rules=[{"op": "aten.relu", "kind": "cut", "why": "w"}, {"opp": 1}])


def test_null_is_as_if_it_were_not_said() -> None:
    row = {"op": "aten.relu", "kind": "homogeneous", "stream": ["self"], "why": "w"}
    nulls = dict.fromkeys(("rowwise", "fresh", "degree", "vjp"))
    plain, with_nulls = (rulebook.load(rules=[r]).facts["aten.relu"] for r in (row, row | nulls))
    assert with_nulls == plain


def test_an_overload_row_comes_before_its_packet() -> None:
    import torch

    book = rulebook.load()
    found = book.fact(torch.ops.aten.clamp.Tensor)
    assert found is not None
    assert found.op == "aten.clamp.Tensor"
    assert book.fact(torch.ops.aten.clamp.default).op == "aten.clamp"  # type: ignore[union-attr]
    assert book.fact(torch.ops.aten.bincount.default) is None
