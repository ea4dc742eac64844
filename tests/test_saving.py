"""Saving, loading, and pre-trained backbones: the Hub's conventions, and every trap on the way."""

import io
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import LABELS, LAYOUTS, build, readable, refuses, write
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC, Wav2Vec2FeatureExtractor, Wav2Vec2Model

import sdser
import train

WAVEFORM = torch.sin(torch.arange(8000) * 0.1)
FILES = {"config.json", "model.safetensors", "README.md"}
CODE = dict(attn_implementation="me/code", _attn_implementation="me/code", auto_map={"AutoModel": "me/code--a.B"})


def answers(model):
    return [model.classify(WAVEFORM, exit=k)[0].probabilities for k in model.exits]


def test_round_trip(layout, tmp_path, capfd):
    model = build(layout, head=["lstm", "attention", "gru"])
    model.threshold, model.tile_seconds = 0.8, 0.7
    model.save_pretrained(tmp_path)
    again = sdser.MultiExitSER.from_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")  # nothing on standard output, which belongs to --json -
    assert not any(module.training for module in again.modules()) and set(os.listdir(tmp_path)) == FILES
    assert (again.labels, again.exits, again.threshold, again.tile_seconds) == (LABELS, [1, 2, 4], 0.8, 0.7)
    assert answers(again) == answers(model)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in config:  # what is missing is not made up; what else is there does not matter
        write(tmp_path / "config.json", json.dumps({key: value for key, value in config.items() if key != name}))
        refuses(str(tmp_path), sdser.MultiExitSER.from_pretrained, tmp_path)
    write(tmp_path / "config.json", json.dumps({**config, "note": "mine", "backbone": config["backbone"] | CODE}))
    assert answers(sdser.MultiExitSER.from_pretrained(tmp_path)) == answers(model)


def test_saving_leaves_an_edited_model_card_links_devices_pipes_and_readable_files(tmp_path, monkeypatch):
    """Two processes may write a file at once, so each has a temporary one of its own, which it then puts in place."""
    build().save_pretrained(tmp_path)
    write(tmp_path / "README.md", "mine")
    (tmp_path / "link").symlink_to(tmp_path / "config.json")
    reader, writer = os.pipe()  # as standard output may be
    for path in (tmp_path / "link", f"/dev/fd/{writer}", "/dev/null"):
        sdser.replace_file(path, "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "config.json").read_text() == "new"
    assert os.read(reader, 9) == b"new" and not os.path.isfile("/dev/null")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "link").stat().st_mode
    monkeypatch.setattr(os, "replace", replaced := Mock(wraps=os.replace))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        sdser.replace_file(tmp_path / "file", "new")
    first, second = (call.args[0] for call in replaced.call_args_list)
    assert first != second and set(os.listdir(tmp_path)) == {*FILES, "link", "file"}


def test_to_the_hub_and_back(tmp_path, monkeypatch):
    """By the mixin's own methods, with the Hub's answers made up. What is nowhere is named."""
    monkeypatch.chdir(tmp_path)
    for name in ("out", "runs/of/mine", "/nowhere/out", "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match=name):
            sdser.MultiExitSER.from_pretrained(name)
    model, uploaded, api = build(), [], Mock()
    api.create_repo.return_value.repo_id = "me/model"
    api.upload_folder.side_effect = lambda folder_path, **_: uploaded.append(set(os.listdir(folder_path)))
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Mock(return_value=api))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download := Mock(return_value=str(tmp_path / "model")))
    model.push_to_hub("me/model")
    assert api.upload_folder.call_args.kwargs["repo_id"] == "me/model"
    model.save_pretrained(tmp_path / "model", push_to_hub=True, private=True)
    assert uploaded == [FILES, FILES] and api.create_repo.call_args.kwargs["private"]
    assert answers(sdser.MultiExitSER.from_pretrained("me/model", revision="v1")) == answers(model)
    no_pickles = ["config.json", "model.safetensors"]
    download.assert_called_once_with("me/model", allow_patterns=no_pickles, revision="v1")


def test_pre_trained_weights_are_used_in_float32(layout, tmp_path):
    """Also of speech recognition, as facebook/wav2vec2-base-960h, and pickled, as in older days: read as data."""
    ctc = AutoModelForCTC.from_config(LAYOUTS[layout]).half()
    ctc.base_model.save_pretrained(tmp_path / "plain")
    for name in ("ctc", "pickled"):
        ctc.save_pretrained(tmp_path / name)
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(ctc.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("plain", "ctc", "pickled"):
        model = sdser.MultiExitSER(LABELS, tmp_path / name, exits=[1, 3])
        assert model.backbone.dtype == torch.float32 and model.backbone.config.do_normalize
        assert all(module.training for module in model.modules())
        for key in model.backbone.state_dict().keys() - {"masked_spec_embed"}:
            assert torch.equal(model.backbone.state_dict()[key], ctc.base_model.state_dict()[key].float()), (name, key)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_feature_extractor_decides_on_normalisation(tmp_path, name, monkeypatch):
    """As older versions of transformers save it, or as processors of version 5 do; none of them brings code."""
    monkeypatch.setattr("builtins.input", asked := Mock(return_value="n"))
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path)
    write(tmp_path / "config.json", json.dumps(json.loads((tmp_path / "config.json").read_text()) | CODE))
    with pytest.warns(UserWarning, match=f"^{tmp_path}: .*do_normalize"):
        assert sdser.MultiExitSER(LABELS, tmp_path).backbone.config.do_normalize
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False).to_dict()
    processor = {"processor_class": "Wav2Vec2Processor", "feature_extractor": extractor}
    write(tmp_path / name, json.dumps(extractor if name.startswith("pre") else processor))
    (model := sdser.MultiExitSER(LABELS, tmp_path)).save_pretrained(tmp_path / "mine")
    assert not re.search(f"{tmp_path}|me/code", (tmp_path / "mine" / "config.json").read_text())
    again = sdser.MultiExitSER.from_pretrained(tmp_path / "mine")
    again.backbone.save_pretrained(tmp_path / "backbone")  # makes a backbone of one's own run
    for same in (model, again, sdser.MultiExitSER(LABELS, tmp_path / "backbone")):
        assert not same.backbone.config.do_normalize
    refuses(r"mine: .*backbone\.save_pretrained", sdser.MultiExitSER, LABELS, tmp_path / "mine")
    code = {"feature_extractor_type": "B", "auto_map": {"AutoFeatureExtractor": "me/code--a.B"}}
    for text in ('{"do_normalize": fal', json.dumps({**code, "feature_extractor": code})):
        write(tmp_path / name, text)
        refuses(str(tmp_path), sdser.MultiExitSER, LABELS, tmp_path)
    assert not asked.called


