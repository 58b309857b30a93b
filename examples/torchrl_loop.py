"""The PPO loop of TorchRL, with TorchRL's loss or with ours; shared by the examples.

A task is an environment, an actor, a critic and numbers. What differs between the two losses is in
``clip_ppo`` and ``safe``: how a rollout is prepared, and the objective itself.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gymnasium
import torch
from gymnasium.vector import AutoresetMode
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.collectors import BaseCollector, Collector, MultiSyncCollector
from torchrl.envs import EnvBase, GymWrapper, RewardScaling, RewardSum, TransformedEnv
from torchrl.objectives import ClipPPOLoss, LossModule
from torchrl.objectives.value import GAE

from safe_ops import kl_surrogate_token
from safe_ops.controllers import EntropyGatedKL
from safe_rl import (
    ActorCritic,
    ControllerModule,
    PolicyMeasurements,
    SAFELoss,
    Scores,
    SoftMinGAE,
    total_loss,
)

EPISODES = 20
"""Finished episodes whose mean return is reported."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """An environment, its networks, and the numbers that both losses share."""

    environment: Callable[[], EnvBase]
    """Its batches carry ``episode_reward``, as ``RewardSum`` writes it."""
    actor: Callable[[], ProbabilisticTensorDictSequential]
    critic: Callable[[int], nn.Module]
    """From the number of heads; reads ``observation``."""
    solved: float
    """Mean return of ``EPISODES`` episodes."""
    frames: int
    """Most frames of a run."""
    law: EntropyGatedKL
    frames_per_batch: int = 1024
    epochs: int = 8
    minibatch: int = 256
    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_coef: float = 0.01
    reference_rate: float = 0.2
    """Share of the actor that its slow copy, the reference, takes up after every rollout."""


@dataclass(frozen=True)
class Learner:
    """What is done with a rollout: prepared once, then the loss of every minibatch."""

    prepare: Callable[[TensorDictBase], TensorDictBase]
    loss: LossModule
    after: Callable[[], None] = lambda: None
    """Once the rollout is used up."""


def gym_environment(name: str, count: int, *, reward_scale: float = 1.0) -> EnvBase:
    """``count`` environments of gymnasium, stepped in this process, with the sums of rewards.

    Episodes are restarted by TorchRL, so "next" holds the last state of each.
    """
    vector = gymnasium.make_vec(
        name,
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
    )
    environment = TransformedEnv(GymWrapper(vector), RewardSum())
    if reward_scale != 1.0:
        environment.append_transform(RewardScaling(loc=0.0, scale=reward_scale))
    return environment


def clip_ppo(task: Task, actor: ProbabilisticTensorDictSequential) -> Learner:
    """TorchRL's own: ``GAE`` and ``ClipPPOLoss``."""
    critic = TensorDictModule(task.critic(1), ["observation"], ["state_value"])
    advantage = GAE(
        gamma=task.discount, lmbda=task.gae_lambda, value_network=critic, average_gae=True
    )
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=task.clip, entropy_coeff=task.entropy_coef, critic_coeff=0.5
    )
    return Learner(advantage, loss)


def safe(task: Task, actor: ProbabilisticTensorDictSequential) -> Learner:
    """Ours: a critic of two heads, and a KL to a slow copy of the actor, under a controller."""
    critic = TensorDictModule(task.critic(2), ["observation"], ["state_values"])
    network = ActorCritic(actor, critic)
    reference = ActorCritic(copy.deepcopy(actor).requires_grad_(False))
    advantage = SoftMinGAE(value_network=critic, discount=task.discount, gae_lambda=task.gae_lambda)
    prepare = TensorDictSequential(
        Scores(network, {"log_prob": "old_log_prob", "entropy": "entropy"}),
        Scores(reference, {"log_prob": "ref_log_prob"}),
        PolicyMeasurements(),
        ControllerModule(task.law),
        advantage,
    )
    # A rollout's rows hold several episodes, so no step has a prefix that the KL could weigh.
    loss = SAFELoss(
        network,
        clip=task.clip,
        entropy_coef=task.entropy_coef,
        huber_delta=1.0,
        surrogate=kl_surrogate_token,
    )

    def after() -> None:
        for slow, now in zip(reference.parameters(), actor.parameters(), strict=True):
            slow.lerp_(now.detach(), task.reference_rate)

    return Learner(prepare, loss, after)


