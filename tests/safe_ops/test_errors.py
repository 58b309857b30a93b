"""What is wrong with an input is said in one line that names the argument and what was got."""

import re
from collections.abc import Callable

import pytest
import torch

import safe_ops
from safe_ops import (
    clipped_policy_loss,
    clipped_policy_terms,
    entropy_gate,
    explained_variance,
    fill_masked,
    generalized_advantage_estimate,
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_reward,
    kl_surrogate,
    kl_surrogate_token,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    momentum_penalty,
    token_kl_penalty,
    token_log_probs,
    value_loss,
    value_terms,
)

X, Y, ROW = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)
YES, OTHER = torch.ones(2, 3).bool(), torch.ones(2, 4).bool()
HEADS, TOKENS = torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64)


def gae(**keywords: object) -> Callable[[], object]:
    arguments = {"mask": YES, "terminated": YES, **keywords}
    return lambda: generalized_advantage_estimate(
        arguments.pop("reward", X), arguments.pop("value", X), **arguments
    )


def policy(op: Callable[..., object], **keywords: object) -> Callable[[], object]:
    arguments = {"mask": YES, **keywords}
    return lambda: op(
        X, arguments.pop("old_log_prob", X), arguments.pop("advantage", X), **arguments
    )


def value(op: Callable[..., object], **keywords: object) -> Callable[[], object]:
    arguments = {"mask": YES, **keywords}
    return lambda: op(arguments.pop("value", HEADS), arguments.pop("target", X), **arguments)


