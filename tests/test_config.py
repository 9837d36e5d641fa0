"""Every shipped configuration loads; every typo is told with file, key, reason and way out."""

import pytest
import yaml
from conftest import CONFIGS

from npd_ascend.config import dump_config, load_config
from npd_ascend.errors import UserError

ADDITION = CONFIGS / "addition_cpu.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    load_config(path)


def test_the_saved_copy_loads_to_the_same(tmp_path):
    config = load_config(ADDITION, ["run.seed=3"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_are_typed():
    config = load_config(ADDITION, ["npd.lambda=0.5", "npd.refresh_after=[1, 2]", "filters.tau=null"])
    assert config.npd.lambda_ == 0.5
    assert config.npd.refresh_after == (1, 2)
    assert config.filters.tau is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("npd.epoch=3", "unknown key npd.epoch; known keys there: epochs,"),
        ("npd.optimizer.lrr=3", "unknown key npd.optimizer.lrr; known keys there: lr,"),
        ("data.gold.digits=3", "unknown key data.gold.addition.digits; known keys there: kind, first, count"),
        ("nonsense.key=3", "unknown key nonsense; known keys there: run,"),
        ("npd.epochs=many", "npd.epochs: Input should be a valid integer"),
        ("npd.lambda=1.5", "npd.lambda: Input should be less than or equal to 1"),
        ("npd.epochs", "'npd.epochs' is not key=value"),
        ("run.name.x=1", "name is a value, not a section"),
        ("npd.refresh_after=[5, 20]", "must rise and lie between 1 and epochs-1=9"),
        ("npd.optimizer.min_lr=1", "min_lr=1.0 is above lr"),
        ("teacher=null", "npd needs teacher"),
        ("data.gold=null", "sft needs data.gold"),
        ("sft=null", "student.init=random without sft"),
        ("filters.max_tokens=99999", "lower the first or raise the second"),
        ("rollout.engine=vlm", "rollout.engine: Input should be 'hf'"),
    ],
)
def test_a_wrong_setting_is_told_with_key_and_reason(override, said):
    with pytest.raises(UserError) as error:
        load_config(ADDITION, [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_quantile_tau_is_a_share():
    with pytest.raises(UserError, match=r"tau=1.5 is no quantile"):
        load_config(ADDITION, ["filters.tau_mode=quantile", "filters.tau=1.5"])


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "not YAML"), ("- a", "want a mapping"), (yaml.dump({"run": {"name": "x"}}), "student")]
)
def test_a_file_that_is_no_configuration(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
