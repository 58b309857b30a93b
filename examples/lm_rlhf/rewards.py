"""Rewards: sentiment by rule, or any sequence-classification model."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from safe_rl.monitoring.audit import frozen_sha256

Reward = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(prompts, responses) -> scores [B]."""

LEXICONS = ("vader_lexicon.txt", "emoji_utf8_lexicon.txt")


@dataclass(frozen=True)
class KnownReward:
    """A reward, and the hash of what it judges by."""

    score: Reward
    sha256: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores [B]."""
        return self.score(prompts, responses)


def vader_reward() -> KnownReward:
    """VADER's compound sentiment of the response, -1 (negative) to 1 (positive).

    Its hash is that of the two lexicons, one after the other.
    """
    lexicons = b"".join(files("vaderSentiment").joinpath(name).read_bytes() for name in LEXICONS)
    analyzer = SentimentIntensityAnalyzer()

    def score(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return torch.tensor([analyzer.polarity_scores(text)["compound"] for text in responses])

    return KnownReward(score, hashlib.sha256(lexicons).hexdigest())


def classifier_reward(path: str, *, label: str | None = None) -> KnownReward:
    """Logit of a sequence-classification model on prompt and response; its weights' hash.

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
    model.eval().requires_grad_(False)
    limit = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        texts = [f"{prompt}\n{text}" for prompt, text in zip(prompts, responses, strict=True)]
        tokens = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=limit
        )
        return model(**tokens).logits[:, output].float()

    return KnownReward(score, frozen_sha256(model))


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
