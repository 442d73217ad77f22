/**
 * What a shared subspace of another width in every layer would buy at the same mean bytes per token.
 *
 *   npx tsx scripts/shared_by_layer.ts MODEL [--mean 16] [--widest 64] [--groups 2] [--refine 0] [--tokens 2048] [--device auto]
 *
 * Pages have one row size, so such a checkpoint cannot be served in fewer bytes; but it can be decoded in rows of the widest layer: a layer
 * with a narrower shared subspace keeps some columns of each rank's slice in the shared part, and the other ranks' weights for them are
 * zero. From the same width everywhere, layers that gain most by a wider subspace take from those that lose least by a narrower one, by KL
 * measured in decode after exact prefill, while that lowers it.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { Matrix } from 'ml-matrix';
import { evaluate } from '../src/eval/evaluate.js';
import { textWindows } from '../src/eval/windows.js';
import { loadCheckpoint } from '../src/model/checkpoint.js';
import { Tokenizer } from '../src/model/tokenizer.js';
import { native } from '../src/native/loader.js';
import { captureLayers, loadSample, readCalibrationText } from '../src/reparam/calibration.js';
import { tplaSection } from '../src/reparam/convert.js';
import { fitTarget, type Device } from '../src/reparam/device.js';
import { designLayer, type LayerDesign } from '../src/reparam/layer.js';
import { fitWeights, layerShape, layerTensors, readSourceLayer, type StoredTensor } from '../src/reparam/layer_tensors.js';
import { METHODS, validateMethod, type Method } from '../src/reparam/method.js';
import { Overlay } from '../src/reparam/overlay.js';
import { StageClock } from '../src/reparam/stages.js';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    mean: { type: 'string', default: '16' }, widest: { type: 'string', default: '64' }, groups: { type: 'string', default: '2' }, refine: { type: 'string', default: '0' },
    tokens: { type: 'string', default: '2048' }, device: { type: 'string', default: 'auto' },
  },
});
const dir = positionals[0];
if (dir === undefined) throw new Error('name the model');
const [mean, widest, groups] = [Number(flags.mean), Number(flags.widest), Number(flags.groups)];
const step = 16;
const source = loadCheckpoint(dir);
const { spec } = source;
const latent = spec.kvLoraRank;
const method: Method = { ...METHODS.default!, refine: Number(flags.refine) };
for (const shared of [mean, widest]) validateMethod({ ...method, shared }, { groups, kvLoraRank: latent });
const target = fitTarget(flags.device as Device, 0);
const tokenizer = Tokenizer.load(source.dir);
const calibration = await readCalibrationText(tokenizer, spec, { file: join(dir, 'calibration.txt'), context: 512, tokens: null, queries: null, seed: 1 }, latent * groups);
const windows = await textWindows(tokenizer, readFileSync(join(dir, 'heldout.txt'), 'utf8'), { context: 1024, prefix: 512, scored: Number(flags.tokens), seed: 1 });

/** The design of a layer with `shared` common columns in the layout of one with `widest`. */
function inWidestLayout(design: LayerDesign, shared: number): LayerDesign {
  const slice = (latent - shared) / groups;
  const moved = (widest - shared) / groups; // columns of each slice that lie in the shared part
  const width = widest + (latent - widest) / groups;
  const rank = (index: number, begin: number, end: number) => Array.from({ length: end - begin }, (_, j) => shared + index * slice + begin + j);
  const ranks = Array.from({ length: groups }, (_, index) => index);
  const order = [...Array.from({ length: shared }, (_, j) => j), ...ranks.flatMap((index) => rank(index, 0, moved)), ...ranks.flatMap((index) => rank(index, moved, slice))];
  const place = (index: number, column: number) => (column < shared ? column : column < shared + moved ? column + index * moved : column - shared - moved + widest);
  const spread = (from: Float32Array, index: number) => {
    const out = new Float32Array((from.length / (shared + slice)) * width);
    for (let i = 0; i < from.length; i++) out[Math.floor(i / (shared + slice)) * width + place(index, i % (shared + slice))] = from[i]!;
    return out;
  };
  return {
    ...design,
    basis: { ...design.basis, matrix: new Matrix(order.map((row) => design.basis.matrix.getRow(row))), inverse: design.basis.inverse.subMatrixColumn(order) },
    ranks: design.ranks!.map(({ uk, uv }, index) => ({ basis: new Float32Array(width * latent), uk: spread(uk, index), uv: spread(uv, index) })),
  };
}

