"""Numbers that go wrong: where the first of them is, spikes, replicas that differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor, nn

from megatron_ttt.model import global_parameters


class SpikeWatch:
    """Says when a figure leaves the band of its running mean and deviation."""

    def __init__(self, name: str, sigmas: float = 6.0, memory: int = 100, warm_up: int = 50):
        self.name, self.sigmas, self.memory, self.warm_up = name, sigmas, memory, warm_up
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def see(self, value: float) -> str | None:
        """Take a value in; a warning if it is a spike."""
        if not math.isfinite(value):
            return None
        deviation = math.sqrt(self.variance)
        spike = self.seen >= self.warm_up and value > self.mean + self.sigmas * deviation
        self.seen += 1
        share = 1 / min(self.seen, self.memory)
        distance = value - self.mean
        self.mean += share * distance
        self.variance = (1 - share) * (self.variance + share * distance**2)
        if spike:
            return f"{self.name}={value:.4g} is a spike: it was {self.mean:.4g} ± {deviation:.2g}"
        return None


def first_nonfinite_module(chunks: list[nn.Module], run_forward: Callable[[], object]) -> str:
    """The first place of the model where a number is not finite, in words. Collective.

    run_forward: passes the batch in question through the chunks once more, without gradients.
    """
    bad_outputs = set()

    def look(place):
        def hook(module, arguments, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(t.isfinite().all() for t in tensors if isinstance(t, Tensor)):
                bad_outputs.add(place)

        return hook

    hooks = [
        module.register_forward_hook(look(place))
        for chunk in chunks
        for place, module in _places(chunk)
    ]
    try:
        run_forward()
    finally:
        for hook in hooks:
            hook.remove()
    bad_weights, bad_gradients = set(), set()
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            place = _place_of(name)
            if not parameter.isfinite().all():
                bad_weights.add((place, name))
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not gradient.isfinite().all():
                bad_gradients.add((place, name))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (bad_weights, bad_outputs, bad_gradients))
    bad_weights, bad_outputs, bad_gradients = (set().union(*kind) for kind in zip(*everyone))
    if bad_weights:
        return f"the weights of {_in_words(*min(bad_weights))}"
    if bad_outputs:
        return f"the output of {_in_words(min(bad_outputs))}"
    if bad_gradients:
        # Gradients go wrong from the last layer to the first.
        return f"the gradient of {_in_words(*max(bad_gradients))}"
    return "the loss alone"


_EMBEDDING, _FINAL = 0, 1 << 30


def _places(chunk: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(place, module): the embedding, each layer by its number from 1, the final norm."""
    if hasattr(chunk, "embedding"):
        yield _EMBEDDING, chunk.embedding
    for layer in chunk.decoder.layers:
        yield layer.layer_number, layer
    if chunk.decoder.final_layernorm is not None:
        yield _FINAL, chunk.decoder.final_layernorm


def _place_of(name: str) -> int:
    """The place of a parameter by its global name."""
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) + 1
    return _EMBEDDING if name.startswith("embedding.") else _FINAL


def _in_words(place: int, name: str | None = None) -> str:
    words = {_EMBEDDING: "the embedding", _FINAL: "the final norm"}.get(place, f"layer {place}")
    return f"{words} ({name})" if name else words
