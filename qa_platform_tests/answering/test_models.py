"""The layouts of a model on disk, and the errors for a model that cannot answer."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from qa_platform.answering import Answerer
from qa_platform.answering.model import find_model, load_tokenizer
from qa_platform.answering.runtimes.base import WindowBatch
from qa_platform.answering.runtimes.openvino import OpenVinoRuntime
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError
from qa_platform_tests.answering_models import make_bert, make_model

PAIR = ("Who keeps the lighthouse?", "The lighthouse on Ferris Rock is kept by Marta Olsen, who took over in 1987.")

# JSON that is nested too deeply to read.
DEEP = "[" * 100_000
QUERY = "bert__encoder__layer__0__attention__self__query__weight"

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "model")


def configured(**values: object) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def weighing(**tensors: tuple[int, ...]) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        shapes = {name.replace("__", "."): shape for name, shape in tensors.items()}
        save_file({**load_file(path), **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}}, path)

    return change


def tokenizing(**values: object) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def spelling(vocabulary: Callable[[dict[str, int]], dict[str, int]]) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"] = vocabulary(tokenizer["model"]["vocab"])
        path.write_text(json.dumps(tokenizer))

    return change


def adding_a_token(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def written(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def replaced_by_a_folder(name: str) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def deep_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(DEEP)


def split(folder: Path) -> list[str]:
    """Put the weights into two files, as large models have them; returns the files' names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    of_tensor = {tensor: names[number % 2] for number, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if of_tensor[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of_tensor}))
    path.unlink()
    return names


def zeroed(folder: Path, name: str) -> None:
    tensors = load_file(next(folder.glob("model*.safetensors")))
    save_file({tensor: np.zeros_like(values) for tensor, values in tensors.items()}, folder / name)


