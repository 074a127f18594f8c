"""``nn.Module`` (+ example inputs) -> ``torch.export`` program.

Two things that export alone would lose are put into the graph first. ``no_grad`` regions, which its
decomposition drops, become ``detach`` nodes. Every module call leaves marks on its arguments and outputs,
from which the module tree of the result is rebuilt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import operator
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from libragrad_fx.capture.composite import write_out
from libragrad_fx.capture.context import (
    Call,
    as_if_eager,
    custom_functions,
    export_state,
    global_hooks_kept,
    observed,
    replaced_backwards,
)
from libragrad_fx.capture.examples import without_cache
from libragrad_fx.capture.free import USUAL, Free, batch_of_two, by_name, freed
from libragrad_fx.capture.inplace import drop_returned, rename
from libragrad_fx.capture.state import untouched
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.errors import ExportError
from libragrad_fx.graph.alias import is_fresh, memory, written
from libragrad_fx.graph.schema import bind
from libragrad_fx.ops import insert
from libragrad_fx.ops.insert import stop
from libragrad_fx.target import inexact

_PYTHON = PythonPrinter()


@dataclasses.dataclass(frozen=True)
class Capture:
    """An exported, functional program, and facts that it does not hold.

    conditions: what export assumed of the free sizes, as Python over the names of symbols
    args, kwargs: the call that was exported (a batch of one is doubled)
    forced:     arguments that capture gave as False (``use_cache``)
    calls:      the module calls, in order
    notes:      warnings for the plan
    """

    program: ExportedProgram
    conditions: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    forced: frozenset[str]
    calls: tuple[Call, ...]
    notes: tuple[str, ...]


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    book: RuleBook | None = None,
    module_calls: bool = True,
    free: Free = USUAL,
) -> Capture:
    """Export ``model`` and make it functional. The model is left as it was, whatever happens.

    Args:
        args, kwargs: the call (see ``example_call``).
        book: facts about ops, the shipped ones by default; a composite op without one is decomposed.
        free: which sizes are free.
        module_calls: record every call of a submodule; otherwise hooks on submodules do not fire.

    Raises:
        ExportError: export refuses it.
    """
    book = rulebook.load() if book is None else book
    with untouched(model):
        kwargs, forced = without_cache(model, dict(kwargs))
        if free.batch:
            args, kwargs = batch_of_two(args, kwargs)
        calls: list[Call] = []
        custom: list[str] = []
        watched = observed(model, calls) if module_calls else contextlib.nullcontext()
        with export_state(), global_hooks_kept(), watched, custom_functions(custom):
            try:
                with as_if_eager():
                    program, conditions = _export(model, args, kwargs, book, free)
            except ExportError:  # the eager branch may ask for tensor values, the other one not
                calls.clear()
                program, conditions = _export(model, args, kwargs, book, free)
    return Capture(program, conditions, args, kwargs, forced, tuple(calls), replaced_backwards(custom))


def _export(
    model: torch.nn.Module, args: Any, kwargs: Any, book: RuleBook, free: Free
) -> tuple[ExportedProgram, tuple[str, ...]]:
    shapes = by_name(model, *free.axes(args, kwargs)) if free.batch else None
    if shapes is not None:
        given = by_name(model, args, kwargs)
        shapes |= {name: freed(name, given.get(name), spec) for name, spec in free.named.items()}
    try:
        with warnings.catch_warnings(), _hushed():
            warnings.simplefilter("ignore")
            made = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            _restore_users(made)
            _detach_no_grad_regions(made, book)
            found = _conditions(made)
            program = _functional(made, book)
            return program, tuple(dict.fromkeys([*found, *_conditions(program)]))
    except Exception as e:
        # leave out what is of no use to a user: advice to file an issue, export's names of tensors
        said = re.sub(r"[^.]*(file an issue|lifted_tensor)[^.]*\.?", "", _first_line(e))
        if "no_grad region" in said:
            said = said.removeprefix("ValueError: ")
        elif "mutat" in said or "in-place" in said or "in place" in said:
            said = "it writes in place into a tensor that is not its own"
        raise ExportError(
            f"torch.export could not capture {type(model).__name__}: {said}\n"
            "  Usual causes: control flow on tensor values, a cache or a custom class among inputs or"
            " outputs, numpy inside forward. Capture the part that is a plain function of tensors, or"
            " rewrite the branch with torch.where."
        ) from e


def size_of(size: Any) -> int | str:
    """One entry of a traced shape: a number, or a formula of symbols as text."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_number else _PYTHON.doprint(expr)


