"""A process of a job, made ready for a model: platform, process groups and seeds."""

from __future__ import annotations

import os

from megatron.core import parallel_state

from megatron_ttt import platform as platforms
from megatron_ttt.config import Config, check_layout


def prepare_process(config: Config) -> platforms.Platform:
    """Start the platform, the process group and megatron-core's groups, and seed; return the
    platform. Raises UserError for a layout that this number of processes cannot take."""
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    platform = platforms.start(config.run.device, deterministic=config.training.deterministic)
    platforms.start_process_group(platform, config.run.timeout_minutes)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=config.run.timeout_minutes,
    )
    platforms.seed_everything(config.run.seed)
    return platform
