"""``rules/*.yaml`` -> ``RuleBook``: strict, and every complaint starts with ``file:line``."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from libragrad_fx.errors import RuleError
from libragrad_fx.graph.schema import op_name
from libragrad_fx.ops import TWINS
from libragrad_fx.ops.bias import BIASES
from libragrad_fx.types import Action, Box, Kind, Location, OpFacts, PolicyRow

SITES = ("value", "values", "gate", "denominator", "behind", "weights")
MOVES = ("view", "copy")
_ROWWISE = re.compile(r"-\d+|all( but (-\d+|\w+|len\(\w+\)))?")
_ARGUMENT = re.compile(r"all but (?:len\()?([a-zA-Z_]\w*)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MANY = 1000  # blocks in a range
_LISTS = ("stream", "factors", "gate", "denominator", "like", "once", "gate_outputs")
_NUMBER = (int, float)
_ADDED = {"constant": True}  # of a linear op that no test has seen: it may add something of its own
_HUGE = 1e6  # no degree, rank or value at zero comes near it; nan is not below it
_TYPES: dict[str, tuple[type, ...]] = {
    "op": (str,), "vjp": (str,), "bias": (str,), "rank": (int,), "degree": _NUMBER,
    "at_zero": _NUMBER, "slope": _NUMBER, "affine_if": (Mapping,), "unless": (Mapping,),
    "registered_by": (str,), "constant": (bool,), "moves": (str,), "rowwise": (Mapping,), "fresh": (bool,),
    "unread": (bool,), "fill": (int, float, str),
}  # fmt: skip
_BY_TWIN = {
    Kind.GATED: Action.SECANT, Kind.GATE_SOURCE: Action.SECANT, Kind.RECURRENT: Action.SECANT,
    Kind.NORMALISER: Action.FREEZE_SCALE,
}  # fmt: skip
"""What the twins of a kind do about a value that carries."""
_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
_BOX = f"{{{Action.BOX}: [low, high]}}"
_FIELDS = {f.name for f in dataclasses.fields(OpFacts)} - {"where"}


def rules_folder() -> Path:
    """The shipped rules: inside the wheel, or at the top of the checkout."""
    here = Path(__file__).resolve().parents[1]
    return next(p for p in (here / "rules", here.parent / "rules") if p.is_dir())


@dataclasses.dataclass(frozen=True)
class Place:
    """What a row may ask of the place where it is to hold.

    made:     the names of what makes the operand
    reads:    whether the op reads the model's input, moved, shifted or scaled at most
    weighted: whether it sums products of what carries with constants
    """

    module: str
    made: Iterable[str]
    reads: bool = False
    weighted: bool = False


@dataclasses.dataclass(frozen=True)
class RuleBook:
    """Facts about ops, and one policy over them."""

    facts: Mapping[str, OpFacts]
    rows: tuple[PolicyRow, ...]
    policy: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what the rules say (not of how the files are laid out), in hex."""
        facts = sorted(map(_content, self.facts.values()))  # rows of one site: the first comes first
        rows = [_content(r) for r in sorted(self.rows, key=lambda r: r.name)]
        return hashlib.sha256(json.dumps(facts + rows).encode()).hexdigest()

    def fact(self, target: Any) -> OpFacts | None:
        """The row for an ATen overload: its own if there is one, else its packet's."""
        name = op_name(target)
        return self.facts.get(name) or self.facts.get(name.rsplit(".", 1)[0])

    def row(self, kind: Kind, site: str, place: Place) -> PolicyRow | None:
        """The first row of a site that holds at a place."""
        rows = (r for r in self.rows if (r.kind, r.site) == (kind, site))
        return next((r for r in rows if _holds(r, place)), None)

    def without(self, row: PolicyRow) -> RuleBook:
        """The same book with one policy row taken out (the control that a row is needed)."""
        return dataclasses.replace(self, rows=tuple(r for r in self.rows if r != row))

    def extended(self, rules: str | Path | Iterable[Mapping[str, Any]]) -> RuleBook:
        """The same book with rows added, from a file like ``ops.yaml`` or as mappings in code.

        An added row replaces a shipped one for the same op.

        Raises:
            RuleError: a row is malformed, or names an op twice.
        """
        if isinstance(rules, (str, Path)):
            rows = _load_facts(Path(rules), _ADDED)
        elif not isinstance(rules, (list, tuple)) or not all(isinstance(r, Mapping) for r in rules):
            raise RuleError(
                f"<rules=>: rules are a YAML file or a list of mappings {{op: ..., kind: ...}}; got"
                f" {rules!r:.80}"
            )
        else:
            rows = _parse_facts(
                [(dict(r), Location("<rules=>", i + 1)) for i, r in enumerate(rules)], _ADDED
            )
        return dataclasses.replace(self, facts={**self.facts, **rows})


