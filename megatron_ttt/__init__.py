"""megatron-ttt: test-time-training language models, trained the Megatron way."""
