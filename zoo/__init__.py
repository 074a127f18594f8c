"""Models by name, for ``libragrad coverage`` and the tests: in the repository, not in the wheel.

``libragrad_fx.coverage.suites`` imports a file of this folder when its suite is used. Each file has
``names()``, which maps every model's name to its family, and ``build(name)``, which returns a ``Subject``.
``real.py`` is no such list: it loads real weights and data, for ``tools/`` and the tests.
"""

from __future__ import annotations

SAMPLE = {
    ("hf", "bert"): "post-norm encoder, from embeddings",
    ("hf", "deberta-v2"): "disentangled attention",
    ("hf", "llama"): "SwiGLU, rotary positions, RMSNorm in float32",
    ("hf", "gpt-oss"): "attention sinks, clamped gates, experts",
    ("hf", "t5"): "encoder and decoder, cross-attention, relative bias",
    ("hf", "mamba"): "selective scan",
    ("hf", "rwkv"): "recurrence with exponential gates",
    ("hf", "swin"): "shifted windows",
    ("hf", "wav2vec2"): "convolutions over sound, group norm",
    ("timm-all", "test_efficientnet"): "squeeze-excite, batch norm",
    ("timm-all", "test_nfnet"): "standardised weights, no norm",
    ("torchvision", "shufflenet_v2_x0_5"): "channel shuffle",
}
"""One small model for each of a dozen mechanisms, by suite and name."""
