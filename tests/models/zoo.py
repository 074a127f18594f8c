"""Small networks that no rule names, each with a mechanism that must fall out of the roles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Zoo = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]


class TanhGelu(nn.Module):
    """The tanh form of GELU, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        inner = math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)
        return self.down(0.5 * h * (1 + torch.tanh(inner)))


class RmsNorm(nn.Module):
    """RMSNorm from pow, mean and rsqrt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight)


class LayerNormByHand(nn.Module):
    """LayerNorm from mean, var and a division."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-6).sqrt()
        return self.head(h)


class CosineAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.exp()
        return self.head((scores.softmax(-1) @ v).mean(1))


class FusedAttention(nn.Module):
    """PyTorch's fused attention, its mask computed from the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        mask = q @ x.unsqueeze(1).mT
        return self.head(F.scaled_dot_product_attention(q, k, v, mask).mean((1, 2)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.reduce, self.expand = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(2, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).relu()
        gate = self.expand(self.reduce(h.mean((2, 3))).relu()).sigmoid()
        return self.head((h * gate[:, :, None, None]).mean((2, 3)))


class LinearAttention(nn.Module):
    """q(kᵀv) over a denominator: three values multiplied, one divided away."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        numerator = q @ (k.mT @ v)
        return self.head((numerator / (q @ k.sum(1, keepdim=True).mT + 1e-6)).mean(1))


class TalkingHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = self.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(2)
        a = self.after(a).permute(0, 3, 1, 2)
        return self.head((a @ v).transpose(1, 2).reshape(b, n, c).mean(1))


class TanhMlp(nn.Module):
    """No gate at all: tanh carries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class SigmoidMlp(nn.Module):
    """Sigmoids that carry, with a value of one half at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Recurrent(nn.Module):
    """A bidirectional LSTM, a GRU and an Elman layer in a row, PyTorch's fused ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.rnn = nn.RNN(5, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.gru(self.lstm(x)[0])[0])[0][:, -1])


class LstmCell(nn.Module):
    """An LSTM written out: its cell state is what tells which of its gates carries."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_state, self.head = (
            nn.Linear(8, 24),
            nn.Linear(6, 24),
            nn.Linear(6, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        for t in range(4):
            i, f, g, o = (self.of_input(x[:, t]) + self.of_state(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class GatedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.head = nn.Conv1d(3, 8, 3), nn.Conv1d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))).mean(-1))


class DynamicConv(nn.Module):
    """One kernel mixed by a routing softmax (a gate), one computed from the input (a value)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 3, 3, 3))
        self.route, self.weights, self.head = nn.Linear(3, 3), nn.Linear(3, 24), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3))
        routing = self.route(pooled).softmax(-1).mean(0)
        h = F.conv2d(x, torch.einsum("e,eoikl->oikl", routing, self.experts)).relu().mean((2, 3))
        kernel = self.weights(pooled.mean(0)).reshape(8, 3)
        return self.head(h + F.linear(pooled, kernel, h.mean(0)))


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))  # noqa: E731
        self.experts = nn.ModuleList(make() for _ in range(3))
        self.route, self.head = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.route(x).softmax(-1)
        return self.head(sum(share[:, i : i + 1] * e(x) for i, e in enumerate(self.experts)))


class SoftmaxHead(nn.Module):
    """The model returns probabilities: balanced as values, with a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).softmax(-1)


class Modulated(nn.Module):
    """Linear ops, norms and powers with an argument that modulates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        h = torch.lerp(a, x, b.sigmoid())
        h = F.layer_norm(h, (8,), b.mean(0), a.mean(0))
        h = h + torch.pow(a.abs() + 0.5, 1 + b.sigmoid())
        return self.head(h)


class LiveSlope(nn.Module):
    """A leaky ReLU whose slope is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.prelu(self.a(x), self.b(x).mean(0)))


class Sampler(nn.Module):
    """A spatial transformer: where to look modulates, what is seen carries."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.head = nn.Linear(3, 6), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.where(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(
            F.grid_sample(x, grid, padding_mode="border", align_corners=False).mean((2, 3))
        )


class EveryFusedOp(nn.Module):
    """Norms, activations, attention modules and an encoder layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(
            nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.RMSNorm(5)
        )
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(5, 1, 7, 0.0, "gelu", batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms(x)
        x = F.normalize(torch.einsum("bchw,bdhw->bcd", x, x))
        x = F.gelu(x, approximate="tanh") + F.mish(x) + F.hardswish(x) + F.silu(x) + F.elu(x)
        x = x + F.selu(x) + F.celu(x) + F.softplus(x) + F.relu6(x) + F.logsigmoid(x)
        x = x + F.glu(torch.cat([x, x], -1)) + torch.sin(x) + torch.expm1(x)
        y = F.pad(x, (1, 1), value=0.3)
        return self.encoder(self.attention(y, y, y)[0]).mean(1)


class Reciprocal(nn.Module):
    """Powers that carry: 1/x, sqrt, var, std, a norm, a logsumexp, exp and log."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).abs() + 0.5
        parts = [1 / h, h.sqrt(), h.log(), (-h).exp(), h.rsqrt()]
        scales = [h.var(-1), h.std(-1), h.norm(dim=-1), h.logsumexp(-1)]
        return self.head(sum(parts) + torch.stack(scales, -1).repeat(1, 2))


ZOO: Zoo = {
    "tanh_gelu": (TanhGelu, (2, 8)),
    "rms_norm": (RmsNorm, (2, 8)),
    "layer_norm_by_hand": (LayerNormByHand, (2, 8)),
    "cosine_attention": (CosineAttention, (2, 5, 8)),
    "fused_attention": (FusedAttention, (2, 5, 8)),
    "squeeze_excite": (SqueezeExcite, (2, 3, 8, 8)),
    "linear_attention": (LinearAttention, (2, 5, 8)),
    "talking_heads": (TalkingHeads, (2, 5, 8)),
    "tanh_mlp": (TanhMlp, (2, 8)),
    "sigmoid_mlp": (SigmoidMlp, (2, 8)),
    "recurrent": (Recurrent, (2, 5, 8)),
    "lstm_cell": (LstmCell, (2, 4, 8)),
    "gated_conv": (GatedConv, (2, 3, 9)),
    "dynamic_conv": (DynamicConv, (2, 3, 8, 8)),
    "mixture_of_experts": (MixtureOfExperts, (2, 8)),
    "softmax_head": (SoftmaxHead, (2, 8)),
    "modulated": (Modulated, (2, 8)),
    "live_slope": (LiveSlope, (2, 8)),
    "sampler": (Sampler, (2, 3, 8, 8)),
    "every_fused_op": (EveryFusedOp, (2, 3, 4, 5)),
    "reciprocal": (Reciprocal, (2, 8)),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """The network ``name`` in eval mode with O(1) random parameters, and an input for it."""
    torch.manual_seed(list(ZOO).index(name))
    make, shape = ZOO[name]
    model = make().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.normal_(0, 1.5 / math.sqrt(fan_in))
    return model.eval(), torch.randn(shape, dtype=dtype)
