"""What is evaluated, as a YAML file says it.

models:
  vit: {load: vit_base_patch16_224, pretrained: true, data: [imagenet]}
  mine: {load: "package.module:factory", args: {depth: 12}, steps: "package.module:steps", data: [imagenet]}
  llama: {load: "hf:FOLDER", data: [prompts]}
data:
  imagenet: {load: "imagenet:/data/imagenet", count: 1000, seed: 43, keep: rgb}
  prompts: {load: "zoo.sets:prompts", args: {task: ioi}, count: 100}
policies: [autograd, libra]
methods: [random, input_x_gradient, fullgrad_plus, {method: integrated_gradients, steps: 20}]
metrics:
  tokens: {}
  places: {emd: 32}

| metric | what it measures |
|---|---|
| ``tokens``, ``pixels`` | faithfulness: what the model answers without the most, and the least, relevant |
| ``places`` | maps against masks |
| ``completeness`` | what a sum misses of what it promises |
| ``randomisation`` | is the map of a model with random parameters another one? |
| ``max_sensitivity`` | is the map of nearly the same picture nearly the same? |
| ``sensitivity_n`` | do relevances of n cells add up to what their removal costs? |
| ``parts`` | FunnyBirds' scores, of sets whose objects have parts that can be removed |
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml

from libragrad_fx.attribution.formulas import method_of
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.explain.kept import AUTOGRAD
from libragrad_fx.extras import need
from libragrad_fx.metrics.faithfulness import RATIOS
from libragrad_fx.models import imported
from libragrad_fx.perturb.pixels import Fill

try:
    import pydantic
except ImportError:
    need("pydantic", "evaluate")  # says how to get it
    raise

T = TypeVar("T")
TargetKind = Literal["predicted", "label", "mask", "contrast"]
"""The class that is explained: the model's own answer, the label, or that of the largest mask; or the label
in contrast to the class that a sample names beside it."""
Scalar = Literal["logit", "probability"]
Ratio = Annotated[float, pydantic.Field(gt=0, lt=1)]


def _once(found: tuple[T, ...]) -> tuple[T, ...]:
    twice = sorted({str(x) for x in found if found.count(x) > 1})
    if not found or twice:
        raise ValueError(f"{', '.join(twice)} is there twice" if twice else "names none")
    return found


Targets = Annotated[tuple[TargetKind, ...], pydantic.AfterValidator(_once)]
Ratios = Annotated[tuple[Ratio, ...], pydantic.AfterValidator(_once)]
Name = Annotated[str, pydantic.Field(pattern=r"^\w[\w.+-]*$")]
"""Of a model or a set: results are in folders of that name."""


class _Said(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Said):
    """A model by name, as on the command line.

    args:      of a factory
    steps:     the function that prepares a PIL picture as a tensor (C, H, W); the model's own if none
    tokenizer: of a model of texts, ``package.module:factory`` of a tokenizer of transformers; what was
               published with the model if none
    data:      the sets that it is measured on; all if none
    family:    under what it is listed in a report; its name if none
    seed:      of training, for models that differ in nothing else
    """

    load: str
    args: dict[str, Any] = {}
    pretrained: bool = False
    checkpoint: str | None = None
    steps: str | None = None
    tokenizer: str | None = None
    data: Annotated[tuple[str, ...], pydantic.AfterValidator(_once)] | None = None
    family: str = ""
    seed: int | None = None

    @pydantic.model_validator(mode="after")
    def _of_one_kind(self) -> ModelSpec:
        if self.steps and self.tokenizer:
            raise ValueError("steps are of pictures and a tokenizer is of texts: say one")
        return self


class DataSpec(_Said):
    """A set (``evaluate.data``), and ``count`` of its samples, in an order drawn by ``seed``."""

    load: str
    args: dict[str, Any] = {}
    count: Annotated[int, pydantic.Field(ge=1)] | None = None
    seed: int = 0
    keep: str | None = None


class MethodSpec(_Said):
    """A method of ``attribute``, and its options; ``name`` tells two of one method apart.

    method: or ``package.module:function``, from a module, inputs (B, C, H, W), and a function from the
            module's output to (B,) scalars, to maps (B, *grid). The module has the policy's backward.
    seed: what is drawn (noise, a random map) is drawn anew for each batch, from this and the samples' ids.
    """

    method: str
    name: str = ""
    steps: Annotated[int, pydantic.Field(ge=1)] = 50
    baseline: float = 0.0
    seed: int = 0

    @pydantic.field_validator("method")
    @classmethod
    def _known(cls, found: str) -> str:
        try:
            imported(found) if ":" in found else method_of(found)
        except LibraGradError as e:
            raise ValueError(str(e)) from e
        return found


class TokensSpec(_Said):
    """Faithfulness on tokens: removed where the model can run on fewer, else zeroed."""

    targets: Targets = ("predicted",)
    scalar: Scalar = "probability"
    ratios: Ratios = RATIOS
    zero: bool = False


class PixelsSpec(_Said):
    """Faithfulness on pixels, cell by cell of the map's grid."""

    targets: Targets = ("predicted",)
    scalar: Scalar = "probability"
    ratios: Ratios = RATIOS
    fill: Fill = "mean"


