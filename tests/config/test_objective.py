import re
from typing import Any

import pytest

from uvit.config.objective import ObjectiveConfig
from uvit.config.train import TrainConfig
from uvit.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"path": "linear"}, "--prediction_type epsilon: does not determine x_0 .* flow_prediction or sample"),
        ({"path": "vp_zero_snr"}, "--prediction_type epsilon: does not determine x_0 .* v_prediction or sample"),
        ({"path": "linear", "prediction_type": "v_prediction"}, "v_prediction: is defined on .* use flow_prediction"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction: is defined on other paths; with path vp, use eps"),
        ({"snr_gamma": 5.0, "loss_type": "v"}, "--snr_gamma 5 and --loss_type v: choose one"),
        ({"snr_gamma": 5.0, "loss_weight_max": 2.0}, "--loss_weight_max 2: leave it out with --snr_gamma"),
        ({"loss_type": "x", "loss_weight_max": 2.0}, "--loss_weight_max 2: .* use --loss_type v or epsilon"),
        ({"prediction_type": "sample", "loss_weight_max": 2.0}, "--loss_weight_max 2: .* use --loss_type"),
        ({"logit_mean": 0.8}, "--logit_mean 0.8: needs --timestep_sampling logit_normal"),
        ({"uniform_share": 0.25}, "--uniform_share 0.25: needs --timestep_sampling logit_normal"),
        ({"timestep_sampling": "logit_normal", "uniform_share": 1.0}, "--uniform_share 1.0: must be"),
        ({"timestep_shift": 0.0}, "--timestep_shift 0.0: must be above 0"),
        ({"align_block": 3}, "--align_block 3: needs --align"),
        ({"align_until": 0.5}, "--align_until 0.5: needs --align"),
        ({"align": "sra", "align_until": 2.5}, "--align_until 2.5: must be a number of steps, or a fraction below 1"),
        ({"align": "sra", "align_until": 0.0}, "--align_until 0.0: must be above 0"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        TrainConfig("features", "output", **flags)
    assert re.search(message, str(error.value)), error.value


def test_the_weight_of_an_x_0_prediction_has_a_limit_where_it_would_grow() -> None:
    sample: dict[str, Any] = {"prediction_type": "sample"}
    assert ObjectiveConfig(**sample, loss_type="v").loss_settings()["loss_weight_max"] == 400
    assert ObjectiveConfig(**sample, loss_type="v", loss_weight_max=6.25).loss_settings()["loss_weight_max"] == 6.25
    assert ObjectiveConfig(**sample).loss_settings()["loss_weight_max"] is None
    assert ObjectiveConfig(loss_type="v").loss_settings()["loss_weight_max"] is None
