"""What may skip, shorten or undo an update: finite checks, trust region, monitor, roll-back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.lm_rlhf.config import Config
from safe_ops.controllers import Controller
from safe_rl.monitoring.interventions import (
    Interventions,
    LastGood,
    Record,
    event,
    finite_on_all_ranks,
)
from safe_rl.trust_region import PolicyTrustRegion, TrustedStep


class RunStoppedError(Exception):
    """The monitor ended the run; the message is its reason."""


class Guard:
    """Guards every update of a run; its decisions are alike on all ranks.

    Args:
        config: Settings.
        adapters: Parameters of the policy.
        optimizer: Its learning rates are scaled.
        controller: Its law's threshold is scaled.
        good: What goes back with a roll-back.
    """

    def __init__(
        self,
        config: Config,
        *,
        adapters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        controller: Controller,
        good: LastGood,
    ) -> None:
        limit = config.trust_region_limit
        self.region = None if limit is None else PolicyTrustRegion(adapters, limit=limit)
        self.interventions = Interventions(config.monitor)
        self.good = good
        self.stop_reason: str | None = None
        self._optimizer = optimizer
        self._controller = controller
        self._law: Any = controller.law
        self._target = config.kl_reward_law.target
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._safe = config.algorithm == "safe"
        self._well = True
        self._begin()

    def _begin(self) -> None:
        self._steps = self._skipped = 0
        self._trusted: TrustedStep | None = None

    def begin(self) -> None:
        """Before the first optimizer step of an update."""
        self._begin()
        if self.region is not None:
            self.region.set()

    def may_step(self, *values: Tensor) -> bool:
        """Whether loss and gradient norms are finite on every rank: one synchronisation."""
        finite = finite_on_all_ranks(*values)
        self._steps += 1
        self._skipped += not finite
        return finite

    def hold(self, measure: Callable[[], Tensor]) -> None:
        """After the last optimizer step: keep the update within the trust region."""
        if self.region is not None:
            self._trusted = self.region.hold(measure)

    def record(self) -> Record:
        """What an update's log line says of it."""
        record: Record = {
            "optimizer_steps_skipped": self._skipped,
            "learning_rate_scale": self.interventions.learning_rate_scale,
            "kl_threshold_scale": self.interventions.threshold_scale,
        }
        if self._trusted is not None:
            record["kl_proposed_nats_per_token"] = self._trusted.proposed_kl
            record["update_scale"] = self._trusted.scale
        return record

    def observe(
        self, step: int, *, reward: Tensor, entropy: Tensor, kl: Tensor, value_loss: Tensor
    ) -> list[Record]:
        """Once per update: what was noticed and done; roll-back and factors take effect here."""
        events = [*self._trust_region_events(step), *self._skip_events(step)]
        watch = self.interventions
        # The monitor judges by the threshold as set; tightening must not raise its own alarm.
        alarms = watch.observe(
            step,
            reward=reward,
            entropy=entropy,
            kl=kl,
            kl_threshold=self._controller.state.kl_threshold / watch.threshold_scale
            if self._safe
            else self._target,
            value_loss=value_loss,
            skipped=self._skipped / self._steps,
        )
        actions = {alarm["action"] for alarm in alarms}
        if "roll_back" in actions:
            back = self.good.restore()
            watch.rolled_back()
            for alarm in alarms:
                if alarm["action"] == "roll_back":
                    alarm["reason"] += f"; back to the state after {back} updates"
        if "stop" in actions:
            self.stop_reason = next(a["reason"] for a in alarms if a["action"] == "stop")
        self.apply_factors()
        self._well = not events and watch.healthy
        return [*events, *alarms]

    def keep_if_well(self, step: int) -> None:
        """Take the state as one to go back to, unless something was noticed in the last update."""
        if self._well:
            self.good.keep(step)

    def apply_factors(self) -> None:
        """Set learning rates and threshold to their settings times the factors."""
        watch = self.interventions
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * watch.learning_rate_scale
        names = ("threshold", "threshold_lower", "threshold_upper") if self._safe else ("target",)
        scaled = {name: getattr(self._law, name) * watch.threshold_scale for name in names}
        self._controller.law = dataclasses.replace(self._law, **scaled)

    def _trust_region_events(self, step: int) -> list[Record]:
        trusted = self._trusted
        if self.region is None or trusted is None or trusted.scale == 1:
            return []
        limit = self.region.limit
        over = f"KL of the update {trusted.proposed_kl:.3g} nats per token, limit {limit:g}"
        if trusted.scale == 0:
            action, reason = "take_back", f"{over}; the policy is as before"
        else:
            action = "shorten"
            reason = f"{over}; {trusted.scale:.3g} of it kept, KL {trusted.kl:.3g}"
        seen = trusted.proposed_kl
        return [event(step, "trust_region", seen=seen, limit=limit, action=action, reason=reason)]

    def _skip_events(self, step: int) -> list[Record]:
        if not self._skipped:
            return []
        reason = f"loss or gradient not finite in {self._skipped} of {self._steps} optimizer steps"
        return [
            event(
                step, "non_finite", seen=self._skipped, limit=0, action="skip_step", reason=reason
            )
        ]
