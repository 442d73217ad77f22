import { mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { parseModelConfig } from '../../src/model/config.js';
import { loadSample, sampleBytes, sampledPositions, saveSample } from '../../src/reparam/calibration.js';
import { TINY_V3 } from '../support/checkpoint.js';

const test = suite('reparam/calibration');
const dir = mkdtempSync(join(tmpdir(), 'tpla-calibration-'));
test.after(() => rmSync(dir, { recursive: true }));

test('a sample comes back as it was, and takes the room that was reckoned with', () => {
  const { spec } = parseModelConfig(TINY_V3, 'test');
  const lengths = [40, 64, 40];
  const [tokens, queries] = [144, 3 * 20];
  const fill = (count: number) => Float32Array.from({ length: count }, (_, i) => i / 7);
  const sample = {
    sequences: Int32Array.of(0, 40, 104, 144), latents: fill(tokens * spec.kvLoraRank), ropeKeys: fill(tokens * spec.qkRopeHeadDim),
    queryTokens: Int32Array.from({ length: queries }, (_, i) => i), queries: fill(queries * spec.heads * (spec.qkNopeHeadDim + spec.qkRopeHeadDim)),
  };
  const path = join(dir, 'sample.safetensors');
  saveSample(path, sample, spec);
  assert.equal(loadSample(path), sample);
  const reckoned = sampleBytes(spec, { sequences: lengths.map((length) => new Int32Array(length)), queries: 20 });
  const written = statSync(path).size;
  assert.ok(written >= reckoned && written < reckoned + 2048, `${written} ${reckoned}`);
});

test('positions are spread over a sequence, ascending, and all of them where all are wanted', () => {
  const [few, all] = sampledPositions([100, 7], 10, 3);
  assert.is(few!.length, 10);
  assert.ok(few!.every((position, i) => i === 0 || position > few![i - 1]!));
  assert.ok(few![9]! >= 90 && few![9]! < 100);
  assert.equal(all, [0, 1, 2, 3, 4, 5, 6]);
});

test.run();