def test_loading_a_model_tells_nobody_starts_nothing_and_writes_nothing_home(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "seen = []\n"
        "watched = ('socket.getaddrinfo', 'socket.connect', 'os.fork', 'os.exec', 'os.posix_spawn', 'os.system', 'subprocess.Popen')\n"
        "sys.addaudithook(lambda event, _: seen.append(event) if event in watched else None)\n"
        "from qa_platform.answering import Answerer\n"
        f"assert next(Answerer('bundled', threads=1).answer([{PAIR!r}])).answer == 'Marta Olsen'\n"
        "import openvino.tools.ovc.telemetry_utils as telemetry\n"
        "assert telemetry.tm.__name__.endswith('stub'), telemetry.tm\n"
        "assert not seen, seen\n"
    )
    # OpenVINO is silent where it takes itself to be under test.
    quiet = {"CI", "TF_BUILD", "JENKINS_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (written("model.safetensors", ""), r"model\.safetensors is not a complete"),
        (written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 133\n"), "git lfs pull"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), r"model\.safetensors is not a complete"),
        (written("config.json", "[1]"), r"config\.json is not a JSON object"),
        (configured(num_hidden_layers=None), "has no num_hidden_layers"),
        (configured(num_attention_heads=None), "has no num_attention_heads"),
        (configured(num_attention_heads="two"), "'two' for num_attention_heads"),
        (configured(num_attention_heads=3), "3 heads"),
        (configured(num_attention_heads=0), "0 for num_attention_heads, which is not an integer of 1 or more"),
        (configured(num_hidden_layers=9), r"lack bert\.encoder\.layer\.1"),
        (configured(num_hidden_layers=0), "0 for num_hidden_layers, which is not an integer of 1 or more"),
        (configured(num_hidden_layers=-1), "-1 for num_hidden_layers, which is not an integer of 1 or more"),
        (configured(max_position_embeddings=513), r"position_embeddings\.weight has \d+ positions of 513"),
        (configured(num_hidden_layers=1.5), "1.5 for num_hidden_layers, which is not an integer"),
        (configured(num_hidden_layers=math.inf), "inf for num_hidden_layers, which is not a finite number"),
        (configured(num_attention_heads=math.nan), "nan for num_attention_heads, which is not a finite number"),
        (configured(num_attention_heads=True), "True for num_attention_heads, which is not a finite number"),
        (configured(layer_norm_eps=10**400), "0 for layer_norm_eps, which is not a finite number"),
        (configured(architectures=5), "5 is not an extractive"),
        (written("config.json", DEEP), r"config\.json is not JSON"),
        (written("tokenizer_config.json", DEEP), r"tokenizer_config\.json is not JSON"),
        (deep_index, r"index\.json is not JSON"),
        (replaced_by_a_folder("config.json"), r"config\.json cannot be read: Is a directory"),
        (replaced_by_a_folder("tokenizer_config.json"), r"tokenizer_config\.json cannot be read: Is a directory"),
        (tokenizing(do_lower_case=None), "None for do_lower_case, which is not true or false"),
        (tokenizing(do_lower_case="yes"), "'yes' for do_lower_case, which is not true or false"),
        (tokenizing(strip_accents="x"), "'x' for strip_accents, which is not true or false"),
        (spelling(lambda _: {}), "its tokenizer fails on a single letter"),
        (spelling(lambda ids: {token: 5000 + id if token == "##a" else id for token, id in ids.items()}), r"id 5\d+, but its weights have"),
        (adding_a_token, r"embeddings for only \d+ tokens"),
        (weighing(qa_outputs__weight=(3, 16), qa_outputs__bias=(3,)), r"shape \[3, 16\]"),
        (written("tokenizer.json", "{"), r"tokenizer\.json is not a tokenizer"),
    ],
)
def test_a_damaged_model_is_refused_with_what_is_wrong(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        Answerer(str(folder), threads=1).warm_up()
    assert str(raised.value).startswith(f"model {folder}: ")


@pytest.mark.parametrize(
    ("values", "family", "message"),
    [
        ({"max_position_embeddings": math.nan}, "bert", "nan for max_position_embeddings"),
        ({"max_position_embeddings": math.inf}, "bert", "inf for max_position_embeddings"),
        ({"pad_token_id": math.nan}, "roberta", "nan for pad_token_id"),
        ({"pad_token_id": "one"}, "roberta", "'one' for pad_token_id"),
        ({"model_max_length": "512"}, "bert", "'512' for model_max_length"),
        ({"model_max_length": [1]}, "bert", r"\[1\] for model_max_length"),
        ({"model_max_length": math.nan}, "bert", "nan for model_max_length"),
    ],
)
def test_a_window_of_no_certain_length_is_refused(folder: Path, values: dict[str, object], family: str, message: str) -> None:
    configured(**values, model_type=family)(folder)
    tokenizing(**values)(folder)
    with pytest.raises(InputError, match=rf"config\.json has {message}, which is not a finite number") as raised:
        _ = find_model(ModelChoice(str(folder))).longest_window
    assert str(raised.value).startswith(f"model {folder}: ")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "damage",
    [
        weighing(bert__encoder__layer__0__output__dense__weight=(8, 32)),
        weighing(**{QUERY: (16,)}),
        weighing(**{QUERY: (16, 32)}),
        weighing(**{QUERY: (32, 16)}),
        weighing(**{QUERY.replace("query", part): (16,) for part in ("query", "key", "value")}),
        weighing(bert__embeddings__word_embeddings__weight=(400,)),
        weighing(bert__embeddings__LayerNorm__weight=(1, 16)),
        weighing(bert__embeddings__LayerNorm__weight=(1,)),
        weighing(**{QUERY.replace("weight", "bias"): (1,)}),
        weighing(qa_outputs__weight=(2, 0)),
    ],
)
def test_weights_of_a_wrong_shape_are_refused_in_every_precision(folder: Path, damage: Damage, precision: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=r"do not fit its config\.json: .") as raised:
        Answerer(ModelChoice(str(folder), precision=precision), threads=1).warm_up()
    assert str(raised.value).startswith(f"model {folder}: ")


