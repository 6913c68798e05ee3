"""TGI's launcher flags, and what each of them is here.

`start_falconlite.sh` and a SageMaker container hand a server flags and environment variables made
for text-generation-launcher 1.0.3. Those with the same name and meaning are fields of
`ServerOptions` and `LoadOptions`; this file holds the rest: those that are called differently here,
those that are checked, and those that have nothing to act on. None is dropped without a word.
"""

import logging
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from longwing.cli.options import LoadOptions
from longwing.engine.options import EngineOptions
from longwing.errors import ConfigError
from longwing.server.options import ServerOptions

_log = logging.getLogger(__name__)

_ROPE_SCALING = ("linear", "dynamic")

_SAGEMAKER = {
    "model_id": "HF_MODEL_ID",
    "revision": "HF_MODEL_REVISION",
    "quantize": "HF_MODEL_QUANTIZE",
    "num_shard": "SM_NUM_GPUS",
    "trust_remote_code": "HF_MODEL_TRUST_REMOTE_CODE",
}

_OURS = (
    "host", "hostname", "device", "context", "rope", "memory",
    "ui", "admin_key", "model_dir", "runs_dir",
)  # fmt: skip
"""Names that other programs use for their own ends (a shell's HOST, a container's HOSTNAME)."""


def variables(name: str) -> list[str]:
    """The environment variables of a `serve` option: ours, TGI's, and SageMaker's."""
    found = [f"LONGWING_{name.upper()}"]
    if name not in _OURS:
        found.append(name.upper())
    if name in _SAGEMAKER:
        found.append(_SAGEMAKER[name])
    # Kubernetes tells a service named longwing as LONGWING_PORT=tcp://10.0.0.1:8080.
    return [word for word in found if not os.environ.get(word, "").startswith("tcp://")]


def _flag(help_text: str, *, without_effect: bool = False) -> Any:
    return field(
        default=None,
        metadata={
            "help": help_text,
            "hidden": without_effect,
            "without_effect": without_effect,
        },
    )


def _no_effect(why: str) -> Any:
    return _flag(f"Accepted, without effect: {why}.", without_effect=True)