def _conditions(program: ExportedProgram) -> list[str]:
    """What the trace assumed of free sizes: the branches it took on them, and their ranges."""
    values = (n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder")
    sizes: list[Any] = [d for t in values if isinstance(t, torch.Tensor) for d in t.shape]
    free = [d for d in sizes if isinstance(size_of(d), str)]
    if not free:
        return []
    env = free[0].node.shape_env
    symbols = set().union(*(d.node.expr.free_symbols for d in free))
    found = [g.expr.xreplace(env.replacements) for g in env.guards]
    for symbol in symbols & set(env.var_to_range):
        bounds = env.var_to_range[symbol]
        found += [symbol >= bounds.lower] if bounds.lower > 2 else []  # 2: see ``insert.guard``
        found += [symbol <= bounds.upper] if bounds.upper.is_Integer else []
    # conditions on other symbols were decided when those became numbers
    known = [e for e in found if getattr(e, "free_symbols", None) and e.free_symbols <= symbols]
    return sorted({_PYTHON.doprint(e) for e in known})


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Hide output, because a failing export prints its graph; after success, print it again."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield
    sys.stdout.write(said.getvalue())


def _functional(program: ExportedProgram, book: RuleBook) -> ExportedProgram:
    """The program without in-place writes, and without regions in another mode.

    PyTorch's pass, ``run_decompositions``, costs several times the export, so it runs only if any is left.
    """
    for again in (True, False):
        write_out(program.graph, book)
        rename(program.graph, book)
        if again and any(map(_writes, program.graph.nodes)):
            drop_returned(program.graph, book)
            stops = _stops(program)
            program = program.run_decompositions({})
            if _stops(program) > stops:
                raise ValueError(
                    "it writes in place into what detach(), or a no_grad region, has returned, and shares"
                    " memory with another tensor: write out of place, or clone() it first"
                )
    _uncut(program)
    return program


def _stops(program: ExportedProgram) -> int:
    """How many ops cut the gradient, in all regions. PyTorch repeats one after a write to its alias."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(n.target in (stop, insert.cut) for m in modules for n in m.graph.nodes)


def _writes(node: torch.fx.Node) -> bool:
    """Whether a node writes in place, or begins or ends a region in another mode or under a ``vmap``."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    values = bind(node.target, node.args, node.kwargs)
    # the schema of a norm does not say that it writes its statistics
    norm = values.get("training") or values.get("use_input_stats")
    return node.target._schema.is_mutable or bool(norm)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else '(no message)'}"


