"""One configuration, three faces: the C table, the string, the dataclass."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from asrkf_gguf import FreezeConfig, KVError, _native
from asrkf_gguf.config import POLICIES, PRESETS


def test_the_dataclass_has_exactly_the_keys_of_the_table():
    assert [field.name for field in dataclasses.fields(FreezeConfig)] == ["policy", *(row["name"] for row in _native.config_table())]


def test_policies_are_in_the_order_of_the_c_enum():
    for value, name in enumerate(POLICIES):
        config = _native.struct("asrkf_config")
        _native.check(_native.lib.asrkf_config_default(value, config))
        assert _native.format_config(config).split(",")[0] == name


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resolved_configuration_reads_back_as_itself(policy: str):
    resolved = FreezeConfig(policy, pool=0.25, ema=0.85, host_limit="1GiB").resolved()
    again = FreezeConfig.from_string(",".join([policy, *(f"{key}={value}" for key, value in resolved.items() if key != "policy" and value)]))
    assert again.resolved() == resolved
    assert resolved["ema"] == "0.85"
    assert resolved["host_limit"] == str(1 << 30)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"policy": "asrfk"}, 'did you mean "asrkf"'),
        ({"pool": 0}, "pool=0 must be positive"),
        ({"pool": -256}, "pool=-256 must be positive"),
        ({"pool": 1.5}, "at most 1.0"),
        ({"pool": "12 bananas"}, "unknown unit"),
        ({"ema": 1.0}, "ema=1.0 is out of range [0, 0.999]"),
        ({"interval": 0}, "interval=0 is out of range [1, 1024]"),
        ({"score": "atention"}, 'did you mean "attention"'),
        ({"pinned": "10-5"}, "empty range"),
        ({"pinned": "0-5,window=3"}, "no comma"),
    ],
)
def test_bad_values_are_refused_with_key_value_and_range(arguments: dict, part: str):
    with pytest.raises(ValueError) as error:
        FreezeConfig(**arguments)
    assert part in str(error.value)


@pytest.mark.parametrize("value", [True, [512], {"cells": 1}, b"512"])
def test_wrong_types_are_refused(value: object):
    with pytest.raises(TypeError, match="pool="):
        FreezeConfig(pool=value)


def test_unknown_keys_of_a_string_are_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match='"pol" is unknown; did you mean "pool"'):
        FreezeConfig.from_string("asrkf,pol=512")


def test_a_string_has_the_values_that_the_fields_have():
    text = "asrkf,interval=16,ema=0.5,timer_share=0,pool=2048,host_limit=8GiB,layers=two"
    config = FreezeConfig.from_string(text)
    assert config == FreezeConfig(interval=16, ema=0.5, timer_share=0, pool=2048, host_limit="8GiB", layers="two")
    assert config.with_pool(2048) is not None and sorted(config.to_string().split(",")) == sorted(text.split(","))
    for pool in ("auto", "512MiB", "33%"):
        assert FreezeConfig.from_string(f"asrkf,pool={pool}").pool == pool
    assert FreezeConfig.from_string("asrkf,pool=0.25") == FreezeConfig(pool=0.25)


@pytest.mark.parametrize(("preset", "percent"), list(zip(PRESETS, ("50%", "33.3%", "12.5%"), strict=True)))
def test_a_preset_is_a_policy_with_a_part_of_the_bytes(preset, percent):
    assert FreezeConfig(preset).resolved() == FreezeConfig(pool=percent).resolved()
    with pytest.raises(ValueError, match=f'did you mean "{preset}"'):
        FreezeConfig(preset[:-1])


def test_two_pools_contradict_each_other():
    with pytest.raises(ValueError, match="contradicts"):
        FreezeConfig(pool=512).with_pool(1024)


def test_an_error_of_the_cache_keeps_text_and_status_in_a_pickle():
    error = pickle.loads(pickle.dumps(KVError("pool is full", 4)))
    assert str(error) == "pool is full" and error.status is _native.KVStatus.POOL_FULL