def nan_embeddings(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    save_file({**tensors, name: np.full_like(tensors[name], math.nan)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(tokenizing(model_max_length=4), "windows of 4 tokens are too short"), (nan_embeddings, "infinite numbers or NaN")],
)
def test_a_model_that_shows_no_ranges_is_refused_in_int8(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        Answerer(ModelChoice(str(folder), precision="int8"), threads=1).warm_up()
    assert str(raised.value).startswith(f"model {folder}: ")


def test_options_and_embeddings_that_a_model_may_have_are_accepted(folder: Path) -> None:
    before = next(Answerer(str(folder), threads=1).answer([PAIR]))
    tokenizing(strip_accents=None, model_max_length=1e30)(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    # Rows are often padded to a multiple that suits the hardware.
    padded = np.concatenate([tensors[name], np.ones((8, 16), np.float32)])
    save_file({**tensors, name: padded}, folder / "model.safetensors")
    assert next(Answerer(str(folder), threads=1).answer([PAIR])) == before


def test_weights_in_integers_are_refused_by_type(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "qa_outputs.weight": np.zeros((2, 16), np.int8)}, path)
    with pytest.raises(InputError, match=r"qa_outputs\.weight in I8; use weights in one of F16, F32, F64, BF16"):
        Answerer(str(folder), threads=1).warm_up()


def test_other_safetensors_in_the_folder_are_none_of_the_models(folder: Path) -> None:
    before = next(Answerer(str(folder), threads=1).answer([PAIR]))
    zeroed(folder, "optimizer.safetensors")
    after = Answerer(str(folder), threads=1)
    assert next(after.answer([PAIR])) == before
    assert after.identity == Answerer(str(folder), threads=1).identity


def test_weights_in_several_files_are_those_of_the_index(folder: Path) -> None:
    before = next(Answerer(str(folder), threads=1).answer([PAIR]))
    names = split(folder)
    zeroed(folder, "optimizer.safetensors")
    assert [path.name for path in find_model(ModelChoice(str(folder))).weights] == names
    assert next(Answerer(str(folder), threads=1).answer([PAIR])) == before
    (folder / names[1]).unlink()
    with pytest.raises(InputError, match=names[1]):
        find_model(ModelChoice(str(folder)))


def test_the_only_file_is_taken_whatever_its_name_and_of_two_none(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-best.safetensors")
    assert next(Answerer(str(folder), threads=1).answer([PAIR])).answer
    zeroed(folder, "model-last.safetensors")
    with pytest.raises(InputError, match=r"model-best\.safetensors, model-last\.safetensors"):
        find_model(ModelChoice(str(folder)))


def test_a_revision_of_a_folder_or_the_bundled_model_is_its_own_or_refused(folder: Path) -> None:
    for model in ("bundled", str(folder)):
        revision = find_model(ModelChoice(model)).revision
        assert find_model(ModelChoice(model, revision)).revision == revision
        with pytest.raises(InputError, match=f"{revision}, and revision v1.0 was asked for"):
            find_model(ModelChoice(model, "v1.0"))


def test_a_folder_without_a_tokenizer_is_refused_with_the_file_that_is_missing(folder: Path) -> None:
    vocabulary = load_tokenizer(find_model(ModelChoice(str(folder)))).get_vocab()
    before = next(Answerer(str(folder), threads=1).answer([PAIR]))
    (folder / "tokenizer.json").unlink()
    # It names a class; without it the family decides.
    (folder / "tokenizer_config.json").unlink()
    for family, missing in (("bert", r"vocab\.txt"), ("roberta", r"vocab\.json and no merges\.txt"), ("deberta-v2", r"spm\.model")):
        configured(model_type=family)(folder)
        with pytest.raises(InputError, match=rf"no tokenizer\.json, and no {missing}"):
            load_tokenizer(find_model(ModelChoice(str(folder))))
    (folder / "spm.model").write_bytes(b"not one")
    with pytest.raises(InputError, match=r"no tokenizer\.json in .*sentencepiece"):
        load_tokenizer(find_model(ModelChoice(str(folder))))
    configured(model_type="bert")(folder)
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=lambda token: vocabulary[token])))
    assert next(Answerer(str(folder), threads=1).answer([PAIR])) == before


