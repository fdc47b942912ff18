"""Similarity to a text or to a reference clip as the score: the value, and the attributions of every kind of method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from captum.attr import IntegratedGradients
from covering import in_one_case
from tiny_models import changes, randomize, snapshot
from torch import Tensor, nn
from transformers.models.videoprism.configuration_videoprism import VideoPrismConfig
from transformers.models.videoprism.modeling_videoprism import VideoPrismClipModel

from captum_staa import RISE, STAA, GradCAM, VideoClassifier, VideoOcclusion
from captum_staa.attention.decomposition import decompose

WIDE = {"hidden_size": 16, "num_attention_heads": 2}
SMALL = {**WIDE, "intermediate_size": 24, "num_hidden_layers": 2}
LIKE = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # reference clips
CLIP = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[0, 5, 7, 19], [0, 9, 12, 19], [0, 3, 2, 19]])
TEXTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def x_clip() -> nn.Module:
    mit = {f"mit_{key}": value for key, value in SMALL.items()}
    config = transformers.XCLIPConfig(
        text_config={**SMALL, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19, "bos_token_id": 0},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8, **mit, "num_frames": 4},
        projection_dim=16,
        prompt_num_attention_heads=2,
    )
    return transformers.XCLIPModel(config)


def video_prism() -> nn.Module:
    config = VideoPrismConfig(
        vision_config={
            **WIDE, "image_size": 16, "num_frames": 4, "tubelet_size": (1, 8, 8), "intermediate_size": 24,
            "num_spatial_layers": 2, "num_temporal_layers": 1, "num_auxiliary_layers": 1, "apply_l2norm": True,
        },
        text_config={**SMALL, "vocab_size": 20, "max_position_embeddings": 4, "apply_l2norm": True},
    )  # fmt: skip
    return VideoPrismClipModel(config)


def video_mae() -> nn.Module:
    return transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**SMALL, image_size=16, num_frames=4, patch_size=8)  # two tubelets of two frames
    )


def v_jepa2() -> nn.Module:
    config = transformers.VJEPA2Config(
        **WIDE, num_hidden_layers=2, crop_size=16, patch_size=8, frames_per_clip=4, tubelet_size=2, mlp_ratio=2,
        pred_hidden_size=12, pred_num_attention_heads=1, pred_num_hidden_layers=1,
    )  # fmt: skip
    return transformers.VJEPA2Model(config)


class Case(NamedTuple):
    """An encoder, what clips are compared with, and the similarity by hand."""

    make: Callable[[], nn.Module]
    to: Any
    slow: Callable[[Any, Tensor, Any], Tensor]
    layer: str
    embed: Callable[[Any, Tensor], Tensor] | None = None


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one[:, None] * other).sum(-1) / (one.norm(dim=-1)[:, None] * other.norm(dim=-1))


def of_logits(model: Any, clip: Tensor, texts: Any) -> Tensor:
    """X-CLIP's logits are scaled similarities."""
    return model(pixel_values=clip, **texts).logits_per_video / model.logit_scale.exp()


def of_embeds(model: Any, clip: Tensor, texts: Any) -> Tensor:
    """Logits of VideoPrism are normalized over the videos of a batch, so they are no score of a video."""
    returned = model(pixel_values_videos=clip, **texts)
    return returned.video_embeds @ returned.text_embeds.T


def of_tokens(model: Any, clip: Tensor) -> Tensor:
    return model(clip).last_hidden_state.mean(1)


def of_features(model: Any, clip: Tensor) -> Tensor:
    return model.get_video_features(clip).pooler_output


def of_clips(model: Any, clip: Tensor, embeddings: Tensor) -> Tensor:
    return cosine(clip, embeddings)


CASES = {
    "X-CLIP, texts": Case(x_clip, TEXTS, of_logits, "encoder.vision_model.embeddings.patch_embedding"),
    "X-CLIP, clips": Case(x_clip, LIKE, of_clips, "encoder.vision_model.embeddings.patch_embedding", of_features),
    "VideoPrism, texts": Case(
        video_prism, TEXTS, of_embeds, "encoder.video_model.vision_model.temporal_layers.0.layernorm_before"
    ),
    "VideoMAE, clips": Case(video_mae, LIKE, of_clips, "encoder.encoder.layer.1.layernorm_before", of_tokens),
    "V-JEPA 2, clips": Case(v_jepa2, LIKE, of_clips, "encoder.encoder.layer.1.norm1", of_tokens),
}


