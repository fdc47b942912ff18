"""Models that draw random numbers in eval mode are reported, with the module that draws them."""

from __future__ import annotations

import warnings
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from captum_staa import GradCAM, VideoOcclusion, metrics
from captum_staa.models import model_state


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def network(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(3, 4, 1), middle, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))


CLIP = torch.rand(1, 3, 4, 8, 8)
MAP = torch.rand(1, 3, 4, 8, 8)


CALLS = {
    "occlusion": lambda net: VideoOcclusion(net, "BCTHW").attribute(CLIP, (4, 4, 4), strides=(4, 4, 4), target=1),
    "grad_cam": lambda net: GradCAM(net, net[0], layout="BCTHW").attribute(CLIP, target=1),
    "insertion": lambda net: metrics.insertion(net, CLIP, MAP, target=1, layout="BCTHW", steps=2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_draws_random_numbers_in_eval_mode_is_reported_with_its_module(call: str) -> None:
    with pytest.warns(UserWarning, match=r"random numbers in eval mode in module '1' \(AlwaysDropout\)"):
        CALLS[call](network(AlwaysDropout()).eval())


def test_random_numbers_of_the_forward_function_itself_are_reported() -> None:
    net = network(nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="in the forward function, by torch.rand"):
        VideoOcclusion(lambda x: net(x) + torch.rand(1), "BCTHW").attribute(
            CLIP, (4, 4, 4), strides=(4, 4, 4), target=1
        )


@pytest.mark.parametrize("case", ["dropout left in train mode", "as_is", "random numbers of another thread"])
def test_nothing_is_reported_where_the_model_draws_none_or_is_meant_to(case: str) -> None:
    net = network(nn.Dropout() if case == "dropout left in train mode" else AlwaysDropout()).train()
    forward = net
    if case == "random numbers of another thread":  # the global state changes, but not by the model
        quiet = network(nn.ReLU()).eval()
        forward = _Elsewhere(quiet)  # type: ignore[assignment]
    with warnings.catch_warnings(), model_state("as_is" if case == "as_is" else "eval"):
        warnings.simplefilter("error")
        VideoOcclusion(forward, "BCTHW").attribute(CLIP, (4, 4, 4), strides=(4, 4, 4), target=1)


class _Elsewhere(nn.Module):
    """Calls a network while another thread draws from the global generator."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        thread = Thread(target=torch.rand, args=(1,))
        thread.start()
        thread.join()
        return self.net(x)  # type: ignore[no-any-return]
