"""LaCT as a mixer: its checks, parameters, costs and module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ttt.errors import UserError, check_at_least
from megatron_ttt.mixers.base import (
    Dimensions,
    HFModel,
    Microbatch,
    Mixer,
    Parameter,
    check_even_head_dim,
)
from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.mixers.lact import cost
from megatron_ttt.mixers.lact.hf_config import (
    HF_DEFAULTS,
    options_of_hf_model,
    sizes_of_hf_model,
    to_hf_model,
)
from megatron_ttt.mixers.lact.options import LaCTOptions
from megatron_ttt.mixers.lact.parameters import lact_parameters

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class LaCT(Mixer):
    """Large-chunk test-time training (arXiv 2505.23884): fast weights that learn a chunk at a time,
    with attention within a window beside them."""

    name = "lact"
    label = "LaCT"
    hf_norms = ("attn_norm", "mlp_norm")
    hf_module = "attn"
    hf_code = HFCode(Path(__file__).parent / "mixer_lact.py", "LaCT")
    hf_defaults = HF_DEFAULTS
    Options = LaCTOptions

    def validate(self, dims: Dimensions, options: LaCTOptions) -> None:
        """Raise UserError for options out of range."""
        at = f"mixers.{self.name}."
        for option in ("fast_heads", "hidden_multiple", "chunk_size", "window"):
            check_at_least(f"{at}{option}", getattr(options, option), 1)
        if options.low_rank is not None:
            check_at_least(f"{at}low_rank", options.low_rank, 1)
        check_at_least(f"{at}low_rank_gain", options.low_rank_gain, 0)
        check_at_least(f"{at}rope_theta", options.rope_theta, 1e-12)
        check_even_head_dim(dims)
        if dims.num_heads % options.fast_heads:
            raise UserError(
                f"model.num_heads={dims.num_heads} is not divisible by "
                f"{at}fast_heads={options.fast_heads}"
            )

    def check_tensor_parallel(self, dims: Dimensions, options: LaCTOptions, tp: int) -> None:
        """Raise UserError if the fast heads do not divide over the ranks."""
        if options.fast_heads % tp:
            raise UserError(
                f"mixers.{self.name}.fast_heads={options.fast_heads} is not divisible by "
                f"parallel.tensor_model_parallel_size={tp}"
            )

    def unsupported_reason(self, dims, options, *, backend, dtype, device) -> str | None:
        """Return why a backend cannot run: the scan has a reference and a form in PyTorch."""
        if backend in ("auto", "naive", "torch"):
            return None
        return "LaCT has no such form of its scan, and its products need none"

    def parameters(self, dims: Dimensions, options: LaCTOptions) -> list[Parameter]:
        """Return the table of the mixer's parameters."""
        return lact_parameters(dims, options)

    def spec(self, options: LaCTOptions, backend: str = "auto") -> ModuleSpec:
        """Return the spec of the mixer; backend: "naive" for the reference's scan."""
        from megatron_ttt.mixers.lact.layer import LaCTMixer
        from megatron_ttt.mixers.module import mixer_spec

        return mixer_spec(LaCTMixer, self, options, backend)

    def flops_per_token(self, dims: Dimensions, options: LaCTOptions, seq_length: int) -> float:
        """Return the FLOPs of a token's forward pass."""
        return cost.flops_per_token(dims, options, seq_length)

    def saved_bytes(self, options: LaCTOptions, batch: Microbatch) -> list[float]:
        """Return the bytes of each tensor saved, but for the scan's states."""
        return cost.saved_bytes(options, batch)

    def saved_state_bytes(self, options: LaCTOptions, batch: Microbatch) -> float:
        """Return the bytes that the scan saves, and those of a chunk that is computed again."""
        return cost.saved_state_bytes(options, batch)

    def sent_bytes(self, options: LaCTOptions, batch: Microbatch) -> float:
        """Return the bytes that tensor parallelism gathers and reduces."""
        return cost.sent_bytes(options, batch)

    def hf_model(self, dims: Dimensions, options: LaCTOptions) -> HFModel:
        """Return the official form."""
        return to_hf_model(options)

    def options_of_hf_model(self, config: dict[str, Any]) -> LaCTOptions | None:
        """Return the options of an official config.json."""
        return options_of_hf_model(config)

    def sizes_of_hf_model(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return an official config.json's sizes by the keys that other forms have for them."""
        return sizes_of_hf_model(config)
