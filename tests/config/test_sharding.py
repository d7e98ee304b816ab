import pytest

from uvit.config.sharding import parse_shard, resolve_shard
from uvit.errors import UserError


@pytest.mark.parametrize("shard", ["4/4", "a", "1", "-1/2", "1/2/3", "0/0", ""])
def test_what_is_no_part(shard: str) -> None:
    with pytest.raises(UserError, match=r"--shard .*must be I/N"):
        parse_shard(shard)


def test_torchrun_or_the_flag_says_which_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parse_shard(None) is None and resolve_shard(None) == (0, 1)
    assert resolve_shard("2/3") == (2, 3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert resolve_shard(None) == (1, 4)
    with pytest.raises(UserError, match="--shard 2/3: torchrun started 4 processes"):
        resolve_shard("2/3")
