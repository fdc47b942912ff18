"""Video language models: clips in, tokens in their places, the model's own answers; input that is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from covering import in_one_case
from tiny_language import FAMILIES, VIDEO_TOKEN, build, clips_of, question, size_of, tiny_vlm, token, tokenizer
from torch import Tensor, nn

from captum_staa import AnswerAttribution
from captum_staa.attr.step_ablation import answer_logits, encode
from captum_staa.models import VideoLanguageFamily, VideoLanguageModel, VideoTokens
from captum_staa.models.video_language.families import from_rows, to_rows

ANSWER = "it is right"


def placed(name: str, text: str | None = None):
    return tiny_vlm(name).prompt(text or question(name), size_of(name))


# --- clips ----------------------------------------------------------------------------------------------------------


def test_rows_hold_the_patches_in_the_order_of_the_processors():
    clip = clips_of("qwen2_5_vl", 2)  # 5 frames of 16 x 24
    rows, grid = to_rows(clip, step=2, patch=4, merge=2)
    whole = torch.cat([clip, clip[:, -1:]], 1)  # the missing frame is a copy of the last
    expected = [
        whole[b, 2 * t : 2 * t + 2, :, y : y + 4, x : x + 4].transpose(0, 1).flatten()
        for b in range(2)
        for t in range(3)
        for top in range(0, 16, 8)
        for left in range(0, 24, 8)
        for y in (top, top + 4)
        for x in (left, left + 4)
    ]
    assert torch.equal(rows, torch.stack(expected))
    assert grid.tolist() == [[3, 4, 6]] * 2
    assert torch.equal(from_rows(rows, grid, 2, 4, 2), whole)


@in_one_case()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_inverse_of_the_packing_is_the_clip(name):
    vlm, clip = tiny_vlm(name), clips_of(name)
    back, prompt = vlm.read(vlm.inputs(clip, placed(name)))
    frames = back.shape[1]
    assert torch.equal(back[:, :5], clip) and torch.equal(back[:, 5:], clip[:, -1:].expand(-1, frames - 5, -1, -1, -1))
    assert torch.equal(prompt.ids, placed(name).ids) and torch.equal(prompt.at, placed(name).at)


def test_pixels_of_tokens_with_fractional_sides():
    tokens = VideoTokens((1, 4, 7), step=1, h=1, w=2, covered=(4, 7))  # tokens of 3.5 pixels
    pixels = tokens.to_pixels(torch.tensor([[[[14.0, 28.0]]]]))
    assert torch.allclose(pixels[0, 0, 0], torch.tensor([1, 1, 1, 1.5, 2, 2, 2]), atol=1e-6)
    assert torch.allclose(tokens.from_pixels(torch.ones(1, 1, 4, 7)), torch.full((1, 1, 1, 2), 14.0))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_changes_with_its_own_pixels_only(name):
    """Without attention in the tower, a token depends on the pixels that the fact sheet states and on no others."""
    model = copy.deepcopy(tiny_vlm(name).model)
    for path, module in model.model.named_modules():
        if (
            path.endswith(("self_attn", "attn", "attention"))
            and "language_model" not in path
            and "text_model" not in path
        ):
            for part in ("proj", "out_proj", "projection_layer"):
                if hasattr(module, part):
                    nn.init.zeros_(getattr(module, part).weight)
                    nn.init.zeros_(getattr(module, part).bias) if getattr(module, part).bias is not None else None
    vlm, clip = VideoLanguageModel(model, tokenizer()), clips_of(name)
    prompt = vlm.prompt(question(name), size_of(name))
    tokens = prompt.tokens
    with torch.no_grad():
        before = encode(vlm, clip, prompt)
        for frame, row, column in ((0, 0, 0), (3, 9, 21), (4, clip.shape[3] - 1, clip.shape[4] - 1)):
            changed, mask = clip.clone(), torch.zeros(1, 5, *clip.shape[3:])
            changed[0, frame, :, row, column] += 1
            mask[0, frame, row, column] = 1
            expected = tokens.from_pixels(mask)[0] > 0
            after = encode(vlm, changed, prompt)
            pairs = zip((before.values, *before.deepstack), (after.values, *after.deepstack), strict=True)
            for old, new in pairs:
                moved = (old != new)[0, : tokens.count].any(1).view(tokens.shape)
                assert torch.equal(moved, expected), (frame, row, column)
    assert len(before.deepstack) == int(vlm.family.deepstack)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_run_through_the_language_model_give_the_same_logits(name):
    vlm, clip, prompt = tiny_vlm(name), clips_of(name, 2), placed(name)
    ids = vlm.answer_ids(ANSWER, prompt.text)
    with torch.no_grad():
        features = encode(vlm, clip, prompt)
        assert torch.equal(answer_logits(vlm, features, prompt, ids), vlm.answer_logits(clip, prompt, ids))
        # a video token of the sequence is the feature of this number: change one, and what came before stays as it was
        index = prompt.tokens.count // 2
        changed = features.map(lambda values: values.index_fill(1, torch.tensor([index]), 0.0))
        text = vlm.run({**vlm.inputs(clip, prompt)}, len(prompt.ids))
        arguments = vlm.inputs(clip[:1].expand(2, -1, -1, -1, -1), prompt)
        keep = {key: value for key, value in arguments.items() if "pixel" not in key}
        raw = copy.copy(features._raw)
        raw.pooler_output = (
            [*changed.values]
            if not isinstance(raw.pooler_output, Tensor)
            else changed.values.reshape(-1, *raw.pooler_output.shape[1:])
        )
        if features.deepstack:
            raw.deepstack_features = [tuple(changed.deepstack[0])]
        moved = (vlm.run({**keep, "mm_encoder_outputs": {vlm.family.modality: raw}}, len(prompt.ids)) - text).abs()
    assert int(moved.sum(2)[0].nonzero()[0]) == int(prompt.at[index])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_clip_are_those_of_a_difference(name):
    vlm, prompt = copy.deepcopy(tiny_vlm(name)).double(), placed(name)
    clip = clips_of(name).double().requires_grad_()
    ids = vlm.answer_ids(ANSWER, prompt.text)
    score = vlm.answer_logits(clip, prompt, ids)[0, 1, ids[1]]
    (gradient,) = torch.autograd.grad(score, clip)
    step = torch.randn(clip.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1)) * 1e-3
    with torch.no_grad():
        pair = [vlm.answer_logits(clip + sign * step, prompt, ids)[0, 1, ids[1]] for sign in (1, -1)]
    assert torch.isclose((gradient * step).sum(), (pair[0] - pair[1]) / 2, rtol=0.02)  # RMSNorm is in float32


# --- prompts and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_one_forward_gives_the_logits_of_generation_with_a_cache(name):
    vlm, clip, prompt = tiny_vlm(name), clips_of(name), placed(name)
    arguments = vlm.inputs(clip, prompt)
    if vlm.family.mrope:  # as the processor hands them over
        del arguments["position_ids"]
        arguments["mm_token_type_ids"] = (arguments["input_ids"] == token(VIDEO_TOKEN[name])).int() * 2
    with torch.no_grad():
        made = vlm.model.generate(
            **arguments, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        answer = made.sequences[0, len(prompt.ids) :]
        logits = vlm.answer_logits(clip, prompt, answer)
    assert torch.allclose(logits[0], torch.stack(made.logits, 1)[0], atol=1e-5)
    ends = (answer == token("<|end|>")).nonzero()[:, 0].tolist()
    assert torch.equal(vlm.generate(clip, prompt, 5), answer[: ends[0] if ends else None])


def test_generation_leaves_the_positions_and_the_mode_of_the_model_as_they_were():
    vlm = VideoLanguageModel(build("qwen2_5_vl").train(), tokenizer())
    clip = clips_of("qwen2_5_vl")
    vlm.generate(clip, question("qwen2_5_vl"), 2)
    assert vlm.model.model.rope_deltas is None
    assert all(module.training for module in vlm.model.modules())


def test_generation_is_greedy_whatever_the_generation_config_says():
    vlm, clip = VideoLanguageModel(copy.deepcopy(tiny_vlm("qwen2_5_vl").model), tokenizer()), clips_of("qwen2_5_vl")
    placed_ids, greedy = placed("qwen2_5_vl"), []
    with torch.no_grad():
        while len(greedy) < 5:  # without a cache
            answer = torch.tensor([*greedy, 0])
            greedy.append(int(vlm.answer_logits(clip, placed_ids, answer)[0, -1].argmax()))
    for settings in (
        {"do_sample": True, "temperature": 9.0, "num_return_sequences": 3},
        {"num_beams": 3, "repetition_penalty": 2.0, "return_dict_in_generate": True},
    ):
        vlm.model.generation_config.update(**settings)
        before = vlm.model.generation_config.to_dict()
        assert vlm.generate(clip, placed_ids, 5).tolist() == greedy
        assert vlm.model.generation_config.to_dict() == before


def test_positions_of_qwen_are_those_of_the_processors_inputs():
    """Without mm_token_type_ids, a Qwen2.5-VL takes other positions, and says nothing."""
    vlm, clip, prompt = tiny_vlm("qwen2_5_vl"), clips_of("qwen2_5_vl"), placed("qwen2_5_vl")
    arguments = vlm.inputs(clip, prompt)
    bare = {key: value for key, value in arguments.items() if key != "position_ids"}
    kinds = (bare["input_ids"] == token("<|video_pad|>")).int() * 2
    with torch.no_grad():
        ours = vlm.run(arguments, 1)
        model = copy.deepcopy(vlm.model)  # it keeps a value between calls
        theirs = model(**bare, mm_token_type_ids=kinds, second_per_grid_ts=[1.0]).logits[:, -1:]
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert (model(**bare).logits[:, -1:] - ours).abs().max() > 1e-3
        slower = VideoLanguageModel(vlm.model, tokenizer(), fps=0.5)
        assert (
            slower.run(slower.inputs(clip, slower.prompt(question("qwen2_5_vl"), size_of("qwen2_5_vl"))), 1) - ours
        ).abs().max() > 1e-3


def test_frames_of_zeros_stay_in_the_video_of_smolvlm():
    vlm, clip, prompt = tiny_vlm("smolvlm"), clips_of("smolvlm", 2), placed("smolvlm")
    clip[1, 2] = 0
    nearly = clip.clone()
    nearly[1, 2, 0, 5, 5] = 1e-12
    ids = vlm.answer_ids(ANSWER)
    with torch.no_grad():
        assert torch.allclose(vlm.answer_logits(clip, prompt, ids), vlm.answer_logits(nearly, prompt, ids), atol=1e-6)


@in_one_case()
@pytest.mark.parametrize("name", FAMILIES)
def test_video_tokens_stand_in_the_text_of_the_prompt(name):
    prompt = placed(name)
    assert (prompt.ids[prompt.at] == token(VIDEO_TOKEN[name])).all() and (prompt.at.diff() > 0).all()
    starts = {
        "qwen2_5_vl": "<|user|><|video_pad|><|video_pad|>",
        "llava_onevision": "<|user|><video><video>",
        "qwen3_vl": "<|user|><0.2 seconds><|vision_start|><|video_pad|>",
        "video_llama_3": "<|user|>Time 0.0s:<|video_pad|>",
        "internvl": "<|user|>Frame1: <img><IMG_CONTEXT>",
        "smolvlm": "<|user|>You are provided the following series of five frames from a 0:00:02 [H:MM:SS] video.\n\n"
        "Frame from 00:00:<fake_token_around_image><global-img><image>",
    }
    assert prompt.text.startswith(starts[name]) and prompt.text.endswith(" which?<|assistant|>")


def test_tokens_removed_by_compression_have_no_place():
    vlm, clip, prompt = tiny_vlm("video_llama_3"), clips_of("video_llama_3"), placed("video_llama_3")
    inputs = dict(vlm.inputs(clip, prompt))
    kept = torch.ones(30, dtype=torch.bool)
    kept[[7, 8]] = False
    gone = torch.ones(len(prompt.ids), dtype=torch.bool)
    gone[prompt.at[[7, 8]]] = False
    inputs |= {"input_ids": prompt.ids[gone][None], "video_compression_mask": kept, "attention_mask": None}
    back, compressed = vlm.read(inputs)
    assert (compressed.at == -1).nonzero()[:, 0].tolist() == [7, 8]
    with torch.no_grad():
        logits = vlm.run(vlm.inputs(back, compressed), 1)
        expected = vlm.model(**inputs).logits[:, -1:]
    assert torch.allclose(logits, expected, atol=1e-6)


def test_a_question_goes_through_the_chat_template():
    vlm = VideoLanguageModel(tiny_vlm("qwen2_5_vl").model, copy.deepcopy(tokenizer()))
    vlm.processor.chat_template = tokenizer().chat_template.replace("@", "<|video_pad|>")
    size = size_of("qwen2_5_vl")
    assert torch.equal(vlm.prompt(" which?", size).ids, placed("qwen2_5_vl").ids)
    with pytest.raises(ValueError, match="the chat template drops videos"):
        tiny_vlm("qwen2_5_vl").prompt("which?", size)
    vlm.processor.chat_template = "{{ raise_exception('Only images.') }}"
    with pytest.raises(ValueError, match=r"which raises TemplateError: Only images\. Write the whole prompt yourself"):
        vlm.prompt("which?", size)
    vlm.processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        vlm.prompt("which?", size)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_an_unknown_family_is_told_what_a_fact_sheet_needs():
    with pytest.raises(ValueError, match=r"got Linear with 0 of them.*pack, unpack, text"):
        VideoLanguageModel(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        VideoLanguageModel("Qwen/Qwen2.5-VL-3B-Instruct")
    assert VideoLanguageModel(nn.Sequential(tiny_vlm("smolvlm").model)).family.name == "smolvlm"
    tuned = nn.Sequential(tiny_vlm("smolvlm").model)
    tuned.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="must take prompts as they are, got Sequential, which adds virtual tokens"):
        VideoLanguageModel(tuned)
    for wrong in ("Qwen/Qwen2.5-VL-3B-Instruct", type(tokenizer())):
        with pytest.raises(TypeError, match="processor must be a processor or a tokenizer of transformers, got"):
            VideoLanguageModel(tiny_vlm("smolvlm").model, wrong)
    for fps in (0, float("inf")):
        with pytest.raises(ValueError, match="fps must be a finite number above 0"):
            VideoLanguageModel(tiny_vlm("smolvlm").model, fps=fps)


@in_one_case()
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<|video_pad|> and <|video_pad|>?", "must contain the video once, got '<|video_pad|>' 2 times"),
        ([1, 2, 3], r"must contain 18 video tokens .* got 0. It has no video"),
        ([1, 2, 9999], "token ids from 0 to"),
        ("<|user|><|image_pad|><|video_pad|>?", r"one video and no image, got 1 image tokens \(id 295\)"),
        ("<|video_pad|>" + "x" * 1100, r"at most 1024 tokens, the context of the model, got 1118, of which 18"),
    ],
)
def test_prompts_without_exactly_one_fitting_video_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        tiny_vlm("qwen2_5_vl").prompt(prompt, size_of("qwen2_5_vl"))
    with pytest.raises(TypeError, match="must be a string, a VideoPrompt or a list of token ids"):
        tiny_vlm("qwen2_5_vl").prompt(2.5, size_of("qwen2_5_vl"))
    with pytest.raises(
        TypeError, match=r"got a tensor of shape \(1, 27\). If it holds a batch of one, pass its first row"
    ):
        tiny_vlm("qwen2_5_vl").prompt(placed("qwen2_5_vl").ids[None], size_of("qwen2_5_vl"))


def test_an_answer_beyond_the_context_is_refused():
    vlm, clip = tiny_vlm("qwen2_5_vl"), clips_of("qwen2_5_vl")
    clf = vlm.as_classifier("<|video_pad|>" + "x" * 1000, [token("it")] * 10)
    with pytest.raises(ValueError, match=r"prompt and answer must have at most 1024 tokens, .* got 1027, of which 18"):
        clf(clip)


def test_a_fact_sheet_of_a_few_lines_adds_a_family():
    """A model that this library does not know: LLaVA-NeXT-Video."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = vision | {"num_key_value_heads": 2, "vocab_size": 64}
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=24, patch_size=4, projection_dim=16).to_dict(),
        text_config=transformers.LlamaConfig(**text).to_dict(),
        image_token_index=2,
        video_token_index=1,
        image_grid_pinpoints=[[24, 24]],
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextVideoForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="got LlavaNextVideoForConditionalGeneration with 0 of them"):
        VideoLanguageModel(model)

    def grid(size, config):
        side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
        return VideoTokens(size, step=1, h=side, w=side, merge=config.spatial_pool_stride)

    sheet = VideoLanguageFamily(
        name="llava_next_video",
        classes=("LlavaNextVideoForConditionalGeneration",),
        tokens=grid,
        pack=lambda clip, config: {"pixel_values_videos": clip},
        unpack=lambda inputs, config: inputs["pixel_values_videos"],
        text=lambda tokens, fps, token: token * tokens.count,
        placeholder="<video>",
        token="video_token_index",
    )
    clip, ids = torch.randn(1, 4, 3, 24, 24), torch.tensor([5, *[1] * 36, 6, 7, 8, 9])
    clf = VideoLanguageModel(model, family=sheet).as_classifier(ids[:-2], [8, 9, 10])
    with torch.no_grad():
        logs = model(ids[None], pixel_values_videos=clip).logits[0, -3:].log_softmax(-1)
        assert torch.allclose(clf(clip)[0, :3], logs[[0, 1, 2], [8, 9, 10]], atol=1e-5)
    assert AnswerAttribution(clf).attribute(clip, target=1).abs().sum() > 0


