"""megatron-ttt: test-time-training language models, trained the Megatron way."""

import logging
import warnings

# What torch and megatron-core say, at import, of things they can do without and nothing here uses:
# other libraries, and a CUDA toolkit on a machine without a GPU.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|absl).* not installed")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
