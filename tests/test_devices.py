"""GPUs that are not here: what each gets, what a run takes of its memory, and whether a cycle would wait for the host.
Models stand on the meta device, which has every shape and no number: nothing is allocated or computed."""
import gc
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decode
import gto.training
import kernels
import train
from gto import evaluate, rollout
from gto.bench import __main__ as bench
from gto.bench import ablate
from gto.checkpoint import finish, remember_config
from gto.config import PRESETS, Config, fitting
from gto.data import Corpus, prepare
from gto.engine import Engine
from gto.loss import OBJECTIVES
from gto.ltd import __main__ as ltd
from gto.policy import AdaptiveEngine
from gto.model import Attention, ModelConfig, Target, cast
from gto.training import Stage, Texts, copy_of, new_head, train_head, train_target, write_texts
from gto.tree import TreeShape, ancestor_mask
from gto.util import UserError, compute_dtype, start
from gto.verify import Sampling
from kernels.acceptance import score_nodes
from kernels.graphs import Graphs
from tests.tiny import tiny_models

META = torch.device("meta")


# What a GPU gets -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capability, gigabytes, triton, dtype, fast, presets", [
    (None, 0, True, torch.float32, False, ("laptop", "chat")),
    ((6, 1), 8.5, True, torch.float32, False, ("gpu-small", "chat")),       # GTX 1080
    ((7, 0), 34, True, torch.float32, False, ("gpu-small", "chat")),        # V100: slow without bfloat16
    ((7, 5), 15.8, True, torch.float32, False, ("gpu-small", "chat")),      # T4
    ((8, 6), 8.3, True, torch.bfloat16, True, ("gpu-small", "chat")),       # RTX 3070
    ((8, 9), 16.8, False, torch.bfloat16, False, ("gpu-small", "chat")),    # RTX 4080, Windows
    ((8, 9), 25.3, True, torch.bfloat16, True, ("gpu", "real")),            # RTX 4090
    ((8, 0), 42.3, True, torch.bfloat16, True, ("gpu", "real")),            # A100
    ((9, 0), 84.9, False, torch.bfloat16, False, ("gpu", "real")),
    ((12, 0), 34, True, torch.bfloat16, True, ("gpu", "real"))])
