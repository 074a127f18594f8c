"""What unmodified libraries do with a model, and with each form that it can be captured in.

``tests/interop`` requires the outcomes; ``tools/interop.py`` writes them down.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import LibraGradError
from libragrad_fx.module.captured import CapturedModule

Tensor = torch.Tensor
Run = Callable[[nn.Module, Tensor], Any]
TARGET = 2
STEPS = 8
LAYER, NEXT = "blocks.0", "blocks.1"  # what comes out of the one is the input of the other


def small_vit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=2, num_classes=5
    )
    return randomised(model), torch.randn(2, 3, 32, 32)


class Convolutions(nn.Module):
    """ReLUs as modules of their own, which is what methods by module type look for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.head(self.pool(x).flatten(1))


def cnn() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomised(Convolutions()), torch.randn(2, 3, 8, 8)


def vit_tiny() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    nn.init.normal_(model.head.weight, 0, 0.1)
    return model, torch.randn(2, 3, 224, 224)


def randomised(model: nn.Module, size: float = 0.3) -> nn.Module:
    for p in model.parameters():
        nn.init.normal_(p, 0, size)
    return model.eval()


FORMS: dict[str, Run] = {
    "original": lambda model, x: model,
    "`fx.symbolic_trace`": lambda model, x: torch.fx.symbolic_trace(model),
    "`export().module()`": lambda model, x: exported(model, x).module(),
    "`unflatten(export())`": lambda model, x: torch.export.unflatten(exported(model, x)),
    "`lg.trace`": lg.trace,
    "`lg.transform`": lg.transform,
}


def exported(model: nn.Module, x: Tensor) -> Any:
    free = {0: torch.export.Dim.AUTO}
    return torch.export.export(model, (x,), dynamic_shapes=(free,))


class Use(NamedTuple):
    """One use of one library.

    run:  on any form of a model
    ours: the same by our own method, on a module of ours; None if we have none
    needs: the modules that it imports
    """

    run: Run
    ours: Run | None = None
    needs: tuple[str, ...] = ()


def missing(use: Use) -> str:
    """What of a use's libraries is not installed."""
    return ", ".join(name for name in use.needs if importlib.util.find_spec(name) is None)


# --- Captum


def captum(name: str, layer: str = "", make: dict[str, Any] | None = None, **options: Any) -> Run:
    """A method of Captum by its name, on the output of a layer if one is named."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        import captum.attr

        at = (model.get_submodule(layer),) if layer else ()
        method = getattr(captum.attr, name)(model, *at, **make or {})
        return method.attribute(x.clone(), **options)

    return run


def noise_tunnel(model: nn.Module, x: Tensor) -> Tensor:
    from captum.attr import NoiseTunnel, Saliency

    torch.manual_seed(1)
    tunnel = NoiseTunnel(Saliency(model))
    found = tunnel.attribute(x.clone(), nt_samples=4, stdevs=0.1, target=TARGET, abs=False)
    return found.sum(1)


def our_noise(module: Any, x: Tensor) -> Tensor:
    """Our gradient, at the inputs that Captum draws."""
    torch.manual_seed(1)
    noisy = torch.normal(x.repeat_interleave(4, 0), 0.1)
    found = lg.attribute(module, noisy, TARGET, method="gradient", resolution="pixels").values
    return found.unflatten(0, (-1, 4)).mean(1)


def summed(run: Run, axis: int = 1) -> Run:
    return lambda model, x: run(model, x).sum(axis)


def ours(method: str, **options: Any) -> Run:
    """A method of ours, at the place that Captum explains."""
    place = "tokens" if "layers" in options else "pixels"
    return lambda module, x: lg.attribute(
        module, x, TARGET, method=method, resolution=place, **options
    ).values


def our_tokens(module: Any, x: Tensor) -> Tensor:
    found = lg.attribute(module, x, TARGET, method="hirescam", layers=[NEXT])
    assert found.prefix is not None
    return torch.cat([found.prefix, found.values.flatten(1)], 1)


# --- pytorch-grad-cam


def grad_cam(name: str, layer: str = LAYER) -> Run:
    """A CAM class by its name, on the output of a layer."""

    def run(model: nn.Module, x: Tensor) -> np.ndarray:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        extra: dict[str, Any] = {}
        if name == "AblationCAM":  # it puts a layer of its own into the model
            model, extra = copy.deepcopy(model), {"ablation_layer": pytorch_grad_cam.AblationLayerVit()}
        with getattr(pytorch_grad_cam, name)(
            model=model, target_layers=[model.get_submodule(layer)], reshape_transform=reshape(model),
            **extra,
        ) as cam:  # fmt: skip
            np.random.seed(0)
            return cam(input_tensor=x.clone(), targets=[ClassifierOutputTarget(TARGET)] * len(x))
        raise IndexError("the context swallowed it")

    return run


def reshape(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Ours for a module of ours; else what a user writes by hand for a square ViT with a class token."""
    return lg.reshape_transform(model) if isinstance(model, CapturedModule) else patches