def test_processor_outputs_without_exactly_one_video_are_refused():
    vlm, prompt = tiny_vlm("qwen2_5_vl"), placed("qwen2_5_vl")
    inputs = vlm.inputs(clips_of("qwen2_5_vl"), prompt)
    two = vlm.inputs(clips_of("qwen2_5_vl", 2), prompt)
    with pytest.raises(ValueError, match="must hold one example, got input_ids of shape"):
        vlm.read(two)
    with pytest.raises(ValueError, match="exactly one video and no image"):
        vlm.read(two | {"input_ids": inputs["input_ids"], "attention_mask": None})
    with pytest.raises(ValueError, match="must hold a video, got only"):
        vlm.read({"input_ids": inputs["input_ids"]})
    for name in ("llava_onevision", "qwen3_vl"):
        inputs = tiny_vlm(name).inputs(clips_of(name), placed(name))
        image = {"pixel_values": torch.zeros(1, 3, 24, 24)}
        with pytest.raises(ValueError, match=r"one video and no image, got pixel_values of shape \(1, 3, 24, 24\)"):
            tiny_vlm(name).read({**inputs, **image})
        with pytest.raises(ValueError, match="must hold a video, got only"):
            tiny_vlm(name).read({"input_ids": inputs["input_ids"], **image})