const work = mkdtempSync(join(tmpdir(), 'tpla-by-layer-'));
const capture = (layer: number) => join(work, `capture-${layer}.safetensors`);
const weights = new (native().Weights)(source.files, source.tensors);
const made = new Map<string, StoredTensor[]>();

async function tensorsOf(layer: number, shared: number): Promise<StoredTensor[]> {
  const key = `${layer} ${shared}`;
  const known = made.get(key);
  if (known !== undefined) return known;
  const published = readSourceLayer(source, weights, layer);
  const input = { shape: layerShape(source), weights: fitWeights(source, weights, layer, published), sample: loadSample(capture(layer)) };
  const design = await designLayer(input, { ...method, shared }, { groups, seed: 1 + layer, target, clock: new StageClock() });
  const tensors = await layerTensors(source, layer, published, inWidestLayout(design, shared), { transform: true, output: 'auto', target });
  made.set(key, tensors);
  return tensors;
}

async function divergence(widths: number[]): Promise<number> {
  const overlay = new Overlay(source, join(work, 'model'));
  for (const [layer, shared] of widths.entries()) overlay.addLayer(layer, await tensorsOf(layer, shared));
  // Any method with a transform of its own: `layerTensors` has stored one.
  overlay.finish(tplaSection({ groups, method: { ...method, refine: 1, shared: widest } }, [], '0'.repeat(32)));
  try {
    return (await evaluate(loadCheckpoint(overlay.dir), tokenizer, windows, { phase: 'decode', form: 'tpla', ranks: groups, dtype: 'bf16', threads: 0, reference: source })).kl_vs_mla;
  } finally {
    rmSync(overlay.dir, { recursive: true });
  }
}

/** One layer's width changed. */
const changed = (widths: number[], layer: number, by: number) => widths.map((width, i) => (i === layer ? width + by : width));

/** Layers paired by what a step more gains and what a step less loses, as far as it pays. */
function traded(widths: number[], gains: number[], losses: number[]): number[] {
  const next = [...widths];
  const byGain = gains.map((_, layer) => layer).sort((a, b) => gains[b]! - gains[a]!);
  const givers = losses.map((_, layer) => layer).sort((a, b) => losses[a]! - losses[b]!);
  const used = new Set<number>();
  for (const taker of byGain) {
    const giver = givers.find((layer) => layer !== taker && !used.has(layer));
    if (giver === undefined || used.has(taker) || gains[taker]! <= losses[giver]!) continue;
    next[taker]! += step;
    next[giver]! -= step;
    used.add(taker).add(giver);
  }
  return next;
}

try {
  await captureLayers(source, calibration, { seed: 1, threads: 0, isWanted: () => true, pathOf: capture, onLayer: () => {} });
  let widths = new Array<number>(spec.layers).fill(mean);
  const uniform = await divergence(widths);
  console.log(`shared ${mean} in every layer: KL ${uniform.toFixed(5)}`);
  for (let best = uniform; ; ) {
    const gains: number[] = [];
    const losses: number[] = [];
    for (let layer = 0; layer < spec.layers; layer++) {
      gains.push(widths[layer]! + step > widest ? -Infinity : best - (await divergence(changed(widths, layer, step))));
      losses.push(widths[layer]! - step < 0 ? Infinity : (await divergence(changed(widths, layer, -step))) - best);
    }
    const next = traded(widths, gains, losses);
    if (next.join() === widths.join()) break;
    const value = await divergence(next);
    console.log(`shared ${next.join(', ')}: KL ${value.toFixed(5)}, ${(value / uniform).toFixed(3)} of that`);
    if (value >= best) break;
    [widths, best] = [next, value];
  }
} finally {
  weights.close();
  rmSync(work, { recursive: true, force: true });
}
