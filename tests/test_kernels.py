"""Every kernel against plain PyTorch: in Triton's interpreter on a CPU, natively on a GPU.

The interpreter gets bf16 silently wrong, so bf16 is tested on a GPU only. It also takes about 0.1 ms for every
operation of every program: sizes are odd rather than large.
"""
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gto.engine import Engine
from gto.tree import TreeShape
from kernels import acceptance, fused, tree_attention
from kernels.acceptance import score_nodes_triton
from kernels.tree_attention import tree_attention_triton
from tests.tiny import tiny_models, tiny_prompts

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # an empty split's weight
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE) if CUDA else [torch.float32, torch.float16]
# With gradients on the public functions are plain PyTorch, on a GPU too.
plain_attention, plain_scoring, plain_propose, plain_frontier = map(torch.enable_grad(), (
    tree_attention.tree_attention, acceptance.score_nodes, acceptance.propose, fused.frontier))
plain_norm, plain_rotate, plain_embed_norm_cat = map(torch.enable_grad(), (
    fused.add_rms_norm, fused.rotate, fused.embed_norm_cat))
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def by_kernel(monkeypatch):
    """As on a GPU: without gradients the kernels do the work."""
    for module in acceptance, fused, tree_attention:
        monkeypatch.setattr(module, "use_triton", lambda x: not torch.is_grad_enabled())


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def assert_close(got, want, tolerance):
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)


def random_trees(B, N, alphabet=4, seed=0):
    """tokens, parents [B, N], mask [B, N, N]: parents before children, siblings with different tokens."""
    rng = random.Random(seed)
    tokens, parents = torch.zeros(2, B, N, dtype=torch.long)
    mask = torch.eye(N, dtype=torch.bool).repeat(B, 1, 1)
    for b in range(B):
        free = {0: rng.sample(range(alphabet), alphabet)}          # tokens each node may still give to a child
        for j in range(1, N):
            parent = rng.choice([i for i in free if free[i]])
            parents[b, j], tokens[b, j] = parent, free[parent].pop()
            mask[b, j] |= mask[b, parent]
            free[j] = rng.sample(range(alphabet), alphabet)
    return tokens.to(DEVICE), parents.to(DEVICE), mask.to(DEVICE)


def attention_inputs(N, M, D, lengths, sequence=None, H=4, G=2, S=260, dtype=torch.float32, scale=1.0):
    """Strided as in the model: heads behind positions, and tree keys that are a slice of something larger."""
    B, C = len(lengths), max(sequence or range(len(lengths))) + 1
    q = randn(B, N, H, D, dtype=dtype, scale=scale).transpose(1, 2)
    k, v = (randn(B, M, G + 1, D, dtype=dtype)[:, :, :G].transpose(1, 2) for _ in range(2))
    k_cache, v_cache = (randn(C, G, S + 3, D, dtype=dtype)[:, :, :S] for _ in range(2))
    mask = torch.rand(B, N, M) < 0.3
    mask[:, range(N), range(M - N, M)] = True                          # a node sees itself
    sequence = None if sequence is None else torch.tensor(sequence, device=DEVICE)
    return q, k, v, mask.to(DEVICE), k_cache, v_cache, torch.tensor(lengths, device=DEVICE), sequence


def float64(arguments):
    return [x.double() if x is not None and x.is_floating_point() else x for x in arguments]


def assert_attention(arguments, tolerance=None):
    got, want = tree_attention_triton(*arguments), plain_attention(*float64(arguments))
    dtype = arguments[0].dtype
    assert got.dtype == dtype and got.shape == want.shape
    assert_close(got, want, tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, M, D, lengths, options", [
    (1, 1, 64, [259], {}),                                             # one-token decoding
    (1, 1, 20, [0], {}),                                               # nothing cached: the token sees itself only
    (7, 19, 80, [0, 260, 129], {"sequence": [1, 0, 1]}),               # a frontier; two trees share a cache row
    (60, 60, 128, [200], {}),
    (130, 130, 64, [65, 1], {"H": 2, "G": 1}),                 # more nodes than a block has rows or keys
    (7, 7, 32, [100], {"H": 4, "G": 4}), (7, 7, 32, [100], {"H": 6, "G": 2}), (7, 7, 32, [100], {"H": 5, "G": 1}),
    *(pytest.param(N, N, 128, [3000, 4095], {"H": 32, "G": G, "S": 4096}, marks=needs_gpu)
      for N in (1, 16, 60, 256) for G in (8, 32)),
])
def test_tree_attention(N, M, D, lengths, options, dtype):
    assert_attention(attention_inputs(N, M, D, lengths, dtype=dtype, **options))