def load(policy: str | Path = "libra", rules: Any = None) -> RuleBook:
    """The shipped facts under ``policy`` (a shipped name or a file), with ``rules`` added.

    Raises:
        RuleError: a file is malformed (``file:line`` first) or the policy does not exist.
    """
    folder = rules_folder()
    file = Path(policy) if str(policy).endswith((".yaml", ".yml")) else folder / f"{policy}.yaml"
    try:
        known = file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        known = False
    if not known:
        looked = f" (looked in {Path.cwd()})" if file.suffix and not file.is_absolute() else ""
        raise RuleError(
            f"no policy {str(policy)!r:.80}{looked}: give one of {', '.join(policies())}, or a .yaml file"
            " that there is"
        )
    of = file, folder, file.stat().st_mtime_ns, (folder / "ops.yaml").stat().st_mtime_ns
    return _alone(*of) if rules is None else _checked(_shipped(*of).extended(rules))


def _checked(book: RuleBook) -> RuleBook:
    """``book``, whose rows are about kinds and ops that there are."""
    made = {*Kind}.union(*(fact.names for fact in book.facts.values()))
    for row in book.rows:
        if row.of and not _named(row.of, made):
            raise RuleError(
                f"{row.where}: 'of' is a kind, or an op that has a row of facts; got {row.of!r}"
            )
    return book


def policies() -> list[str]:
    """The names of the shipped policies."""
    return sorted(p.stem for p in rules_folder().glob("*.yaml") if p.stem != "ops")


def in_scope(scope: str, module: str) -> bool:
    """Whether a pattern of ``fnmatch`` holds of a module's path, or of one that holds that module.

    ``blocks.{0..3}`` holds of ``blocks.0`` to ``blocks.3``.
    """
    parts, patterns = module.split("."), _spelled_out(scope)
    paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns)


@functools.cache
def _spelled_out(scope: str) -> tuple[str, ...]:
    """The patterns that a pattern with ranges stands for."""
    if (found := _RANGE.search(scope)) is None:
        return (scope,)
    first, last = map(int, found.groups())
    head, tail = scope[: found.start()], scope[found.end() :]
    return tuple(p for n in range(first, last + 1) for p in _spelled_out(f"{head}{n}{tail}"))


