"""From a model folder and the load options to a generator, with progress."""

import logging
from pathlib import Path

from longwing.cli.console import progress
from longwing.cli.options import LoadOptions
from longwing.engine.generator import Generator
from longwing.engine.generator import load as load_folder
from longwing.plan import parse_context

logger = logging.getLogger(__name__)


def load_generator(folder: Path, options: LoadOptions, adapter: Path | None = None) -> Generator:
    """Load a model as the options say, and an adapter with it."""
    with progress(f"loading {folder.name}", in_bytes=True) as advance:
        generator = load_folder(
            folder,
            device=options.device,
            dtype=options.dtype,
            context=None if options.context is None else parse_context(options.context),
            rope=options.rope,
            adapter=adapter,
            progress=advance,
        )
    if unknown := generator.model.config.unknown:
        logger.warning("config.json has fields longwing does not know: %s", ", ".join(unknown))
    return generator