def test_what_a_device_gets(monkeypatch, capability, gigabytes, triton, dtype, fast, presets):
    """fast: it runs kernels, and trains a target compiled."""
    device, compiled = "cuda:0" if capability else "cpu", []
    for name, value in {"get_device_capability": capability, "is_bf16_supported": True,
                        "get_device_properties": SimpleNamespace(total_memory=gigabytes * 1e9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for module in kernels, gto.training:
        monkeypatch.setattr(module, "HAS_TRITON", triton)
    monkeypatch.setattr(torch, "compile", compiled.append)
    for name in "Target", "optimizers_for", "train":                # all of it that needs the device to be there
        monkeypatch.setattr(gto.training, name, lambda *_, **__: SimpleNamespace(
            init_weights=lambda: SimpleNamespace(to=lambda device: None)))
    kernels.is_modern.cache_clear()
    try:
        assert compute_dtype(device) == dtype
        assert (fitting(device, False), fitting(device, True)) == presets
        x = SimpleNamespace(device=torch.device(device), is_cuda=bool(capability))
        with torch.no_grad():
            assert kernels.use_triton(x) == fast
        assert not kernels.use_triton(x)                            # with gradients
        train_target(Config(), SimpleNamespace(vocab_size=300), None, device)
        assert len(compiled) == fast
    finally:
        kernels.is_modern.cache_clear()


def test_work_begins_on_the_device_that_is_named(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in "cpu", "cuda:1":
        start(device)
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize("main, precision, arguments", [
    (train.main, "high", []), (ablate.main, "high", []), (decode.main, "highest", ["--prompt", "x"]),
    (bench.main, "highest", []), (ltd.main, "highest", [])])
def test_training_may_round_but_decoding_is_exact(monkeypatch, main, precision, arguments):
    """In float32 on a GPU, where "high" is TF32."""
    monkeypatch.setattr(sys, "argv", ["", "--device", "tpu", *arguments])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with pytest.raises(UserError, match="tpu"):
            main()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_type_may_be_named(tmp_path, monkeypatch):
    """Of a target and its head, in decode.py and in the benchmark."""
    seen, engine = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, target, head, *more, **options: (
        seen.extend(model.norm.weight.dtype for model in (target, head) if model), engine(
            self, target, head, *more, **options))[1])
    for name, model in zip(("target", "gto"), tiny_models(vocab=300)):
        finish(name, model, tmp_path)
    prepare(tmp_path / "data", inputs=[__file__], vocab_size=300)
    remember_config(tmp_path, Config(), Corpus(tmp_path / "data"))
    for program, flags in (decode, ["--prompt", "x"]), (bench, ["--head", f"{tmp_path}/gto.pt", "--limit", "1"]):
        for dtype in "float32", "bfloat16", "float16":
            seen.clear()
            monkeypatch.setattr(sys, "argv", ["", *flags, "--out-dir", str(tmp_path), "--max-new-tokens", "4",
                                              "--device", "cpu", *(["--dtype", dtype] if dtype != "float32" else [])])
            program.main()
            assert len(seen) >= 2 and set(seen) == {getattr(torch, dtype)}


# What a cycle does -----------------------------------------------------------------------------------------------

class NoLaunch:
    """In a kernel's place."""
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


def pretend_kernels(patch):
    """Where no gradient is needed, the way through the kernels, up to their launches."""
    for module in [module for name, module in sys.modules.items() if name.startswith("kernels.")]:
        for name in vars(module).copy():
            if name == "use_triton":
                patch.setattr(module, name, lambda x: not torch.is_grad_enabled())
            elif name.endswith("_kernel"):
                patch.setattr(module, name, NoLaunch())


class NeverWaits(TorchDispatchMode):
    """Fails at whatever makes the host wait for the device: values read, shapes that depend on them, copies."""
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, options = function.name(), options or {}
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        if name in ("aten::index.Tensor", "aten::index_put", "aten::index_put_"):     # by a mask, or by positions
            assert torch.bool not in [x.dtype for x in tree_leaves(arguments[1]) if x is not None], name
        else:
            assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags), name
        places = [x.device for x in tensors if x.dim()] + [torch.device(options.get("device") or META)]
        assert set(places) == {META}, name
        return function(*arguments, **options)


@pytest.mark.parametrize("way", ["kernels", "references"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=5, top_p=0.9)], ids=["greedy", "sampled"])
def test_a_cycle_never_waits_for_the_host(monkeypatch, way, sampling):
    target, head = (model.to(META) for model in tiny_models())
    engines = [Engine(target, head, TreeShape(3, 4, 9), sampling, batch=2, capacity=40),
               Engine(target, None, None, sampling, capacity=40)]
    if way == "kernels":
        pretend_kernels(monkeypatch)
    for engine in engines:
        with torch.inference_mode(), NeverWaits():
            engine.cycle()


def test_engines_capture_on_streams_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    one, other = (Graphs(torch.device("cuda"), ()) for _ in range(2))
    assert one.stream is not other.stream and one.pool is not other.pool


@pytest.mark.parametrize("kind, launched", [(Engine, 2), (AdaptiveEngine, 1)])
def test_who_queues_a_cycle_ahead(kind, launched):
    launches, copied = [], SimpleNamespace(synchronize=lambda: None)
    engine = SimpleNamespace(queue_ahead=kind.queue_ahead, device=torch.device("cuda"), launch=lambda: (
        launches.append(1), (torch.tensor([[0, 5]]), copied))[1])
    assert next(kind.cycles(engine)) == [[5]] and len(launches) == launched


def test_cycles_may_go_on_behind_the_end():
    """As one that is queued ahead does: it stays in the cache."""
    target, head = tiny_models()
    engine = Engine(target, head, TreeShape(3, 4, 9), batch=2, capacity=12)
    engine.prefill([[1, 2, 3]] * 2)
    engine.length.fill_(11)
    with torch.inference_mode():
        for _ in range(8):
            engine.cycle()
    assert engine.length.tolist() == [12, 12]


# What a run takes ------------------------------------------------------------------------------------------------

