"""How to add a corpus: a recipe that says where its text lies below $DSQ_DATA, and how a model is trained on it.

Its table's rows may name what a folder of your own adds, here a number format: given after --, it is known to all
commands of the recipe.
"""

RECIPE = """
kind: translation
about: Numbers, German to English.
corpus: {source: de, target: en, folder: numbers, test: held-out}
test: held-out numbers
methods: rows.yaml
vocab: 40
epochs: 1
train: >-
  --arch transformer_dsq --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 16
  --encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings --max-tokens 400 --cpu
  --criterion dsq_label_smoothed_cross_entropy --optimizer adam --lr 1e-2
search: --beam 1
"""
ROWS = "small-boxes: {format: small, levels: '[4,4,4,16]'}"
PLUGIN = """
import fairseq_dsq
from fairseq_dsq import formats

formats.register("small", lambda q, options: formats.parse(f"bfp{options.bits(q)}/4"))
"""
GERMAN, ENGLISH = (["eins", "zwei", "drei", "vier"], ["one", "two", "three", "four"])


def test_a_new_corpus(cli, tmp_path):
    folder = tmp_path / "data" / "numbers"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("valid", 8), ("held-out", 8)):
        for language, words in (("de", GERMAN), ("en", ENGLISH)):
            lines = (f"{words[number % 4]} {words[number // 4 % 4]}\n" for number in range(count))
            (folder / f"{split}.{language}").write_text("".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("rows.yaml", str(tmp_path / "rows.yaml")))
    (tmp_path / "rows.yaml").write_text(ROWS)
    (tmp_path / "small_boxes").mkdir()
    (tmp_path / "small_boxes/__init__.py").write_text(PLUGIN)
    command = (
        "fairseq-dsq", "run", tmp_path / "recipe.yaml", "--runs", tmp_path / "runs", "--", "--user-dir",
        tmp_path / "small_boxes",
    )  # fmt: skip
    out, _ = cli.run(*command, DSQ_DATA=str(tmp_path / "data"))
    assert "held-out numbers sacreBLEU: " in out
    assert "bfp4/4" in out  # in the table, which is made of the run's checkpoint
    # The folder's code, but not what Python compiles of it, is a setting of the run, as its flags are.
    again, _ = cli.run(*command, DSQ_DATA=str(tmp_path / "data"))
    assert again.partition("| Method")[2] == out.partition("| Method")[2] != ""
    (tmp_path / "small_boxes/__init__.py").write_text(PLUGIN.replace("/4", "/8"))
    _, err = cli.run(*command, DSQ_DATA=str(tmp_path / "data"), code=2)
    assert "small-boxes-seed1: made with --user-dir " in err.splitlines()[0]
