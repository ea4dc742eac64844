"""The loss and the metrics against numbers worked out step by step."""

import numpy as np
import pytest
import torch

import evaluate
from sdser import ExitOutput, fuse, self_distillation_loss

# Of the clips, the teacher is right about the first and wrong about the second, so that what only one of them counts
# for, such as exercise 7's divisor, shows.
LOGITS = np.array([
    [[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]], [[0.0, 2.0, 0.0], [1.0, -1.0, 3.0]], [[2.0, 0.0, 1.0], [-1.0, 0.0, 1.5]],
])  # fmt: skip
EMBEDDINGS = np.array([[[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.5, -1.0]]])
TARGETS = [0, 1]


def outputs():
    """Two students, at layers 3 and 8, and the teacher at layer 12."""
    tensors = [torch.tensor(values, dtype=torch.float32) for values in (LOGITS, EMBEDDINGS)]
    return [ExitOutput(k, z.clone().requires_grad_(), f.clone().requires_grad_())
            for k, z, f in zip((3, 8, 12), *tensors)]  # fmt: skip


def softmax(logits, t=1.0):
    powers = np.exp(logits / t)
    return powers / powers.sum(-1, keepdims=True)


def cross_entropy(logits, weights=(1, 1, 1)):
    return -sum(weights[y] * np.log(row[y]) for row, y in zip(softmax(logits), TARGETS)) / 2


@pytest.mark.parametrize(("alpha", "beta", "t", "weights"), [
    (1, 1, 1, None), (0.5, 2, 3, (0.5, 3.0, 2.0)), (0, 1, 1, None), (1, 0, 2, None),
])  # fmt: skip
def test_loss_is_the_equation(alpha, beta, t, weights):
    """The weights of the classes weigh the cross-entropies of all exits. One exit is plain fine-tuning."""
    class_weights = torch.tensor(weights) if weights else None
    loss, parts = self_distillation_loss(outputs(), torch.tensor(TARGETS), alpha, beta, t, True, class_weights)
    *ces, ce = (cross_entropy(logits, weights or (1, 1, 1)) for logits in LOGITS)
    teacher = softmax(LOGITS[2], t)
    divergences = [(teacher * np.log(teacher / softmax(logits, t))).sum() / 2 for logits in LOGITS[:2]]
    kl = t**2 * sum(divergences) / 2
    hint = ((EMBEDDINGS[:2] - EMBEDDINGS[2]) ** 2).mean()
    assert loss.item() == pytest.approx(ce + sum(ces) / 2 + alpha * kl + beta * hint, rel=1e-5)
    expected = dict(ce=ce, ce_students=sum(ces) / 2, kl=kl if alpha else 0, hint=hint if beta else 0)
    assert parts == pytest.approx(expected, rel=1e-5)
    assert all(part.shape == () and not part.requires_grad for part in parts.values())
    loss, parts = self_distillation_loss(outputs()[-1:], torch.tensor(TARGETS), alpha, beta, t, True, class_weights)
    assert loss.item() == pytest.approx(ce) and parts == {"ce": loss, "ce_students": 0, "kl": 0, "hint": 0}


def test_teacher_learns_from_its_labels_alone_unless_asked():
    for detach in (True, False):
        out = outputs()
        self_distillation_loss(out, torch.tensor(TARGETS), detach_teacher=detach)[0].backward()
        own = (softmax(LOGITS[2]) - np.eye(3)[TARGETS]) / 2  # d CE / d logits
        assert np.allclose(out[-1].logits.grad, own, atol=1e-6) == detach
        assert (out[-1].embedding.grad is None) == detach
        assert all(o.logits.grad.abs().sum() > 0 and o.embedding.grad.abs().sum() > 0 for o in out[:-1])


def test_fusion_takes_the_largest_margin():
    # margins by clip: student 3: 1, 0; student 8: 2, 2; teacher: 1, 1.5
    assert fuse(outputs()).tolist() == LOGITS[1].tolist()
    # adding a constant to all logits of an exit changes no margin
    shifted = [o._replace(logits=o.logits + 100 * i) for i, o in enumerate(outputs())]
    assert fuse(shifted).argmax(1).tolist() == [1, 2]
    assert fuse(torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 2.9, -9.0]]])).argmax() == 0  # by probabilities it would be 1


def test_uar_by_hand():
    #  class 0: 2 of 3 right; class 1: 1 of 2; class 2: absent from the targets; class 3: 0 of 1, never predicted
    targets, predictions = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 2, 0])
    # F1 = 2 hits / (true + predicted): 4 / (3 + 3), 2 / (2 + 2), 0 / (1 + 0), over the classes that occur
    expected = {"uar": (2 / 3 + 1 / 2 + 0) / 3, "accuracy": 3 / 6, "macro_f1": (4 / 6 + 2 / 4 + 0) / 3}
    logits = torch.nn.functional.one_hot(predictions, 4).float()
    assert evaluate.scores(targets, logits) == pytest.approx(expected)
    assert evaluate.metric(targets, logits) == pytest.approx(expected["uar"])
    assert evaluate.recalls(targets, logits) == pytest.approx([2 / 3, 1 / 2, np.nan, 0], nan_ok=True)
    confusion = evaluate.confusion_matrix(targets, logits)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
