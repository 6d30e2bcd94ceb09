"""Tiny random models of every family, their inputs, the paths of the offline toy, and how the tests run.

`python -m pytest` runs the whole suite in a process for each core, at most 4 (`-n 0`: in this one); what is named, in this one.
APET_TEST_DEVICE=cuda puts models and batches on a GPU.
"""

import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread, here or in what is started, only adds waiting
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a model hub; those of the stand-in say so themselves
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers as hf
from torch import nn

torch.set_num_threads(1)
DEVICE = os.environ.get("APET_TEST_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False
TOY = ROOT / "tests" / "toy"
VOCAB = 64
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:  # by nohup, or in the background: some tests send signals to what they start
        signal.signal(number, usual)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite, and nothing said of workers: as many as there are cores."""
    option, whole = config.option, config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and not hasattr(config, "workerinput") and getattr(option, "numprocesses", 0) is None:
        option.numprocesses = 0 if option.usepdb or option.collectonly else min(os.cpu_count() or 1, 4)
        option.dist, option.loadscopereorder = "loadscope", False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Each test goes to whoever is free, but those of test_hub, which share a hub, to one process."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = lambda nodeid: "hub" if "test_hub.py" in nodeid else nodeid
    return scheduler


FIRST = ("test_hub", "test_toy", "test_bench", "test_command")  # what takes longest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins early, so that no process waits long for the last one."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def ranks_of(count: int) -> list[dict[str, str]]:
    """The environment of each of several processes, as torchrun starts them."""
    own = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # no other worker's; the system gives others
    with socket.socket() as free:
        port = str(next(port for port in range(own + os.getpid() % 500, own + 1_000) if free.connect_ex(("localhost", port))))
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    group["TORCHELASTIC_RUN_ID"] = "none"
    return [{**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def forked(line: list[str], environment: dict[str, str]) -> Callable[[], None]:
    """preexec_fn for subprocess: `python script ...` runs in a fork of this process: imports, which take 6 s, are done."""

    def work() -> None:
        os.closerange(3, 1024)  # among them what Popen waits for
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, status = [str(a) for a in line[1:]], 1
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        try:
            if "accelerate" in sys.modules:  # it remembers that this process was alone
                sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    return work


class ConvNet(nn.Module):
    """Convolutions, BatchNorm in training mode, and an in-place activation right after a linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.hidden, self.classifier = nn.Linear(8 * 16, 32), nn.Linear(32, 5)

    def forward(self, pixel_values, labels):
        x = nn.functional.adaptive_avg_pool2d(self.features(pixel_values), 4).flatten(1)
        x = nn.functional.relu_(self.hidden(x))
        loss = nn.functional.cross_entropy(self.classifier(x).float(), labels)
        return type("Output", (), {"loss": loss})()


def _t5(tied: bool) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        feed_forward_proj="relu" if tied else "gated-gelu", initializer_factor=1.0,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config)
    if not tied:  # transformers ties it whatever the configuration says; the real v1.1 checkpoints are untied
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random model in training mode, without dropout."""
    torch.manual_seed(seed)
    if name.startswith("t5"):
        model = _t5(tied=name == "t5")
    elif name == "bert":
        c = hf.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                          max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        model = hf.BertForSequenceClassification(c)
    elif name == "bloom":
        c = hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
        model = hf.BloomForCausalLM(c)
    elif name == "gpt2":
        c = hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
                          attn_pdrop=0.0)  # fmt: skip
        model = hf.GPT2LMHeadModel(c)
    elif name == "opt":
        c = hf.OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, dropout=0.0,
                         max_position_embeddings=32, word_embed_proj_dim=32)  # fmt: skip
        model = hf.OPTForCausalLM(c)
    elif name == "llama":
        c = hf.LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           intermediate_size=48, max_position_embeddings=32)  # fmt: skip
        model = hf.LlamaForCausalLM(c)
    elif name == "vit":
        c = hf.ViTConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        model = hf.ViTForImageClassification(c)
    else:
        model = ConvNet()
    model = model.to(dtype).train()
    return model if torch.get_default_device().type == "meta" else model.to(DEVICE)


MODELS = ("t5", "t5-untied", "bert", "bloom", "gpt2", "opt", "llama", "vit", "conv")


def batch_for(name: str, seed: int = 0, size: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random inputs with labels; text inputs hold padding."""
    return {name: t.to(DEVICE) for name, t in inputs_for(name, seed, size, dtype).items()}


def inputs_for(name: str, seed: int, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    if name in ("vit", "conv"):
        pixels = torch.randn(size, 3, 16, 16, generator=g).to(dtype)
        return {"pixel_values": pixels, "labels": torch.randint(0, 2, (size,), generator=g)}
    ids = torch.randint(3, VOCAB, (size, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    ids[0, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        batch["labels"] = torch.randint(0, 2, (size,), generator=g)
    elif name.startswith("t5"):
        batch["labels"] = torch.randint(3, VOCAB, (size, 4), generator=g)
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch


def dense_gradient(model: nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
    """The reference: autograd's own gradient of every parameter, summed over the batches."""
    for p in model.parameters():
        p.requires_grad_(True)
        p.grad = None
    for batch in batches:
        model(**batch).loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return grads
