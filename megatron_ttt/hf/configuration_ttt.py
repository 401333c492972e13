"""Configuration of language models whose layers have TTT mixers, attention, or some of each."""

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

TTT_LAYER_TYPES = ("linear", "mlp")
_KEYS = {
    "use_gate": "use_gate",
    "share_qk": "share_qk",
    "pre_conv": "pre_conv",
    "mini_batch_size": "mini_batch_size",
    "base_lr": "ttt_base_lr",
    "conv_kernel": "conv_kernel",
    "rope_theta": "rope_theta",
}
"""Options of a TTT mixer, and the official checkpoints' keys for them."""


class TTTConfig(PretrainedConfig):
    """The config.json of a model: the official checkpoints' keys, or a mixer for each layer.

    A model that has one TTT mixer in all layers has the official keys (arXiv 2407.04620). Beyond a
    Llama's they are ttt_layer_type, "linear" or "mlp"; ttt_base_lr, the inner learning rate before
    its gate; mini_batch_size, tokens of one inner gradient step; conv_kernel, and the switches
    use_gate, share_qk and pre_conv. All three switches make the Mamba backbone, none of them the
    Transformer backbone.

    Every other model has two keys in their place: layer_types, the name of each layer's mixer, and
    mixers, the options of each mixer by its name.

    transformers 5 keeps a list of its own names for an attribute `layer_types`, renames
    "attention" in it and refuses the others, so the attribute is `mixer_types`.

    Raises ValueError for what no model can be made of.
    """

    model_type = "ttt"
    embedding_name = "embed_tokens"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=32,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        use_gate=False,
        share_qk=False,
        ttt_layer_type="linear",
        ttt_base_lr=1.0,
        mini_batch_size=16,
        pre_conv=False,
        conv_kernel=4,
        scan_checkpoint_group_size=0,
        layer_types=None,
        mixers=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        if layer_types is None and mixers is None:
            self.rope_theta = rope_theta
            self.use_gate = use_gate
            self.share_qk = share_qk
            self.ttt_layer_type = ttt_layer_type
            self.ttt_base_lr = ttt_base_lr
            self.mini_batch_size = mini_batch_size
            self.pre_conv = pre_conv
            self.conv_kernel = conv_kernel
            self.scan_checkpoint_group_size = scan_checkpoint_group_size
            if ttt_layer_type not in TTT_LAYER_TYPES:
                raise ValueError(f"ttt_layer_type={ttt_layer_type} is none of {TTT_LAYER_TYPES}")
            layer_types = [f"ttt_{ttt_layer_type}"] * num_hidden_layers
        else:
            check_mixers(layer_types, mixers, num_hidden_layers)
        self.mixer_types = list(layer_types)
        self.mixers = mixers
        if hidden_act != "silu":
            raise ValueError("only hidden_act=silu is supported")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not divisible by {num_attention_heads} heads"
            )
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def mixer_options(self, layer_idx: int) -> SimpleNamespace:
        """Return the options of a layer's mixer, as attributes."""
        if self.mixers is None:
            return SimpleNamespace(**{name: getattr(self, key) for name, key in _KEYS.items()})
        return SimpleNamespace(**self.mixers[self.mixer_types[layer_idx]])

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        tree = super().to_dict()
        types = tree.pop("mixer_types")
        if self.mixers is None:
            del tree["mixers"]
        else:
            tree["layer_types"] = types
        return tree


def check_mixers(layer_types: Any, mixers: Any, layers: int) -> None:
    """Raise ValueError unless each layer has a mixer, and each mixer its options."""
    if not layer_types or not mixers:
        raise ValueError("layer_types and mixers are given together, or neither is")
    if len(layer_types) != layers:
        raise ValueError(f"layer_types has {len(layer_types)} names for {layers} layers")
    if missing := sorted(set(layer_types) - set(mixers)):
        raise ValueError(f"mixers has no options for {', '.join(missing)}, which layer_types names")
