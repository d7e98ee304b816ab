import pytest

from uvit.errors import UserError


def test_a_user_error_is_a_value_error_so_that_callers_in_python_may_catch_it() -> None:
    with pytest.raises(ValueError, match="--flag 3: too small"):
        raise UserError("--flag 3: too small")