class PlacesSpec(_Said):
    """Maps against masks (``metrics.places``), enlarged to the picture's size but for ``pointing_cell``.

    least:     the share of the picture that a mask covers, or it is left out
    tolerance: of ``pointing``, the distance in pixels from the mask that still counts
    k:         of ``precision``, how many pixels are taken; as many as the mask has if none is said
    emd:       cells along each side on which the Earth Mover's Distance is computed, a divisor of both: the
               time grows with the fourth power, 32 takes some 0.1 s a map. None: it is not computed
    """

    targets: Targets = ("mask",)
    scalar: Scalar = "probability"
    least: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.05
    tolerance: Annotated[int, pydantic.Field(ge=0)] = 0
    k: Annotated[int, pydantic.Field(ge=1)] | None = None
    emd: Annotated[int, pydantic.Field(ge=1)] | None = None


class CompletenessSpec(_Said):
    """Sums against logits. layers: of fullgrad, also at each block."""

    targets: Targets = ("predicted",)
    scalar: Literal["logit"] = "logit"
    layers: bool = False


class RandomisationSpec(_Said):
    """Maps of a copy of the model whose parameters are drawn anew (``metrics.sanity.randomisation``).

    order: from the output on ("top") or from the input on ("bottom"), and what was drawn stays; or one step
           at a time ("each"). A step is a block with all modules inside, or a module outside of blocks
    bins:  of the histogram whose entropy ``complexity_rise`` compares
    seed:  of the parameters, the same for all samples
    """

    targets: Targets = ("predicted",)
    scalar: Scalar = "probability"
    order: Literal["top", "bottom", "each"] = "top"
    bins: Annotated[int, pydantic.Field(ge=2)] = 100
    seed: int = 0


class MaxSensitivitySpec(_Said):
    """Maps of the picture with noise (``metrics.sanity.max_sensitivity``).

    radius:  of the noise, in units of the prepared picture
    samples: how often noise is drawn, the same for all pictures; a map for each
    """

    targets: Targets = ("predicted",)
    scalar: Scalar = "probability"
    radius: Annotated[float, pydantic.Field(gt=0)] = 0.02
    samples: Annotated[int, pydantic.Field(ge=1)] = 10
    seed: int = 0


class SensitivityNSpec(_Said):
    """Random sets of cells, replaced by ``baseline`` (``metrics.sanity.sensitivity_n``).

    ratios:  n, as a share of the cells
    subsets: how many sets are drawn for each n; a forward for each
    """

    targets: Targets = ("predicted",)
    scalar: Scalar = "logit"
    ratios: Ratios = (0.1, 0.3, 0.5, 0.7, 0.9)
    subsets: Annotated[int, pydantic.Field(ge=2)] = 100
    baseline: float = 0.0
    seed: int = 0


class PartsSpec(_Said):
    """FunnyBirds' scores (``metrics.parts``), for the label.

    thresholds: how many shares of a map's total from 0.01 to 0.5, evenly spaced, a part is compared with to
                be called important; 80 in the authors' code
    margin:     pixels around a part that count as of it
    """

    targets: Annotated[tuple[Literal["label"], ...], pydantic.AfterValidator(_once)] = ("label",)
    scalar: Literal["logit"] = "logit"
    thresholds: Annotated[int, pydantic.Field(ge=2)] = 8
    margin: Annotated[int, pydantic.Field(ge=0)] = 2


class ExamplesSpec(_Said):
    """Maps that are kept for a report, of the first ``count`` samples of a set."""

    targets: Targets = ("predicted",)
    scalar: Scalar = "probability"
    count: int = 0


class MetricsSpec(_Said):
    tokens: TokensSpec | None = None
    pixels: PixelsSpec | None = None
    places: PlacesSpec | None = None
    completeness: CompletenessSpec | None = None
    randomisation: RandomisationSpec | None = None
    max_sensitivity: MaxSensitivitySpec | None = None
    sensitivity_n: SensitivityNSpec | None = None
    parts: PartsSpec | None = None

    @property
    def asked(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: spec for name, spec in found.items() if spec is not None}


