"""One small random model of each kind that people explain, as its user has it, and the same model written by hand.

The models of this project's tests (``tiny_models``) are used for the families of transformers that have a slow formula
of STAA.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_models import SIZE, randomize, tiny_module
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoLayout
from kinds.networks import (
    CLASSES,
    CNN3D,
    CNNLSTM,
    Lightning,
    MeanOverFrames,
    Segments,
    SlowFast,
    SoftmaxInEval,
    Views,
)

Cells = tuple[int, int, int]
Fold = Callable[[Tensor], Tensor]  # from a layer's output to (B, C, t, h, w)
_torchvision_operators: list[Any] = []  # alive as long as the process: torch forgets them otherwise


class ByHand(nn.Module):
    """A model written by hand around a copy of the network, in eval mode.

    Args:
        net: the network, which is copied.
        run: function from the copy and clips in the layout of the classifier to outputs ``(B, K)`` or ``(B, T, K)``.
        output: what the outputs are, as for :class:`VideoClassifier`. Methods of this library read it.
        dtype: of the copy.
    """

    def __init__(
        self,
        net: nn.Module,
        run: Callable[[nn.Module, Tensor], Tensor],
        output: str = "logits",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).to(dtype).eval()
        self.run, self.output, self.num_classes, self.dtype = run, output, CLASSES, dtype

    def forward(self, clip: Tensor) -> Tensor:
        return self.run(self.net, clip.to(self.dtype)).float()


@dataclass(frozen=True)
class Subject:
    """A model as its user passes it to the library, with what is needed to check its results.

    Attributes:
        clf: the classifier.
        reference: the same model by hand.
        clip: two clips in the layout of the classifier.
        layer: the layer for Grad-CAM.
        prefix: begin of its name that it does not have in the reference.
        fold: from its output to ``(B, C, t, h, w)``.
        transformer: name of the family in ``slow_staa``, and function from the network of the reference to the
            transformer in it. None without a transformer of a known family.
        embedding: name of the convolution that makes tokens of another transformer (None if its pixels are explained),
            and the pixels ``(t, h, w)`` of a token. None without a transformer.
        merged: side of the square of tokens that have become one in half of the layers of attention or more.
        attention: name of the modules of another transformer that get the attention of each frame, ``(B*t, heads, N,
            N)`` with a class token, which the head reads and averages over frames; ``"windows"`` for Swin, ``"pools"``
            for MViT; or a function from the results of every softmax to the map ``(B, t, h, w)``. None if there are
            none.
        inspected: whether Grad-CAM gets the grid that ``models.inspect`` finds.
        embedded: from the output of the embedding to ``(B, C, t, h, w)``.
        target: as in Captum.
        cell: sides ``(t, h, w)`` of windows and cells, which divide the clip.
        half: whether the model is in bfloat16, as is the reference. STAA is compared with its formula in float32.
        per_eval: perturbations per call of the model.
        steps: how many steps, masks and samples of each kind the methods use.
    """

    clf: VideoClassifier
    reference: ByHand
    clip: Tensor
    layer: str
    fold: Fold
    transformer: tuple[str, Callable[[nn.Module], nn.Module]] | None = None
    embedding: tuple[str | None, tuple[float, float, float]] | None = None
    merged: int = 1
    attention: str | Callable[[list[Tensor]], Tensor] | None = None
    inspected: bool = False
    embedded: Fold = field(default_factory=lambda: same)
    target: Any = field(default_factory=lambda: [1, 0])
    cell: Cells = (2, 8, 8)
    half: bool = False
    per_eval: int = 2
    steps: int = 4
    prefix: str = ""

    @property
    def layout(self) -> VideoLayout:
        return self.clf.layout


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        name: its name.
        make: returns the subject.
        needs: packages that are not installed with this project.
    """

    name: str
    make: Callable[[], Subject]
    needs: tuple[str, ...] = ()


# --- packages that are only needed here -------------------------------------------------------------------------


