"""The model against `transformers` itself, and against its own promises: batch = single, exit k = k layers."""

import io
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import LABELS, LAYOUTS, build, refuses
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

import evaluate
import sdser

LENGTHS = [20_000, 401, 9_999]
TONES = torch.sin(torch.arange(9000) * torch.arange(0.05, 0.6, 0.1)[:, None])  # (6, 9000)


def padded_batch():
    """Three clips of different lengths; what stands behind them must not matter, so it is NaN."""
    waveforms, lengths = 0.1 * torch.randn(len(LENGTHS), max(LENGTHS)) + 0.02, torch.tensor(LENGTHS)
    return waveforms.masked_fill(~sdser.valid_mask(lengths, max(LENGTHS)), torch.nan), lengths


def count_layers(model) -> list[tuple[int, int, int]]:
    """A list that grows by a layer's number, from 1, and its clips and frames, each time a layer runs."""
    calls = []
    for i, layer in enumerate(model.backbone.encoder.layers, 1):
        layer.register_forward_pre_hook(lambda _, args, i=i: calls.append((i, *args[0].shape[:2])))
    return calls


@pytest.mark.parametrize("head", sdser.HEADS)
def test_padding_changes_nothing(layout, head):
    """In float64, so that rounding cannot be taken for a leak, nor hide one."""
    waveforms, lengths = padded_batch()
    for do_normalize in (True, False):
        model = build(layout, head=[head] * 3, do_normalize=do_normalize).double()
        elsewhere = Mock(wraps=lengths, shape=lengths.shape)  # on another device
        together = model(waveforms.double(), elsewhere)
        elsewhere.to.assert_called_with(waveforms.device)
        for i, length in enumerate(LENGTHS):
            for a, b in zip(together, model(waveforms[i : i + 1, :length].double())):
                assert_close(a.logits[i], b.logits[0], atol=1e-11, rtol=0)
                assert_close(a.embedding[i], b.embedding[0], atol=1e-11, rtol=0)


# -- exits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("do_normalize", [True, False])
def test_exit_is_the_transformers_model_of_that_many_layers(layout, do_normalize):
    """And runs these layers and no more; in training, no layer is dropped."""
    model = build(layout, exits=[1, 2, 3, 4], do_normalize=do_normalize, layerdrop=0.9)
    waveform, seen = 0.1 * torch.randn(1, 16_000) + 0.02, []  # by each exit
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    inputs = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    for head in model.heads.values():
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0].hidden))
    everything, calls = model(waveform), count_layers(model)
    weights = model.backbone.state_dict()
    for k, hidden, expected in zip(model.exits, seen[:], everything):
        config = AutoConfig.for_model(**model.backbone.config.to_dict() | {"num_hidden_layers": k})
        shallow = AutoModel.from_config(config).eval()
        shallow.load_state_dict({name: weights[name] for name in shallow.state_dict()})
        assert_close(hidden, shallow(inputs).last_hidden_state)
        calls.clear()
        [output] = model(waveform, exit=k)
        assert [layer for layer, _, _ in calls] == list(range(1, k + 1))
        assert output.exit == expected.exit == k
        assert_close(output.logits, expected.logits)
    calls.clear()
    model.train()(waveform)
    assert [layer for layer, _, _ in calls] == [1, 2, 3, 4]


def test_gru_and_stats_heads_by_hand():
    """A GRU from a zero state, LayerNorm, SELU, mean over frames, two linear layers, as in the paper; or statistics."""
    gru, stats, hidden = sdser.ExitHead("gru", 8, 3), sdser.ExitHead("stats", 8, 3), torch.randn(2, 5, 8)
    cell, state, states = torch.nn.GRUCell(8, 8), torch.zeros(2, 8), []
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in gru.rnn.state_dict().items()})
    for t in range(5):
        state = cell(hidden[:, t], state)
        states.append(torch.selu(gru.norm(state)))
    own, three = [hidden[0].numpy(), hidden[1, :3].numpy()], sdser.valid_mask(torch.tensor([5, 3]), 5)
    by_hand = torch.tensor(np.array([np.r_[frames.mean(0), frames.std(0)] for frames in own]))
    for head, valid, expected in ((gru, None, torch.stack(states).mean(0)), (stats, three, by_hand)):
        logits, embedding = head(sdser.Frames(hidden, valid))
        assert_close(embedding, expected, atol=1e-4, rtol=0)
        assert_close(logits, head.classifier(head.projector(embedding)))


