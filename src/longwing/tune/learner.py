"""`Learner`: what of a model is trained, the optimiser over it, and both as tensors and back.

With LoRA the model is frozen in its own number type, packed linears stay packed, and each adapted
linear gets two float32 matrices. With `full` every weight is trained, in float32. Products are
formed in bfloat16 on a GPU (`passes.py`); masters and optimiser are float32 everywhere.

Shape key: I in features, O out features, R rank.
"""

from collections.abc import Callable, Set
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longwing.checkpoint import Checkpoint
from longwing.errors import RequestError, TuningError
from longwing.layers import Linear
from longwing.layers.lora import AdapterChoice, adaptable, wrap
from longwing.models import Decoder, Filler, ModelConfig, empty_model, take_inventory, with_rope
from longwing.rope import RopeConfig
from longwing.tune.attention import install
from longwing.tune.passes import Pass
from longwing.tune.shards import as_sharded, first_row, own_rows, shard, whole
from longwing.tune.spec import TuneSpec
from longwing.tune.state import State

BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """A model, made ready to be trained: filled, adapted and sharded, part by part.

    A part is what lies outside the blocks, then each block; so of a sharded model no more than one
    block is ever whole on one GPU.

    Args:
        model: loaded, or still without storage.
        spec: the run's settings.
        fill: gives a part its weights: "" is what lies outside the blocks, else a block by its
            name with a dot. A loaded model needs none.
        mesh: the processes to shard over; None keeps the model whole.

    Attributes:
        model: the model; its attention takes rows of documents.
        passes: the way through it.
        trained: name -> parameter, in the model's order.
        sharded: whether this process has rows of each tensor only.
    """

    def __init__(
        self,
        model: Decoder,
        spec: TuneSpec,
        *,
        fill: Callable[[str], None] = lambda _part: None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.sharded = mesh is not None
        install(model)
        self._make_ready(fill, mesh)
        self.passes = Pass(model)
        if mesh is not None:
            if not model.config.tie_embeddings:  # one that is the head too is whole until then
                shard(model.embedding, mesh)
            shard(self.passes, mesh, stays=True)
        self.trained: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim <= 1]
        self._kinds = [kind for kind in (matrices, vectors) if kind]
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
        """Numbers that are trained, in all processes together."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def step(self, lr: float) -> float:
        """Clip the gradients, take one step, forget them; the length they had before clipping.

        Raises:
            TuningError: a gradient is not finite; nothing has been changed.
        """
        norms = []
        for kind in self._kinds:  # matrices may be sharded and vectors are not
            gradients = [p.grad for p in kind if p.grad is not None]
            norms.append(whole(torch.nn.utils.get_total_norm(gradients)))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        length = float(norm)
        if not length < float("inf"):  # NaN too
            raise TuningError(
                f"the gradient is {length}: the run has left the rails; go on from the last save "
                f"with a lower --lr than {self.spec.peak_lr:g}, or a longer --warmup"
            )
        if self.spec.clip:
            for kind in self._kinds:
                torch.nn.utils.clip_grads_with_norm_(kind, self.spec.clip, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return length

    @property
    def replicated(self) -> list[nn.Parameter]:
        """What is trained and whole in every process: its gradients must be added up."""
        return [p for p in self.trained.values() if as_sharded(p) is None]

    def state(self, *, first: bool) -> dict[str, Tensor]:
        """This process's rows of weights and moments, all that a later run goes on from.

        They lie where they are used, and change with the next step.

        Args:
            first: whether this is the process that has what is not sharded, too.
        """
        tensors = {}
        for name, parameter in self.trained.items():
            if not first and as_sharded(parameter) is None:
                continue
            tensors[f"weight.{name}"] = own_rows(parameter.detach())
            moments = self.optimiser.state.get(parameter, {})
            for moment in _MOMENTS:
                if moment in moments:
                    tensors[f"{moment}.{name}"] = own_rows(moments[moment])
        return tensors

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Take up a state, this process's rows of it; steps count on from it."""
        for name, parameter in self.trained.items():
            moments = {moment: torch.empty_like(parameter) for moment in _MOMENTS}
            for kind, tensor in {"weight": parameter, **moments}.items():
                rows = own_rows(tensor)
                rows.copy_(state.read(f"{kind}.{name}", first_row(tensor), len(rows)))
            where = parameter.device if self._fused else torch.device("cpu")
            step = torch.tensor(float(state.steps), device=where)
            self.optimiser.state[parameter] = {"step": step, **moments}

    def _make_ready(self, fill: Callable[[str], None], mesh: DeviceMesh | None) -> None:
        """Every part in turn; what lies outside the blocks comes first."""
        model, spec, choice = self.model, self.spec, AdapterChoice()
        generator = torch.Generator().manual_seed(spec.seed)
        chosen = set(target_layers(model, spec.targets))
        fill("")
        model.requires_grad_(spec.full)
        for number, block in enumerate(model.blocks):
            part = f"{model.BLOCKS}.{number}."
            fill(part)
            block.requires_grad_(spec.full)
            if not spec.full:
                self._adapt(part, chosen, choice, generator)
            if mesh is not None:
                shard(block, mesh)

    def _adapt(
        self, part: str, chosen: Set[str], choice: AdapterChoice, generator: torch.Generator
    ) -> None:
        """Wrap what is adapted, and every packed linear, through which gradients must pass."""
        spec = self.spec
        for name, linear in list(adaptable(self.model)):
            if not name.startswith(part):
                continue
            if name in chosen:
                layer = wrap(self.model, name, choice)
                layer.begin(spec.rank, spec.alpha / spec.rank, generator)
                layer.A_RI.requires_grad_(True)
                layer.B_OR.requires_grad_(True)
            elif isinstance(linear, Linear) and linear.bits:
                wrap(self.model, name, choice)


def load_learner(
    checkpoint: Checkpoint,
    spec: TuneSpec,
    *,
    device: torch.device,
    context: int,
    rope: RopeConfig | None,
    mesh: DeviceMesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Learner:
    """A folder's model in the number types it is tuned in, ready to be trained.

    Args:
        checkpoint: the folder.
        spec: the run's settings.
        device: where this process computes.
        context: longest document, in tokens.
        rope: the RoPE settings to tune under; None for ALiBi.
        mesh: the processes to shard over; None keeps the model whole.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: the folder cannot be used.
    """
    config = ModelConfig.from_hf(checkpoint.config)
    model = empty_model(config if rope is None else with_rope(config, rope), context)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    filler = Filler(
        model=model,
        checkpoint=checkpoint,
        device=device,
        dtype=torch.float32 if spec.full or device.type == "cpu" else torch.bfloat16,
        unpack=False,
        progress=progress,
    )
    blocks = f"{model.BLOCKS}."
    outside = replace(
        inventory,
        dense={own: name for own, name in inventory.dense.items() if not own.startswith(blocks)},
        packed=[name for name in inventory.packed if not name.startswith(blocks)],
    )

    def fill(part: str) -> None:
        filler.fill(inventory if part else outside, part)

    learner = Learner(model.eval(), spec, fill=fill, mesh=mesh)
    model.place_tables(device)
    return learner


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
