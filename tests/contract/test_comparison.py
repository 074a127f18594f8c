"""The table of other tools: README's is the page's, each row is shown, and other libraries' cells are as in
their code, where a library is installed in the version of the page.

Their code is read and not imported: some of them change PyTorch's classes. Those that are in no environment
are looked for in the folder that ``LIBRAGRAD_RIVALS`` names (``zoo/rivals.py`` says how to fill it).
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/comparison.md").read_text("utf-8")
NAMES = ["libragrad_fx", "Captum", "pytorch-grad-cam", "LXT", "inseq", "zennit", "autoLRP"]
MODULES = {"Captum": "captum", "pytorch-grad-cam": "pytorch_grad_cam", "autoLRP": "autolrp"}
NONE = "–"


def table(text: str) -> list[list[str]]:
    """The cells of the table that names these libraries, its head first and without the line below it."""
    lines = text[text.index("| | libragrad_fx |") :].partition("\n<!-- end -->")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


ROWS = {re.search(r"\(#([\w-]+)\)", row[-1])[1]: row for row in table(PAGE)[1:]}  # type: ignore[index]
"""The rows of the page, by the anchor of what shows them."""


def cell(row: str, name: str) -> str:
    return ROWS[row][1 + NAMES.index(name)]


def test_the_tables_are_the_same() -> None:
    page, readme = table(PAGE), table((ROOT / "README.md").read_text("utf-8"))
    assert readme == [row[:-1] for row in page]
    assert [word.replace("`", "") for word in page[0][1:-1]] == NAMES
    assert 8 <= len(ROWS) == len(page) - 1 <= 12


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_shown(row: str) -> None:
    """What we have, by code that runs (``test_docs.py``) or a tutorial; and what else was read."""
    _, _, text = PAGE.partition(f"\n### {row}\n")
    text = re.split(r"\n##+ ", text)[0]
    if cell(row, "libragrad_fx") != NONE:
        assert "```python\n" in text or "tutorials/" in text
    for name in NAMES[1:]:
        assert cell(row, name) == NONE or name in text, f"{name}: {cell(row, name)}"


def code(name: str) -> Path:
    """The folder of a library's code, in the version that the page is about."""
    module = MODULES.get(name, name.lower())
    apart = Path(os.environ.get("LIBRAGRAD_RIVALS", "."))
    spec = importlib.util.find_spec(module)
    folder = Path(spec.origin).parent if spec and spec.origin else apart / module
    if not folder.is_dir():
        pytest.skip(f"{name} is not installed")
    package = {"pytorch_grad_cam": "grad-cam"}.get(module, module)
    (found,) = importlib.metadata.distributions(name=package, path=[str(folder.parent)])
    if f"{package} {found.version}" not in PAGE:
        pytest.skip(f"the page is not about {package} {found.version}")
    return folder


def text(name: str, file: str = "**/*.py") -> str:
    return "\n".join(p.read_text("utf-8") for p in sorted(code(name).glob(file)))


def classes(name: str, file: str, base: str = "") -> set[str]:
    """The classes of a library's files; those with the base ``base``."""
    found = set()
    for path in code(name).glob(file):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and (not base or base in map(ast.unparse, node.bases)):
                found.add(node.name)
    return found


def test_captum() -> None:
    api = text("Captum", "attr/__init__.py")
    perturbing = {
        "FeatureAblation", "FeaturePermutation", "Occlusion", "ShapleyValues", "ShapleyValueSampling",
        "Lime", "KernelShap",
    }  # fmt: skip
    shown = {"LayerGradCam", "GuidedGradCam", "LLMAttribution", "LLMGradientAttribution"}
    assert all(f'"{name}"' in api for name in perturbing | shown)
    assert cell("perturbation", "Captum").startswith(f"{len(perturbing)},")
    assert cell("cams", "Captum") == str(len(re.findall(r"import \w*GradCam$", api, re.MULTILINE)))
    supported = text("Captum", "attr/_core/lrp.py").partition("SUPPORTED_LAYERS_WITH_RULES = {")[2]
    assert cell("models", "Captum") == f"{supported.partition('}')[0].count('nn.')} layer classes"
    rules = classes("Captum", "attr/_utils/lrp_rules.py")
    assert {"EpsilonRule", "GammaRule", "Alpha1_Beta0_Rule"} <= rules
    assert all((code("Captum") / part).is_dir() for part in ("attr/_core/neuron", "concept", "influence"))
    metrics = text("Captum", "metrics/__init__.py")
    assert '"infidelity"' in metrics
    assert '"sensitivity_max"' in metrics


