"""megatron-core submodules that make a TTT block."""
