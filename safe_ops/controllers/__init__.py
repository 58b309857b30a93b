"""Control laws, and the module that holds the state of one."""

from safe_ops.controllers.adaptive_kl import AdaptiveKL, AdaptiveKLState
from safe_ops.controllers.base import ControlLaw, Controller, flatten_state
from safe_ops.controllers.ema import EMA, EMAState
from safe_ops.controllers.entropy_gated import EntropyGatedKL, EntropyGatedKLState
from safe_ops.controllers.lagrangian import PIDLagrangian, PIDLagrangianState
from safe_ops.controllers.momentum import Momentum, MomentumState
from safe_ops.controllers.phase import PHASE_NAMES, Phase, PhaseState
from safe_ops.controllers.pid import PID, PIDState
from safe_ops.controllers.stability import (
    global_gain,
    kl_excess_bound,
    reward_loop_gain,
    smooth_gain,
    stable_gain,
    stable_gain_with_momentum,
)
from safe_ops.controllers.trust_region import TrustRegion, TrustRegionState, trust_region_scale

__all__ = [
    "EMA",
    "PHASE_NAMES",
    "PID",
    "AdaptiveKL",
    "AdaptiveKLState",
    "ControlLaw",
    "Controller",
    "EMAState",
    "EntropyGatedKL",
    "EntropyGatedKLState",
    "Momentum",
    "MomentumState",
    "PIDLagrangian",
    "PIDLagrangianState",
    "PIDState",
    "Phase",
    "PhaseState",
    "TrustRegion",
    "TrustRegionState",
    "flatten_state",
    "global_gain",
    "kl_excess_bound",
    "reward_loop_gain",
    "smooth_gain",
    "stable_gain",
    "stable_gain_with_momentum",
    "trust_region_scale",
]
