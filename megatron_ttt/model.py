"""A configuration and a pipeline stage in, a model chunk out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_ttt.config import Config, ModelConfig
from megatron_ttt.errors import UserError
from megatron_ttt.layers.parameters import initialise
from megatron_ttt.mixers.inner_loop import InnerLoop
from megatron_ttt.platform import Platform
from megatron_ttt.specs import block_submodules
from megatron_ttt.stack import EMBEDDING, HEAD, Architecture, architecture_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_transformer_config(
    config: Config, platform: Platform, dtype: torch.dtype | None = None
) -> TransformerConfig:
    """megatron-core's view of our configuration. dtype: over `training.precision`'s.

    Raises UserError where the scan backend asked for cannot run.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dtype = dtype or DTYPES[training.precision]
    architecture, from_mixers = architecture_of(config), {}
    for layer in architecture.kinds.values():
        reason = layer.mixer.unsupported_reason(
            architecture.dims,
            layer.options,
            backend=training.scan_backend,
            dtype=dtype,
            device=platform.device.type,
        )
        if reason is not None:
            raise UserError(
                f"training.scan_backend={training.scan_backend} cannot run here: {reason}; set "
                "training.scan_backend=auto"
            )
        for field, value in layer.mixer.transformer_config_fields(
            architecture.dims, layer.options
        ).items():
            from_mixers[field] = _agreed(architecture, field, from_mixers.get(field, value), value)
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    fields = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are filled by `initialise_weights`, the same at every layout.
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "gradient_accumulation_fusion": False,
        # Interleaved stages: batched p2p gives wrong gradients, and freeing outputs early races.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": False,
        "recompute_granularity": "full" if training.recompute else None,
        "recompute_method": "uniform" if training.recompute else None,
        "recompute_num_layers": 1 if training.recompute else None,
        "deterministic_mode": training.deterministic,
    }
    return TransformerConfig(**{**fields, **from_mixers, **platform.core_overrides})


def _agreed(architecture: Architecture, field: str, others: Any, own: Any) -> Any:
    """Return what the mixers of a model all ask of megatron-core, which has one of it."""
    if others != own:
        raise UserError(
            f"the mixers of model.pattern={architecture.model.pattern} want {field}={others} and "
            f"{own}: megatron-core has one for all layers"
        )
    return own


def _leave(weight: Tensor) -> Tensor:
    return weight


def padded_vocab_size(model: ModelConfig) -> int:
    """Entries of the embedding in memory: the least multiple of the TP size that holds them."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return -(-model.vocab_size // size) * size


class LanguageModel(GPTModel):
    """GPTModel whose loss and logits know which vocabulary entries are padding.

    is_hybrid: whether the model has layers of several kinds, here or on other ranks.
    """

    def __init__(self, config, architecture: Architecture, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.real_vocab_size = architecture.model.vocab_size
        self.is_hybrid = architecture.is_hybrid

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V / TP] -> per-token cross-entropy [B, S], float32.

        Padded entries are masked here: megatron-core's cross-entropy would count them.
        """
        entries = logits.shape[-1]
        # Entries of this rank that are real: none on a rank that lies behind the vocabulary.
        first = entries * parallel_state.get_tensor_model_parallel_rank()
        keep = max(0, self.real_vocab_size - first)
        if keep < entries:
            logits = torch.cat(
                [logits[..., :keep], torch.full_like(logits[..., keep:], -torch.inf)], dim=-1
            )
        return super().compute_language_model_loss(labels, logits)


def build_chunk(config: Config, core: TransformerConfig, vp_stage: int | None) -> LanguageModel:
    """This rank's model chunk of one virtual pipeline stage (None without interleaving).

    Its weights are not yet set: `initialise_weights`, or load a checkpoint.
    """
    model, architecture = config.model, architecture_of(config)
    stage = {} if vp_stage is None else {"vp_stage": vp_stage, "ignore_virtual": False}
    first = get_transformer_layer_offset(core, vp_stage=vp_stage)
    own = slice(first, first + get_num_layers_to_build(core, vp_stage=vp_stage))
    rotary_base = None
    for layer in architecture.kinds.values():
        if base := layer.mixer.rotary_base(layer.options):
            rotary_base = _agreed(architecture, "rotary_base", rotary_base or base, base)
    chunk = LanguageModel(
        core,
        architecture,
        block_submodules(architecture.layers[own], config.training.scan_backend),
        padded_vocab_size(model),
        config.training.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope" if rotary_base else "none",
        **({"rotary_base": rotary_base} if rotary_base else {}),
        vp_stage=vp_stage,
    )
    return chunk.to(torch.device("cpu") if core.use_cpu_initialization else "cuda")


def build_chunks(config: Config, core: TransformerConfig) -> list[LanguageModel]:
    """All model chunks of this rank, in the order of their virtual stages."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    return [build_chunk(config, core, stage) for stage in ([None] if not chunks else range(chunks))]


def global_parameters(chunk: LanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of a chunk, layers numbered as in the whole model.

    The head's copy of the embedding, on a last stage that is not the first, has the embedding's
    name.
    """
    for name, parameter in chunk.named_parameters():
        if name == HEAD and chunk.share_embeddings_and_output_weights:
            name = EMBEDDING
        if name.startswith("decoder.layers."):
            head, tail = name.removeprefix("decoder.layers.").split(".", 1)
            number = chunk.decoder.layers[int(head)].layer_number - 1
            name = f"decoder.layers.{number}.{tail}"
        yield name, parameter


def initialise_weights(chunk: LanguageModel, architecture: Architecture, seed: int) -> None:
    """Set every weight as the paper's recipe does, the same at every layout and on every device."""
    table = architecture.parameters()
    for name, parameter in global_parameters(chunk):
        row = table[name]
        initialise(parameter, name, row.shape, row.initialiser, seed)


def set_inner_lr_scale(chunks: list[nn.Module], scale: float) -> None:
    """Multiply every inner learning rate: the warm-up's factor; 1 in evaluation."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, InnerLoop):
                module.inner_lr_scale = scale
