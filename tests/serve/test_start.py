import sys

import pytest

from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.start import serve


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not there
    with pytest.raises(UserError, match=r"^uvit serve needs uvicorn; pip install 'uvit\[serve\]'$"):
        serve(ServeConfig(("x",)))