def patches(output: Tensor) -> Tensor:
    if output.ndim == 4:
        return output
    side = int((output.shape[1] - 1) ** 0.5)
    return output[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)


def our_cam(method: str, layer: str = NEXT) -> Run:
    """A CAM of ours, cut and stretched as pytorch-grad-cam does."""

    def run(module: Any, x: Tensor) -> np.ndarray:
        from pytorch_grad_cam.utils.image import scale_cam_image

        found = lg.attribute(module, x, TARGET, method=method, layers=[layer]).values
        return scale_cam_image(scale_cam_image(np.maximum(found.numpy(), 0), (x.shape[-1], x.shape[-2])))

    return run


def guided(model: nn.Module, x: Tensor) -> np.ndarray:
    """pytorch-grad-cam's guided backpropagation, which swaps the model's ReLUs."""
    from pytorch_grad_cam import GuidedBackpropReLUModel

    swapped = GuidedBackpropReLUModel(copy.deepcopy(model), torch.device("cpu"))
    return np.stack([swapped(each[None].clone(), TARGET) for each in x])


# --- Quantus


def quantus(name: str, explain: Callable[..., np.ndarray] | None = None, **make: Any) -> Run:
    """The scores of a metric: of Input x Gradient by Captum, or by ``explain``."""

    def run(model: nn.Module, x: Tensor) -> np.ndarray:
        import quantus

        steps = {"features_in_step": x[0, 0].numel() // 8} if name == "PixelFlipping" else {}
        metric = getattr(quantus, name)(disable_warnings=True, **steps, **make)
        asked = {"method": "InputXGradient"}
        if explain is not None:
            asked = {"method": "input_x_gradient", "resolution": "pixels"}
        scores = metric(
            model=model, x_batch=x.numpy(), y_batch=np.array([TARGET] * len(x)), a_batch=None, device="cpu",
            explain_func=explain or quantus.explain, explain_func_kwargs=asked,
        )  # fmt: skip
        return np.array(scores, dtype=float)

    return run


def metric(name: str, **make: Any) -> Use:
    needs = ("quantus", "captum")
    return Use(quantus(name, **make), quantus(name, lg.quantus_explain, **make), needs)


def layers_found(model: nn.Module, x: Tensor) -> int:
    """How many layers Model Parameter Randomisation would randomise."""
    from quantus.helpers.model.pytorch_model import PyTorchModel

    return sum(1 for _ in PyTorchModel(model).get_random_layer_generator())


# --- PyTorch


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x)[:, TARGET].sum(), x)
    return found