CASES: list[tuple[str, Callable[[], object], list[str]]] = [
    *[
        case
        for op in (fill_masked, masked_sum, masked_mean, masked_var, masked_whiten)
        for case in (
            (f"{op.__name__}-float-mask", lambda op=op: op(X, X), ["mask must be bool", "float32"]),
            (f"{op.__name__}-shape", lambda op=op: op(X, OTHER), ["mask", "(2, 4)", "(2, 3)"]),
        )
    ],
    ("log-probs-temperature", lambda: token_log_probs(HEADS, TOKENS, temperature=-1.0),
     ["temperature must be positive", "-1.0"]),
    ("log-probs-zero-temperature", lambda: token_log_probs(HEADS, TOKENS, temperature=0.0),
     ["temperature must be positive"]),
    ("log-probs-dtype", lambda: token_log_probs(HEADS, X), ["tokens must be int64", "float32"]),
    ("log-probs-shape", lambda: token_log_probs(HEADS, TOKENS[:, :2]),
     ["tokens", "(2, 2)", "(2, 3, 2)"]),
    *[
        (op.__name__, lambda op=op: op(X, Y), ["log_prob and ref_log_prob", "(2, 3)", "(2, 4)"])
        for op in (kl_k1, kl_k2, kl_k3)
    ],
    ("kl-exact", lambda: kl_exact(X, Y), ["logits and ref_logits", "(2, 3)", "(2, 4)"]),
    *[
        case
        for op in (kl_surrogate, kl_surrogate_token)
        for case in (
            (f"{op.__name__}-ref", lambda op=op: op(X, Y, mask=YES), ["ref_log_prob", "(2, 4)"]),
            (f"{op.__name__}-mask", lambda op=op: op(X, X, mask=X), ["mask must be bool"]),
            (f"{op.__name__}-mask-shape", lambda op=op: op(X, X, mask=OTHER), ["mask", "(2, 4)"]),
            (f"{op.__name__}-old", lambda op=op: op(X, X, mask=YES, old_log_prob=Y),
             ["old_log_prob", "(2, 4)"]),
        )
    ],
    ("shaped-reward", lambda: kl_shaped_reward(X, X, Y, mask=YES, coef=1.0), ["ref_log_prob"]),
    ("shaped-mask", lambda: kl_shaped_reward(X, X, X, mask=X, coef=1.0), ["mask must be bool"]),
    ("token-penalty", lambda: token_kl_penalty(X, Y, threshold=0.1), ["ref_log_prob", "(2, 4)"]),
    ("gate-floor", lambda: entropy_gate(X, floor=0.0), ["floor must be positive", "0.0"]),
    ("gate-eps", lambda: entropy_gate(X, floor=2.0, eps=-0.1), ["eps must be positive", "-0.1"]),
    ("gate-ceiling", lambda: entropy_gate(X, floor=2.0, ceiling=1.0), ["ceiling", "1.0 and 2.0"]),
    ("gate-bounds", lambda: entropy_gate(X, floor=2.0, lower=3.0, upper=1.0),
     ["lower", "upper", "3.0", "1.0"]),
    ("gate-negative", lambda: entropy_gate(X, floor=2.0, lower=-1.0), ["lower", "-1.0"]),
    ("momentum-window", lambda: momentum_penalty(X, X, window=0), ["window", "at least 1", "0"]),
    ("gae-reward", gae(reward=ROW), ["reward must be [B, T]", "(2,)"]),
    ("gae-value", gae(value=Y), ["value", "(2, 4)", "(2, 3)"]),
    ("gae-mask", gae(mask=X), ["mask must be bool", "float32"]),
    ("gae-mask-shape", gae(mask=OTHER), ["mask", "(2, 4)"]),
    ("gae-terminated", gae(terminated=X), ["terminated must be bool"]),
    ("gae-truncated", gae(truncated=X), ["truncated must be bool"]),
    ("gae-truncated-shape", gae(truncated=OTHER), ["truncated", "(2, 4)"]),
    ("gae-bootstrap", gae(bootstrap_value=X), ["bootstrap_value must be [B]", "(2, 3)"]),
    ("gae-next", gae(next_value=Y), ["next_value", "(2, 4)"]),
    ("gae-both", gae(next_value=X, bootstrap_value=ROW), ["bootstrap_value or next_value"]),
    *[
        case
        for op in (clipped_policy_terms, clipped_policy_loss)
        for case in (
            (f"{op.__name__}-clip", policy(op, clip=0.0), ["clip must be positive", "0.0"]),
            (f"{op.__name__}-pair", policy(op, clip=(0.2, -1.0)), ["clip must be positive", "-1"]),
            (f"{op.__name__}-old", policy(op, old_log_prob=Y), ["old_log_prob", "(2, 4)"]),
            (f"{op.__name__}-advantage", policy(op, advantage=Y), ["advantage", "(2, 4)"]),
            (f"{op.__name__}-mask", policy(op, mask=X), ["mask must be bool"]),
        )
    ],
    *[
        case
        for op in (value_terms, value_loss)
        for case in (
            (f"{op.__name__}-delta", value(op, huber_delta=0.0), ["huber_delta must be positive"]),
            (f"{op.__name__}-clip", value(op, clip=-1.0, old_value=HEADS), ["clip", "-1.0"]),
            (f"{op.__name__}-alone", value(op, clip=0.2), ["clip and old_value go together"]),
            (f"{op.__name__}-old", value(op, old_value=HEADS), ["clip and old_value go together"]),
            (f"{op.__name__}-shape", value(op, value=Y), ["value", "(2, 4)", "(2, 3)"]),
            (f"{op.__name__}-target", value(op, target=Y), ["value_target", "(2, 4)"]),
            (f"{op.__name__}-old-shape", value(op, clip=0.2, old_value=X),
             ["old_value", "(2, 3)", "(2, 3, 2)"]),
            (f"{op.__name__}-mask", value(op, mask=X), ["mask must be bool"]),
        )
    ],
    ("explained-shape", lambda: explained_variance(X[:, :1], X, mask=YES),
     ["value and value_target", "(2, 1)", "(2, 3)"]),
    ("explained-mask", lambda: explained_variance(X, X, mask=X), ["mask must be bool"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_error_names_the_argument(call: Callable[[], object], said: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name", [name for name in safe_ops.__all__ if callable(getattr(safe_ops, name))]
)
def test_misspelt_keyword_is_an_error(name: str) -> None:
    with pytest.raises(TypeError):
        getattr(safe_ops, name)(X, X, X, no_such_keyword=1)
