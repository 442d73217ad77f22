#!/usr/bin/env python3
"""Write test/goldens: small random checkpoints and the logits transformers computes for them and for the demo model.

    python3 scripts/make_goldens.py --out test/goldens [--demo models/demo] [--only NAME,...]

Every checkpoint is also run through the float64 reference below, written from DeepSeek's published modelling code; the
index of each golden records how far transformers is from it. Needs torch, transformers, safetensors.
The format of what is written is described in test/goldens/README.md.
"""

import argparse
import json
import math
import pathlib
import shutil
import struct
import tempfile

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

PROMPTS = 64
LONGEST = 2048
FULL_LOGITS_DEMO = 8  # prompts of the demo model stored with the whole vocabulary
INTERIOR_PROMPTS = 6
TOP, SAMPLE = 64, 64
CLEAR_ROUTING = 1e-5  # prompts are drawn again, at most REDRAWS times, until no expert choice is closer than this
REDRAWS = 40

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-06, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
          "eos_token_id": 1, "moe_layer_freq": 1, "first_k_dense_replace": 1, "initializer_range": 0.02, "use_cache": True}

V2 = COMMON | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "scoring_func": "softmax",
               "norm_topk_prob": False, "q_lora_rank": None, "aux_loss_alpha": 0.001, "seq_aux": True}
V3 = COMMON | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "scoring_func": "sigmoid",
               "norm_topk_prob": True, "topk_method": "noaux_tc", "rope_interleave": True, "num_nextn_predict_layers": 0}

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

