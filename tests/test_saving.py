"""Saving, loading, and pre-trained backbones: the Hub's conventions, and every trap on the way."""

import json
import os
from unittest.mock import Mock

import pytest
import torch
from conftest import LABELS, LAYOUTS, build
from transformers import AutoModel, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

import sdser

WAVEFORM = torch.sin(torch.arange(8000) * 0.1)
FILES = {"config.json", "model.safetensors", "README.md"}


def answers(model):
    return [model.classify(WAVEFORM, exit=k)[0].probabilities for k in model.exits]


def test_round_trip(layout, tmp_path, capfd):
    model = build(layout, head=["lstm", "attention", "gru"])
    model.threshold, model.tile_seconds = 0.8, 0.7
    model.save_pretrained(tmp_path)
    again = sdser.MultiExitSER.from_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")  # nothing on standard output, which belongs to --json -
    assert not any(module.training for module in again.modules())
    assert (again.labels, again.exits, again.threshold, again.tile_seconds) == (LABELS, [1, 2, 4], 0.8, 0.7)
    assert answers(again) == answers(model)
    assert set(os.listdir(tmp_path)) == FILES
    config = json.loads((tmp_path / "config.json").read_text())
    for name in config:  # what is missing is not made up; what else is there does not matter
        some = {key: value for key, value in config.items() if key != name}
        (tmp_path / "config.json").write_text(json.dumps({**some, "note": "mine"}))
        with pytest.raises(ValueError, match=str(tmp_path)):
            sdser.MultiExitSER.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "note": "mine"}))
    assert sdser.MultiExitSER.from_pretrained(tmp_path).labels == LABELS


def test_saving_leaves_an_edited_model_card_links_devices_and_readable_files(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "config.json")
    sdser.replace_file(tmp_path / "link", "new")
    sdser.replace_file("/dev/null", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "config.json").read_text() == "new"
    assert not os.path.isfile("/dev/null")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "link").stat().st_mode


@pytest.mark.parametrize("name", ["out", "runs/of/mine", "/nowhere/out", "nobody/nothing"])
def test_missing_checkpoint_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=name):
        sdser.MultiExitSER.from_pretrained(name)


def test_a_model_from_the_hub(tmp_path, monkeypatch):
    model, download = build(), Mock(return_value=str(tmp_path))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sdser, "snapshot_download", download)
    assert answers(sdser.MultiExitSER.from_pretrained("me/model", revision="v1")) == answers(model)
    files = ["config.json", "model.safetensors"]  # no pickles
    download.assert_called_once_with("me/model", allow_patterns=files, revision="v1")


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    """The mixin's own method, with the Hub's answers made up."""
    uploaded, api = set(), Mock()
    api.create_repo.return_value.repo_id = "me/model"
    api.upload_folder.side_effect = lambda folder_path, **_: uploaded.update(os.listdir(folder_path))
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Mock(return_value=api))
    build().push_to_hub("me/model")
    assert api.upload_folder.call_args.kwargs["repo_id"] == "me/model" and uploaded == FILES


# -- pre-trained backbones --------------------------------------------------------------------------------------------
def test_pre_trained_weights_are_used_in_float32(layout, tmp_path):
    backbone = AutoModel.from_config(LAYOUTS[layout]).half()
    backbone.save_pretrained(tmp_path)
    model = sdser.MultiExitSER(LABELS, tmp_path, exits=[1, 3])
    assert model.backbone.dtype == torch.float32 and model.backbone.config.do_normalize
    assert all(module.training for module in model.modules())
    for name, weights in model.backbone.state_dict().items():
        if name != "masked_spec_embed":
            assert torch.equal(weights, backbone.state_dict()[name].float()), name
    model.save_pretrained(tmp_path / "mine")
    for file in tmp_path.glob("*.*"):
        file.unlink()  # a saved model needs its original backbone no more
    assert answers(sdser.MultiExitSER.from_pretrained(tmp_path / "mine")) == answers(model)


def test_checkpoints_of_speech_recognition_and_of_older_days_serve_too(tmp_path):
    """As facebook/wav2vec2-base-960h; and weights that were pickled are read as data."""
    ctc = Wav2Vec2ForCTC(LAYOUTS["wav2vec2-base"])
    ctc.save_pretrained(tmp_path)
    for pickled in (False, True):
        weights = sdser.MultiExitSER(LABELS, tmp_path).backbone.state_dict()
        assert all(torch.equal(value, ctc.wav2vec2.state_dict()[name]) for name, value in weights.items()), pickled
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        torch.save(ctc.state_dict(), tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_feature_extractor_decides_on_normalisation(tmp_path, name):
    """As older versions of transformers save it, or as processors of version 5 do."""
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"^{tmp_path}: .*do_normalize"):
        assert sdser.MultiExitSER(LABELS, tmp_path).backbone.config.do_normalize
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False).to_dict()
    processor = {"processor_class": "Wav2Vec2Processor", "feature_extractor": extractor}
    (tmp_path / name).write_text(json.dumps(extractor if name.startswith("pre") else processor))
    model = sdser.MultiExitSER(LABELS, tmp_path)
    assert not model.backbone.config.do_normalize
    model.save_pretrained(tmp_path / "mine")
    again = sdser.MultiExitSER.from_pretrained(tmp_path / "mine")
    again.backbone.save_pretrained(tmp_path / "backbone")  # makes a backbone of one's own run
    for same in (again, sdser.MultiExitSER(LABELS, tmp_path / "backbone")):
        assert not same.backbone.config.do_normalize
    with pytest.raises(ValueError, match=r"mine: .*backbone\.save_pretrained"):
        sdser.MultiExitSER(LABELS, tmp_path / "mine")
    (tmp_path / name).write_text('{"do_normalize": fal')
    with pytest.raises(ValueError, match=str(tmp_path)):
        sdser.MultiExitSER(LABELS, tmp_path)
