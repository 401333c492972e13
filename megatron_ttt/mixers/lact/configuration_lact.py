"""Configuration of language models of LaCT layers alone, by the official checkpoints' keys."""

from types import SimpleNamespace
from typing import Any

from .configuration_ttt import TTTConfig

_KEYS = {
    "fast_heads": "num_lact_heads",
    "hidden_multiple": "inter_multi",
    "chunk_size": "lact_chunk_size",
    "window": "window_size",
    "momentum": "use_momentum",
    "muon": "use_muon",
    "low_rank_gain": "fw_init_gain",
    "pre_norm": "ttt_prenorm",
    "output_scale": "learnable_ttt_scale",
    "silu": "qkv_silu",
    "rope_theta": "rope_theta",
    "qkv_bias": "qkv_bias",
    "qk_norm": "attn_qk_norm",
}
"""Options of the mixer, and the official keys for them."""


class LaCTSWIGLUConfig(TTTConfig):
    """The config.json of a model all of whose layers are LaCT's (arXiv 2505.23884)."""

    model_type = "lact_swiglu"
    embedding_name = "embeddings"
    attribute_map = {  # noqa: RUF012
        "num_attention_heads": "num_attn_heads",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(
        self,
        num_hidden_layers=24,
        num_attn_heads=32,
        norm_eps=1e-6,
        hidden_act="swish",
        num_lact_heads=4,
        inter_multi=1,
        lact_chunk_size=2048,
        window_size=2048,
        use_momentum=True,
        use_muon=False,
        w0_w2_low_rank=32,
        fw_init_gain=0.5,
        ttt_prenorm=False,
        learnable_ttt_scale=True,
        qkv_silu=True,
        no_v_silu=False,
        ttt_nope=False,
        rope_theta=1e6,
        qkv_bias=False,
        attn_qk_norm=False,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if hidden_act not in ("silu", "swish"):
            raise ValueError("only hidden_act=swish is supported")
        self.num_lact_heads = num_lact_heads
        self.inter_multi = inter_multi
        self.lact_chunk_size = lact_chunk_size
        self.window_size = window_size
        self.use_momentum = use_momentum
        self.use_muon = use_muon
        self.w0_w2_low_rank = w0_w2_low_rank
        self.fw_init_gain = fw_init_gain
        self.ttt_prenorm = ttt_prenorm
        self.learnable_ttt_scale = learnable_ttt_scale
        self.qkv_silu = qkv_silu
        self.no_v_silu = no_v_silu
        self.ttt_nope = ttt_nope
        self.rope_theta = rope_theta
        self.qkv_bias = qkv_bias
        self.attn_qk_norm = attn_qk_norm
        options = vars(self.mixer_options(0))
        super().__init__(
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=kwargs.pop("num_attention_heads", num_attn_heads),
            rms_norm_eps=kwargs.pop("rms_norm_eps", norm_eps),
            tie_word_embeddings=tie_word_embeddings,
            layer_types=["lact"] * num_hidden_layers,
            mixers={"lact": options},
            **kwargs,
        )
        self.hidden_act = hidden_act

    def mixer_options(self, layer_idx: int) -> SimpleNamespace:
        """Return the options of a layer's mixer, as attributes."""
        return SimpleNamespace(
            **{option: getattr(self, key) for option, key in _KEYS.items()},
            value_silu=not self.no_v_silu,
            fast_rope=not self.ttt_nope,
            low_rank=self.w0_w2_low_rank if self.w0_w2_low_rank > 0 else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        tree = super().to_dict()
        for name in ("layer_types", "mixers"):
            tree.pop(name, None)
        return tree
