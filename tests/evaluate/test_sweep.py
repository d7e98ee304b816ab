"""Every combination once; the best on one half, judged on the other; the front of the plot."""

from uvit.config.evaluate import EvaluateConfig
from uvit.evaluate.measure import Score
from uvit.evaluate.sweep import best_setting, list_settings, pareto_front, pareto_plot


def test_settings_are_every_combination_and_labels_say_what_varies() -> None:
    config = EvaluateConfig(
        "m", "o", guidance_scale=(1.0, 2.0), guidance_interval=(1.0, 1000.0, 100.0, 900.0), scheduler=("ddim",)
    ).resolved()
    settings, varied = list_settings(config)
    assert len(set(settings)) == 4 and varied == ["guidance_scale", "guidance_interval"]
    assert settings[1].label(varied) == "guidance_scale 1.0, guidance_interval 100 900"
    assert list_settings(EvaluateConfig("m", "o").resolved())[1] == []


def test_lengths_of_ema_weights_are_swept_beside_the_named_weights() -> None:
    lengths, varied = list_settings(EvaluateConfig("m", "o", ema_lengths=(0.05, 0.1)).resolved())
    assert ([setting.ema for setting in lengths], varied) == (["0.05", "0.1"], ["ema"])
    both, _ = list_settings(EvaluateConfig("m", "o", ema=("raw",), ema_lengths=(0.1,)).resolved())
    assert [setting.ema for setting in both] == ["raw", "0.1"]


def test_the_best_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    first = [[Score("fid", value, "lower")] for value in (3.0, 1.0, 2.0)]
    second = [[Score("fid", value, "lower")] for value in (1.0, 5.0, 2.0)]
    best = best_setting(first, second)
    assert (best["setting"], best["value_on_the_half_that_chose"], best["value_on_the_other_half"]) == (1, 1.0, 5.0)
    higher = [[Score("clip", value, "higher")] for value in (3.0, 1.0, 2.0)]
    assert best_setting(higher, higher)["setting"] == 0


def test_the_front_has_the_settings_that_no_other_beats_in_both_scores() -> None:
    x = [Score("fid", value, "lower") for value in (1.0, 2.0, 3.0, 2.5)]
    y = [Score("clip", value, "higher") for value in (10.0, 20.0, 30.0, 19.0)]
    assert pareto_front(x, y) == [0, 1, 2]
    image = pareto_plot(["a", "b", "c", "d"], x, y)
    assert image.size == (720, 540)
    assert pareto_plot(["a"], x[:1], y[:1]).size == (720, 540)  # axes without a range
