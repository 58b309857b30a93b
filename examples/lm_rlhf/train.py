"""RLHF of a language model with SAFE or PPO, from top to bottom.

    python -m examples.lm_rlhf.train --output runs/first

One update: sample responses, re-score them under the policy and the reference, pay the reward,
move the controller once, estimate advantages, and take a few epochs of minibatch steps.
"""

import copy
import itertools
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from tensordict import TensorDict
from torch import Tensor, nn

from examples.lm_rlhf.command_line import parse
from examples.lm_rlhf.config import Config
from examples.lm_rlhf.engine import make_engine
from examples.lm_rlhf.guard import Guard, RunStoppedError
from examples.lm_rlhf.models import load_policy, read_prompts, tokenize_prompts
from examples.lm_rlhf.rewards import classifier_reward, vader_reward
from examples.lm_rlhf.run_folder import RunFolder
from safe_ops import kl_surrogate, masked_mean
from safe_ops.controllers import PHASE_NAMES, Controller
from safe_rl import (
    ControllerModule,
    KLBaseline,
    KLReward,
    PolicyMeasurements,
    PPOLoss,
    SAFELoss,
    SoftMinCritic,
    SoftMinGAE,
    total_loss,
)
from safe_rl.causal_lm import CausalLMActorCritic
from safe_rl.checkpoints import OptimizerState, RandomStates, TrainableParameters, save_checkpoint
from safe_rl.integrations.accelerate import PerRank, any_rank, mean_over_ranks, shard
from safe_rl.integrations.sharded_layers import shard_layers
from safe_rl.monitoring.audit import file_sha256, frozen_sha256
from safe_rl.monitoring.interventions import LastGood
from safe_rl.monitoring.progress import RunProgress
from safe_rl.monitoring.report import write_report
from safe_rl.monitoring.text_metrics import distinct_ngrams
from safe_rl.rollouts import left_pad, minibatches, pack_rollout, place_score
from safe_rl.sharded_tensors import whole
from safe_rl.trust_region import policy_kl

ROW_TILE = 16
"""Rows; the largest tile of the matrix products seen here."""


