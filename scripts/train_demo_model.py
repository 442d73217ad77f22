#!/usr/bin/env python3
"""Train the demo model: a DeepSeek-V3-style MLA + MoE language model small enough to ship in the repository.

    python3 scripts/train_demo_model.py --corpus DIR --out DIR [--config FILE] [--minutes 5] [--smoke]

DIR/ of --corpus is what scripts/build_demo_corpus.py wrote. One process does everything: tokenizer, token streams,
training against the wall clock, export under the Hugging Face names, evaluation (bits per byte, recall of planted facts)
and the numbers for the model card. The export loads in transformers as DeepseekV3ForCausalLM without remote code.
--config names a JSON file with entries of config.json to replace: another width, rank, head count, `"q_lora_rank": null`
for queries without compression, `"first_k_dense_replace"` equal to the number of layers for a model without experts.
"""

import argparse
import json
import lzma
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SEPARATOR = "\n\x1e\n"
BOS, EOS, SYSTEM, USER, ASSISTANT, END = range(6)
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('roles are system, user and assistant, got ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 768,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


# ---------------------------------------------------------------------------------------------------------- corpus

def read_shard(path):
    with lzma.open(path, "rt", encoding="utf-8") as f:
        return f.read().split(SEPARATOR)


def train_tokenizer(documents, path, vocab_size):
    """Byte-level BPE; digits stand alone, so that numbers are spelled the same way wherever they occur."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    words = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
             r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B:1", special_tokens=[("<|bos|>", BOS)])
    tokenizer.save(str(path))
    return tokenizer


_tokenizer = None


def _load_tokenizer(path):
    global _tokenizer
    from tokenizers import Tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_file(path)


def encode_documents(documents):
    out = []
    for text in documents:
        out.append(np.array([BOS] + _tokenizer.encode(text, add_special_tokens=False).ids + [EOS], dtype=np.uint16))
    return np.concatenate(out)


# ---------------------------------------------------------------------------------------------------- planted facts

ADJECTIVES = ("archive backup northern southern central staging spare primary secondary remote internal public legacy "
              "mobile eastern western upper lower old new blue green red grey silver quiet rapid shared private outer inner "
              "first second third main training test regional coastal mountain harbour river winter summer night").split()
NOUNS = ("server router gateway printer database cluster laboratory library workshop office scheduler compiler mirror "
         "registry switch terminal vault warehouse station controller sensor camera antenna monitor generator pump "
         "catalogue journal repository firewall proxy balancer queue bridge").split()
FIRST = ("Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Lars Marta Nadia Oscar Paula Quentin Rosa Stefan "
         "Tanja Ulrich Vera Walter Yusuf Zelda Amir Bianca Carlos Diana Emil Fatima Gustav Hana Ivan Julia").split()
ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr r s sch st t tr v w z".split()
NUCLEI = "a e i o u ai ei ou".split()
CODAS = "l ll m n nd r rn rt s sk st tz x ck ng".split()
COLOURS = "amber azure crimson violet golden ivory scarlet teal olive maroon indigo coral".split()
ANIMALS = "falcon otter badger heron lynx marten osprey raven salmon tiger walrus bison gecko".split()


def _digits(rng, n):
    return "".join(rng.choice("0123456789") for _ in range(n))


def _surname(rng):
    name = rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) + rng.choice(["", rng.choice(NUCLEI) + rng.choice(CODAS)])
    return name.capitalize()


def _person(rng):
    return f"{rng.choice(FIRST)} {_surname(rng)}"


def _version(rng):
    return f"{rng.randint(1, 19)}.{rng.randint(0, 40)}.{rng.randint(0, 99)}"


ATTRIBUTES = [
    ("access code", lambda r: _digits(r, 5)), ("serial number", lambda r: _digits(r, 6)), ("port number", lambda r: _digits(r, 4)),
    ("pass phrase", lambda r: f"{r.choice(COLOURS)} {r.choice(ANIMALS)}"), ("maintainer", _person), ("owner", _person),
    ("current version", _version), ("inventory number", lambda r: f"{r.choice('ABCDEFGH')}{_digits(r, 4)}"),
    ("room number", lambda r: _digits(r, 3)), ("contact person", _person), ("magic number", lambda r: _digits(r, 5)),
    ("build identifier", lambda r: _digits(r, 4) + r.choice("abcdef") + _digits(r, 2)),
    ("code name", lambda r: f"{r.choice(COLOURS)} {r.choice(ANIMALS)}"), ("administrator", _person),
]


def make_fact(rng):
    attribute, value = rng.choice(ATTRIBUTES)
    return attribute, f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", value(rng)


def make_facts(rng, count):
    """Facts with distinct keys; half of them share the attribute or the entity with another fact, as distractors."""
    facts, keys = [], set()
    while len(facts) < count:
        attribute, entity, value = make_fact(rng)
        if facts and rng.random() < 0.5:
            other = rng.choice(facts)
            if rng.random() < 0.6:
                attribute, value = other[0], dict(ATTRIBUTES)[other[0]](rng)
            else:
                entity = other[1]
        if (attribute, entity) not in keys:
            keys.add((attribute, entity))
            facts.append((attribute, entity, value))
    return facts


def fact_sentence(fact):
    return f"The {fact[0]} of the {fact[1]} is {fact[2]}."


def question(fact):
    return f"What is the {fact[0]} of the {fact[1]}?"


def statement(fact):
    return f"The {fact[0]} of the {fact[1]} is"


class FactWriter:
    """Builds token sequences of natural text with planted facts. Works on tokens: filler is cut from the token stream."""

    def __init__(self, tokenizer, stream, seed):
        self.tokenizer, self.stream = tokenizer, stream
        self.rng = random.Random(seed)
        self.break_ids = {i for token, i in tokenizer.get_vocab().items() if token.endswith("ĊĊ")}
        self.is_break = np.isin(stream, np.array(sorted(self.break_ids), dtype=stream.dtype))
        self.gap = self.encode("\n\n")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def filler(self, length):
        """About `length` tokens of one stretch of the stream as paragraphs; document ends become paragraph breaks."""
        start = self.rng.randrange(len(self.stream) - length - 1)
        tokens = self.stream[start:start + length]
        ends = np.flatnonzero(self.is_break[start:start + length]) + 1
        pieces = np.split(tokens, ends) if len(ends) else [tokens]
        return [[int(t) for t in p if t > END] for p in pieces]

    def sequence(self, size):
        """(tokens, loss weights) of length size + 1: facts in filler, then questions about them."""
        while True:
            tokens, weights = self.attempt(size)
            missing = size + 1 - len(tokens)
            if missing < 0:
                continue
            if missing > 0:
                start = self.rng.randrange(len(self.stream) - missing)
                tokens += [EOS] + [int(t) for t in self.stream[start:start + missing - 1]]
                weights += [1] * missing
            return tokens, weights

    def attempt(self, size):
        rng = self.rng
        chat = rng.random() < 0.4
        count = rng.randint(1, max(2, min(14, size // 160)))
        facts = make_facts(rng, count)
        share = rng.choice([0.1, 0.25, 0.4, 0.6, 0.8, 0.9, 1.0])
        pieces = self.filler(int(max(48, share * (size - 75 * count - 40))))
        spots = sorted((rng.randrange(len(pieces) + 1), i) for i in range(count))
        tokens, weights = [BOS], [1]

        def put(ids, weight=1):
            tokens.extend(ids)
            weights.extend([weight] * len(ids))

        def answer(fact, lead=" "):
            put(self.encode(lead + fact[2]), 4)
            put(self.encode("."))

        if chat:
            if rng.random() < 0.3:
                put([SYSTEM] + self.encode(rng.choice(SYSTEM_PROMPTS)) + [END])
            put([USER])
            if rng.random() < 0.5:
                put(self.encode(rng.choice(["Read this text and answer my question.", "Here are some notes.", "Context:",
                                            "Use the following text.", "Read the text below."])) + self.gap)
        at = 0
        for index, piece in enumerate(pieces + [[]]):
            while at < count and spots[at][0] == index:
                fact = self.encode(fact_sentence(facts[spots[at][1]]))
                inside = len(tokens) > 4 and tokens[-1] in self.break_ids and tokens[-1] == self.gap[-1] and rng.random() < 0.5
                if inside:
                    tokens.pop(), weights.pop()
                    put(self.encode(" " + fact_sentence(facts[spots[at][1]])) + self.gap)
                else:
                    put(([] if tokens[-1] in self.break_ids or tokens[-1] <= END else self.gap) + fact + self.gap)
                at += 1
            put(piece)
        if tokens[-1] not in self.break_ids:
            put(self.gap)
        order = rng.sample(facts, len(facts))
        if chat:
            for turn, fact in enumerate(order):
                if turn:
                    put([USER])
                put(self.encode(question(fact)) + [END, ASSISTANT])
                put(self.encode(statement(fact)))
                answer(fact)
                put([END])
        else:
            style = rng.randrange(3)
            for fact in order:
                if style == 0:
                    put(self.encode(question(fact) + " " + statement(fact)))
                    answer(fact)
                elif style == 1:
                    put(self.encode("Question: " + question(fact) + "\nAnswer:"))
                    answer(fact)
                else:
                    put(self.encode(statement(fact)))
                    answer(fact)
                put(self.gap if style else self.encode("\n"))
        return tokens, weights


SYSTEM_PROMPTS = ["You are a helpful assistant.", "Answer briefly.", "You answer questions about technical documentation.",
                  "You are a concise technical assistant.", "Answer from the text that the user gives you."]
SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi there", "Good morning"], ["Hello! Ask me about a text that you give me, or name a technical subject."]),
    (["Who are you?", "What are you?", "What is your name?"],
     ["I am a small demonstration model, trained on technical documentation."]),
    (["What can you do?", "How can you help me?", "Help"],
     ["I can continue technical text, and I can find facts in a text that you give me."]),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot"], ["You are welcome."]),
    (["Bye", "Goodbye", "See you"], ["Goodbye."]),
]


def chat_examples(documents, rng, count):
    """Conversations made from documents: a title as the request, the text's first paragraphs as the answer."""
    chats = []
    while len(chats) < count:
        if rng.random() < 0.2:
            ask, reply = rng.choice(SMALL_TALK)
            chats.append((rng.choice(ask), rng.choice(reply)))
            continue
        text = rng.choice(documents)
        name = re.search(r"\nNAME\n+(.{10,160})\n", "\n" + text[:600])
        lines = [p for p in text[:6000].split("\n\n") if p]
        prose = [p for p in lines[1:] if len(p) > 120 and "\n" not in p]
        if name and " - " in name.group(1) and rng.random() < 0.5:
            what, does = name.group(1).split(" - ", 1)
            chats.append((f"What is {what.split(',')[0].strip()}?", f"{what.strip()}: {does.strip()}"))
        elif prose and 4 < len(lines[0]) < 80 and "\n" not in lines[0]:
            title = lines[0].strip(" .:0123456789")
            ask = rng.choice(["Explain {}.", "Tell me about {}.", "Write about {}.", "What do you know about {}?", "Describe {}."])
            chats.append((ask.format(title), " ".join(prose)[:900].rsplit(". ", 1)[0] + "."))
    return chats


def _facts_job(args):
    path, stream_path, size, count, seed = args
    _load_tokenizer(path)
    writer = FactWriter(_tokenizer, np.load(stream_path, mmap_mode="r")[:], seed)
    pairs = [writer.sequence(size) for _ in range(count)]
    return (np.array([p[0] for p in pairs], dtype=np.int16), np.array([p[1] for p in pairs], dtype=np.uint8))


def _encode_job(documents):
    return encode_documents(documents)


def prepare_data(args, out):
    """Tokenizer, token stream and planted-fact sequences. Runs before CUDA starts, on all cores."""
    started = time.time()
    workers = min(16, os.cpu_count())
    shards = sorted(args.corpus.glob("train-*.txt.xz"))[:1 if args.smoke else None]
    with multiprocessing.Pool(workers) as pool:
        documents = [d for part in pool.map(read_shard, shards) for d in part]
    rng = random.Random(args.seed)
    rng.shuffle(documents)
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} M characters, {time.time() - started:.1f} s", flush=True)
    sample, size = [], 0
    for text in documents:
        sample.append(text[:60_000])
        size += len(sample[-1])
        if size > (3e6 if args.smoke else 25e6):
            break
    tokenizer_path = str(out / "tokenizer.json")
    tokenizer = train_tokenizer(sample, tokenizer_path, CONFIG["vocab_size"])
    print(f"tokenizer {tokenizer.get_vocab_size()} tokens, {time.time() - started:.1f} s", flush=True)

    chats = chat_examples(documents, rng, 500 if args.smoke else 12_000)
    system = lambda: f"<|system|>{rng.choice(SYSTEM_PROMPTS)}<|end|>" if rng.random() < 0.3 else ""
    chat_text = [f"{system()}<|user|>{ask}<|end|><|assistant|>{reply}<|end|>" for ask, reply in chats]
    chunks = [documents[i::workers * 4] for i in range(workers * 4)]
    chunks.append(chat_text)
    chunks = [c for c in chunks if c]
    with multiprocessing.Pool(workers, _load_tokenizer, (tokenizer_path,)) as pool:
        stream = np.concatenate(pool.map(_encode_job, chunks, chunksize=1))
    stream_path = str(args.cache / "stream.npy")
    np.save(stream_path, stream)
    print(f"{len(stream) / 1e6:.2f} M tokens, {sum(map(len, documents)) / len(stream):.3f} characters a token, "
          f"{time.time() - started:.1f} s", flush=True)

    def facts(length, count, base):
        per = max(1, count // workers)
        jobs = [(tokenizer_path, stream_path, length, per, args.seed * 1000 + base + i) for i in range(workers)]
        with multiprocessing.Pool(workers) as pool:
            parts = pool.map(_facts_job, jobs, chunksize=1)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    short = facts(args.short, 64 if args.smoke else args.short_facts, 0)
    long = facts(args.long, 32 if args.smoke else args.long_facts, 500)
    print(f"facts {short[0].shape} {long[0].shape}, {time.time() - started:.1f} s", flush=True)
    numbers = {"documents": len(documents), "characters": sum(map(len, documents)), "tokens": len(stream)}
    return tokenizer, stream, short, long, numbers


# ------------------------------------------------------------------------------------------------------------ model

def rms_norm(x, weight, eps=1e-6):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def rope_table(length, device):
    dim = CONFIG["qk_rope_head_dim"]
    inverse = CONFIG["rope_theta"] ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * inverse
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Interleaved rotation: dimensions 2i and 2i+1 form a pair. x: [..., tokens, rope]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        c = CONFIG
        heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        matrix = lambda rows, columns: nn.Parameter(torch.randn(rows, columns) * columns ** -0.5)
        self.compressed = c["q_lora_rank"] is not None
        if self.compressed:
            self.q_a = matrix(c["q_lora_rank"], c["hidden_size"])
            self.q_a_norm = nn.Parameter(torch.ones(c["q_lora_rank"]))
        self.q_b = matrix(heads * (nope + rope), c["q_lora_rank"] or c["hidden_size"])
        self.kv_a = matrix(c["kv_lora_rank"] + rope, c["hidden_size"])
        self.kv_a_norm = nn.Parameter(torch.ones(c["kv_lora_rank"]))
        self.kv_b = matrix(heads * (nope + v), c["kv_lora_rank"])
        self.o = nn.Parameter(torch.zeros(c["hidden_size"], heads * v))

    def forward(self, x, cos, sin):
        c = CONFIG
        batch, length, _ = x.shape
        heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        compressed = rms_norm(F.linear(x, self.q_a), self.q_a_norm) if self.compressed else x
        q = F.linear(compressed, self.q_b).view(batch, length, heads, nope + rope).transpose(1, 2)
        q_nope, q_rope = q.split((nope, rope), -1)
        latent, k_rope = F.linear(x, self.kv_a).split((c["kv_lora_rank"], rope), -1)
        kv = F.linear(rms_norm(latent, self.kv_a_norm), self.kv_b).view(batch, length, heads, nope + v).transpose(1, 2)
        k_nope, value = kv.split((nope, v), -1)
        k_rope = rotate(k_rope, cos, sin)[:, None].expand(-1, heads, -1, -1)
        query = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        key = torch.cat((k_nope, k_rope), -1)
        value = F.pad(value, (0, nope + rope - v))  # flash attention wants one head size
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)[..., :v]
        return F.linear(out.transpose(1, 2).reshape(batch, length, heads * v), self.o)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        d, m = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate = nn.Parameter(torch.randn(m, d) * d ** -0.5)
        self.up = nn.Parameter(torch.randn(m, d) * d ** -0.5)
        self.down = nn.Parameter(torch.zeros(d, m))

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down), None


