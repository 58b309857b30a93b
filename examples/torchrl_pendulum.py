"""Pendulum, continuous torques, in TorchRL's PPO loop, with TorchRL's loss or with ours.

    python -m examples.torchrl_pendulum --loss safe
    python -m examples.torchrl_pendulum --loss clip_ppo safe --seeds 0 1 2 3 4

Needs gymnasium. Prints the frames until 20 episodes of 200 steps in a row had a mean
return of -300; a policy that hangs or spins has about -1200.
"""

import torch
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor

from examples.torchrl_loop import Task, gym_environment, main
from safe_ops.controllers import EntropyGatedKL


def environment() -> EnvBase:
    """Sixteen pendulums; episodes are cut after 200 steps, not ended. Rewards of about -1."""
    return gym_environment("Pendulum-v1", 16, reward_scale=0.1)


def actor() -> ProbabilisticTensorDictSequential:
    """A Gaussian torque; the pendulum clamps it."""
    net = MLP(in_features=3, out_features=2, num_cells=[64, 64], activation_class=nn.Tanh)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


class Heads(nn.ModuleList):
    """Networks of their own side by side, one value each."""

    def forward(self, observation: Tensor) -> Tensor:
        """[..., 3] -> [..., K]."""
        return torch.cat([head(observation) for head in self], -1)


def critic(heads: int) -> nn.Module:
    """Values of an observation, one a head, which share nothing."""
    return Heads(
        MLP(in_features=3, out_features=1, num_cells=[64, 64], activation_class=nn.Tanh)
        for _ in range(heads)
    )


TASK = Task(
    environment=environment,
    actor=actor,
    critic=critic,
    solved=-300.0,
    frames=400_000,
    frames_per_batch=3200,
    epochs=10,
    minibatch=400,
    # Where PPO needs the fewest frames: docs/torchrl.md.
    learning_rate=7e-3,
    discount=0.95,
    entropy_coef=0.0,
    law=EntropyGatedKL(
        coef=1.0,
        # The threshold is the law's own. The entropy of a torque may be negative: a gate near 1.
        entropy_floor=0.5,
        gate_lower=1.0,
        gate_upper=2.0,
    ),
)


if __name__ == "__main__":
    main(TASK, __doc__)