@pytest.mark.parametrize("splits", [1, 2, 5, 7])                       # of 5, some are empty: blocks have 64 keys
def test_tree_attention_any_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(tree_attention, "split_count", lambda *_: splits)
    assert_attention(attention_inputs(7, 7, 64, [130, 0, 260]))


def test_tree_attention_extremes():
    # Scores of several hundred, whose exponentials overflow; rounding at that size is some 1e-4 of a weight.
    assert_attention(attention_inputs(7, 7, 64, [130], scale=100.0), tolerance=1e-3)
    # Nothing cached, and a node sees only itself: most blocks of tree keys are hidden from it.
    arguments = attention_inputs(130, 130, 16, [0], H=1, G=1)
    arguments[3].copy_(torch.eye(130, dtype=torch.bool))
    assert_attention(arguments)


def test_tree_attention_never_reads_past_the_length():
    arguments = attention_inputs(7, 7, 64, [130], dtype=torch.float16)
    want = tree_attention_triton(*arguments)
    for cache in arguments[4:6]:
        cache[:, :, 130:] = float("nan")                               # the leftovers of rejected drafts
    assert torch.equal(tree_attention_triton(*arguments), want)


def far_apart(*shape, dtype=torch.float16):
    """A tensor whose first dimension has stride 2^30, so that row 2 starts 2^31 numbers in. Pages that are not
    written take no memory on a CPU."""
    try:
        storage = torch.empty(2**31 + math.prod(shape[1:]), dtype=dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4 GB of address space")
    strides = [math.prod(shape[i + 1:]) for i in range(1, len(shape))]
    return storage.as_strided(shape, [2**30, *strides])


def test_tree_attention_offsets_beyond_int32():
    q, k, v, mask, k_cache, v_cache, length, _ = attention_inputs(3, 3, 16, [70], S=80, dtype=torch.float16)
    sequence = torch.tensor([2], device=DEVICE)
    far_k = far_apart(3, *k_cache.shape[1:])
    far_k[2] = k_cache[0]
    cache = k_cache.expand(3, *k_cache.shape[1:])
    want = tree_attention_triton(q, k, v, mask, cache, cache, length, sequence)
    assert torch.equal(tree_attention_triton(q, k, v, mask, far_k, far_k, length, sequence), want)


@needs_gpu
def test_one_cuda_graph_serves_every_length():
    arguments = attention_inputs(60, 60, 128, [5, 9], H=32, G=8, S=4096, dtype=torch.bfloat16)
    length = arguments[6]
    tree_attention_triton(*arguments)                                  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention_triton(*arguments)
    for lengths in [0, 0], [4096, 1], [700, 2049]:
        length.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, tree_attention_triton(*arguments))


