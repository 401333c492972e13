"""Language models whose layers have TTT mixers, attention, or some of each, for transformers.

The files of this folder stand beside the weights; torch and transformers are all they need.
`Mixer` in layers_ttt.py says what a mixer is. Each has a file of its own, and this one, which
knows none of them by name, ends with the imports of those that the model has.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_ttt import (
    Entry,
    Span,
    TTTCache,
    check_cache,
    plan_span,
    refuse_packing,
    reordered,
)
from .configuration_ttt import TTTConfig
from .layers_ttt import Mixer, TTTPreConv, TTTRMSNorm, TTTSwiGLU, init_weights

MIXERS: dict[str, type[Mixer]] = {}
"""The mixers by the names that config.json has for them."""


def mixer_class(name: str) -> type[Mixer]:
    """Return the class of a mixer. Raises ValueError where its code is not here."""
    if name not in MIXERS:
        raise ValueError(f"no code of the mixer {name} is here, only of {', '.join(MIXERS)}")
    return MIXERS[name]


class TTTDecoderLayer(GradientCheckpointingLayer):
    """h += preconv(h), in some; h += mixer(RMSNorm(h)); h += SwiGLU(RMSNorm(h))."""

    def __init__(self, config: TTTConfig, layer_idx: int):
        super().__init__()
        mixer = mixer_class(config.mixer_types[layer_idx])
        width = mixer.pre_conv_width(config.mixer_options(layer_idx))
        if width is not None:
            self.conv = TTTPreConv(config, width)
        self.has_pre_conv = width is not None
        first, second = mixer.norm_names
        self.names = (first, mixer.module_name, second)
        self.add_module(first, TTTRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.add_module(mixer.module_name, mixer(config, layer_idx))
        self.add_module(second, TTTRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.mlp = TTTSwiGLU(config)

    def forward(self, h_BLD: Tensor, span: Span, entry: Entry | None = None) -> Tensor:
        first, mixer, second = (getattr(self, name) for name in self.names)
        if self.has_pre_conv:
            h_BLD = self.conv(h_BLD, span, entry)
        h_BLD = h_BLD + mixer(first(h_BLD), span, entry)
        return h_BLD + self.mlp(second(h_BLD))


class TTTPreTrainedModel(PreTrainedModel):
    """Loading, saving, initial weights."""

    config_class = TTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TTTDecoderLayer",)
    # Generation carries a TTTCache, which cannot be rolled back.
    _is_stateful = True

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        self._keep_in_fp32_modules_strict = sorted(
            {name for kind in config.mixer_types for name in mixer_class(kind).fp32_names}
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)


class TTTModel(TTTPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.add_module(config.embedding_name, embedding)
        self.layers = nn.ModuleList(
            TTTDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return getattr(self, self.config.embedding_name)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        setattr(self, self.config.embedding_name, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: TTTCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids [B, L] -> last hidden state [B, L, D], and the cache for the tokens to come.

        attention_mask [B, L] or [B, tokens before + L]: 0 at padding, on either side. Padding
        leaves a row's state, convolutions and position as they are. position_ids say nothing that
        the mask does not; they are refused where they start anew within a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        h_BLD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        cache = past_key_values
        check_cache(cache, len(h_BLD))
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:  # which would have moved on when a layer runs again
                raise ValueError(
                    "gradient checkpointing cannot go on from past_key_values: leave them out, or "
                    "call gradient_checkpointing_disable()"
                )
            use_cache = False
        if cache is None and use_cache:
            cache = TTTCache(self.config)
        span, order_BL = plan_span(h_BLD, attention_mask, cache)
        if position_ids is not None:
            refuse_packing(position_ids, attention_mask)
        if order_BL is not None:
            h_BLD = reordered(h_BLD, order_BL)

        hidden = []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden.append(h_BLD)
            h_BLD = layer(h_BLD, span, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.columns += span.length
            cache.position_B = span.start_B + span.lengths_B
        hidden.append(self.norm(h_BLD))
        if order_BL is not None:
            back_BL = order_BL.argsort(1)
            hidden = [reordered(h, back_BL) for h in hidden]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


class TTTForCausalLM(TTTPreTrainedModel, GenerationMixin):
    """The language model; its head may be the embedding."""

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        self._tied_weights_keys = {"lm_head.weight": f"model.{config.embedding_name}.weight"}
        self.model = TTTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: TTTCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids [B, L] -> logits [B, L, V]; with labels [B, L] the next-token loss too.

        logits_to_keep: 0 for all positions, n for the last n. The rest as in `TTTModel`.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TTTCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool | None = True,
        **kwargs,
    ) -> dict:
        """The columns that the cache has not read yet.

        The ids may be all of a sequence, or those that are new to the cache; a mask is over all.
        transformers drops a mask of ones, and says how many columns are new, or that all are.
        """
        check_cache(past_key_values, len(input_ids))
        if past_key_values is None and use_cache:
            past_key_values = TTTCache(self.config)
        read = 0 if past_key_values is None else past_key_values.columns
        name, tokens = "input_ids", input_ids
        if inputs_embeds is not None and read < inputs_embeds.shape[1]:
            name, tokens = "inputs_embeds", inputs_embeds
        given = tokens.shape[1]
        if attention_mask is not None:
            new = attention_mask.shape[1] - read
        elif next_sequence_length is not None:
            new = next_sequence_length
        else:
            new = given if is_first_iteration else given - read
        if not 0 < new <= given <= new + read:
            raise ValueError(
                f"{name} has {given} columns, past_key_values has read {read}: give a sequence "
                "that is longer, or its new part and an attention_mask over the whole"
            )
        if attention_mask is not None:
            held = attention_mask[:, -new:].bool()
            if (held.any(1) & ~held[:, -1]).any():
                raise ValueError("attention_mask ends in padding: pad on the left to generate")
        return {
            name: tokens[:, -new:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }


__all__ = ["TTTCache", "TTTForCausalLM", "TTTModel", "TTTPreTrainedModel"]
