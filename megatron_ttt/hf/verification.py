"""Two models that must be one: a checkpoint's in megatron-core, an official one in transformers.

Both run with one layer in memory at a time: each layer's weights are read when its turn comes and
dropped after it, so a model of any size is compared, logits and greedy tokens, in the memory of its
embedding and one layer. Compared are the weights, bit for bit; then, on random token ids, every
sublayer's output, so that the first that differs is named; the logits; and the greedy tokens that
transformers' generate() takes with its cache, against the full forward pass of megatron-core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_ttt.errors import UserError
from megatron_ttt.hf.building import build_empty_hf_model, build_on_cpu, tie_head
from megatron_ttt.hf.configuration import is_llama
from megatron_ttt.hf.mapping import join
from megatron_ttt.layers.norm import PostNorm
from megatron_ttt.stack import EMBEDDING, HEAD, Architecture, Layer

Read = Callable[[str], Tensor]

PROMPT, NEW_TOKENS = (2, 37), 4
"""Rows and columns of the random prompt (no whole mini-batches), and tokens taken after it."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest norm of a difference, relative to the output's norm."""
LLAMA_TOLERANCE = 1e-4
"""The same for transformers' Llama, whose norms and angles are float32 in float64 models too."""


def verify(
    architecture: Architecture,
    read_ours: Read,
    read_hf: Read,
    cast: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Raise UserError, naming the first module that differs, unless both sides are one model.

    read_ours: global tensors of the checkpoint by our names. read_hf: official tensors by
    theirs. cast: what a checkpoint's tensor became on the way out, where a dtype was asked for.
    """
    cast = cast or (lambda tensor: tensor)
    dtypes = set()
    for row in architecture.parameters().values():
        ours, theirs = cast(read_ours(row.name)), join(row, read_hf)
        if not _same_bits(ours, theirs):
            for part in row.hf_names:
                _differs(part.rsplit(".", 1)[0], f"the weights of {part}")
        dtypes.add(ours.dtype)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    _verify_outputs(architecture, lambda name: cast(read_ours(name)), read_hf, dtype)


def verify_configuration(architecture: Architecture, folder: Path) -> None:
    """Raise UserError unless transformers loads what an export has beside its weights."""
    from transformers import GenerationConfig, LlamaConfig

    from megatron_ttt.hf.code import configuration_class

    own = LlamaConfig if is_llama(architecture) else configuration_class(architecture)
    for kind in (own, GenerationConfig):
        try:
            kind.from_pretrained(folder)
        except Exception as error:  # transformers lets out whatever its checks run into
            raise UserError(
                f"verification failed: transformers cannot load the export's {kind.__name__}: "
                f"{' '.join(str(error).split())}; nothing was published"
            ) from None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _differs(module: str, what: str) -> None:
    raise UserError(
        f"verification failed: {what} are not the same in both models; the first module that "
        f"differs is {module}; nothing was published"
    )


@torch.no_grad()
def _verify_outputs(architecture: Architecture, read_ours: Read, read_hf: Read, dtype) -> None:
    tolerance = LLAMA_TOLERANCE if is_llama(architecture) else TOLERANCE[dtype]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, architecture.model.vocab_size, PROMPT, generator=random)
    theirs = StreamedHF(architecture, read_hf, dtype)
    tokens = theirs.generate(ids, NEW_TOKENS)
    their_logits, their_outputs = theirs.run(tokens)
    del theirs
    our_logits, our_outputs = StreamedMegatron(architecture, read_ours, dtype).run(tokens)
    for name, output in our_outputs.items():
        if (error := _relative(their_outputs[name], output)) > tolerance:
            _differs(name, f"its outputs (relative difference {error:.1e})")
    if (error := _relative(their_logits, our_logits)) > tolerance:
        _differs("lm_head", f"the logits (relative difference {error:.1e})")
    # The tokens that were taken must be the best by our logits too, ties within rounding aside.
    best = our_logits[:, PROMPT[1] - 1 : -1]
    taken = best.gather(-1, tokens[:, PROMPT[1] :, None]).squeeze(-1)
    slack = tolerance * best.norm(dim=-1)
    if not (taken >= best.amax(-1) - slack).all():
        _differs("lm_head", "greedy tokens")


def _relative(a: Tensor, b: Tensor) -> float:
    if not torch.isfinite(a).all() or a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


class StreamedHF:
    """transformers' model of an official checkpoint, its layers read when they are run."""

    def __init__(self, architecture: Architecture, read: Read, dtype: torch.dtype):
        self.read, self.dtype = read, dtype
        self.network = build_empty_hf_model(architecture).to(dtype)
        self.layers: nn.ModuleList = self.network.model.layers
        self._load(self.network.get_input_embeddings(), f"model.{architecture.hf_embedding}.")
        self._load(self.network.model.norm, "model.norm.")
        if not architecture.model.tie_word_embeddings:
            self._load(self.network.lm_head, "lm_head.")
        tie_head(self.network, architecture)
        self.outputs: dict[str, Tensor] = {}
        for number, (layer, kind) in enumerate(zip(self.layers, architecture.layers)):
            prefix = f"model.layers.{number}."
            layer.register_forward_pre_hook(lambda layer, _, p=prefix: self._load(layer, p))
            layer.register_forward_hook(lambda layer, *_: layer.to("meta") and None)
            for name, _ in _sublayers(kind):
                layer.get_submodule(name).register_forward_hook(self._record(prefix + name))

    def _record(self, name: str):
        def hook(module, arguments, output):
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {k: self.read(prefix + k).to(self.dtype) for k in module.state_dict()}
        module.load_state_dict(state, assign=True)

    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The prompt and the greedy tokens after it, taken with the cache."""
        return self.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    def run(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, L, V] without a cache, and every sublayer's output [B, L, D] by its name."""
        self.outputs = {}
        return self.network(ids, use_cache=False).logits, self.outputs


class StreamedMegatron:
    """A checkpoint's model in megatron-core, on the CPU: one layer of each kind, run as every such
    layer in turn."""

    def __init__(self, architecture: Architecture, read: Read, dtype: torch.dtype):
        self.read, self.dtype = read, dtype
        kinds = architecture.kinds
        small = dataclasses.replace(architecture.model, num_layers=len(kinds), pattern=list(kinds))
        chunk = build_on_cpu(Architecture(small, architecture.mixers), dtype).eval()
        layers = dict(zip(kinds, chunk.decoder.layers))
        chunk.decoder.layers = nn.ModuleList([layers[kind] for kind in architecture.layer_kinds])
        chunk.embedding.word_embeddings.weight.data = read(EMBEDDING).to(dtype)
        if not architecture.model.tie_word_embeddings:
            chunk.output_layer.weight.data = read(HEAD).to(dtype)
        final = "decoder.final_layernorm.weight"
        chunk.decoder.final_layernorm.weight.data = read(final).to(dtype)
        self.chunk, self.number, self.outputs = chunk, 0, {}
        for kind, layer in layers.items():
            layer.register_forward_pre_hook(self._load)
            layer.register_forward_hook(self._next)
            for theirs, ours in _sublayers(kinds[kind]):
                layer.get_submodule(ours).register_forward_hook(self._record(theirs))

    def _load(self, layer: nn.Module, *_) -> None:
        for tail, parameter in layer.named_parameters():
            parameter.data = self.read(f"decoder.layers.{self.number}.{tail}").to(self.dtype)

    def _next(self, *_) -> None:
        self.number += 1

    def _record(self, name: str):
        def hook(module, arguments, output):
            if isinstance(module, PostNorm):  # theirs has no gate
                output = module.forward(arguments[0])
            output = output[0] if isinstance(output, tuple) else output
            # Cloned: megatron-core adds the residual in place.
            self.outputs[f"model.layers.{self.number}.{name}"] = output.transpose(0, 1).clone()

        return hook

    def run(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `StreamedHF.run`; the names are transformers'."""
        self.number, self.outputs = 0, {}
        return self.chunk(ids, None, None), self.outputs


def _sublayers(layer: Layer) -> list[tuple[str, str]]:
    """Return the modules whose outputs are compared, in the order they run: transformers' names
    within a layer, and ours."""
    mixer = layer.mixer
    return [
        *([("conv", "pre_conv")] if layer.pre_conv_width else []),
        (mixer.hf_norms[0], "input_layernorm"),
        *mixer.hf_sublayers(layer.options),
        (mixer.hf_module, "self_attention"),
        (mixer.hf_norms[1], "pre_mlp_layernorm"),
        ("mlp", "mlp"),
    ]
