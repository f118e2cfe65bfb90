"""How to add a corpus: a recipe that says where its text lies below $DSQ_DATA, and how a model is trained on it."""

from fairseq_dsq.cli import main

RECIPE = """
kind: translation
about: Numbers, German to English.
corpus: {source: de, target: en, folder: numbers, test: held-out}
test: held-out numbers
vocab: 40
epochs: 1
train: >-
  --arch transformer_dsq --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 16
  --encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings --max-tokens 400 --cpu
  --criterion dsq_label_smoothed_cross_entropy --optimizer adam --lr 1e-2
search: --beam 1
"""
GERMAN, ENGLISH = (["eins", "zwei", "drei", "vier"], ["one", "two", "three", "four"])


def test_a_new_corpus(tmp_path, monkeypatch, capsys):
    (tmp_path / "numbers").mkdir()
    for split, count in (("train", 40), ("valid", 8), ("held-out", 8)):
        for language, words in (("de", GERMAN), ("en", ENGLISH)):
            lines = (f"{words[number % 4]} {words[number // 4 % 4]}\n" for number in range(count))
            (tmp_path / "numbers" / f"{split}.{language}").write_text("".join(lines))
    (tmp_path / "numbers.yaml").write_text(RECIPE)
    monkeypatch.setenv("DSQ_DATA", str(tmp_path))
    assert main(["run", str(tmp_path / "numbers.yaml"), "--runs", str(tmp_path / "runs"), "--format", "bfp"]) == 0
    assert "held-out numbers sacreBLEU: " in capsys.readouterr().out
