"""The loss of training: likelihood of the right answers, expected F1, and divergence from a teacher."""

import torch
from transformers import PreTrainedModel

from qa_platform.training.data import INPUTS, LONGEST_ANSWER

TEMPERATURE = 2.0


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a batch (see `data.tensors`): the mean over its windows of the sum of four terms.

    1. The negative log likelihood, in nats, of all right answers together. An answer's is that of its start times that of its end.
    2. One minus the expected F1 (`expected_f1`).
    3. The squared distance of the best answer's score from whether it is right (`miscalibration`).
    4. The divergence from the teacher (`divergence`), where there is a guess.
    """
    out = model(**{name: batch[name] for name in INPUTS if name in batch})
    padded = (batch["attention_mask"] == 0)[..., None]
    logits = torch.stack([out.start_logits, out.end_logits], -1).float().masked_fill(padded, -1e4)
    start, end = torch.log_softmax(logits, dim=1).unbind(-1)
    likely = batch["share"].log() + start.gather(1, batch["first"]) + end.gather(1, batch["last"])
    scores, right = span_scores(start, end), batch["share"] > 0
    loss = -likely.logsumexp(-1) + 1 - expected_f1(scores, batch["first"], batch["last"], right)
    loss += miscalibration(scores, batch["first"], batch["last"], right)
    return (loss + batch["taught"] * divergence(logits, batch["odds"])).mean()


def divergence(logits: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence of the model from its teacher, in nats, start and end added up; shape (windows,).

    Both distributions are softened by `TEMPERATURE`, and the result is scaled by its square (Hinton et al., 2015). ``logits`` and ``odds``
    have shape (windows, tokens, 2).
    """
    ours, theirs = ((values / TEMPERATURE).log_softmax(1) for values in (logits, odds))
    return TEMPERATURE**2 * torch.where(theirs.isfinite(), theirs.exp() * (theirs - ours), 0.0).sum((1, 2))


def span_scores(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The log scores of all spans of up to `LONGEST_ANSWER` tokens, as in the answering engine.

    ``start`` and ``end`` are log probabilities of shape (windows, tokens). The result has shape (windows, tokens, lengths): a span's first
    token, and how many follow it. What is beyond the window has -1e4.
    """
    tokens = start.shape[1]
    stop = torch.arange(tokens, device=start.device)[:, None] + torch.arange(LONGEST_ANSWER, device=start.device)
    return (start[:, :, None] + end[:, stop.clamp(max=tokens - 1)]).masked_fill(stop >= tokens, -1e4)


def expected_f1(scores: torch.Tensor, first: torch.Tensor, last: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The expected F1, in tokens, of a span drawn with the model's probabilities, against the best of the right answers.

    ``scores`` are `span_scores`; ``first``, ``last`` and ``right`` (whether it is an answer, not padding) have shape (windows, answers).
    The result has shape (windows,).
    """
    begin = torch.arange(scores.shape[1], device=scores.device)[:, None]
    stop = begin + torch.arange(LONGEST_ANSWER, device=scores.device)
    weight = scores.flatten(1).softmax(-1).view(scores.shape)
    best = torch.zeros_like(scores)
    for column in range(first.shape[1]):
        left, till = first[:, column, None, None], last[:, column, None, None]
        common = (torch.minimum(stop, till) - torch.maximum(begin, left) + 1).clamp(min=0)
        f1 = 2 * common / (stop - begin + 1 + till - left + 1)
        best = torch.maximum(best, f1 * right[:, column, None, None])
    return (weight * best).flatten(1).sum(-1)


def miscalibration(scores: torch.Tensor, first: torch.Tensor, last: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The Brier score of the best span: the squared distance between its score, a probability, and 1 if it is a right answer, else 0.

    A score is the product of two probabilities that depend on each other. Likelihood alone leaves it too low where the model is in doubt.
    Token 0, [CLS], is no answer. For the arguments see `expected_f1`; the result has shape (windows,).
    """
    score, place = scores[:, 1:].flatten(1).max(-1)
    begin, further = 1 + place // LONGEST_ANSWER, place % LONGEST_ANSWER
    found = (first == begin[:, None]) & (last == (begin + further)[:, None]) & right
    return (score.exp() - found.any(-1).float()) ** 2