class Memory(TorchDispatchMode):
    """Counts the bytes of all live tensors on the meta device, and their peak. A value that is read is 0."""
    live = peak = 0

    def __init__(self):
        super().__init__()
        self.bytes, self.peaks = {}, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].device == META:
            return 0
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata not in self.bytes:
            self.bytes[storage._cdata] = -(-storage.nbytes() // 512) * 512             # as CUDA's allocator rounds
            self.live += self.bytes[storage._cdata]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.live -= self.bytes.pop(key)

    def stage(self, name, run):
        self.peak = self.live
        result = run()
        self.peaks[name] = self.peak
        return result


class Flash(torch.autograd.Function):
    """What attention that stores no scores allocates, and keeps for its backward pass."""
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, out := torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


class OnGPU(TorchFunctionMode):
    """What a GPU does and the meta device does not: attention without scores; matrix products in `autocast`."""
    autocast = None

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is F.scaled_dot_product_attention and "attn_mask" not in options:
            q, k, v = arguments
            assert q.shape[1] == k.shape[1] or options["enable_gqa"] and q.dtype == torch.bfloat16, "stores all scores"
            return Flash.apply(q, k, v)
        if function is torch.Tensor.tolist:
            return torch.zeros(arguments[0].shape, dtype=arguments[0].dtype).tolist()
        if function is F.linear and self.autocast:
            arguments = [x.to(self.autocast) for x in arguments[:2]]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("device, dtype, shared", [
    ("cpu", torch.float32, True), (META, torch.float32, False), (META, torch.float16, False),
    (META, torch.bfloat16, True)])
def test_key_heads_are_repeated_where_no_kernel_shares_them(monkeypatch, device, dtype, shared):
    found, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **options: (
        found.append((k.shape[1], options.get("enable_gqa"))), attend(q, k, v, **options))[1])
    layer, rotation = cast(Attention(ModelConfig(), 20), dtype).to(device), torch.ones(2, 1, 5, 16, device=device)
    layer(torch.ones(1, 5, 20, device=device, dtype=dtype), *rotation)
    assert found == [(2, True) if shared else (4, False)]


