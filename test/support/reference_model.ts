import type { ModelSpec } from '../../src/model/spec.js';
import { sharedIn, type SharedWidths } from '../../src/model/shared_widths.js';
import type { Weights } from '../../src/native/types.js';

/** How the reference attends: exactly, or as `ranks` TPLA ranks that each see their columns of the latent. */
export type ReferenceAttention = { form: 'mla' } | { form: 'tpla'; ranks: number; shared: SharedWidths };

interface Matrix {
  data: Float64Array;
  rows: number;
  cols: number;
}

interface LayerCache {
  latent: Float64Array[];
  rope: Float64Array[];
  /** TPLA ranks' own columns where they differ from the canonical latent (sliced norm); [rank][token]. */
  own: (Float64Array | null)[][];
}

/**
 * DeepSeek V2 and V3 in float64, one token at a time, written from the papers' equations and independent of the engine: un-absorbed
 * attention over a plain cache. Slow, for tiny checkpoints.
 */
export class ReferenceModel {
  private readonly matrices = new Map<string, Matrix>();
  private readonly caches: LayerCache[];

  constructor(private readonly spec: ModelSpec, private readonly weights: Weights, private readonly fp8: ReadonlySet<string> = new Set()) {
    this.caches = Array.from({ length: spec.layers }, () => ({ latent: [], rope: [], own: [] }));
  }

  /** Logits [vocab] after `token` at `position` (the number of tokens before it). */
  step(token: number, attention: ReferenceAttention = { form: 'mla' }): Float64Array {
    const { spec } = this;
    const position = this.caches[0]!.latent.length;
    let x: Float64Array = this.matrix('model.embed_tokens.weight', spec.vocabSize, spec.hiddenSize).data.slice(token * spec.hiddenSize, (token + 1) * spec.hiddenSize);
    for (let layer = 0; layer < spec.layers; layer++) {
      const at = `model.layers.${layer}.`;
      x = add(x, this.attend(layer, rmsNorm(x, this.vector(`${at}input_layernorm.weight`), spec.rmsNormEps), position, attention));
      x = add(x, this.feedForward(layer, rmsNorm(x, this.vector(`${at}post_attention_layernorm.weight`), spec.rmsNormEps)));
    }
    const head = spec.tiedEmbeddings ? 'model.embed_tokens.weight' : 'lm_head.weight';
    return multiply(this.matrix(head, spec.vocabSize, spec.hiddenSize), rmsNorm(x, this.vector('model.norm.weight'), spec.rmsNormEps));
  }

  private attend(layer: number, h: Float64Array, position: number, attention: ReferenceAttention): Float64Array {
    const { spec } = this;
    const { heads, kvLoraRank, qkNopeHeadDim: nope, qkRopeHeadDim: rope, vHeadDim: v } = spec;
    const at = `model.layers.${layer}.self_attn.`;
    let q: Float64Array;
    if (spec.qLoraRank === null) {
      q = multiply(this.matrix(`${at}q_proj.weight`, heads * (nope + rope), spec.hiddenSize), h);
    } else {
      const compressed = multiply(this.matrix(`${at}q_a_proj.weight`, spec.qLoraRank, spec.hiddenSize), h);
      q = multiply(this.matrix(`${at}q_b_proj.weight`, heads * (nope + rope), spec.qLoraRank), rmsNorm(compressed, this.vector(`${at}q_a_layernorm.weight`), 1e-6));
    }
    const kv = multiply(this.matrix(`${at}kv_a_proj_with_mqa.weight`, kvLoraRank + rope, spec.hiddenSize), h);
    const raw = kv.slice(0, kvLoraRank);
    const gamma = this.vector(`${at}kv_a_layernorm.weight`);
    let latent = rmsNorm(raw, gamma, 1e-6);
    if (spec.tpla?.transform && sharedIn(spec.tpla.shared, layer) < kvLoraRank) latent = multiply(this.matrix(`${at}tpla.transform.weight`, kvLoraRank, kvLoraRank), latent);
    const cache = this.caches[layer]!;
    cache.latent.push(latent);
    cache.rope.push(this.rotate(kv.slice(kvLoraRank), position));
    cache.own.push(this.ownColumns(layer, raw, gamma, attention));

    const kvB = this.matrix(`${at}kv_b_proj.weight`, heads * (nope + v), kvLoraRank);
    const joined = new Float64Array(heads * v);
    for (let head = 0; head < heads; head++) {
      const query = q.slice(head * (nope + rope), head * (nope + rope) + nope);
      const queryRope = this.rotate(q.slice(head * (nope + rope) + nope, (head + 1) * (nope + rope)), position);
      const wUk = rowsOf(kvB, head * (nope + v), nope);
      const wUv = rowsOf(kvB, head * (nope + v) + nope, v);
      const value = attention.form === 'mla'
        ? this.exactHead(cache, query, queryRope, wUk, wUv)
        : this.slicedHead(layer, head, cache, query, queryRope, wUk, wUv, attention);
      joined.set(value, head * v);
    }
    return multiply(this.matrix(`${at}o_proj.weight`, spec.hiddenSize, heads * v), joined);
  }