def use_peers(folder: Path | None) -> None:
    """Make the packages in a folder importable.

    The compiled operators of torchvision do not load beside a torch that was built otherwise. Video models do not call
    them, and naming them is enough to import these models.
    """
    if folder is None:
        return
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    registrations = folder / "torchvision" / "_meta_registrations.py"
    if not registrations.exists():
        return
    names = re.findall(r'(?:register_fake\("torchvision::|register_meta\(")(\w+)"', registrations.read_text("utf-8"))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in {*names, "nms", "roi_align"}:
        library.define(f"{name}(Tensor a) -> Tensor")
    _torchvision_operators.append(library)


def missing(kind: Kind) -> list[str]:
    """Return the packages of a row that cannot be imported."""
    return [name for name in kind.needs if importlib.util.find_spec(name) is None]


# --- helpers ----------------------------------------------------------------------------------------------------


def clips(axes: str, frames: int, size: tuple[int, int], count: int = 2) -> Tensor:
    """Return random clips, the same for all orders of axes."""
    clip = torch.randn(count, frames, 3, *size, generator=torch.Generator().manual_seed(1))
    return VideoLayout(axes).from_working(clip).contiguous()


def trained(net: nn.Module, *example: Any) -> nn.Module:
    """Make a random network like a trained one, so that maps are neither flat nor rounding errors.

    Its attention is far from uniform, its batch norms know the statistics of an example, and its outputs differ.

    Args:
        net: the network, in train mode.
        *example: inputs of the network, if it has batch norms.
    """
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
    norms = [module for module in net.modules() if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d))]
    with torch.no_grad():
        for linear in head:
            linear.weight.mul_(10)
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("q_proj", "k_proj", "query", "key"):
                module.weight.mul_(10)
            elif isinstance(module, nn.Linear) and name.endswith("qkv"):
                module.weight[: 2 * len(module.weight) // 3].mul_(10)
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.2)
            norm.momentum = None  # the mean over all batches so far
        if norms:
            net.train()(*example)
    return net.eval()


def plain(net: nn.Module, clip: Tensor) -> Tensor:
    return net(clip)


def logits(net: nn.Module, clip: Tensor) -> Tensor:
    return net(clip).logits


def same(value: Tensor) -> Tensor:
    return value


def channels_last(value: Tensor) -> Tensor:
    return value.movedim(-1, 1)


def per_frame(frames: int) -> Fold:
    return lambda value: value.unflatten(0, (-1, frames)).transpose(1, 2)


def frames_of_channels_last(frames: int) -> Fold:
    return lambda value: value.unflatten(0, (-1, frames)).movedim(-1, 1)


def tokens(grid: Cells, prefix: int = 0, order: str = "thw") -> Fold:
    """Return the fold of tokens ``(B, N, D)``, without the tokens before the patches."""
    sizes = dict(zip("thw", grid, strict=True))

    def fold(value: Tensor) -> Tensor:
        if isinstance(value, tuple):
            value = value[0]
        patches = value[:, prefix:].unflatten(1, [sizes[axis] for axis in order])
        return patches.permute(0, 4, *(1 + order.index(axis) for axis in "thw"))

    return fold


# --- torchvision ------------------------------------------------------------------------------------------------


def torchvision_cnn(name: str) -> Subject:
    video = importlib.import_module("torchvision.models.video")
    clip = clips("BCTHW", 4, (32, 24))
    net = trained(getattr(video, name)(weights=None, num_classes=CLASSES), clip)
    return Subject(VideoClassifier(net, layout="BCTHW"), ByHand(net, plain), clip, "layer2", same, steps=2)


def torchvision_s3d() -> Subject:
    """Its last pooling is over 2 x 7 x 7 cells, so the clip is large, and there is one."""
    video = importlib.import_module("torchvision.models.video")
    clip = clips("BCTHW", 13, (210, 210), 1)
    net = trained(video.s3d(weights=None, num_classes=CLASSES), clip)
    clf, cell = VideoClassifier(net, layout="BCTHW"), (13, 105, 105)
    return Subject(clf, ByHand(net, plain), clip, "features.6", same, target=1, cell=cell, per_eval=1, steps=1)


