"""The training loss: likelihood of the right answers, expected F1, and divergence from a teacher."""

import torch
from transformers import PreTrainedModel

from qa_platform.training.data import INPUTS, LONGEST_ANSWER

TEMPERATURE = 2.0


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a batch (see `data.tensors`): the mean over its windows of the sum of three terms.

    1. The negative log likelihood, in nats, of all right answers together. An answer's likelihood is its start's times its end's.
    2. One minus the expected F1 (`expected_f1`).
    3. The divergence from the teacher (`divergence`), if there is a guess.
    """
    out = model(**{name: batch[name] for name in INPUTS if name in batch})
    padded = (batch["attention_mask"] == 0)[..., None]
    logits = torch.stack([out.start_logits, out.end_logits], -1).float().masked_fill(padded, -1e4)
    start, end = torch.log_softmax(logits, dim=1).unbind(-1)
    likely = batch["share"].log() + start.gather(1, batch["first"]) + end.gather(1, batch["last"])
    loss = -likely.logsumexp(-1) + 1 - expected_f1(start, end, batch["first"], batch["last"], batch["share"] > 0)
    return (loss + batch["taught"] * divergence(logits, batch["odds"])).mean()


def divergence(logits: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence of the model from its teacher, in nats, summed over start and end; shape (windows,).

    Both distributions are softened by `TEMPERATURE`, and the result is scaled by its square (Hinton et al., 2015). ``logits`` and ``odds``
    have shape (windows, tokens, 2).
    """
    ours, theirs = ((values / TEMPERATURE).log_softmax(1) for values in (logits, odds))
    return TEMPERATURE**2 * torch.where(theirs.isfinite(), theirs.exp() * (theirs - ours), 0.0).sum((1, 2))


def expected_f1(start: torch.Tensor, end: torch.Tensor, first: torch.Tensor, last: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The expected F1, in tokens, of a span drawn with the model's probabilities, against the best of the right answers.

    Spans have up to `LONGEST_ANSWER` tokens, as in the answering engine.

    ``start`` and ``end`` are log probabilities of shape (windows, tokens), ``first``, ``last`` and ``right`` (whether it is an answer,
    not padding) have shape (windows, answers). The result has shape (windows,).
    """
    tokens = start.shape[1]
    begin = torch.arange(tokens, device=start.device)[:, None]
    stop = begin + torch.arange(LONGEST_ANSWER, device=start.device)
    # (windows, tokens, lengths)
    score = start[:, :, None] + end[:, stop.clamp(max=tokens - 1)]
    weight = score.masked_fill(stop >= tokens, -1e4).flatten(1).softmax(-1).view(score.shape)
    best = torch.zeros_like(score)
    for column in range(first.shape[1]):
        left, till = first[:, column, None, None], last[:, column, None, None]
        common = (torch.minimum(stop, till) - torch.maximum(begin, left) + 1).clamp(min=0)
        f1 = 2 * common / (stop - begin + 1 + till - left + 1)
        best = torch.maximum(best, f1 * right[:, column, None, None])
    return (weight * best).flatten(1).sum(-1)
