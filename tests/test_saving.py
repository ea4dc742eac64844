"""Saving, loading, and pre-trained backbones: the Hub's conventions, and every trap on the way."""

import json
import os

import pytest
import torch
from conftest import LABELS, LAYOUTS, build
from transformers import AutoModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

import sdser

WAVEFORM = torch.sin(torch.arange(8000) * 0.1)


def answers(model):
    return [p.probabilities for p in (model.classify([WAVEFORM], exit=k)[0] for k in model.exits)]


def test_round_trip(layout, tmp_path, capfd):
    model = build(layout, head=["lstm", "attention", "gru"])
    model.threshold, model.tile_seconds = 0.8, 0.7
    model.save_pretrained(tmp_path / "out")
    capfd.readouterr()
    again = sdser.MultiExitSER.from_pretrained(tmp_path / "out")
    assert capfd.readouterr() == ("", "")  # nothing on standard output, which belongs to --json -
    assert not again.training
    assert again.arguments == model.arguments
    assert answers(again) == answers(model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head"] == ["lstm", "attention", "gru"] and config["threshold"] == 0.8
    assert {"config.json", "model.safetensors"} <= set(os.listdir(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_saving_keeps_the_last_checkpoint_until_the_new_one_is_whole(tmp_path, monkeypatch):
    model = build()
    model.save_pretrained(tmp_path)
    before = answers(model)
    with torch.no_grad():
        model.heads["4"].classifier.weight.zero_()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)  # after the weights were written beside
        model.save_pretrained(tmp_path)
    assert answers(sdser.MultiExitSER.from_pretrained(tmp_path)) == before
    model.save_pretrained(tmp_path)
    assert answers(sdser.MultiExitSER.from_pretrained(tmp_path)) == answers(model) != before
    assert not list(tmp_path.glob("*.tmp"))


def test_saving_leaves_an_edited_model_card_and_readable_files(tmp_path):
    build().save_pretrained(tmp_path)
    assert "2210.14636" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_writing_keeps_links_devices_and_what_others_call_tmp(tmp_path):
    (tmp_path / "a.json.tmp").write_text("mine")
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    for name in ("a.json", "link.json"):
        with sdser.replacing(tmp_path / name) as file:
            file.write(b"new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text() == "new"
    assert (tmp_path / "a.json.tmp").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with sdser.replacing(tmp_path / "pipe") as file:
        file.write(b"new")
    assert os.read(reader, 9) == b"new" and not (tmp_path / "pipe").is_file()
    os.close(reader)


def damage(folder, what):
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "cut config":
        config.write_text(config.read_text()[:100])
    elif what == "config of something else":
        config.write_text('{"model_type": "bert"}')
    elif what == "other shapes":
        content["backbone"]["intermediate_size"] = 48
        config.write_text(json.dumps(content))
    elif what == "missing weights":
        config.write_text(json.dumps(content | {"exits": [1, 2, 3, 4], "head": ["gru"] * 3 + ["mean"]}))
    elif what == "extra weights":
        config.write_text(json.dumps(content | {"exits": [1, 4], "head": ["gru", "mean"]}))
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize("what", [
    "no config", "no weights", "cut config", "config of something else", "other shapes", "missing weights",
    "extra weights", "cut weights",
])  # fmt: skip
def test_damaged_checkpoints_are_refused(tmp_path, what):
    build().save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        sdser.MultiExitSER.from_pretrained(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}: ") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["out", "runs/of/mine", "/nowhere/out", "nobody/nothing"])
def test_missing_checkpoint_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^{name}: "):
        sdser.MultiExitSER.from_pretrained(name)


def test_hub_repository_of_pickles_is_refused(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path / "snapshot")
    os.rename(tmp_path / "snapshot" / "model.safetensors", tmp_path / "snapshot" / "pytorch_model.bin")
    monkeypatch.setattr(sdser, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    with pytest.raises(ValueError, match=r"^me/model: "):
        sdser.MultiExitSER.from_pretrained("me/model")


def test_a_model_from_the_hub(tmp_path, monkeypatch):
    model, asked = build(), {}
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sdser, "snapshot_download", lambda name, **how: asked.update(how, name=name) or str(tmp_path))
    assert answers(sdser.MultiExitSER.from_pretrained("me/model", revision="v1")) == answers(model)
    assert asked["name"] == "me/model" and asked["revision"] == "v1"
    assert "pytorch_model.bin" not in asked["allow_patterns"]


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    """The mixin's own method, with the Hub's answers made up."""
    model, uploaded = build(), {}
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda **_: Api(uploaded))
    assert model.push_to_hub("me/model") == "https://hub/me/model"
    assert set(uploaded) == {"config.json", "model.safetensors", "README.md"}
    assert json.loads(uploaded["config.json"]) == json.loads(json.dumps(model.arguments))


class Api:
    def __init__(self, uploaded):
        self.uploaded = uploaded

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, folder_path, repo_id, **_):
        self.uploaded |= {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return f"https://hub/{repo_id}"


# -- pre-trained backbones --------------------------------------------------------------------------------------------


def test_pre_trained_weights_are_used_in_float32(layout, tmp_path):
    backbone = AutoModel.from_config(LAYOUTS[layout]).half()
    backbone.save_pretrained(tmp_path)
    model = sdser.MultiExitSER(LABELS, str(tmp_path), exits=[1, 3])
    assert model.backbone.dtype == torch.float32 and model.backbone.config.do_normalize
    for name, weights in model.backbone.state_dict().items():
        if name != "masked_spec_embed":
            assert torch.equal(weights, backbone.state_dict()[name].float()), name
    model.save_pretrained(tmp_path / "mine")
    for file in tmp_path.glob("*.*"):
        file.unlink()  # a saved model needs its original backbone no more
    again = sdser.MultiExitSER.from_pretrained(tmp_path / "mine")
    assert answers(again) == answers(model)


def test_a_new_model_trains_and_a_loaded_one_answers(tmp_path):
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path / "backbone")
    model = sdser.MultiExitSER(LABELS, tmp_path / "backbone")
    assert all(module.training for module in model.modules())
    model.save_pretrained(tmp_path / "mine")
    assert not any(module.training for module in sdser.MultiExitSER.from_pretrained(tmp_path / "mine").modules())


def test_a_checkpoint_fine_tuned_for_speech_recognition_serves_too(tmp_path):
    ctc = Wav2Vec2ForCTC(Wav2Vec2Config(**LAYOUTS["wav2vec2-base"].to_diff_dict()))
    ctc.save_pretrained(tmp_path)
    model = sdser.MultiExitSER(LABELS, tmp_path)
    assert torch.equal(
        model.backbone.encoder.layers[3].layer_norm.weight, ctc.wav2vec2.encoder.layers[3].layer_norm.weight
    )


def test_feature_extractor_decides_on_normalisation(tmp_path):
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    model = sdser.MultiExitSER(LABELS, tmp_path)
    assert not model.backbone.config.do_normalize
    model.save_pretrained(tmp_path / "mine")
    assert not sdser.MultiExitSER.from_pretrained(tmp_path / "mine").backbone.config.do_normalize


@pytest.mark.parametrize("what", ["missing", "cut", "shapes", "type", "config", "values", "preprocessor"])
def test_damaged_backbones_are_refused(tmp_path, what):
    backbone = Wav2Vec2Model(LAYOUTS["wav2vec2-base"])
    weights = backbone.state_dict()
    if what == "missing":
        del weights["encoder.layers.2.layer_norm.weight"]
    backbone.save_pretrained(tmp_path, state_dict=weights)
    config = json.loads((tmp_path / "config.json").read_text())
    if what == "cut":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    elif what == "shapes":
        (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    elif what == "type":
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "whisper"}))
    elif what == "config":
        (tmp_path / "config.json").write_text("{")
    elif what == "values":
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "x"}))
    elif what == "preprocessor":
        (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": fal')
    with pytest.raises(ValueError, match=f"^{tmp_path}: ") as refusal:
        sdser.MultiExitSER(LABELS, str(tmp_path))
    assert "\n" not in str(refusal.value)