def torchvision_mvit() -> Subject:
    mvit = importlib.import_module("torchvision.models.video.mvit")
    original = mvit._mvit

    def small(**options: Any) -> nn.Module:
        return original(**{**options, "spatial_size": (96, 96), "temporal_size": 8})

    with mock.patch.object(mvit, "_mvit", small):
        net = trained(mvit.mvit_v2_s(weights=None, num_classes=CLASSES))
    clf = VideoClassifier(net, layout="BCTHW")
    fold = tokens((4, 12, 12), prefix=1)
    known = {"embedding": ("conv_proj", (2, 4, 4)), "merged": 4, "attention": "pools", "cell": (4, 48, 48), "steps": 2}
    return Subject(clf, ByHand(net, plain), clips("BCTHW", 8, (96, 96)), "blocks.1", fold, **known)


def torchvision_swin() -> Subject:
    video = importlib.import_module("torchvision.models.video")
    net = trained(video.swin3d_t(weights=None, num_classes=CLASSES))
    clf = VideoClassifier(net, layout="BCTHW")
    clip = clips("BCTHW", 4, (64, 32))
    known = {"embedding": ("patch_embed.proj", (2, 4, 4)), "merged": 4, "cell": (2, 32, 16), "steps": 2}
    known["attention"] = "windows"
    return Subject(clf, ByHand(net, plain), clip, "features.2", channels_last, **known)


# --- transformers -----------------------------------------------------------------------------------------------

FRAMES = {"timesformer": 4, "videoprism": 4}  # the others of tiny_models have 8
FOLDS = {
    "videomae": ("videomae.encoder.layer.1.layernorm_before", tokens((4, 3, 2))),
    "timesformer": ("timesformer.encoder.layer.1.temporal_layernorm", None),
    "vivit": ("vivit.layers.1.layernorm_before", tokens((4, 3, 2), prefix=1)),
    "vjepa2": ("vjepa2.encoder.layer.1.norm1", tokens((4, 3, 2))),
    "videoprism": ("vision_model.spatial_layers.1.layernorm_before", None),
}


def of_positions(value: Tensor) -> Tensor:
    """Fold TimeSformer's tokens of one patch position, ``(B*h*w, t, D)``."""
    return value.unflatten(0, (-1, 3, 2)).permute(0, 4, 3, 1, 2)


def of_frames(value: Tensor) -> Tensor:
    """Fold VideoPrism's tokens of one frame, ``(B*t, h*w, D)``."""
    return value.unflatten(1, (3, 2)).unflatten(0, (-1, 4)).permute(0, 4, 1, 2, 3)


def family_layer(name: str) -> tuple[str, Fold]:
    layer, fold = FOLDS[name]
    return layer, fold or (of_positions if name == "timesformer" else of_frames)


def family_clips(name: str) -> Tensor:
    return clips("BTCHW", FRAMES.get(name, 8), SIZE)