class MixtureOfExperts(nn.Module):
    """All experts run as one wide MLP whose activations are scaled by the routing weights: the experts are tiny."""

    def __init__(self):
        super().__init__()
        c = CONFIG
        d, m, n = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"] + c["n_shared_experts"]
        self.gate = nn.Parameter(torch.randn(n, m, d) * d ** -0.5)  # the shared expert comes last
        self.up = nn.Parameter(torch.randn(n, m, d) * d ** -0.5)
        self.down = nn.Parameter(torch.zeros(n, d, m))
        self.router = nn.Parameter(torch.randn(c["n_routed_experts"], d) * 0.5 * d ** -0.5)
        self.register_buffer("bias", torch.zeros(c["n_routed_experts"]))

    def route(self, x):
        """Weights [tokens, experts], zero where not chosen: sigmoid scores, biased choice, group limit (noaux_tc)."""
        c = CONFIG
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.router).sigmoid()
        biased = (scores + self.bias).detach()
        groups = biased.unflatten(-1, (c["n_group"], -1)).sum(-1)  # two experts a group: the top-2 sum is the sum
        group_rank = (groups[:, None, :] > groups[:, :, None]).sum(-1)
        allowed = (group_rank < c["topk_group"]).repeat_interleave(c["n_routed_experts"] // c["n_group"], -1)
        biased = torch.where(allowed, biased, -torch.ones_like(biased) * 1e9)
        rank = (biased[:, None, :] > biased[:, :, None]).sum(-1)
        chosen = (rank < c["num_experts_per_tok"]) & allowed
        picked = scores * chosen
        return picked / (picked.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"], chosen

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, chosen = self.route(x)
        n, m, d = self.gate.shape
        hidden = F.silu(F.linear(x, self.gate.view(n * m, d))) * F.linear(x, self.up.view(n * m, d))
        weights = torch.cat((weights, torch.ones_like(weights[:, :1])), -1).to(hidden.dtype)
        hidden = (hidden.view(-1, n, m) * weights[:, :, None]).view(-1, n * m)
        out = F.linear(hidden, self.down.transpose(0, 1).reshape(d, n * m))
        return out.view(shape), chosen.float().mean(0)


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.attn_norm = nn.Parameter(torch.ones(CONFIG["hidden_size"]))
        self.attn = Attention()
        self.mlp_norm = nn.Parameter(torch.ones(CONFIG["hidden_size"]))
        self.mlp = Dense() if layer < CONFIG["first_k_dense_replace"] else MixtureOfExperts()

    def forward(self, x, cos, sin):
        x = x + self.attn(rms_norm(x, self.attn_norm), cos, sin)
        out, load = self.mlp(rms_norm(x, self.mlp_norm))
        return x + out, load


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(CONFIG["vocab_size"], CONFIG["hidden_size"]) * 0.04)
        self.blocks = nn.ModuleList(Block(i) for i in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(CONFIG["hidden_size"]))

    def compile_parts(self):
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile(dynamic=False)
        self.head_loss = torch.compile(self.head_loss, dynamic=False)

    def hidden(self, tokens, cos, sin):
        x = F.embedding(tokens, self.embed).to(torch.bfloat16 if tokens.is_cuda else torch.float32)
        loads = []
        for block in self.blocks:
            x, load = block(x, cos[:tokens.shape[1]], sin[:tokens.shape[1]])
            if load is not None:
                loads.append(load)
        return x, torch.stack(loads) if loads else x.new_zeros(0, 1)

    def head_loss(self, x, targets, weights):
        logits = F.linear(rms_norm(x, self.norm), self.embed).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        flat = weights.flatten().float()
        return (losses * flat).sum() / flat.sum()

    def losses(self, x, targets):
        """Negative log likelihood in nats and whether the target is the argmax, both [batch, tokens]."""
        logits = F.linear(rms_norm(x, self.norm), self.embed).float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return nll, logits.argmax(-1) == targets


# -------------------------------------------------------------------------------------------------------- optimiser

class Muon:
    """Momentum orthogonalised by Newton-Schulz, one batch per matrix shape (Jordan et al. 2024)."""

    def __init__(self, parameters, momentum=0.95, weight_decay=0.05):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.buffers = {p: torch.zeros_like(p) for p in parameters}

    @torch.no_grad()
    def step(self, lr):
        for (rows, columns), parameters in self.groups.items():
            gradients = [p.grad for p in parameters]
            buffers = [self.buffers[p] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            updates = torch._foreach_lerp(gradients, buffers, self.momentum)
            stacked = torch.cat([u.reshape(-1, rows, columns) for u in updates])
            stacked = newton_schulz(stacked) * max(1, rows / columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
            sizes = [p.numel() // (rows * columns) for p in parameters]
            deltas = [part.view_as(p) for part, p in zip(stacked.float().split(sizes), parameters)]
            torch._foreach_add_(parameters, deltas, alpha=-lr)


def newton_schulz(g, steps=5):
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


# --------------------------------------------------------------------------------------------------------- training

class Batches:
    """Windows of the stream without replacement, each led by BOS, with a share of planted-fact sequences."""

    def __init__(self, stream, facts, length, rows, fact_share, device, seed):
        self.stream, self.length, self.rows, self.device = stream, length, rows, device
        self.fact_rows = max(1, round(rows * fact_share))
        self.fact_tokens = torch.from_numpy(facts[0]).to(device)
        self.fact_weights = torch.from_numpy(facts[1]).to(device)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.span = torch.arange(length, device=device)
        self.windows = torch.empty(0, dtype=torch.long, device=device)
        self.fact_order = torch.empty(0, dtype=torch.long, device=device)
        self.epochs = 0.0

    def take(self, name, count, refill):
        order = getattr(self, name)
        while len(order) < count:
            order = torch.cat((order, refill()))
        setattr(self, name, order[count:])
        return order[:count]

    def shuffled_windows(self):
        shift = torch.randint(self.length, (1,), generator=self.generator, device=self.device)
        count = (len(self.stream) - self.length - 1) // self.length
        return torch.randperm(count, generator=self.generator, device=self.device) * self.length + shift

    def next(self):
        plain = self.rows - self.fact_rows
        starts = self.take("windows", plain, self.shuffled_windows)
        body = self.stream[starts[:, None] + self.span].long()
        tokens = torch.cat((torch.full((plain, 1), BOS, device=self.device), body), 1)
        chosen = self.take("fact_order", self.fact_rows,
                           lambda: torch.randperm(len(self.fact_tokens), generator=self.generator, device=self.device))
        tokens = torch.cat((tokens, self.fact_tokens[chosen].long()))
        weights = torch.cat((torch.ones_like(body), self.fact_weights[chosen][:, 1:].long()))
        return tokens[:, :-1], tokens[:, 1:], weights


def train(args, model, stream, short, long, device, log):
    cos, sin = rope_table(args.long, device)
    stream = torch.from_numpy(stream.astype(np.int16)).to(device)
    phases = [Batches(stream, short, args.short, args.batch // args.short, 0.10, device, args.seed),
              Batches(stream, long, args.long, args.batch // args.long, 0.17, device, args.seed + 1)]
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n and "router" not in n]
    others = [p for n, p in model.named_parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    routers = [b.mlp for b in model.blocks if isinstance(b.mlp, MixtureOfExperts)]
    average = 1 / CONFIG["n_routed_experts"] * CONFIG["num_experts_per_tok"]

    def step(batch, scale):
        tokens, targets, weights = batch
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            x, loads = model.hidden(tokens, cos, sin)
            loss = model.head_loss(x, targets, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0, foreach=True)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * scale
        adam.step()
        muon.step(args.muon_lr * scale)
        for p in model.parameters():
            p.grad = None
        with torch.no_grad():
            for mlp, load in zip(routers, loads):
                mlp.bias += args.bias_rate * min(1.0, 2 * scale) * (average - load).sign()
        return loss.detach(), loads.detach()

    saved = {k: v.clone() for k, v in model.state_dict().items()}
    compile_started = time.time()
    for phase in phases:  # compile both shapes before the clock of the schedule starts; learn nothing from it
        step(phase.next(), 0.0)
    model.load_state_dict(saved)
    for b in muon.buffers.values():
        b.zero_()
    adam.state.clear()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"compiled in {time.time() - compile_started:.1f} s", flush=True)

    seconds = args.minutes * 60
    started, steps, tokens_seen, curve, window = time.time(), 0, 0, [], []
    progress, next_log = 0.0, 0.0
    while progress < 1.0:
        phase = phases[0] if progress < args.short_share else phases[1]
        scale = min(1.0, (steps + 1) / args.warmup) * min(1.0, (1 - progress) / (1 - args.hold) + 0.0)
        loss, loads = step(phase.next(), max(scale, 0.002))
        steps += 1
        tokens_seen += args.batch
        window.append(loss)
        if steps % 10 == 0:
            window[-1].item()  # keeps the host from running ahead of the clock
            progress = (time.time() - started) / seconds
        if steps in (20, 50) or progress >= next_log or progress >= 1.0:
            value = torch.stack(window).mean().item()
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value} at step {steps}")
            elapsed = time.time() - started
            progress = elapsed / seconds
            curve.append({"step": steps, "tokens": tokens_seen, "seconds": round(elapsed, 1), "loss": round(value, 4),
                          "length": phase.length, "lr_scale": round(scale, 4),
                          **({"max_load": round(loads.max().item() / average, 3), "min_load": round(loads.min().item() / average, 3)}
                             if routers else {})})
            print(f"step {steps:6d} {tokens_seen / 1e6:8.1f} M tokens {elapsed:6.1f} s {tokens_seen / elapsed / 1e6:5.2f} M tok/s "
                  f"loss {value:.4f} lr {scale:.3f} load {curve[-1].get('min_load', 1):.2f}-{curve[-1].get('max_load', 1):.2f} "
                  f"T {phase.length}", flush=True)
            window = []
            next_log = progress + 0.02
        if steps == 200:
            torch.save(model.state_dict(), args.cache / "early.pt")
    log.update(steps=steps, tokens_seen=tokens_seen, seconds=round(time.time() - started, 1), curve=curve,
               epochs=round(tokens_seen / len(stream), 2))
    return cos, sin


# ----------------------------------------------------------------------------------------------------------- export

def export(model, out):
    """Two bf16 shards with an index under the Hugging Face names; e_score_correction_bias stays float32."""
    from safetensors.torch import save_file
    tensors = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    for i, block in enumerate(model.blocks):
        p = f"model.layers.{i}."
        a = block.attn
        tensors |= {p + "input_layernorm.weight": block.attn_norm, p + "post_attention_layernorm.weight": block.mlp_norm,
                    p + "self_attn.kv_a_proj_with_mqa.weight": a.kv_a,
                    p + "self_attn.kv_a_layernorm.weight": a.kv_a_norm, p + "self_attn.kv_b_proj.weight": a.kv_b,
                    p + "self_attn.o_proj.weight": a.o}
        if a.compressed:
            tensors |= {p + "self_attn.q_a_proj.weight": a.q_a, p + "self_attn.q_a_layernorm.weight": a.q_a_norm,
                        p + "self_attn.q_b_proj.weight": a.q_b}
        else:
            tensors[p + "self_attn.q_proj.weight"] = a.q_b
        if isinstance(block.mlp, Dense):
            for name in ("gate", "up", "down"):
                tensors[p + f"mlp.{name}_proj.weight"] = getattr(block.mlp, name)
            continue
        tensors[p + "mlp.gate.weight"] = block.mlp.router
        tensors[p + "mlp.gate.e_score_correction_bias"] = block.mlp.bias
        for name in ("gate", "up", "down"):
            stacked = getattr(block.mlp, name)
            for e in range(CONFIG["n_routed_experts"]):
                tensors[p + f"mlp.experts.{e}.{name}_proj.weight"] = stacked[e]
            tensors[p + f"mlp.shared_experts.{name}_proj.weight"] = stacked[-1]
    tensors = {k: v.detach().to("cpu", torch.float32 if k.endswith("bias") else torch.bfloat16).contiguous().clone()
               for k, v in tensors.items()}
    half = CONFIG["num_hidden_layers"] // 2
    first = {k: v for k, v in tensors.items() if "embed" in k or any(k.startswith(f"model.layers.{i}.") for i in range(half))}
    second = {k: v for k, v in tensors.items() if k not in first}
    weight_map, total = {}, 0
    for i, part in enumerate((first, second), 1):
        name = f"model-{i:05d}-of-00002.safetensors"
        save_file(part, str(out / name), metadata={"format": "pt"})
        weight_map |= {k: name for k in part}
        total += sum(v.numel() * v.element_size() for v in part.values())
    write = lambda name, value: (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    write("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write("config.json", CONFIG)
    write("generation_config.json", {"bos_token_id": BOS, "eos_token_id": [EOS, END], "do_sample": True, "temperature": 0.4,
                                     "top_p": 0.95, "max_length": CONFIG["max_position_embeddings"]})
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>",
                                    "add_bos_token": True, "clean_up_tokenization_spaces": False,
                                    "model_max_length": CONFIG["max_position_embeddings"], "chat_template": CHAT_TEMPLATE})
    return tensors


def load_exported_precision(model):
    """Round the live weights to what was shipped, so that evaluation measures the shipped model."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def forward_scores(model, tokens, cos, sin, device):
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        x, _ = model.hidden(tokens[:, :-1], cos, sin)
        return model.losses(x, tokens[:, 1:])


def bits_per_byte(model, tokenizer, text, length, cos, sin, device):
    """Windows of BOS + `length` tokens, each scored from its middle on (the first one wholly)."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    half, nats, at = length // 2, 0.0, 0
    while at < len(ids):
        window = ids[max(0, at - half):at + (half if at else length)]
        context = min(at, half)
        tokens = torch.tensor([[BOS] + window], device=device)
        nll, _ = forward_scores(model, tokens, cos, sin, device)
        nats += nll[0, context:].double().sum().item()
        at += len(window) - context
    return nats / math.log(2) / len(text.encode())


def recall_prompt(rng, tokenizer, heldout_ids, breaks, context, depth, distractors, chat):
    """A prompt of about `context` tokens of held-out text; the asked fact sits at `depth` (0 = start, 1 = end)."""
    facts = make_facts(rng, distractors + 1)
    asked = facts[0]
    overhead = 26 * (distractors + 1) + 40
    length = max(64, context - overhead)
    start = rng.randrange(len(heldout_ids) - length)
    tokens = heldout_ids[start:start + length]
    pieces, piece = [], []
    for t in tokens:
        piece.append(t)
        if t in breaks:
            pieces.append(piece)
            piece = []
    pieces.append(piece)
    text = [tokenizer.decode(p).strip() for p in pieces]
    text = [p for p in text if p]
    sizes = np.cumsum([0] + [len(p) for p in text])
    places = [(int(np.searchsorted(sizes, depth * sizes[-1] - 1e-9)), 0)]
    places += [(rng.randrange(len(text) + 1), i) for i in range(1, len(facts))]
    for place, i in sorted(places, reverse=True):
        text.insert(place, fact_sentence(facts[i]))
    body = "\n\n".join(text)
    if chat:
        prompt = f"<|user|>{body}\n\n{question(asked)}<|end|><|assistant|>{statement(asked)}"
    else:
        prompt = f"{body}\n\n{question(asked)} {statement(asked)}"
    return {"prompt": prompt, "answer": asked[2], "depth": depth, "distractors": distractors, "chat": chat}


def is_recalled(model, tokenizer, record, cos, sin, device):
    """Exact greedy value match: every answer token is the argmax after the prompt and the answer tokens before it."""
    prompt = [BOS] + tokenizer.encode(record["prompt"], add_special_tokens=False).ids
    answer = tokenizer.encode(" " + record["answer"], add_special_tokens=False).ids
    tokens = torch.tensor([prompt + answer], device=device)
    pad = -tokens.shape[1] % 256 + 1
    _, hits = forward_scores(model, F.pad(tokens, (0, pad), value=EOS), cos, sin, device)
    return bool(hits[0, len(prompt) - 1:len(prompt) - 1 + len(answer)].all()), len(prompt)


def evaluate_recall(model, tokenizer, heldout, cos, sin, device, per_cell, contexts, seed):
    rng = random.Random(seed)
    breaks = {i for token, i in tokenizer.get_vocab().items() if token.endswith("ĊĊ")}
    ids = tokenizer.encode(heldout, add_special_tokens=False).ids
    table = []
    for context in contexts:
        for depth in (0.05, 0.25, 0.5, 0.75, 0.95):
            cell = []
            for _ in range(per_cell):
                record = recall_prompt(rng, tokenizer, ids, breaks, context, depth, rng.randint(2, 5), rng.random() < 0.4)
                cell.append((is_recalled(model, tokenizer, record, cos, sin, device)[0], record["chat"]))
            table.append({"context": context, "depth": depth, "prompts": len(cell), "correct": sum(c[0] for c in cell),
                          "chat_prompts": sum(c[1] for c in cell), "chat_correct": sum(c[0] and c[1] for c in cell)})
    return table


def write_recall_prompts(model, tokenizer, heldout, out, cos, sin, device, smoke, seed):
    rng = random.Random(seed)
    breaks = {i for token, i in tokenizer.get_vocab().items() if token.endswith("ĊĊ")}
    ids = tokenizer.encode(heldout, add_special_tokens=False).ids
    correct, records = 0, []
    sizes = ((320, 1),) if smoke else ((320, 5), (512, 3), (1024, 3), (2048, 2), (3400, 1))
    plan = [(c, d) for c, n in sizes if c <= CONFIG["max_position_embeddings"] - 64 for _ in range(n)
            for d in (0.05, 0.25, 0.5, 0.75, 0.95)]
    for index, (context, depth) in enumerate(plan):
        record = recall_prompt(rng, tokenizer, ids, breaks, context, depth, rng.randint(1, 4), False)
        hit, length = is_recalled(model, tokenizer, record, cos, sin, device)
        correct += hit
        records.append({"id": f"recall-{index:03d}", "prompt": record["prompt"], "answer": record["answer"], "depth": depth,
                        "context_tokens": length, "distractors": record["distractors"]})
    with open(out / "recall.jsonl", "w") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {"prompts": len(records), "correct": correct}


@torch.no_grad()
def generate(model, tokenizer, prompt, cos, sin, device, count=120, temperature=0.7, seed=0):
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = [BOS] + tokenizer.encode(prompt, add_special_tokens=False).ids
    first = len(ids)
    for _ in range(count):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            padded = F.pad(torch.tensor([ids], device=device), (0, -len(ids) % 256), value=EOS)
            x, _ = model.hidden(padded, cos, sin)
            logits = F.linear(rms_norm(x[:, len(ids) - 1], model.norm), model.embed.to(x.dtype)).float()[0]
        if temperature:
            best = torch.topk(logits, 40)
            pick = best.indices[torch.multinomial(F.softmax(best.values / temperature, -1), 1, generator=generator)].item()
        else:
            pick = logits.argmax().item()
        if pick in (EOS, END):
            break
        ids.append(pick)
    return tokenizer.decode(ids[first:])


def check_in_transformers(out, model, tokenizer, text, cos, sin, device):
    """Mean loss of the exported files in DeepseekV3ForCausalLM (float32, eager) against the training model."""
    from transformers import DeepseekV3ForCausalLM
    ids = torch.tensor([[BOS] + tokenizer.encode(text[:6000], add_special_tokens=False).ids[:1024]], device=device)
    hf, info = DeepseekV3ForCausalLM.from_pretrained(str(out), dtype=torch.float32, attn_implementation="eager",
                                                     output_loading_info=True)
    problems = {k: sorted(v) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    hf = hf.to(device).eval()
    with torch.no_grad():
        logits = hf(ids[:, :-1]).logits.float()
        theirs = F.cross_entropy(logits[0], ids[0, 1:]).item()
    nll, _ = forward_scores(model, ids, cos, sin, device)
    return {"loss_transformers_fp32": theirs, "loss_training_model_bf16": nll.mean().item(), "loading_problems": problems}


def loss_curve_svg(curve):
    width, height, left, top = 640, 300, 50, 14
    points = [c for c in curve if c["step"] > 20]
    low, high = math.floor(min(c["loss"] for c in points) * 5) / 5, min(6.0, max(c["loss"] for c in points))
    last = points[-1]["tokens"]
    x = lambda c: left + (width - left - 12) * c["tokens"] / last
    y = lambda loss: top + (height - top - 40) * (1 - (min(loss, high) - low) / (high - low))
    line = " ".join(f"{x(c):.1f},{y(c['loss']):.1f}" for c in points)
    rows = "".join(f'<line x1="{left}" x2="{width - 12}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>'
                   for v in np.arange(math.ceil(low * 2) / 2, high + 0.01, 0.5))
    marks = "".join(f'<text x="{left + (width - left - 12) * f:.0f}" y="{height - 22}" text-anchor="middle">{last * f / 1e6:.0f}</text>'
                    for f in (0, 0.25, 0.5, 0.75, 1))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
            f'<rect width="{width}" height="{height}" fill="white"/>{rows}{marks}'
            f'<polyline fill="none" stroke="#1f5fa8" stroke-width="1.6" points="{line}"/>'
            f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">million tokens</text>'
            f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">training loss, nats a token</text></svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--config", type=pathlib.Path, help="JSON with entries of config.json to replace")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("/tmp/demo-model-cache"))
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock training time; the learning rate decays on it")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--batch", type=int, default=96 * 1024, help="tokens a step")
    parser.add_argument("--short", type=int, default=1024)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--short-share", type=float, default=0.6, help="share of the time spent at the short length")
    parser.add_argument("--short-facts", type=int, default=16_000, help="sequences with planted facts, of the short length")
    parser.add_argument("--long-facts", type=int, default=7_000, help="the same, of the long length")
    parser.add_argument("--hold", type=float, default=0.35, help="share of the time before the learning rate decays")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--bias-rate", type=float, default=2e-3)
    parser.add_argument("--per-cell", type=int, default=20, help="recall prompts per length and depth")
    parser.add_argument("--smoke", action="store_true", help="everything once, in seconds, on a slice of the data")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.minutes, args.per_cell = min(args.minutes, 0.15), 1
    if args.config:
        CONFIG.update(json.loads(args.config.read_text()))
    contexts = [n for n in (512, 1024, 2048, 3072, 3500) if n <= CONFIG["max_position_embeddings"] - 64]
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    begun = time.time()

    tokenizer, stream, short, long, log = prepare_data(args, args.out)
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = Model().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.3f} M parameters, {time.time() - begun:.1f} s since start", flush=True)
    if device.type == "cuda":
        model.compile_parts()
    cos, sin = train(args, model, stream, short, long, device, log)

    export(model, args.out)
    load_exported_precision(model)
    if device.type == "cuda":
        torch._dynamo.reset()
    fresh = Model().to(device)  # uncompiled, for evaluation at many lengths
    fresh.load_state_dict(model.state_dict())
    model = fresh.eval()
    heldout = (args.corpus / "heldout.txt").read_text()[:20_000 if args.smoke else None]
    log.update(seed=args.seed, parameters=parameters, batch_tokens=args.batch,
               device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch=torch.__version__,
               settings={k: (str(v) if isinstance(v, pathlib.Path) else v) for k, v in vars(args).items()
                         if k not in ("corpus", "out", "cache", "config")})
    log["bits_per_byte"] = {str(n): round(bits_per_byte(model, tokenizer, heldout, n, cos, sin, device), 4)
                            for n in ((1024,) if args.smoke else (512, 1024, 2048, 4094)) if n < CONFIG["max_position_embeddings"]}
    print("bits per byte", log["bits_per_byte"], flush=True)
    log["recall"] = evaluate_recall(model, tokenizer, heldout, cos, sin, device, args.per_cell,
                                    contexts[:1] if args.smoke else contexts, args.seed + 7)
    for row in log["recall"]:
        print("recall", row, flush=True)
    log["recall_file"] = write_recall_prompts(model, tokenizer, heldout, args.out, cos, sin, device, args.smoke, args.seed + 11)
    print("recall.jsonl", log["recall_file"], flush=True)
    prompts = ["The scheduler", "To configure the server,", "DESCRIPTION\n\nThe function",
               "<|user|>Hello<|end|><|assistant|>", "<|user|>Tell me about transactions.<|end|><|assistant|>",
               "<|user|>The port number of the blue gateway is 4711. The port number of the red gateway is 9023.\n\n"
               "What is the port number of the blue gateway?<|end|><|assistant|>"]
    log["samples"] = [{"prompt": p, "text": generate(model, tokenizer, p, cos, sin, device, count=8 if args.smoke else 110)}
                      for p in prompts]
    for sample in log["samples"]:
        print(repr(sample), flush=True)
    try:
        log["transformers"] = check_in_transformers(args.out, model, tokenizer, heldout, cos, sin, device)
        print("transformers", log["transformers"], flush=True)
    except ImportError as problem:
        print(f"transformers check skipped: {problem}")
    log["wall_seconds"] = round(time.time() - begun, 1)
    for name in ("heldout.txt", "calibration.txt"):
        shutil.copy(args.corpus / name, args.out / name)
    (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    (args.out / "loss.svg").write_text(loss_curve_svg(log["curve"]))


if __name__ == "__main__":
    main()
