"""What the package datasets saves to disk, as a source of `npd prepare`, which does without the package."""

from importlib.util import find_spec

import pytest

if find_spec("datasets") is None:
    pytest.skip("datasets is not installed; launch/test.sh has it here", allow_module_level=True)

import datasets

from npd_ascend.errors import UserError
from npd_ascend.prepare.sources import SourceConfig, files_of, read_rows


def test_rows_are_those_that_datasets_loads(tmp_path):
    """In their order, from several files, and not those of the caches that it keeps in the folder."""
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(9)]
    made = datasets.Dataset.from_dict({"chat": turns}).shuffle(seed=1).select(range(7))
    made.save_to_disk(tmp_path / "one", num_shards=2)
    loaded = datasets.load_from_disk(tmp_path / "one")
    loaded.map(lambda row: {"chat": row["chat"][:1]})
    loaded.filter(lambda row: row["chat"][0]["content"] > "q4")
    assert len(list((tmp_path / "one").glob("cache-*.arrow"))) == 2
    source = SourceConfig(path=tmp_path / "one", prompt_key="chat")
    rows = [row for file in files_of(source) for row in read_rows(source, file)]
    assert [(row.prompt, row.answer) for row in rows] == [tuple(m["content"] for m in chat) for chat in loaded["chat"]]

    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"two: holds the splits train, test; name one of them, as .*two/train"):
        files_of(SourceConfig(path=tmp_path / "two"))
    assert len(files_of(SourceConfig(path=tmp_path / "two" / "train"))) == 1
