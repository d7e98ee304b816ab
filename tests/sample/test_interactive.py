import io

import pytest

from uvit.config.sample import SampleConfig
from uvit.errors import UserError
from uvit.sample.interactive import SETTINGS, change_setting, interactive

GIVEN = SampleConfig("p", seed=3, guidance_scale=(2.0,))


def talk(text: str, monkeypatch: pytest.MonkeyPatch, drawn: list, draw=None) -> None:  # type: ignore[no-untyped-def]
    def note(config: SampleConfig, prompt: str) -> None:
        drawn.append((prompt, config.seed, config.guidance_scale))
        if draw:
            draw(prompt)

    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    interactive(GIVEN, note)


def test_draws_each_line_until_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    drawn: list = []
    talk("a\n\n  b \n/num_images_per_prompt 4\nc\n/seed 9\n/guidance_scale 1 7.5\nd", monkeypatch, drawn)
    assert drawn == [("a", 3, (2.0,)), ("b", 4, (2.0,)), ("c", 5, (2.0,)), ("d", 9, (1.0, 7.5))]
    assert "Ctrl-D quits" in capsys.readouterr().out


def test_a_mistake_or_an_interrupted_drawing_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def draw(prompt: str) -> None:
        raise {"a": UserError("the disk is full"), "b": KeyboardInterrupt()}[prompt]

    drawn: list = []
    talk("a\nb\n/banana 1\n", monkeypatch, drawn, draw)
    assert [(prompt, seed) for prompt, seed, _ in drawn] == [("a", 3), ("b", 3)]
    out = capsys.readouterr().out
    assert "error: the disk is full" in out
    assert "stopped" in out
    assert "error: /banana: there is no such setting" in out


def test_every_setting_is_a_flag_and_is_shown(capsys: pytest.CaptureFixture) -> None:
    assert change_setting(GIVEN, "", GIVEN) is GIVEN
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "/seed 3"
    assert "/guidance_scale 2\n" in out
    for name in SETTINGS:
        assert f"/{name} " in out
        assert hasattr(GIVEN, name)


def test_a_setting_goes_back_to_what_the_command_said() -> None:
    config = change_setting(change_setting(GIVEN, "negative-prompt a blue dog", GIVEN), "seed 8", GIVEN)
    assert (config.negative_prompt, config.seed) == ("a blue dog", 8)
    config = change_setting(change_setting(config, "negative_prompt", GIVEN), "seed", GIVEN)
    assert config == GIVEN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sed 5", "/sed: .* did you mean /seed"),
        ("seed five", "/seed five: must be a whole number"),
        ("guidance_scale 2 x", "/guidance_scale 2 x: must be a number, or several"),
        ("num_inference_steps 0", "--num_inference_steps 0: must be in"),
        ("strength 0.5", "--strength 0.5: needs an --init_image"),
    ],
)
def test_mistakes_are_named(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        change_setting(GIVEN, words, GIVEN)