  /** Keys and values of every cached token, expanded; softmax over all of them. */
  private exactHead(cache: LayerCache, query: Float64Array, queryRope: Float64Array, wUk: Matrix, wUv: Matrix): Float64Array {
    const logits = cache.latent.map((latent, t) => this.spec.softmaxScale * (dot(query, multiply(wUk, latent)) + dot(queryRope, cache.rope[t]!)));
    const p = softmax(logits);
    return cache.latent.reduce((sum, latent, t) => add(sum, scaled(multiply(wUv, latent), p[t]!)), new Float64Array(wUv.rows));
  }

  /** Every rank: its own softmax over its own columns; the ranks' values add up, the shared columns counted once. */
  private slicedHead(layer: number, head: number, cache: LayerCache, query: Float64Array, queryRope: Float64Array, wUk: Matrix, wUv: Matrix, { ranks, shared: widths }: { ranks: number; shared: SharedWidths }): Float64Array {
    const { spec } = this;
    const shared = sharedIn(widths, layer);
    const columns = (rank: number): number[] => {
      const slice = (spec.kvLoraRank - shared) / ranks;
      return [...Array(shared).keys(), ...Array.from({ length: slice }, (_, i) => shared + rank * slice + i)];
    };
    let out: Float64Array = new Float64Array(wUv.rows);
    for (let rank = 0; rank < ranks; rank++) {
      const own = columns(rank);
      let uk = pickColumns(wUk, own);
      let uv = pickColumns(wUv, own);
      for (let i = 0; i < uv.rows; i++) for (let j = 0; j < shared; j++) uv.data[i * uv.cols + j]! /= ranks;
      if (spec.tpla?.rankWeights && ranks > 1 && shared < spec.kvLoraRank) {
        const at = `model.layers.${layer}.self_attn.tpla.rank${rank}.`;
        uk = rowsOf(this.matrix(`${at}w_uk`, spec.heads * uk.rows, own.length), head * uk.rows, uk.rows);
        uv = rowsOf(this.matrix(`${at}w_uv`, spec.heads * uv.rows, own.length), head * uv.rows, uv.rows);
      }
      const absorbed = multiplyTransposed(uk, query);
      const rows = cache.latent.map((latent, t) => cache.own[t]![rank] ?? Float64Array.from(own, (column) => latent[column]!));
      const p = softmax(rows.map((row, t) => spec.softmaxScale * (dot(absorbed, row) + dot(queryRope, cache.rope[t]!))));
      const mixed = rows.reduce((sum, row, t) => add(sum, scaled(row, p[t]!)), new Float64Array(own.length));
      out = add(out, multiply(uv, mixed));
    }
    return out;
  }

