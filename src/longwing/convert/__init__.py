"""Foreign model files into folders that longwing (and transformers) load.

`convert_gguf` converts a GGUF model of the Llama family; `tokenizer_from_gguf` rebuilds a tokenizer
alone. Loading what was written is left to `longwing.checkpoint` and `longwing.models`.

Inside: `gguf_header` walks a file and believes nothing, `gguf_file` hands out fields and tensors,
`llama` and `rope_settings` say what they mean, `vocabulary` and `tokenizer` rebuild tokenizer.json,
`conversion` puts the folder together.
"""

from longwing.convert.conversion import ConvertReport, convert_gguf
from longwing.convert.tokenizer import tokenizer_from_gguf

__all__ = ["ConvertReport", "convert_gguf", "tokenizer_from_gguf"]
