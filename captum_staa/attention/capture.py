"""Read attention while a forward runs, where it is computed, and leave nothing behind.

Example:
    >>> import torch
    >>> from captum_staa import VideoClassifier
    >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    >>> sites = clf.family.attention(clf.module)
    >>> with torch.no_grad(), capture(clf.module, sites[-1:], lambda call: call.column_means()) as read:
    ...     logits = clf(torch.zeros(1, 16, 3, 48, 48))
    >>> read[sites[-1]].shape  # one attention weight per token
    torch.Size([1, 288])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn

from captum_staa._utils.model_state import without_compiling
from captum_staa.attention.backends import BACKENDS, CallMode
from captum_staa.attention.capture_state import ACTIVE, AttentionCall, CaptureState, StopForward
from captum_staa.models.families import AttentionLayer

__all__ = ["AttentionCall", "capture"]

T = TypeVar("T")


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[AttentionLayer],
    read: Callable[[AttentionCall], T],
    *,
    stop: bool = False,
) -> Iterator[dict[AttentionLayer, T]]:
    """While the block runs, every forward's attention at ``sites`` is handed to ``read``.

    Other threads that run the same model meanwhile, and captures inside this one, do not mix with it; afterwards,
    and after an exception, the model is what it was.

    Args:
        model: the model that the sites are declared for; the block calls its forward once, itself or through a wrapper.
        sites: where to read, in the order in which the model reaches them.
        read: called with each :class:`AttentionCall`; what it returns is kept.
        stop: end the forward as soon as the last site has been read. The block's own code after the call is not
            run then: nothing in it should be needed.

    Yields:
        What was read, by site; complete when the block ends.

    Raises:
        ValueError: a site's module is not there, or the forward ended without computing attention at a site.
    """
    if not sites:
        raise ValueError("no attention site to read: pass at least one AttentionLayer")
    session = CaptureState(read, sites[-1] if stop else None)
    with ExitStack() as stack:
        for site in sites:
            module = _submodule(model, site.module)
            session.sites[module] = site
            stack.enter_context(BACKENDS[site.backend](module, site, session))
        token = ACTIVE.set(session)
        stack.callback(ACTIVE.reset, token)
        if any(site.backend == "sdpa" for site in sites):
            stack.enter_context(CallMode(session))
        stack.enter_context(without_compiling())
        try:
            yield session.readings
        except StopForward as enough:
            if enough.session is not session:
                raise
            enough.__traceback__ = None  # its frames hold the activations of the forward that it ended
    missing = [site.module for site in sites if site not in session.readings]
    if missing:
        raise ValueError(
            f"the forward computed no attention at {missing}; a site with backend='sdpa' must call "
            f"F.scaled_dot_product_attention or be an nn.MultiheadAttention, and the model must run in this thread"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; name one of model.named_modules() in AttentionLayer"
        ) from None
