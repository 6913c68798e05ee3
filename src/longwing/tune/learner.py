"""`Learner`: what of a model is trained, the optimiser over it, and both as tensors and back.

With LoRA the model is frozen in its own number type, packed linears stay packed, and each adapted
linear gets two float32 matrices. With `full` every weight is trained, in float32. Products are
formed in bfloat16 on a GPU (`passes.py`); masters and optimiser are float32 everywhere.

Shape key: I in features, O out features, R rank.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longwing.checkpoint import Checkpoint
from longwing.errors import CheckpointError, RequestError, TuningError
from longwing.layers import Linear
from longwing.layers.lora import AdapterChoice, LoRALinear, adaptable, wrap
from longwing.models import Decoder, load_model
from longwing.rope import RopeConfig
from longwing.tune.attention import install
from longwing.tune.spec import TuneSpec

BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """A loaded model, made ready to be trained.

    Args:
        model: as `load_for_tuning` gives it.
        spec: the run's settings.

    Attributes:
        model: the model; its attention takes rows of documents.
        trained: name -> parameter, in the model's order.
        num_frozen: weights that are not trained, packed ones included.
    """

    def __init__(self, model: Decoder, spec: TuneSpec) -> None:
        self.model = model
        self.spec = spec
        self._adapted: dict[str, LoRALinear] = {}
        if spec.full:
            model.requires_grad_(True)
        else:
            self._begin_adapter()
        install(model)
        self.trained: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim <= 1]
        # On a GPU one kernel: the loop over lists holds a fourth copy of everything for a moment.
        self._fused = model.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": spec.weight_decay},
                *([{"params": vectors, "weight_decay": 0.0}] if vectors else []),
            ],
            lr=spec.peak_lr,
            betas=BETAS,
            fused=self._fused,
        )

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def step(self, lr: float) -> float:
        """Clip the gradients, take one step, forget them; the length they had before clipping.

        Raises:
            TuningError: a gradient is not finite; nothing has been changed.
        """
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        length = float(norm)
        if not length < float("inf"):  # NaN too
            raise TuningError(
                f"the gradient is {length}: the run has left the rails; go on from the last save "
                f"with a lower --lr than {self.spec.peak_lr:g}, or a longer --warmup"
            )
        if self.spec.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.spec.clip, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return length

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimiser's moments, on the CPU: all that a later run goes on from."""
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"weight.{name}"] = parameter.detach().cpu()
            moments = self.optimiser.state.get(parameter, {})
            for moment in _MOMENTS:
                if moment in moments:
                    tensors[f"{moment}.{name}"] = moments[moment].cpu()
        return tensors

    def restore(self, read: Callable[[str], Tensor], steps: int) -> None:
        """Take up a state.

        Args:
            read: a tensor of `state` by its name.
            steps: optimiser steps that had been taken.
        """
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(read(f"weight.{name}"))
                if steps:
                    where = parameter.device
                    self.optimiser.state[parameter] = {
                        "step": torch.tensor(float(steps), device=where if self._fused else "cpu"),
                        **{m: read(f"{m}.{name}").to(where) for m in _MOMENTS},
                    }

    def adapter(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Layer name -> (A_RI, B_OR) of the adapter, on the CPU."""
        return {
            name: (layer.A_RI.detach().cpu(), layer.B_OR.detach().cpu())
            for name, layer in self._adapted.items()
        }

    @property
    def target_names(self) -> tuple[str, ...]:
        """Last parts of the adapted layers' names."""
        return tuple(sorted({name.rpartition(".")[2] for name in self._adapted}))

    def _begin_adapter(self) -> None:
        """Wrap what is adapted, and every packed linear, through which gradients must pass."""
        model, spec, choice = self.model, self.spec, AdapterChoice()
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(spec.seed)
        chosen = set(target_layers(model, spec.targets))
        for name, linear in list(adaptable(model)):
            if name in chosen:
                layer = wrap(model, name, choice)
                layer.begin(spec.rank, spec.alpha / spec.rank, generator)
                layer.A_RI.requires_grad_(True)
                layer.B_OR.requires_grad_(True)
                self._adapted[name] = layer
            elif isinstance(linear, Linear) and linear.bits and linear is not model.lm_head:
                wrap(model, name, choice)


def load_for_tuning(
    checkpoint: Checkpoint,
    spec: TuneSpec,
    *,
    device: torch.device,
    context: int,
    rope: RopeConfig | None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model in the number types it is tuned in.

    Raises:
        CheckpointError: the folder cannot be used; or all weights of a packed one are asked for.
    """
    if spec.full and checkpoint.quant is not None:
        raise CheckpointError(
            f"is {checkpoint.quant.bits}-bit GPTQ, whose packed weights cannot be trained",
            file=str(checkpoint.path),
            remedy="leave out --full to tune an adapter on it, or start from the dense model",
        )
    on_cpu = device.type == "cpu"
    return load_model(
        Path(checkpoint.path),
        device=device,
        dtype=torch.float32 if spec.full or on_cpu else torch.bfloat16,
        context=context,
        rope=rope,
        unpack=False,
        progress=progress,
    )


def target_layers(model: Decoder, targets: tuple[str, ...]) -> list[str]:
    """Names of the linears that targets mean; without targets, those of every block.

    Raises:
        RequestError: a target that no linear of a block is called.
    """
    in_blocks = [name for name, _ in adaptable(model) if name.startswith(f"{model.BLOCKS}.")]
    known = sorted({name.rpartition(".")[2] for name in in_blocks})
    for target in targets:
        if target not in known:
            raise RequestError(f'target "{target}" is no layer of this model: {", ".join(known)}')
    return [name for name in in_blocks if not targets or name.rpartition(".")[2] in targets]


def dense_tensors(
    model: Decoder, checkpoint: Checkpoint, names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with the model's numbers, in the checkpoint's types and order.

    Args:
        model: trained in full.
        checkpoint: what it was loaded from.
        names: model tensor -> checkpoint tensor (`Inventory.dense`).
    """
    own = {theirs: ours for ours, theirs in names.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, info in checkpoint.tensors.items():
        if name not in own:  # tables that are computed here
            yield name, checkpoint.read(name)
            continue
        tensor = parameters[own[name]].detach().to(info.dtype).cpu()
        if not bool(torch.isfinite(tensor).all()):
            raise TuningError(f"{name} does not fit {info.dtype}, in which it was stored")
        yield name, tensor.contiguous()
