"""megatron-ttt: test-time-training language models, trained the Megatron way."""

import warnings

# megatron-core warns, at import, of every library it can do without; none of them is used here.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).* not installed")