def family_cell(name: str) -> Cells:
    return (FRAMES.get(name, 8) // 4, 8, 8)


def family(
    name: str,
    change: Callable[[nn.Module], nn.Module] = lambda net: net,
    *,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
    inner: Callable[[nn.Module], nn.Module] = lambda net: net,
    prefix: str = "",
    reference: nn.Module | None = None,
    output: str = "logits",
    options: dict[str, Any] | None = None,
    half: bool = False,
    **known: Any,
) -> Subject:
    """A transformer of ``tiny_models``, as it is or changed.

    Args:
        name: its name there.
        change: from the model to what the user has.
        run: how the reference gets its outputs from the changed network.
        inner: from the changed network to the transformer, for the slow formula.
        prefix: what the names of layers begin with after the change.
        reference: network of the reference, if it is not a copy of the changed one.
        output: what the outputs are.
        options: of the classifier.
        half: whether the changed model is in bfloat16.
        **known: fields of the subject.
    """
    net = change(tiny_module(name))
    run = run or (lambda changed, clip: changed(clip).logits.flatten(1))  # VideoPrism's are (B, 1, K)
    by_hand = ByHand(net if reference is None else reference, run, output, torch.bfloat16 if half else torch.float32)
    layer, fold = family_layer(name)
    clf = VideoClassifier(net, image_size=SIZE, **(options or {}))
    return Subject(
        clf,
        by_hand,
        family_clips(name),
        prefix + layer,
        fold,
        transformer=(name, inner),
        cell=family_cell(name),
        prefix=prefix if reference is not None else "",
        half=half,
        **known,
    )


def x_clip() -> Subject:
    """Its user passes the text of each class with the clip, and several tensors of the output have K columns."""
    transformers = importlib.import_module("transformers")
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "vocab_size": 50, "max_position_embeddings": 8}
    vision = {**common, "num_frames": 4, "image_size": 32, "patch_size": 8}
    mit = {"mit_hidden_size": 12, "mit_intermediate_size": 24, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}
    heads = {"projection_dim": 12, "prompt_layers": 1, "prompt_num_attention_heads": 2}
    config = transformers.XCLIPConfig(text_config=text, vision_config={**vision, **mit}, **heads)
    net = randomize(transformers.XCLIPModel(config), 0)
    words = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2], [0, 9, 3, 2], [0, 4, 11, 2]])

    def asked(clip: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": clip, "input_ids": words, "attention_mask": torch.ones_like(words)}

    reference = ByHand(net, lambda net, clip: net(**asked(clip)).logits_per_video)
    clf = VideoClassifier(net, layout="BTCHW", labels=["run", "walk", "jump", "fall"], pack=asked)
    layer = "vision_model.encoder.layers.1.layer_norm2"

    def fold(value: Tensor) -> Tensor:  # (B * t, 1 + h * w, D) with a class token
        return value[:, 1:].unflatten(1, (4, 4)).unflatten(0, (-1, 4)).permute(0, 4, 1, 2, 3)

    # two perturbations of two clips are as many rows as there are classes
    embedding = "vision_model.embeddings.patch_embedding", (1, 8, 8)
    clip = clips("BTCHW", 4, (32, 32))
    return Subject(clf, reference, clip, layer, fold, embedding=embedding, cell=(2, 16, 16), per_eval=2)


# --- frame by frame -----------------------------------------------------------------------------------------------


def timm_vit() -> Subject:
    timm = importlib.import_module("timm")
    name = "vit_tiny_patch16_224"
    net = trained(MeanOverFrames(timm.create_model(name, img_size=(64, 48), num_classes=CLASSES, depth=4)))

    def fold(value: Tensor) -> Tensor:
        return value[:, 1:].unflatten(1, (4, 3)).unflatten(0, (-1, 4)).permute(0, 4, 1, 2, 3)

    clf = VideoClassifier(net, layout="BTCHW")
    clip = clips("BTCHW", 4, (64, 48))
    embedding = "net.patch_embed.proj", (1, 16, 16)
    known = {"embedding": embedding, "attention": "attn_drop", "cell": (2, 32, 16)}
    return Subject(clf, ByHand(net, plain), clip, "net.blocks.2.norm1", fold, **known)


def timm_swin() -> Subject:
    timm = importlib.import_module("timm")
    name = "swin_tiny_patch4_window7_224"
    net = trained(MeanOverFrames(timm.create_model(name, img_size=(64, 64), num_classes=CLASSES, depths=(1, 1, 1, 1))))
    clf = VideoClassifier(net, layout="BTCHW")
    clip = clips("BTCHW", 4, (64, 64))
    known = {"embedding": ("net.patch_embed.proj", (1, 4, 4)), "merged": 4, "cell": (2, 32, 32), "steps": 2}
    known["attention"] = "windows"
    return Subject(clf, ByHand(net, plain), clip, "net.layers.1", frames_of_channels_last(4), **known)


def cnn_lstm() -> Subject:
    clip = clips("BTCHW", 4, (16, 24))
    net = trained(CNNLSTM(), clip)
    return Subject(VideoClassifier(net, layout="BTCHW"), ByHand(net, plain), clip, "features", per_frame(4))


def outputs_per_frame() -> Subject:
    clip, target = clips("BTCHW", 4, (16, 24)), [(1, 0), (3, 2)]  # (frame, class)
    net = trained(CNNLSTM(every_frame=True), clip)
    clf = VideoClassifier(net, layout="BTCHW", labels=["run", "walk", "jump"])
    return Subject(clf, ByHand(net, plain), clip, "features", per_frame(4), target=target)


def folded_frames(shift: bool) -> Subject:
    clip = clips("BTCHW", 4, (16, 24))
    net = trained(Segments(4, shift), clip.flatten(0, 1))
    clf = VideoClassifier(net, layout="BTCHW", pack=lambda clip: clip.flatten(0, 1))
    reference = ByHand(net, lambda net, clip: net(torch.cat(list(clip))))
    return Subject(clf, reference, clip, "stem", per_frame(4))


# --- 3D CNNs ------------------------------------------------------------------------------------------------------


def cnn(
    change: Callable[[nn.Module], nn.Module] = lambda net: net,
    options: dict[str, Any] | None = None,
    head: nn.Module | None = None,
    classes: int = CLASSES,
    output: str = "logits",
    half: bool = False,
    **known: Any,
) -> Subject:
    clip = clips("BCTHW", 4, (16, 24))
    net = change(trained(CNN3D(classes, head), clip))
    reference = ByHand(net, plain, output, torch.bfloat16 if half else torch.float32)
    clf = VideoClassifier(net, layout="BCTHW", **(options or {}))
    return Subject(clf, reference, clip, "stem", same, half=half, **known)


def slow_fast() -> Subject:
    clip = clips("BCTHW", 8, (16, 24))
    net = trained(SlowFast(), [clip[:, :, ::4], clip])
    reference = ByHand(net, lambda net, clip: net([clip[:, :, [0, 4]], clip]))
    clf = VideoClassifier(net, layout="BCTHW", pack=lambda clip: [clip[:, :, ::4], clip])
    return Subject(clf, reference, clip, "fast", same)


def six_axes() -> Subject:
    clip = clips("BCTHW", 4, (16, 24))
    net = trained(Views(CNN3D()), clip[:, None])
    reference = ByHand(net, lambda net, clip: net.net(clip))  # of a single view
    clf = VideoClassifier(net, layout="BCTHW", pack=lambda clip: clip[:, None])
    return Subject(clf, reference, clip, "net.stem", same)


# --- wrappers and states ------------------------------------------------------------------------------------------


def peft() -> Subject:
    module = importlib.import_module("peft")
    config = module.LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False)

    def adapt(net: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a property that peft reads
            return module.get_peft_model(net, config).eval()

    merged = copy.deepcopy(adapt(tiny_module("videomae"))).merge_and_unload()
    return family("videomae", adapt, prefix="base_model.model.", reference=merged)


def lightning() -> Subject:
    return family(
        "timesformer",
        lambda net: Lightning(net).train(),
        run=lambda net, clip: net.model(clip).logits,
        inner=lambda net: net.model,
        prefix="model.",
    )


def compiled() -> Subject:
    return family("vivit", lambda net: torch.compile(net, backend="aot_eager"), reference=tiny_module("vivit"))


def quantized() -> Subject:
    """Linear layers in int8, whose scale follows each batch, so one perturbation is evaluated at a time."""

    def quantize(net: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch moves it to torchao
            return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)

    return family("videomae", quantize, per_eval=1)


def quantized_but_its_head() -> Subject:
    """The head and residual connections have a gradient, which would be a part of the true one."""

    def quantize(net: nn.Module) -> nn.Module:
        names = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)} - {"classifier"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(net, names, dtype=torch.qint8)

    return family("videomae", quantize, per_eval=1)


def checkpointed() -> Subject:
    """Gradient checkpointing, which is active in train mode only, with dropout."""

    def enable(net: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the method gets another name in transformers 6
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        return net.train()

    return family("videomae", enable)


def with_config(**values: Any) -> Callable[[nn.Module], nn.Module]:
    """Return a function that changes the head of a tiny VideoMAE: its config and the number of outputs."""

    def change(net: Any) -> nn.Module:
        for name, value in values.items():
            setattr(net.config, name, value)
        count = values.get("num_labels", CLASSES)
        head = nn.Linear(net.classifier.in_features, count)
        with torch.no_grad():
            head.weight.copy_(net.classifier.weight[:count])
            head.bias.copy_(net.classifier.bias[:count])
        net.classifier = head
        return net.eval()

    return change


def as_bfloat16(net: nn.Module) -> nn.Module:
    return net.bfloat16()


def probabilities() -> Subject:
    return family(
        "videomae",
        lambda net: SoftmaxInEval(net).eval(),
        run=lambda net, clip: net.net(clip).logits.softmax(1),
        inner=lambda net: net.net,
        prefix="net.",
        output="probabilities",
        options={"output": "probabilities"},
    )


KINDS: list[Kind] = [
    Kind("torchvision `r3d_18`", partial(torchvision_cnn, "r3d_18"), ("torchvision",)),
    Kind("torchvision `mc3_18`", partial(torchvision_cnn, "mc3_18"), ("torchvision",)),
    Kind("torchvision `r2plus1d_18`", partial(torchvision_cnn, "r2plus1d_18"), ("torchvision",)),
    Kind("torchvision `s3d`", torchvision_s3d, ("torchvision",)),
    Kind("torchvision `mvit_v2_s`", torchvision_mvit, ("torchvision",)),
    Kind("torchvision `swin3d_t`", torchvision_swin, ("torchvision",)),
    Kind("VideoMAE", partial(family, "videomae")),
    Kind("TimeSformer", partial(family, "timesformer")),
    Kind("ViViT", partial(family, "vivit")),
    Kind("V-JEPA 2", partial(family, "vjepa2")),
    Kind("VideoPrism", partial(family, "videoprism")),
    Kind("X-CLIP, `pack=` with the texts", x_clip),
    Kind("timm ViT per frame", timm_vit, ("timm", "torchvision")),
    Kind("timm Swin per frame", timm_swin, ("timm", "torchvision")),
    Kind("2D CNN and LSTM", cnn_lstm),
    Kind("SlowFast-like, `pack=` to two pathways", slow_fast),
    Kind("TSN-like, `pack=` folds frames", partial(folded_frames, shift=False)),
    Kind("TSM-like, `pack=` folds frames", partial(folded_frames, shift=True)),
    Kind("views (six axes), `pack=`", six_axes),
    Kind("PEFT LoRA on VideoMAE", peft, ("peft", "accelerate", "psutil")),
    Kind("TimeSformer in a Lightning-like module, train mode", lightning),
    Kind("ViViT, `torch.compile`", compiled),
    Kind("3D CNN in bfloat16", partial(cnn, as_bfloat16, half=True)),
    Kind("VideoMAE in bfloat16", partial(family, "videomae", as_bfloat16, half=True)),
    Kind("VideoMAE, dynamically quantized", quantized),
    Kind("VideoMAE, dynamically quantized but its head", quantized_but_its_head),
    Kind("VideoMAE, checkpointed, train mode with dropout", checkpointed),
    Kind("VideoMAE, regression", partial(
        family, "videomae", with_config(num_labels=1, problem_type="regression"), output="score", target=None
    )),
    Kind("3D CNN, one sigmoid", partial(cnn, options={"output": "sigmoid"}, classes=1, output="sigmoid", target=None)),
    Kind("VideoMAE, multi-label", partial(
        family, "videomae", with_config(problem_type="multi_label_classification"), output="sigmoid"
    )),
    Kind("VideoMAE, probabilities in eval mode", probabilities),
    Kind("CNN and LSTM, outputs per frame", outputs_per_frame),
]  # fmt: skip