# What each checkpoint is for is said in test/goldens/README.md.
CHECKPOINTS = {
    "tiny-v2": dict(seed=21, dtype="bfloat16", shards=1, config=V2 | {
        "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "intermediate_size": 96,
        "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}),
    "tiny-v3": dict(seed=22, dtype="bfloat16", shards=1, config=V3 | {
        "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "intermediate_size": 96, "moe_intermediate_size": 16, "n_routed_experts": 16, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "max_position_embeddings": 4096,
        "rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 512,
                                                "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16"}),
    "tiny-v3-fp8": dict(seed=23, dtype="fp8", shards=1, prompts=16, config=V3 | {
        "vocab_size": 256, "hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "intermediate_size": 144, "moe_intermediate_size": 72, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "quantization_config": FP8}),
    "tiny-v2-lite": dict(seed=24, dtype="float16", shards=3, prompts=16, config=V2 | {
        "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "intermediate_size": 96,
        "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 512,
                                                "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
        "tie_word_embeddings": True, "torch_dtype": "float16"}),
    "tiny-k2": dict(seed=25, dtype="bfloat16", shards=1, prompts=16, config=V3 | {
        "model_type": "kimi_k2", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
        "v_head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 24, "n_routed_experts": 12, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "max_position_embeddings": 4096,
        "rope_theta": 50000.0, "rope_scaling": {"type": "yarn", "factor": 32, "original_max_position_embeddings": 128,
                                                "beta_fast": 1, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16"}),
}


# ------------------------------------------------------------------------------------------------ random checkpoints

def tensor_shapes(c):
    """(name, shape, kind) of every tensor under the published names; shapes are [out, in]."""
    h, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    nope, v, rank = c["qk_nope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    yield "model.embed_tokens.weight", (c["vocab_size"], h), "embed"
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (h,), "norm"
        yield p + "post_attention_layernorm.weight", (h,), "norm"
        a = p + "self_attn."
        if c["q_lora_rank"] is None:
            yield a + "q_proj.weight", (heads * (nope + rope), h), "linear"
        else:
            yield a + "q_a_proj.weight", (c["q_lora_rank"], h), "linear"
            yield a + "q_a_layernorm.weight", (c["q_lora_rank"],), "norm"
            yield a + "q_b_proj.weight", (heads * (nope + rope), c["q_lora_rank"]), "linear"
        yield a + "kv_a_proj_with_mqa.weight", (rank + rope, h), "linear"
        yield a + "kv_a_layernorm.weight", (rank,), "norm"
        yield a + "kv_b_proj.weight", (heads * (nope + v), rank), "linear"
        yield a + "o_proj.weight", (h, heads * v), "linear"
        if i < c["first_k_dense_replace"]:
            widths = [("mlp.", c["intermediate_size"])]
        else:
            yield p + "mlp.gate.weight", (c["n_routed_experts"], h), "router"
            if c["topk_method"] == "noaux_tc":
                yield p + "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "bias"
            widths = [(f"mlp.experts.{e}.", c["moe_intermediate_size"]) for e in range(c["n_routed_experts"])]
            widths.append(("mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"]))
        for prefix, width in widths:
            yield p + prefix + "gate_proj.weight", (width, h), "linear"
            yield p + prefix + "up_proj.weight", (width, h), "linear"
            yield p + prefix + "down_proj.weight", (h, width), "linear"
    yield "model.norm.weight", (h,), "norm"
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], h), "head"


def random_weights(config, seed, dtype):
    """Stored tensors, scaled so that attention, routing and logits are far from degenerate."""
    generator = torch.Generator().manual_seed(seed)
    stored_type = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.bfloat16}[dtype]
    tensors = {}
    for name, shape, kind in tensor_shapes(config):
        noise = torch.randn(*shape, generator=generator)
        if kind == "norm":
            value = 1 + 0.25 * noise
        elif kind == "bias":
            value = 0.2 * noise
        else:
            spread = {"embed": 0.6, "linear": 1.4, "router": 1.6, "head": 2.5}[kind]
            value = noise * (spread if kind == "embed" else spread / math.sqrt(shape[-1]))
        if dtype == "fp8" and kind == "linear":
            tensors |= quantise_blocks(name, value * (1 + 3 * torch.rand(shape[0], 1, generator=generator)) / 2.5)
        else:
            tensors[name] = value.float() if kind == "bias" else value.to(stored_type)
    return tensors


def quantise_blocks(name, value, block=128):
    """e4m3 with one float32 scale per 128x128 block, the last block of a row or column partial."""
    rows, columns = (-(-n // block) for n in value.shape)
    scales = torch.empty(rows, columns)
    out = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            cut = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = value[cut].abs().max() / 448
            out[cut] = (value[cut] / scales[i, j]).to(torch.float8_e4m3fn)
    return {name: out, name + "_scale_inv": scales}


def dequantised(tensors):
    out = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scales = tensors.get(name + "_scale_inv")
        if scales is None:
            out[name] = value
        else:
            grid = scales.repeat_interleave(128, 0)[:value.shape[0]].repeat_interleave(128, 1)[:, :value.shape[1]]
            out[name] = value.float() * grid
    return out


def write_checkpoint(folder, config, tensors, shards):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = {n: tensors[n] for n in names[i * len(names) // shards:(i + 1) * len(names) // shards]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, str(folder / file), metadata={"format": "pt"})
        weight_map |= {n: file for n in part}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def read_checkpoint(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}
    return tensors


# --------------------------------------------------------------------------------------------- float64 reference

def yarn_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(c):
    """(inverse frequencies [rope/2], factor on cos and sin, factor on the softmax scale), as DeepSeek publishes them."""
    dim, theta, scaling = c["qk_rope_head_dim"], c["rope_theta"], c.get("rope_scaling")
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if not scaling:
        return plain, 1.0, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    turn = lambda rotations: dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    low = max(math.floor(turn(scaling["beta_fast"])), 0)
    high = min(math.ceil(turn(scaling["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    mixed = plain / factor * ramp + plain * (1 - ramp)
    whole = yarn_mscale(factor, scaling.get("mscale_all_dim", 0))
    return mixed, yarn_mscale(factor, scaling.get("mscale", 1)) / whole, (whole ** 2 if scaling.get("mscale_all_dim") else 1.0)


def reference_logits(c, weights, ids):
    """Logits [tokens, vocabulary] in float64 and the smallest gap between a chosen and a rejected expert or group."""
    w = lambda name: weights[name]
    device = ids.device
    norm = lambda x, name: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]) * w(name)
    heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    v, rank, length = c["v_head_dim"], c["kv_lora_rank"], len(ids)
    inverse, rotation_factor, softmax_factor = rope_frequencies(c)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * inverse.to(device)
    cos, sin = angle.cos() * rotation_factor, angle.sin() * rotation_factor
    mask = torch.full((length, length), -math.inf, dtype=torch.float64, device=device).triu(1)
    margins = []

    def rotate(x):  # pairs (2i, 2i+1); x: [heads, tokens, rope]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def attention(x, p):
        if c["q_lora_rank"] is None:
            q = x @ w(p + "q_proj.weight").T
        else:
            q = norm(x @ w(p + "q_a_proj.weight").T, p + "q_a_layernorm.weight") @ w(p + "q_b_proj.weight").T
        q = q.view(length, heads, nope + rope).transpose(0, 1)
        compressed = x @ w(p + "kv_a_proj_with_mqa.weight").T
        kv = norm(compressed[:, :rank], p + "kv_a_layernorm.weight") @ w(p + "kv_b_proj.weight").T
        kv = kv.view(length, heads, nope + v).transpose(0, 1)
        k_rope = rotate(compressed[None, :, rank:])
        logits = q[..., :nope] @ kv[..., :nope].mT + rotate(q[..., nope:]) @ k_rope.mT
        probabilities = (logits * (nope + rope) ** -0.5 * softmax_factor + mask).softmax(-1)
        return (probabilities @ kv[..., nope:]).transpose(0, 1).reshape(length, heads * v) @ w(p + "o_proj.weight").T

    def mlp(x, p):
        return (F.silu(x @ w(p + "gate_proj.weight").T) * (x @ w(p + "up_proj.weight").T)) @ w(p + "down_proj.weight").T

    def route(x, p):
        router = x @ w(p + "gate.weight").T
        k, groups, keep = c["num_experts_per_tok"], c["n_group"] or 1, c["topk_group"] or 1
        biased = scores = router.softmax(-1) if c["scoring_func"] == "softmax" else router.sigmoid()
        if c["topk_method"] == "noaux_tc":
            biased = scores + w(p + "gate.e_score_correction_bias")
        if c["topk_method"] != "greedy" and groups > keep:
            grouped = biased.view(length, groups, -1)
            group_scores = grouped.topk(2, -1).values.sum(-1) if c["topk_method"] == "noaux_tc" else grouped.amax(-1)
            order = group_scores.sort(-1, descending=True).values
            margins.append((order[:, keep - 1] - order[:, keep]).min())
            chosen = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(keep, -1).indices, 1).bool()
            biased = grouped.masked_fill(~chosen[:, :, None], -math.inf).view(length, -1)
        order = biased.sort(-1, descending=True).values
        margins.append((order[:, k - 1] - order[:, k]).min())
        index = biased.topk(k, -1).indices
        weight = scores.gather(1, index)
        if c["norm_topk_prob"]:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
            if c["model_type"] == "deepseek_v2":  # V2 as published scales only the weights it does not normalise
                return torch.zeros_like(scores).scatter_(1, index, weight)
        return torch.zeros_like(scores).scatter_(1, index, weight * c["routed_scaling_factor"])

    x = w("model.embed_tokens.weight")[ids]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        x = x + attention(norm(x, p + "input_layernorm.weight"), p + "self_attn.")
        y = norm(x, p + "post_attention_layernorm.weight")
        if i < c["first_k_dense_replace"]:
            x = x + mlp(y, p + "mlp.")
            continue
        routing = route(y, p + "mlp.")
        out = mlp(y, p + "mlp.shared_experts.")
        for e in range(c["n_routed_experts"]):
            out = out + routing[:, e, None] * mlp(y, p + f"mlp.experts.{e}.")
        x = x + out
    head = w("model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight")
    return norm(x, "model.norm.weight") @ head.T, float(min(margins)) if margins else math.inf


# ------------------------------------------------------------------------------------------------------ transformers

def load_in_transformers(folder, config, device):
    import transformers
    v2 = config["architectures"][0] == "DeepseekV2ForCausalLM"
    config_class = transformers.DeepseekV2Config if v2 else transformers.DeepseekV3Config
    model_class = transformers.DeepseekV2ForCausalLM if v2 else transformers.DeepseekV3ForCausalLM
    plain = {k: v for k, v in json.loads(json.dumps(config)).items()
             if k not in ("quantization_config", "architectures", "torch_dtype", "model_type")}
    model, info = model_class.from_pretrained(str(folder), config=config_class(**plain), dtype=torch.float32,
                                              attn_implementation="eager", output_loading_info=True)
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if config["tie_word_embeddings"] and problems.get("missing_keys") == ["lm_head.weight"]:
        del problems["missing_keys"]
    if problems:
        raise SystemExit(f"{folder}: transformers does not load this checkpoint cleanly: {problems}")
    for module in model.modules():  # the grouped path of DeepseekV2Moe reads an attribute that its constructor may not set
        if type(module).__name__ == "DeepseekV2Moe" and not hasattr(module, "num_experts"):
            print("DeepseekV2Moe.num_experts is not set by transformers", flush=True)
            module.num_experts = config["n_routed_experts"]
    return model.to(device).eval()


def rope_parameters_form(config):
    """The same configuration spelled the way transformers 5 saves it."""
    scaling = dict(config["rope_scaling"] or {})
    kind = scaling.pop("type", "default")
    other = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    return other | {"rope_parameters": {"rope_type": kind, "rope_theta": config["rope_theta"], **scaling}}


# ------------------------------------------------------------------------------------------------------------ writing

class Blob:
    """Int32 and float32 arrays, little endian, one after the other."""

    def __init__(self):
        self.data = bytearray()

    def put(self, values, kind):
        offset = len(self.data)
        values = values.tolist()
        self.data += struct.pack(f"<{len(values)}{kind}", *values)
        return {"offset": offset, "count": len(values)}

    def ints(self, values):
        return self.put(torch.as_tensor(values, dtype=torch.int64), "i")

    def floats(self, values):
        return self.put(values.float(), "f")


def describe_position(blob, position, logits, full, generator):
    logits = logits.double().cpu()
    entry = {"position": position, "argmax": int(logits.argmax()), "logsumexp": float(torch.logsumexp(logits, 0)),
             "margin": float((lambda t: t[0] - t[1])(logits.topk(2).values))}
    if full:
        entry["logits"] = blob.floats(logits)
    else:
        top = logits.topk(TOP)
        sample = torch.randperm(len(logits), generator=generator)[:SAMPLE].sort().values
        entry |= {"top_ids": blob.ints(top.indices), "top_logits": blob.floats(top.values),
                  "sample_ids": blob.ints(sample), "sample_logits": blob.floats(logits[sample])}
    return entry


def prompt_lengths(count, longest):
    lengths, last = [], 0
    for i in range(count):
        last = max(last + 1, round(longest ** (i / (count - 1))))
        lengths.append(last)
    return lengths


def draw_prompt(config, weights, draw, device):
    """The first drawn prompt whose routing is clear of ties, or the clearest: (ids, reference logits, margin)."""
    best = None
    for _ in range(REDRAWS):
        ids = draw()
        logits, margin = reference_logits(config, weights, torch.tensor(ids, device=device))
        if best is None or margin > best[2]:
            best = ids, logits, margin
        if margin >= CLEAR_ROUTING:
            break
    return best


def write_goldens(name, config, weights, model, draw, lengths, device, full, out):
    """draw(n) gives the ids of a random prompt of n tokens; full: True, or how many prompts get the whole vocabulary."""
    import transformers
    blob, generator = Blob(), torch.Generator().manual_seed(5)
    weights = {k: v.to(device, torch.float64) for k, v in weights.items()}
    interior = {len(lengths) - 1 - len(lengths) // INTERIOR_PROMPTS * i for i in range(INTERIOR_PROMPTS)}
    entries, worst, worst_relative, smallest = [], 0.0, 0.0, math.inf
    for index, length in enumerate(lengths):
        with torch.no_grad():
            ids, reference, margin = draw_prompt(config, weights, lambda: draw(length), device)
            logits = model(torch.tensor([ids], device=device)).logits[0].double()
        difference = (logits - reference).abs().max().item()
        worst, smallest = max(worst, difference), min(smallest, margin)
        worst_relative = max(worst_relative, difference / reference.abs().max().item())
        last = len(ids) - 1
        positions = sorted({round(last * f / 8) for f in range(1, 8)} | {last} if index in interior else {last})
        everything = full is True or index % (len(lengths) // full) == len(lengths) // full - 1
        entries.append({"tokens": blob.ints(ids), "routing_margin": margin, "transformers_vs_float64": difference,
                        "positions": [describe_position(blob, p, logits[p], everything, generator) for p in positions]})
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "goldens.bin").write_bytes(blob.data)
    index = {"format": 1, "source": f"transformers {transformers.__version__}, float32, eager attention", "vocab_size": config["vocab_size"],
             "transformers_vs_float64": {"max_abs": worst, "max_relative_to_largest_logit": worst_relative},
             "smallest_routing_margin": smallest, "prompts": entries}
    (folder / "goldens.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:14s} {len(lengths)} prompts, transformers vs float64 max abs {worst:.2e} (relative {worst_relative:.2e}), "
          f"routing margin {smallest:.2e}, largest logit {logits.abs().max():.2f}, spread {logits[-1].std():.2f}, {size / 1e3:.0f} KB",
          flush=True)


def make_checkpoint_goldens(name, spec, out, device):
    config, folder = spec["config"], out / name
    tensors = random_weights(config, spec["seed"], spec["dtype"])
    write_checkpoint(folder, config, tensors, spec["shards"])
    plain = dequantised(tensors)
    with tempfile.TemporaryDirectory() as scratch:
        load_from = folder
        if spec["dtype"] == "fp8":
            load_from = pathlib.Path(scratch) / "dequantised"
            write_checkpoint(load_from, {k: v for k, v in config.items() if k != "quantization_config"},
                             {k: v.float() for k, v in plain.items()}, 1)
        model = load_in_transformers(load_from, config, device)
        other = load_in_transformers(load_from, rope_parameters_form(config), device)
    generator = torch.Generator().manual_seed(spec["seed"] + 100)
    draw = lambda n: torch.randint(2, config["vocab_size"], (n,), generator=generator).tolist()
    with torch.no_grad():
        probe = torch.tensor([draw(LONGEST)], device=device)
        same = torch.equal(model(probe).logits, other(probe).logits)
    print(f"{name:14s} rope_theta/rope_scaling and rope_parameters load {'identically' if same else 'DIFFERENTLY'}", flush=True)
    write_goldens(name, config, plain, model, draw, prompt_lengths(spec.get("prompts", PROMPTS), LONGEST), device, True, out)


# ------------------------------------------------------------------------------------------------------- demo model

TOKENIZER_STRINGS = [
    "", " ", "\n", "\n\n", "\t", "a", " a", "Hello", "Hello, world!", "The quick brown fox jumps over the lazy dog.",
    "  leading and trailing  ", "tabs\tand\nnewlines\r\nand carriage returns", "multiple\n\n\nblank\n\n\n\nlines",
    "12345", "3.14159 and 1,000,000", "0x7fff_ffff", "v2.11.0-rc1", "user@example.org", "https://www.debian.org/doc/?q=a&b=c#d",
    "int main(void) {\n    return printf(\"%d\\n\", 42);\n}\n", "def f(x):\n\treturn x ** 2  # square",
    "SELECT name, count(*) FROM t WHERE id >= 10 GROUP BY name;", "ls -la /usr/share/doc | grep -v '^d' > out.txt 2>&1",
    "it's we're I'll don't O'Brien", "\"quoted\" 'single' `back` (parens) [brackets] {braces} <angles>",
    "na\u00efve caf\u00e9 r\u00e9sum\u00e9 Stra\u00dfe \u0141\u00f3d\u017a", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\u0645\u0631\u062d\u0628\u0627", "\ud55c\uad6d\uc5b4",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 done", "e\u0301 combining, \u00e9 composed", "\u00a0no-break\u2003em space\u200bzero width",
    "\u2160\u2161\u2162 \u00bd \u0661\u0662\u0663", "a" * 70, "=" * 40, "<|bos|>", "<|user|>Hi<|end|><|assistant|>", "text <|eos|> more", "<|not_special|>",
    "x\u0000y\u001bz", "CamelCaseIdentifier snake_case_identifier kebab-case-identifier", "...!!!???---", "$HOME/.config/${XDG}/*.conf",
]

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is a page table?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help?"}, {"role": "user", "content": "Explain RAID 5."}],
    [{"role": "system", "content": "  spaces are trimmed \n"}, {"role": "user", "content": "\n two\nlines \n"}],
    [{"role": "user", "content": "The port number of the blue gateway is 4711.\n\nWhat is the port number of the blue gateway?"}],
    [{"role": "user", "content": "Unicode \u65e5\u672c \U0001f600 and <tags> & \"quotes\""}],
    [{"role": "user", "content": ""}],
]


def write_tokenizer_goldens(demo, out):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(str(demo))
    strings = []
    for text in TOKENIZER_STRINGS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        strings.append({"text": text, "ids": ids, "ids_with_special": tokenizer.encode(text, add_special_tokens=True),
                        "decoded": tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)})
    chats = []
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            chats.append({"messages": messages, "add_generation_prompt": prompt, "text": text,
                          "ids": tokenizer.encode(text, add_special_tokens=False)})
    folder = out / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"strings": strings, "chats": chats}, ensure_ascii=True, indent=1) + "\n")
    wrong = [s["text"] for s in strings if s["decoded"] != s["text"]]
    print(f"tokenizer      {len(strings)} strings, {len(chats)} chats, not round-tripping: {wrong}, "
          f"bos led: {strings[5]['ids_with_special'][:1]}", flush=True)


def make_demo_goldens(demo, out, device):
    from tokenizers import Tokenizer
    config = json.loads((demo / "config.json").read_text())
    ids = Tokenizer.from_file(str(demo / "tokenizer.json")).encode((demo / "heldout.txt").read_text(), add_special_tokens=False).ids
    generator = torch.Generator().manual_seed(31)

    def draw(n):
        start = int(torch.randint(0, len(ids) - n, (1,), generator=generator))
        return [config["bos_token_id"]] + ids[start:start + n - 1]

    model = load_in_transformers(demo, config, device)
    write_goldens("demo", config, read_checkpoint(demo), model, draw, prompt_lengths(PROMPTS, LONGEST), device, FULL_LOGITS_DEMO, out)
    write_tokenizer_goldens(demo, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--demo", type=pathlib.Path, help="demo model folder; its goldens go to OUT/demo")
    parser.add_argument("--only", help="comma-separated checkpoint names; 'none' for the demo model alone")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
    for name, spec in CHECKPOINTS.items():
        if args.only and name not in args.only.split(","):
            continue
        shutil.rmtree(args.out / name, ignore_errors=True)
        make_checkpoint_goldens(name, spec, args.out, device)
    if args.demo:
        make_demo_goldens(args.demo, args.out, device)


if __name__ == "__main__":
    main()