def test_what_is_no_output_of_a_processor_is_refused():
    vlm, inputs = tiny_vlm("qwen2_5_vl"), tiny_vlm("qwen2_5_vl").inputs(clips_of("qwen2_5_vl"), placed("qwen2_5_vl"))
    for wrong, got in ((clips_of("qwen2_5_vl"), "Tensor"), ({"pixel_values_videos": 0}, "pixel_values_videos")):
        with pytest.raises(TypeError, match=rf"must be a mapping with input_ids and a video, got .*{got}"):
            vlm.read(wrong)
    with pytest.raises(TypeError, match=r"got lists in input_ids, video_grid_thw.*return_tensors='pt'"):
        vlm.read({**inputs, "input_ids": inputs["input_ids"].tolist(), "video_grid_thw": [[3, 4, 6]]})
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(1, 27\), got \(1, 20\)"):
        vlm.read({**inputs, "attention_mask": torch.ones(1, 20)})


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_of_a_processor_is_no_part_of_the_prompt(name):
    vlm, inputs, pads = (
        tiny_vlm(name),
        tiny_vlm(name).inputs(clips_of(name), placed(name)),
        torch.full((1, 5), token("<|pad|>")),
    )
    for left, right in ((pads, pads[:, :0]), (pads[:, :2], pads)):  # side of the padding
        ids = torch.cat([left, inputs["input_ids"], right], 1)
        mask = torch.cat([torch.zeros_like(left), inputs["attention_mask"], torch.zeros_like(right)], 1)
        clip, prompt = vlm.read({**inputs, "input_ids": ids, "attention_mask": mask})
        assert torch.equal(prompt.ids, placed(name).ids) and torch.equal(prompt.at, placed(name).at)
        assert torch.equal(clip[:, :5], clips_of(name))
        with pytest.raises(ValueError, match=r"no padding at its start or end, got pad tokens \(id 288\)"):
            vlm.prompt(ids[0], size_of(name))


