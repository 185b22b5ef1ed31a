"""A frozen head makes its gradient in the forward: as exact as TRL's, which multiplies by the head once more."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils as trainer_utils

from hf_qlora_fsdp import compat
from hf_qlora_fsdp.compat import trl_head_gradient
from hf_qlora_fsdp.compat.trl_head_gradient import PATCH, tokens_at_a_time
from tests.interpreted import needs_triton, run_interpreted

TOKENS, WORDS, HIDDEN = 300, 500, 64
OUTPUTS = ("entropy", "is_top1")
PLAIN = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0}
KINDS = {
    "plain": PLAIN,
    "scaled": PLAIN | {"temperature": 0.7, "logit_scale": 0.5},
    "softcapped": PLAIN | {"final_logit_softcapping": 3.0},
}


def make_case(dtype: torch.dtype, with_bias: bool, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "hidden": draw(TOKENS, HIDDEN).requires_grad_(),
        "weight": draw(WORDS, HIDDEN) / 8,
        "bias": draw(WORDS) if with_bias else None,
        "targets": torch.randint(WORDS, (TOKENS,), generator=generator).to(device),
    }


def call(function: Any, case: dict[str, Any], kind: dict[str, Any], outputs: tuple[str, ...] = OUTPUTS) -> Any:
    numbers = kind["temperature"], 128, kind["final_logit_softcapping"], kind["logit_scale"]
    return function.apply(*case.values(), *numbers, outputs)


def run(function: Any, case: dict[str, Any], kind: dict[str, Any]) -> list[torch.Tensor]:
    """Return log-probabilities, entropy and the gradient of a loss that weighs tokens differently."""
    logprobs, entropy, *_ = call(function, case, kind)
    weights = torch.linspace(-1, 2, TOKENS, device=logprobs.device)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), case["hidden"])
    return [logprobs.detach(), entropy.detach(), gradient]


def compute_exactly(case: dict[str, Any], kind: dict[str, Any]) -> list[torch.Tensor]:
    x = case["hidden"].detach().double().requires_grad_()
    bias = None if case["bias"] is None else case["bias"].double()
    z = kind["logit_scale"] * torch.nn.functional.linear(x, case["weight"].double(), bias)
    if (cap := kind["final_logit_softcapping"]) is not None:
        z = cap * torch.tanh(z / cap)
    logprobs = (z / kind["temperature"]).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    chosen = logprobs.gather(1, case["targets"][:, None])[:, 0]
    weights = torch.linspace(-1, 2, TOKENS, device=x.device, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((chosen * weights).sum(), x)
    return [chosen.detach(), entropy.detach(), gradient]


def compare(dtype: torch.dtype, with_bias: bool, kind: dict[str, Any], device: str = "cpu") -> None:
    case = make_case(dtype, with_bias, device)
    mine, theirs = run(PATCH.build(ChunkedLogProbFunction), case, kind), run(ChunkedLogProbFunction, case, kind)
    exact = compute_exactly(case, kind)
    assert mine[2].dtype == dtype
    for one, other, right in zip(mine, theirs, exact, strict=True):
        assert (one - right).norm() <= 1.5 * (other - right).norm() + 1e-6 * right.norm()


@pytest.fixture
def some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_head_gradient, "TILE_NUMEL", 129 * WORDS)
    assert tokens_at_a_time(WORDS) == 128  # thrice, the last time with 44


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_as_exact_as_trl(some_at_a_time, dtype, with_bias, kind):
    compare(dtype, with_bias, kind)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch 2.11's first product in autograd's thread
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_is_as_exact_as_trl_on_a_gpu(some_at_a_time, kind):
    compare(torch.bfloat16, True, kind, "cuda:0")


def test_every_statistic_is_there(some_at_a_time):
    case = make_case(torch.float32, True)
    mine, theirs = (
        call(function, case, PLAIN, chunked_logprob.OPTIONAL_OUTPUTS)
        for function in (PATCH.build(ChunkedLogProbFunction), ChunkedLogProbFunction)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5) and one.dtype == other.dtype
    assert [number is None for number in call(PATCH.build(ChunkedLogProbFunction), case, PLAIN, ("is_top1",))] == [
        False,
        True,
        True,
        True,
        False,
    ]


class Products(TorchDispatchMode):
    """Counts the numbers of tokens that are multiplied by a whole head, or by parts of it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            (rows, inner), columns = args[-2].shape, args[-1].shape[1]
            self.num_products += rows * inner * columns / (TOKENS * WORDS * HIDDEN)
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation puts out."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


