"""Models of libraries that strangers build on, each small and with random weights.

Each library has one function, which imports it and returns its models by name: (builder, function that
makes inputs). Nothing is downloaded. ``pip install '.[community]'`` installs the libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from libragrad_fx.coverage.suites import Subject
from libragrad_fx.extras import need
from libragrad_fx.target import middle

Entry = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]
Models = Mapping[str, Entry]


class Call(nn.Module):
    """A module with another forward, ``f(module, *inputs)``: its own is no function of tensors, or is not
    what one explains."""

    def __init__(self, module: nn.Module, f: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.f = module, f

    def forward(self, *args: Any) -> Any:
        return self.f(self.module, *args)


def _randn(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def _tokens(vocabulary: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(1, vocabulary, shape),)


# --- pictures


def _vit_pytorch() -> Models:
    v = need("vit_pytorch", "community")
    sizes = {"num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}
    whole = {"image_size": 32, "patch_size": 8, **sizes}
    part = functools.partial

    def of(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(need(f"vit_pytorch.{module}", "community"), name)(**options)

    levels = {"num_classes": 5}
    stages = {
        f"s{i}_{key}": value
        for i in (1, 2, 3)
        for key, value in {"emb_dim": 16 * i, "emb_kernel": 3, "emb_stride": 2, "proj_kernel": 3,
                           "kv_proj_stride": 2, "heads": i, "depth": 1, "mlp_mult": 2}.items()
    }  # fmt: skip
    pictures = lambda: ([torch.randn(3, 32, 24), torch.randn(3, 16, 40)],)  # noqa: E731
    return {
        "ViT": (part(v.ViT, **whole), _randn(2, 3, 32, 32)),
        "SimpleViT": (part(v.SimpleViT, **whole), _randn(2, 3, 32, 32)),
        "DeepViT": (of("deepvit", "DeepViT", **whole), _randn(2, 3, 32, 32)),
        "CaiT": (of("cait", "CaiT", **whole, cls_depth=1), _randn(2, 3, 32, 32)),
        "ParallelViT": (of("parallel_vit", "ViT", **whole), _randn(2, 3, 32, 32)),
        "PatchMerger": (
            of("vit_with_patch_merger", "ViT", **whole, patch_merge_layer=1, patch_merge_num_tokens=4),
            _randn(2, 3, 32, 32),
        ),
        "SmallData": (of("vit_for_small_dataset", "ViT", **whole), _randn(2, 3, 32, 32)),
        "RvT": (of("rvt", "RvT", **whole), _randn(2, 3, 32, 32)),
        "CCT": (
            of("cct", "CCT", img_size=32, embedding_dim=32, n_conv_layers=1, kernel_size=3, stride=2,
               padding=1, num_layers=2, num_heads=2, mlp_ratio=2.0, num_classes=5),
            _randn(2, 3, 32, 32),
        ),
        "CvT": (of("cvt", "CvT", **levels, **stages), _randn(2, 3, 32, 32)),
        "PiT": (
            of("pit", "PiT", image_size=32, patch_size=8, dim=32, num_classes=5, depth=(1, 1), heads=2,
               mlp_dim=48),
            _randn(2, 3, 32, 32),
        ),
        "MaxViT": (
            of("max_vit", "MaxViT", **levels, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1),
               window_size=4),
            _randn(2, 3, 64, 64),
        ),
        "XCiT": (of("xcit", "XCiT", **whole, cls_depth=1), _randn(2, 3, 32, 32)),
        "ViT3D": (
            of("vit_3d", "ViT", image_size=16, image_patch_size=8, frames=4, frame_patch_size=2, **sizes),
            _randn(2, 3, 4, 16, 16),
        ),
        "ViViT": (
            of("vivit", "ViViT", image_size=16, image_patch_size=8, frames=4, frame_patch_size=2,
               num_classes=5, dim=32, spatial_depth=1, temporal_depth=1, heads=2, mlp_dim=48),
            _randn(2, 3, 4, 16, 16),
        ),
        "NaViT": (of("na_vit", "NaViT", **{**whole, "image_size": 64}), pictures),
    }  # fmt: skip


def _segmentation() -> Models:
    smp = need("segmentation_models_pytorch", "community")
    names = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "Linknet", "MAnet")
    made = {
        n: (functools.partial(getattr(smp, n), "resnet18", encoder_weights=None, classes=3),
            _randn(2, 3, 64, 64))
        for n in names
    }  # fmt: skip
    made["PAN"] = (
        functools.partial(smp.PAN, "resnet18", encoder_weights=None),
        _randn(2, 3, 128, 128),
    )
    for n in ("Segformer", "UPerNet"):
        build = functools.partial(getattr(smp, n), "mit_b0", encoder_weights=None, classes=3)
        made[n] = (build, _randn(2, 3, 64, 64))
    return made


def _monai() -> Models:
    nets = need("monai.networks.nets", "community")
    part = functools.partial
    plane = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    return {
        "UNet": (part(nets.UNet, **plane, channels=(8, 16, 32), strides=(2, 2)), _randn(2, 1, 32, 32)),
        "AttentionUnet": (
            part(nets.AttentionUnet, **plane, channels=(8, 16, 32), strides=(2, 2)), _randn(2, 1, 32, 32)),
        "BasicUNet": (part(nets.BasicUNet, **plane, features=(8, 8, 16, 16, 16, 8)), _randn(2, 1, 32, 32)),
        "SegResNet": (part(nets.SegResNet, spatial_dims=3, init_filters=8), _randn(2, 1, 16, 16, 16)),
        "DynUNet": (
            part(nets.DynUNet, **plane, kernel_size=[3, 3, 3], strides=[1, 2, 2],
                 upsample_kernel_size=[2, 2]), _randn(2, 1, 32, 32)),
        "UNETR": (
            part(nets.UNETR, 1, 2, (32, 32), feature_size=8, hidden_size=32, mlp_dim=48, num_heads=4,
                 spatial_dims=2), _randn(2, 1, 32, 32)),
        "SwinUNETR": (
            part(nets.SwinUNETR, in_channels=1, out_channels=2, feature_size=12, spatial_dims=2),
            _randn(2, 1, 64, 64)),
        "DenseNet121": (part(nets.DenseNet121, **plane), _randn(2, 1, 64, 64)),
        "ViT": (
            part(nets.ViT, 1, (32, 32), (8, 8), hidden_size=32, mlp_dim=48, num_layers=2, num_heads=4,
                 classification=True, num_classes=3, spatial_dims=2), _randn(2, 1, 32, 32)),
    }  # fmt: skip


def _kornia() -> Models:
    feature = need("kornia.feature", "community")

    def warped(m: nn.Module, x: Tensor) -> Tensor:
        """A spatial transformer: the picture, warped as a network on it says."""
        theta = m(x).tanh().view(-1, 2, 3) * 0.1 + torch.eye(2, 3).to(x)
        return need("kornia.geometry", "community").warp_affine(x, theta, (16, 16))

    locator = lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 6))  # noqa: E731
    return {
        "HardNet": (lambda: feature.HardNet(pretrained=False), _randn(2, 1, 32, 32)),
        "SOSNet": (lambda: feature.SOSNet(pretrained=False), _randn(2, 1, 32, 32)),
        "TFeat": (lambda: feature.TFeat(pretrained=False), _randn(2, 1, 32, 32)),
        "HyNet": (lambda: feature.HyNet(pretrained=False), _randn(2, 1, 32, 32)),
        "DISK": (lambda: Call(feature.DISK(), _descriptors), _randn(1, 3, 32, 32)),
        "gaussian blur": (
            lambda: nn.Sequential(need("kornia.filters", "community").GaussianBlur2d((3, 3), (1.0, 1.0)),
                                  nn.Conv2d(1, 4, 3), nn.GELU()), _randn(2, 1, 16, 16)),
        "spatial transformer": (lambda: Call(locator(), warped), _randn(2, 1, 16, 16)),
    }  # fmt: skip


def _descriptors(m: nn.Module, x: Tensor) -> Tensor:
    return m(x)[0].descriptors


def _detectors() -> Models:
    zoo = need("torchvision.models.detection", "community")

    def small(name: str, **options: Any) -> nn.Module:
        model = getattr(zoo, name)(weights=None, weights_backbone=None, num_classes=3, **options)
        return Call(model, lambda m, x: m([*x])[0]["scores"][:5])

    names = {
        "fasterrcnn": (
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            {"min_size": 64, "box_score_thresh": 0.0},
        ),
        "ssdlite": ("ssdlite320_mobilenet_v3_large", {"score_thresh": 0.0}),
        "fcos": ("fcos_resnet50_fpn", {"min_size": 64, "score_thresh": 0.0}),
    }
    return {
        n: (functools.partial(small, name, **options), _randn(2, 3, 64, 64))
        for n, (name, options) in names.items()
    }


# --- texts


def _x_transformers() -> Models:
    x = need("x_transformers", "community")

    def text(kind: Any = None, **options: Any) -> nn.Module:
        layers = (kind or x.Decoder)(dim=32, depth=2, heads=2, attn_dim_head=16, **options)
        return x.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers)

    vit = lambda: x.ViTransformerWrapper(  # noqa: E731
        image_size=32, patch_size=8, num_classes=5, attn_layers=x.Encoder(dim=32, depth=2, heads=2)
    )
    numbers = lambda: x.ContinuousTransformerWrapper(  # noqa: E731
        dim_in=6, dim_out=4, max_seq_len=16, attn_layers=x.Encoder(dim=32, depth=2, heads=2)
    )
    part = functools.partial
    habits: dict[str, Any] = {
        "decoder": {}, "encoder": {"kind": x.Encoder}, "rotary": {"rotary_pos_emb": True},
        "alibi": {"alibi_pos_bias": True},
        "rmsnorm, swiglu": {"use_rmsnorm": True, "ff_glu": True, "ff_swish": True},
        "t5 bias": {"rel_pos_bias": True}, "qk norm": {"attn_qk_norm": True},
        "talking heads": {"attn_pre_talking_heads": True},
        "relu squared": {"ff_relu_squared": True}, "sandwich": {"sandwich_norm": True},
        "memory": {"attn_num_mem_kv": 4}, "one kv head": {"attn_one_kv_head": True},
    }  # fmt: skip
    made: dict[str, Entry] = {n: (part(text, **o), _tokens(50, 2, 12)) for n, o in habits.items()}
    made["vit"] = (vit, _randn(2, 3, 32, 32))
    made["continuous"] = (numbers, _randn(2, 12, 6))
    return made


def _tiny(name: str, **more: Any) -> nn.Module:
    t = need("transformers", "community")
    model = getattr(t, name)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "vocab_size": 50, "max_position_embeddings": 32,
    }  # fmt: skip
    return model(model.config_class(**sizes, **more))


def _sentence_transformers() -> Models:
    parts = need("sentence_transformers.models", "community")

    def sentence(mode: str, dense: bool, body: str = "BertModel") -> nn.Module:
        tail = [parts.Pooling(32, mode)]
        tail += [parts.Dense(32, 8, activation_function=nn.Tanh())] if dense else []
        return Call(nn.ModuleList([_tiny(body), *tail, parts.Normalize()]), _embedded)

    part = functools.partial
    ids = _tokens(50, 2, 10)
    return {
        "mean": (part(sentence, "mean", False), ids),
        "cls, dense": (part(sentence, "cls", True), ids),
        "max": (part(sentence, "max", False, "DistilBertModel"), ids),
        "lasttoken": (part(sentence, "lasttoken", True, "MPNetModel"), ids),
    }


def _embedded(m: Any, ids: Tensor) -> Tensor:
    features = {"attention_mask": torch.ones_like(ids)}
    features["token_embeddings"] = m[0](ids).last_hidden_state
    for step in m[1:]:
        features = step(features)
    return features["sentence_embedding"]


def _peft() -> Models:
    peft = need("peft", "community")
    part = functools.partial

    def tuned(body: str, config: Any, **more: Any) -> nn.Module:
        return Call(
            peft.get_peft_model(_tiny(body, **more), config), lambda m, ids: m(input_ids=ids).logits
        )

    classify = "BertForSequenceClassification"
    q_v = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return {
        "LoRA": (lambda: tuned(classify, peft.LoraConfig(r=4, **q_v)), _tokens(50, 2, 10)),
        "DoRA": (lambda: tuned(classify, peft.LoraConfig(r=4, use_dora=True, **q_v)), _tokens(50, 2, 10)),
        "LoHa": (lambda: tuned(classify, peft.LoHaConfig(r=4, **q_v)), _tokens(50, 2, 10)),
        "LoKr": (lambda: tuned(classify, peft.LoKrConfig(r=4, **q_v)), _tokens(50, 2, 10)),
        "IA3": (
            lambda: tuned(classify, peft.IA3Config(
                target_modules=["query", "value", "output.dense"], feedforward_modules=["output.dense"],
                task_type="SEQ_CLS")), _tokens(50, 2, 10)),
        "LoRA on Llama": (
            lambda: tuned("LlamaForCausalLM", peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])),
            _tokens(50, 2, 10)),
        "prompt": (
            part(tuned, classify, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
            _tokens(50, 2, 10)),
    }  # fmt: skip


# --- tables


def _tabnet() -> Models:
    net = need("pytorch_tabnet.tab_network", "community")
    part = functools.partial
    first = lambda m, x: m(x)[0]  # noqa: E731 - the other output is a loss
    groups = torch.eye(6)
    return {
        "TabNet": (
            lambda: Call(net.TabNet(6, 3, n_d=4, n_a=4, n_steps=2, group_attention_matrix=groups), first),
            _randn(4, 6)),
        "entmax": (
            lambda: Call(net.TabNet(6, 3, n_d=4, n_a=4, n_steps=3, mask_type="entmax",
                                    group_attention_matrix=groups), first), _randn(4, 6)),
        "FeatTransformer": (
            part(net.FeatTransformer, 6, 8, nn.ModuleList([nn.Linear(6, 16, bias=False)]), 2,
                 virtual_batch_size=4), _randn(4, 6)),
    }  # fmt: skip


def _rtdl() -> Models:
    rtdl = need("rtdl_revisiting_models", "community")
    ft = {"n_blocks": 2, "d_block": 16, "attention_n_heads": 2, "attention_dropout": 0.0,
          "ffn_d_hidden_multiplier": 1.5, "ffn_dropout": 0.0, "residual_dropout": 0.0}  # fmt: skip
    table = lambda: (torch.randn(4, 6), torch.randint(3, (4, 2)))  # noqa: E731
    return {
        "MLP": (lambda: rtdl.MLP(d_in=6, d_out=3, n_blocks=2, d_block=16, dropout=0.0), _randn(4, 6)),
        "ResNet": (
            lambda: rtdl.ResNet(d_in=6, d_out=3, n_blocks=2, d_block=16, d_hidden=None,
                                d_hidden_multiplier=2.0, dropout1=0.0, dropout2=0.0), _randn(4, 6)),
        "FTTransformer": (
            lambda: rtdl.FTTransformer(n_cont_features=6, cat_cardinalities=[3, 4], d_out=3, **ft), table),
    }  # fmt: skip


def _tab_transformer() -> Models:
    lib = need("tab_transformer_pytorch", "community")
    sizes = {
        "categories": (3, 4),
        "num_continuous": 6,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "dim_out": 3,
    }
    table = lambda: (torch.randint(3, (4, 2)), torch.randn(4, 6))  # noqa: E731
    return {
        "TabTransformer": (
            functools.partial(lib.TabTransformer, **sizes, mlp_act=nn.ReLU()),
            table,
        ),
        "FTTransformer": (functools.partial(lib.FTTransformer, **sizes), table),
    }


# --- graphs, fields, groups


def _geometric() -> Models:
    nets = need("torch_geometric.nn", "community")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
    graph = lambda: (torch.randn(6, 5), torch.cat([edges, edges.flip(0)], 1))  # noqa: E731
    pooled = torch.tensor([0, 0, 0, 1, 1, 1])
    names = ("GCN", "GAT", "GraphSAGE", "GIN", "EdgeCNN")
    made: dict[str, Entry] = {n: (functools.partial(getattr(nets, n), 5, 8, 2, 3), graph) for n in names}

    def of(layer: nn.Module) -> nn.Module:
        return Call(nn.ModuleList([layer, nn.Linear(8, 3)]), _pooled)

    def _pooled(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        return m[1](nets.global_mean_pool(m[0](x, edges).relu(), pooled))

    made |= {
        "TransformerConv": (lambda: of(nets.TransformerConv(5, 4, heads=2)), graph),
        "ChebConv": (lambda: of(nets.ChebConv(5, 8, 2)), graph),
        "TAGConv": (lambda: of(nets.TAGConv(5, 8)), graph),
        "GeneralConv": (lambda: of(nets.GeneralConv(5, 8)), graph),
        "GatedGraphConv": (lambda: of(nets.GatedGraphConv(8, 2)), graph),
        "max aggregation": (lambda: of(nets.SAGEConv(5, 8, aggr="max")), graph),
    }
    return made


def _e3nn() -> Models:
    o3, gates = need("e3nn.o3", "community"), need("e3nn.nn", "community")
    inside = "8x0e + 4x1o"

    def gated() -> nn.Module:
        gate = gates.Gate("8x0e", [torch.tanh], "4x0e", [torch.sigmoid], "4x1o")
        return nn.Sequential(o3.Linear(inside, gate.irreps_in), gate, o3.Linear(gate.irreps_out, "3x0e"))

    def product(m: Any, x: Tensor) -> Tensor:
        return m[1](m[0](x, x))

    return {
        "gate": (gated, _randn(4, 20)),
        "norm activation": (
            lambda: nn.Sequential(o3.Linear(inside, inside), gates.NormActivation(inside, torch.tanh),
                                  o3.Linear(inside, "3x0e")), _randn(4, 20)),
        "tensor product": (
            lambda: Call(nn.ModuleList([o3.FullyConnectedTensorProduct(inside, inside, inside),
                                        o3.Linear(inside, "3x0e")]), product), _randn(4, 20)),
        "batch norm": (
            lambda: nn.Sequential(gates.BatchNorm(inside), o3.Linear(inside, "3x0e")), _randn(4, 20)),
        "radial network": (
            lambda: gates.FullyConnectedNet([6, 16, 3], torch.nn.functional.silu), _randn(4, 6)),
    }  # fmt: skip


def _neuralop() -> Models:
    nets = need("neuralop.models", "community")
    sizes = {"in_channels": 2, "out_channels": 1, "hidden_channels": 8, "n_layers": 2}
    return {
        "FNO1d": (functools.partial(nets.FNO, n_modes=(6,), **sizes), _randn(2, 2, 16)),
        "FNO2d": (functools.partial(nets.FNO, n_modes=(4, 4), **sizes), _randn(2, 2, 8, 8)),
        "TFNO": (functools.partial(nets.TFNO, n_modes=(4, 4), rank=0.5, **sizes), _randn(2, 2, 8, 8)),
        "UNO": (
            functools.partial(
                nets.UNO, channel_mlp_skip="linear", in_channels=2, out_channels=1,
                hidden_channels=8, n_layers=3,
                uno_out_channels=[8, 8, 8], uno_n_modes=[[4, 4]] * 3,
                uno_scalings=[[1, 1], [0.5, 0.5], [2, 2]]), _randn(2, 2, 8, 8)),
    }  # fmt: skip


# --- sound


def _torchaudio() -> Models:
    a = need("torchaudio.models", "community")
    lengths = lambda: (torch.randn(2, 12, 16), torch.tensor([12, 9]))  # noqa: E731
    sound = lambda: a.wav2vec2_model(  # noqa: E731
        "group_norm",
        [(16, 10, 5), (16, 3, 2)],
        False,
        32,
        0.0,
        8,
        2,
        2,
        2,
        0.0,
        48,
        0.0,
        0.0,
        False,
        0.0,
        7,
    )
    return {
        "Conformer": (lambda: a.Conformer(16, 2, 32, 2, 3), lengths),
        "Wav2Vec2": (lambda: Call(sound(), lambda m, x: m(x)[0]), _randn(2, 400)),
        "DeepSpeech": (lambda: a.DeepSpeech(6, 16, 7), _randn(2, 1, 12, 6)),
        "Wav2Letter": (lambda: a.Wav2Letter(7, "mfcc", 6), _randn(2, 6, 100)),
        "ConvTasNet": (lambda: a.ConvTasNet(2, 16, 8, 3, 8, 8, 2, 1), _randn(2, 1, 128)),
        "Emformer": (lambda: a.Emformer(16, 2, 32, 2, 4, right_context_length=2), lengths),
        "spectrogram": (
            lambda: nn.Sequential(
                need("torchaudio.transforms", "community").MelSpectrogram(8000, 64, n_mels=8),
                nn.Flatten(), nn.LazyLinear(3)), _randn(2, 256)),
    }  # fmt: skip


def _speechbrain() -> Models:
    at = lambda name: need(f"speechbrain.lobes.models.{name}", "community")  # noqa: E731
    frames = _randn(2, 20, 8)
    ecapa = {"channels": [16, 16, 16], "kernel_sizes": [3, 3, 1], "dilations": [1, 2, 1],
             "attention_channels": 8, "lin_neurons": 6, "res2net_scale": 2, "se_channels": 8}  # fmt: skip
    lengths = lambda: (torch.randn(2, 20, 8), torch.tensor([1.0, 0.7]))  # noqa: E731
    return {
        "ECAPA_TDNN": (lambda: at("ECAPA_TDNN").ECAPA_TDNN(8, **ecapa), frames),
        "ECAPA_TDNN, lengths": (lambda: at("ECAPA_TDNN").ECAPA_TDNN(8, **ecapa), lengths),
        "Xvector": (
            lambda: at("Xvector").Xvector(in_channels=8, tdnn_blocks=2, tdnn_channels=[16, 16],
                                          tdnn_kernel_sizes=[3, 1], tdnn_dilations=[1, 1], lin_neurons=6),
            frames),
        "CRDNN": (
            lambda: at("CRDNN").CRDNN(input_size=8, cnn_channels=(4, 4), cnn_kernelsize=(3, 3),
                                      rnn_layers=1, rnn_neurons=8, dnn_blocks=1, dnn_neurons=6), frames),
        "ResNet": (lambda: at("ResNet").ResNet(8, channels=[8, 8, 8, 8], lin_neurons=6), _randn(2, 32, 8)),
        "VanillaNN": (lambda: at("VanillaNN").VanillaNN([2, 20, 8], dnn_neurons=8), frames),
    }  # fmt: skip


# --- densities, spikes, time, fewer bits


def _zuko() -> Models:
    flows = need("zuko.flows", "community")

    def density(m: Any, x: Tensor) -> Tensor:
        return m().log_prob(x)

    def given(m: Any, x: Tensor, context: Tensor) -> Tensor:
        return m(context).log_prob(x)

    part = functools.partial
    sizes = {"transforms": 2, "hidden_features": (16, 16)}
    return {
        "MAF": (lambda: Call(flows.MAF(3, **sizes), density), _randn(4, 3)),
        "NSF": (lambda: Call(flows.NSF(3, **sizes), density), _randn(4, 3)),
        "NICE": (lambda: Call(flows.NICE(3, **sizes), density), _randn(4, 3)),
        "MAF in context": (
            lambda: Call(flows.MAF(3, 2, **sizes), given), lambda: (torch.randn(4, 3), torch.randn(4, 2))),
        "MLP": (part(need("zuko.nn", "community").MLP, 4, 2, (16,)), _randn(4, 4)),
        "MonotonicMLP": (part(need("zuko.nn", "community").MonotonicMLP, 4, 2, (16,)), _randn(4, 4)),
    }  # fmt: skip


def _snntorch() -> Models:
    snn = need("snntorch", "community")

    def steps(m: Any, x: Tensor) -> Tensor:
        """The membrane potentials of the last layer, over four steps. It reads the potentials of the first
        layer and not its spikes: a spike is a step function, which passes no gradient."""
        start = [cell.reset_mem() for cell in (m[1], m[3])]
        first, last = (s if isinstance(s, tuple) else (s,) for s in start)
        membranes = []
        for _ in range(4):
            _, *first = m[1](m[0](x), *first)
            _, *last = m[3](m[2](first[-1]), *last)
            membranes.append(last[-1])
        return torch.stack(membranes).sum(0)

    def of(cell: Any) -> Callable[[], nn.Module]:
        parts = lambda: [nn.Linear(6, 8), cell(), nn.Linear(8, 3), cell()]  # noqa: E731
        return lambda: Call(nn.ModuleList(parts()), steps)

    return {
        "Leaky": (of(lambda: snn.Leaky(0.9)), _randn(4, 6)),
        "Synaptic": (of(lambda: snn.Synaptic(0.9, 0.8)), _randn(4, 6)),
        "Alpha": (of(lambda: snn.Alpha(0.9, 0.8)), _randn(4, 6)),
        "Lapicque": (of(lambda: snn.Lapicque(0.9)), _randn(4, 6)),
    }


def _torchdiffeq() -> Models:
    solve = need("torchdiffeq", "community").odeint

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y)

    def flow(method: str, m: Any, x: Tensor) -> Tensor:
        times = torch.linspace(0, 1, 3).to(x)
        return m[1](solve(m[0], x, times, method=method, rtol=1e-3, atol=1e-4)[-1])

    return {
        method: (
            lambda method=method: Call(
                nn.ModuleList([Field(), nn.Linear(6, 3)]), functools.partial(flow, method)
            ),
            _randn(4, 6),
        )
        for method in ("euler", "rk4", "dopri5", "bosh3", "explicit_adams")
    }


def _torchao() -> Models:
    q = need("torchao.quantization", "community")

    def quantised(config: Callable[[], Any], body: Callable[[], nn.Module]) -> nn.Module:
        model = body().eval()
        q.quantize_(model, config())
        return model

    mlp = lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))  # noqa: E731
    encoder = lambda: nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)  # noqa: E731
    part = functools.partial
    return {
        "int8 weights": (part(quantised, q.Int8WeightOnlyConfig, mlp), _randn(4, 32)),
        "int8 dynamic": (
            part(quantised, q.Int8DynamicActivationInt8WeightConfig, mlp),
            _randn(4, 32),
        ),
        "int8 encoder": (part(quantised, q.Int8WeightOnlyConfig, encoder), _randn(2, 6, 32)),
    }


LIBRARIES: Mapping[str, Callable[[], Models]] = {
    "vit-pytorch": _vit_pytorch, "segmentation-models-pytorch": _segmentation, "monai": _monai,
    "kornia": _kornia, "torchvision": _detectors, "x-transformers": _x_transformers,
    "sentence-transformers": _sentence_transformers, "peft": _peft, "pytorch-tabnet": _tabnet,
    "rtdl-revisiting-models": _rtdl, "tab-transformer-pytorch": _tab_transformer,
    "torch-geometric": _geometric, "e3nn": _e3nn, "neuraloperator": _neuralop,
    "torchaudio": _torchaudio, "speechbrain": _speechbrain, "zuko": _zuko, "snntorch": _snntorch,
    "torchdiffeq": _torchdiffeq, "torchao": _torchao,
}  # fmt: skip
"""By the name of the distribution."""


def names() -> dict[str, str]:
    """``library/model`` of every model, with its library."""
    return {f"{library}/{n}": library for library, models in LIBRARIES.items() for n in models()}


def build(name: str) -> Subject:
    """A model in eval mode, with random weights."""
    library, _, model = name.partition("/")
    make, inputs = LIBRARIES[library]()[model]
    torch.manual_seed(0)
    module = make().eval()
    args = inputs()
    with torch.no_grad():
        module(*args)  # lazy layers get their sizes
    return Subject(name, module, args, middle)
