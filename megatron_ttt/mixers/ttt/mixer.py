"""TTT layers as mixers: their checks, parameters, costs and module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron_ttt.errors import check_at_least, check_choice
from megatron_ttt.mixers.base import (
    Dimensions,
    HFModel,
    Microbatch,
    Mixer,
    Parameter,
    check_even_head_dim,
)
from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.mixers.ttt import cost
from megatron_ttt.mixers.ttt.hf_config import HF_DEFAULTS, options_of_hf_model, to_hf_model
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.options import TTTOptions
from megatron_ttt.mixers.ttt.parameters import ttt_parameters

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class TTT(Mixer):
    """A layer whose hidden state is an inner model (arXiv 2407.04620)."""

    hf_norms = ("seq_norm", "ffn_norm")
    hf_module = "seq_modeling_block"
    hf_defaults = HF_DEFAULTS
    has_inner_loop = True
    Options = TTTOptions

    def __init__(
        self,
        name: str,
        label: str,
        inner_model: InnerModel,
        hf_code: HFCode,
        *,
        warms_inner_lr: bool = False,
    ):
        self.name, self.label, self.inner_model = name, label, inner_model
        self.warms_inner_lr = warms_inner_lr
        self.hf_code = hf_code

    def validate(self, dims: Dimensions, options: TTTOptions) -> None:
        """Raise UserError for options out of range."""
        at = f"mixers.{self.name}."
        check_at_least(f"{at}mini_batch_size", options.mini_batch_size, 1)
        check_at_least(f"{at}base_lr", options.base_lr, 0)
        check_at_least(f"{at}conv_kernel", options.conv_kernel, 2)
        check_at_least(f"{at}rope_theta", options.rope_theta, 1e-12)
        check_even_head_dim(dims)

    def unsupported_reason(self, dims, options, *, backend, dtype, device) -> str | None:
        """Return why a backend cannot run the scan, None if it can."""
        from megatron_ttt.mixers.ttt.scan import ScanProblem, unsupported_reason

        state_dtype = torch.promote_types(dtype, torch.float32)
        size = options.mini_batch_size
        problem = ScanProblem(self.inner_model, dims.head_dim, size, dtype, state_dtype, device)
        return unsupported_reason(backend, problem)

    def options_of_former_keys(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return the options for `backbone`, `ttt_base_lr` and others of the model section."""
        names = {
            "mini_batch_size": "mini_batch_size",
            "ttt_base_lr": "base_lr",
            "conv_kernel": "conv_kernel",
            "rope_theta": "rope_theta",
        }
        options = {new: model[old] for old, new in names.items() if old in model}
        if "backbone" in model:
            check_choice("model.backbone", model["backbone"], ("mamba", "transformer"))
            is_mamba = model["backbone"] == "mamba"
            options |= {"use_gate": is_mamba, "share_qk": is_mamba, "pre_conv": is_mamba}
        return options

    def hf_sublayers(self, options: TTTOptions) -> list[tuple[str, str]]:
        """Return the norm after the scan."""
        return [("seq_modeling_block.post_norm", "self_attention.post_norm")]

    def hf_model(self, dims: Dimensions, options: TTTOptions) -> HFModel:
        """Return the official form."""
        return to_hf_model(self.inner_model, options)

    def options_of_hf_model(self, config: dict[str, Any]) -> TTTOptions | None:
        """Return the options of an official config.json."""
        return options_of_hf_model(self.inner_model, config)

    def pre_conv_width(self, options: TTTOptions) -> int | None:
        """Return the width of the pre-conv, None where the block has none."""
        return options.conv_kernel if options.pre_conv else None

    def parameters(self, dims: Dimensions, options: TTTOptions) -> list[Parameter]:
        """Return the table of the mixer's parameters."""
        return ttt_parameters(self.inner_model, dims, options)

    def flops_per_token(self, dims: Dimensions, options: TTTOptions, seq_length: int) -> float:
        """Return the FLOPs of a token's forward pass."""
        return cost.flops_per_token(self.inner_model, dims, options)

    def saved_bytes(self, options: TTTOptions, batch: Microbatch) -> list[float]:
        """Return the bytes of each tensor saved, but for the scan's."""
        return cost.saved_bytes(options, batch)

    def saved_state_bytes(self, options: TTTOptions, batch: Microbatch) -> float:
        """Return the bytes that the scan saves."""
        return cost.saved_state_bytes(self.inner_model, options, batch)

    def sent_bytes(self, options: TTTOptions, batch: Microbatch) -> float:
        """Return the bytes that tensor parallelism gathers and reduces."""
        return cost.sent_bytes(batch)

    def spec(self, options: TTTOptions, backend: str = "auto") -> ModuleSpec:
        """Return the spec of the mixer; backend: see `ttt_scan`."""
        from megatron_ttt.mixers.module import mixer_spec
        from megatron_ttt.mixers.ttt.layer import TTTMixer

        return mixer_spec(TTTMixer, self, options, backend)
