"""A question generator: it samples questions that a piece of a context answers.

It is an encoder, used as a prefix language model (UniLM, Dong et al., 2019): the tokens of the context see each other, and each token of
the question sees the context and the question so far. Two unused words of the vocabulary mark the answer in the context.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import BertModel, PreTrainedTokenizerFast

from qa_platform.evaluation.gold import GoldQuestion
from qa_platform.training.data import arithmetic, load_tokenizer

# Tokens of the context around an answer, of an answer, and of a question, at most.
CONTEXT_TOKENS = 90
_ANSWER_TOKENS = 20
QUESTION_TOKENS = 30
# Questions of a batch, in training and in sampling.
_TRAINED_TOGETHER = 48
_SAMPLED_TOGETHER = 96
_MARKS = ("[unused0]", "[unused1]")
_LABEL_SMOOTHING = 0.1
_WARM_UP_STEPS = 200
_DECAY = 0.6
_LOG_STEPS = 50
# Tokens are drawn from the most likely ones that have this share of the probability together, at this temperature (Holtzman et al., 2020).
_NUCLEUS = 0.9
_TEMPERATURE = 0.7
_MOST_TOKENS = 20


@dataclass(frozen=True)
class Passage:
    """A context with the character range of an answer in it."""

    context: str
    start: int
    end: int


class Generator(torch.nn.Module):
    """An encoder of the family BERT with an output layer over its vocabulary."""

    def __init__(self, start: Path) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(start)
        self.encoder = BertModel.from_pretrained(
            start,
            dtype=torch.float32,
            add_pooling_layer=False,
            attn_implementation="eager",
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
        )
        size = self.encoder.config.hidden_size
        self.transform = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.GELU(), torch.nn.LayerNorm(size))
        self.bias = torch.nn.Parameter(torch.zeros(self.encoder.config.vocab_size))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The scores of the next token: shape (…, hidden size) to (…, vocabulary), in float32."""
        return (self.transform(hidden) @ self.encoder.embeddings.word_embeddings.weight.T + self.bias).float()

    def prompts(self, passages: Sequence[Passage], rng: random.Random | None = None) -> list[list[int]]:
        """The tokens of each passage around its answer, with the answer marked; empty where no token covers the answer.

        Args:
            rng: draws where in the prompt the answer stands. None: in the middle.
        """
        contexts = list(dict.fromkeys(passage.context for passage in passages))
        encoded = self.tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True)
        index = {context: number for number, context in enumerate(contexts)}
        found = []
        for passage in passages:
            number = index[passage.context]
            found.append(_prompt(self.tokenizer, encoded["input_ids"][number], encoded["offset_mapping"][number], passage, rng))
        return found

    @torch.inference_mode()
    def sample(self, prompts: Sequence[list[int]]) -> list[str]:
        """One question for each prompt, drawn at random; "" where it has no end within `QUESTION_TOKENS`."""
        questions = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for first in range(0, len(order), _SAMPLED_TOGETHER):
            rows = order[first : first + _SAMPLED_TOGETHER]
            for row, question in zip(rows, self._sample([prompts[row] for row in rows]), strict=True):
                questions[row] = question
            if first // _SAMPLED_TOGETHER % _LOG_STEPS == 0:
                print({"sampled": min(first + _SAMPLED_TOGETHER, len(order)), "of": len(order)}, flush=True)
        return questions

    def _sample(self, prompts: list[list[int]]) -> list[str]:
        tokenizer, device, dtype = self.tokenizer, self.encoder.device, self.encoder.dtype
        ids = _padded([[tokenizer.cls_token_id, *prompt] for prompt in prompts], tokenizer.pad_token_id).to(device)
        lengths = torch.tensor([len(prompt) + 1 for prompt in prompts], device=device)
        known = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        seen = known[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        cache = self.encoder(input_ids=ids, attention_mask=_additive(seen, dtype), use_cache=True).past_key_values
        token = torch.full((len(prompts),), tokenizer.sep_token_id, device=device)
        drawn: list[torch.Tensor] = []
        for step in range(QUESTION_TOKENS):
            known = torch.cat([known, torch.ones_like(known[:, :1])], 1)
            out = self.encoder(
                input_ids=token[:, None],
                token_type_ids=torch.ones_like(token)[:, None],
                position_ids=(lengths + step)[:, None],
                attention_mask=_additive(known[:, None, None, :], dtype),
                past_key_values=cache,
                use_cache=True,
            )
            token = _drawn(self.logits(out.last_hidden_state[:, 0]))
            drawn.append(token)
        return [self._text(tokens) for tokens in torch.stack(drawn, 1).tolist()]

    def _text(self, tokens: list[int]) -> str:
        end = tokens.index(self.tokenizer.sep_token_id) if self.tokenizer.sep_token_id in tokens else 0
        return str(self.tokenizer.decode(tokens[:end]))


def _prompt(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], offsets: list[tuple[int, int]], passage: Passage, rng: random.Random | None
) -> list[int]:
    covered = [number for number, (first, after) in enumerate(offsets) if after > passage.start and first < passage.end]
    if not covered:
        return []
    first, after = covered[0], min(covered[-1] + 1, covered[0] + _ANSWER_TOKENS)
    room = CONTEXT_TOKENS - (after - first)
    before = rng.randint(room // 3, 2 * room // 3) if rng else room // 2
    begin = max(0, min(first - before, len(ids) - CONTEXT_TOKENS))
    opening, closing = cast("list[int]", tokenizer.convert_tokens_to_ids(list(_MARKS)))
    return [*ids[begin:first], opening, *ids[first:after], closing, *ids[after : begin + CONTEXT_TOKENS]]


def train_generator(start: Path, questions: Sequence[GoldQuestion], *, epochs: int, learning_rate: float, seed: int) -> Generator:
    """Train a generator on the questions and first answers of gold sets, from an encoder with WordPiece tokens of the family BERT."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    generator = Generator(start)
    asked = [question for question in questions if question.answers and question.answers[0].start is not None]
    passages = [Passage(q.context, q.answers[0].start or 0, (q.answers[0].start or 0) + len(q.answers[0].text)) for q in asked]
    tokens = generator.tokenizer([question.question.strip() for question in asked], add_special_tokens=False)["input_ids"]
    schedule: list[list[tuple[list[int], list[int]]]] = []
    for _ in range(epochs):
        prompts = generator.prompts(passages, rng)
        fitting = [(p, q) for p, q in zip(prompts, tokens, strict=True) if p and len(q) < QUESTION_TOKENS]
        schedule += _batches(fitting, rng)
    optimizer = torch.optim.AdamW(generator.train().parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    for step, pairs in enumerate(schedule):
        scale = min(1.0, (step + 1) / _WARM_UP_STEPS, (len(schedule) - step) / (_DECAY * len(schedule)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arithmetic("cpu") is torch.bfloat16):
            loss = _loss(generator, pairs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _LOG_STEPS == 0 or step + 1 == len(schedule):
            print({"generator_step": step + 1, "of": len(schedule), "loss": round(loss.item(), 4)}, flush=True)
    return generator.to(arithmetic("cpu")).eval()


def _batches(pairs: list[tuple[list[int], list[int]]], rng: random.Random) -> list[list[tuple[list[int], list[int]]]]:
    """Batches of pairs of about the same length, in random order."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]) + rng.random())
    batches = [pairs[first : first + _TRAINED_TOGETHER] for first in range(0, len(pairs), _TRAINED_TOGETHER)]
    rng.shuffle(batches)
    return batches


def _loss(generator: Generator, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The cross entropy, in nats a token, of questions after their prompts. A pair is a prompt and a question."""
    tokenizer = generator.tokenizer
    separator = tokenizer.sep_token_id
    ids = _padded(
        [[tokenizer.cls_token_id, *prompt, separator, *question, separator] for prompt, question in pairs], tokenizer.pad_token_id
    )
    places = torch.arange(ids.shape[1])
    # The question begins with the separator before it, from which its first token is predicted.
    begins = torch.tensor([len(prompt) + 1 for prompt, _ in pairs])[:, None]
    ends = begins + torch.tensor([len(question) + 1 for _, question in pairs])[:, None]
    of_question = (places >= begins) & (places <= ends)
    seen = (places < begins)[:, None, :] | (of_question[:, None, :] & (places <= places[:, None]))
    hidden = generator.encoder(
        input_ids=ids, token_type_ids=of_question.long(), attention_mask=_additive(seen[:, None], torch.float32), use_cache=False
    ).last_hidden_state
    predicting = of_question & (places < ends)
    logits = generator.logits(hidden[predicting])
    targets = ids[:, 1:][predicting[:, :-1]]
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=_LABEL_SMOOTHING)


def _padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to attention's scores, of one that says which key each query sees."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    """Draw one token for each row of ``logits``."""
    likely, tokens = (logits / _TEMPERATURE).topk(_MOST_TOKENS)
    shares = likely.softmax(-1)
    before = shares.cumsum(-1) - shares
    return tokens.gather(1, torch.multinomial(shares.masked_fill(before > _NUCLEUS, 0.0), 1))[:, 0]
