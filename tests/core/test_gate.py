"""The gate's rules, each alone and together."""

import math

import pytest

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.core.gate import judge
from mlops_dagster.core.spec import Gate


def test_default_is_the_seeds_accuracy_above_nine_tenths():
    assert judge(Gate(), {"accuracy": 0.91}, {"accuracy": 0.5}, None).passed
    assert not judge(Gate(), {"accuracy": 0.89}, {"accuracy": 0.5}, None).passed


def test_champion_on_the_same_rows_sets_the_limit_less_the_tolerance():
    gate = Gate(minimum=0.5, tolerance_to_champion=0.01)
    assert judge(gate, {"accuracy": 0.80}, {"accuracy": 0.5}, {"accuracy": 0.81}).passed
    assert not judge(gate, {"accuracy": 0.79}, {"accuracy": 0.5}, {"accuracy": 0.81}).passed


def test_gain_over_the_baseline_replaces_the_default_limit():
    gate = Gate(gain_over_baseline=0.02)
    result = judge(gate, {"accuracy": 0.60}, {"accuracy": 0.57}, None)
    assert result.passed
    assert [rule.name for rule in result.rules] == ["accuracy over the naive baseline"]


def test_for_an_error_less_is_better():
    gate = Gate(metric="mean_absolute_error", maximum=10, gain_over_baseline=1)
    assert judge(gate, {"mean_absolute_error": 8}, {"mean_absolute_error": 9.5}, {"mean_absolute_error": 8}).passed
    assert not judge(gate, {"mean_absolute_error": 9}, {"mean_absolute_error": 9.5}, None).passed
    assert not judge(gate, {"mean_absolute_error": 8.1}, {"mean_absolute_error": 9.5}, {"mean_absolute_error": 8}).passed


def test_a_value_that_is_no_number_never_passes():
    assert not judge(Gate(), {"accuracy": math.nan}, {"accuracy": 0.5}, None).passed
    assert not judge(Gate(), {"accuracy": 0.95}, {"accuracy": 0.5}, {"accuracy": math.nan}).passed


def test_a_metric_that_was_not_computed_is_named():
    with pytest.raises(DeclarationError, match=r"roc_auc.*there are: accuracy"):
        judge(Gate(metric="roc_auc"), {"accuracy": 0.9}, {}, None)


def test_the_result_says_what_failed():
    sentence = judge(Gate(), {"accuracy": 0.8}, {"accuracy": 0.5}, {"accuracy": 0.7}).sentence()
    assert "accuracy limit: 0.8000 against 0.9000: FAILED" in sentence
    assert "beside the champion: 0.8000 against 0.7000: passed" in sentence
