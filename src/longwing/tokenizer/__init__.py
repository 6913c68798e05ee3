"""Text to token ids and back: tokenizer.json, chat templates, streams.

tokenizer = Tokenizer.from_folder("models/falcon-7b")
ids = tokenizer.encode("Hello")
ids = tokenizer.chat([{"role": "user", "content": "Hello"}], template="falconlite2")
stream = tokenizer.stream()
text = stream.push(ids[0]) + stream.flush()

tokenizer.py      the class
backend.py        the tokenizers library, made from the files
files.py          the files of a model folder, read within limits
decode_stream.py  ids to text, all at once or as they come
chat.py           chat templates; the named ones
guard.py          special tokens that users typed stay text
sandbox.py        runs a template, metered
meter.py          time and size of a rendering
"""

from longwing.tokenizer.chat import NAMED_TEMPLATES, ChatTemplate
from longwing.tokenizer.decode_stream import DecodeStream
from longwing.tokenizer.tokenizer import Tokenizer

__all__ = ["NAMED_TEMPLATES", "ChatTemplate", "DecodeStream", "Tokenizer"]