class ByHand(nn.Module):
    """The wrapper that a user would write."""

    def __init__(self, encoder: nn.Module, case: Case) -> None:
        super().__init__()
        self.encoder, self.case, self.others = encoder, case, case.to
        if case.embed is not None:
            with torch.no_grad():
                self.others = case.embed(encoder, case.to)

    def forward(self, clip: Tensor) -> Tensor:
        clip = clip if self.case.embed is None else self.case.embed(self.encoder, clip)
        return self.case.slow(self.encoder, clip, self.others)


def both(name: str) -> tuple[VideoClassifier, VideoClassifier]:
    """Return the classifier of similarities, and the one with the wrapper by hand."""
    case = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = randomize(case.make(), 0, 0.25)
    found = VideoClassifier.similarity(encoder, case.to)
    return found, VideoClassifier(ByHand(encoder, case).eval(), "BTCHW", output="score")


def attribute(method: Any, options: dict[str, Any]) -> Tensor:
    drawn = {"generator": torch.Generator().manual_seed(0)} if isinstance(method, RISE) else {}
    return method.attribute(CLIP, target=1, **options, **drawn)


@pytest.mark.parametrize("name", CASES)
def test_scores_and_attributions_are_those_of_the_cosine_similarity_by_hand(name: str) -> None:
    clf, hand = both(name)
    scores = clf(CLIP).detach()
    assert clf.output == "score" and scores.shape == (2, 2 if name.endswith("clips") else 3)
    torch.testing.assert_close(scores, hand(CLIP).detach())
    assert float(scores.std()) > 0.005 and float(scores.abs().max()) < 1
    layer, axes = CASES[name].layer, "(BN)TC" if name.startswith("VideoPrism") else None
    methods: dict[str, tuple[Callable[[VideoClassifier], Any], dict[str, Any]]] = {
        "STAA": (STAA, {}),
        "GradCAM": (lambda model: GradCAM(model, model.module.get_submodule(layer), layer_axes=axes), {}),
        "RISE": (lambda model: RISE(model, "BTCHW"), {"n_samples": 8}),
        "occlusion": (lambda model: VideoOcclusion(model, "BTCHW"), {"sliding_window_shapes": (4, 8, 16)}),
        "IG": (IntegratedGradients, {"n_steps": 4}),
    }
    for method, (make, options) in methods.items():
        found, expected = (attribute(make(model), options) for model in (clf, hand))
        size = expected.abs().max()
        assert size > 0, method
        torch.testing.assert_close(found / size, expected / size, rtol=1e-3, atol=1e-4, msg=method)


@in_one_case()
@pytest.mark.parametrize("name", CASES)
def test_contributions_and_constants_sum_to_the_similarity(name: str) -> None:
    clf = both(name)[0].double()
    result = decompose(clf, CLIP.double(), lambda scores: scores[:, 1])
    assert result.nonlinear == () and float(result.remainder.abs().max()) < 1e-7  # V-JEPA 2 rotates in float32
    assert float(result.contributions.abs().sum()) > 1e-2


def test_a_reference_is_like_itself_and_attention_follows_the_mean_of_tokens() -> None:
    clf, _ = both("VideoMAE, clips")
    torch.testing.assert_close(clf(LIKE).diagonal(), torch.ones(2))
    encoder = clf.module.encoder
    again = VideoClassifier.similarity(encoder, encoder(LIKE).last_hidden_state.mean(1), labels=["one", "two"])
    torch.testing.assert_close(again(CLIP), clf(CLIP))
    assert again.class_index("two") == 1 and [name for name, _ in again.predict(CLIP[:1])].count("one") == 1
    found = STAA(clf, mode="attention").attribute(CLIP)
    model = transformers.VideoMAEForVideoClassification(encoder.config).eval()
    model.videomae = encoder
    torch.testing.assert_close(found, STAA(model, mode="attention").attribute(CLIP))


