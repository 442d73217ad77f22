import { writeFileSync } from 'node:fs';
import { Flags } from '@oclif/core';
import { resultsAsCsv } from '../bench/attention/columns.js';
import { readComparison } from '../bench/attention/files.js';
import { PRESETS } from '../bench/attention/presets.js';
import { printResults } from '../bench/attention/print.js';
import { rooflineSvg } from '../bench/attention/roofline.js';
import { benchAttention, resultAsJson } from '../bench/attention/run.js';
import { parseTarget, selectShapes } from '../bench/attention/select.js';
import { SHAPE_KINDS } from '../bench/attention/shape.js';
import { BaseCommand } from '../cli/base_command.js';
import { ERRORS, TplaError } from '../errors.js';
import type { AttentionPath } from '../native/attention.js';
import { native } from '../native/loader.js';
import { consoleProgress, SILENT } from '../report/progress.js';

const SHAPE = { helpGroup: 'SHAPE' };

export default class BenchAttention extends BaseCommand {
  static override summary = 'Check and time the attention kernels on this machine';
  static override description = `Draws random data for every shape, compares the result with a float64 reference, and only then times it: over input buffers that together
outgrow the L2 cache, with events around replays of a graph. The bandwidth and matrix rate it is held against are measured in the same run.

Shapes come from presets, from files (CSV, YAML or JSON with the columns of --csv), or from flags; a flag with a list such as 1,8,32 stands for
each of its values. --compare reads other times from a CSV with the same columns and prints how many times longer they are.

Ends with status ${ERRORS.CHECK_FAILED.exit} where a result is wrong.

Presets:
${Object.entries(PRESETS).map(([name, { summary }]) => `  ${name.padEnd(10)}  ${summary}`).join('\n')}`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> --preset flashmla',
    '<%= config.bin %> <%= command.id %> --preset tpla --compare fa3_decode.csv --svg roofline.svg',
    '<%= config.bin %> <%= command.id %> --latent 256 --heads 16,64,128 --batch 1,32 --kv-len 8192 --csv > times.csv',
    '<%= config.bin %> <%= command.id %> --kind prefill --heads 128 --kv-len 4096,8192',
    '<%= config.bin %> <%= command.id %> --kind chunk --heads 16,128 --q-tokens 128,256,512 --kv-len 16384',
    '<%= config.bin %> <%= command.id %> --kv-heads 8 --heads 32,64 --head-dim 128 --batch 64 --kv-len 8192 --window 4096 --softcap 30',
    '<%= config.bin %> <%= command.id %> --kind pod --prefill-heads 16 --prefill-kv-len 8192 --heads 16 --batch 64 --kv-len 4096',
    '<%= config.bin %> <%= command.id %> --device cpu --heads 16 --kv-len 1024 --check-only',
  ];
  static override enableJsonFlag = true;
  static override flags = {
    device: Flags.string({ default: 'gpu', description: 'gpu, gpu:N, or cpu for what the CPU engine computes: decode and chunks', helpValue: 'DEVICE' }),
    threads: Flags.integer({ default: 0, min: 0, description: 'threads of --device cpu; 0 for all cores' }),
    preset: Flags.string({ multiple: true, delimiter: ',', options: Object.keys(PRESETS), description: 'published workloads, see above', default: [] }),
    shapes: Flags.string({ multiple: true, description: 'shapes of a CSV, YAML or JSON file', helpValue: 'FILE', default: [] }),
    compare: Flags.string({ multiple: true, description: 'CSV of other times to print beside these', helpValue: 'FILE', default: [] }),
    path: Flags.option({ options: ['auto', 'sm90', 'sm80'] as const, default: 'auto' as AttentionPath, description: 'kernels to use; auto takes the fastest this GPU has' })(),
    runs: Flags.integer({ default: 20, min: 1, description: 'timed repetitions per shape' }),
    repeats: Flags.integer({ default: 2, min: 1, description: 'checked launches per shape, whose results must have the same bits' }),
    seed: Flags.integer({ default: 1, min: 0, description: 'of the random data' }),
    'check-only': Flags.boolean({ description: 'compare with the reference, time nothing', exclusive: ['svg'] }),
    csv: Flags.boolean({ description: 'print CSV, one row per shape', exclusive: ['json'] }),
    svg: Flags.string({ description: 'write a roofline plot', helpValue: 'FILE' }),
    kind: Flags.string({ ...SHAPE, options: [...SHAPE_KINDS], description: 'absorbed decode over paged latents, decode with ordinary keys and values, un-absorbed prefill, a chunk of prefill behind cached latents, or prefill and absorbed decode in one launch' }),
    heads: Flags.string({ ...SHAPE, description: 'query heads of a rank (default 128)', helpValue: 'N,…' }),
    batch: Flags.string({ ...SHAPE, description: 'sequences of --kv-len each (default 1)', helpValue: 'N,…' }),
    'kv-len': Flags.string({ ...SHAPE, description: 'tokens per sequence, the query tokens included', helpValue: 'N,…' }),
    'kv-lens': Flags.string({ ...SHAPE, description: 'tokens of each sequence of a batch', helpValue: 'N;N;…' }),
    'q-tokens': Flags.string({ ...SHAPE, description: 'query tokens per sequence (default 1; prefill: the whole sequence; chunk: up to 512)', helpValue: 'N,…' }),
    'q-lens': Flags.string({ ...SHAPE, description: 'query tokens of each sequence', helpValue: 'N;N;…' }),
    latent: Flags.string({ ...SHAPE, description: 'decode: latent values per token on a rank (default 512)', helpValue: 'N,…' }),
    rope: Flags.string({ ...SHAPE, description: 'decode: rope values per token (default 64)', helpValue: 'N' }),
    page: Flags.string({ ...SHAPE, description: 'decode, gqa, chunk: tokens per page (default 64)', helpValue: 'N,…' }),
    'kv-dtype': Flags.string({ ...SHAPE, description: 'decode, chunk: bf16, fp8, or f32 on the CPU (default bf16)', helpValue: 'TYPE,…' }),
    form: Flags.string({ ...SHAPE, description: 'chunk: absorbed, unabsorbed, or auto, which times both and reports the one that is estimated to be faster (default auto)', helpValue: 'FORM,…' }),
    'latent-scale': Flags.boolean({ ...SHAPE, description: "decode: with TPLA's logit factor per head" }),
    'kv-heads': Flags.string({ ...SHAPE, description: 'gqa: heads of keys and values (default 8)', helpValue: 'N,…' }),
    'head-dim': Flags.string({ ...SHAPE, description: 'gqa: values of a head (default 128)', helpValue: 'N,…' }),
    'kv-layout': Flags.string({ ...SHAPE, description: 'gqa: order in a page, nhd (token, head, value; the default) or hnd', helpValue: 'ORDER,…' }),
    softcap: Flags.string({ ...SHAPE, description: 'decode, gqa: bound of the logits, by tanh', helpValue: 'X,…' }),
    window: Flags.string({ ...SHAPE, description: 'decode, gqa: tokens a query sees, its own included', helpValue: 'N,…' }),
    alibi: Flags.boolean({ ...SHAPE, description: 'decode, gqa: with a bias per head that grows with the distance' }),
    'block-mask': Flags.string({ ...SHAPE, description: 'decode, gqa: tokens of a block and share of the blocks that are visible, such as 128:0.25', helpValue: 'N:SHARE,…' }),
    'key-dim': Flags.string({ ...SHAPE, description: 'prefill: values of a key (default 192)', helpValue: 'N' }),
    ...Object.fromEntries(['heads', 'batch', 'kv-len', 'kv-lens', 'q-tokens', 'q-lens'].map((name) => [`prefill-${name}`, Flags.string({ ...SHAPE, description: `pod: --${name} of the prefill; the plain flag is the decode's` })])),
    'decode-sms': Flags.string({ ...SHAPE, description: 'pod: multiprocessors that begin with decode (default: from the lengths)', helpValue: 'N,…' }),
    'value-dim': Flags.string({ ...SHAPE, description: 'prefill: values of a value (default 128)', helpValue: 'N' }),
    causal: Flags.boolean({ ...SHAPE, allowNo: true, description: 'queries see only tokens up to their own (the default)' }),
  };

  async run(): Promise<unknown> {
    const { flags } = await this.parse(BenchAttention);
    const { device, threads, preset, shapes, compare, path, runs, repeats, seed, 'check-only': checkOnly, csv, svg, json: _json, ...shapeFlags } = flags;
    const result = await benchAttention(native(), {
      target: parseTarget(device, threads),
      shapes: selectShapes(preset, shapes, shapeFlags, path),
      repeats,
      runs: checkOnly ? 0 : runs,
      seed,
      comparisons: (gpu) => compare.map((file) => readComparison(file, gpu)),
      progress: this.jsonEnabled() || csv || !process.stderr.isTTY ? SILENT : consoleProgress(),
    });
    if (csv) process.stdout.write(resultsAsCsv(result));
    else this.log(printResults(result));
    if (svg !== undefined && result.rates !== null) writeSvg(svg, rooflineSvg(result, result.rates));
    if (result.failed > 0) {
      process.stderr.write(`tpla: CHECK_FAILED: ${result.failed} of ${result.rows.length} shapes differ from the float64 reference or between launches\n`);
      process.exitCode = ERRORS.CHECK_FAILED.exit;
    }
    return resultAsJson(result);
  }
}

function writeSvg(file: string, svg: string): void {
  try {
    writeFileSync(file, svg);
  } catch (cause) {
    throw new TplaError('IO_FAILED', `cannot write ${file}: ${(cause as Error).message}`, { cause });
  }
}
