"""Every shipped configuration loads; every typo is told with file, key, reason and way out."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS
from pydantic import BaseModel

from npd_ascend.__main__ import main
from npd_ascend.config import dump_config, load_config
from npd_ascend.config_file import load_yaml, override
from npd_ascend.errors import UserError
from npd_ascend.runfolder import open_run, reopen_run

ADDITION, TEACHER = CONFIGS / "addition_cpu.yaml", CONFIGS / "addition_teacher.yaml"


@pytest.mark.parametrize(
    "path",
    sorted({*CONFIGS.glob("*.yaml"), *CONFIGS.glob("repro/*/*.yaml")} - {*CONFIGS.glob("repro/*/eval.yaml")}),
    ids=lambda p: str(p.relative_to(CONFIGS)),
)
def test_every_shipped_configuration_loads(path):
    load_config(path)


def test_the_saved_copy_loads_to_the_same(tmp_path):
    config = load_config(ADDITION, ["run.seed=3"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_are_typed():
    overrides = ["npd.lambda=0.5", "npd.refresh_after=[1, 2]", "filters.tau=null", "parallel.recompute=off"]
    config = load_config(ADDITION, overrides)
    assert config.parallel.recompute == "off"  # YAML reads a bare off as false
    assert config.npd.lambda_ == 0.5
    assert config.npd.refresh_after == (1, 2)
    assert config.filters.tau is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("npd.epoch=3", "unknown key npd.epoch; known keys there: pack_tokens,"),
        ("npd.optimizer.lrr=3", "unknown key npd.optimizer.lrr; known keys there: lr,"),
        ("data.gold.digits=3", "unknown key data.gold.addition.digits; known keys there: kind, first, count"),
        ("nonsense.key=3", "unknown key nonsense; known keys there: run,"),
        ("npd.epochs=many", "npd.epochs: Input should be a valid integer"),
        ("npd.lambda=1.5", "npd.lambda: Input should be less than or equal to 1"),
        ("npd.epochs", "'npd.epochs' is not key=value"),
        ("npd.refresh_after=[3", "'npd.refresh_after=[3': the value is not YAML"),
        ("run.name.x=1", "name is a value, not a section"),
        ("npd.refresh_after=[5, 20]", "must rise and lie between 1 and epochs-1=9"),
        ("npd.optimizer.min_lr=1", "min_lr=1.0 is above lr"),
        ("teacher=null", "npd needs teacher"),
        ("data.prompts={kind: reasoning_gym, datasets: [a], count: 1, parameters: {b: {}}}", "are there for b, which"),
        (
            "data.prompts={kind: reasoning_gym, datasets: [a], count: 1, parameters: {a: {size: 2}}}",
            "parameters.a.size follows from the other keys",
        ),
        (
            "data.prompts={kind: reasoning_gym, datasets: [a], count: 1, parameters: {a: {first: [2020-01-01]}}}",
            "parameters.a.first=2020-01-01 is a date",
        ),
        ("data.gold=null", "sft needs data.gold"),
        ("filters.max_tokens=99999", "lower the first or raise the second"),
        ("rollout.dtype=fp8", "rollout.dtype: Input should be"),
        ("teacher.engine=served", "served needs a url"),
        ("teacher.url=http://127.0.0.1:8000", "local has none"),
        ("rollout.engine=vlm", "rollout.engine: Input should be 'hf' or 'vllm'"),
        ("rollout={engine: vllm, temperature: 0.001, max_new_tokens: 6}", "which would take 0.01"),
        ("rollout.weights=memory", "rollout: weights=memory needs engine=vllm; set that, or weights: disk"),
        ("rollout.weights=device", "rollout: weights=device needs engine=vllm; set that, or weights: disk"),
        ("rollout={weights: device, engine: vllm, max_new_tokens: 6}", "weights=device needs npd.stream or grpo"),
    ],
)
def test_a_wrong_setting_is_told_with_key_and_reason(override, said):
    with pytest.raises(UserError) as error:
        load_config(ADDITION, [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_random_weights_want_sft():
    with pytest.raises(UserError, match=r"student.init=random without sft"):
        load_config(ADDITION, ["student.init=random", "sft=null"])


def test_quantile_tau_is_a_share():
    with pytest.raises(UserError, match=r"tau=1.5 is no quantile"):
        load_config(ADDITION, ["filters.tau_mode=quantile", "filters.tau=1.5"])


def test_weights_from_device_to_device_want_a_device():
    settings = ["npd.stream={}", "npd.refresh_after=[]", "rollout.engine=vllm", "rollout.weights=device"]
    with pytest.raises(UserError, match=r"weights=device needs an accelerator, device\.kind is cpu; set weights"):
        load_config(ADDITION, settings)
    assert load_config(ADDITION, [*settings, "device.kind=npu"]).rollout.weights == "device"
    with pytest.raises(UserError, match=r"weights=device is for one host; with processes\.ray set it to disk"):
        load_config(ADDITION, [*settings, "device.kind=npu", "processes.ray=10.0.0.1:6379"])


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "not YAML"), ("- a", "want a mapping"), (yaml.dump({"run": {"name": "x"}}), "student")]
)
def test_a_file_that_is_no_configuration(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not a text file"):
        load_config(tmp_path)


def test_a_run_may_go_on_elsewhere_but_not_as_another(tmp_path, caplog):
    folder = f"run.folder={tmp_path / 'run'}"
    open_run(load_config(ADDITION, [folder]))
    saved = tmp_path / "run" / "config.yaml"
    # a folder of a version that did not know the key yet
    saved.write_text(saved.read_text().replace("  timeout_s: 600\n", ""))
    changed = load_config(ADDITION, [folder, "parallel.dp=2", "npd.checkpoint_every_steps=7"])
    open_run(changed)
    assert "parallel.dp=2 instead of 1" in caplog.text
    assert load_config(saved) == changed
    with pytest.raises(UserError, match=r"sft\.optimizer\.lr was 0\.003, is 0\.001"):
        open_run(load_config(ADDITION, [folder, "sft.optimizer.lr=0.001"]))


@pytest.mark.parametrize("name", ["exp #3", "a: b", "[1, 2]", "null", "ümlaut 🙂", '"quoted"'])
def test_a_folder_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(ADDITION, [override("run.folder", name)])
    assert config.run.folder == tmp_path / name
    open_run(config)
    assert reopen_run(Path(name)).path == tmp_path / name
    open_run(config)  # and goes on there


def test_a_section_that_is_null_in_a_saved_configuration_may_be_set(tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(load_config(ADDITION)))
    assert load_config(saved, ["npd.stream.max_lag=2", "npd.refresh_after=[]"]).npd.stream.max_lag == 2
    with pytest.raises(UserError, match=r"override 'run.name.x=2': name is a value, not a section"):
        load_config(saved, ["run.name.x=2"])


def test_a_key_that_stands_twice_is_told_with_its_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run:\n  name: x\n  seed: 2\n  seed: 3\n")
    with pytest.raises(UserError, match=r"c.yaml: not YAML: seed stands there twice .*line 4"):
        load_config(file)


def test_a_mapping_as_a_key_is_told_with_its_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run:\n  {name: x}: 2\n")
    with pytest.raises(UserError, match=r"c.yaml: not YAML: .*unhashable.*line 2"):
        load_config(file)


def test_a_key_may_take_the_place_of_one_from_an_anchor(tmp_path):
    class Two(BaseModel):
        a: dict[str, int]
        b: dict[str, int]

    (tmp_path / "c.yaml").write_text("a: &one {x: 1, y: 2}\nb: {<<: *one, y: 3}\n")
    assert load_yaml(Two, tmp_path / "c.yaml", ()).b == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run.seed=-1", "run.seed: Input should be greater than or equal to 0"),
        ("teacher.url=http://127.0.0.1:9/v1", "teacher.url: want http://HOST:PORT, without /v1 or another path"),
    ],
)
def test_a_value_that_cannot_be_is_told(word, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(ADDITION, ["teacher.engine=served", word])


def test_the_example_of_the_first_script_is_one():
    said = (CONFIGS.parent / "launch" / "npd_cpu.sh").read_text()
    load_config(ADDITION, re.search(r"for example: (.*)", said)[1].split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rollout", "--run"], "no npd section"),
        (["score", "--run"], "no npd section"),
        (["distill", "--run"], "no npd section"),
        (["run", "--dry-run", "npd.lambda=0.5", "--run"], "overrides (npd.lambda=0.5) go with --config"),
        (
            ["run", "--dry-run", "--config", str(CONFIGS / "addition_teacher.yaml"), "sft.epochs=2"],
            "sft.epochs was 1, is 2",
        ),
    ],
)
def test_a_command_that_cannot_be_is_told_in_one_line(tmp_path, capsys, arguments, said):
    folder = tmp_path / "run"
    open_run(load_config(TEACHER, [f"run.folder={folder}"]))
    arguments = [*arguments, str(folder)] if arguments[-1] == "--run" else [*arguments, f"run.folder={folder}"]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_pruning_a_folder_without_weights_is_refused(addition_student, tmp_path, capsys):
    (addition_student / "model.safetensors").unlink()
    assert main(["prune", str(addition_student), str(tmp_path / "cut"), "--keep", "0"]) == 2
    assert "model.safetensors: no such file" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_the_student_of_the_addition_pair_is_the_cut_that_its_configuration_names(tmp_path):
    assert main(["prune", str(CONFIGS / "addition" / "teacher"), str(tmp_path / "cut"), "--keep", "0,3"]) == 0
    modes = {(tmp_path / "cut" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # whoever may read one may read the other
    for file in (tmp_path / "cut").iterdir():
        assert file.read_bytes() == (CONFIGS / "addition" / "student" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("key", ["attention", "layer"])
def test_a_kernel_that_cannot_run_here_is_refused_before_anything_starts(key, tmp_path, capfd):
    folder = tmp_path / "run"
    assert main(["run", "--config", str(ADDITION), f"run.folder={folder}", f"kernels.{key}=npu"]) == 2
    said = capfd.readouterr().err
    assert f"kernels.{key}: npu cannot run here: it needs an Ascend NPU, and the tensors are on cpu" in said
    assert "Traceback" not in said
    assert not (folder / "weights").exists()
    # and the folder is still free for what was meant
    assert main(["run", "--dry-run", "--config", str(ADDITION), f"run.folder={folder}"]) == 0


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_told(place, tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}.get(place, place)
    assert main(["sft", "--config", str(TEACHER), f"run.folder={folder}"]) == 2
    assert f"run.folder: {folder}: " in capsys.readouterr().err


def test_a_set_that_the_run_does_not_have_is_told(tmp_path, capsys):
    open_run(load_config(ADDITION, [f"run.folder={tmp_path / 'run'}"]))
    assert main(["rollout", "--run", str(tmp_path / "run"), "--set", "7"]) == 2
    assert "--set 7: the run has 2, counted from 0" in capsys.readouterr().err