def _named(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _holds(row: PolicyRow, place: Place) -> bool:
    return (
        (not row.of or _named(row.of, place.made))
        and (not row.scope or in_scope(row.scope, place.module))
        and (not row.reads or place.reads)
        and (not row.shares or place.weighted)
    )


def _hides(first: PolicyRow, row: PolicyRow) -> bool:
    """Whether ``first`` takes all sites of a row behind it."""
    asks = [(r.of, r.scope, r.reads, "weights" if r.shares else "") for r in (first, row)]
    return first.name == row.name and all(a in ("", b) for a, b in zip(*asks, strict=True))


def _content(row: OpFacts | PolicyRow) -> str:
    body = {k: v for k, v in dataclasses.asdict(row).items() if k not in ("where", "why", "cite")}
    return json.dumps(body, sort_keys=True)


@functools.lru_cache(maxsize=16)
def _shipped(file: Path, folder: Path, changed: int, ops_changed: int) -> RuleBook:
    """The shipped facts under a policy: parsed once, and again when a file changes. It takes a third of a
    second, which each transform would pay."""
    name, rows = _load_policy(file)
    return RuleBook(_shipped_facts(folder / "ops.yaml", ops_changed), rows, name)


@functools.lru_cache(maxsize=16)
def _alone(*of: Any) -> RuleBook:
    return _checked(_shipped(*of))


@functools.cache
def _shipped_facts(file: Path, changed: int) -> dict[str, OpFacts]:
    return _load_facts(file)


def _load_facts(file: Path, linear: Mapping[str, Any] | None = None) -> dict[str, OpFacts]:
    node, where = _read(file)
    if not isinstance(node, yaml.SequenceNode):
        raise RuleError(f"{where}: a facts file is a list of rows, '- {{op: ..., kind: ...}}'")
    return _parse_facts([_mapping(child, file) for child in node.value], linear)


def _load_policy(file: Path) -> tuple[str, tuple[PolicyRow, ...]]:
    node, where = _read(file)
    body, _ = _mapping(node, file, deep=False)
    optional = _construct(body.pop("optional"), where) if "optional" in body else False
    if set(body) != {"policy", "rows"} or not isinstance(body["rows"], yaml.SequenceNode):
        raise RuleError(
            f"{where}: a policy file has two keys, 'policy' (its name) and 'rows' (a list), and may have"
            " 'optional' (whether its rows are)"
        )
    rows: list[PolicyRow] = []
    for child in body["rows"].value:
        values, at = _mapping(child, file)
        row = _policy_row({"optional": optional, **values}, at)
        if first := next((r for r in rows if _hides(r, row)), None):
            raise RuleError(f"{at}: unreachable row: {row.name} is already ruled at {first.where}")
        rows.append(row)
    return str(_construct(body["policy"], where)), tuple(rows)


def _at(file: Path, line: int) -> Location:
    """A line of a file: a shipped one by the name that it has in the checkout."""
    return Location(f"rules/{file.name}" if file.parent == rules_folder() else str(file), line)


def _read(file: Path) -> tuple[yaml.Node, Location]:
    try:
        node = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise RuleError(f"{_at(file, line)}: not YAML: {e.problem}") from e
    except (yaml.YAMLError, RecursionError) as e:
        raise RuleError(f"{_at(file, 1)}: not YAML: {e}") from e
    except (OSError, ValueError) as e:  # a name that no file can have, bytes that are no text
        raise RuleError(f"{_at(file, 1)}: cannot be read: {e}") from e
    if node is None:
        raise RuleError(f"{_at(file, 1)}: the file is empty")
    return node, _at(file, node.start_mark.line + 1)


def _mapping(node: yaml.Node, file: Path, deep: bool = True) -> tuple[dict[str, Any], Location]:
    """One YAML mapping with its line; a key given twice is an error (PyYAML would keep the last)."""
    where = _at(file, node.start_mark.line + 1)
    if not isinstance(node, yaml.MappingNode):
        raise RuleError(f"{where}: expected a mapping '{{key: value, ...}}'")
    found: dict[str, Any] = {}
    for key_node, value in node.value:
        key = str(_construct(key_node, where))
        if key in found:
            raise RuleError(f"{where}: key {key!r} is given twice")
        found[key] = _construct(value, where) if deep else value
    return found, where


def _construct(node: yaml.Node, where: Location) -> Any:
    """The value of a YAML node; a tag may ask for what its text is not (``!!int x``)."""
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except _UNREADABLE as e:
        raise RuleError(f"{where}: cannot be read: {e}") from e


def _parse_facts(
    items: Iterable[tuple[dict[str, Any], Location]], linear: Mapping[str, Any] | None = None
) -> dict[str, OpFacts]:
    """linear: what a row of kind linear says where it does not say otherwise."""
    facts: dict[str, OpFacts] = {}
    for values, where in items:
        if linear and values.get("kind") == Kind.LINEAR.value:
            values = {**linear, **values}
        row = _fact_row(values, where)
        if row.op in facts:
            raise RuleError(f"{where}: {row.op} already has a row at {facts[row.op].where}")
        facts[row.op] = row
    return facts


def _fact_row(values: dict[str, Any], where: Location) -> OpFacts:
    needed = {"op", "kind", "why"}
    _keys(values, _FIELDS, needed, where)
    lists = {k: tuple(values[k]) for k in _LISTS if isinstance(values.get(k), (list, tuple))}
    for key in set(_LISTS) & set(values) - set(lists):
        raise RuleError(f"{where}: {key!r} must be a list, got {values[key]!r}")
    for key, found in lists.items():
        wanted = int if key == "gate_outputs" else str
        if not all(isinstance(v, wanted) and not isinstance(v, bool) for v in found):
            raise RuleError(f"{where}: {key!r} must be a list of {wanted.__name__}, got {values[key]!r}")
    for key, types in _TYPES.items():
        number = types != (bool,) and isinstance(values.get(key), _NUMBER)
        if number and (isinstance(values[key], bool) or not abs(values[key]) < _HUGE):
            raise RuleError(f"{where}: {key!r} must be a finite number, got {values[key]!r:.40}")
        if key == "degree" and values.get(key) == 0:
            raise RuleError(f"{where}: an op of degree 0 is of kind cut or gate_source")
        if not isinstance(values.get(key), (*types, type(None))) or values.get("op") is None:
            wanted = " or ".join(t.__name__ for t in types)
            raise RuleError(f"{where}: {key!r} must be of type {wanted}, got {values.get(key)!r}")
    said = {k: v for k, v in values.items() if v is not None or k in needed}  # null is not said
    rest = {k: v for k, v in said.items() if k not in _LISTS}
    row = OpFacts(**{**rest, **lists, "kind": _enum(Kind, values["kind"], where), "where": where})
    _check_schema(row)
    if row.vjp is not None and row.vjp not in TWINS:
        raise RuleError(f"{where}: no balanced vjp {row.vjp!r}; there are {', '.join(sorted(TWINS))}")
    if row.slope is not None and (row.vjp is not None or len(row.operands) != 1 or not row.stream):
        raise RuleError(
            f"{where}: 'slope' makes the twin of a function of one value: name its operand as stream, no"
            " other, and no 'vjp'"
        )
    if row.moves not in (None, *MOVES):
        raise RuleError(f"{where}: 'moves' is {' or '.join(MOVES)}, got {row.moves!r}")
    for key, axes in row.rowwise.items():
        if not _ROWWISE.fullmatch(str(axes)):
            raise RuleError(
                f"{where}: 'rowwise' says of {key} which axes: -2, all, 'all but -1', 'all but dim' or"
                f" 'all but len(normalized_shape)'; got {axes!r}"
            )
    if row.bias not in BIASES:
        raise RuleError(f"{where}: no bias {row.bias!r}; there are {', '.join(sorted(BIASES))}")
    if row.constant and row.kind is not Kind.LINEAR:
        raise RuleError(
            f"{where}: 'constant' is for linear ops; of a {row.kind} op, 'bias' says what it adds"
        )
    if not row.operands and row.kind is not Kind.CUT:
        raise RuleError(f"{where}: {row.op} names no operand (stream, factors, gate or denominator)")
    return row


def _check_schema(row: OpFacts) -> None:
    """Every op named must exist and every argument named must be one of its tensors'."""
    namespace, _, rest = row.op.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(torch.ops, namespace), packet)
        overloads = [getattr(found, overload or o) for o in ([overload] if overload else found.overloads())]
    except AttributeError as e:
        if row.registered_by is not None and re.fullmatch(r"\w+\.\w+(\.\w+)?", row.op):
            return  # of a library that is not in use: no graph holds it
        raise RuleError(
            f"{row.where}: no op {row.op} is registered in this process: write it as namespace.name"
            " (mylib.fold), and import what registers it first"
        ) from e
    arguments: dict[str, str] = {}
    for a in (a for o in overloads for a in o._schema.arguments):
        arguments[a.name] = f"{arguments.get(a.name, '')} {a.type}".strip()
    for name in (*row.operands, *row.like):
        kind = arguments.get(name, "Tensor")
        if not any(tensor in kind for tensor in ("Tensor", "Scalar", "number", "float")):
            raise RuleError(f"{row.where}: {name!r} of {row.op} is no tensor but {kind}")
    filled = [row.fill] if isinstance(row.fill, str) else []
    told = [n for axes in row.rowwise.values() for n in _ARGUMENT.findall(str(axes))]
    named = (*row.affine_if, *row.unless, *row.rowwise, *told, *filled)
    for name in (*row.operands, *row.like, *row.once, *named):
        if name not in arguments:
            raise RuleError(
                f"{row.where}: {row.op} has no argument {name!r}; it has {', '.join(sorted(arguments))}"
            )


