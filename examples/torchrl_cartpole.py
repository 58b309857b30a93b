"""CartPole in TorchRL's PPO loop, with TorchRL's loss or with ours.

    python -m examples.torchrl_cartpole --loss safe
    python -m examples.torchrl_cartpole --loss clip_ppo safe --seeds 0 1 2 3 4
    python -m examples.torchrl_cartpole --workers 2        # a MultiSyncCollector

Needs gymnasium. Prints the frames until 20 episodes in a row had a mean return of 475.
"""

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor

from examples.torchrl_loop import Task, gym_environment, main
from safe_ops.controllers import EntropyGatedKL


def environment() -> EnvBase:
    """Eight poles."""
    return gym_environment("CartPole-v1", 8, reward_scale=0.1)


def actor() -> ProbabilisticTensorDictSequential:
    """Left or right."""
    net = MLP(in_features=4, out_features=2, num_cells=[64, 64], activation_class=nn.Tanh)
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def critic(heads: int) -> nn.Module:
    """Values of an observation, one a head."""
    return MLP(in_features=4, out_features=heads, num_cells=[64, 64], activation_class=nn.Tanh)


TASK = Task(
    environment=environment,
    actor=actor,
    critic=critic,
    solved=475.0,
    frames=102_400,
    # Two actions have at most .69 nats; the slow copy trails by hundredths of a nat.
    law=EntropyGatedKL(
        coef=1.0,
        threshold=0.01,
        threshold_lower=0.005,
        threshold_upper=0.02,
        threshold_rate=0.001,
        entropy_floor=0.4,
    ),
)


if __name__ == "__main__":
    main(TASK, __doc__)
