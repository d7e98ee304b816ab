"""The beginning of `uvit serve`: whether what it needs beside uvit is installed."""

import importlib
import importlib.util

from uvit.config.serve import ServeConfig
from uvit.errors import UserError

NEEDED = {"fastapi": "fastapi", "multipart": "python-multipart", "uvicorn": "uvicorn"}  # {module: distribution}


def serve(config: ServeConfig) -> None:
    """Run the command. Raises UserError if it cannot start."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"uvit serve needs {', '.join(missing)}; pip install 'uvit[serve]'")
    importlib.import_module("uvit.serve.server").run_server(config)