def test_grad_cam() -> None:
    exported = set(re.findall(r"(\w+)$", text("pytorch-grad-cam", "__init__.py"), re.MULTILINE))
    cams = classes("pytorch-grad-cam", "*.py", "BaseCAM") & exported
    assert cell("cams", "pytorch-grad-cam").startswith(f"{len(cams)};")
    assert {"ScoreCAM", "AblationCAM"} <= cams
    targets = classes("pytorch-grad-cam", "utils/model_targets.py")
    assert {"SemanticSegmentationTarget", "FasterRCNNBoxScoreTarget"} <= targets
    assert "DeepFeatureFactorization" in text("pytorch-grad-cam", "feature_factorization/*.py")
    assert {"ARCC", "ROADCombined", "DropInConfidence"} <= classes("pytorch-grad-cam", "metrics/*.py")


def test_lxt() -> None:
    maps = text("LXT", "efficient/models/__init__.py").partition("DEFAULT_MAP = {")[2].partition("}")[0]
    assert cell("models", "LXT") == f"{maps.count(': ')} model files"
    assert "setattr(module, method_name, fn)" in text("LXT", "efficient/patches.py")
    assert "ALL_ATTENTION_FUNCTIONS" in text("LXT", "efficient/patches.py")
    assert "conservation_check" in classes("LXT", "explicit/check.py")
    assert "EpsilonRule" in classes("LXT", "explicit/rules.py")


def test_inseq() -> None:
    methods = classes("inseq", "attr/feat/perturbation_attribution.py", "PerturbationAttributionRegistry")
    assert cell("perturbation", "inseq") == str(len(methods))
    layers = classes("inseq", "attr/feat/gradient_attribution.py", "GradientAttributionRegistry")
    assert sum(name.startswith("Layer") for name in layers) == 3
    assert "AttentionWeightsAttribution" in classes("inseq", "attr/feat/internals_attribution.py")
    assert "EncoderDecoderAttributionModel" in classes("inseq", "models/encoder_decoder.py")
    assert "def contrast_logits_diff_fn" in text("inseq", "attr/step_functions.py")
    assert "return_convergence_delta" in text("inseq", "attr/feat/gradient_attribution.py")


def test_zennit() -> None:
    hooks = classes("zennit", "rules.py", "BasicHook") | classes("zennit", "rules.py", "Hook")
    rules = {name for name in hooks if not name.startswith("ReLU")}
    composites = len(re.findall("^@register_composite", text("zennit", "composites.py"), re.MULTILINE))
    assert cell("rules", "zennit") == f"{len(rules)} rules, {composites} composites"
    assert "MergeBatchNorm" in classes("zennit", "canonizers.py", "Canonizer")
    assert "Occlusion" in classes("zennit", "attribution.py", "Attributor")
    assert "ttention" not in text("zennit", "rules.py") + text("zennit", "types.py")


def test_autolrp() -> None:
    rules = text("autoLRP", "backward/rules.py").partition("PRODUCT_RULES = ")[2].partition(")")[0]
    assert all(f"'{name}'" in rules for name in ("epsilon", "gamma", "zplus", "alpha_beta", "zbox"))
    assert "def decompose_sdpa" in text("autoLRP", "forward/decompose.py")
    assert "retain_graph=True" in text("autoLRP", "backward/engine.py")
    metrics = text("autoLRP", "metrics.py")
    assert all(f"def {name}(" in metrics for name in ("conservation", "perturbation_curve", "aopc"))
    assert "capture_layers" in text("autoLRP", "config.py")


@pytest.mark.parametrize("name", NAMES[1:])
def test_no_other_writes_programs(name: str) -> None:
    assert cell("files", name) == NONE
    assert not re.search(r"\bonnx\b|torch\.export\b|aoti", text(name), re.IGNORECASE)
