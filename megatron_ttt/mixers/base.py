"""The interface of a mixer: its options, the table of its parameters, its costs and module."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_ttt.errors import UserError
from megatron_ttt.layers.initialisers import Initialiser
from megatron_ttt.mixers.hf_code import HFCode

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the block that a mixer stands in."""

    hidden_size: int
    num_heads: int
    init_std: float
    """Standard deviation of initial weights."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Parameter:
    """A row of the table from which a parameter is built, filled, cut, counted, exported and
    imported."""

    name: str
    """Its name within the module that the table is of, such as `conv_q.weight`."""
    shape: tuple[int, ...]
    """Of the global tensor, which one process without parallelism holds."""
    initialiser: Initialiser
    hf_names: tuple[str, ...]
    """Hugging Face's tensors, by their names within the layer; several where they are packed."""
    shard_dim: int | None = None
    """The dimension that tensor parallelism cuts; None for a replicated parameter."""
    fp32: bool = False
    """Whether it stays in float32 in a bf16 model."""
    groups: int = 1
    """Into how many groups its rows are cut; each group has its part of every packed tensor."""
    ratios: tuple[int, ...] | None = None
    """How a group's rows are shared among the packed tensors; None: equally."""

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def _part_rows(self) -> list[int]:
        """Rows of each packed tensor in one group."""
        ratios = self.ratios or (1,) * len(self.hf_names)
        unit = self.shape[0] // (self.groups * sum(ratios))
        return [unit * ratio for ratio in ratios]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return Hugging Face's tensors, in the order of their names."""
        grouped = tensor.unflatten(0, (self.groups, -1))
        return [part.flatten(0, 1) for part in grouped.split(self._part_rows, dim=1)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the parameter that Hugging Face's tensors make."""
        if len(tensors) == 1:
            return tensors[0]
        grouped = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of Hugging Face's tensors by their names within the layer."""
        shapes = [(self.groups * rows, *self.shape[1:]) for rows in self._part_rows]
        return dict(zip(self.hf_names, shapes))

    def has_layout_of(self, other: Parameter) -> bool:
        """Whether a stored tensor of the other parameter can be read as this one."""
        return dataclasses.replace(self, initialiser=other.initialiser) == other


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass of one rank sees, for estimates of its cost."""

    sequences: int
    seq_length: int
    dims: Dimensions
    width: int
    """Bytes of an activation: 2 in bf16, else 4."""
    tp: int
    """Tensor-parallel ranks."""
    sequence_parallel: bool
    on_cpu: bool
    backend: str
    """The mixer's, as it is configured."""

    @property
    def tokens(self) -> int:
        """Of all its sequences."""
        return self.sequences * self.seq_length

    @property
    def whole(self) -> int:
        """Numbers of a hidden state that a rank has whole."""
        return self.tokens * self.dims.hidden_size

    @property
    def rows(self) -> float:
        """Numbers of a hidden state that sequence parallelism cuts."""
        return self.whole / (self.tp if self.sequence_parallel else 1)

    @property
    def columns(self) -> float:
        """Numbers of a hidden state that tensor parallelism cuts."""
        return self.whole / self.tp

    def saved_by_norm(self) -> list[float]:
        """Bytes of what a norm saves: its input in float32, and what its weight multiplies."""
        return [4 * self.rows, self.width * self.rows]


@dataclass(frozen=True)
class HFModel:
    """How a model of one mixer's layers alone is known to Hugging Face."""

    model_type: str
    keys: dict[str, Any]
    """Its keys in config.json beside the sizes that all models have."""
    embedding: str = "embed_tokens"
    """The name of its embedding."""
    size_keys: Mapping[str, str] = field(default_factory=dict)
    """Its own keys for sizes, by the keys that other models have for them."""
    configuration: HFCode | None = None
    """The subclass of `TTTConfig` that reads its config.json; None for `TTTConfig` itself."""


class Mixer(ABC):
    """A kind of mixer. One object of each is registered under its name (docs/mixers.md)."""

    name: ClassVar[str]
    """Its name in `model.pattern`, and of its options in `mixers`."""
    label: ClassVar[str]
    """For people: TTT-Linear."""
    Options: ClassVar[type]
    """Its options: a dataclass whose fields are documented by the strings under them."""
    hf_norms: ClassVar[tuple[str, str]]
    """Hugging Face's names of the norm before the mixer and of the one before the SwiGLU."""
    hf_module: ClassVar[str]
    """Hugging Face's name of the mixer within its layer."""
    hf_code: HFCode
    """The class that stands in the place of its module in transformers."""
    hf_defaults: ClassVar[dict[str, Any]] = {}
    """What keys of `hf_model`'s form are where config.json leaves them out."""
    has_inner_loop: ClassVar[bool] = False
    """Whether its module is an `InnerLoop`."""
    warms_inner_lr: ClassVar[bool] = False
    """Whether the recipe warms its inner learning rate up."""

    def validate(self, dims: Dimensions, options: Any) -> None:
        """Raise UserError for options that cannot work at any layout."""
        return None

    def check_tensor_parallel(self, dims: Dimensions, options: Any, tp: int) -> None:
        """Raise UserError if this many tensor-parallel ranks cannot share the mixer's layers; they
        can share its heads and the SwiGLU."""
        return None

    def unsupported_reason(
        self,
        dims: Dimensions,
        options: Any,
        *,
        backend: str,
        dtype: torch.dtype,
        device: str,
    ) -> str | None:
        """Return why a backend (`training.scan_backend`) cannot run, None if it can.

        dtype: of activations. device: a device type, such as "cuda".
        """
        return None

    @abstractmethod
    def parameters(self, dims: Dimensions, options: Any) -> list[Parameter]:
        """Return the table of the mixer's parameters, in the order they are exported."""

    @abstractmethod
    def spec(self, options: Any, backend: str = "auto") -> ModuleSpec:
        """Return the spec of the module that stands in the place of self-attention.

        backend: which implementation runs, for mixers that have several.
        """

    @abstractmethod
    def flops_per_token(self, dims: Dimensions, options: Any, seq_length: int) -> float:
        """Return the FLOPs of a token's forward pass, projections included (docs/mathematics.md,
        cost)."""

    @abstractmethod
    def saved_bytes(self, options: Any, batch: Microbatch) -> list[float]:
        """Return the bytes of each tensor that a layer's mixer, and its pre-conv, save for their
        backward pass, but for the states."""

    def saved_state_bytes(self, options: Any, batch: Microbatch) -> float:
        """Return the bytes of states, and of what comes with them, that a layer's mixer saves."""
        return 0.0

    @abstractmethod
    def sent_bytes(self, options: Any, batch: Microbatch) -> float:
        """Return the bytes that tensor parallelism gathers and reduces for a layer's mixer, forward
        and backward; an all-reduce counts twice, and the share (tp - 1) / tp is left out."""

    def pre_conv_width(self, options: Any) -> int | None:
        """Return the width of the convolution that the block has before the mixer, None for none.

        A block that has one computes h += conv(RMSNorm(h)) first.
        """
        return None

    def transformer_config_fields(self, dims: Dimensions, options: Any) -> dict[str, Any]:
        """Return fields of megatron-core's TransformerConfig that the module reads."""
        return {}

    def rotary_base(self, options: Any) -> float | None:
        """Return the base of megatron-core's own rotary embedding, None if it takes none."""
        return None

    def options_of_former_keys(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return the options that keys of the model section stood for before `mixers` was there."""
        return {}

    def hf_sublayers(self, options: Any) -> list[tuple[str, str]]:
        """Return further modules whose outputs are compared when a model is converted, by Hugging
        Face's name within a layer and by ours, in the order they run."""
        return []

    def hf_model(self, dims: Dimensions, options: Any) -> HFModel | None:
        """Return the form of a model all of whose layers have these options, None if it has only
        the form that every pattern has (docs/huggingface.md)."""
        return None

    def options_of_hf_model(self, config: dict[str, Any]) -> Any | None:
        """Return the options that a config.json of that form means, None if it is another model's.

        Raises UserError for keys that have no counterpart.
        """
        return None

    def sizes_of_hf_model(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config.json of that form with the sizes under the keys that other forms have."""
        return config


def check_even_head_dim(dims: Dimensions) -> None:
    """Raise UserError for heads that a rotary embedding cannot rotate."""
    if dims.head_dim % 2:
        raise UserError(
            f"head_dim {dims.head_dim} (hidden_size / num_heads) is odd; RoPE rotates pairs: "
            "change model.num_heads"
        )