@dataclass(frozen=True, kw_only=True)
class LauncherFlags:
    """Flags of text-generation-launcher that are not fields of our own options.

    Raises:
        ConfigError: a value that TGI would refuse, or that would change what is served.
    """

    model_id: str | None = _flag("The model, in place of the argument.")
    revision: str | None = _flag("Branch, tag or commit to pull.")
    quantize: str | None = _flag(
        "gptq is accepted: what a model is packed in, its folder says. Others are refused."
    )
    num_shard: int | None = _flag("The same as --tensor-parallel: GPUs that share the model.")
    sharded: bool | None = _flag("Without --num-shard: all GPUs there are share the model.")
    hostname: str | None = _flag("The same as --host.")
    max_input_tokens: int | None = _flag("The same as --max-input-length.")
    max_batch_prefill_tokens: int | None = _flag(
        "Checked against --max-input-length. Prompts are read in chunks of --max-batch-tokens."
    )
    max_batch_total_tokens: int | None = _flag(
        "Tokens the KV cache holds, in place of --num-pages."
    )
    rope_scaling: str | None = _flag("linear or dynamic, with --rope-factor; --rope can say more.")
    rope_factor: float | None = _flag("The factor of --rope-scaling.")
    dntk_alpha_scaler: float | None = _flag(
        "FalconLite's alpha: the same as --rope falconlite,alpha=…."
    )
    api_key: str | None = _flag("One key, as --api-keys.")
    graceful_termination_timeout: float | None = _flag("The same as --drain-s.")
    trust_remote_code: bool | None = _no_effect("no code of a model's folder is ever run")
    waiting_served_ratio: float | None = _no_effect("new requests join every step")
    max_waiting_tokens: int | None = _no_effect("new requests join every step")
    shard_uds_path: str | None = _no_effect("shards find each other by themselves")
    master_addr: str | None = _no_effect("shards find each other by themselves")
    master_port: int | None = _no_effect("shards find each other by themselves")
    huggingface_hub_cache: str | None = _no_effect("models lie where `longwing pull` puts them")
    weights_cache_override: str | None = _no_effect("weights are read from the model's folder")
    disable_custom_kernels: bool | None = _no_effect("kernels are chosen by the device")
    json_output: bool | None = _no_effect("logs are JSON")
    otlp_endpoint: str | None = _no_effect("nothing is sent to anybody")
    watermark_gamma: float | None = _no_effect("there is no watermark")
    watermark_delta: float | None = _no_effect("there is no watermark")
    gptq_bits: int | None = _no_effect("the model's folder says it")
    gptq_groupsize: int | None = _no_effect("the model's folder says it")

    def __post_init__(self) -> None:
        if self.quantize not in (None, "gptq"):
            raise ConfigError(
                f'--quantize "{self.quantize}" is not offered; quantise the model once with '
                "`longwing quantize`, and serve the result"
            )
        if self.num_shard is not None and self.num_shard < 1:
            raise ConfigError("`num_shard` cannot be < 1")
        if self.sharded and self.num_shard == 1:
            raise ConfigError("`sharded` is true but `num_shard` <= 1")
        if self.rope_scaling not in (None, *_ROPE_SCALING):
            raise ConfigError(
                f'--rope-scaling "{self.rope_scaling}" is not one of {", ".join(_ROPE_SCALING)}'
            )
        if self.rope_factor is not None and self.rope_scaling is None:
            raise ConfigError("--rope-factor needs --rope-scaling")

    @property
    def without_effect(self) -> list[tuple[str, str]]:
        """Flags that were given and change nothing, each with the reason."""
        found = [
            (f"--{item.name.replace('_', '-')}", item.metadata["help"].partition(": ")[2])
            for item in fields(self)
            if item.metadata["without_effect"] and getattr(self, item.name) not in (None, False)
        ]
        return found

    def load(self, options: LoadOptions) -> LoadOptions:
        """The RoPE flags as --rope."""
        words = None
        if self.rope_scaling is not None:
            factor = 1.0 if self.rope_factor is None else self.rope_factor
            words = f"{self.rope_scaling},factor={factor}"
        if self.dntk_alpha_scaler is not None:
            if words is not None:
                raise ConfigError("--rope-scaling and --dntk-alpha-scaler contradict")
            words = f"falconlite,alpha={self.dntk_alpha_scaler}"
        if words is None:
            return options
        if options.rope is not None:
            raise ConfigError(f"--rope {options.rope} and TGI's flags for {words} contradict")
        return replace(options, rope=words)

    def engine(self, options: EngineOptions) -> EngineOptions:
        """The cache's size in pages, and how many GPUs share the model."""
        changes: dict[str, Any] = {}
        if self.max_batch_total_tokens is not None:
            if options.num_pages is not None:
                raise ConfigError("--num-pages and --max-batch-total-tokens say the same twice")
            changes["cache_tokens"] = self.max_batch_total_tokens
        shards = self.num_shard
        if self.sharded and shards is None:
            shards = torch.cuda.device_count()
            if shards < 2:
                raise ConfigError(f"--sharded shares a model among GPUs, and there are {shards}")
        if shards is not None:
            if options.tensor_parallel not in (1, shards):
                raise ConfigError(
                    f"--tensor-parallel {options.tensor_parallel} and TGI's flags for {shards} "
                    "GPUs contradict"
                )
            changes["tensor_parallel"] = shards
        return replace(options, **changes)

    def server(self, options: ServerOptions) -> ServerOptions:
        """The flags that are called differently here, and TGI's checks between flags."""
        changes: dict[str, Any] = {
            "host": self.hostname,
            "max_input_length": self.max_input_tokens,
            "drain_s": self.graceful_termination_timeout,
            "api_keys": None if self.api_key is None else (*options.api_keys, self.api_key),
        }
        options = replace(options, **{k: v for k, v in changes.items() if v is not None})
        prefill, total = self.max_batch_prefill_tokens, self.max_batch_total_tokens
        longest = options.max_input_length
        if prefill is not None and longest is not None and prefill < longest:
            raise ConfigError(
                "`max_batch_prefill_tokens` must be >= `max_input_length`. "
                f"Given: {prefill} and {longest}"
            )
        if prefill is not None and total is not None and prefill > total:
            raise ConfigError(
                "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. "
                f"Given: {prefill} and {total}"
            )
        most = options.max_total_tokens
        if most is not None and total is not None and most > total:
            raise ConfigError(
                f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {most} and {total}"
            )
        return options