def _restore_users(program: ExportedProgram) -> None:
    """Note at every node all nodes that read it. Where a region in another mode begins, PyTorch (2.14) cuts
    the graph, joins it again, and forgets who has read the last value before the cut."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for operand in node.all_input_nodes:
                operand.users.setdefault(node)


def _detach_no_grad_regions(program: ExportedProgram, book: RuleBook) -> None:
    """Detach the outputs of ``no_grad`` regions: these sub-graphs are flattened later without a trace. What
    a region has made itself is cut, so that it may be written to behind it."""
    module = program.graph_module
    regions = [n for n in module.graph.nodes if _is_no_grad(n)]
    for node in regions:
        region = module.get_submodule(str(node.args[1].target))  # type: ignore[union-attr]
        _lead_around(node, region.graph, book)  # type: ignore[arg-type]
    moving = _moving(program) if regions else set()
    for node in regions:
        region = module.get_submodule(str(node.args[1].target))  # type: ignore[union-attr]
        inside = memory(region.graph)  # type: ignore[arg-type]
        into = {inside[m] for n in region.graph.nodes for m in written(n)}  # type: ignore[union-attr]
        given = zip(region.graph.find_nodes(op="placeholder"), node.args[2:], strict=True)  # type: ignore[union-attr]
        if any(inner in into and outer in moving for inner, outer in given):
            raise ValueError(
                "it writes in place, in a no_grad region, into a tensor that carries a gradient, and"
                " autograd does not see that: write out of place, or outside of the region"
            )
        for user in list(node.users):
            if inexact(user.meta.get("val")):
                fresh = _made_inside(region, user, book)
                with module.graph.inserting_after(user):
                    cut = module.graph.call_function(insert.cut if fresh else stop, (user,))
                cut.meta = dict(user.meta)
                user.replace_all_uses_with(cut, delete_user_cb=lambda u, cut=cut: u is not cut)
    module.recompile()


def _lead_around(node: torch.fx.Node, region: torch.fx.Graph, book: RuleBook) -> None:
    """Let what a region returns as it was given bypass it, and keep its gradient. From an op on that has
    returned ``x`` itself, as ``x.float()`` may, export (2.14) takes its result for ``x``."""
    drop_returned(region, book)
    inner: Any = next(n.args[0] for n in region.nodes if n.op == "output")
    given = dict(zip(region.find_nodes(op="placeholder"), node.args[2:], strict=True))
    for user in [u for u in node.users if u.target is operator.getitem]:
        if (made := inner[user.args[1]]) in given:  # type: ignore[index]
            user.replace_all_uses_with(given[made])  # type: ignore[arg-type]
            user.graph.erase_node(user)


def _is_no_grad(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled" and not node.args[0]


def _moving(program: ExportedProgram) -> set[torch.fx.Node]:
    """The nodes whose result carries a gradient to an input of the user's."""
    graph, given = program.graph, {*program.graph_signature.user_inputs}
    shared = memory(graph)
    found = set[torch.fx.Node]()  # by memory
    for node in graph.nodes:
        reads = any(shared[n] in found for n in node.all_input_nodes)
        starts = node.op == "placeholder" and node.name in given
        cuts = node.target in (stop, insert.cut) or _is_no_grad(node)
        if starts and inexact(node.meta.get("val")):
            found.add(node)
        elif reads and not cuts and any(map(inexact, pytree.tree_leaves(node.meta.get("val")))):
            found |= {shared[node], *(shared[n] for n in written(node))}
    return {n for n in graph.nodes if shared[n] in found}


def _made_inside(region: torch.nn.Module, output: torch.fx.Node, book: RuleBook) -> bool:
    """Whether an output of a region shares no memory with anything outside, nor with another output."""
    (end,) = (n for n in region.graph.nodes if n.op == "output")  # type: ignore[union-attr]
    returned: Any = end.args[0]
    place: Any = output.args[1] if isinstance(returned, (list, tuple)) else None
    made = returned if place is None else returned[place]
    if not isinstance(made, torch.fx.Node):
        return False
    shared = [made]  # what may lie in its memory: it may be a view of others
    for node in shared:
        if node.op != "call_function":
            return False
        if not is_fresh(node, book.fact(node.target)):
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
            shared += [n for n in tensors if n not in shared]
    readers = [(n, r) for n in shared for r in n.users if r.target is not insert.observe]
    return all(r in shared or (n, r) == (made, end) for n, r in readers)


def _uncut(program: ExportedProgram) -> None:
    """Now that nothing writes in place, a cut is a ``stop``."""
    for node in program.graph.nodes:
        if node.target is insert.cut:
            node.target = stop