@pytest.mark.slow
def test_weights_in_bfloat16_give_the_logits_of_transformers(folder: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    from qa_platform.answering.runtimes.torch import TorchRuntime

    path = folder / "model.safetensors"
    save_torch({name: tensor.bfloat16() for name, tensor in load_torch(path).items()}, path)
    files = find_model(ModelChoice(str(folder)))
    ids = np.random.default_rng(2).integers(5, 60, (3, 24), dtype=np.int32)
    batch = WindowBatch(ids, np.zeros_like(ids), np.array([24, 24, 24], np.int32))
    ours = OpenVinoRuntime(files, precision="fp32", threads=1).run(batch)
    theirs = TorchRuntime(files, precision="fp32", threads=1, device="cpu").run(batch)
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_padding_token_in_a_text_counts_as_transformers_counts_it(tmp_path: Path) -> None:
    from qa_platform.answering.runtimes.torch import TorchRuntime

    files = find_model(ModelChoice(str(make_model("roberta", tmp_path))))
    ids = np.random.default_rng(3).integers(5, 60, (2, 24), dtype=np.int32)
    ids[0, [4, 11, 12]] = files.config["pad_token_id"]
    ids[1, 20:] = 0
    batch = WindowBatch(ids, np.zeros_like(ids), np.array([24, 20], np.int32))
    ours = OpenVinoRuntime(files, precision="fp32", threads=1).run(batch)
    theirs = TorchRuntime(files, precision="fp32", threads=1, device="cpu").run(batch)
    for left, right in zip(ours, theirs, strict=True):
        for row, length in enumerate(batch.lengths):
            np.testing.assert_allclose(left[row, :length], right[row, :length], atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_loading_with_torch_is_quiet_and_leaves_progress_bars_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    make_model("deberta", tmp_path)
    capfd.readouterr()
    assert logging.is_progress_bar_enabled()
    Answerer(str(tmp_path), threads=1).warm_up()
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (configured(num_hidden_layers=3), r"lack deberta\.encoder\.layer\.2"),
        (configured(hidden_act="nonsense"), "nonsense"),
        (configured(hidden_size="wide"), "hidden_size"),
        (configured(num_labels=3), "cannot load"),
        (adding_a_token, r"embeddings for only \d+ tokens"),
        (configured(max_position_embeddings=math.nan, relative_attention=False), "nan for max_position_embeddings"),
    ],
)
def test_what_torch_cannot_load_is_refused_by_name(tmp_path: Path, damage: Damage, message: str) -> None:
    damage(make_model("deberta", tmp_path))
    with pytest.raises(InputError, match=message) as raised:
        Answerer(str(tmp_path), threads=1).warm_up()
    assert str(raised.value).startswith(f"model {tmp_path}: ")


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_a_model_with_relative_positions_that_transformers_ignores_is_refused(tmp_path: Path, kind: str) -> None:
    folder = make_bert(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "position_embedding_type": kind}))
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    weights[name] = np.random.default_rng(1).normal(0, 1, (1023, 8)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="relative positions"):
        Answerer(str(folder), threads=1).warm_up()


@pytest.mark.parametrize("family", ["rembert", "nystromformer", "funnel", "roformer"])
def test_a_family_whose_tokenizer_gives_token_types_unsaid_takes_them(folder: Path, family: str) -> None:
    configured(model_type=family)(folder)
    tokenizing(tokenizer_class="PreTrainedTokenizerFast", model_input_names=None)(folder)
    assert find_model(ModelChoice(str(folder))).takes_token_types


@pytest.mark.parametrize("family", ["mpnet", "data2vec-text"])
def test_positions_that_begin_behind_padding_leave_room_for_fewer_tokens(folder: Path, family: str) -> None:
    configured(model_type=family, pad_token_id=1, max_position_embeddings=130)(folder)
    tokenizing(model_max_length=None)(folder)
    assert find_model(ModelChoice(str(folder))).longest_window == 128


def test_a_model_whose_windows_begin_with_the_question_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    with pytest.raises(InputError, match=r"no token such as \[CLS\]"):
        Answerer(str(folder), threads=1).warm_up()
