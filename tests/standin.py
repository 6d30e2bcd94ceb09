"""A stand-in for the Hugging Face hub on loopback, so that what tests run is the real path: names, files, caches, failures.

The server needs the standard library alone. `fill` makes what it serves: tiny random models and data sets, laid out as the
hub's own are (file names, configuration keys, columns, label numbers). By hand:

    python tests/standin.py          # prints its address: HF_ENDPOINT=that HF_HOME=an-empty-folder python apet.py ...
"""

import csv
import hashlib
import io
import json
import random
import re
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LARGE = (".safetensors", ".bin", ".parquet", ".model")  # what the hub keeps as LFS objects


class Standin:
    """`with Standin(root) as hub:` serves root/models/NAMESPACE/NAME/... and root/datasets/... at `hub.url`.

    `hub.mode` is how it behaves: "up"; "error" answers 500 to everything; "silent" takes the connection and never answers;
    "deaf" answers whether it is there, and nothing else; "cut" ends the connection half-way through each large file;
    "down" (the context manager `hub.behaves("down")`) listens no more.
    """

    def __init__(self, root: Path):
        self.root, self.mode, self.asked = Path(root), "up", []
        self._listen(0)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def _listen(self, port: int) -> None:
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _hang_up(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def behaves(self, mode: str) -> Iterator[None]:
        """In this mode for a while; `asked` starts anew."""
        self.mode, self.asked, port = mode, [], self.server.server_address[1]
        if mode == "down":
            self._hang_up()
        try:
            yield
        finally:
            self.mode = "up"
            if mode == "down":
                self._listen(port)

    def __enter__(self) -> "Standin":
        return self

    def __exit__(self, *error: object) -> None:
        self.mode = "up"  # lets go of those who wait
        self._hang_up()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, hub = True, False, None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks its name up, which can take seconds
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is no news


@cache
def commit_of(folder: Path) -> str:
    """40 hex digits that depend on every byte; what is served does not change."""
    digest = hashlib.sha1()
    for name in files_of(folder):
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


@cache
def files_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        hub.asked.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if hub.mode == "error":
            return self.send(500, {"error": "internal server error"})
        if hub.mode == "silent" or (hub.mode == "deaf" and self.path not in ("", "/")):
            while hub.mode in ("silent", "deaf"):
                time.sleep(0.02)
            self.close_connection = True
            return None
        path, _, query = self.path.partition("?")
        if path in ("", "/"):
            return self.send(200, b"a stand-in for the hub", kind="text/html")
        if m := API.fullmatch(path):
            if repo := self.repo(m[1], m[2], m[4] or "main"):
                self.about(repo, *m.groups()[:3], unquote(m[5] or "").strip("/"), parse_qs(query), body)
            return None
        if m := FILE.fullmatch(path):
            if repo := self.repo("datasets" if m[1] else "models", m[2], m[3]):
                self.file(repo, unquote(m[4]))
            return None
        return self.refuse(404, "", f"nothing at {self.path}")

    do_HEAD = do_POST = do_GET

    def send(self, status: int, body: object, headers: dict | None = None, kind: str = "application/json") -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        start, end, cut = 0, len(body), None
        headers = {"Content-Type": kind, "Date": formatdate(usegmt=True)} | (headers or {})
        if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(wanted[1]), min(int(wanted[2] or end), end - 1) + 1 if wanted[2] else end
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(body)}"
        if self.server.hub.mode == "cut" and "ETag" in headers and self.path.endswith(LARGE):
            cut = len(body) // 2
        self.send_response_only(status)
        for name, value in (headers | {"Content-Length": str(end - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[start : end if cut is None else max(start, cut)])
            self.close_connection |= cut is not None

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        """X-Error-Code decides which exception the client raises."""
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **headers})

    def repo(self, kind: str, name: str, revision: str) -> Path | None:
        folder = self.server.hub.root / kind / name
        if ".." in name or not folder.is_dir():  # whoever is not logged in is told 401: it may be private
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if unquote(revision) not in ("main", commit_of(folder)):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder

    def about(self, repo: Path, kind: str, name: str, verb: str | None, under: str, query: dict, body: bytes) -> None:
        if verb in (None, "revision"):
            self.send(200, {
                "_id": commit_of(repo)[:24], "id": name, "modelId": name, "sha": commit_of(repo), "private": False, "gated": False,
                "disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z",
                "createdAt": "2024-01-01T00:00:00.000Z", "siblings": [{"rfilename": f} for f in files_of(repo)],
            })  # fmt: skip
            return
        folders = {p.as_posix() for f in files_of(repo) for p in list(Path(f).parents)[:-1]}
        if verb == "paths-info":
            paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            paths = [paths] if isinstance(paths, str) else paths
            self.send(200, [self.entry(repo, p) for p in paths if p in folders or p in files_of(repo)])
        elif under and under not in folders:
            self.refuse(404, "EntryNotFound", f"{under} does not exist")
        else:
            inside = sorted(p for p in {*folders, *files_of(repo)} if not under or p.startswith(under + "/"))
            deep = query.get("recursive", [""])[0].lower() in ("true", "1")
            direct = [p for p in inside if "/" not in p[len(under) :].strip("/")]
            self.send(200, [self.entry(repo, p) for p in (inside if deep else direct)])

    def entry(self, repo: Path, path: str) -> dict:
        oid = hashlib.sha1(path.encode()).hexdigest()
        if (repo / path).is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        content = (repo / path).read_bytes()
        out = {"type": "file", "oid": oid, "size": len(content), "path": path}
        if path.endswith(LARGE):
            out["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return out

    def file(self, repo: Path, path: str) -> None:
        if path not in files_of(repo):
            return self.refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit_of(repo)})
        content = (repo / path).read_bytes()
        return self.send(200, content, {
            "X-Repo-Commit": commit_of(repo), "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(content)),
        }, "application/octet-stream")  # fmt: skip


