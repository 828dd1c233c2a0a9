"""`spans.best_spans` in torch. It runs on the device that holds the logits, so only the best spans leave that device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qa_platform.answering.spans import SpanOptions, WindowSpans, null_probabilities
from qa_platform.answering.windows import Window


def torch_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, context_ranges: torch.Tensor, width: int, options: SpanOptions
) -> torch.Tensor:
    """The best spans of each window of a batch, for `spans_of`. Nothing here waits for the device.

    Args:
        start_logits, end_logits: float32, shape (windows, tokens), padded on the right.
        context_ranges: the first token and the number of tokens of each window's context, shape (windows, 2).
        width: tokens of the longest of those contexts.

    Returns:
        float64, shape (windows, 2 + 3 * spans). The first two columns are the summed log denominators of the two softmaxes and the summed
        logits of [CLS]. Three blocks follow, each with all spans, best first: first tokens, counted from the start of the window's
        context; numbers of tokens minus one; and summed logits, where -inf means that there is no span.
    """
    columns = torch.arange(width, device=context_ranges.device)
    outside = columns >= context_ranges[:, 1:]
    columns = (context_ranges[:, :1] + columns).clamp(max=start_logits.shape[1] - 1).long()
    start, start_total = _of_context(start_logits.double(), columns, outside)
    end, end_total = _of_context(end_logits.double(), columns, outside)
    longest = min(options.max_answer_len, width)
    after = torch.nn.functional.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    scores = start[:, :, None] + after
    # Only a few of the many spans are sorted: the best spans begin at the tokens whose own best spans are best, ties included.
    starts = _best(scores.amax(2), options.candidates).sort(1).values
    scores = scores.take_along_dim(starts[:, :, None], 1).flatten(1)
    chosen = _best(scores, options.candidates)
    null = start_logits[:, :1].double() + end_logits[:, :1]
    firsts, lengths = starts.take_along_dim(chosen // longest, 1), chosen % longest
    return torch.cat([start_total + end_total, null, firsts, lengths, scores.take_along_dim(chosen, 1)], 1)


@np.errstate(invalid="ignore")
def spans_of(found: NDArray[np.float64], windows: Sequence[Window]) -> list[WindowSpans]:
    """The result of `torch_spans`, window by window."""
    total, null = found[:, :1], found[:, 1:2]
    firsts, lengths, scores = np.split(found[:, 2:], 3, axis=1)
    starts, ends = firsts.astype(np.int64), (firsts + lengths).astype(np.int64)
    probabilities, nulls = np.exp(scores - total), null_probabilities(null[:, 0], total[:, 0])
    counts = np.isfinite(scores).sum(1).tolist()
    return [
        WindowSpans(starts[row, :count] + window.first, ends[row, :count] + window.first, probabilities[row, :count], nulls[row])
        for row, (window, count) in enumerate(zip(windows, counts, strict=True))
    ]


def _of_context(logits: torch.Tensor, columns: torch.Tensor, outside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the context's tokens, -inf outside; and the log of the softmax's denominator, shape (windows, 1)."""
    context = logits.take_along_dim(columns, 1).masked_fill(outside, -torch.inf)
    total = torch.cat([logits[:, :1], context], 1).logsumexp(1, keepdim=True)
    # A window whose softmax is not finite gets no spans.
    return context.masked_fill(~total.isfinite(), -torch.inf), total


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the ``count`` highest scores of every row, highest first, ties by column. `topk` does not define the order of ties."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
