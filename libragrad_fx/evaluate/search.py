"""Is there a better policy than the paper's? A search over the rows of one, by faithfulness.

    models:
      vit: {load: "zoo.trained:load", args: {name: vit_base}}
      swin: {load: "zoo.trained:load", args: {name: swin}}
    data:
      val: {load: "zoo.sets:scenes", args: {split: val}, count: 32}
      test: {load: "zoo.sets:scenes", args: {split: test}, count: 64}
    search: {models: [vit], data: val}
    held_out: {models: [vit, swin], data: test}
    trials: 60

Each trial is a policy: for the early and for the late half of the blocks, what is done at attention, norms,
activations and products. Optuna's TPE proposes; the symmetric relevance gain on the search set decides. The
best is compared with ``libra`` on images, and on models, that the search did not see.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
import yaml

from libragrad_fx.attribution import blocks
from libragrad_fx.decide import rulebook
from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.evaluate import measures
from libragrad_fx.evaluate.config import DataSpec, MethodSpec, ModelSpec, Name, TokensSpec
from libragrad_fx.evaluate.data import open_data, selected
from libragrad_fx.evaluate.subject import Subject, loaded, place
from libragrad_fx.extras import need, writing
from libragrad_fx.metrics.intervals import Paired, paired

LIBRA = "libra"
SITES: Mapping[str, tuple[str, ...]] = {
    "attention": ("stop", "0.1", "0.25", "0.5", "keep"),
    "value": ("0.25", "0.5", "keep", "1.5"),
    "norm": ("freeze_scale", "keep"),
    "activation": ("secant", "keep"),
    "product": ("scale", "0.25", "keep"),
}
"""What may be chosen, for each half of the blocks. attention: what q and k get. value: what v gets.
product: what values get that are multiplied. A number scales the gradient."""
PAPER = {
    "attention": "stop",
    "value": "keep",
    "norm": "freeze_scale",
    "activation": "secant",
    "product": "scale",
}
HALVES = ("early", "late")
Choice = Mapping[str, str]
"""By ``half.site``, what is done there."""


class Side(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    models: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    data: str


class SearchConfig(pydantic.BaseModel):
    """See the module."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    models: dict[Name, ModelSpec]
    data: dict[Name, DataSpec]
    search: Side
    held_out: Side
    method: MethodSpec = MethodSpec(method="fullgrad_plus")
    tokens: TokensSpec = TokensSpec()
    trials: Annotated[int, pydantic.Field(ge=1)] = 60
    seed: int = 0
    batch: Annotated[int, pydantic.Field(ge=2)] = 32
    device: str = "cpu"

    @pydantic.model_validator(mode="after")
    def _known(self) -> SearchConfig:
        for side in (self.search, self.held_out):
            unknown = [*({*side.models} - self.models.keys()), *({side.data} - self.data.keys())]
            if unknown:
                raise ValueError(f"no model or set is called {', '.join(sorted(unknown))}")
        if self.search.data == self.held_out.data:
            raise ValueError(
                "search and held_out are on the same set: a policy is compared on other samples"
            )
        return self

    @staticmethod
    def load(file: str | Path) -> SearchConfig:
        """Read a YAML file.

        Raises:
            InputError: no such file, no YAML, or a field that is wrong; with its place.
        """
        try:
            return SearchConfig.model_validate(yaml.safe_load(Path(file).read_text("utf-8")))
        except OSError as e:
            raise InputError(f"cannot read {str(file)!r}: {e.strerror}") from e
        except yaml.YAMLError as e:
            raise InputError(f"{str(file)!r} is no YAML: {' '.join(str(e).split())}") from e
        except pydantic.ValidationError as e:
            said = [f"{'.'.join(map(str, x['loc'])) or 'config'}: {x['msg']}" for x in e.errors()]
            raise InputError(f"{str(file)!r}: {'; '.join(said[:4])}") from e


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found. Numbers are SRG in [-1, 1]; ``compared``: by held-out model, the found policy
    against ``libra`` on the same images."""

    choice: Choice
    value: float
    libra: float
    trials: int
    compared: Mapping[str, Paired]


# --- a policy from choices


def policy_text(choice: Choice, paths: Sequence[str]) -> str:
    """A policy in YAML: libra's rows, and in front of them those of each half of the blocks ``paths``.

    What gates kept open lead to has rows of AttnLRP's kind (``behind``): norms and activations as libra.
    """
    rows: list[dict[str, Any]] = []
    cite = "search-policy"
    half = -(-len(paths) // 2)
    for name, mine in (("early", paths[:half]), ("late", paths[half:])):
        for path in mine:
            rows += [
                {**row, "where": path, "cite": cite}
                for site in SITES
                for row in _rows(site, choice[f"{name}.{site}"])
            ]
    book = yaml.safe_load((rulebook.rules_folder() / f"{LIBRA}.yaml").read_text("utf-8"))
    behind = [
        {"kind": kind, "site": "behind", "action": action, "cite": "as at the site value"}
        for kind, action in (
            ("normaliser", "freeze_scale"), ("gated", "secant"), ("product", "scale"),
            ("gate_source", "keep"), ("recurrent", "secant"),
        )
    ]  # fmt: skip
    weights = [{"kind": "attention", "site": "weights", "action": "keep", "cite": cite}]
    return yaml.safe_dump(
        {"policy": "found", "optional": True, "rows": [*rows, *book["rows"], *behind, *weights]},
        sort_keys=False,
    )


def _rows(site: str, chosen: str) -> list[dict[str, Any]]:
    """The rows of one site. Attention written out is a product whose gate is a softmax."""
    action: Any = {"scale": float(chosen)} if chosen[0].isdigit() else chosen
    if site == "attention":
        return [
            {"kind": "attention", "site": "gate", "action": action},
            {"kind": "product", "site": "gate", "of": "aten.softmax", "action": action},
        ]
    if site == "value":
        return [{"kind": "attention", "site": "value", "action": action}]
    kind = {"norm": "normaliser", "activation": "gated", "product": "product"}[site]
    return [{"kind": kind, "site": "values" if site == "product" else "value", "action": action}]


# --- how good a policy is


@dataclasses.dataclass(frozen=True)
class _Ground:
    """A model and the samples that policies are measured on."""

    subject: Subject
    cases: Sequence[measures.Case]
    paths: Sequence[str]


def _ground(config: SearchConfig, model: str, data: str) -> _Ground:
    spec = config.data[data]
    source = open_data({"load": spec.load, "args": spec.args} if spec.args else spec.load)
    chosen = selected(source, spec.count, spec.seed, spec.keep)
    subject = loaded(config.models[model], place(config.device), "float32")
    samples = [subject.inputs.sample(source.get(i)) for i in chosen.indices]
    cases = measures.cases(subject, samples, config.batch)
    return _Ground(subject, cases, blocks(cases[0].module))


def _gain(config: SearchConfig, ground: _Ground, policy: str) -> torch.Tensor:
    """(n,): the SRG of each sample."""
    found = []
    for case in ground.cases:
        classes = case.target(config.tokens.targets[0])
        one = case.attribution(config.method, policy, classes, config.tokens.scalar)
        rows = measures.tokens(case, one, classes, config.tokens)
        found += [r.value for r in rows if r.measure == "srg"]
    return torch.tensor(found, dtype=torch.float64)


def search(
    config: SearchConfig, folder: str | Path, seen: Callable[[int, float], None] | None = None
) -> Found:
    """Search, and compare what is found. It goes on where it was stopped: trials are kept in ``study.db``.

    Args:
        folder: gets ``study.db``, ``found.json`` and ``found-MODEL.yaml``, a policy for each model.
        seen: is told each trial's number and value.

    Raises:
        InputError: a model or set that cannot be opened, or a model without blocks.
        LibraGradError: Optuna is not installed.
    """
    optuna, folder = need("optuna", "evaluate"), Path(folder)
    with writing(folder / "study.db"):
        pass
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    grounds = [_ground(config, m, config.search.data) for m in config.search.models]
    study = optuna.create_study(
        direction="maximize", storage=f"sqlite:///{folder / 'study.db'}", study_name="policy",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=config.seed),
    )  # fmt: skip
    paper = {f"{half}.{site}": PAPER[site] for half in HALVES for site in SITES}
    if not study.trials:
        study.enqueue_trial(paper)

    def objective(trial: Any) -> float:
        choice = {k: trial.suggest_categorical(k, SITES[k.partition(".")[2]]) for k in paper}
        try:
            value = _mean_gain(config, grounds, choice, folder)
        except LibraGradError as e:
            raise optuna.TrialPruned(str(e)) from e
        if seen is not None:
            seen(trial.number, value)
        return value

    done = sum(t.state.is_finished() for t in study.trials)
    study.optimize(objective, n_trials=max(0, config.trials - done))
    libra = sum(float(_gain(config, g, LIBRA).mean()) for g in grounds) / len(grounds)
    best = dict(study.best_params)
    compared = {}
    for name in config.held_out.models:
        ground = _ground(config, name, config.held_out.data)
        file = folder / f"found-{name}.yaml"
        file.write_text(policy_text(best, ground.paths), "utf-8")
        compared[name] = paired(_gain(config, ground, str(file)), _gain(config, ground, LIBRA))
    found = Found(best, float(study.best_value), libra, len(study.trials), compared)
    said = {**dataclasses.asdict(found), "compared": {n: p._asdict() for n, p in compared.items()}}
    said["config"] = config.model_dump(mode="json")
    (folder / "found.json").write_text(json.dumps(said, indent=1, default=list), "utf-8")
    return found


def _mean_gain(config: SearchConfig, grounds: Sequence[_Ground], choice: Choice, folder: Path) -> float:
    file, total = folder / "trial.yaml", 0.0
    for ground in grounds:
        file.write_text(policy_text(choice, ground.paths), "utf-8")
        total += float(_gain(config, ground, str(file)).mean())
    return total / len(grounds)
