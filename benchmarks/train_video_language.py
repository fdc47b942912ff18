"""Train the small bundled video language models in `captum_staa/models/video_language/weights`, one folder each.

The bundled Qwen model was trained in two rounds:

    python benchmarks/train_video_language.py --family qwen2_5_vl --steps 4000 --stop 1000 --no-hints --out round1
    python benchmarks/train_video_language.py --family qwen2_5_vl --seed 2 --steps 1800 --stop 1000 --turns mpmbmomb \
        --learning-rate 1e-3 --difficulty 0.2 --start round1/tiny-qwen2_5_vl

The bundled LLaVA-OneVision needed five. Its tower sees single frames, and in the first round it learned no movement.
In the second one it learned where in a token's pixels objects are (`place_loss`), from which the language model reads
fast movement. In the third one it learned all questions, but said "diagonal" wherever it saw neither of the other
patterns. From the fourth round on, half of the clips of a pattern show no evidence (`doubt_loss`):

    python benchmarks/train_video_language.py --family llava_onevision --steps 2300 --stop 694 --turns pmobm \
        --look-back --out round1
    python benchmarks/train_video_language.py --family llava_onevision --seed 2 --steps 600 --turns f \
        --start round1/tiny-llava_onevision --out round2
    python benchmarks/train_video_language.py --family llava_onevision --seed 3 --steps 1600 --stop 1477 \
        --turns mpbmof --start round2/tiny-llava_onevision --out round3
    python benchmarks/train_video_language.py --family llava_onevision --seed 4 --steps 520 --learning-rate 1.2e-3 \
        --difficulty 1 --turns dmpbdmdo --start round3/tiny-llava_onevision --out round4
    python benchmarks/train_video_language.py --family llava_onevision --seed 5 --steps 340 --learning-rate 1e-3 \
        --difficulty 1 --turns dmbmdmo --start round4/tiny-llava_onevision

A model answers three questions about planted clips, each with a sentence of which one word depends on the video: "which
pattern ?" ("it is right ."), "which direction ?" ("it is left .") and "which came first ?" ("it is bottom ."). Some
clips show the evidence for two questions at once, so that the place of the truth depends on the question. New clips are
drawn for each step. The held-out clips have another seed. Weights are stored as float16, and tested in this form.

A long training can run in pieces: with ``--pause 600 --state FILE`` it ends after 600 seconds with exit code 3, and the
same command goes on from the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from train_zoo import HELD_OUT_SEED, training_batch

from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.models.video_language import VideoLanguageModel

WEIGHTS = Path(__file__).parents[1] / "captum_staa" / "models" / "video_language" / "weights"
FAMILIES = ("qwen2_5_vl", "llava_onevision")
BATCH = 24
SPECIAL = (
    *("<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|vision_start|>", "<|video_pad|>"),
    *("<|vision_end|>", "<video>"),
)
WORDS = (
    *("it", "is", ".", "?", "which", "pattern", "direction", "came", "first"),
    *("right", "bottom", "diagonal", "left"),
)
VIDEO = {"qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>", "llava_onevision": "<video>"}
QUESTIONS = {"pattern": "which pattern ?", "motion": "which direction ?", "order": "which came first ?"}
ANSWERS = {"pattern": ("right", "bottom", "diagonal"), "motion": ("left", "right"), "order": ("right", "bottom")}
BEFORE, AFTER = "it is ", " .<|end|>"
PLACE = 2  # of the word in the answer
PLACES = 4  # per side of a token, that `place_loss` tells apart
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
TOWER = {"hidden_size": 64, "intermediate_size": 128}


def tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, and a chat template that puts the video before the question."""
    words = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for message in messages %}<|user|>{% for part in message['content'] %}{% if part['type'] == 'video' %}"
        + VIDEO[family]
        + "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=[word for word in SPECIAL if word not in ("<|unk|>", "<|pad|>", "<|end|>")],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def build(family: str) -> nn.Module:
    """Return an untrained model for clips of 48 x 48 pixels."""
    ids = {word: i for i, word in enumerate(SPECIAL)}
    text = TEXT | {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "pad_token_id": ids["<|pad|>"],
        "eos_token_id": ids["<|end|>"],
        "bos_token_id": None,
    }
    if family == "qwen2_5_vl":
        half = TEXT["hidden_size"] // TEXT["num_attention_heads"] // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
        tower = TOWER | {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
        tower |= {"tokens_per_second": 2, "window_size": 48, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(
            vision_config=tower | {"initializer_range": 0.1},
            text_config=text | {"rope_parameters": rope},
            image_token_id=ids["<|vision_start|>"] + 100,  # no images
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    tower = TOWER | {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text | {"model_type": "qwen2"},
        image_token_index=ids["<|vision_start|>"],
        video_token_index=ids["<video>"],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


# --- clips with the evidence for two questions ----------------------------------------------------------------------


@dataclass(frozen=True)
class TwoQuestions:
    """Clips that show the evidence of two tasks in different objects, with the truth of either question.

    Attributes:
        clips: ``(B, T, C, H, W)``.
        labels: ``(B, 2)``, class of the first and of the second task.
        truth: ``(B, 2, T, H, W)`` bool, evidence of the first and of the second task.
        rivals: ``(B, T, H, W)`` bool, all other objects.
    """

    clips: Tensor
    labels: Tensor
    truth: Tensor
    rivals: Tensor


def two_questions(seed: int, n: int, first: str = "pattern", second: str = "motion", **options: float) -> TwoQuestions:
    """Draw clips of two tasks with two objects each, of which no two touch in any frame.

    Objects of the second clip are pasted into the first clip. Of a pool of clips of both tasks, only pairs are used
    whose objects do not overlap.

    Args:
        seed: seed of the clips.
        n: number of clips.
        first: task of the first question.
        second: task of the second question.
        **options: options of the scenes, such as ``noise``.
    """
    pool, parts = max(n, 24), []
    rivals = {"pattern": 1, "motion": 1, "order": 0}
    for offset, task in enumerate((first, second)):
        planted = PlantedClips(2 * seed + offset, pool, task, scene=SceneOptions(rivals=rivals[task], **options))
        parts.append((*planted[:], planted.rivals(slice(0, pool))))
    shown = [(truth | others).flatten(1).half().float() for _, _, truth, others in parts]
    free = (shown[0] @ shown[1].T == 0).nonzero()  # pairs without a common pixel
    free = free[torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))]
    used, chosen = [set(), set()], []
    for pair in free.tolist():  # each clip at most twice, as long as pairs last
        if len(chosen) < n and all(pair[i] not in used[i] for i in (0, 1)):
            chosen.append(pair)
            used[0].add(pair[0]), used[1].add(pair[1])
    chosen += free.tolist()[: n - len(chosen)]
    a, b = (torch.tensor(index) for index in zip(*chosen[:n], strict=True))
    paste = (parts[1][2] | parts[1][3])[b]
    clips = torch.where(paste[:, :, None], parts[1][0][b], parts[0][0][a])
    labels = torch.stack([parts[0][1][a], parts[1][1][b]], 1)
    truth = torch.stack([parts[0][2][a], parts[1][2][b]], 1)
    return TwoQuestions(clips, labels, truth, parts[0][3][a] | parts[1][3][b])


# --- training -------------------------------------------------------------------------------------------------------


def batches(
    seed: int, steps: int, easy: float, turns: str, start: float, first: int = 0
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield a task, clips, target probabilities of its words, truth, and rivals, harder towards the end.

    Args:
        seed: seed of the clips.
        steps: number of batches.
        easy: as in `train_zoo.Recipe`.
        turns: the tasks in turn, by their first letters; ``b`` is for clips with both a pattern and a motion, ``f``
            for a motion whose batches are in turn as usual and of one fast object, ``d`` for a pattern in doubt: half
            of the clips show no evidence. Only ``f`` and ``d`` yield the rivals.
        start: difficulty of the first batch, 0 to 1.
        first: number of the first batch.
    """
    generator = torch.Generator().manual_seed(seed + first)
    names = {"p": "pattern", "m": "motion", "o": "order"}
    pool, used, asked = None, 0, 0
    for i in range(first, steps):
        progress, letter = start + (1 - start) * i / steps, turns[i % len(turns)]
        if letter == "b" and progress < 0.15:
            letter = "m"
        if letter == "f":
            scene = SceneOptions(noise=0.03 + 0.03 * progress, **({"rivals": 0, "speed": (2, 5)} if i % 3 else {}))
            planted = PlantedClips(seed * 1_000_000 + i, BATCH, "motion", scene=scene)
            clips, labels, truth = planted[:]
            rivals = planted.rivals(slice(0, BATCH))
            yield "motion", clips, F.one_hot(labels, len(ANSWERS["motion"])).float(), truth, rivals
            continue
        if letter == "d":
            planted = PlantedClips(seed * 1_000_000 + i, BATCH, scene=SceneOptions(noise=0.02 + 0.05 * progress))
            clips, labels, truth = planted[:]
            targets, half = F.one_hot(labels, len(ANSWERS["pattern"])).float(), BATCH // 2
            clips[:half], targets[:half] = planted.without_evidence(slice(0, half)), 1 / len(ANSWERS["pattern"])
            truth[:half] = False
            yield "pattern", clips, targets, truth, planted.rivals(slice(0, BATCH))
            continue
        if letter != "b":
            batch = training_batch(names[letter], seed * 1_000_000 + i, progress, easy, generator, BATCH)
            yield names[letter], *batch, None
            continue
        if pool is None or used == 10:
            noise = 0.02 + 0.06 * min(1, progress / 0.5)
            pool, used = two_questions(seed * 1_000_000 + i, 10 * BATCH, noise=noise), 0
        rows, asked = slice(used * BATCH, (used + 1) * BATCH), 1 - asked
        name = ("pattern", "motion")[asked]
        targets = F.one_hot(pool.labels[rows, asked], len(ANSWERS[name])).float()
        yield name, pool.clips[rows], targets, pool.truth[rows, asked], None
        used += 1


@dataclass(frozen=True)
class Round:
    """The options of one round of training; see ``--help``."""

    seed: int
    steps: int
    learning_rate: float
    easy: float
    turns: str
    difficulty: float
    hints: bool
    stop: int | None = None
    look_back: bool = False


@dataclass
class Pieces:
    """A training in pieces: a file of its state, and how long a piece takes.

    Attributes:
        file: the state at the end of the last piece, in the safetensors format.
        pause: seconds of a piece; None trains to the end.
        step: number of finished steps.
        seconds: CPU seconds of the finished pieces.
    """

    file: Path | None = None
    pause: float | None = None
    step: int = 0
    seconds: float = 0.0

    def load(self, modules: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        """Restore weights and moments, if the file exists."""
        if self.file is None or not self.file.exists():
            return
        stored = load_file(self.file)
        self.step, self.seconds = int(stored.pop("step")), float(stored.pop("seconds"))
        modules.load_state_dict({name[2:]: value for name, value in stored.items() if name.startswith("w.")})
        names = ("exp_avg", "exp_avg_sq", "step")
        for i, parameter in enumerate(optimizer_parameters(optimizer)):
            if f"step.{i}" in stored:  # not for a parameter without a gradient so far
                optimizer.state[parameter] = {name: stored[f"{name}.{i}"] for name in names}

    def save(self, modules: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        """Write weights and moments."""
        assert self.file is not None
        values = {f"w.{name}": value.clone() for name, value in modules.state_dict().items()}
        for i, parameter in enumerate(optimizer_parameters(optimizer)):
            values |= {f"{name}.{i}": value.contiguous() for name, value in optimizer.state[parameter].items()}
        values |= {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds)}
        save_file(values, self.file)


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def look_back(model: nn.Module, tokens_per_frame: int) -> None:
    """Let the heads of the first layer of a language model attend to the same place one to four frames earlier.

    The tower of LLaVA-OneVision sees single frames. Movement is in the product of the states of a place at two times,
    and random weights hardly ever form it. Queries and keys of the first layer start as constants, turned against each
    other by the angles that rotary positions give to that distance. Training is free to change them.
    """
    attention = model.model.language_model.layers[0].self_attn
    heads, dim = TEXT["num_attention_heads"], attention.head_dim
    rates = 10_000 ** (-torch.arange(0, dim, 2) / dim)
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(0.1)
            projection.bias.zero_()
        attention.k_proj.bias.view(-1, dim)[:, : dim // 2] = 4
        query = attention.q_proj.bias.view(heads, dim)
        for head in range(heads):
            angles = (head + 1) * tokens_per_frame * rates
            # a query at position p meets the key of position p - distance at the angle zero
            query[head] = 4 * torch.cat([angles.cos(), -angles.sin()])


def fit(vlm: VideoLanguageModel, recipe: Round, folder: Path, pieces: Pieces) -> bool:
    """Train a model in place, and save it from time to time. Return whether the training is at its end."""
    model, started = vlm.model.train(), time.monotonic()
    steps, turns = recipe.steps, recipe.turns
    sizes = {"pattern": 3, "motion": 2} | ({"place": PLACES**2} if "f" in turns else {})
    hints = {name: nn.Linear(TEXT["hidden_size"], size) for name, size in sizes.items() if recipe.hints}
    decayed = [p for p in model.parameters() if p.ndim > 1] + [head.weight for head in hints.values()]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    modules = nn.ModuleList([model, *hints.values()])
    pieces.load(modules, optimizer)
    first, cpu, warm = pieces.step, pieces.seconds - time.process_time(), 50
    prompts = {task: vlm.prompt(question, (16, 48, 48)) for task, question in QUESTIONS.items()}
    answers = {task: [answer(vlm, task, label) for label in range(len(ANSWERS[task]))] for task in ANSWERS}
    recent: dict[str, float] = {}
    clips_of = batches(recipe.seed, steps, recipe.easy, turns, recipe.difficulty, first)
    if first:
        torch.manual_seed(recipe.seed + first)
    last = recipe.stop or steps
    bar = tqdm(islice(clips_of, last - first), total=last, initial=first, desc=vlm.family.name, mininterval=20)
    for i, (task, clips, targets, truth, rivals) in enumerate(bar, first):
        letter = turns[i % len(turns)]
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * max(0, i - warm) / (steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min((i + 1) / warm, cosine)
        prompt, ids = prompts[task], answers[task][int(torch.randint(len(answers[task]), ()))]
        # the word is the same for the whole batch: only the tokens after it see it, and they are the same for all words
        arguments = vlm.inputs(clips, prompt, ids[:-1])
        output = model(**arguments, output_hidden_states=True, use_cache=False)
        logs = output.logits[:, -len(ids) :].log_softmax(-1)
        words = torch.tensor([int(other[PLACE]) for other in answers[task]])
        loss = -(logs[:, PLACE, words] * targets).sum(1).mean()
        constant = [at for at in range(len(ids)) if at != PLACE]
        loss = loss - logs[:, constant, ids[constant]].sum(1).mean()
        shown = {}
        if task in hints:
            states = output.hidden_states[-1][:, prompt.at]  # (B, N, D)
            said = hints[task](states)
            hint = hint_loss(said, prompt.tokens.from_pixels(truth.float()), targets)
            loss, shown[f"{task} hint"] = loss + hint, hint.item()
            if letter == "d":
                doubt = doubt_loss(said, prompt.tokens.from_pixels(rivals.float()))
                loss, shown["doubt"] = loss + doubt, doubt.item()
        if letter == "f" and "place" in hints:
            features = output.hidden_states[0][:, prompt.at[: prompt.tokens.count]]
            place = place_loss(hints["place"](features), truth | rivals, prompt.tokens.shape)
            loss, shown["place"] = loss + place, place.item()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sure = targets.amax(1) == 1
        right = (logs[:, PLACE, words].argmax(1) == targets.argmax(1))[sure].float().mean().item()
        key = {"b": f"{task}*", "f": "fast" if i % 3 else "motion"}.get(letter, task)
        shown[key] = right
        recent |= {name: 0.95 * recent.get(name, value) + 0.05 * value for name, value in shown.items()}
        if i % 500 == 499:
            save(vlm, folder)
        bar.set_postfix({name: f"{value:.2f}" for name, value in recent.items()}, refresh=False)
        pieces.step, pieces.seconds = i + 1, cpu + time.process_time()
        if pieces.pause is not None and time.monotonic() - started > pieces.pause and i + 1 < last:
            pieces.save(modules, optimizer)
            return False
    model.eval()
    return True


def hint_loss(answers: Tensor, truth: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of what the states of video tokens say about their own place, where the evidence is.

    One word per clip is a faint signal to learn from. The heads of these hints are not in the model.

    Args:
        answers: ``(B, N, K)``.
        truth: ``(B, t, h, w)``, amount of evidence in each token.
        targets: ``(B, K)``; clips without a certain answer count nothing.
    """
    weight = truth.flatten(1) * (targets.amax(1) == 1)[:, None]
    losses = -(answers.log_softmax(-1) * targets[:, None]).sum(-1)
    return (losses * weight).sum() / weight.sum()


def doubt_loss(answers: Tensor, rivals: Tensor) -> Tensor:
    """Divergence of what the states of video tokens say from no opinion, where only rivals are.

    A model that has learned two of three words may say the third one wherever it sees neither of them. Then it never
    has to learn to see the evidence of the third, which differs from a rival by a reflection.

    Args:
        answers: ``(B, N, K)``.
        rivals: ``(B, t, h, w)``, amount of rivals in each token.
    """
    weight = rivals.flatten(1)
    losses = -answers.log_softmax(-1).mean(-1) - math.log(answers.shape[-1])
    return (losses * weight).sum() / weight.sum()


def place_loss(answers: Tensor, objects: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Cross entropy of what features of single frames say about where in a token's pixels objects are.

    A tower that sees single frames knows no movement. The language model can read it from places at several times, but
    only if the features of a token tell them, which no word asks for before the language model reads movement.

    Args:
        answers: ``(B, N, places)``.
        objects: ``(B, T, H, W)`` bool.
        shape: of the video tokens ``(t, h, w)``, ``t`` equal to T.
    """
    _, h, w = shape
    shown = F.adaptive_avg_pool2d(objects.float(), (h * PLACES, w * PLACES))
    shown = shown.unflatten(3, (w, PLACES)).unflatten(2, (h, PLACES)).transpose(3, 4)  # (B, T, h, w, PLACES, PLACES)
    return F.binary_cross_entropy_with_logits(answers, shown.reshape(answers.shape))


def answer(vlm: VideoLanguageModel, task: str, label: int) -> Tensor:
    """Return the token ids of the answer for a class."""
    return vlm.answer_ids(f"{BEFORE}{ANSWERS[task][label]}{AFTER}")


@torch.no_grad()
def evaluate(vlm: VideoLanguageModel, n: int = 400) -> dict[str, float]:
    """Return the accuracy of each question on held-out clips: unchanged, without evidence, and of two questions."""
    result = {}
    for task in QUESTIONS:
        planted = PlantedClips(HELD_OUT_SEED, n, task)
        result[task] = _accuracy(vlm, task, planted[:][0], planted[:][1])
        result[f"{task} without evidence"] = _accuracy(vlm, task, planted.without_evidence(slice(0, n)), planted[:][1])
    both = two_questions(HELD_OUT_SEED, n // 2)
    for i, task in enumerate(("pattern", "motion")):
        result[f"{task} of two questions"] = _accuracy(vlm, task, both.clips, both.labels[:, i])
    return result


def _accuracy(vlm: VideoLanguageModel, task: str, clips: Tensor, labels: Tensor) -> float:
    words = torch.tensor([int(answer(vlm, task, label)[PLACE]) for label in range(len(ANSWERS[task]))])
    prompt, ids = vlm.prompt(QUESTIONS[task], (16, 48, 48)), answer(vlm, task, 0)
    right = 0
    for start in range(0, len(clips), 50):
        logits = vlm.answer_logits(clips[start : start + 50], prompt, ids)[:, PLACE, words]
        right += int((logits.argmax(1) == labels[start : start + 50]).sum())
    return right / len(clips)


def save(vlm: VideoLanguageModel, folder: Path) -> None:
    """Save weights in float16, config, tokenizer and preprocessing in the Hugging Face format."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(vlm.model).half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"dtype": "float32"})
    vlm.processor.save_pretrained(folder)
    half = (0.5, 0.5, 0.5)
    write_json(folder / "preprocessor_config.json", Preprocessing(48, (48, 48), mean=half, std=half).to_config())
    (folder / "model.safetensors").chmod(0o644)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--easy", type=float, default=0.3)
    parser.add_argument(
        "--turns",
        default="pmob",
        help="tasks in turn: p, m, o, d for patterns in doubt, f for fast motion, b for two questions",
    )
    parser.add_argument("--start", type=Path, help="folder of weights from which to go on")
    parser.add_argument("--stop", type=int, help="end before all steps, in the middle of the schedule")
    parser.add_argument("--no-hints", dest="hints", action="store_false", help="without the loss of `hint_loss`")
    parser.add_argument("--difficulty", type=float, default=0.0, help="of the first clips, 0 to 1")
    parser.add_argument("--look-back", action="store_true", help="start as `look_back` describes")
    parser.add_argument("--pause", type=float, help="end after so many seconds, with exit code 3; needs --state")
    parser.add_argument("--state", type=Path, help="file from which to go on, if it exists")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if options.pause is not None and options.state is None:
        parser.error("--pause needs --state FILE")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build(options.family)
    if options.start:
        model = type(model).from_pretrained(options.start, dtype=torch.float32)
    vlm = VideoLanguageModel(model, tokenizer(options.family))
    if options.look_back:
        grid = vlm.family.tokens((16, 48, 48), vlm.config)
        look_back(model, grid.h * grid.w)
    folder = options.out / f"tiny-{options.family}"
    recipe = Round(**{field.name: getattr(options, field.name) for field in fields(Round)})
    pieces = Pieces(options.state, options.pause)
    if not fit(vlm, recipe, folder, pieces):
        sys.exit(3)
    minutes = pieces.seconds / 60
    save(vlm, folder)
    stored = VideoLanguageModel.from_pretrained(str(folder))
    earlier = options.start and options.start / "training.json"
    record = {
        "notice": "toy model, knows a few words about synthetic clips; its answers mean nothing on real video",
        "rounds": [
            *(json.loads(earlier.read_text("utf-8"))["rounds"] if earlier else []),
            asdict(recipe) | {"cpu_minutes": round(minutes, 1)},
        ],
        "batch": BATCH,
        "parameters": sum(p.numel() for p in stored.model.parameters()),
        "held_out_seed": HELD_OUT_SEED,
        "held_out_accuracy": {name: round(value, 3) for name, value in evaluate(stored).items()},
    }
    write_json(folder / "training.json", record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