def test_a_feature_extractor_that_only_the_hub_may_have_is_not_assumed(monkeypatch):
    """Played: a cache that holds the config alone."""
    exists, config = Mock(side_effect=OfflineModeIsEnabled("offline")), LAYOUTS["wav2vec2-base"].to_dict()
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", Mock(return_value=(config, {})))
    monkeypatch.setattr("transformers.AutoFeatureExtractor.from_pretrained", Mock(side_effect=OSError("not cached")))
    monkeypatch.setattr("huggingface_hub.file_exists", exists)
    refuses("me/speech.*preprocessor_config", sdser.load_config, "me/speech")
    exists.side_effect = [True, False]
    refuses("me/speech.*preprocessor_config", sdser.load_config, "me/speech")
    with pytest.warns(UserWarning, match=r"^me/speech: .*do_normalize"):
        assert sdser.load_config("me/speech").do_normalize


def save(kind, folder) -> tuple:
    """Saves a whole one; returns what reads it, the folder coming last."""
    if kind == "checkpoint":
        build(head="mean").save_pretrained(folder)
        return (sdser.MultiExitSER.from_pretrained,)
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(folder)
    return sdser.MultiExitSER, LABELS


@pytest.mark.parametrize("kind", ["checkpoint", "backbone"])
def test_damaged_checkpoints(tmp_path, kind, little_memory):
    """Files that are gone or cut, a weight less, and configs that ask for other shapes, terabytes, or nonsense."""
    read, config, weights = save(kind, tmp_path), tmp_path / "config.json", tmp_path / "model.safetensors"
    assert readable(tmp_path, *read)
    for path in (config, weights):
        content = path.read_bytes()
        for kept in (0, len(content) // 2, len(content) - 100):
            path.write_bytes(content[:kept])
            assert not readable(tmp_path, *read), (path, kept)
        path.unlink()
        assert not readable(tmp_path, *read), path
        path.write_bytes(content)
    tensors, text = load_file(weights), config.read_text()
    for key, value in (("intermediate_size", 48), ("intermediate_size", 10**9), ("model_type", '"bert"')):
        config.write_text(re.sub(rf'"{key}": [^,\n]*', f'"{key}": {value}', text))
        assert config.read_text() != text and not readable(tmp_path, *read), (key, value)
    config.write_text(text)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, weights, {"format": "pt"})
    assert not readable(tmp_path, *read)


def test_weights_that_do_not_fit_are_named_and_a_fault_in_the_code_is_not_taken_for_theirs(tmp_path, monkeypatch):
    """As after a head has gained a parameter, lost one, or become wider."""
    build().save_pretrained(tmp_path)
    key, old, whole = "heads.2.classifier.bias", "heads.1.old", load_file(tmp_path / "model.safetensors")
    without, wider = {name: whole[name] for name in whole if name != key}, whole | {key: torch.zeros(7, 5)}
    for weights, named in (without, key), (whole | {old: torch.zeros(2)}, old), (wider, rf"{key}.*\[7, 5\].*\[3\]"):
        save_file(weights, tmp_path / "model.safetensors")
        refuses(f"{tmp_path}.*{named}", sdser.MultiExitSER.from_pretrained, tmp_path)
    monkeypatch.setattr(sdser.ExitHead, "__init__", Mock(side_effect=AttributeError("scor")))
    with pytest.raises(AttributeError, match="scor"):
        sdser.MultiExitSER.from_pretrained(tmp_path)


class Bomb:  # makes a folder if it is unpickled
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "train_state.pt"])
def test_nothing_is_unpickled(tmp_path, monkeypatch, name, zipped):
    """Wherever weights are read, a malicious pickle is refused and does not run."""
    monkeypatch.chdir(tmp_path)
    read = save("backbone" if name == "pytorch_model.bin" else "checkpoint", tmp_path)
    if name == "train_state.pt":
        read = (lambda out: train.run(train.parse_args(["--resume", "--out", str(out)])),)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": Bomb()}, name, _use_new_zipfile_serialization=zipped)
    assert not readable(tmp_path, *read) and not Path("exploded").exists()
    torch.load(io.BytesIO(Path(name).read_bytes()), weights_only=False)
    assert Path("exploded").exists()  # the bomb works
