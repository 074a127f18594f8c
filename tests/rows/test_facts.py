"""What a row says beside the law, on every sample of it: ``moves``, ``fresh``, ``unread``, ``fill``.

``rowwise`` is tested where it is read, by ``test_a_row_is_made_of_rows``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from libragrad_fx.decide import rulebook
from libragrad_fx.types import OpFacts
from tests.rows.one_op import tensors
from tests.samples import calls

ROWS = tuple(rulebook.load().facts.values())


def rows_that_say(key: str) -> Any:
    said = [row for row in ROWS if getattr(row, key)]
    assert said
    return pytest.mark.parametrize("row", said, ids=lambda r: r.op.removeprefix("aten."))


def plain(outputs: Any) -> list[torch.Tensor]:
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]


def storages(values: Any) -> set[StorageWeakRef]:
    return {StorageWeakRef(t.untyped_storage()) for t in plain(values)}


@rows_that_say("moves")
def test_what_moves_places_each_element_once_at_most(row: OpFacts) -> None:
    for call in calls(row):
        (name,) = tensors(call, row.stream)
        x = tensors(call, row.stream)[name]
        numbered = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        args, kwargs = pytree.tree_unflatten([numbered if v is x else v for v in leaves], spec)
        outputs = plain(call.op(*args, **kwargs))
        found = torch.cat([y.flatten() for y in outputs]).tolist()
        assert set(found) <= set(range(x.numel()))
        assert len(found) == len(set(found))
        if row.moves == "copy":
            assert sorted(found) == list(range(x.numel()))


@rows_that_say("fresh")
def test_what_is_fresh_shares_no_memory(row: OpFacts) -> None:
    for call in calls(row):
        made = call.op(*call.args, **call.kwargs)
        assert storages(made).isdisjoint(storages((call.args, call.kwargs))), str(call)


@rows_that_say("unread")
def test_what_is_unread_may_be_written_over(row: OpFacts) -> None:
    for call in calls(row):
        carry = tensors(call, row.operands).values()
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        found = []
        for spoilt in (False, True):
            own = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
            moving = [x.requires_grad_() for x, old in zip(own, leaves, strict=True)
                      if any(old is c for c in carry)]  # fmt: skip
            args, kwargs = pytree.tree_unflatten(own, spec)
            (y,) = plain(call.op(*args, **kwargs))
            g = torch.ones_like(y)
            if spoilt:
                y.data.fill_(torch.nan)
            found.append(torch.autograd.grad(y, moving, g) if moving else ())
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), str(call)


FILLS = [row for row in ROWS if row.fill is not None]


@pytest.mark.parametrize("row", FILLS, ids=lambda r: r.op.removeprefix("aten."))
def test_what_fills_fills_with_that_number(row: OpFacts) -> None:
    packet = getattr(torch.ops.aten, row.op.split(".")[1])
    takes = [a.name for a in packet.default._schema.arguments]
    given: list[Any] = [torch.randn(2, 3)] if takes[0] == "self" else []
    given += [[2, 3]] if "size" in takes else []
    number = 7.0 if isinstance(row.fill, str) else row.fill
    given += [7.0] if "fill_value" in takes else []
    assert set(packet.default(*given).unique().tolist()) == {number}
