"""Malformed values by the kind of the argument that they are passed for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_staa import VideoLayout

NAN, INF = math.nan, math.inf


class Bad(NamedTuple):
    """A value, and whether every result would be wrong."""

    value: Any
    must_fail: bool = True


class Opaque:
    """An object of an unknown type."""

    def __repr__(self) -> str:
        return "Opaque()"


def malformed(draw: Any, good: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[dict[str, Any], str, Bad]:
    """Replace one of the valid arguments by an invalid value. Return the arguments, its name, and the value."""
    name = draw(st.sampled_from(sorted(kinds)))
    bad = draw(st.sampled_from(_values(kinds[name], good.get(name))))
    return {**good, name: bad.value}, name, bad


def _values(kind: str, good: Any) -> list[Bad]:
    values = {
        "count": _counts,
        "number": _numbers,
        "signed": lambda good: [bad for bad in _numbers(good) if repr(bad.value) != "-1.0"],
        "fraction": _fractions,
        "word": _words,
        "layout": _layouts,
        "clip": _clips,
        "inputs": lambda good: [bad for bad in _clips(good) if not _is_several(bad.value)],
        "maps": _maps,
        "pictured": _pictured,
        "map alone": _map_alone,
        "any numbers": _any_numbers,
        "truth": _truths,
        "table": _tables,
        "target": _targets,
        "baseline": _baselines,
        "mask": _masks,
        "triple": _triples,
        "pair": lambda good: [Bad(value, must and repr(value) != "(1, 1)") for value, must in _triples(good)],
        "generator": _generators,
        "frames": _frames,
        "model": _models,
        "numbers": _sequences,
        "size": _sizes,
        "percent": _percents,
        "prompt": _prompts,
        "answer": _answers,
        "counterfactual": _counterfactuals,
    }[kind.removesuffix("?")](good)
    optional = kind.endswith("?")
    if kind == "size":
        return values
    return [*values, Bad(None, not optional), *(Bad(value) for value in _junk())]


def _junk() -> list[Any]:
    return [Opaque(), 1j, b"bytes", {"a": 1}, np.array(["a"]), int, ..., {1, 2}]


def _counts(_: Any) -> list[Bad]:
    bad = [0, -1, -(2**70), 0.5, 2.5, NAN, INF, "3", "", [], [1], (1, 2), torch.tensor([1, 2]), torch.tensor(0.5)]
    return [*map(Bad, bad), Bad(True, False), Bad(np.int64(2), False), Bad(torch.tensor(2), False), Bad(2.0, False)]


def _numbers(_: Any) -> list[Bad]:
    bad = [NAN, -INF, -1.0, "4", "", [], [1.0], (1.0, 2.0), torch.ones(2), np.ones(2), torch.tensor(NAN)]
    return [*map(Bad, bad), Bad(True, False), Bad(np.float32(1), False), Bad(torch.tensor(1.0), False), Bad(INF)]


def _fractions(_: Any) -> list[Bad]:
    bad = [NAN, INF, -0.5, 1.5, 2, "0.5", [], [0.5, 3.0], (), torch.tensor([0.1, 2.0]), np.array([NAN])]
    return [*map(Bad, bad), Bad(True, False), Bad(np.float32(0.5), False), Bad(0, False), Bad(1, False)]


def _words(_: Any) -> list[Bad]:
    return [*map(Bad, ["", "no such word", 3, NAN, [], ["all"], ("mean",), torch.tensor(1)]), Bad(True)]


def _layouts(_: Any) -> list[Bad]:
    bad = ["", "BTCH", "TBCHW", "BTCHWW", "BBCHW", "B T C H W", 5, NAN, ["B", "T"], ("BTCHW",), torch.ones(5)]
    return [*map(Bad, bad), Bad(VideoLayout("BTCHW", 9)), Bad(True)]


def _clips(good: Any) -> list[Bad]:
    clip = good if isinstance(good, Tensor) else torch.ones(1, 2, 1, 3, 2)
    plain = clip.detach().clone().contiguous()
    plain = plain if plain.is_floating_point() else plain.float()
    dead, huge = plain.clone(), plain.clone()
    dead.view(-1)[0], huge.view(-1)[-1] = NAN, -INF
    bad = [
        *(plain[0], plain[None], plain[:0], plain[..., :0], plain.flatten(), torch.tensor(1.0), torch.empty(0)),
        *(dead, huge, plain * NAN, plain.long(), plain > 0, (plain * 9).to(torch.uint8), plain.to(torch.complex64)),
        *(plain.to("meta"), plain.to_sparse(), plain.numpy() if plain.dtype != torch.bfloat16 else 3),
        *(plain.tolist(), (plain, plain), [plain], (), "clip", 1.0, nn.Flatten(), (plain, None), ((plain,),)),
    ]
    return [*map(Bad, bad)]


def _is_several(value: Any) -> bool:
    """Return whether a value is several clips, as of a model of several inputs."""
    return isinstance(value, tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def _map_alone(good: Any) -> list[Bad]:
    """Maps without a reference, which may have any size."""
    return [Bad(value, must and not _finite(value)) for value, must in _maps(good)]


def _finite(value: Any) -> bool:
    real = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta and not value.is_sparse
    return real and value.numel() > 0 and bool(value.isfinite().all())


def _pictured(good: Any) -> list[Bad]:
    """Maps for a picture, which need no batch axis and may be a curve."""
    values = [bad for bad in _map_alone(good) if getattr(bad.value, "ndim", 0) not in (1, 3, 4)]
    return [
        bad for bad in values if not isinstance(bad.value, list) and "int" not in str(getattr(bad.value, "dtype", ""))
    ]


def _any_numbers(good: Any) -> list[Bad]:
    """Values for arguments that accept nan and integers."""
    real = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
    return [
        Bad(value, must and not (shape_of(value) == good.shape and not value.is_meta and value.dtype in real))
        for value, must in _clips(good)
        if not (isinstance(value, Tensor) and value.is_sparse)
    ]


def shape_of(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _maps(good: Any) -> list[Bad]:
    """Attributions or scores, of torch or numpy."""
    maps = good if isinstance(good, Tensor) else torch.ones(1, 2, 3, 2)
    # Without its batch axis, a clip of one frame may be a batch of maps. An array is accepted like a tensor.
    soft = [Bad(b.value, b.must_fail and getattr(b.value, "ndim", 0) != 4) for b in _clips(maps)]
    return [bad for bad in soft if not isinstance(bad.value, np.ndarray)] + [
        Bad(maps.detach()[..., :-1]),
        Bad(torch.cat([maps.detach()] * 2, -1)),
        Bad(torch.cat([maps.detach()] * 3, 0)),
        Bad(maps.detach().double().numpy() * NAN),
        Bad(np.array([object()])),
        Bad(np.array("2020-01-01", "datetime64")),
    ]


def _tables(good: Any) -> list[Bad]:
    """Scores of methods, or boxes: nan means missing, infinity is a score, and integers are accepted."""
    return [bad for bad in _maps(good) if not re.search("float|int", str(getattr(bad.value, "dtype", "")))]


def _truths(good: Any) -> list[Bad]:
    truth = good if isinstance(good, Tensor) else torch.ones(1, 2, 3, 2) > 0
    bad = [truth.float(), truth.long(), truth[0], truth[None], truth[..., :0], truth.to("meta"), truth.tolist()]
    return [*map(Bad, [*bad, truth.to(torch.complex64), truth.float() * NAN, truth.double().numpy(), "truth", 1])]


def _targets(good: Any) -> list[Bad]:
    bad = [
        *(3, 99, -1, -4, 2**70, 0.5, NAN, "cat", "", [], (), [0] * 7, [99], ["cat"], [None], [0.5], (0, 0), (0, 1, 2)),
        *([(0, 0)], [(0,)] * 7, torch.tensor([]), torch.tensor([0] * 7), torch.tensor([-1]), torch.tensor(99)),
        *(torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[99]]), torch.tensor(0, device="meta"), ("cat",)),
        *(torch.tensor(1j), [[0]], (-1,), [(-1,)], ({},), [99, 99], torch.tensor([99, 99]), (0.5,), np.array(0.5)),
    ]
    return [*map(Bad, bad), Bad(True, False), Bad(np.int64(1), False), Bad(torch.tensor(True), False)]


def _baselines(good: Any) -> list[Bad]:
    bad = [
        *(NAN, INF, 10**400, 1e300 * 1e10, "blur", "", [0.0], (0, 0), (), torch.tensor([]), torch.ones(2, 9, 2)),
        *(torch.tensor(NAN), torch.ones(1, 1, 1, 1, 1, device="meta"), torch.ones(1, 1, 1, 1, 1) * NAN),
        *(torch.ones(1, 1, 1, 1, 1, dtype=torch.complex64), torch.ones(1, 1, 1, 1, 1, 1), torch.ones(9, 9, 9, 9, 9)),
        *(torch.ones(1, 1, 1, 1, 1).numpy(), lambda clip: clip, (None, None), torch.ones(1, 1, 1, 1, 1).to_sparse()),
    ]
    return [*map(Bad, bad), Bad(torch.ones(1, 1, 1, 1, 1).long(), False), Bad(np.float32(1), False)]


def _masks(good: Any) -> list[Bad]:
    mask = good if isinstance(good, Tensor) else torch.zeros(1, 1, 1, 1, 1).long()
    bad = [
        *(
            mask.float(),
            mask.float() * NAN,
            mask.to(torch.complex64),
            mask * 2 + 2,
            mask.long() - 1,
            mask.long() + 2**62,
        ),
        *(mask.to("meta"), mask.tolist(), mask.numpy(), "grid", 3, (mask, mask), [mask], (), torch.empty(0).long()),
        *(mask[None], torch.zeros(9, 9, 9, 9, 9).long(), torch.tensor([0, 2]), torch.tensor(-1), mask.to_sparse()),
    ]
    return [*map(Bad, bad), Bad(torch.tensor(0), False), Bad(torch.tensor(False), False)]


def _triples(good: Any) -> list[Bad]:
    bad = [
        *((0, 1, 1), (1, -1, 1), (1, 1), (1, 1, 1, 1, 1), (1.5, 1, 1), (NAN, 1, 1), (INF, 1, 1), ("1", "1", "1")),
        *((None, 1, 1), (1j, 1, 1), ([1], 1, 1), 0, -1, NAN, "", "111", (), [], {}, torch.ones(2), np.zeros(3)),
        *(torch.tensor([0, 1, 1]), (2**70, 1, 1), (0, 0, 0), [(1, 1, 1), (1, 1, 1)], (Opaque(), 1, 1)),
    ]
    soft = [(True, 1, 1), [1, 1, 1], np.ones(3, int), torch.tensor([1, 1, 1]), (1, 1, 1, 1), (10**9, 10**9, 10**9), 1]
    return [*map(Bad, bad), *(Bad(value, False) for value in soft)]


def _generators(_: Any) -> list[Bad]:
    return [*map(Bad, [3, 0, -1, NAN, "seed", torch.Generator, np.random.default_rng(0), torch.tensor(1)])]


def _frames(good: Any) -> list[Bad]:
    frames = np.asarray(good) if good is not None else np.zeros((2, 4, 6, 3), np.uint8)
    bad = [
        *(frames[0], frames[None], frames[..., :2], frames[:0], frames.astype(float), frames.astype(np.int64)),
        *(frames > 0, frames.astype(np.complex64), torch.from_numpy(frames.copy()).float(), frames.tolist(), "frames"),
        *(torch.from_numpy(frames.copy()).to("meta"), frames.astype(object), 5, ()),
    ]
    return [*map(Bad, bad), Bad(np.zeros((0,), np.uint8)), Bad(torch.empty(0))]


def _models(_: Any) -> list[Bad]:
    return [*map(Bad, ["tiny-videomae", 3, NAN, torch.ones(2), nn.Module, [nn.Flatten()]])]


def _sequences(_: Any) -> list[Bad]:
    """Increasing fractions, areas and similar values."""
    soft = [(0.5, 0.1), (0.1, 0.1), torch.tensor([0.5, 0.1])]  # invalid if they must increase
    bad = [(), [], (NAN, 0.5), (0.0, 0.5), (0.5, 1.5), ("a", "b"), (None,), "ab", 3, -1.0, NAN]
    return [
        *(Bad(value, False) for value in soft),
        *map(Bad, [*bad, (0.1, 1j), np.array([NAN, 0.2]), (INF, 0.5), [[0.1, 0.5]]]),
    ]


def _sizes(_: Any) -> list[Bad]:
    """Integers out of range, for arguments that do not check other types."""
    return [*map(Bad, [0, -1, -(2**70)])]


def _percents(_: Any) -> list[Bad]:
    return [*map(Bad, [NAN, INF, -1, 101, "2", [], [2], torch.tensor([1, 2])]), Bad(True, False), Bad(100, False)]


def _prompts(good: Any) -> list[Bad]:
    """Prompts of a video language model: without a video, with two, or of another type."""
    return [*map(Bad, ["", "which?", good + good, 3, NAN, [], [0.5], [[1, 2]], ["a"], torch.ones(3), torch.tensor(1)])]


def _answers(_: Any) -> list[Bad]:
    bad = ["", [], [0.5], [10**9], [-1], ["a"], [None], [[1]], 3, NAN, torch.ones(2), torch.tensor(1), torch.tensor([])]
    return [*map(Bad, bad)]


def _counterfactuals(good: Any) -> list[Bad]:
    clips = [bad for bad in _clips(good) if not isinstance(bad.value, (nn.Module, list, tuple))]
    return [*clips, *map(Bad, [[], (), [3], [good], [good, good], lambda clip, layout: clip[..., 1:], lambda *_: 3])]