# What it serves -------------------------------------------------------------------------------------------------------

WORDS = re.findall(
    r"\w+",
    "the a movie film book was is and but not never great terrible boring lovely long short story plot actor who wrote when "
    "where did they say yes no in of to it that with very much anna ben eva hello bye room food good bad",
)
SENTIMENT, NLI, QNLI = ("negative", "positive"), ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")
GLUE = {  # config: text columns, labels by number, splits without labels
    "sst2": (("sentence",), SENTIMENT, ("test",)),
    "mnli": (("premise", "hypothesis"), NLI, ("test_matched", "test_mismatched")),
    "qnli": (("question", "sentence"), QNLI, ("test",)),
    "rte": (("sentence1", "sentence2"), QNLI, ("test",)),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ()),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), ("test",)),
}
TRAIN, EVALUATION, TEST = 60, 16, 8  # rows


def texts(n: int, seed: int) -> list[str]:
    """That many different ones, of 2 to 14 words."""
    pick, out = random.Random(seed), {}
    while len(out) < n:
        out[" ".join(pick.choices(WORDS, k=pick.randint(2, 14)))] = None
    return list(out)


def corpus() -> list[str]:
    labels = [w for _, words, _ in GLUE.values() for w in words]
    return (
        texts(300, seed=9)
        + [f"Input: {a}: {b} Output: {b}" for a in WORDS[:9] for b in labels]
        + ["premise: hypothesis: 0123456789"]
    )


def fill(root: Path) -> Path:
    """Everything, into root/models and root/datasets."""
    fill_models(Path(root) / "models")
    fill_data(Path(root) / "datasets")
    return Path(root)