class PromptOrder:
    """Prompts in a new random order each pass; its state is its place and its generator."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator
        self.waiting = torch.empty(0, dtype=torch.int64)

    def draw(self, size: int) -> list[int]:
        """The next ``size`` prompts."""
        while len(self.waiting) < size:
            order = torch.randperm(self.count, generator=self.generator)
            self.waiting = torch.cat([self.waiting, order])
        drawn, self.waiting = self.waiting[:size], self.waiting[size:]
        return drawn.tolist()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is still to come of this pass; the generator is saved with the others."""
        return {"waiting": self.waiting.clone()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take it back."""
        self.waiting = state_dict["waiting"]


class StopRequest:
    """Ctrl-C asks for a stop after the update in hand; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this update; Ctrl-C again stops at once", file=sys.stderr)


def train(config: Config, output: Path, *, resume: bool) -> Path:
    """Run until ``config.steps`` updates are done or Ctrl-C; returns the report's path.

    Raises:
        RunStoppedError: the monitor ended the run; log, checkpoint and report are written.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    accelerator = Accelerator()
    stop_reason = run(accelerator, config, output, resume=resume)
    # Wrapped models go before their process group: a wrapper that is the last to hold it waits for
    # its threads and keeps the interpreter, which they may be waiting for.
    accelerator.free_memory()
    accelerator.end_training()
    if stop_reason is not None:
        raise RunStoppedError(stop_reason)
    return output / "report.html"


def run(accelerator: Accelerator, config: Config, output: Path, *, resume: bool) -> str | None:
    """One rank's share of the updates; returns why the monitor ended them, if it did."""
    device = accelerator.device
    folder = RunFolder(output, config, resume=resume)
    if config.minibatch_size % accelerator.num_processes:
        raise ValueError(
            f"minibatch_size must be a multiple of the {accelerator.num_processes} processes, "
            f"got {config.minibatch_size}"
        )
    rows = config.minibatch_size // accelerator.num_processes

    # The parts.
    policy = load_policy(config)
    prompts = read_prompts(config.prompts)
    hashes = {
        "prompts": file_sha256(config.prompts),
        "frozen_weights": frozen_sha256(policy.language_model),
    }
    language_model = policy.language_model
    if not config.sharded:
        language_model.to(device)
    prompt_ids = tokenize_prompts(
        policy, prompts, system_message=config.system_message, room=config.max_new_tokens
    )
    # Rows of a matrix product are summed in tiles: with sequences of a whole number of tiles a
    # token's log-prob does not depend on its row, so the ratio before an update is exactly 1.
    longest = max(map(len, prompt_ids))
    prompt_width = longest + -(longest + config.max_new_tokens) % ROW_TILE
    if config.reward_model is None:
        reward = vader_reward()
    else:
        reward = classifier_reward(config.reward_model, label=config.reward_label)
    hashes["reward_model"] = reward.sha256

    safe = config.algorithm == "safe"
    engine = make_engine(
        config,
        policy,
        longest=longest + config.max_new_tokens,
        processes=accelerator.num_processes,
    )
    critic = SoftMinCritic(
        language_model.config.hidden_size,
        num_heads=config.critic_heads if safe else 1,
        temperature=config.soft_min_temperature,
    ).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    network = CausalLMActorCritic(language_model, critic, temperature=config.temperature)
    scorer = CausalLMActorCritic(language_model, target_critic, temperature=config.temperature)
    if config.sharded:
        # The layers then average their own gradients; the critic, small and whole, is wrapped.
        shard_layers(language_model, accelerator)
        network.critic = accelerator.prepare(critic)
    controller = Controller(config.kl_law if safe else config.kl_reward_law).to(device)
    controlled = (
        ControllerModule(controller)
        if safe
        else ControllerModule(
            controller,
            in_keys={"kl": ("measurements", "kl")},
            out_keys={"kl_reward_coef": "coef"},
        )
    )
    measure = PolicyMeasurements()
    # The KL is in SAFE's loss and in PPO's reward, never in both.
    with_kl = KLBaseline(decay=config.kl_decay) if safe else KLReward()
    estimate_advantage = SoftMinGAE(
        temperature=config.soft_min_temperature,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
        average_gae=True,
    )
    coefficients = {
        "clip": config.clip,
        "entropy_coef": config.entropy_coef,
        "value_coef": config.value_coef,
    }
    objective = (
        SAFELoss(network, surrogate=partial(kl_surrogate, decay=config.kl_decay), **coefficients)
        if safe
        else PPOLoss(network, **coefficients)
    )
    adapters = [p for p in language_model.parameters() if p.requires_grad]
    heads = list(critic.parameters())
    optimizer = torch.optim.Adam(
        [
            {"params": adapters, "lr": config.policy_learning_rate},
            {"params": heads, "lr": config.critic_learning_rate},
        ],
        # Hundreds of small adapters at once.
        fused=True,
    )
    if not config.sharded:
        objective = accelerator.prepare(objective)
    optimizer = accelerator.prepare(optimizer)
    # All ranks draw the same prompts in the same order, and different tokens.
    order = torch.Generator().manual_seed(config.seed)
    prompt_order = PromptOrder(len(prompts), order)
    torch.manual_seed(config.seed + accelerator.process_index)
    learnt = {
        "adapters": TrainableParameters(language_model),
        "critic": critic,
        "target_critic": target_critic,
        "optimizer": OptimizerState(optimizer),
        "controller": controller,
    }
    on_main = accelerator.is_main_process
    good = LastGood(learnt, output, write=on_main)
    guard = Guard(config, adapters=adapters, optimizer=optimizer, controller=controller, good=good)
    parts = learnt | {
        "interventions": guard.interventions,
        "last_good": good,
        "prompt_order": prompt_order,
        "random": PerRank(accelerator, RandomStates(order=order)),
    }

    # The run's folder: a new one, or one that is taken up again.
    start = folder.load(parts, hashes) if resume else 0
    guard.apply_factors()
    accelerator.wait_for_everyone()
    if on_main and resume:
        folder.take_up(start, processes=accelerator.num_processes)
    elif on_main:
        folder.begin(hashes, processes=accelerator.num_processes)
    if not resume:
        guard.keep_if_well(start)
        save_checkpoint(folder.checkpoint, start, parts, write=on_main)

    progress = RunProgress(config.steps, start, console=Console(quiet=not on_main))
    with StopRequest() as stop, progress:
        step, stopped = start, False
        while step < config.steps and not stopped:
            clock = {"start": time.perf_counter()}

            # Sample.
            progress.stage("sampling", config.batch_size)
            drawn = shard(accelerator, prompt_order.draw(config.batch_size))
            prompt, prompt_mask = left_pad(
                [prompt_ids[i] for i in drawn], width=prompt_width, pad_id=policy.pad_id
            )
            prompt, prompt_mask = prompt.to(device), prompt_mask.to(device)
            response = engine.sample(
                prompt,
                prompt_mask,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                eos_ids=policy.eos_ids.to(device),
                pad_id=policy.pad_id,
            ).tokens
            batch = pack_rollout(
                prompt,
                prompt_mask,
                response,
                policy.eos_ids.to(device),
                width=config.max_new_tokens,
                pad_id=policy.pad_id,
            )
            clock["sampling"] = time.perf_counter()

            # Score: policy, reference (the same model, adapters off), reward.
            progress.stage("scoring", None)
            tokens = response_tokens(batch)
            texts = policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            place_score(batch, reward([prompts[i] for i in drawn], texts).to(device))
            with torch.no_grad():
                scored = score(scorer, batch, rows)
                with policy.peft_model.disable_adapter():
                    reference = score(scorer, batch, rows)
            batch["old_log_prob"] = scored["log_prob"]
            batch["entropy"] = scored["entropy"]
            batch["state_values"] = scored["state_values"]
            batch["bootstrap_values"] = scored["bootstrap_values"]
            batch["ref_log_prob"] = reference["log_prob"]

            # The controller moves once per rollout; then advantages.
            batch = estimate_advantage(with_kl(controlled(measure(batch))))
            clock["scoring"] = time.perf_counter()

            # Update.
            progress.stage("updating", config.epochs * config.batch_size // config.minibatch_size)
            seen: dict[str, list[Tensor]] = defaultdict(list)
            guard.begin()
            for _ in range(config.epochs):
                for piece in minibatches(batch, size=rows, generator=order):
                    losses = objective(piece)
                    loss = total_loss(losses)
                    accelerator.backward(loss)
                    norms = {
                        "gradient_norm_policy": clip(adapters, config.max_gradient_norm),
                        "gradient_norm_value": clip(heads, config.max_gradient_norm),
                    }
                    if guard.may_step(loss, *norms.values()):
                        optimizer.step()
                        polyak(target_critic, critic, config.target_critic_polyak)
                    # Now, not before the next backward: gradients as large as the adapters would
                    # stay in memory beside the next forward, and all through sampling.
                    optimizer.zero_grad(set_to_none=True)
                    for key, value in [*losses.items(), *norms.items()]:
                        seen[key].append(value.detach())
                    progress.advance()
            guard.hold(partial(kl_of_update, scorer, batch, rows))
            clock["updating"] = time.perf_counter()

            # Log, in the units that the keys name.
            rollout = gather_rollout(accelerator, batch)
            ratios = accelerator.gather(torch.stack(seen.pop("ratio_max")))
            means = mean_over_ranks(
                accelerator,
                {key: torch.stack(values).mean() for key, values in sorted(seen.items())},
            )
            record = {
                "record": "update",
                "step": step,
                **rollout_record(rollout),
                **controller_record(controller, safe=safe),
                **means,
                "ratio_max": ratios.max(),
                "ratio_first": ratios[0],
                **guard.record(),
            }
            measured = {key: value[0] for key, value in batch["measurements"].items()}
            events = guard.observe(step, **measured, value_loss=means["loss_value"])
            last = step + 1 == config.steps
            if on_main:
                progress.update(folder.log.write(record))
                for event in events:
                    progress.event(folder.log.write(event))
                if step % config.samples_every == 0 or last:
                    samples = [
                        {"prompt": prompts[i], "response": text, "reward": float(score)}
                        for i, text, score in zip(
                            drawn[:4], texts[:4], batch["score"][:4], strict=True
                        )
                    ]
                    folder.log.write({"record": "samples", "step": step, "samples": samples})
            step += 1
            stopped = any_rank(accelerator, stop.asked) or guard.stop_reason is not None
            # Not at other checkpoints: a run that was stopped must go back to where others would.
            if step % config.checkpoint_every == 0:
                guard.keep_if_well(step)
            if step % config.checkpoint_every == 0 or last or stopped:
                save_checkpoint(folder.checkpoint, step, parts, write=on_main)
                good.drop_older()
            clock["logging"] = time.perf_counter()
            if on_main:
                folder.timing.write(timing_record(step - 1, clock))
    if on_main:
        write_report(output)
    return guard.stop_reason


def score(scorer: nn.Module, batch: TensorDict, size: int) -> TensorDict:
    """Re-score in pieces of the minibatch's size: one shape, so the same sums to the last bit."""
    pieces = batch.select(*scorer.in_keys).split(size)
    return torch.cat([scorer(piece.copy()) for piece in pieces])


def kl_of_update(scorer: nn.Module, batch: TensorDict, size: int) -> Tensor:
    """KL(old || new) on the rollout, with the parameters as they are now."""
    log_prob = score(scorer, batch, size)["log_prob"]
    return policy_kl(batch["old_log_prob"], log_prob, mask=batch["response_mask"])


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient down to ``limit``; returns its norm before, of all ranks' parts."""
    return whole(nn.utils.clip_grad_norm_(parameters, limit))


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, share: float) -> None:
    """Move the target critic a share of the way."""
    for held, new in zip(target.parameters(), source.parameters(), strict=True):
        held.lerp_(new, share)


def response_tokens(batch: TensorDict) -> list[list[int]]:
    """Ids of each response, without its padding."""
    return [
        row[mask].tolist()
        for row, mask in zip(batch["tokens", "response"], batch["response_mask"], strict=True)
    ]


def gather_rollout(accelerator: Accelerator, batch: TensorDict) -> TensorDict:
    """What is logged of the rollouts of all ranks."""
    keys = (
        ("tokens", "response"),
        "response_mask",
        "length_stop",
        "score",
        "old_log_prob",
        "ref_log_prob",
        "entropy",
    )
    gathered = {key: accelerator.gather(batch[key]) for key in keys}
    return TensorDict(gathered, gathered["score"].shape)


def rollout_record(batch: TensorDict) -> dict[str, object]:
    """What was sampled."""
    mask = batch["response_mask"]
    return {
        "reward_mean": batch["score"].mean(),
        "reward_std": batch["score"].std(correction=0),
        "kl_nats_per_token": masked_mean(batch["old_log_prob"] - batch["ref_log_prob"], mask),
        "entropy_nats_per_token": masked_mean(batch["entropy"], mask),
        "response_tokens_mean": mask.sum() / mask.shape[0],
        "length_stop_fraction": batch["length_stop"].float().mean(),
        "ref_perplexity": (-masked_mean(batch["ref_log_prob"], mask)).exp(),
        "distinct_bigrams_fraction": distinct_ngrams(response_tokens(batch), 2),
    }


def controller_record(controller: Controller, *, safe: bool) -> dict[str, object]:
    """What the controller decided."""
    state = controller.state
    if not safe:
        return {"kl_reward_coef": state.coef, "non_finite": state.non_finite}
    return {
        "kl_threshold_nats_per_token": state.kl_threshold,
        "kl_filtered_nats_per_token": state.kl,
        "kl_momentum_nats_per_token_per_update": state.kl_momentum,
        "kl_coef": state.kl_coef,
        "kl_penalty": state.kl_penalty,
        # With the line's other values, the line before and the settings, threshold and coefficient
        # follow from:
        "kl_threshold_shift_nats_per_token": state.threshold_shift,
        "pid_proportional_nats_per_token": state.pid.proportional,
        "pid_integral_nats_per_token": state.pid.integral,
        "pid_derivative_nats_per_token": state.pid.derivative,
        # Deviations per update; reward per update where the law does not normalise.
        "reward_velocity": state.reward_velocity,
        # Of the phase: the reward's last window less the one before, and its standard error.
        "reward_rise": state.phases.rise,
        "reward_rise_error": state.phases.rise_error,
        "kl_lead_nats_per_token": state.kl_lead,
        "kl_offset_nats_per_token": state.kl_offset,
        "entropy_gate": state.entropy_gate,
        "phase": PHASE_NAMES[int(state.phase)],
        "non_finite": state.non_finite,
    }


def timing_record(step: int, clock: dict[str, float]) -> dict[str, object]:
    """Wall-clock of each stage, in a log of its own: it never repeats."""
    names = list(clock)
    stages = {
        f"{name}_seconds": clock[name] - clock[before] for before, name in itertools.pairwise(names)
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"record": "timing", "step": step, **stages, "peak_memory_gib": peak}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with a line about what was wrong with the input; 3: the monitor stopped it."""
    # Hubs are asked only for what a folder does not hold; progress bars of loading are noise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before the first parallel work, whose threads inherit it. Softmax over a large vocabulary is
    # full of numbers below 1e-38, with which a CPU computes many times slower: sampling took 3.7
    # times as long, an update 2.2 times.
    torch.set_flush_denormal(True)
    try:
        config, output, resume = parse(argv)
        report = train(config, output, resume=resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStoppedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return 3
    finally:
        torch.set_flush_denormal(False)
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