def _policy_row(values: dict[str, Any], where: Location) -> PolicyRow:
    needed = {"kind", "site", "action", "cite"}
    _keys(values, needed | {"of", "where", "reads", "optional"}, needed, where)
    site, of, scope, reads, optional = (
        values.get(k, "") for k in ("site", "of", "where", "reads", "optional")
    )
    if site not in SITES:
        raise RuleError(f"{where}: site {site!r} is none of {', '.join(SITES)}")
    if not (isinstance(of, str) and isinstance(scope, str) and isinstance(optional, bool)):
        raise RuleError(f"{where}: 'of' and 'where' are text, 'optional' is true or false")
    if reads not in ("", "input"):
        raise RuleError(
            f"{where}: 'reads' is input: the row holds for ops that read that; got {reads!r:.40}"
        )
    for first, last in _RANGE.findall(scope):
        if not 0 <= int(last) - int(first) < _MANY:
            raise RuleError(f"{where}: {{{first}..{last}}} is no range from a number to a higher one")
    kind, (action, number, box) = _enum(Kind, values["kind"], where), _action(values["action"], where)
    if kind is Kind.CUT:
        raise RuleError(f"{where}: unreachable row: no gradient passes a cut")
    if action is Action.CUT:
        raise RuleError(f"{where}: a cut is a fact about an op, not a policy: stop is what you want")
    said = _BOX if box else action if number is None else f"{{{action}: number}}"
    if said not in (able := _actions(kind, site)):
        raise RuleError(
            f"{where}: {said} cannot be done to {kind}/{site}: give {' or '.join(able) or 'another site'}"
        )
    if of and (kind, site) == (Kind.ATTENTION, "gate"):
        raise RuleError(f"{where}: q and k of fused attention have one row, whatever they are made of")
    if not of and (site, action) == ("values", Action.STOP):
        raise RuleError(f"{where}: of values that multiply, say with 'of' which to stop")
    if box and not reads:
        raise RuleError(f"{where}: a box is the range of the model's input: add 'reads: input'")
    return PolicyRow(
        kind, site, action, str(values["cite"]), where, number, of, scope, optional, box, reads
    )


