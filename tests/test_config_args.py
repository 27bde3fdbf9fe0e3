"""Arguments of config files, and how overrides are told from other flags."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.config_args import parse_arg, split_overrides
from cosr_jax.types import UserError


def test_parse_arg_reads_every_type():
    options = parse_arg("small,rate=0.5,n=7,name=x", small=False, rate=1.0, n=1, name="", big=True)
    assert vars(options) == {"small": True, "rate": 0.5, "n": 7, "name": "x", "big": True}
    assert parse_arg("big=false", big=True).big is False
    assert vars(parse_arg("", n=1)) == {"n": 1}


@pytest.mark.parametrize("arg", ["smal", "n=x", "n", "small=perhaps", "rate=1,nn=2"])
def test_parse_arg_names_a_wrong_argument(arg):
    with pytest.raises(UserError, match="config argument"):
        parse_arg(arg, small=False, n=1, rate=1.0)


WORDS = st.text(st.characters(codec="ascii", exclude_characters="-\0"), min_size=1, max_size=8)
KEYS = st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,6})?", fullmatch=True)
#: One item of a command line as (its words, the override it means or None).
ITEMS = st.one_of(
    st.builds(lambda k, v: ([f"--config.{k}={v}"], f"--config.{k}={v}"), KEYS, WORDS),
    st.builds(lambda k, v: ([f"--config.{k}", v], f"--config.{k}={v}"), KEYS, WORDS),
    st.builds(lambda k: ([f"--noconfig.{k}"], f"--noconfig.{k}"), KEYS),
    st.builds(lambda k, v: ([f"--{k.replace('.', '_')}={v}"], None), KEYS, WORDS),
)


@given(st.lists(ITEMS))
def test_overrides_are_split_off_in_order(items):
    overrides, others = split_overrides([word for words, _ in items for word in words])
    assert overrides == [override for _, override in items if override is not None]
    assert others == [word for words, override in items if override is None for word in words]


def test_a_bare_override_before_a_flag_takes_no_value():
    args = ["--config.lora.rank_stabilised", "--workdir", "x", "--config=f.py"]
    assert split_overrides(args) == (args[:1], args[1:])
