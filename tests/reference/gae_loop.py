"""Generalised advantage estimation, written from the equations in plain floats.

Not the recursion: each advantage is its sum of discounted errors, looking forward,

    A_t = sum_{l >= t} ( prod_{t <= i < l} discount_i lambda_i [episode goes on after i] ) delta_l

over the steps of a row that count, once those that do not are taken out.
"""

from torch import Tensor


def gae_loop(
    reward: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    next_value: Tensor | None = None,
    discount: float | Tensor = 1.0,
    gae_lambda: float | Tensor = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantage and value target, [B, T] float64; 0 where the mask is False."""
    rows, columns = reward.shape

    def at(x: float | Tensor, row: int, column: int) -> float:
        return float(x[row, column]) if isinstance(x, Tensor) else x

    advantage = reward.new_zeros(reward.shape).double().fill_(0.0)
    target = advantage.clone()
    for row in range(rows):
        steps = [column for column in range(columns) if mask[row, column]]
        delta = []
        for i, step in enumerate(steps):
            if terminated[row, step]:
                following = 0.0
            elif next_value is not None:
                following = float(next_value[row, step])
            elif i + 1 < len(steps):
                following = float(value[row, steps[i + 1]])
            else:
                following = 0.0 if bootstrap_value is None else float(bootstrap_value[row])
            delta.append(
                float(reward[row, step])
                + at(discount, row, step) * following
                - float(value[row, step])
            )
        for i, step in enumerate(steps):
            total, weight = 0.0, 1.0
            for j in range(i, len(steps)):
                total += weight * delta[j]
                if terminated[row, steps[j]]:
                    break
                if truncated is not None and truncated[row, steps[j]]:
                    break
                weight *= at(discount, row, steps[j]) * at(gae_lambda, row, steps[j])
            advantage[row, step] = total
            target[row, step] = total + float(value[row, step])
    return advantage, target