def test_base_is_wav2vec2_base_and_its_heads_start_as_the_authors():
    model = sdser.MultiExitSER(LABELS, "base")
    assert model.exits == [3, 8, 10, 12] and model.head_kinds == ["gru", "gru", "gru", "mean"]
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e6 == pytest.approx(94.4, abs=0.1)
    assert (model.backbone.config.activation_dropout, model.backbone.config.mask_time_min_masks) == (0.0, 2)
    for head in model.heads.values():
        for layer, inputs in ((head.projector, 768), (head.classifier, 256)):
            bound = (6 / inputs) ** 0.5  # He-uniform
            assert layer.weight.abs().max() <= bound and not layer.bias.any()
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_what_is_no_model_and_what_cannot_be_asked_of_one_is_refused():
    for name, values in (
        ("exits", ([2, 2], [2, 5])),
        ("labels", [["anger"]]),
        ("head", ("conv", ["attention"], ["stats", "stats", "mean"])),
    ):
        for value in values:
            refuses(name, sdser.MultiExitSER, **{"labels": LABELS, "backbone": "tiny", name: value})
    model = build()
    for lengths, named in (([9000], ""), ([9000, 399], 399), ([9001, 500], 9001)):
        refuses(f"lengths .*{named}", model, TONES[:2], torch.tensor(lengths))
    refuses("waveforms", model, TONES[0]), refuses("lengths .*399", model, TONES[:, :399])
    refuses("exit 3", model, TONES, exit=3), refuses("exit 3", model.truncate, 3)
    refuses("exit 3", model.classify, TONES[0], exit=3), refuses("auto", model.classify, TONES[0], threshold="auto")
    refuses("exit and threshold", model.classify, TONES[0], exit=1, threshold=0.5)
    for threshold in (50.0, float("nan")):
        refuses(f"threshold {threshold}", model.early_exit, TONES, None, threshold)
    refuses("evaluation mode", model.train().early_exit, TONES, None, 0.5)


# -- training ---------------------------------------------------------------------------------------------------------
def test_the_position_convolution_is_computed_in_float32_under_autocast():
    """In bfloat16, oneDNN gets it wrong where a processor has AMX and a group has 12 channels, as in "small"."""
    model, waveforms, dtypes = sdser.MultiExitSER(LABELS, "small").eval(), 0.1 * torch.randn(2, 32_000), []
    model.backbone.encoder.pos_conv_embed.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    with torch.no_grad():
        exact = model(waveforms)[-1].embedding
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(waveforms)[-1].embedding
    assert dtypes == [torch.float32, torch.float32] and (rounded - exact).norm() < 0.05 * exact.norm()


def test_every_parameter_learns_also_from_the_shortest_clips(layout):
    """Without a time mask the mask embedding is no parameter to train."""
    for autocast, mask_time_prob in ((False, 0.05), (True, 0.05), (False, 0.0)):
        model = build(layout, head="lstm", mask_time_prob=mask_time_prob, mask_feature_prob=0.1).train()
        assert model.backbone.masked_spec_embed.requires_grad == (mask_time_prob > 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(torch.randn(3, 401), torch.tensor([401, 400, 401]))
        loss, _ = sdser.self_distillation_loss(outputs, torch.tensor([0, 1, 2]))
        loss.backward()
        assert loss.isfinite() and all(output.logits.dtype == torch.float32 for output in outputs)
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_time_mask_is_spans_that_fit_and_covers_what_transformers_does():
    model, seen = build(mask_time_prob=0.2, mask_time_length=10).train(), []
    model.backbone.encoder.pos_conv_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TONES)
    assert (seen[0] == model.backbone.masked_spec_embed).all(-1).any(), "masked frames are the learned vector"
    valid = sdser.valid_mask(frames := torch.tensor([100, 30, 4, 1] * 100), 100)
    mask = sdser.sample_time_mask(model.backbone.config, torch.zeros(400, 100, 1), valid)
    assert not (mask & ~valid).any()
    assert mask[frames == 4].sum(1).max() <= 2 and mask[frames == 1].sum() == 0
    assert mask[frames == 100].float().diff(dim=1).eq(1).sum(1).max() <= 3  # a few long spans, not scattered frames
    # two spans at least, in many clips of 5.984 s, with the config of wav2vec2-base
    mask = sdser.sample_time_mask(sdser.load_config("base"), torch.zeros(4000, 298, 1), None)
    theirs = _compute_mask_indices((4000, 298), 0.05, 10, min_masks=2).mean()
    assert mask.float().mean().item() == pytest.approx(theirs, abs=0.002) == pytest.approx(0.066, abs=0.003)
    assert mask[:, 149:].float().mean() == pytest.approx(theirs, abs=0.004), "wherever in the clip"
    assert len(mask.unique(dim=0)) > 3000, "each clip has its own"


