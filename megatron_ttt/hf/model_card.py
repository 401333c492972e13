"""The README.md of an export: what the model is, its data and recipe, and how far it came."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.config import Config
from megatron_ttt.hf.configuration import is_llama
from megatron_ttt.stack import architecture_of


def model_card(checkpoint: Checkpoint, config: Config, has_tokenizer: bool) -> str:
    """Markdown with recipe, data, steps and losses; what is not known is left out."""
    model, architecture = config.model, architecture_of(config)
    name = architecture.label
    trust = "" if is_llama(architecture) else ", trust_remote_code=True"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {name}, {model.num_layers} layers of {model.hidden_size}",
        "",
        f"A language model with {name} layers"
        + (
            " ([Learning to (Learn at Test Time)](https://arxiv.org/abs/2407.04620)): the hidden "
            "state of such a layer is itself a model, trained while a sequence is read."
            if architecture.has_inner_loop
            else " (the Llama architecture)."
            if is_llama(architecture)
            else "."
        ),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM" + ", AutoTokenizer" * has_tokenizer,
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
    ]
    if has_tokenizer:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    lines += ["```", "", "## Training", ""]
    trained = "training" in checkpoint.config
    if not trained:
        lines += ["Converted from weights in another format; not trained since.", ""]
        return "\n".join(lines)
    training = config.training
    tokens = checkpoint.step * training.global_batch_size * training.seq_length
    lines += [
        f"- steps: {checkpoint.step:,} of {training.steps:,}, {tokens:,} tokens",
        f"- batch: {training.global_batch_size} sequences of {training.seq_length} tokens",
        f"- data: {', '.join(map(str, config.data.train)) or config.data.fixed_batches}",
        *_losses(checkpoint),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(checkpoint.config, sort_keys=False).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _losses(checkpoint: Checkpoint) -> list[str]:
    """The losses at the checkpoint's step, from the run's metrics.jsonl where it still is."""
    path = Path(checkpoint.path).parent / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a killed run left unfinished
        if record.get("step") == checkpoint.step:
            for key, label in (("loss", "training loss"), ("val_loss", "validation loss")):
                if key in record:
                    lines.append(f"- {label} at the last step: {record[key]:.4f} nats per token")
    return lines