  /** With the sliced norm a rank stores columns normalised by its own estimate of RMS(c); null: the canonical ones. */
  private ownColumns(layer: number, raw: Float64Array, gamma: Float64Array, attention: ReferenceAttention): (Float64Array | null)[] {
    const { spec } = this;
    if (attention.form !== 'tpla' || attention.ranks === 1 || spec.tpla?.norm !== 'sliced') return Array<null>(64).fill(null);
    const { ranks } = attention;
    const shared = sharedIn(attention.shared, layer);
    const slice = (spec.kvLoraRank - shared) / ranks;
    return Array.from({ length: ranks }, (_, rank) => {
      const columns = [...Array(shared).keys(), ...Array.from({ length: slice }, (_unused, i) => shared + rank * slice + i)];
      const own = Float64Array.from(columns, (column) => raw[column]!);
      const rms = spec.tpla!.normScale[layer]![rank]! * Math.sqrt(dot(own, own) / own.length + 1e-6);
      return own.map((value, i) => (value / rms) * gamma[columns[i]!]!);
    });
  }

  private rotate(x: Float64Array, position: number): Float64Array {
    const { rope, qkRopeHeadDim: dim } = this.spec;
    const out = x.slice();
    for (let i = 0; i < dim / 2; i++) {
      const plain = rope.theta ** (-(2 * i) / dim);
      let frequency = plain;
      let scale = 1;
      if (rope.yarn) {
        const { factor, originalContext, betaFast, betaSlow, cosScale } = rope.yarn;
        const index = (turns: number): number => (dim * Math.log(originalContext / (turns * 2 * Math.PI))) / (2 * Math.log(rope.theta));
        const low = Math.max(Math.floor(index(betaFast)), 0);
        const high = Math.min(Math.ceil(index(betaSlow)), dim - 1);
        const ramp = Math.min(Math.max((i - low) / (high === low ? 0.001 : high - low), 0), 1);
        frequency = (plain / factor) * ramp + plain * (1 - ramp);
        scale = cosScale;
      }
      const [a, b] = rope.interleaved ? [2 * i, 2 * i + 1] : [i, i + dim / 2];
      const cos = Math.cos(position * frequency) * scale;
      const sin = Math.sin(position * frequency) * scale;
      out[a] = x[a]! * cos - x[b]! * sin;
      out[b] = x[b]! * cos + x[a]! * sin;
    }
    return out;
  }

  private feedForward(layer: number, h: Float64Array): Float64Array {
    const { spec } = this;
    const at = `model.layers.${layer}.mlp.`;
    const { moe } = spec;
    if (!moe || layer < moe.firstDenseLayers || layer % moe.layerFreq !== 0) return this.mlp(at, spec.intermediateSize, h);
    const logits = multiply(this.matrix(`${at}gate.weight`, moe.experts, spec.hiddenSize), h);
    const scores = moe.scoring === 'softmax' ? softmax([...logits]) : [...logits].map((x) => 1 / (1 + Math.exp(-x)));
    let choice = scores.slice();
    if (moe.selection === 'noaux_tc') {
      const bias = this.vector(`${at}gate.e_score_correction_bias`);
      choice = choice.map((score, e) => score + bias[e]!);
    }
    if (moe.selection !== 'greedy') {
      const size = moe.experts / moe.groups;
      const groups = Array.from({ length: moe.groups }, (_, g) => choice.slice(g * size, (g + 1) * size).sort((a, b) => b - a));
      const groupScores = groups.map((sorted) => (moe.selection === 'noaux_tc' ? sorted[0]! + sorted[1]! : sorted[0]!));
      const kept = new Set(largest(groupScores, moe.topGroups));
      choice = choice.map((score, e) => (kept.has(Math.floor(e / size)) ? score : -Infinity));
    }
    const chosen = largest(choice, moe.topK);
    const total = chosen.reduce((sum, e) => sum + scores[e]!, 0);
    let out: Float64Array = moe.sharedExperts > 0 ? this.mlp(`${at}shared_experts.`, moe.intermediateSize * moe.sharedExperts, h) : new Float64Array(spec.hiddenSize);
    for (const e of chosen) {
      const scale = moe.normTopK && moe.scoring === 'softmax' ? 1 : moe.routedScale;
      const weight = (moe.normTopK ? scores[e]! / (total + 1e-20) : scores[e]!) * scale;
      out = add(out, scaled(this.mlp(`${at}experts.${e}.`, moe.intermediateSize, h), weight));
    }
    return out;
  }

