"""From a MODEL argument and the load options to a generator, with progress."""

from pathlib import Path

from longwing.checkpoint import Checkpoint
from longwing.cli.console import progress, warn
from longwing.cli.options import LoadOptions, find_model, length, parse_rope
from longwing.engine.generator import Generator
from longwing.engine.generator import load as load_folder
from longwing.models import ModelConfig


def load_generator(model: str, options: LoadOptions) -> Generator:
    """Load a model as the options say."""
    folder = find_model(model)
    config = read_config(folder)
    if config.unknown:
        warn(f"config.json has fields longwing does not know: {', '.join(config.unknown)}")
    with progress(f"loading {folder.name}", in_bytes=True) as advance:
        return load_folder(
            folder,
            device=options.device,
            dtype=options.dtype,
            context=None if options.context is None else length(options.context),
            rope=None if options.rope is None else parse_rope(options.rope, config.rope),
            progress=advance,
        )


def read_config(folder: Path) -> ModelConfig:
    """config.json of a model folder."""
    return ModelConfig.from_hf(Checkpoint.open(folder).config)