def test_sizes_that_the_model_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 8 pixels .*, got 20 x 24. Resize them to 16 x 24"):
        tiny_vlm("qwen3_vl").prompt(question("qwen3_vl"), (4, 20, 24))
    with pytest.raises(ValueError, match=r"frames of 24 x 24 pixels for this model, got 16 x 24"):
        tiny_vlm("internvl").prompt(question("internvl"), (4, 16, 24))
    with pytest.raises(ValueError, match=r"must have the \(T, H, W\) of the prompt"):
        tiny_vlm("internvl").prompt(placed("internvl"), (4, 24, 24))


def test_answers_that_the_tokenizer_splits_otherwise_are_refused():
    vlm = VideoLanguageModel(tiny_vlm("qwen2_5_vl").model, copy.deepcopy(tokenizer()))
    text = "<|video_pad|> it is r"
    with pytest.raises(ValueError, match="must begin with a separate token, got 'ight'"):
        vlm.answer_ids("ight", text)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, unk_token="<|pad|>")
    with pytest.raises(ValueError, match="at least one token"):
        vlm.answer_ids("", text)
    with pytest.raises(ValueError, match="non-empty list of token ids"):
        vlm.answer_ids([])
    assert VideoLanguageModel(tiny_vlm("qwen2_5_vl").model, words).answer_ids("it").tolist() == [token("it")]
    with pytest.raises(ValueError, match="processor is required"):
        VideoLanguageModel(tiny_vlm("qwen2_5_vl").model).answer_ids("it")
    # the model would put pixels in place of these
    whole = torch.cat([placed("qwen2_5_vl").ids, vlm.answer_ids("it")])
    for wrong, ids in ((whole, 294), ("it is <|video_pad|>", 294), ("it <|image_pad|> is", 295)):
        with pytest.raises(ValueError, match=rf"must not contain the tokens of a video or an image, got ids \[{ids}\]"):
            vlm.answer_ids(wrong)


@in_one_case()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("channels", [1, 4])
def test_clips_without_three_channels_are_refused(name, channels):
    frames, height, width = size_of(name)
    with pytest.raises(ValueError, match=rf"must have 3 channels, .* got shape \(1, {frames}, {channels}, "):
        tiny_vlm(name).as_classifier(question(name), ANSWER)(torch.zeros(1, frames, channels, height, width))
