/** What the GPU tests share: random problems over the whole supported range, and the judgement of their outcome. */
import * as assert from 'uvu/assert';
import { judge } from '../../src/bench/attention/run.js';
import type { AttentionPath, AttentionProblem, AttentionRunOptions, ChunkProblem, DecodeProblem, GqaProblem, PodProblem, PrefillProblem } from '../../src/native/attention.js';
import { native } from '../../src/native/loader.js';
import type { Draw } from '../support/random.js';

export const GPU = { kind: 'gpu', index: 0 } as const;

export const LATENTS = [512, 256, 320, 128];

const PAGES = [16, 32, 48, 64, 64, 80, 128, 256];
const HEADS = [1, 2, 3, 5, 8, 12, 16, 16, 20, 24, 32, 40, 64, 64, 96, 128, 128];

/** Tokens of a sequence: none, one, those about the end of a page, or any number. */
function randomLength(draw: Draw, page: number, longest: number): number {
  return draw.chance(1 / 3) ? draw.of([0, 0, 1, page - 1, page, page + 1]) : draw.integer(0, longest);
}

/** Lengths may be zero, and shorter than the query; some batches are ragged, some large, some have gaps between their pages. */
export function randomDecode(draw: Draw, path: AttentionPath, latent: number): DecodeProblem {
  const isLarge = draw.chance(1 / 15);
  const batch = isLarge ? draw.integer(100, 300) : draw.integer(1, draw.chance(1 / 3) ? 40 : 6);
  const longest = isLarge ? 150 : draw.of([6000, 700, 700, 150]);
  const qTokens = draw.chance(1 / 3) ? draw.integer(1, 4) : 1;
  const ragged = draw.chance(1 / 4);
  const pageTokens = draw.of(PAGES);
  return {
    kind: 'decode',
    kvLens: Int32Array.from({ length: batch }, () => randomLength(draw, pageTokens, longest)),
    qLens: Int32Array.from({ length: batch }, () => (ragged ? draw.integer(0, qTokens) : qTokens)),
    heads: draw.of(HEADS),
    latent,
    rope: 64,
    pageTokens,
    pageGapBytes: draw.chance(1 / 4) ? 16 * draw.integer(1, 100) : 0,
    kvDType: 'bf16',
    causal: draw.chance(3 / 4),
    latentScale: draw.chance(1 / 4),
    queryScale: draw.chance(1 / 3) ? 6 : 1,
    path,
  };
}

/** Up to 512 query tokens, some sequences without any, some with more of them than keys; in both forms. */
export function randomChunk(draw: Draw, path: AttentionPath = 'auto'): ChunkProblem {
  const heads = draw.of(HEADS);
  const most = Math.min(512, Math.floor(24000 / heads));
  const pageTokens = draw.of(PAGES);
  const qLens = Array.from({ length: draw.integer(1, 4) }, () => (draw.chance(1 / 6) ? 0 : draw.integer(1, most)));
  return {
    kind: 'chunk',
    qLens: Int32Array.from(qLens),
    kvLens: Int32Array.from(qLens, (len) => (draw.chance(1 / 6) ? randomLength(draw, pageTokens, len) : len + draw.integer(0, draw.of([300, 2000])))),
    heads,
    pageTokens,
    kvDType: draw.of(['bf16', 'fp8']),
    causal: draw.chance(3 / 4),
    // Larger logits would show the rounding of keys or absorbed queries to bf16, which both forms keep in memory.
    queryScale: 1,
    form: 'auto',
    path,
  };
}

/** As randomDecode, with one to seventy query heads to a KV head. */
export function randomGqa(draw: Draw): GqaProblem {
  const { kvLens, qLens, pageTokens, pageGapBytes, causal, queryScale } = randomDecode(draw, 'auto', 512);
  const kvHeads = draw.of([1, 1, 2, 3, 8]);
  return {
    kind: 'gqa', kvLens, qLens, heads: kvHeads * draw.of([1, 1, 2, 3, 4, 7, 8, 8, 12, 16, 32, 70]), kvHeads, headDim: draw.of([64, 128]), pageTokens, pageGapBytes,
    layout: draw.of(['nhd', 'hnd']), causal, queryScale, path: 'auto',
  };
}

/** Chunks at the end of their keys, whole prompts, and queries that see nothing. */
export function randomPrefill(draw: Draw, path: AttentionPath = 'auto'): PrefillProblem {
  const qLens = Array.from({ length: draw.integer(1, 4) }, () => (draw.chance(1 / 5) ? draw.integer(0, 2) : draw.integer(0, 700)));
  const kvLens = qLens.map((len) => (draw.chance(1 / 2) ? len : draw.chance(1 / 6) ? draw.integer(0, 100) : len + draw.integer(0, 500)));
  return {
    kind: 'prefill',
    qLens: Int32Array.from(qLens),
    kvLens: Int32Array.from(kvLens),
    heads: draw.integer(1, 5),
    keyDim: 192,
    valueDim: 128,
    causal: draw.chance(3 / 4),
    queryScale: draw.chance(1 / 3) ? 6 : 1,
    path,
  };
}

/** Both at once, with as few decode rows as the fused kernel takes. */
export function randomPod(draw: Draw, latent: number): PodProblem {
  const decode = randomDecode(draw, 'auto', latent);
  const most = Math.max(1, ...decode.qLens);
  const prefill = randomPrefill(draw);
  return {
    kind: 'pod',
    prefill: prefill.qLens.some((len) => len > 0) ? prefill : { ...prefill, qLens: Int32Array.of(33), kvLens: Int32Array.of(70) },
    decode: { ...decode, heads: Math.min(decode.heads, Math.floor(32 / most)) },
    decodeMultiprocessors: draw.chance(1 / 3) ? draw.integer(1, 131) : 0,
  };
}

/** Runs a problem and fails, naming it, where its result is not right. */
export async function mustBeRight(problem: AttentionProblem, options: Partial<AttentionRunOptions> & { seed: number }): Promise<void> {
  const { check } = await native().attention.run(GPU, problem, { repeats: 10, runs: 0, reference: 'auto', ...options });
  assert.ok(check);
  const text = JSON.stringify(problem, (_, value: unknown) => (value instanceof Int32Array ? [...value] : value));
  assert.is(judge(check, 'gpu', problem.kind), 'ok', `seed ${options.seed}: ${text}: ${JSON.stringify(check)}`);
}
