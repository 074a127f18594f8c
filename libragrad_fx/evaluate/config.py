"""What is evaluated, as a YAML file says it.

models:
  vit: {load: vit_base_patch16_224, pretrained: true}
  mine: {load: "package.module:factory", args: {depth: 12}, steps: "package.module:steps"}
data:
  imagenet: {load: "imagenet:/data/imagenet", count: 1000, seed: 43, keep: rgb}
policies: [autograd, libra]
methods: [random, input_x_gradient, fullgrad_plus, {method: integrated_gradients, steps: 20}]
metrics:
  tokens: {}
  places: {}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
import yaml

from libragrad_fx.attribution.formulas import method_of
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.metrics.faithfulness import RATIOS
from libragrad_fx.perturb.pixels import Fill

TargetKind = Literal["predicted", "label", "mask"]
"""The class that is explained: the model's own answer, the label, or that of the largest mask."""
Scalar = Literal["logit", "probability"]
Ratio = Annotated[float, pydantic.Field(gt=0, lt=1)]
Name = Annotated[str, pydantic.Field(pattern=r"^[\w.+-]+$")]


class _Said(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Said):
    """A model by name, as on the command line.

    args:   of a factory
    steps:  the function that prepares a PIL picture as a tensor (C, H, W); the model's own if none
    family: under what it is listed in a report; its name if none
    seed:   of training, for models that differ in nothing else
    """

    load: str
    args: dict[str, Any] = {}
    pretrained: bool = False
    checkpoint: str | None = None
    steps: str | None = None
    family: str = ""
    seed: int | None = None


class DataSpec(_Said):
    """A set (``evaluate.data``), and which of its samples: ``count`` of them in an order drawn by ``seed``."""

    load: str
    args: dict[str, Any] = {}
    count: Annotated[int, pydantic.Field(ge=1)] | None = None
    seed: int = 0
    keep: str | None = None


class MethodSpec(_Said):
    """A method of ``attribute``, and its options; ``name`` tells two of one method apart."""

    method: str
    name: str = ""
    steps: Annotated[int, pydantic.Field(ge=1)] = 50
    baseline: float = 0.0
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _known(self) -> MethodSpec:
        method_of(self.method)
        return self


class TokensSpec(_Said):
    """Faithfulness on tokens: removed where the model can run on fewer, else zeroed."""

    targets: tuple[TargetKind, ...] = ("predicted",)
    scalar: Scalar = "probability"
    ratios: tuple[Ratio, ...] = RATIOS
    zero: bool = False


class PixelsSpec(_Said):
    """Faithfulness on pixels, cell by cell of the map's grid."""

    targets: tuple[TargetKind, ...] = ("predicted",)
    scalar: Scalar = "probability"
    ratios: tuple[Ratio, ...] = RATIOS
    fill: Fill = "mean"


class PlacesSpec(_Said):
    """Maps against masks. least: the share of the picture that a mask covers, or it is left out."""

    targets: tuple[TargetKind, ...] = ("mask",)
    scalar: Scalar = "probability"
    least: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.05


class CompletenessSpec(_Said):
    """Sums against logits. layers: of fullgrad, also at each block."""

    targets: tuple[TargetKind, ...] = ("predicted",)
    scalar: Literal["logit"] = "logit"
    layers: bool = False


class MetricsSpec(_Said):
    tokens: TokensSpec | None = None
    pixels: PixelsSpec | None = None
    places: PlacesSpec | None = None
    completeness: CompletenessSpec | None = None

    @property
    def asked(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: spec for name, spec in found.items() if spec is not None}


class Config(_Said):
    """See the module. batch: samples in one forward; chunk: samples whose results are one file."""

    models: Annotated[dict[Name, ModelSpec], pydantic.Field(min_length=1)]
    data: Annotated[dict[Name, DataSpec], pydantic.Field(min_length=1)]
    methods: Annotated[tuple[MethodSpec, ...], pydantic.Field(min_length=1)]
    metrics: MetricsSpec
    policies: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = (AUTOGRAD, "libra")
    batch: Annotated[int, pydantic.Field(ge=1)] = 16
    chunk: Annotated[int, pydantic.Field(ge=1)] = 64
    device: str = "cpu"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"

    @pydantic.field_validator("methods", mode="before")
    @classmethod
    def _short(cls, found: Any) -> Any:
        return (
            [{"method": m} if isinstance(m, str) else m for m in found]
            if isinstance(found, list)
            else found
        )

    @pydantic.field_validator("policies")
    @classmethod
    def _loads(cls, found: tuple[str, ...]) -> tuple[str, ...]:
        for policy in found:
            if policy != AUTOGRAD:
                rulebook.load(policy)
        return found

    @pydantic.model_validator(mode="after")
    def _apart(self) -> Config:
        names = [name_of(m) for m in self.methods]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ValueError(f"two methods are called {', '.join(sorted(twice))}: give one a name")
        if not self.metrics.asked:
            raise ValueError("metrics names none: tokens, pixels, places or completeness")
        if self.batch > self.chunk:
            raise ValueError(f"a chunk of {self.chunk} is smaller than a batch of {self.batch}")
        try:
            torch.device(self.device)
        except RuntimeError as e:
            raise ValueError(f"no device {self.device!r}") from e
        return self

    @staticmethod
    def load(file: str | Path) -> Config:
        """Read a YAML file.

        Raises:
            InputError: no such file, no YAML, or a field that is wrong; with its place.
        """
        try:
            found = yaml.safe_load(Path(file).read_text("utf-8"))
        except OSError as e:
            raise InputError(f"cannot read {str(file)!r}: {e.strerror}") from e
        except yaml.YAMLError as e:
            raise InputError(f"{str(file)!r} is no YAML: {' '.join(str(e).split())}") from e
        return Config.of(found, str(file))

    @staticmethod
    def of(found: Any, called: str = "the config") -> Config:
        """From a mapping.

        Raises:
            InputError: a field that is wrong; with its place.
        """
        try:
            return Config.model_validate(found)
        except pydantic.ValidationError as e:
            said = [f"{'.'.join(map(str, x['loc'])) or 'config'}: {x['msg']}" for x in e.errors()]
            raise InputError(f"{called}: {'; '.join(said[:4])}") from e


def name_of(method: MethodSpec) -> str:
    return method.name or method.method
