"""What a training run lets others do between its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megatron_ttt.training.trainer import Trainer


class Hook:
    """Methods that a `Trainer` calls on every rank; a subclass overrides the ones it needs.

    An exception ends the run. The log, the checks and the saver are hooks too, called after your
    own::

        class Losses(Hook):
            def __init__(self):
                self.losses = []

            def on_step_end(self, trainer, figures, microbatches):
                self.losses.append(figures["loss"])

        Trainer(config, prepare_process(config), hooks=[Losses()]).train()
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """Called before the first step, when a checkpoint to resume from has been loaded."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Called before a step's data is read; `trainer.step` counts the steps before it."""

    def on_step_end(
        self, trainer: Trainer, figures: dict[str, float], microbatches: list[Tensor]
    ) -> None:
        """Called after an optimizer step, whose number `trainer.step` is.

        figures: loss, lr, grad_norm, seconds and so on, the same on every rank but for times; what
        a hook adds is logged. microbatches: this rank's token ids, [micro_batch_size, L+1] each.
        """

    def on_validation_start(self, trainer: Trainer) -> None:
        """Called before a validation."""

    def on_validation_end(self, trainer: Trainer, loss: float) -> None:
        """Called after a validation with its mean loss, the same on every rank."""

    def on_save_start(self, trainer: Trainer) -> None:
        """Called before a checkpoint is written."""

    def on_save_end(self, trainer: Trainer) -> None:
        """Called when training can go on; in the background, the checkpoint is still written."""

    def on_train_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Called when the last step is saved, or with the exception that ends the run."""