  private mlp(at: string, inner: number, h: Float64Array): Float64Array {
    const { hiddenSize } = this.spec;
    const gate = multiply(this.matrix(`${at}gate_proj.weight`, inner, hiddenSize), h);
    const up = multiply(this.matrix(`${at}up_proj.weight`, inner, hiddenSize), h);
    return multiply(this.matrix(`${at}down_proj.weight`, hiddenSize, inner), gate.map((g, i) => (g / (1 + Math.exp(-g))) * up[i]!));
  }

  private matrix(name: string, rows: number, cols: number): Matrix {
    let matrix = this.matrices.get(name);
    if (!matrix) {
      const scale = this.fp8.has(name) ? { name: `${name}_scale_inv`, block: this.spec.weightBlock! } : undefined;
      matrix = { data: Float64Array.from(this.weights.read(name, scale)), rows, cols };
      if (matrix.data.length !== rows * cols) throw new Error(`${name} has ${matrix.data.length} elements, expected ${rows}x${cols}`);
      this.matrices.set(name, matrix);
    }
    return matrix;
  }

  private vector(name: string): Float64Array {
    return this.matrices.get(name)?.data ?? this.matrix(name, 1, this.weights.read(name).length).data;
  }
}

function multiply(m: Matrix, x: Float64Array): Float64Array {
  const out = new Float64Array(m.rows);
  for (let i = 0; i < m.rows; i++) {
    let sum = 0;
    for (let j = 0; j < m.cols; j++) sum += m.data[i * m.cols + j]! * x[j]!;
    out[i] = sum;
  }
  return out;
}

function multiplyTransposed(m: Matrix, x: Float64Array): Float64Array {
  const out = new Float64Array(m.cols);
  for (let i = 0; i < m.rows; i++) for (let j = 0; j < m.cols; j++) out[j]! += m.data[i * m.cols + j]! * x[i]!;
  return out;
}

function rowsOf(m: Matrix, begin: number, rows: number): Matrix {
  return { data: m.data.slice(begin * m.cols, (begin + rows) * m.cols), rows, cols: m.cols };
}

function pickColumns(m: Matrix, columns: number[]): Matrix {
  const data = new Float64Array(m.rows * columns.length);
  for (let i = 0; i < m.rows; i++) columns.forEach((column, j) => (data[i * columns.length + j] = m.data[i * m.cols + column]!));
  return { data, rows: m.rows, cols: columns.length };
}

function rmsNorm(x: Float64Array, gamma: Float64Array, eps: number): Float64Array {
  const inverse = 1 / Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((value, i) => value * inverse * gamma[i]!);
}

function softmax(logits: number[]): number[] {
  const top = Math.max(...logits);
  const exps = logits.map((x) => Math.exp(x - top));
  const sum = exps.reduce((a, b) => a + b, 0);
  return exps.map((x) => x / sum);
}

function largest(values: number[], count: number): number[] {
  return values.map((_, i) => i).sort((a, b) => values[b]! - values[a]! || a - b).slice(0, count);
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

function add(a: Float64Array, b: Float64Array): Float64Array {
  return a.map((value, i) => value + b[i]!);
}

function scaled(a: Float64Array, factor: number): Float64Array {
  return a.map((value) => value * factor);
}