LEARNERS = {"clip_ppo": clip_ppo, "safe": safe}


def minibatches(batch: TensorDictBase, size: int) -> Iterator[TensorDictBase]:
    """Every frame once, in another order each time."""
    order = torch.randperm(batch.numel())
    yield from (batch[part] for part in order.split(size))


def learn(
    task: Task,
    collector: BaseCollector,
    actor: ProbabilisticTensorDictSequential,
    make_learner: Callable[[Task, ProbabilisticTensorDictSequential], Learner],
) -> Iterator[tuple[int, float, dict[str, float]]]:
    """The loop: yields frames so far, mean return of the last episodes, and the last losses."""
    learner = make_learner(task, actor)
    optimizer = torch.optim.Adam(learner.loss.parameters(), lr=task.learning_rate, eps=1e-5)
    returns: deque[float] = deque(maxlen=EPISODES)
    frames = 0
    for rollout in collector:
        # What is learnt from; an environment may hand out more.
        batch = rollout.exclude("collector")
        frames += batch.numel()
        ended = batch["next", "done"].squeeze(-1)
        returns.extend(batch["next", "episode_reward"][ended].flatten().tolist())
        mean = statistics.fmean(returns) if returns else float("nan")
        # Reads as NaN, which the law refuses and counts, while no episode has ended.
        batch["score"] = torch.full(batch.batch_size, mean)
        batch = learner.prepare(batch).reshape(-1)
        losses: TensorDictBase | None = None
        for _ in range(task.epochs):
            for minibatch in minibatches(batch, task.minibatch):
                losses = learner.loss(minibatch)
                optimizer.zero_grad()
                total_loss(losses).backward()
                nn.utils.clip_grad_norm_(learner.loss.parameters(), 0.5)
                optimizer.step()
        learner.after()
        collector.update_policy_weights_()
        logged = {} if losses is None else {k: float(v.detach().mean()) for k, v in losses.items()}
        yield frames, mean, logged


def make_collector(
    task: Task, *, seed: int, workers: int
) -> tuple[BaseCollector, ProbabilisticTensorDictSequential]:
    """A collector and its actor: in this process, or in as many as there are workers."""
    settings = {
        "frames_per_batch": task.frames_per_batch,
        "total_frames": task.frames,
        "auto_register_policy_transforms": False,
    }
    torch.manual_seed(seed)
    if workers > 1:
        actor = task.actor()
        collector = MultiSyncCollector([task.environment] * workers, actor, **settings)
        collector.set_seed(seed)
        return collector, actor
    environment = task.environment()
    environment.set_seed(seed)
    actor = task.actor()
    return Collector(environment, actor, **settings), actor


def train(task: Task, name: str, seed: int, *, workers: int = 1) -> tuple[int | None, float]:
    """One run; the frames until the task was solved, if it was, and the last mean return."""
    collector, actor = make_collector(task, seed=seed, workers=workers)
    mean = float("nan")
    try:
        for frames, mean, _ in learn(task, collector, actor, LEARNERS[name]):
            if mean >= task.solved:
                return frames, mean
    finally:
        collector.shutdown()
    return None, mean


def main(task: Task, description: str | None, argv: list[str] | None = None) -> None:
    """Train with each loss and seed, and print the medians."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--loss", nargs="+", choices=LEARNERS, default=["safe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--frames", type=int, default=task.frames)
    parser.add_argument("--workers", type=int, default=1, help="processes that collect")
    parser.add_argument("--learning-rate", type=float, default=task.learning_rate)
    options = parser.parse_args(argv)
    task = dataclasses.replace(task, frames=options.frames, learning_rate=options.learning_rate)
    for name in options.loss:
        solved, means = [], []
        for seed in options.seeds:
            start = time.perf_counter()
            frames, mean = train(task, name, seed, workers=options.workers)
            seconds = time.perf_counter() - start
            solved.append(float("inf") if frames is None else frames)
            means.append(mean)
            print(
                f"{name} seed {seed}: mean return {mean:.1f} of {EPISODES} episodes after "
                f"{task.frames if frames is None else frames} frames, {seconds:.0f} s",
                flush=True,
            )
        print(
            f"{name}: median of {len(solved)} seeds: {statistics.median(solved):,.0f} frames to "
            f"{task.solved:g}, last mean return {statistics.median(means):.1f}",
            flush=True,
        )