def fill_models(root: Path) -> None:
    """Random weights, larger than a new model's, so that what it says depends on what it reads."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

    tokenizer = unigram_tokenizer()
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=len(tokenizer) + 3, **shape))
    assert t5.lm_head.weight is t5.shared.weight
    for block in t5.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 5
    for name in ("t5-small", "t5-base", "t5-large"):  # the two others stay out of every cache until a test asks for them
        t5.save_pretrained(root / "google-t5" / name)
        tokenizer.save_pretrained(root / "google-t5" / name)

    # T5 v1.1 as Google uploaded it: no safetensors, no tokenizer.json, a head of its own
    folder = root / "google/t5-v1_1-small"
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(sentencepiece_model())
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": sentinels}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {"extra_ids": 100})
    config = shape | {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 256, "num_decoder_layers": 2,
        "dropout_rate": 0.1, "eos_token_id": 1, "pad_token_id": 0, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
        "is_encoder_decoder": True, "tie_word_embeddings": False, "use_cache": True, "output_past": True, "n_positions": 512,
        "layer_norm_epsilon": 1e-06, "relative_attention_num_buckets": 32,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    state = {n: t.clone() for n, t in hf.T5ForConditionalGeneration(hf.T5Config(**config)).state_dict().items()}
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"]) * 0.3
    torch.save(state, folder / "pytorch_model.bin")

    # the smallest BERT: a vocab.txt, a .bin with the heads of pretraining, a configuration without architectures
    folder = root / "google/bert_uncased_L-2_H-128_A-2"
    folder.mkdir(parents=True)
    words = sorted({w for line in corpus() for w in re.findall(r"\w+|[^\w\s]", line.lower())})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    config = {
        "hidden_size": 128, "hidden_act": "gelu", "initializer_range": 0.02, "vocab_size": len(words) + 5,
        "hidden_dropout_prob": 0.1, "num_attention_heads": 2, "type_vocab_size": 2, "max_position_embeddings": 512,
        "num_hidden_layers": 2, "intermediate_size": 512, "attention_probs_dropout_prob": 0.1, "model_type": "bert",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    wide = hf.BertConfig(**{n: v for n, v in config.items() if n != "model_type"} | {"initializer_range": 0.1})
    torch.save(hf.BertForPreTraining(wide).state_dict(), folder / "pytorch_model.bin")

    bytes_tokenizer = bpe_tokenizer(pad="<pad>", padding_side="left")
    config = hf.BloomConfig(vocab_size=len(bytes_tokenizer) + 4, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    save_causal(root / "bigscience/bloom-560m", hf.BloomForCausalLM(config).half(), bytes_tokenizer)

    # neither has a token for padding, and both count their places from the first token
    ends = {"bos_token_id": bytes_tokenizer.bos_token_id, "eos_token_id": bytes_tokenizer.eos_token_id}
    config = hf.GPT2Config(
        vocab_size=len(bytes_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=300, initializer_range=0.3, **ends
    )
    save_causal(root / "someone/gpt2", hf.GPT2LMHeadModel(config), bpe_tokenizer())
    config = hf.LlamaConfig(
        vocab_size=len(bytes_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=300, initializer_range=0.3, **ends,
    )  # fmt: skip
    save_causal(root / "someone/llama", hf.LlamaForCausalLM(config), bpe_tokenizer(adds_first=True))


def save_causal(folder: Path, model: object, tokenizer: object) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unigram_tokenizer() -> object:
    """T5's, with four sentinels."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    t.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"))
    return hf.T5Tokenizer(vocab=[tuple(entry) for entry in json.loads(t.to_str())["model"]["vocab"]], extra_ids=4)


