"""The loss against numbers worked out in plain Python, and metrics against numbers worked out by hand."""

import math

import pytest
import torch

import sdser
from sdser import ExitOutput, fuse, self_distillation_loss

STUDENT_LOGITS = [[[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]], [[0.0, 2.0, 0.0], [1.0, -1.0, 3.0]]]
TEACHER_LOGITS = [[2.0, 0.0, 1.0], [-1.0, 0.0, 1.5]]
STUDENT_EMBEDDINGS = [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [0.0, 0.0]]]
TEACHER_EMBEDDING = [[1.0, 1.0], [0.5, -1.0]]
TARGETS = [0, 2]


def outputs():
    students = [ExitOutput(k, torch.tensor(z, requires_grad=True), torch.tensor(f, requires_grad=True))
                for k, z, f in zip((3, 8), STUDENT_LOGITS, STUDENT_EMBEDDINGS)]  # fmt: skip
    teacher = torch.tensor(TEACHER_LOGITS, requires_grad=True), torch.tensor(TEACHER_EMBEDDING, requires_grad=True)
    return [*students, ExitOutput(12, *teacher)]


def softmax(row, t=1.0):
    powers = [math.exp(z / t) for z in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(logits):
    return -sum(math.log(softmax(row)[y]) for row, y in zip(logits, TARGETS)) / 2


def divergence(student, t):
    rows = zip(TEACHER_LOGITS, student)
    return sum(p * math.log(p / q) for z_d, z_k in rows for p, q in zip(softmax(z_d, t), softmax(z_k, t))) / 2


def hint(student):
    return sum((a - b) ** 2 for f, g in zip(student, TEACHER_EMBEDDING) for a, b in zip(f, g)) / 4


@pytest.mark.parametrize(("alpha", "beta", "t"), [(1, 1, 1), (0.5, 2, 3), (0, 1, 1), (1, 0, 2), (0, 0, 1)])
def test_loss_is_the_equation(alpha, beta, t):
    loss, parts = self_distillation_loss(outputs(), torch.tensor(TARGETS), alpha, beta, t)
    ce = sum(map(cross_entropy, STUDENT_LOGITS)) / 2
    kl = sum(t**2 * divergence(z, t) for z in STUDENT_LOGITS) / 2
    hints = sum(map(hint, STUDENT_EMBEDDINGS)) / 2
    assert loss.item() == pytest.approx(cross_entropy(TEACHER_LOGITS) + ce + alpha * kl + beta * hints, rel=1e-5)
    expected = dict(ce=cross_entropy(TEACHER_LOGITS), ce_students=ce, kl=kl if alpha else 0, hint=hints if beta else 0)
    assert parts == pytest.approx(expected, rel=1e-5)
    assert all(part.shape == () and not part.requires_grad for part in parts.values())


def test_teacher_learns_from_its_labels_alone_unless_asked():
    for detach in (True, False):
        out = outputs()
        self_distillation_loss(out, torch.tensor(TARGETS), detach_teacher=detach)[0].backward()
        own = torch.tensor([softmax(row) for row in TEACHER_LOGITS]) - torch.eye(3)[TARGETS]  # d CE / d logits
        assert torch.allclose(out[-1].logits.grad, own / 2, atol=1e-6) == detach
        assert (out[-1].embedding.grad is None) == detach
        assert all(o.logits.grad.abs().sum() > 0 and o.embedding.grad.abs().sum() > 0 for o in out[:-1])


def test_zero_weights_compute_nothing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(sdser.F, "kl_div", never)
    monkeypatch.setattr(sdser.F, "mse_loss", never)
    self_distillation_loss(outputs(), torch.tensor(TARGETS), kl_weight=0, hint_weight=0)
    with pytest.raises(AssertionError):
        self_distillation_loss(outputs(), torch.tensor(TARGETS), kl_weight=0, hint_weight=1)


def test_one_exit_is_plain_fine_tuning():
    loss, parts = self_distillation_loss(outputs()[-1:], torch.tensor(TARGETS))
    assert loss.item() == pytest.approx(cross_entropy(TEACHER_LOGITS))
    assert parts == {"ce": loss.item(), "ce_students": 0.0, "kl": 0.0, "hint": 0.0}


def test_fusion_takes_the_largest_margin():
    # margins by clip: student 3: 1, 0; student 8: 2, 2; teacher: 1, 1.5
    assert fuse(outputs()).tolist() == [STUDENT_LOGITS[1][0], STUDENT_LOGITS[1][1]]
    # adding a constant to all logits of an exit changes no margin
    shifted = [o._replace(logits=o.logits + 100 * i) for i, o in enumerate(outputs())]
    assert fuse(shifted).argmax(1).tolist() == [1, 2]


def test_uar_by_hand():
    #  class 0: 2 of 3 right; class 1: 1 of 2; class 2: absent from the targets; class 3: 0 of 1, never predicted
    targets, predictions = [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 2, 0]
    assert sdser.unweighted_average_recall(targets, predictions, 4) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    scores = sdser.scores(torch.tensor(targets), torch.tensor(predictions), 4)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    # F1 = 2 hits / (true + predicted): 4 / (3 + 3), 2 / (2 + 2), 0 / (1 + 0), over the classes that occur
    assert scores["macro_f1"] == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert sdser.confusion_matrix(targets, predictions, 4).tolist() == [
        [2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize(("targets", "predictions"), [([0, 1], [3, 1]), ([0, -1], [0, 1]), ([], [])])
def test_class_indices_out_of_range_are_refused(targets, predictions):
    with pytest.raises(ValueError):
        sdser.unweighted_average_recall(targets, predictions, 3)
