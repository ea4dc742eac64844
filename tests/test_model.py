"""The model against `transformers` itself, and against its own promises: batch = single, exit k = k layers."""

from functools import partial

import pytest
import torch
from conftest import LABELS, LAYOUTS, build
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

import evaluate
import sdser

LENGTHS = [20_000, 401, 9_999]


def padded_batch():
    """Three clips of different lengths; what stands behind them must not matter, so it is NaN."""
    waveforms, lengths = 0.1 * torch.randn(len(LENGTHS), max(LENGTHS)) + 0.02, torch.tensor(LENGTHS)
    return waveforms.masked_fill(~sdser.valid_mask(lengths, max(LENGTHS)), torch.nan), lengths


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def count_layers(model) -> list[tuple[int, int]]:
    """A list that grows by a layer's number, from 1, and how many clips are in it, each time a layer runs."""
    calls, layers = [], list(model.backbone.encoder.layers)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: calls.append((layers.index(layer) + 1, len(args[0]))))
    return calls


# -- exact masking ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head", sdser.HEADS)
@torch.no_grad()
def test_padding_changes_nothing(layout, head):
    """In float64, so that rounding cannot be taken for a leak, nor hide one."""
    waveforms, lengths = padded_batch()
    waveforms = waveforms.double()
    for do_normalize in (True, False):
        model = build(layout, head=[head] * 3, do_normalize=do_normalize).double()
        together = model(waveforms, lengths)
        for i, length in enumerate(LENGTHS):
            alone = model(waveforms[i : i + 1, :length])
            for a, b in zip(together, alone):
                close(a.logits[i], b.logits[0], atol=1e-11)
                close(a.embedding[i], b.embedding[0], atol=1e-11)


# -- exits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("do_normalize", [True, False])
@torch.no_grad()
def test_exit_is_the_transformers_model_of_that_many_layers(layout, do_normalize):
    model = build(layout, exits=[1, 2, 3, 4], do_normalize=do_normalize)
    waveform = 0.1 * torch.randn(1, 16_000) + 0.02
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    inputs = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    seen = []  # by each exit
    for head in model.heads.values():
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(waveform)
    weights = model.backbone.state_dict()
    for k, hidden in zip(model.exits, seen):
        config = AutoConfig.for_model(**model.backbone.config.to_dict() | {"num_hidden_layers": k})
        shallow = AutoModel.from_config(config).eval()
        shallow.load_state_dict({name: weights[name] for name in shallow.state_dict()})
        close(hidden, shallow(inputs).last_hidden_state)


@torch.no_grad()
def test_exit_runs_its_layers_and_no_more(layout):
    model, waveform = build(layout, layerdrop=0.9), torch.randn(1, 4000)
    everything, calls = model(waveform), count_layers(model)
    for k, expected in zip(model.exits, everything):
        calls.clear()
        [output] = model(waveform, exit=k)
        assert [layer for layer, _ in calls] == list(range(1, k + 1))
        assert output.exit == expected.exit == k
        torch.testing.assert_close(output.logits, expected.logits)
    calls.clear()
    model.train()(waveform)
    assert [layer for layer, _ in calls] == [1, 2, 3, 4], "no layer is dropped in training"


def test_gru_head_is_the_papers():
    """GRU from a zero state, LayerNorm, SELU, mean over frames, two linear layers: worked out step by step."""
    head, hidden = sdser.ExitHead("gru", 8, 3), torch.randn(2, 5, 8)
    cell, state, states = torch.nn.GRUCell(8, 8), torch.zeros(2, 8), []
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in head.rnn.state_dict().items()})
    for t in range(5):
        state = cell(hidden[:, t], state)
        states.append(torch.selu(head.norm(state)))
    expected = torch.stack(states).mean(0)
    logits, embedding = head(hidden)
    torch.testing.assert_close(embedding, expected)
    torch.testing.assert_close(logits, head.classifier(head.projector(expected)))


def test_mean_head_is_the_mean_of_valid_frames():
    head, hidden = sdser.ExitHead("mean", 8, 3), torch.randn(2, 5, 8)
    _, embedding = head(hidden, sdser.valid_mask(torch.tensor([5, 3]), 5))
    torch.testing.assert_close(embedding, torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)]))


def test_linear_layers_of_the_heads_start_as_the_authors():
    head = sdser.ExitHead("gru", 768, 7)
    for layer, inputs in ((head.projector, 768), (head.classifier, 256)):
        bound = (6 / inputs) ** 0.5  # He-uniform
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not layer.bias.any()


def test_base_is_as_large_as_wav2vec2_base():
    model = sdser.MultiExitSER(LABELS, "base", head="mean")
    assert model.exits == [3, 8, 10, 12]
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e6 == pytest.approx(94.4, abs=0.1)
    assert (model.backbone.config.activation_dropout, model.backbone.config.mask_time_min_masks) == (0.0, 2)