def sentencepiece_model() -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, vocab_size=150, model_type="unigram", pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def bpe_tokenizer(pad: str | None = None, adds_first: bool = False, **more: object) -> object:
    """On bytes, as BLOOM's, GPT-2's and LLaMA 3's; `adds_first`: puts <s> before a text."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    if adds_first:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad, **more
    )


def fill_data(root: Path) -> None:
    configs = []
    for seed, (config, (columns, labels, hidden)) in enumerate(GLUE.items()):
        validation = ("validation_matched", "validation_mismatched") if config == "mnli" else ("validation",)
        sizes = {"train": TRAIN, **dict.fromkeys(validation, EVALUATION), **dict.fromkeys(hidden or ("test",), TEST)}
        splits = {}
        for i, (split, n) in enumerate(sizes.items()):
            rows = {c: texts(n, seed=1000 + 100 * seed + 10 * i + j) for j, c in enumerate(columns)}
            labelled = [-1 if split in hidden else k % len(labels) for k in range(n)]
            splits[split] = rows | {"label": labelled, "idx": list(range(n))}
        configs.append((config, labels, f"{config}/{{}}-00000-of-00001.parquet", splits))
    parquet_repo(root / "nyu-mll/glue", configs)

    def sentiment(sizes: dict[str, int], seed: int, column: str = "text", label: str = "label", last: str = "") -> dict:
        """`last`: the split without labels"""
        return {
            s: {column: texts(n, seed + i), label: [-1 if s == last else k * 2 // n for k in range(n)]}
            for i, (s, n) in enumerate(sizes.items())
        }

    names, sizes = ("neg", "pos"), {"train": TRAIN, "validation": EVALUATION, "test": TEST}
    splits = sentiment({"train": TRAIN, "test": EVALUATION, "unsupervised": TEST}, 10, last="unsupervised")
    parquet_repo(root / "stanfordnlp/imdb", [("plain_text", names, "plain_text/{}-00000-of-00001.parquet", splits)])
    parquet_repo(root / "cornell-movie-review-data/rotten_tomatoes", [("default", names, "{}.parquet", sentiment(sizes, 20))])
    splits = {}
    for i, (split, n) in enumerate({"train": TRAIN, "validation": EVALUATION}.items()):
        answers = [[w] * (1 + k % 2) for k, w in enumerate(texts(n, 35 + i))]
        splits[split] = {"question": [f"who wrote {t}" for t in texts(n, 30 + i)], "answer": answers}
    parquet_repo(root / "google-research-datasets/nq_open", [("nq_open", None, "nq_open/{}-00000-of-00001.parquet", splits)])
    parquet_repo(root / "someone/broken", [("default", names, "{}.parquet", sentiment({"train": TRAIN}, 90))])
    file = root / "someone/broken/train.parquet"  # its foot, which says what there is, is right
    file.write_bytes(b"\xff" * 1000 + file.read_bytes()[1000:])
    # a data set that is in nobody's table, with two configurations; one of them has no validation split
    parquet_repo(root / "someone/reviews", [
        ("long", ("awful", "fine"), "long/{}.parquet", sentiment(sizes, 40, "body", "stars")),
        ("short", ("dull", "fun"), "short/{}.parquet", sentiment({"train": TRAIN, "test": TEST}, 50, "body", "stars")),
    ])  # fmt: skip

    folder = root / "knkarthick/samsum"
    folder.mkdir(parents=True)
    for i, (split, n) in enumerate(sizes.items()):
        rows = [
            [f"{split}{k}", f'Anna: {d}\nBen: hello, "{d[:9]}"', s]
            for k, (d, s) in enumerate(zip(texts(n, 60 + i), texts(n, 65 + i), strict=True))
        ]
        if split == "train":
            rows.insert(7, ["empty", "", "nobody says a word"])
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([["id", "dialogue", "summary"], *rows])

    # multi_news itself holds a loading script, which leaves a trace if somebody runs it; a user's copy holds parquet
    folder = root / "alexfabbri/multi_news"
    folder.mkdir(parents=True)
    (folder / "multi_news.py").write_text('import os, datasets\nopen(os.environ["STANDIN_TRACE"], "w").close()\n')
    splits = {}
    for i, (split, n) in enumerate(sizes.items()):
        documents = [f"{a} \n {b} ||||| {a}" for a, b in zip(texts(n, 70 + i), texts(n, 75 + i), strict=True)]
        splits[split] = {"document": documents, "summary": texts(n, 80 + i)}
    parquet_repo(root / "Awesome075/multi_news_parquet", [("default", None, "data/{}-00000-of-00001.parquet", splits)])


def parquet_repo(folder: Path, configs: Iterable[tuple[str, tuple[str, ...] | None, str, dict[str, dict[str, list]]]]) -> None:
    """Parquet files, and a README whose head holds the columns' types and which file is which split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    infos, paths = "", ""
    for config, labels, pattern, splits in configs:
        first = next(iter(splits.values()))
        infos += f"- config_name: {config}\n  features:\n"
        for column, values in first.items():
            infos += f"  - name: {column}\n"
            if isinstance(values[0], list):
                infos += "    sequence: string\n"
            elif isinstance(values[0], str):
                infos += "    dtype: string\n"
            elif column == "idx":
                infos += "    dtype: int32\n"
            else:
                infos += "    dtype:\n      class_label:\n        names:\n"
                infos += "".join(f"          '{i}': {word}\n" for i, word in enumerate(labels))
        infos += "  splits:\n"
        paths += f"- config_name: {config}\n  data_files:\n"
        for split, columns in splits.items():
            n = len(next(iter(columns.values())))
            infos += f"  - name: {split}\n    num_bytes: {100 * n}\n    num_examples: {n}\n"
            paths += f"  - split: {split}\n    path: {pattern.format(split)}\n"
            file = folder / pattern.format(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            types = {"idx": pa.int32()} if "idx" in columns else {}
            table = pa.table({c: pa.array(v, types.get(c)) for c, v in columns.items()})
            pq.write_table(table, file)
        infos += "  download_size: 1000\n  dataset_size: 1000\n"
    (folder / "README.md").write_text(f"---\ndataset_info:\n{infos}configs:\n{paths}---\n# A stand-in\n")


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made, Standin(fill(Path(made))) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()
