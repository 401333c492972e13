"""Configuration of the TTT-Linear and TTT-MLP language models (arXiv 2407.04620)."""

from transformers import PretrainedConfig

TTT_LAYER_TYPES = ("linear", "mlp")


class TTTConfig(PretrainedConfig):
    """The official checkpoints' config.json, key by key.

    The main keys beyond a Llama's: ttt_layer_type, "linear" or "mlp"; ttt_base_lr, the inner
    learning rate before its gate; mini_batch_size, tokens of one inner gradient step. use_gate,
    share_qk and pre_conv together make the Mamba backbone, none of them the Transformer backbone.

    Raises ValueError for a combination that no checkpoint has.
    """

    model_type = "ttt"
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
        if hidden_act != "silu" or not tie_word_embeddings:
            raise ValueError("only hidden_act=silu with tie_word_embeddings=true is supported")
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