def one_step(stage, model, optimizers, loss_of, out, warmup=20, clip=1.0, accumulate=1):
    """What of `gto.training.train` takes memory: a batch, on top of an earlier one's gradients and of all moments."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
    (loss_of(0)[0] / accumulate).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()


@torch.inference_mode()
def one_cycle(engine, prompts, new_tokens):
    engine.prefill(prompts)
    engine.cycle()
    return [[0] * (len(prompt) + new_tokens) for prompt in prompts]


def trace(config, dtype, patch):
    """{stage: the bytes that a run of train.py takes at most} on a GPU that computes in dtype, nothing compiled."""
    def no_text(step, size, length, seed):
        return torch.zeros(size, length + 1, dtype=torch.long)

    def score_inner_nodes(target, tree, prefix, temperature=0.0, neighbours=1):
        """With half of the nodes inner ones, which is more than there are: how many, the values say."""
        (B, N), G = tree.tokens.shape, len(prefix.length)
        nodes = tree.tokens.new_zeros(G, B * N // 2 // G + neighbours)                # [G, W]
        hidden, *_ = target(nodes, nodes, ancestor_mask(nodes, nodes.shape[1]), prefix, keep_kv=False)
        _, log_prob = score_nodes(target.logits(hidden).flatten(0, 1)[None], tree.tokens.view(1, -1),
                                  torch.zeros_like(tree.tokens).view(1, -1), temperature)
        return tree.tokens, log_prob.view(B, N)

    names = "layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim"
    numbers = ModelConfig(config.vocab_size, **{n: getattr(config, n) for n in names}, max_len=4 * config.length)
    corpus = SimpleNamespace(vocab_size=config.vocab_size, batch=no_text)
    shape, memory, gpu = TreeShape.parse(config.tree), Memory(), OnGPU()
    for place, name, value in ((gto.training, "train", one_step), (Engine, "complete", one_cycle),
                               (rollout, "score_inner_nodes", score_inner_nodes)):
        patch.setattr(place, name, value)
    with memory, gpu:
        with META, pytest.MonkeyPatch.context() as training:
            training.setattr(Target, "init_weights", lambda target: target)
            gpu.autocast = dtype if dtype == torch.bfloat16 else None
            memory.stage("target", lambda: train_target(config, corpus, None, META))
            gpu.autocast = None
            target = cast(Target(numbers), dtype).eval().requires_grad_(False)
        memory.stage("texts", lambda: write_texts(replace(config, texts=2 * config.text_batch), target, corpus))
        tokens = torch.zeros(config.texts, config.length, dtype=torch.long)
        texts = Texts(tokens, torch.ones_like(tokens, dtype=torch.bool), [])
        few = texts._replace(tokens=torch.zeros(1, 1).long(), supervised=torch.ones(1, 1).bool())
        head = new_head(config, target, few)
        phase_one, phase_two = Stage("draft", 1, config.head_batch), Stage("gto", 1, config.gto_batch)
        memory.stage("draft", lambda: train_head(phase_one, config, target, head, texts, None))
        head.zero_grad()
        student = copy_of(head, target)
        objective = OBJECTIVES["gto"]
        memory.stage("gto", lambda: train_head(phase_two, config, target, student, texts, None, objective, head))
        student.zero_grad()
        prompts, most = [[0] * 128] * config.eval_prompts, config.eval_tokens

        def comparison():
            fixed = evaluate.fixed_text(target, prompts, most, 0.0, shape.depth)
            rows = torch.arange(len(prompts), device=META)
            evaluate.drafting(head, fixed, shape, 1.0)(rows, fixed.start)
            Engine(target, head, shape, batch=len(prompts), capacity=128 + most).complete(prompts, most)
        cast(head, dtype)
        memory.stage("table", comparison)
    return memory.peaks


@pytest.mark.parametrize("preset, dtype, with_kernels", [
    ("gpu", torch.bfloat16, True), pytest.param("gpu", torch.bfloat16, False, marks=pytest.mark.soak),
    ("gpu-small", torch.float32, False), pytest.param("gpu-small", torch.bfloat16, True, marks=pytest.mark.soak)])
def test_presets_fit_the_gpus_that_get_them(monkeypatch, preset, dtype, with_kernels):
    """With a reserve of 1 to 4 GB for what the driver, the allocator and captured graphs take besides."""
    if with_kernels:
        pretend_kernels(monkeypatch)
    peaks = trace(PRESETS[preset], dtype, monkeypatch)
    print({stage: f"{peak / 1e9:.1f} GB" for stage, peak in peaks.items()})
    assert len(peaks) == 5
    for gigabytes, room in (8, 7), (16, 14), (24, 22), (40, 38), (80, 76):
        assert max(peaks.values()) <= room * 1e9 or preset == "gpu" and gigabytes < 20


def test_training_a_target_keeps_only_what_it_learns_from(monkeypatch):
    unused, forward, logits = [], Target.forward, Target.logits

    def watched(*arguments, **options):
        hidden, *rest = forward(*arguments, **options)
        unused.extend(map(weakref.ref, tree_leaves(rest)))
        return hidden, *rest

    def later(target, hidden):
        assert unused and not [x for x in unused if x() is not None]
        return logits(target, hidden)

    monkeypatch.setattr(Target, "forward", watched)
    monkeypatch.setattr(Target, "logits", later)
    monkeypatch.setattr(gto.training, "train", lambda stage, model, optimizers, loss_of, *_, **__: loss_of(0))
    corpus = SimpleNamespace(vocab_size=29, batch=lambda step, size, length, seed: torch.ones(size, 9).long())
    train_target(PRESETS["smoke"], corpus, None, "cpu")


def test_an_engine_gives_its_memory_back_before_the_next_takes_its_own(monkeypatch):
    alive, target = weakref.WeakSet(), tiny_models()[0]

    class Watched(Engine):
        def __init__(self, *arguments, **options):
            assert not alive
            super().__init__(*arguments, **options)
            alive.add(self)

    monkeypatch.setattr(gto.training, "Engine", Watched)
    corpus = SimpleNamespace(batch=lambda step, size, length, seed: torch.ones(size, length + 1).long())
    gc.disable()
    try:
        tokens, _ = write_texts(Config(texts=6, text_batch=2, length=40), target, corpus)
    finally:
        gc.enable()
    assert tokens.shape == (6, 40) and not alive
