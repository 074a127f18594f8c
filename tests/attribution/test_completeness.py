"""FullGrad and FullGrad+ add up to what they say, and each sample is explained as it is alone."""

from __future__ import annotations

import pytest
import torch

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import InputError
from tests.attribution.once import captured
from tests.between import fast_first
from zoo.small import SMALL, Small, samples

FAST = ["table", "lstm", "voxels"]
CUT = {"vilt"}
"""Models in several graphs, or that are recorded anew at each call: no biases, and they say so."""
SINGLE = {"llama": 1e-6, "efficientvit": 1e-6}
"""Relative errors of models that compute norms or attention in float32, whatever they are given."""
EACH = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in SMALL]


def made(name: str) -> tuple[Small, torch.nn.Module]:
    try:
        return captured(name)
    except ImportError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("name", EACH)
def test_parts_add_up_and_samples_stand_alone(name: str) -> None:
    model, gm = made(name)
    if name in CUT:
        with pytest.raises(InputError, match="one captured graph"):
            lg.attribute(gm, model.inputs, model.target)
        found = lg.attribute(gm, model.inputs, model.target, method="input_x_gradient")
        account = lg.audit(gm, model.inputs, model.target)
        torch.testing.assert_close(float(found.total.sum()), account.input)
        assert {*found.others} == {"input_ids"}  # beside the map of the picture
        return
    for method in ("fullgrad", "fullgrad_plus"):
        found = lg.attribute(gm, model.inputs, model.target, method=method)
        assert float((found.completeness_error / found.expected).abs().max()) < SINGLE.get(name, 1e-9)
        shown = found.values.flatten(1).sum(1) + sum(m.flatten(1).sum(1) for m in found.others.values())
        shown = shown + found.unplaced + (0 if found.prefix is None else found.prefix.sum(1))
        torch.testing.assert_close(shown, found.total)
        for i in range(len(found.output)):
            one = lg.attribute(gm, samples(model.inputs, slice(i, i + 1)), model.target, method=method)
            torch.testing.assert_close(one.values[0], found.values[i], rtol=1e-8, atol=1e-11)
            for k, m in one.others.items():
                torch.testing.assert_close(m[0], found.others[k][i], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", fast_first(["tabular", *sorted(SMALL.keys() - CUT - {"tabular"})], 1))
def test_a_batch_is_each_sample_by_every_method(name: str) -> None:
    """What is drawn (``random``, ``smoothgrad``) is the same for each sample of a batch."""
    model, gm = made(name)
    answered = 0
    for method in METHODS:
        try:
            found = lg.attribute(gm, model.inputs, model.target, method=method, steps=2)
        except InputError:
            with pytest.raises(InputError):
                lg.attribute(gm, samples(model.inputs, slice(1)), model.target, method=method, steps=2)
            continue
        answered += 1
        for i in range(len(found.output)):
            one = lg.attribute(
                gm, samples(model.inputs, slice(i, i + 1)), model.target, method=method, steps=2
            )
            assert one.others.keys() == found.others.keys()
            pairs = [(one.values[0], found.values[i]), (one.total[0], found.total[i])]
            pairs += [(m[0], found.others[k][i]) for k, m in one.others.items()]
            pairs += [] if one.prefix is None else [(one.prefix[0], found.prefix[i])]
            for alone, within in pairs:
                scale = max(float(alone.abs().max()), 1e-3)  # behind a norm, gradients add up to zero
                assert float((alone - within).abs().max()) < SINGLE.get(name, 1e-10) * scale, (method, i)
    assert answered >= 13


@pytest.mark.slow
def test_the_error_of_a_llama_is_that_of_its_norms() -> None:
    """transformers rounds to float32 inside its norms; with PyTorch's, in float64, FullGrad is complete."""
    model, _ = made("llama")
    for path, norm in [*model.model.named_modules()]:
        if type(norm).__name__ == "LlamaRMSNorm":
            own = torch.nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=norm.weight.dtype)
            own.load_state_dict(norm.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(parent), name, own)
    found = lg.attribute(model.model.eval(), model.inputs, model.target, method="fullgrad")
    assert float((found.completeness_error / found.expected).abs().max()) < 1e-12