def scoring_inputs(B, N, V, masked, dtype):
    logits = randn(B, N, V, dtype=dtype, scale=3.0)
    logits[..., V - masked:] = float("-inf")
    _, parents, _ = random_trees(B, N)
    return logits, torch.randint(V - masked, (B, N), device=DEVICE), parents, torch.rand(B, N, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("chunk", [128, 4096])                         # four chunks, the last one short, or one
def test_score_nodes(chunk, temperature, dtype, monkeypatch):
    monkeypatch.setattr(acceptance, "CHUNK", chunk)
    logits, tokens, parents, uniform = scoring_inputs(2, 7, 500, masked=130, dtype=dtype)
    choice, log_prob = score_nodes_triton(logits, tokens, parents, temperature, uniform)
    want, want_log_prob = plain_scoring(logits.double(), tokens, parents, temperature, uniform)
    assert_close(log_prob, want_log_prob, 1e-5)
    assert torch.equal(log_prob[:, 0], torch.zeros(2, device=DEVICE))
    if temperature == 0:
        assert torch.equal(choice, want)
    else:
        assert_inverse_cdf(logits, temperature, uniform, choice)
    again, none = score_nodes_triton(logits, None, None, temperature, uniform)
    assert torch.equal(again, choice) and none is None
    parents = parents.clamp(max=4)                                 # nodes 5 and 6 are leaves: without rows of their own
    few, uniform = logits[:, :5], uniform[:, :5]
    _, log_prob = score_nodes_triton(few, tokens, parents, temperature, uniform)
    assert_close(log_prob, plain_scoring(few.double(), tokens, parents, temperature, uniform)[1], 1e-5)


def assert_inverse_cdf(logits, temperature, uniform, choice):
    """The uniform number lies in the chosen token's share of the cumulated probability, up to rounding."""
    p = (logits.double() / temperature).softmax(-1)
    after = p.cumsum(-1).gather(-1, choice[..., None]).squeeze(-1)
    share = p.gather(-1, choice[..., None]).squeeze(-1)
    assert (share > 0).all()
    assert (uniform <= after + 1e-6).all() and (uniform >= after - share - 1e-6).all()


@pytest.mark.parametrize("score", [plain_scoring, score_nodes_triton])
def test_sampling_is_exact(score, monkeypatch):
    """Sixteen evenly spaced uniforms find every token exactly as often as its probability, in sixteenths, says."""
    monkeypatch.setattr(acceptance, "CHUNK", 4)
    sixteenths = torch.tensor([3, 0, 1, 0, 0, 0, 0, 0, 5, 2, 0, 1, 0, 4.0], device=DEVICE)
    logits = (sixteenths / 16).log().expand(1, 16, 14).contiguous()
    uniform = (torch.arange(16, device=DEVICE) + 0.5)[None] / 16
    choice, _ = score(logits, None, None, 1.0, uniform)
    assert choice[0].bincount(minlength=14).tolist() == sixteenths.tolist()


@pytest.mark.parametrize("score", [plain_scoring, score_nodes_triton])
def test_no_masked_token_is_drawn_and_of_a_tie_the_lowest_is_chosen(score, monkeypatch):
    monkeypatch.setattr(acceptance, "CHUNK", 128)
    logits = randn(1, 9, 500, scale=3.0)
    logits[..., :140] = logits[..., 260:390] = logits[..., 470:] = float("-inf")
    for u in 0.0, 1 - 2**-24:                                          # the least and the largest a uniform can be
        choice, _ = score(logits, None, None, 1.0, torch.full((1, 9), u, device=DEVICE))
        assert logits.gather(-1, choice[..., None]).isfinite().all()
    logits = torch.zeros(1, 3, 500, device=DEVICE)
    logits[0, 1, [77, 80, 300]] = 5.0
    logits[0, 2, 400] = torch.tensor(7.0).nextafter(torch.tensor(8.0))  # largest by one bit, which scaling loses
    logits[0, 2, 3] = 7.0
    assert score(logits)[0].tolist() == [[0, 77, 400]]


def test_score_nodes_offsets_beyond_int32():
    logits = randn(3, 100, dtype=torch.float16)
    far = far_apart(3, 100)
    far.copy_(logits)
    tokens, parents = torch.tensor([[[0, 0, 0]], [[0, 0, 2]]], device=DEVICE)
    got, want = (score_nodes_triton(x[None], tokens, parents) for x in (far, logits))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk, k, temperature", [(128, 7, 0.4), (512, 1, 1.0)])  # four chunks, of 5 at the end; one
def test_propose(chunk, k, temperature, dtype, by_kernel, monkeypatch):
    monkeypatch.setattr(acceptance, "PROPOSE_CHUNK", chunk)
    token_ids = torch.randperm(1000, device=DEVICE)[:389]
    distinct = torch.rand(2, 3, 389).argsort().to(DEVICE) / 64
    for ties, logits in (False, distinct), (True, randn(2, 3, 389, scale=3.0).round().to(dtype)):
        log_p, tokens = acceptance.propose(logits, token_ids, k, temperature)
        order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        assert torch.equal(tokens, token_ids[order])                   # the lowest index among equals
        want, want_tokens = plain_propose(logits, token_ids, k, temperature)
        assert_close(log_p, want, 1e-5)
        assert ties or torch.equal(tokens, want_tokens)
    log_p, tokens = acceptance.propose(logits[:, 0], token_ids, k, temperature)
    assert torch.equal(tokens, token_ids[order[:, 0]]) and log_p.shape == (2, k)


@pytest.mark.parametrize("m, k, M, dim", [(1, 3, 0, 20), (3, 3, 6, 1500), (1, 1, 0, 16), (5, 5, 20, 16)])
def test_frontier(m, k, M, dim, by_kernel):
    scores, tokens = randn(2, m * k).round(), torch.randint(99, (2, m * k), device=DEVICE)    # many ties
    seen = torch.rand(2, m, M, device=DEVICE) < 0.5
    arguments = scores, tokens, randn(2, m, dim), seen, 17
    for got, want in zip(fused.frontier(*arguments), plain_frontier(*arguments), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.skipif(CUDA, reason="tests/test_gpu.py decodes with the kernels")
def test_drafting_by_kernels_is_drafting(request):
    engine = Engine(*tiny_models(draft_vocab=23), TreeShape(3, 3, 9), batch=2, capacity=40)
    engine.prefill(tiny_prompts(2))
    want = engine.draft()
    request.getfixturevalue("by_kernel")
    got = engine.draft()                                               # extends the head by the same slots again
    assert_close(got.scores, want.scores, 1e-4)
    assert all(map(torch.equal, got[:4], want[:4]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [20, 128, 500])
def test_add_rms_norm(C, dtype, by_kernel):
    x, delta, weight = randn(2, 3, C, dtype=dtype), randn(2, 3, C, dtype=dtype), randn(C, dtype=dtype)
    part = randn(2, 5, C, dtype=dtype)[:, 1:4]
    for arguments in (x, delta, weight, 1e-5), (x, None, weight, 1e-5), (part, delta, weight, 1e-5):
        total, normed = fused.add_rms_norm(*arguments)
        want, want_normed = plain_norm(*arguments)
        assert torch.equal(total, want) and normed.dtype == dtype
        assert_close(normed, want_normed, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, D", [(3, 20), (11, 64)])
def test_rotate(heads, D, dtype, by_kernel):
    x = randn(2, 3, heads + 2, D, dtype=dtype)[:, :, :heads]
    angles = randn(2, 3, D // 2, scale=10.0)
    assert_close(fused.rotate(x, angles.cos(), angles.sin()),
                 plain_rotate(x, angles.cos(), angles.sin()), TOLERANCE[dtype])
    norms = randn(D, dtype=dtype), randn(D, dtype=dtype), heads - 1, 1e-5
    assert_close(fused.rotate(x, angles.cos(), angles.sin(), norms),
                 plain_rotate(x, angles.cos(), angles.sin(), norms), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [20, 500])
def test_embed_norm_cat(C, dtype, by_kernel):
    tokens, hidden = torch.randint(7, (2, 3), device=DEVICE), randn(2, 4, C, dtype=dtype)[:, 1:]
    for table in randn(7, C, dtype=dtype), randn(7, C):                # a head's own type may be another
        arguments = tokens, table, randn(C, dtype=dtype), hidden, randn(C, dtype=dtype), 1e-5
        got, want = fused.embed_norm_cat(*arguments), plain_embed_norm_cat(*arguments)
        assert got.dtype == dtype and got.shape == want.shape
        assert_close(got, want, TOLERANCE[dtype])


def test_references_work_without_triton():
    program = ("import sys; sys.modules['triton'] = None\n"
               "import torch\n"
               "from kernels import acceptance, fused, tree_attention\n"
               "print(acceptance.score_nodes(torch.eye(3)[None])[0].tolist())")
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True,
                         text=True)
    assert run.stdout.strip() == "[[0, 1, 2]]", run.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")              # torch's own, when it imports its compiler
def test_the_benchmark_asks_for_a_gpu(monkeypatch, capsys):
    from kernels import bench
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
