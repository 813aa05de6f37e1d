"""Scaled positions, as config.json says them in any of the ways that transformers reads."""

from typing import Any

import pytest

from edgebuild import positions

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, []),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, []),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, []),
        ({"rope_scaling": "yarn"}, []),
        ({"rope_scaling": {"type": "su", "long_factor": [2.0]}}, [{"rope_type": "longrope", "long_factor": [2.0]}]),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}, [YARN]),
        ({"rope_scaling": {**YARN, "attention_factor": 1.138629}}, [YARN]),  # what the factor gives of itself
        ({"rope_scaling": {**YARN, "attention_factor": None}}, [YARN]),
        ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, [{**YARN, "attention_factor": 1.0}]),
        ({"rope_scaling": {"rope_type": "yarn", "attention_factor": "x", "factor": 10**400}}, [{"rope_type": "yarn"}]),
        ({"rope_scaling": {"rope_type": "\x1b", "a": [[1]], "b": float("nan")}}, [{"rope_type": "\\u001b"}]),
    ],
)
def test_what_a_configuration_says(config: dict[str, Any], found: list[dict[str, Any]]) -> None:
    assert positions.of_config(config) == found


def test_the_older_name_stands_beside_the_newer() -> None:
    assert positions.with_old_names({"rope_scaling": YARN, "vocab_size": 8}) == {
        "rope_scaling": {**YARN, "type": "yarn"},
        "vocab_size": 8,
    }
    assert positions.with_old_names({"rope_scaling": None}) == {"rope_scaling": None}
