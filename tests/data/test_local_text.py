import gzip
import json
import sys

from megatron_ttt.data import local_text
from megatron_ttt.data.local_text import write_local_corpus
from megatron_ttt.data.reader import MalformedLines, read_documents


def test_shards_are_c4_of_the_asked_size_and_the_same_every_time(tmp_path):
    sizes = {"train_shards": 2, "max_train_bytes": 300_000, "max_validation_bytes": 8_000}
    corpus = write_local_corpus(tmp_path / "a", **sizes)
    again = write_local_corpus(tmp_path / "b", **sizes)
    assert [path.name for path in corpus.train_shards] == [
        "c4-train.00000-of-00002.json.gz",
        "c4-train.00001-of-00002.json.gz",
    ]
    assert corpus.validation_shard.name == "c4-validation.00000-of-00001.json.gz"
    for path in [*corpus.train_shards, corpus.validation_shard]:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert again.train_bytes == corpus.train_bytes

    malformed = MalformedLines()
    train = list(read_documents(corpus.train_shards, malformed))
    validation = list(read_documents([corpus.validation_shard], malformed))
    assert malformed.count == 0
    assert (len(train), len(validation)) == (corpus.train_documents, corpus.validation_documents)
    assert sum(len(text.encode()) for text in train) == corpus.train_bytes <= 300_000
    assert sum(len(text.encode()) for text in validation) == corpus.validation_bytes <= 8_000
    assert corpus.train_bytes > 290_000
    assert corpus.validation_bytes > 0
    assert len({*train, *validation}) == len(train) + len(validation)
    assert min(map(len, train + validation)) >= 200


def test_docstrings_are_read_from_the_source_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "numpy"
    (package / "tests").mkdir(parents=True)
    source = '''"""module {0}"""
raise SystemExit("this code must not run")
if True:
    class A:
        """class {0}"""
        async def f(self):
            """method {0}"""
    def half(): "half a pair: \\ud800 {0}"
x = """no docstring {0}"""
'''.format("word " * 50)
    (package / "core.py").write_text(source)
    (package / "copy.py").write_text(source)
    (package / "broken.py").write_text("def f(:")
    (package / "latin.py").write_bytes(b'"""\xff"""')
    (package / "tests" / "test_core.py").write_text(f'"""a test {"word " * 50}"""')
    paths = {key: str(tmp_path / "site") for key in ["purelib", "platlib"]}
    monkeypatch.setattr(
        local_text.sysconfig, "get_paths", lambda: {**paths, "stdlib": str(tmp_path / "none")}
    )
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(local_text, "_VALIDATION_SHARE", 0)
    corpus = write_local_corpus(tmp_path / "out", train_shards=1)
    texts = list(read_documents(corpus.train_shards, MalformedLines()))
    assert [text.split()[0] for text in texts] == ["module", "class", "method"]
    assert corpus.validation_documents == 0
    lines = gzip.decompress(corpus.train_shards[0].read_bytes()).splitlines()
    assert [json.loads(line)["url"] for line in lines] == [
        "docstring://numpy.copy/",
        "docstring://numpy.copy/A",
        "docstring://numpy.copy/f",
    ]
