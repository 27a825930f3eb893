"""Every feature of PEFT that is said to be served says what PEFT says, in batches of all of them."""

import warnings

import pytest

from tests import parity

NOT_SERVED = {
    ("mixtral", "all-linear, rslora, patterns"): "refused: target_parameters is",
    ("mixtral", "saved layer"): "refused: module model.layers.0.mlp.gate cannot be replaced here: Mixtral",
}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-tied", "gpt2", "gemma3-tied", "mixtral"])
def test_all_features_in_one_batch_say_what_peft_says(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dict(parity.cells(parity.SHAPES[name], parity.FEATURES, tmp_path))
    shape = parity.SHAPES[name]
    for feature, needs in [("base", ""), *((own, parity.FEATURES[own].needs) for own in parity.FEATURES)]:
        if needs and not shape.has(needs):
            assert found[feature].startswith("n/a: "), feature
        elif (name, feature) in NOT_SERVED:
            assert found[feature].startswith(NOT_SERVED[name, feature])
        else:
            assert found[feature] == "equal", feature


def test_the_command_fails_for_any_other_cell(monkeypatch, capsys):
    said = {"use_dora": "equal", "lora_bias": "refused: because", "bias all": "n/a: no biases"}
    monkeypatch.setattr(parity, "cells", lambda *_: iter(said.items()))
    assert parity.main(["--architecture", "llama"]) == 0
    said["lm_head"] = "DIFFERS in 1 of 3 rows"
    assert parity.main(["--architecture", "llama"]) == 1
    assert "DIFFERS in 1 of 3 rows" in capsys.readouterr().out