@pytest.mark.parametrize(("argument", "value"), [
    ("exits", [2, 2]), ("exits", [2, 5]), ("head", "conv"), ("labels", ["anger"]), ("backbone", {"model_type": "bert"}),
])  # fmt: skip
def test_wrong_arguments_are_refused(argument, value):
    with pytest.raises(ValueError, match=argument):
        sdser.MultiExitSER(**{"labels": LABELS, "backbone": "tiny", argument: value})


@pytest.mark.parametrize(("shape", "lengths"), [
    ((8000,), None), ((1, 399), None), ((2, 8000), [8000]), ((2, 8000), [8000, 399]), ((2, 8000), [8001, 500]),
])  # fmt: skip
def test_wrong_batches_are_refused(shape, lengths):
    with pytest.raises(ValueError):
        build()(torch.randn(shape), None if lengths is None else torch.tensor(lengths))


def test_an_exit_that_the_model_lacks_is_refused():
    model = build()
    for call in (partial(model, torch.randn(1, 8000)), partial(model.classify, torch.randn(8000)), model.truncate):
        with pytest.raises(ValueError, match="exit 3"):
            call(exit=3)


# -- training ---------------------------------------------------------------------------------------------------------
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


def test_time_mask_covers_its_share_in_spans_that_fit():
    config = build(mask_time_prob=0.2, mask_time_length=10).backbone.config
    hidden, frames = torch.zeros(400, 100, 1), torch.tensor([100, 30, 4, 1] * 100)
    valid = sdser.valid_mask(frames, 100)
    mask = sdser.sample_time_mask(config, hidden, valid)
    assert not (mask & ~valid).any()
    share = mask[frames == 100].float().mean().item()
    assert 0.14 < share < 0.2  # spans may overlap, so a little less than 0.2
    assert mask[frames == 4].sum(1).max() <= 2 and mask[frames == 1].sum() == 0
    runs = mask[frames == 100].float().diff(dim=1).eq(1).sum(1)
    assert runs.max() <= 3  # a few long spans, not scattered frames


def test_time_mask_covers_what_transformers_does():
    """Two spans at least, in many clips of 5.984 s, with the config of wav2vec2-base."""
    mask = sdser.sample_time_mask(sdser.load_config("base"), torch.zeros(4000, 298, 1), None)
    theirs = _compute_mask_indices((4000, 298), 0.05, 10, min_masks=2).mean()
    assert mask.float().mean().item() == pytest.approx(theirs, abs=0.002) == pytest.approx(0.066, abs=0.003)


