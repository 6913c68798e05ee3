"""`ModelFolder`: a folder read as far as costs nothing: settings, headers, tokenizer.

Before gigabytes of weights, so that a folder at fault, or a model that the device cannot hold, is
refused at once.
"""

from dataclasses import dataclass
from pathlib import Path

from longwing.checkpoint import Checkpoint
from longwing.models import DTYPES, ModelConfig, end_ids, with_rope
from longwing.plan import PREFILL_CHUNK, Plan, WeightBytes, plan
from longwing.rope import RopeConfig, parse_rope
from longwing.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a folder says of its model.

    Attributes:
        path: the folder.
        checkpoint: its tensors' headers and settings.
        config: the model.
        tokenizer: its tokenizer, which knows what ends an answer.
    """

    path: Path
    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, path: str | Path, rope: RopeConfig | str | None = None) -> "ModelFolder":
        """Read a folder.

        Args:
            path: the folder.
            rope: RoPE settings in place of the model's own, or words for them ("theta=1e6").

        Raises:
            CheckpointError: it cannot be used; says which file, and why.
        """
        checkpoint = Checkpoint.open(path)
        config = ModelConfig.from_hf(checkpoint.config)
        if isinstance(rope, str):
            rope = parse_rope(rope, config.rope)
        if rope is not None:
            config = with_rope(config, rope)
        tokenizer = Tokenizer.from_folder(
            Path(path), eos_ids=end_ids(checkpoint.generation_config, config.vocab_size)
        )
        return cls(path=Path(path), checkpoint=checkpoint, config=config, tokenizer=tokenizer)

    @property
    def quantization(self) -> str:
        """How the weights are packed, in words."""
        quant = self.checkpoint.quant
        return "none" if quant is None else f"gptq {quant.bits}-bit group {quant.group_size}"

    def plan(
        self,
        *,
        context: int,
        dtype: str = "auto",
        kv_dtype: str | None = None,
        memory: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Plan | None:
        """What the model needs, as longwing.plan; None for kinds of folders it cannot plan."""
        quant = self.checkpoint.quant
        if quant is not None and (quant.overrides or quant.lm_head):
            return None
        word = self.config.dtype if dtype == "auto" else dtype
        return plan(
            self.config,
            quant=quant,
            context=context,
            dtype=word if word in DTYPES else "bfloat16",
            kv_dtype=kv_dtype,
            memory=memory,
            prefill_chunk=prefill_chunk,
            name=self.path.name,
        )

    def part_bytes(self, weights: WeightBytes, ranks: int) -> int:
        """The bytes that one of so many ranks has of some weights, at most.

        Whole on every rank are the embedding, the norms, a head of a vocabulary that does not
        divide, and, with act-order, scales and zero points. Half of the matrices are split by their
        inputs, and with act-order those are filled up to whole cells, by about a quarter.
        """
        quant = self.checkpoint.quant
        split = weights.packed + weights.g_idx + weights.linears
        whole = weights.embedding + weights.norms_and_biases
        if ranks > 1 and quant is not None and quant.desc_act:
            split += weights.qweight // 8 - weights.scales - weights.zeros
            whole += weights.scales + weights.zeros
        if self.config.vocab_size % ranks:
            whole += weights.head
        else:
            split += weights.head
        return whole + -(-split // ranks)
