"""A controller in a plain PyTorch loop with accelerate, saved with everything else.

    python -m examples.accelerate_loop --output runs/loop
    python -m examples.accelerate_loop --output runs/loop --steps 800 --resume

A policy over 16 actions is paid for choosing the largest of 16 inputs. A controller sets the weight
of the KL to the untouched policy, so that the KL stays near ``--threshold``.
"""

import argparse
import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from safe_ops import kl_exact, token_log_probs
from safe_ops.controllers import Controller, EntropyGatedKL

ROWS, ACTIONS, COEF = 256, 16, 3.0


def main(argv: list[str] | None = None) -> list[tuple[float, float, float]]:
    """Train; returns reward, KL (nats) and the coefficient in force, per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.3, help="nats")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--resume", action="store_true", help="from the state in --output")
    options = parser.parse_args(argv)

    limit = options.threshold
    torch.manual_seed(0)
    accelerator = Accelerator()
    policy = nn.Linear(ACTIONS, ACTIONS)
    reference = copy.deepcopy(policy).to(accelerator.device)
    policy, optimizer = accelerator.prepare(policy, torch.optim.Adam(policy.parameters(), lr=0.01))
    law = EntropyGatedKL(coef=COEF, threshold=limit, threshold_lower=limit, threshold_upper=limit)
    controller = Controller(law)
    controller.to(accelerator.device)
    accelerator.register_for_checkpointing(controller)
    if options.resume:
        accelerator.load_state(options.output)

    history = []
    state = controller.state
    # The law counts its updates, those it refused as well, so the loop needs no counter of its own.
    for step in range(int(state.step + state.non_finite), options.steps):
        inputs = torch.randn(ROWS, ACTIONS, device=accelerator.device)
        logits = policy(inputs)
        with torch.no_grad():
            ref_logits = reference(inputs)
            action = torch.distributions.Categorical(logits=logits).sample()
            reward = (action == inputs.argmax(-1)).float()
        kl = kl_exact(logits, ref_logits).mean()
        log_prob, entropy = token_log_probs(logits, action)
        loss = -((reward - reward.mean()) * log_prob).mean() + state.kl_coef * kl
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        # Reduced before the law, so that every rank holds the same state.
        measured = torch.stack([reward.mean(), kl.detach(), entropy.detach().mean()])
        measured = accelerator.reduce(measured, reduction="mean")
        history.append((*measured[:2].tolist(), float(state.kl_coef)))
        state = controller(reward=measured[0], kl=measured[1], entropy=measured[2])
        if step % 50 == 0:
            accelerator.print(
                "step {} reward {:.2f} kl {:.3f} coef {:.4f}".format(step, *history[-1])
            )
    accelerator.save_state(options.output)
    return history


if __name__ == "__main__":
    main()
