"""Exported program -> ``Trace``: a functional graph in the normal form, to call like the model.

The normal form keeps every op that computes, node for node. Three things differ from the exported graph, so
that it runs as the model does: parameters are looked up as attributes, arguments and outputs have their
original structure, and some ops are replaced by equal ones (``ops.spelling``).
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from libragrad_fx.capture.context import Call
from libragrad_fx.capture.export import Capture, size_of
from libragrad_fx.errors import CaptureError, ExportError
from libragrad_fx.graph.origin import origin, source_line
from libragrad_fx.module.captured import LOOKUPS, CapturedModule, Record
from libragrad_fx.module.shells import Structure, shell_tree
from libragrad_fx.ops import insert, places
from libragrad_fx.ops.spelling import COPY_INTO, Writer, says_nothing, written
from libragrad_fx.types import ArgSpec, ModuleCall, Trace

_CONSTANT_TYPES = (int, float, bool, str, type(None), torch.dtype, torch.device)
_BUILTIN_NODES = (tuple, list, dict, type(None))


def normalize(model: torch.nn.Module, captured: Capture) -> Trace:
    """Build the normal form of ``captured`` on shells of ``model``'s modules.

    Raises:
        CaptureError: the program writes into its inputs.
        ExportError: it holds sub-graphs (``cond``, ``scan``).
    """
    return _Normaliser(model, captured).run()


class _Normaliser:
    """One pass over the exported graph.

    env:   by name of an exported node, the new graph's node
    pins:  source lines that name a float dtype
    marks: by module call, its marked tensors by place (``a0``, ``o0``)
    after: by module call, the last node before its mark
    """

    def __init__(self, model: torch.nn.Module, captured: Capture) -> None:
        self.model, self.captured = model, captured
        self.program = captured.program
        self.graph = Graph()
        self.env: dict[str, Any] = {}
        self.pins: list[str] = []
        self.specs: list[ArgSpec] = []
        self.guards: list[Node] = []
        self.marks: dict[int, dict[str, Node]] = {}
        self.after: dict[int, Node] = {}
        self.root = torch.nn.Module()
        self.root.__dict__.update(vars(_root_shell(model)))
        self.last: Node | None = None

    def run(self) -> Trace:
        self._inputs()
        self._parameters()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._op(node)
            elif node.op == "get_attr":
                raise ExportError(
                    f"the graph holds a sub-graph ({', '.join(str(u.target) for u in node.users)});"
                    " control flow as a higher-order op is not handled: use torch.where"
                )
        self._outputs()
        calls = tuple(filter(None, (self._call(i, c) for i, c in enumerate(self.captured.calls))))
        _drop_unused_lookups(self.graph, calls)
        forced = tuple(sorted(self.captured.forced))
        kind = type(self.model) if any(hasattr(type(self.model), name) for name in LOOKUPS) else None
        record = Record(self.model.training, tuple(dict.fromkeys(self.pins)), forced, container=kind)
        module = CapturedModule(self.root, self.graph, record)
        return Trace(module, tuple(self.specs), calls, self.captured.notes)

    # --- arguments

    def _inputs(self) -> None:
        """Placeholders named like ``forward``'s parameters; tensors inside containers are looked up."""
        given = [s for s in self.program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        parameters = list(inspect.signature(self.model.forward).parameters.values())
        training = self.graph.create_node("get_attr", "training", name="training")
        values = {s.name: s.meta.get("val") for s in self.program.graph.nodes if s.op == "placeholder"}
        by_param: dict[str, list[tuple[Any, Any, Any]]] = {
            name: [] for name in _passed(parameters, self.captured.args, self.captured.kwargs)
        }
        leaves = pytree.tree_flatten_with_path((self.captured.args, dict(self.captured.kwargs)))[0]
        for spec, (path, leaf) in zip(given, leaves, strict=True):
            name, keys = _parameter(parameters, path)
            by_param[name].append((keys, leaf, spec.arg))
        placeholders = self._placeholders(by_param)
        self._structures(placeholders, parameters)
        for name, found in by_param.items():
            for keys, leaf, arg in found:
                value: Any = placeholders[name]
                for key in keys:
                    value = self._look_up(value, key)
                text = name + "".join(map(str, keys))
                if isinstance(leaf, torch.Tensor):
                    mode = (training, self.model.training)
                    self.env[arg.name] = self._guard(value, text, values[arg.name], mode)
                elif isinstance(arg, ConstantArgument) and isinstance(leaf, _CONSTANT_TYPES):
                    self.graph.call_function(insert.constant, (value, text, leaf))
                else:
                    raise CaptureError(f"{text} is a {type(leaf).__name__}: not a tensor, not a constant")
        self._sizes()

    def _structures(
        self, placeholders: Mapping[str, Node], parameters: Sequence[inspect.Parameter]
    ) -> None:
        """Guard the containers: a missing entry could not be looked up, another one would be ignored."""
        passed = _passed(parameters, self.captured.args, self.captured.kwargs)
        stars = {p.name: "*" for p in parameters if p.kind is p.VAR_POSITIONAL}
        for name, value in passed.items():
            if name in placeholders and (text := insert.outline(value)) != "*":
                facts = (placeholders[name], stars.get(name, "") + name, text)
                self.graph.call_function(insert.structure, facts)

    def _sizes(self) -> None:
        """One node that checks export's conditions on the free sizes of the inputs."""
        conditions, names, labels, values = [*self.captured.conditions], [], [], []
        for spec, node in zip(self.specs, self.guards, strict=True):
            for axis, size in enumerate(spec.shape):
                if isinstance(size, int):
                    continue
                name = size if size.isidentifier() and size not in names else f"size{len(names)}"
                if name != size:  # a size that occurs twice, or a formula of other sizes
                    conditions.append(f"{name} == {size}")
                names.append(name)
                labels.append(f"{spec.path}.shape[{axis}]")
                values.append((node, axis))
        if conditions:
            found = [self._size(*v) for v in values]
            facts = (tuple(conditions), tuple(names), tuple(labels))
            self.graph.call_function(insert.sizes, (*facts, *found))

    def _size(self, node: Node, axis: int) -> Node:
        size = self.graph.call_function(places.SIZE, (node, axis))
        size.meta["val"] = node.meta["val"].shape[axis]
        return size

    def _placeholders(self, used: Mapping[str, Any]) -> dict[str, Node]:
        """One placeholder for each parameter of ``forward``, in its order, with its default. A guard checks
        that unused ones keep their default. If Python needs a default and there is none, or generated code
        cannot spell it, the default is None, which the guard of a used argument refuses."""
        found: dict[str, Node] = {}
        unused: list[tuple[str, Any]] = []
        optional = False
        parameters = inspect.signature(self.model.forward).parameters
        order = [*parameters.values()]
        for extra in (n for n in used if n not in parameters):
            order.append(inspect.Parameter(extra, inspect.Parameter.KEYWORD_ONLY))
        fixed = [p.replace(default=False) if p.name in self.captured.forced else p for p in order]
        for p in fixed:
            if p.kind is p.VAR_POSITIONAL:
                found[p.name] = self.graph.create_node("placeholder", f"*{p.name}", name=p.name)
                if p.name not in used:
                    facts = (found[p.name], f"*{p.name}", insert.outline(()))
                    self.graph.call_function(insert.structure, facts)
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            given = p.default is not p.empty
            given = given or p.name not in parameters  # a keyword of **kwargs may be left out
            default = (p.default if _has_default(p) else None,) if given or optional else ()
            optional = optional or bool(default)
            if default or p.name in used:
                found[p.name] = self.graph.create_node("placeholder", p.name, default, name=p.name)
            if default and p.name not in used:
                unused.append((p.name, *default))
        for name, value in unused:
            self.graph.call_function(insert.constant, (found[name], name, value))
        return found

    def _look_up(self, value: Node, key: Any) -> Node:
        if isinstance(key, (pytree.SequenceKey, pytree.MappingKey)):
            at = key.idx if isinstance(key, pytree.SequenceKey) else key.key
            return self.graph.call_function(operator.getitem, (value, at))
        return self.graph.call_function(getattr, (value, key.name))

    def _guard(self, value: Node, path: str, fake: torch.Tensor, mode: Any) -> Node:
        spec = ArgSpec(path, tuple(map(size_of, fake.shape)), insert.dtype_name(fake))
        node = self.graph.call_function(insert.guard, (value, path, spec.shape, spec.dtype, mode))
        self.specs.append(spec)
        self.guards.append(node)
        node.meta["val"] = fake
        self.last = node
        return node

    # --- parameters, buffers, constants

    def _parameters(self) -> None:
        # export gives a weight of a tensor subclass (quantised) as the plain tensors inside it
        constants = ChainMap(self.program.constants, self.program.state_dict)
        fakes = {n.name: n.meta.get("val") for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if spec.kind in (InputKind.USER_INPUT, InputKind.TOKEN):
                continue
            target = spec.target
            if spec.kind is InputKind.CONSTANT_TENSOR or not _has_attribute(self.root, target):
                target = f"constant_{spec.arg.name}".replace(".", "_")
                value: Any = constants[str(spec.target)]
                self.root.register_buffer(
                    target, value if value.is_leaf else value.detach(), persistent=False
                )
            node = self.graph.create_node("get_attr", str(target))
            node.meta["val"] = fakes[spec.arg.name]
            self.env[spec.arg.name] = node

    # --- ops

    def _op(self, node: Node) -> None:
        args, kwargs = self._new(node.args), self._new(node.kwargs)
        if node.target is insert.observe:
            values, places, call = args
            self.marks[call] = dict(zip(places, values, strict=True))
            if self.last is not None:
                self.after[call] = self.last
            return
        self._pin(node)
        if says_nothing(node):
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ExportError(f"the graph holds a higher-order op ({node.target}): not handled")
        emit, made = functools.partial(self._emit, node), functools.partial(self._made, node)
        self.env[node.name] = written(node, args, kwargs, Writer(emit, made))

    def _emit(self, like: Node, target: Any, args: Any, kwargs: Any) -> Node:
        new = self.graph.create_node("call_function", target, args, kwargs, like.name)
        new.meta |= origin(like)
        new.meta["val"] = like.meta.get("val")
        self.last = new
        return new

    def _made(self, like: Node, target: Any, *args: Any) -> Node:
        """An additional op, which the exported graph does not have."""
        new = self._emit(like, target, args, {})
        new.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
        return new

    def _pin(self, node: Node) -> None:
        """Note a node that names a float dtype: a cast, or export's assertion where it dropped a cast."""
        literals = [*node.args, *node.kwargs.values()]
        if any(isinstance(a, torch.dtype) and (a.is_floating_point or a.is_complex) for a in literals):
            self.pins.append(source_line(node) or node.name)

    def _new(self, args: Any) -> Any:
        return map_arg(args, lambda n: self.env[n.name])

    # --- outputs

    def _outputs(self) -> None:
        results = self._new(next(n for n in self.program.graph.nodes if n.op == "output").args[0])
        leaves: list[Any] = []
        for spec, value in zip(self.program.graph_signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                leaves.append(value if isinstance(value, Node) else getattr(spec.arg, "value", value))
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                if isinstance(value, Node):  # else a batch norm's statistics, which its op updates
                    buffer = self.graph.create_node("get_attr", str(spec.target))
                    kept = self.graph.call_function(insert.stop, (value,))
                    self.graph.call_function(COPY_INTO, (buffer, kept))
            else:
                own = spec.target in dict(self.model.named_parameters())
                given = spec.target in inspect.signature(self.model.forward).parameters
                name = f" ({spec.target})" if own or given else ""
                raise CaptureError(
                    f"{type(self.model).__name__}.forward writes into"
                    f" {'its parameter' if own else 'an input'} in place{name}:"
                    f" {'a graph cannot change its weights' if own else 'clone it first'}"
                )
        self.graph.output(self._structure(leaves, self.program.call_spec.out_spec))

    def _structure(self, leaves: Sequence[Any], spec: Any) -> Any:
        if _spelled(spec):
            return pytree.tree_unflatten(list(leaves), spec)
        if not hasattr(self.root, "output_structure"):
            self.root.add_module("output_structure", Structure(spec).train(self.model.training))
        return self.graph.create_node("call_module", "output_structure", tuple(leaves))

    def _call(self, index: int, call: Call) -> ModuleCall | None:
        """A module call with graph nodes as tensors; None if no output of it is in the graph."""
        marks, after = self.marks.get(index, {}), self.after.get(index)
        sides = []
        for place, (leaves, spec) in (("a", call.arguments), ("o", call.output)):
            filled = [marks.get(f"{place}{i}", x) for i, x in enumerate(leaves)]
            if not _spelled(spec):
                return None
            sides.append(pytree.tree_unflatten([_name(x) for x in filled], spec))
        if after is None or not any(place.startswith("o") for place in marks):
            return None
        (args, kwargs), output = sides
        return ModuleCall(call.path, after.name, args, kwargs, output)


def _name(value: Any) -> Any:
    if isinstance(value, Node):
        return value
    return value if isinstance(value, _CONSTANT_TYPES) else None


def _spelled(spec: pytree.TreeSpec) -> bool:
    """Whether generated code can spell the structure: tuples, lists and dicts of leaves."""
    return spec.is_leaf() or (spec.type in _BUILTIN_NODES and all(_spelled(c) for c in spec.children()))


def _root_shell(model: torch.nn.Module) -> torch.nn.Module:
    shells = shell_tree(model)
    root = torch.nn.Module()
    root.__dict__.update({k: v for k, v in vars(model).items() if "hooks" not in k})
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        root.__dict__[name] = type(vars(model)[name])(vars(model)[name])
    root.__dict__["_modules"] = {k: None if c is None else shells[id(c)] for k, c in model._modules.items()}
    return root


def paths_of(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """The path of each leaf among the arguments of a call: ``x``, ``x['mask']``."""
    parameters = [*inspect.signature(model.forward).parameters.values()]
    leaves = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
    named = (_parameter(parameters, path) for path, _ in leaves)
    return [name + "".join(map(str, keys)) for name, keys in named]


def _has_default(p: inspect.Parameter) -> bool:
    """Whether a parameter has a default that generated code can spell."""
    return p.default in ((), []) or isinstance(p.default, _CONSTANT_TYPES)


def _parameter(
    parameters: Sequence[inspect.Parameter], path: tuple[Any, ...]
) -> tuple[str, tuple[Any, ...]]:
    """(parameter of ``forward``, keys into its value) of the leaf at ``path`` in ``(args, kwargs)``."""
    side, key, *rest = path
    if side.idx == 1:
        return key.key, tuple(rest)
    for at, p in enumerate(parameters[: key.idx + 1]):
        if p.kind is p.VAR_POSITIONAL:
            return p.name, (pytree.SequenceKey(key.idx - at), *rest)
    return parameters[key.idx].name, tuple(rest)


def _has_attribute(root: torch.nn.Module, target: str | None) -> bool:
    try:
        operator.attrgetter(target or "")(root)
    except AttributeError:
        return False
    return True


def _passed(
    parameters: Sequence[inspect.Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, by the name of the parameter that takes them."""
    found: dict[str, Any] = {}
    for at, value in enumerate(args):
        name, keys = _parameter(parameters, (pytree.SequenceKey(0), pytree.SequenceKey(at)))
        found[name] = (*found.get(name, ()), value) if keys else value
    return {**found, **kwargs}


def _drop_unused_lookups(graph: Graph, calls: Sequence[ModuleCall]) -> None:
    """Erase attribute lookups that no op reads and no module call takes (hooks see a call's arguments)."""
    handed = set(pytree.tree_leaves([(c.args, dict(c.kwargs), c.output) for c in calls]))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users and node not in handed:
            graph.erase_node(node)
