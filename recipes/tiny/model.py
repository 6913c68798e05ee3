"""The Falcon that is trained: the arithmetic of longwing.models.falcon over rows of equal length.

longwing's own model reads packed sequences from paged memory, one token or many; training wants
rectangles and long fused stretches. So it has this twin, whose parameters carry the checkpoint's
names and whose logits are longwing's (tests/tiny_model compares them). `save` makes a folder that
every verb of longwing takes.

The one idea for speed: all that works token by token is done on (N, ·) with N = B * T the same at
every length, so `torch.compile` compiles each stretch once; attention alone sees rows.

Shape key: N tokens of all rows, B rows, T tokens of a row, D model dim, M MLP dim, Q query heads,
K KV heads, H head dim, V vocabulary, R rotary frequencies.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longwing.rope import RopeConfig
from longwing.tokenizer import NAMED_TEMPLATES

EMBEDDING = "transformer.word_embeddings.weight"
END = 11
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Falcon with grouped keys and values, a parallel block and two norms in it.

    `vocab_size` is Falcon's 65,024 and FalconLite2's two tokens, rounded up to a multiple of 16.
    """

    vocab_size: int = 65_040
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    mlp_size: int = 1024

    @property
    def head_dim(self) -> int:
        """Width of one head; Falcon's is 64."""
        return self.hidden_size // self.num_heads


class Falcon(nn.Module):
    """Tokens to hidden states, and the embedding that makes logits of them.

    Args:
        shape: the sizes.
        rope: the rotary settings; a plain base is all that training needs.
        compiled: fuse the stretches between attentions; for CUDA.
    """

    def __init__(self, shape: Shape, rope: RopeConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.shape, self.rope = shape, rope
        self.embedding_VD = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.final_norm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPS)
        before, after = _before_attention, _after_attention
        self._before, self._after = (fused(before), fused(after)) if compiled else (before, after)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> hidden states after the final norm, (N, D)."""
        B, T = tokens_BT.shape
        cos_TR, sin_TR = self._rotation(T, tokens_BT.device)
        rotation_NR = cos_TR.repeat(B, 1), sin_TR.repeat(B, 1)
        hidden_ND = self.embedding_VD[tokens_BT.flatten()]
        for block in self.blocks:
            q_NQH, k_NKH, v_NKH, mlp_ND = self._before(hidden_ND, *rotation_NR, *block.first())
            attended_ND = _attend(q_NQH, k_NKH, v_NKH, B)
            hidden_ND = self._after(hidden_ND, mlp_ND, attended_ND, block.out_DD)
        return self.final_norm(hidden_ND)

    def _rotation(self, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(T, R) cosines and sines, from angles in float64."""
        R = self.shape.head_dim // 2
        inv_freq_R = self.rope.theta ** (-torch.arange(R, dtype=torch.float64, device=device) / R)
        angles_TR = torch.arange(T, dtype=torch.float64, device=device)[:, None] * inv_freq_R
        return angles_TR.cos().float(), angles_TR.sin().float()


class Block(nn.Module):
    """The parameters of one block; what is done with them stands in two functions below."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D, M = shape.hidden_size, shape.mlp_size
        self.groups = (shape.num_kv_heads, shape.num_heads // shape.num_kv_heads + 2)
        self.attention_norm = nn.LayerNorm(D, eps=NORM_EPS)
        self.mlp_norm = nn.LayerNorm(D, eps=NORM_EPS)
        small = 0.02 / math.sqrt(2 * shape.num_layers)  # what adds to the residual
        self.qkv_OD = nn.Parameter(torch.randn(math.prod(self.groups) * shape.head_dim, D) * 0.02)
        self.out_DD = nn.Parameter(torch.randn(D, D) * small)
        self.up_MD = nn.Parameter(torch.randn(M, D) * 0.02)
        self.down_DM = nn.Parameter(torch.randn(D, M) * small)

    def first(self) -> tuple[object, ...]:
        """What `_before_attention` needs of the block."""
        norms = (self.attention_norm, self.mlp_norm)
        scales = [part for norm in norms for part in (norm.weight, norm.bias)]
        return (*scales, self.qkv_OD, self.up_MD, self.down_DM, self.groups)


def _before_attention(
    x_ND: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    attention_scale_D: Tensor,
    attention_shift_D: Tensor,
    mlp_scale_D: Tensor,
    mlp_shift_D: Tensor,
    qkv_OD: Tensor,
    up_MD: Tensor,
    down_DM: Tensor,
    groups: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms, the MLP, queries, keys and values, the first two turned."""
    D = x_ND.shape[1:]
    for_attention_ND = F.layer_norm(x_ND, D, attention_scale_D, attention_shift_D, NORM_EPS)
    for_mlp_ND = F.layer_norm(x_ND, D, mlp_scale_D, mlp_shift_D, NORM_EPS)
    grouped = F.linear(for_attention_ND, qkv_OD).unflatten(-1, (*groups, -1))
    q_NQH = _rotate(grouped[:, :, :-2].flatten(1, 2), cos_NR, sin_NR)
    k_NKH = _rotate(grouped[:, :, -2], cos_NR, sin_NR)
    mlp_ND = F.linear(F.gelu(F.linear(for_mlp_ND, up_MD)), down_DM)
    return q_NQH, k_NKH, grouped[:, :, -1].contiguous(), mlp_ND


