"""`Packer` in Spark's ``mapInArrow``, and its rows read again; skipped without pyspark and Java."""

from __future__ import annotations

import shutil
import sys

import pictures
import pyarrow as pa
import pytest
from datasets import Dataset, Features, load_dataset

import packpipe

sql = pytest.importorskip("pyspark.sql")
types = pytest.importorskip("pyspark.sql.pandas.types")
pytestmark = [
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support:FutureWarning"),
]


@pytest.fixture(scope="module")
def spark():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYSPARK_PYTHON", sys.executable)
        patched.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        session = sql.SparkSession.builder.master("local[2]")
        session = session.config("spark.ui.enabled", "false").getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


IMAGES = pictures.dataset_of(pictures.encoded_images())
TOKENS = Dataset.from_dict(
    {"input_ids": [[1, 2, 3], [4], [5, 6, 7], [8] * 5], "name": list("abcd")}
)


@pytest.mark.parametrize(
    ("source", "seq_len"), [(IMAGES, 48), (TOKENS, 8)], ids=["images", "tokens"]
)
def test_rows_of_spark_are_those_of_the_whole_table(spark, source, seq_len, tmp_path):
    source.to_parquet(tmp_path / "source.parquet")
    frame = spark.read.parquet(str(tmp_path / "source.parquet")).coalesce(1)
    packer = packpipe.Packer(seq_len)
    wanted = packer(source.data.table)
    # Spark wants to know the columns before: of any row.
    first = frame.limit(1).toArrow()
    plain = next(packer(iter(first.to_batches()))).schema
    rows = frame.mapInArrow(packer, types.from_arrow_schema(plain))
    assert pa.table(rows.toArrow()).cast(wanted.schema).equals(wanted)
    rows.write.parquet(str(tmp_path / "rows"))
    files = str(tmp_path / "rows" / "*.parquet")
    written = load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")
    packed = written.cast(Features.from_arrow_schema(packer(first).schema))
    assert packed.data.table.to_pydict() == wanted.to_pydict()
    loader = packpipe.PackedLoader(packed, 1, as_numpy=True)
    found = sum(int((batch["seq_lens"] > 0).sum()) for batch in loader)
    assert found == len(packpipe.read_rows(wanted).seq_lens) > 3
