"""What an installed wheel must do with its own dependencies alone. Run outside of the checkout."""

import tempfile
from pathlib import Path

import torch

import libragrad_fx as lg


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 4, 4)
        self.blocks = torch.nn.ModuleList([Block(16), Block(16)])
        self.norm, self.head = torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


lg.show_versions()
torch.manual_seed(0)
model, images = Net().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
gm = lg.transform(model, images)
certificate = lg.verify(model, gm, images, target=3)
assert certificate.ok, certificate
assert torch.equal(gm(images), model(images))
assert lg.audit(model, images, target=3).completeness_error
found = lg.attribute(model, images, target=3)
assert found.values.shape == (2, 4, 4), found.values.shape
assert float((found.completeness_error / found.output).abs().max()) < 1e-9
with tempfile.TemporaryDirectory() as folder:
    kept = lg.Attribution.load(found.save(Path(folder) / "map.npz"))
assert torch.equal(kept.values, found.values)
print(f"smoke: {Path(lg.__file__).parent} explains, and its certificate holds")