def _action(value: Any, where: Location) -> tuple[Action, float | None, Box | None]:
    """An action, its number or its box: ``stop``, ``{scale: 0.25}``, ``{box: [-1, 1]}``."""
    if not isinstance(value, Mapping):
        return _enum(Action, value, where), None, None
    if len(value) != 1:
        raise RuleError(f"{where}: an action has one number, '{{scale: 0.25}}'; got {value!r:.80}")
    ((name, number),) = value.items()
    if name == Action.BOX:
        return Action.BOX, None, _box(number, where)
    above = name in (Action.TEMPER, Action.GAMMA)
    if not _is_number(number) or number == 0 or (above and number < 0):
        least = "be above 0" if above else "not be 0"
        raise RuleError(f"{where}: the number of {name!r} must be finite and {least}; got {number!r:.40}")
    return _enum(Action, name, where), float(number), None


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and abs(value) < _HUGE


def _box(value: Any, where: Location) -> Box:
    """The lowest and the highest value of the input: ``[-1, 1]``, or a list of each, by channel."""
    ends = [e if isinstance(e, list) else [e] for e in value] if isinstance(value, list) else []
    fits = (
        len(ends) == 2 and len(ends[0]) == len(ends[1]) > 0 and all(map(_is_number, [*ends[0], *ends[1]]))
    )
    if not fits or not all(low < high for low, high in zip(*ends, strict=True)):
        raise RuleError(
            f"{where}: a box is [low, high], two numbers, or two lists of as many numbers as channels, each"
            f" low below its high; got {value!r:.80}"
        )
    low, high = (tuple(map(float, e)) for e in ends)
    return low, high


def _actions(kind: Kind, site: str) -> list[str]:
    """What a plan can do about a site, as it is spelled."""
    product, scaled, tempered = (
        kind is Kind.PRODUCT,
        f"{{{Action.SCALE}: number}}",
        f"{{{Action.TEMPER}: number}}",
    )
    if site == "denominator":
        return [Action.KEEP, Action.STOP]
    if site == "gate":
        return [Action.KEEP, Action.STOP, scaled, *([Action.SCALE] if product else [])]
    if site == "weights":
        return [Action.KEEP, tempered] if kind is Kind.ATTENTION else []
    found: list[str] = [Action.KEEP, *([_BY_TWIN[kind]] if kind in _BY_TWIN else [])]
    if site == "values":
        found += [Action.STOP] if product else []
    if site == "values" or (product and site == "behind"):
        found += [Action.SCALE, scaled]
    found += [scaled] if (kind, site) == (Kind.ATTENTION, "value") else []
    found += [Action.Z_PLUS, f"{{{Action.GAMMA}: number}}", _BOX] if product and site == "value" else []
    return found + ([tempered] if (kind, site) == (Kind.GATE_SOURCE, "behind") else [])


def _keys(values: dict[str, Any], known: set[str], required: set[str], where: Location) -> None:
    if unknown := set(values) - known:
        raise RuleError(
            f"{where}: unknown key {', '.join(sorted(map(str, unknown)))};"
            f" known are {', '.join(sorted(known))}"
        )
    if missing := required - set(values):
        raise RuleError(f"{where}: missing key {', '.join(sorted(missing))}")


def _enum(cls: Any, value: Any, where: Location) -> Any:
    try:
        return cls(value)
    except ValueError as e:
        raise RuleError(f"{where}: {value!r} is none of {', '.join(c.value for c in cls)}") from e