def test_no_more_logits_are_there_than_with_trl(some_at_a_time):
    with Largest() as largest:
        run(PATCH.build(ChunkedLogProbFunction), make_case(torch.float32, True), PLAIN)
    assert largest.most == 128 * WORDS


def test_as_many_logits_at_a_time_as_trl_has():
    tile = chunked_logprob.TOKEN_CHUNK_SIZE * trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert tile == trl_head_gradient.TILE_NUMEL
    assert [tokens_at_a_time(num_words) for num_words in (32000, 128256, tile, 2 * tile)] == [4096, 1024, 1, 1]
    assert all(tokens_at_a_time(num_words) * num_words <= tile for num_words in (50257, 151936, 262144))


def test_two_products_instead_of_three():
    case = make_case(torch.float32, False)
    for function, expected in ((ChunkedLogProbFunction, 3), (PATCH.build(ChunkedLogProbFunction), 2)):
        with Products() as products:
            run(function, case, PLAIN)
        assert products.num_products == pytest.approx(expected)


def test_trl_does_what_is_not_ours():
    """A head that is trained, one in another dtype, no gradient, no tokens."""
    ours = PATCH.build(ChunkedLogProbFunction)
    case = make_case(torch.float32, True)
    for trained in ("weight", "bias"):
        changed = case | {trained: case[trained].clone().requires_grad_()}
        logprobs = call(ours, changed, PLAIN)[0]
        expected = torch.autograd.grad(call(ChunkedLogProbFunction, changed, PLAIN)[0].sum(), changed[trained])[0]
        assert torch.equal(torch.autograd.grad(logprobs.sum(), changed[trained])[0], expected) and expected.any()
    for changed in (case | {"hidden": case["hidden"].detach()}, case | {"weight": case["weight"].bfloat16()}):
        assert torch.equal(call(ours, changed, PLAIN)[0], call(ChunkedLogProbFunction, changed, PLAIN)[0])
    with torch.no_grad():
        assert not call(ours, case, PLAIN)[0].requires_grad
    none = {name: None if value is None else value[:0] for name, value in case.items() if name in ("hidden", "targets")}
    assert call(ours, case | none, PLAIN)[0].shape == (0,)


def test_an_unknown_version_is_left_alone_and_named(caplog):
    newer = dataclasses.replace(PATCH, name="for another head", affects="trl>=99")
    with caplog.at_level(logging.WARNING, "hf_qlora_fsdp"):
        compat.apply_or_say(newer)
    assert newer.name not in compat.active_patches()
    assert "for another head is not in place, since it is for trl>=99: Logits are made again" in caplog.text


def test_entropy_has_no_gradient_and_says_so():
    logprobs, entropy, *_ = call(PATCH.build(ChunkedLogProbFunction), make_case(torch.float32, False), PLAIN)
    with pytest.raises(RuntimeError, match="entropy of the head's words has no gradient"):
        (logprobs.sum() + entropy.sum()).backward()


def interpret() -> None:
    """Run TRL's Triton kernels as a GPU does, in a process that was started with TRITON_INTERPRET=1."""
    chunked_logprob._use_triton = lambda device: True
    trl_head_gradient.TILE_NUMEL = 129 * WORDS
    for kind in KINDS.values():
        compare(torch.float32, True, kind)
    print("compared all kinds")


@needs_triton
def test_kernels_give_the_same_in_the_interpreter():
    assert "compared all kinds" in run_interpreted(__name__)