def _after_attention(x_ND: Tensor, mlp_ND: Tensor, attended_ND: Tensor, out_DD: Tensor) -> Tensor:
    """One addition for both branches."""
    return x_ND + (mlp_ND + F.linear(attended_ND, out_DD))


def _rotate(x_NhH: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Half-split rotation, as Falcon's."""
    first, second = x_NhH.float().chunk(2, -1)
    cos, sin = cos_NR[:, None], sin_NR[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x_NhH.dtype)


def _attend(q_NQH: Tensor, k_NKH: Tensor, v_NKH: Tensor, B: int) -> Tensor:
    """Causal attention within each row, (N, Q * H)."""
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q_NQH, k_NKH, v_NKH))
    with sdpa_kernel(ATTENTION, set_priority=True):
        out_BQTH = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out_BQTH.transpose(1, 2).reshape(len(q_NQH), -1)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, once for each shape of its inputs."""
    return torch.compile(function, dynamic=False)


ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""Ways to attend, the first that can is taken."""


def checkpoint_names(shape: Shape) -> dict[str, str]:
    """Parameter of `Falcon` -> tensor of the checkpoint."""
    names = {
        "embedding_VD": EMBEDDING,
        "final_norm.weight": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
    }
    inside = {
        "attention_norm.weight": "ln_attn.weight",
        "attention_norm.bias": "ln_attn.bias",
        "mlp_norm.weight": "ln_mlp.weight",
        "mlp_norm.bias": "ln_mlp.bias",
        "qkv_OD": "self_attention.query_key_value.weight",
        "out_DD": "self_attention.dense.weight",
        "up_MD": "mlp.dense_h_to_4h.weight",
        "down_DM": "mlp.dense_4h_to_h.weight",
    }
    for layer in range(shape.num_layers):
        for ours, theirs in inside.items():
            names[f"blocks.{layer}.{ours}"] = f"transformer.h.{layer}.{theirs}"
    return names


def save(model: Falcon, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write a model folder: settings, tokenizer, template and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    names = checkpoint_names(model.shape)
    tensors = {names[name]: value.detach() for name, value in model.named_parameters()}
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_settings(folder, model.shape, model.rope, str(dtype).removeprefix("torch."))
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, without line ends and spaces."""
    described = json.loads(tokenizer.to_str())
    compact = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")


def write_settings(folder: Path, shape: Shape, rope: RopeConfig, dtype: str) -> None:
    """config.json, generation_config.json, tokenizer_config.json and chat_template.jinja."""
    config = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 2,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "ffn_hidden_size": shape.mlp_size,
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "layer_norm_epsilon": NORM_EPS,
        "tie_word_embeddings": True,
        "bos_token_id": END,
        "eos_token_id": END,
        "dtype": dtype,
        **rope.to_hf(),
    }
    ends = {"bos_token_id": END, "eos_token_id": END}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "add_bos_token": False,
        "model_max_length": rope.max_len,
    }
    settings = {
        "config.json": config,
        "generation_config.json": ends,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, value in settings.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    template = NAMED_TEMPLATES["falconlite2"].source
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def load(folder: Path, rope: RopeConfig | None = None, *, compiled: bool = False) -> Falcon:
    """Read a folder that `save` wrote; `rope` replaces its rotary settings."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_kv_heads"],
        mlp_size=raw["ffn_hidden_size"],
    )
    own = RopeConfig.from_hf(
        raw, head_dim=shape.head_dim, max_position=raw["max_position_embeddings"]
    )
    model = Falcon(shape, rope or own, compiled=compiled)
    tensors = load_file(folder / "model.safetensors")
    names = checkpoint_names(shape)
    model.load_state_dict({ours: tensors[theirs].float() for ours, theirs in names.items()})
    return model


def plain_rope(shape: Shape, theta: float, trained_len: int) -> RopeConfig:
    """Rotary settings without any extension."""
    return RopeConfig(
        method="default",
        head_dim=shape.head_dim,
        theta=theta,
        trained_len=trained_len,
        max_len=trained_len,
    )