# -- early exit -------------------------------------------------------------------------------------------------------
def test_early_exit_drops_clips_and_gives_each_what_it_gets_alone(layout):
    model, lengths = build(layout), torch.tensor([9000, 8000, 9000, 5000, 3000, 9000])
    for head in model.heads.values():
        head.classifier.weight.data *= 3
    waveforms = TONES + 0.3 * torch.randn(6, 9000)
    first = model(waveforms)[0].logits.softmax(-1).amax(-1).sort().values
    model.threshold = threshold = first[2:4].mean().item()  # at which they leave at different exits
    every, calls = model(waveforms, lengths), count_layers(model)
    logits, exits = model.early_exit(waveforms, lengths, threshold)
    expected = [(layer, (exits >= layer).sum().item()) for layer in range(1, exits.max().item() + 1)]
    assert [(layer, clips) for layer, clips, _ in calls] == expected
    assert len(exits.unique()) > 1, "the test must see clips leave at different exits"
    for i, length in enumerate(lengths):
        expected = next((x for x in every if x.logits[i].softmax(-1).max() >= threshold), every[-1])
        assert exits[i] == expected.exit
        assert_close(logits[i], expected.logits[i])
        alone = model.early_exit(waveforms[i : i + 1, :length], None, threshold)
        assert_close((alone[0][0], alone[1][0]), (logits[i], exits[i]))
    clips = [waveform[:length] for waveform, length in zip(waveforms, lengths)]
    for given in (threshold, "auto"):
        assert [answer.exit for answer in model.classify(clips, threshold=given)] == exits.tolist()
    reached = model(waveforms[:1])[0].logits.softmax(-1).max().item()
    assert model.early_exit(waveforms[:1], None, reached)[1] == 1, "a threshold that is just reached"


def test_early_exit_trims_to_the_longest_that_stays_and_another_stop_rule_is_one_function(layout, monkeypatch):
    """The longest clip leaves first: the layers after it see no more frames than the others have."""
    model = build(layout)
    waveforms, lengths = 0.1 * torch.randn(3, 20_000), torch.tensor([20_000, 5000, 3000])
    every, calls = model(waveforms, lengths), count_layers(model)
    leave = iter([[True, False, False], [False, False], [False, False]])
    monkeypatch.setattr(sdser, "should_stop", lambda logits, threshold: torch.tensor(next(leave)))
    logits, exits = model.early_exit(waveforms, lengths, 0.9)
    assert exits.tolist() == [1, 4, 4] and calls == [(1, 3, 62), (2, 2, 15), (3, 2, 15), (4, 2, 15)]
    assert_close(logits[1:], every[-1].logits[1:])
    # Patience: a clip leaves once two exits in a row agree. The model and evaluate.py both ask `should_stop`.
    logits = torch.stack([output.logits for output in model(TONES)])
    monkeypatch.setattr(sdser, "should_stop", lambda logits, _: (logits[-2:].argmax(-1).diff(dim=0) == 0).any(0))
    expected = torch.where(logits[1].argmax(-1) == logits[0].argmax(-1), 2, 4)  # with one exit, there is no pair
    assert model.early_exit(TONES, None, 0.5)[1].tolist() == expected.tolist()
    assert torch.tensor(model.exits)[evaluate.exit_index(logits, 0.5)].tolist() == expected.tolist()


# -- classify and truncate --------------------------------------------------------------------------------------------
def test_classify_files_waveforms_and_tiles(wav):
    model, waveform = build(), 0.1 * torch.randn(9000)
    path = wav(waveform.numpy(), subtype="FLOAT")
    for exit in (None, 1, 2, 4):
        expected = model.eval()(waveform[None], exit=exit or 4)[0].logits.softmax(-1)[0]
        model.train().backbone.eval()
        (upload := io.BytesIO(path.read_bytes())).read(9)
        a, b, c = model.classify([path, waveform, upload], exit=exit)
        assert model.training and not model.backbone.training
        assert a._replace(milliseconds=0) == b._replace(milliseconds=0) == c._replace(milliseconds=0)
        assert a.exit == (exit or 4) and a.milliseconds > 0
        assert list(a.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert a.label == LABELS[expected.argmax()] and a.confidence == pytest.approx(expected.max().item(), abs=1e-6)
    for alone in (path, str(path), io.BytesIO(path.read_bytes()), waveform, waveform.double().numpy()):
        [answer] = model.classify(alone)
        assert answer.probabilities == pytest.approx(a.probabilities, abs=1e-6)
    silent = wav(np.zeros(8000), "silent.wav")
    with pytest.warns(UserWarning, match=str(silent)):
        assert 0 < model.classify(silent)[0].confidence <= 1
    config = LAYOUTS["wav2vec2-base"].to_dict()  # without do_normalize, which transformers keeps elsewhere
    model, waveform = sdser.MultiExitSER(LABELS, config, tile_seconds=0.5).eval(), torch.randn(3000)
    assert model.backbone.config.do_normalize
    expected = model(waveform.repeat(3)[None, :8000])[-1].logits.softmax(-1)[0].tolist()
    assert list(model.classify(waveform)[0].probabilities.values()) == pytest.approx(expected, abs=1e-6)
    assert sdser.read_clip(torch.randn(9000), 0.5).shape == (8000,)


@torch.no_grad()
def test_truncated_model_is_its_own(layout):
    model = build(layout, head="attention")
    waveforms, lengths = padded_batch()
    small = model.truncate(2)
    assert small.exits == [2] and len(small.backbone.encoder.layers) == 2 and small.head_kinds == ["attention"]
    assert_close(small(waveforms, lengths)[0].logits, model(waveforms, lengths)[1].logits)
    for parameter in model.parameters():
        parameter.zero_()
    assert small(waveforms, lengths)[0].logits.abs().max() > 0