# -- early exit -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def confident_model(layout, clips):
    """A model, clips, and a threshold at which these leave at different exits."""
    model = build(layout)
    for head in model.heads.values():
        head.classifier.weight *= 3
    waveforms = torch.stack([torch.sin(torch.arange(9000) * (0.05 + 0.1 * i)) for i in range(clips)])
    waveforms += 0.3 * torch.randn_like(waveforms)
    first = model(waveforms)[0].logits.softmax(-1).amax(-1).sort().values
    return model, waveforms, first[clips // 2 - 1 : clips // 2 + 1].mean().item()


@torch.no_grad()
def test_early_exit_drops_clips_and_gives_each_what_it_gets_alone(layout):
    model, waveforms, threshold = confident_model(layout, clips=6)
    lengths = torch.tensor([9000, 8000, 9000, 5000, 3000, 9000])
    every = model(waveforms, lengths)
    calls = count_layers(model)
    logits, exits = model.early_exit(waveforms, lengths, threshold)
    assert calls == [(layer, (exits >= layer).sum().item()) for layer in range(1, exits.max().item() + 1)]
    assert len(exits.unique()) > 1, "the test must see clips leave at different exits"
    for i, length in enumerate(lengths):
        confident = [output for output in every if output.logits[i].softmax(-1).max() >= threshold]
        expected = confident[0] if confident else every[-1]
        assert exits[i] == expected.exit
        close(logits[i], expected.logits[i])
        alone, alone_exit = model.early_exit(waveforms[i : i + 1, :length], None, threshold)
        assert alone_exit == exits[i]
        close(alone[0], logits[i])
    reached = model(waveforms[:1])[0].logits.softmax(-1).max().item()
    assert model.early_exit(waveforms[:1], None, reached)[1] == 1, "a threshold that is just reached"


@torch.no_grad()
def test_early_exit_trims_to_the_longest_that_stays(layout, monkeypatch):
    """The longest clip leaves first: the layers after it see no more frames than the others have."""
    model = build(layout)
    waveforms, lengths = 0.1 * torch.randn(3, 20_000), torch.tensor([20_000, 5000, 3000])
    every = model(waveforms, lengths)
    read_exit, frames = model.read_exit, []

    def read(exit, state):
        """Exit 1 is certain of the longest clip alone, exit 2 of none."""
        frames.append(state.hidden.shape[1])
        output = read_exit(exit, state)
        if exit < 4:
            output.logits[:] = 0
            output.logits[:1, 0] += 9 * (exit == 1)
        return output

    monkeypatch.setattr(model, "read_exit", read)
    logits, exits = model.early_exit(waveforms, lengths, 0.9)
    assert exits.tolist() == [1, 4, 4] and frames == [62, 15, 15]
    close(logits[1:], every[-1].logits[1:])


@torch.no_grad()
def test_another_stop_rule_is_one_function(layout, monkeypatch):
    """Patience: a clip leaves once two exits in a row agree. The model and evaluate.py both ask `should_stop`."""

    def agree(logits, threshold):
        return (logits[-2:].argmax(-1).diff(dim=0) == 0).any(0)  # with one exit so far, there is no pair

    model, waveforms, _ = confident_model(layout, clips=6)
    logits = torch.stack([output.logits for output in model(waveforms)])
    monkeypatch.setattr(sdser, "should_stop", agree)
    answers = logits.argmax(-1)
    expected = torch.where(answers[1] == answers[0], 2, 4)
    assert model.early_exit(waveforms, None, 0.5)[1].tolist() == expected.tolist()
    assert torch.tensor(model.exits)[evaluate.exit_index(logits, 0.5)].tolist() == expected.tolist()


def test_early_exit_needs_evaluation_mode_and_a_probability():
    with pytest.raises(ValueError):
        build().train().early_exit(torch.randn(1, 8000), None, 0.5)
    for threshold in (50.0, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            build().early_exit(torch.randn(1, 8000), None, threshold)


# -- classify and truncate --------------------------------------------------------------------------------------------
@torch.no_grad()
def test_classify_files_and_waveforms(wav):
    model, waveform = build(), 0.1 * torch.randn(9000)
    path = wav(waveform.numpy(), subtype="FLOAT")
    for exit in (None, 1, 2, 4):
        expected = model.eval()(waveform[None], exit=exit or 4)[0].logits.softmax(-1)[0]
        a, b = model.train().classify([path, waveform], exit=exit)
        assert model.training
        assert a._replace(milliseconds=0) == b._replace(milliseconds=0)
        assert a.exit == (exit or 4) and a.milliseconds > 0
        assert list(a.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert a.label == LABELS[expected.argmax()] and a.confidence == pytest.approx(expected.max().item(), abs=1e-6)
    for alone in (path, str(path), waveform, waveform.double().numpy()):
        [answer] = model.classify(alone)
        assert answer.probabilities == pytest.approx(a.probabilities, abs=1e-6)


def test_classify_with_thresholds():
    model, waveforms, threshold = confident_model("wav2vec2-base", clips=4)
    expected = model.early_exit(waveforms, None, threshold)[1].tolist()
    assert [p.exit for p in model.classify(list(waveforms), threshold=threshold)] == expected
    with pytest.raises(ValueError, match="auto"):
        model.classify(list(waveforms), threshold="auto")
    model.threshold = threshold
    assert [p.exit for p in model.classify(list(waveforms), threshold="auto")] == expected
    with pytest.raises(ValueError, match="threshold"):
        model.classify(list(waveforms), exit=1, threshold=0.5)


def test_a_model_trained_on_tiles_classifies_tiles():
    config = LAYOUTS["wav2vec2-base"].to_dict()  # without do_normalize, which transformers keeps elsewhere
    model = sdser.MultiExitSER(LABELS, config, tile_seconds=0.5).eval()
    assert model.backbone.config.do_normalize
    waveform = torch.randn(3000)
    tiled = torch.cat([waveform, waveform, waveform[:2000]])
    with torch.no_grad():
        expected = model(tiled[None])[-1].logits.softmax(-1)[0].tolist()
    assert list(model.classify(waveform)[0].probabilities.values()) == pytest.approx(expected, abs=1e-6)
    assert sdser.read_clip(torch.randn(9000), 0.5).shape == (8000,)


@torch.no_grad()
def test_truncated_model_is_its_own(layout):
    model = build(layout, head="attention")
    waveforms, lengths = padded_batch()
    small = model.truncate(2)
    assert small.exits == [2] and len(small.backbone.encoder.layers) == 2 and small.head_kinds == ["attention"]
    torch.testing.assert_close(small(waveforms, lengths)[0].logits, model(waveforms, lengths)[1].logits)
    for parameter in model.parameters():
        parameter.zero_()
    assert small(waveforms, lengths)[0].logits.abs().max() > 0