def test_attention_follows_the_pooling_query_of_video_prism() -> None:
    """The auxiliary layer and the query are not part of the backbone that is declared; they are found."""
    clf, _ = both("VideoPrism, texts")
    joint = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(CLIP).joint
    model: Any = clf.module.encoder.video_model
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    for part in (model.auxiliary_layers[0].attention, model.head):
        part.register_forward_hook(lambda module, args, output: seen.append(output[1].mean(1)))
    with torch.no_grad():
        model(CLIP)
        *spatial, temporal = model.vision_model(CLIP, output_attentions=True).attentions
    weights = seen[1][:, 0]  # (B, N)
    weights = (weights + (weights[:, None] @ seen[0])[:, 0]) / 2
    frames = weights.view(2, 4, 4)
    along = temporal.mean(1).view(2, 4, 4, 4)  # (B, patch, T, T)
    frames = (frames + torch.einsum("bqp,bpqk->bkp", frames, along)) / 2
    for matrix in reversed(spatial):
        frames = (frames + torch.einsum("btq,btqk->btk", frames, matrix.mean(1).view(2, 4, 4, 4))) / 2
    torch.testing.assert_close(F.avg_pool2d(joint, 8) * 64, frames.view(2, 4, 2, 2), rtol=1e-3, atol=1e-5)
    assert frames.std() > 0.02 * frames.max()


def test_the_encoder_is_left_as_it_is() -> None:
    encoder = randomize(video_mae(), 0).train()
    before = snapshot(encoder)
    clf = VideoClassifier.similarity(encoder, LIKE)
    assert clf.training and not clf.module.references.requires_grad
    STAA(clf).attribute(CLIP, target=0)
    assert changes(before, snapshot(encoder)) == []


class Pooled(nn.Module):
    """An encoder of one's own, channels first, which returns features beside the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 2)

    def forward(self, clip: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        features = self.conv(clip if mask is None else clip * mask)
        return {"features": features, "embedding": features.relu().mean((2, 3, 4))}


def test_an_encoder_of_ones_own_takes_its_layout_and_arguments() -> None:
    encoder, clip = randomize(Pooled(), 0), CLIP.transpose(1, 2)
    clf = VideoClassifier.similarity(encoder, clip, "BCTHW", output_key="embedding")
    mask = torch.rand(2, 1, 4, 16, 16)
    expected = cosine(encoder(clip, mask)["embedding"], encoder(clip)["embedding"])
    torch.testing.assert_close(clf(clip, mask), expected)


@in_one_case()
@pytest.mark.parametrize(
    ("to", "options", "error", "words"),
    [
        (["a dog"], {}, TypeError, r"to must be a tensor.*got list.*tokenizer\(texts"),
        (TEXTS, {}, ValueError, r"texts need a model of videos and texts.*got VideoMAEModel.*\(K, D\)"),
        (torch.zeros(2, 3, 16), {}, ValueError, r"\(K, D\) or clips with five axes.*\(2, 3, 16\)"),
        (IDS, {}, ValueError, "floating-point embeddings.*int64"),
        (LIKE, {"output": "logits"}, TypeError, "options must be among.*got.*output"),
        (LIKE[:, :3], {}, ValueError, "clip must have 4 frames, got 3"),
    ],
)
def test_what_is_no_reference_is_an_error(to: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        VideoClassifier.similarity(video_mae(), to, **options)


def test_embeddings_of_another_width_and_texts_that_are_no_tensors_are_errors() -> None:
    with pytest.raises(ValueError, match=r"embeddings of 16 numbers.*got shape \(2, 5\)"):
        VideoClassifier.similarity(video_mae(), torch.ones(2, 5))(CLIP)
    with pytest.raises(TypeError, match=r"texts must be tensors \(K, n\).*input_ids"):
        VideoClassifier.similarity(x_clip(), {"input_ids": [[0, 5]]})
    with pytest.raises(TypeError, match=r"encoder must be an nn\.Module"):
        VideoClassifier.similarity(lambda clip: clip, LIKE)  # type: ignore[arg-type]


def test_a_score_is_contrasted_with_one_other_score_and_not_with_the_rest() -> None:
    clf, _ = both("VideoMAE, clips")
    torch.testing.assert_close(clf.versus(0)(CLIP)[:, 1], clf(CLIP)[:, 1] - clf(CLIP)[:, 0])
    with pytest.raises(ValueError, match=r"versus\('rest'\) needs classes.*got a score.*versus\(index\)"):
        clf.versus("rest")(CLIP)
