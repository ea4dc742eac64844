"""The loss against numbers worked out in plain Python, and metrics against numbers worked out by hand."""

import math

import pytest
import torch

import sdser
from sdser import ExitOutput, fuse, self_distillation_loss

# Of the clips, the teacher is right about the first and wrong about the second, so that what only one of them counts
# for, such as exercise 7's divisor, shows.
STUDENT_LOGITS = [[[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]], [[0.0, 2.0, 0.0], [1.0, -1.0, 3.0]]]
TEACHER_LOGITS = [[2.0, 0.0, 1.0], [-1.0, 0.0, 1.5]]
STUDENT_EMBEDDINGS = [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [0.0, 0.0]]]
TEACHER_EMBEDDING = [[1.0, 1.0], [0.5, -1.0]]
TARGETS = [0, 1]


def outputs():
    """Two students, at layers 3 and 8, and the teacher at layer 12."""
    logits = torch.tensor([*STUDENT_LOGITS, TEACHER_LOGITS])
    embeddings = torch.tensor([*STUDENT_EMBEDDINGS, TEACHER_EMBEDDING])
    return [ExitOutput(k, z.clone().requires_grad_(), f.clone().requires_grad_())
            for k, z, f in zip((3, 8, 12), logits, embeddings)]  # fmt: skip


def softmax(row, t=1.0):
    powers = [math.exp(z / t) for z in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(logits):
    return -sum(math.log(softmax(row)[y]) for row, y in zip(logits, TARGETS)) / 2


def divergence(student, t):
    total = 0.0
    for teacher_row, student_row in zip(TEACHER_LOGITS, student):
        for p, q in zip(softmax(teacher_row, t), softmax(student_row, t)):
            total += p * math.log(p / q)
    return total / 2


def squared_error(student):
    return sum((a - b) ** 2 for f, g in zip(student, TEACHER_EMBEDDING) for a, b in zip(f, g)) / 4


@pytest.mark.parametrize(("alpha", "beta", "t"), [(1, 1, 1), (0.5, 2, 3), (0, 1, 1), (1, 0, 2)])
def test_loss_is_the_equation(alpha, beta, t):
    loss, parts = self_distillation_loss(outputs(), torch.tensor(TARGETS), alpha, beta, t)
    ce = cross_entropy(TEACHER_LOGITS)
    ce_students = sum(map(cross_entropy, STUDENT_LOGITS)) / 2
    kl = sum(t**2 * divergence(z, t) for z in STUDENT_LOGITS) / 2
    hint = sum(map(squared_error, STUDENT_EMBEDDINGS)) / 2
    assert loss.item() == pytest.approx(ce + ce_students + alpha * kl + beta * hint, rel=1e-5)
    expected = dict(ce=ce, ce_students=ce_students, kl=kl if alpha else 0, hint=hint if beta else 0)
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


def test_one_exit_is_plain_fine_tuning():
    loss, parts = self_distillation_loss(outputs()[-1:], torch.tensor(TARGETS))
    assert loss.item() == pytest.approx(cross_entropy(TEACHER_LOGITS))
    assert parts == {"ce": loss, "ce_students": 0, "kl": 0, "hint": 0}


def test_class_weights_weigh_the_cross_entropies_of_all_exits():
    weights = torch.tensor([0.5, 3.0, 2.0])
    loss, parts = self_distillation_loss(outputs(), torch.tensor(TARGETS), class_weights=weights)

    def weighted(logits):
        return -sum(weights[y].item() * math.log(softmax(row)[y]) for row, y in zip(logits, TARGETS)) / 2

    assert parts["ce"].item() == pytest.approx(weighted(TEACHER_LOGITS), rel=1e-5)
    assert parts["ce_students"].item() == pytest.approx(sum(map(weighted, STUDENT_LOGITS)) / 2, rel=1e-5)
    assert loss.item() == pytest.approx(sum(part.item() for part in parts.values()), rel=1e-5)


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
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 4).float()
    scores = sdser.scores(torch.tensor(targets), logits)
    assert scores["uar"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    # F1 = 2 hits / (true + predicted): 4 / (3 + 3), 2 / (2 + 2), 0 / (1 + 0), over the classes that occur
    assert scores["macro_f1"] == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    confusion = sdser.confusion_matrix(targets, predictions, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(("targets", "predictions"), [([0, 1], [3, 1]), ([0, -1], [0, 1]), ([], [])])
def test_class_indices_out_of_range_are_refused(targets, predictions):
    with pytest.raises(ValueError):
        sdser.unweighted_average_recall(targets, predictions, 3)
