"""Settings of a run from its command line."""

import argparse
import dataclasses
from pathlib import Path

from examples.lm_rlhf.config import CONFIGS, Config


def parse(argv: list[str] | None) -> tuple[Config, Path, bool]:
    """Settings from the command line; what is not given stays as the chosen config has it."""
    parser = argparse.ArgumentParser(description="RLHF of a language model with SAFE or PPO.")
    parser.add_argument("--config", choices=CONFIGS, default="smollm2_135m")
    parser.add_argument("--model", help="causal-LM folder or hub id")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        default=None,
        help="of the model's sizes, in place of its weights: to measure memory and speed",
    )
    parser.add_argument("--reward-model", help="sequence-classification folder or hub id")
    parser.add_argument("--reward-label", help="its output that is the reward, if it has several")
    parser.add_argument("--algorithm", choices=["safe", "ppo"])
    parser.add_argument("--steps", type=int, help="updates")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--prompts", type=Path, help="one prompt a line, or .jsonl")
    parser.add_argument("--system-message", help="first turn of every chat")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--minibatch-size", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument(
        "--merged-sampling",
        action=argparse.BooleanOptionalAction,
        help="sample with merged adapters: faster, for a copy of the layers' weights",
    )
    parser.add_argument(
        "--vllm", type=float, metavar="SHARE", help="sample with vLLM, in this share of the GPU"
    )
    parser.add_argument(
        "--sharded",
        action="store_true",
        default=None,
        help="divide the layers over the ranks of torchrun, with FSDP2",
    )
    parser.add_argument("--checkpoint-every", type=int)
    parser.add_argument("--policy-learning-rate", type=float)
    parser.add_argument("--kl-coef", type=float, help="of the penalty; 0 switches it off")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    arguments = vars(parser.parse_args(argv))
    config = CONFIGS[arguments.pop("config")]()
    output, resume = arguments.pop("output"), arguments.pop("resume")
    kl_coef = arguments.pop("kl_coef")
    given = {name: value for name, value in arguments.items() if value is not None}
    if kl_coef is not None:
        given["kl_law"] = dataclasses.replace(config.kl_law, coef=kl_coef)
    return dataclasses.replace(config, **given), output, resume