class Config(_Said):
    """See the module.

    batch:   samples in one forward
    chunk:   samples whose results are one file: what a process does at once
    threads: of a process, on CPU; torch's choice if none. The last bits of sums depend on it: say it where
        numbers of several machines are to be equal to the bit.
    examples: of so many samples of each set, the first chosen ones, a report shows the maps
    """

    models: Annotated[dict[Name, ModelSpec], pydantic.Field(min_length=1)]
    data: Annotated[dict[Name, DataSpec], pydantic.Field(min_length=1)]
    methods: Annotated[tuple[MethodSpec, ...], pydantic.Field(min_length=1)]
    metrics: MetricsSpec
    policies: Annotated[tuple[str, ...], pydantic.AfterValidator(_once)] = (AUTOGRAD, "libra")
    batch: Annotated[int, pydantic.Field(ge=1)] = 16
    chunk: Annotated[int, pydantic.Field(ge=1)] = 64
    device: str = "cpu"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    threads: Annotated[int, pydantic.Field(ge=1)] | None = None
    examples: Annotated[int, pydantic.Field(ge=0, le=16)] = 2

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
            try:
                if policy != AUTOGRAD:
                    rulebook.load(policy)
            except LibraGradError as e:
                raise ValueError(str(e)) from e
        return found

    @pydantic.field_validator("device")
    @classmethod
    def _is_one(cls, found: str) -> str:
        try:
            torch.device(found)
        except RuntimeError as e:
            raise ValueError(f"there is no device {found!r}: say cpu, cuda, cuda:1, mps") from e
        return found

    @pydantic.model_validator(mode="after")
    def _apart(self) -> Config:
        names = [name_of(m) for m in self.methods]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ValueError(f"two methods are called {', '.join(sorted(twice))}: give one a name")
        if not self.metrics.asked:
            raise ValueError(f"metrics names none of {', '.join(MetricsSpec.model_fields)}")
        for name, model in self.models.items():
            if unknown := sorted({*(model.data or ())} - {*self.data}):
                raise ValueError(f"models.{name}.data: there is no set {unknown[0]}")
        if self.batch > self.chunk:
            raise ValueError(f"a chunk of {self.chunk} is smaller than a batch of {self.batch}")
        return self

    @property
    def kept(self) -> ExamplesSpec:
        """Examples are maps that the first metric asks for, so that they are computed once."""
        first = next(iter(self.metrics.asked.values()))
        return ExamplesSpec(targets=first.targets[:1], scalar=first.scalar, count=self.examples)

    @staticmethod
    def load(file: str | Path) -> Config:
        """Read a YAML file.

        Raises:
            InputError: no such file, no YAML, or a field that is wrong; with its place.
        """
        try:
            text = Path(file).read_text("utf-8")
            found, twice = yaml.safe_load(text), _twice(yaml.compose(text, yaml.SafeLoader))
        except OSError as e:
            raise InputError(f"cannot read {str(file)!r}: {e.strerror}") from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise InputError(f"{str(file)!r} is no YAML: {' '.join(str(e).split())}") from e
        if twice:
            raise InputError(f"{file}: {twice}")
        return Config.of(found, str(file))

    @staticmethod
    def of(found: Any, called: str = "the config") -> Config:
        """From a mapping.

        Raises:
            InputError: a field that is wrong; with its place.
        """
        if not isinstance(found, dict):
            raise InputError(f"{called}: says no models, data, methods and metrics, but {found!r:.40}")
        try:
            return Config.model_validate(found)
        except pydantic.ValidationError as e:
            said = [_said(error) for error in e.errors()]
            more = f"; and {len(said) - 4} more" if len(said) > 4 else ""
            raise InputError(f"{called}: {'; '.join(said[:4])}{more}") from e


def _said(error: Any) -> str:
    """An error of pydantic, with its place."""
    place = ".".join(map(str, error["loc"]))
    plain = {"extra_forbidden": "there is no such field", "missing": "is missing"}
    said = plain.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {' '.join(said.split())}" if place else said


def _twice(node: yaml.Node | None) -> str:
    """The first key that a mapping has twice, and its line; YAML takes the last without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                return f"line {key.start_mark.line + 1}: {key.value} is there twice"
            seen.add(str(key.value))
            if said := _twice(value):
                return said
    elif isinstance(node, yaml.SequenceNode):
        return next(filter(None, map(_twice, node.value)), "")
    return ""


def name_of(method: MethodSpec) -> str:
    return method.name or method.method.rpartition(":")[2]
