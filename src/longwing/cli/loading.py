"""From a model folder and the load options to a generator, with progress."""

import logging
from pathlib import Path

from longwing.checkpoint import read_settings
from longwing.cli.console import progress
from longwing.cli.options import LoadOptions, parse_rope
from longwing.engine.generator import Generator
from longwing.engine.generator import load as load_folder
from longwing.models import ModelConfig
from longwing.plan import parse_context
from longwing.rope import RopeConfig

logger = logging.getLogger(__name__)


def load_generator(folder: Path, options: LoadOptions) -> Generator:
    """Load a model as the options say."""
    with progress(f"loading {folder.name}", in_bytes=True) as advance:
        generator = load_folder(
            folder,
            device=options.device,
            dtype=options.dtype,
            context=None if options.context is None else parse_context(options.context),
            rope=None if options.rope is None else _rope(folder, options.rope),
            progress=advance,
        )
    if unknown := generator.model.config.unknown:
        logger.warning("config.json has fields longwing does not know: %s", ", ".join(unknown))
    return generator


def _rope(folder: Path, text: str) -> RopeConfig:
    """What --rope means for this model."""
    own = ModelConfig.from_hf(read_settings(folder, "config.json")).rope
    return parse_rope(text, own)
