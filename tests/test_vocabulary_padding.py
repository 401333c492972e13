"""The vocabulary in memory is padded to a multiple of the tensor-parallel size."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_ttt.model import LanguageModel

SIZES = [2, 4, 8, 16]


@pytest.mark.parametrize("tp", SIZES)
def test_the_loss_leaves_padding_out_whatever_ranks_it_fills(tp, monkeypatch):
    """Each rank masks its own part; the parts together are the logits of the real entries."""
    monkeypatch.setattr(
        GPTModel, "compute_language_model_loss", lambda self, labels, logits: logits
    )
    model = LanguageModel.__new__(LanguageModel)
    random = torch.Generator().manual_seed(0)
    for vocabulary in range(1, 4 * tp + 2):
        model.real_vocab_size = vocabulary
        entries = -(-vocabulary // tp)
        whole = torch.randn(3, 2, entries * tp, generator=random, requires_grad=True)
        parts = []
        for rank, part in enumerate(whole.chunk(tp, dim=-1)):
            monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda r=rank: r)
            parts.append(model.compute_language_model_loss(None, part))
        labels = torch.randint(vocabulary, (6,), generator=random)
        loss = F.cross_entropy(torch.cat(parts, dim=-1).flatten(0, 1), labels)
        real = whole.detach()[..., :vocabulary].requires_grad_()
        expected = F.cross_entropy(real.flatten(0, 1), labels)
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, whole)
        (expected_gradient,) = torch.autograd.grad(expected, real)
        torch.testing.assert_close(gradient[..., :vocabulary], expected_gradient)
        assert not gradient[..., vocabulary:].any()
