"""How many workers sample and score, and where."""

from __future__ import annotations

from pydantic import Field

from exalign.rollout.settings import VLLMSettings
from exalign.settings import Settings


class ClusterSettings(Settings):
    """A pool of workers on Ray for the stages that sample and score; it changes speed, never a completion."""

    workers: int = Field(1, ge=1, description="processes that each hold the model and take one shard after another")
    address: str | None = Field(
        None,
        min_length=1,
        description="a running Ray cluster, as host:port; None: one on this machine, for the stage alone",
    )
    cpus_per_worker: int = Field(1, ge=1, description="threads that each worker computes with on the processor")
    gpus_per_worker: int | None = Field(
        None, ge=0, description="GPUs of each worker; None: one where the cluster has any, else none"
    )
    tries: int = Field(
        4, ge=1, description="how often a shard is begun anew because its worker died, before the stage fails"
    )
    vllm: VLLMSettings | None = Field(
        None, description="sample with vLLM, which draws other completions; None: by transformers, as without a cluster"
    )