def saved(model: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(pickle.loads(pickle.dumps(model)), file)
    file.seek(0)
    return gradient(torch.load(file, weights_only=False), x)


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return gradient(torch.compile(model, fullgraph=True, backend="eager"), x)


CAPTUM, CAMS = ("captum",), ("pytorch_grad_cam",)
CAM_CLASSES = (
    "GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "EigenCAM",
    "EigenGradCAM", "KPCA_CAM", "FEM", "ScoreCAM", "AblationCAM", "RandomCAM", "FinerCAM", "ShapleyCAM",
    "FullGrad",
)  # fmt: skip
VIT: dict[str, Use] = {
    "Captum InputXGradient": Use(
        summed(captum("InputXGradient", target=TARGET)), ours("input_x_gradient"), CAPTUM
    ),
    "Captum IntegratedGradients": Use(
        summed(captum("IntegratedGradients", target=TARGET, n_steps=STEPS)),
        ours("integrated_gradients", steps=STEPS), CAPTUM,
    ),
    "Captum Saliency": Use(summed(captum("Saliency", target=TARGET, abs=False)), ours("gradient"), CAPTUM),
    "Captum NoiseTunnel": Use(noise_tunnel, our_noise, CAPTUM),
    "Captum LayerActivation": Use(captum("LayerActivation", LAYER), None, CAPTUM),
    "Captum LayerGradCam": Use(captum("LayerGradCam", LAYER, target=TARGET), None, CAPTUM),
    "Captum LayerGradientXActivation": Use(
        summed(captum("LayerGradientXActivation", LAYER, target=TARGET), -1), our_tokens, CAPTUM
    ),
    "Captum LayerIntegratedGradients": Use(
        captum("LayerIntegratedGradients", LAYER, target=TARGET, n_steps=STEPS), None, CAPTUM
    ),
    "Captum DeepLift": Use(summed(captum("DeepLift", target=TARGET)), ours("input_x_gradient"), CAPTUM),
    "Captum LRP": Use(captum("LRP", target=TARGET), None, CAPTUM),
    **{f"grad-cam {name}": Use(grad_cam(name), None, CAMS) for name in CAM_CLASSES},
    "grad-cam HiResCAM": Use(grad_cam("HiResCAM"), our_cam("hirescam"), CAMS),
    "Quantus PixelFlipping": metric("PixelFlipping"),
    "Quantus Completeness": metric("Completeness"),
    "Quantus RandomLogit": metric("RandomLogit", num_classes=5),
    "Quantus MPRT, layers found": Use(layers_found, None, ("quantus",)),
    "`copy.deepcopy`": Use(lambda m, x: gradient(copy.deepcopy(m), x), gradient),
    "`pickle`, `torch.save`": Use(saved, gradient),
    "`torch.compile(fullgraph)`": Use(compiled, gradient),
}  # fmt: skip
CNN: dict[str, Use] = {
    "Captum LayerGradCam": Use(
        summed(captum("LayerGradCam", "relu2", target=TARGET)), ours("gradcam", layers=["pool"]), CAPTUM
    ),
    "grad-cam GradCAM": Use(grad_cam("GradCAM", "relu2"), our_cam("gradcam", "pool"), CAMS),
    "grad-cam ShapleyCAM": Use(grad_cam("ShapleyCAM", "relu2"), None, CAMS),
    "grad-cam FullGrad": Use(grad_cam("FullGrad", "relu2"), None, CAMS),
    **{
        f"Captum {name}": Use(captum(name, target=TARGET), None, CAPTUM)
        for name in ("GuidedBackprop", "Deconvolution", "DeepLift", "LRP")
    },
    "Captum DeepLiftShap": Use(
        captum("DeepLiftShap", target=TARGET, baselines=torch.zeros(2, 3, 8, 8)), None, CAPTUM
    ),
    **{
        f"Captum {name}": Use(captum(name, "conv2", target=TARGET), None, CAPTUM)
        for name in ("GuidedGradCam", "LayerDeepLift", "LayerLRP")
    },
    **{
        f"Captum {name}": Use(captum(name, "conv2", neuron_selector=(1, 2, 3)), None, CAPTUM)
        for name in ("NeuronGuidedBackprop", "NeuronDeconvolution", "NeuronDeepLift")
    },
    "grad-cam GuidedBackpropReLUModel": Use(guided, None, CAMS),
}


def outcomes(
    use: Use, names: Iterable[str], forms: Callable[[str], nn.Module], x: Tensor
) -> tuple[str, ...]:
    """What comes of one use on forms of a model, the original first:

    - "same": the original's values, to the bit; of the original itself, "ok"
    - "as ours": values of our own method, to 1e-4 of the largest
    - "runs": other values
    - "refused": by an error of ours that says why; "fails (...)": by any other
    """
    words, known = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                module = forms(name)
                found = use.run(module, x)
            except LibraGradError:
                words.append("refused")
            except Exception as e:
                words.append(f"fails ({type(e).__name__})")
            else:
                if isinstance(found, int):
                    words.append(str(found))
                else:
                    words.append("ok" if name == "original" else compared(use, module, x, found, known))
                known = found if name == "original" else known
    return tuple(words)


def compared(use: Use, module: nn.Module, x: Tensor, found: Any, known: Any) -> str:
    if known is not None and np.array_equal(array(known), array(found)):
        return "same"
    own = use.ours if isinstance(module, CapturedModule) else None
    return "as ours" if own is not None and close(own(module, x), found) else "runs"


def close(a: Any, b: Any) -> bool:
    a, b = array(a), array(b)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


def array(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().double().numpy()
