"""Rewards: sentiment by rule, or any sequence-classification model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

Reward = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(prompts, responses) -> scores [B]."""


def vader_reward() -> Reward:
    """VADER's compound sentiment of the response, -1 (negative) to 1 (positive)."""
    analyzer = SentimentIntensityAnalyzer()

    def score(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return torch.tensor([analyzer.polarity_scores(text)["compound"] for text in responses])

    return score


def classifier_reward(path: str, *, label: str | None = None) -> Reward:
    """Logit of a sequence-classification model on prompt and response.

    Args:
        path: Folder or hub id.
        label: Which output is the reward; not needed for a model with one.

    Raises:
        ValueError: the model does not load, or ``label`` does not single out one output.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"reward model {path!r} does not load: {first_line(error)}") from error
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if label is None and len(labels) > 1:
        raise ValueError(f"reward model {path!r} has outputs {labels}: choose a --reward-label")
    if label is not None and label not in labels:
        raise ValueError(f"reward model {path!r} has outputs {labels}, not {label!r}")
    output = 0 if label is None else labels.index(label)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.eval()
    limit = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        texts = [f"{prompt}\n{text}" for prompt, text in zip(prompts, responses, strict=True)]
        tokens = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=limit
        )
        return model(**tokens).logits[:, output].float()

    return score


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
