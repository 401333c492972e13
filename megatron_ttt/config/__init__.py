"""The configuration: one typed tree, read from YAML, merged with `key.path=value` overrides.

`tree.py` declares the sections, `reading.py` reads and merges, `checks.py` refuses what cannot
work, `former_keys.py` knows the keys of before.
"""

from megatron_ttt.config.checks import check_layout
from megatron_ttt.config.reading import config_from_tree, config_with_defaults, load_config
from megatron_ttt.config.tree import (
    Config,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    flatten_tree,
    to_dict,
    to_yaml,
)

__all__ = [
    "Config",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "check_layout",
    "config_from_tree",
    "config_with_defaults",
    "flatten_tree",
    "load_config",
    "to_dict",
    "to_yaml",
]
