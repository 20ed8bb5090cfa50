"""The mathematics of alignment as pure functions: `[B, K]` tensors in, `[B]` nats out.

Two targets (rewards, a preference) times a family of divergences; beside them what people compare it with:
`policy_gradient` (PPO on tokens; RLOO, GRPO, GSPO) and `contrastive` (SimPO, IPO, ORPO, CPO, KTO; reward models). A
training loss is one line of composition:

>>> import torch
>>> policy_logp = torch.tensor([[-10.0, -12.0]], requires_grad=True)
>>> reference_logp = torch.tensor([[-11.0, -11.0]])
>>> p = log_policy_distribution(policy_logp, reference_logp, beta_pi=0.1)
>>> t = log_preference_target(torch.tensor([0]), num_completions=2, epsilon=1e-3)
>>> exo_pref, dpo_pref = reverse_kl(p, t), forward_kl(p, t)
>>> print(f"EXO {exo_pref.item():.4f}, DPO {dpo_pref.item():.4f}")
EXO 2.4220, DPO 0.5983
"""

from exalign.objectives.contrastive import (
    bradley_terry_loss,
    cpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    per_token,
    preference_accuracy,
    simpo_loss,
)
from exalign.objectives.divergences import alpha_divergence, forward_kl, jeffreys, jensen_shannon, reverse_kl
from exalign.objectives.estimators import (
    OptimalFrontier,
    effective_sample_size,
    group_spread,
    kl_estimate,
    log_importance_weights,
    optimal_frontier,
    reward_correlation,
    saturated,
    weighted_mean,
)
from exalign.objectives.matching import log_policy_distribution, log_preference_target, log_reward_target
from exalign.objectives.policy_gradient import (
    adapted_kl_coefficient,
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_value_loss,
    divided_by_spread,
    explained_variance,
    generalised_advantages,
    group_mean_advantages,
    is_clipped,
    leave_one_out_advantages,
    penalised_rewards,
    token_advantages,
    token_kl_penalty,
    token_rewards,
    whiten,
)
