/** `tpla reparam` and `tpla eval` as a shell sees them. */
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';

const test = suite('commands/reparam');
const root = fileURLToPath(new URL('../..', import.meta.url));
const dir = mkdtempSync(join(tmpdir(), 'tpla-command-'));
test.after(() => rmSync(dir, { recursive: true }));

const tpla = (...args: string[]) => execa(process.execPath, [join(root, 'bin/tpla.js'), ...args], { cwd: root, reject: false });

test('reparam writes a checkpoint, eval measures it, both as JSON', async () => {
  const out = join(dir, 'out');
  const made = await tpla('reparam', 'models/demo', out, '--refine', '0', '--shared', '32', '--calibration-tokens', '8192', '--json');
  assert.is(made.exitCode, 0, made.stderr);
  const result = JSON.parse(made.stdout) as Record<string, unknown>;
  assert.is(result.groups, 2);
  assert.is(result.kv_values_per_token_per_rank, 32 + 48 + 32);
  assert.ok((result.peak_rss_bytes as number) > 1e7);
  const measured = await tpla('eval', out, '--reference', 'models/demo', '--phase', 'decode', '--attention', 'tpla', '--context', '256', '--tokens', '128', '--json');
  assert.is(measured.exitCode, 0, measured.stderr);
  const score = JSON.parse(measured.stdout) as Record<string, number>;
  for (const field of ['bits_per_byte', 'kl_vs_mla', 'top1_agreement', 'tokens']) assert.type(score[field], 'number', field);
  assert.ok(score.kl_vs_mla! < 0.15, String(score.kl_vs_mla));
});

test('the report: rows beside mla and dcp, ratios, a picture', async () => {
  const picture = join(dir, 'report.svg');
  const { stdout, stderr, exitCode } = await tpla('reparam', 'models/demo', '--report', '--only', 'fitted scale', '--only', 'aware + both, shared 32', '--calibration-tokens', '8192',
    '--context', '256', '--tokens', '128', '--recall-prompts', '2', '--picture', picture, '--json');
  assert.is(exitCode, 0, stderr);
  const report = JSON.parse(stdout) as { rows: { name: string; kl_vs_mla: number; kl_vs_best_pca: number; kv_bytes_per_token_per_rank: number; recall_accuracy: number }[] };
  assert.equal(report.rows.map(({ name }) => name), ['mla', 'dcp', 'pca, fitted scale', 'aware + both, shared 32']);
  const [mla, dcp, pca, ours] = report.rows as [typeof report.rows[0], typeof report.rows[0], typeof report.rows[0], typeof report.rows[0]];
  assert.ok(mla.kl_vs_mla < 1e-4 && dcp.kl_vs_mla < 1e-4);
  assert.is(dcp.kv_bytes_per_token_per_rank * 2, mla.kv_bytes_per_token_per_rank);
  assert.is(pca.kl_vs_best_pca, 1);
  assert.ok(ours.kl_vs_mla < pca.kl_vs_mla / 2, `${ours.kl_vs_mla} ${pca.kl_vs_mla}`);
  assert.match(readFileSync(picture, 'utf8'), '<svg');
});

test('what cannot be done ends with one line and status 2', async () => {
  const cases: [string[], RegExp][] = [
    [['reparam', 'models/demo'], /name the output directory/],
    [['reparam', 'models/demo', join(dir, 'x'), '--groups', '3'], /not divisible by 3 groups/],
    [['reparam', 'models/demo', join(dir, 'x'), '--budget-bytes-per-token', '100'], /stays within 100 bytes per token; without a shared subspace it is 1344/],
    [['reparam', 'models/demo', join(dir, 'x'), '--shared', '0,16'], /--shared has 2 widths, the model 7 layers/],
    [['reparam', 'models/demo', join(dir, 'x'), '--shared', '16;32'], /--shared is "16;32"; expected whole numbers/],
    [['reparam', 'models/demo', join(dir, 'x'), '--budget-bytes-per-token', '1500', '--shared-widths', '0,17'], /a shared width of 17 is not possible/],
    [['reparam', 'models/demo', join(dir, 'x'), '--shared-widths', '0,16'], /budget-bytes-per-token/],
    [['reparam', 'models/demo', '--report', '--text', 'models/demo/calibration.txt'], /both calibration and evaluation text/],
    [['reparam', 'models/demo', join(dir, 'x'), '--device', 'tpu'], /Expected --device=tpu to be one of: auto, cpu, cuda/],
    [['eval', 'models/demo', '--text', join(dir, 'none.txt')], /no such file/],
    [['eval', 'models/demo', '--attention', 'tpla'], /is not reparameterised/],
  ];
  for (const [args, message] of cases) {
    const { stderr, exitCode } = await tpla(...args);
    assert.is(exitCode, 2, `${args.join(' ')}: ${stderr}`);
    assert.match(stderr, message);
  }
  assert.not(existsSync(join(dir, 'x')));
});

test.run();
