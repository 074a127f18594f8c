"""How a flat graph runs: op by op, recorded as one CUDA graph, or compiled by TorchInductor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from libragrad_fx.errors import InputError, VerificationError
from libragrad_fx.kernels import PLAIN
from libragrad_fx.ops import binding
from libragrad_fx.ops.attention import attention_value
from libragrad_fx.optimise.execute import bound
from libragrad_fx.programs.reuse import reuse

Tensor = torch.Tensor
Run = Callable[..., Sequence[Tensor]]
Mode = Literal["eager", "cuda_graph", "compile"]
_MOST = 16  # the most runs that are kept; the least recently used one is dropped
_CLOSE = 1e-3  # of the largest value of a map; ops in another order round otherwise
_ROUNDED = 1e3  # times eps, of the largest share: where channels cancel, a map is rounding alone
_WARM = 3  # runs before one is recorded: kernels are loaded and chosen in the first


class Plain(torch.fx.Interpreter):
    """Runs a graph with some ops in another form; ours in their written form, so that PyTorch's remain."""

    def __init__(self, graph: GraphModule, forms: Mapping[Any, Callable[..., Any]] = PLAIN) -> None:
        super().__init__(graph)
        self.forms = forms

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        made: Any = self.forms.get(target, target)
        return super().call_function(made, args, kwargs)


def eager(graph: GraphModule) -> Run:
    """Op by op, through PyTorch's bindings, pointwise ops over dead operands."""
    ops = reuse(graph.graph)
    binding.mark(ops)
    return GraphModule(graph, bound(ops)).forward


def compiled(graph: GraphModule, given: Sequence[Tensor]) -> Run:
    """By TorchInductor, for arguments of these sizes. It fuses norms and gates in their written form; dV
    stays one op, which it cannot fuse."""
    forms = {op: form for op, form in PLAIN.items() if op is not attention_value}
    written = make_fx(Plain(graph, forms).run)(*given)
    made: Any = torch._inductor.compile(written, [*given])
    return made  # type: ignore[no-any-return]


class Recorded:
    """A run as one CUDA graph. The parameters are read where they lie, so a change in place counts."""

    def __init__(self, run: Run, state: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        self.state, self.given = [*state], [t.clone() for t in given]
        with torch.cuda.device_of(self.given[0]):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARM):
                    run(*self.state, *self.given)
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.found = run(*self.state, *self.given)

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        for mine, t in zip(self.given, given[len(self.state) :], strict=True):
            mine.copy_(t)
        self.graph.replay()
        return [t.clone() for t in self.found]


class Runs:
    """A flat graph in a mode.

    count: so many of its arguments are the module's tensors, the first
    map:   which of its results is the map
    scale: see ``require_close``
    difference: how far a map was from that of the eager run when another run was made, of its largest value
    """

    def __init__(self, graph: GraphModule, mode: Mode, count: int, map: int, scale: float) -> None:
        self.graph, self.mode, self.count, self.map, self.scale = graph, mode, count, map, scale
        self.eager = eager(graph)
        self.kept: dict[Any, Run] = {}
        self.difference = 0.0
        self.lock = threading.RLock()  # a recorded run has one place for its inputs

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            if self.mode == "eager":
                return self.eager(*given)
            with self.lock:
                return self.fitting(given)(*given)

    def fitting(self, given: Sequence[Tensor]) -> Run:
        """The run for arguments of these sizes; a recorded one also for parameters at these addresses."""
        state, rest = given[: self.count], given[self.count :]
        places = [t.data_ptr() for t in state] if rest[0].is_cuda else [t.shape for t in state]
        key = (*places, *(t.shape for t in rest))
        run = self.kept.pop(key, None) or self._made(state, rest)
        self.kept[key] = run  # the latest used is the last
        for old in [*self.kept][:-_MOST]:
            del self.kept[old]
        return run

    def _made(self, state: Sequence[Tensor], rest: Sequence[Tensor]) -> Run:
        run = compiled(self.graph, (*state, *rest)) if self.mode == "compile" else self.eager
        made = Recorded(run, state, rest) if rest[0].is_cuda else run
        found, want = (r(*state, *rest)[self.map] for r in (made, self.eager))
        dtype = next((t.dtype for t in (*state, *rest) if t.is_floating_point()), want.dtype)
        far = require_close(found, want, f"a map in mode {self.mode!r}", dtype, self.scale)
        self.difference = max(self.difference, far)
        return made


def rounding(dtype: torch.dtype) -> float:
    """How far numbers may be from others, of the largest, when ops ran in another order."""
    return max(_CLOSE, 8 * torch.finfo(dtype).eps)


def require_close(found: Tensor, want: Tensor, name: str, dtype: torch.dtype, scale: float) -> float:
    """How far a map is from another, of the largest value.

    Args:
        dtype: what the model computes in.
        scale: the largest share of a channel when the graph was traced; a map is their sum over channels.

    Raises:
        VerificationError: further than ops in another order round.
    """
    top = float(want.abs().max()) if want.numel() else 0.0
    far = float((found - want).abs().max()) if want.numel() else 0.0
    alone = _ROUNDED * torch.finfo(dtype).eps * scale
    if not (far <= rounding(dtype) * (top or 1.0) or far <= alone):
        raise VerificationError(
            f"{name} differs from that of attribute by {far / (top or 1.0):.1g} of its largest value"
        )
    return far / (top or 1.0)


def require_device(mode: Mode, like: Tensor) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"mode is eager, cuda_graph or compile, not {mode!r}")
    if mode == "cuda_graph" and not like.is_cuda:
        raise InputError(f"a CUDA graph needs a GPU, and the model is on {like.device}: use mode='compile'")
